namespace visionpulse::cpu::avx512 {}
