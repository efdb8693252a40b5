namespace visionpulse::cpu::neon {}
