"""Layer 0: the records that two parts share, their JSON, errors and small facts. No torch."""
