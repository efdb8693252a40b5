namespace visionpulse::cpu::avx2 {}
