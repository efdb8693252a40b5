namespace visionpulse::cpu::avx512_bf16 {}
