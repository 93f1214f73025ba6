"""Sample, score, filter, refill: what every RL trainer shares."""
