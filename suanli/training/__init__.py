"""Layer 5: run a training plan."""
