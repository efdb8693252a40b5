namespace visionpulse::cpu {}
