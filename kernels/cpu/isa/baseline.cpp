namespace visionpulse::cpu::baseline {}
