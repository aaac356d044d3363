"""Layer 2: the only clock, and the only judge of whether an answer stayed right."""
