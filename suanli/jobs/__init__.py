"""Layer 6: several jobs on one machine, one after the other on each device."""
