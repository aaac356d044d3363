"""Layer 6: time joined with work: where a step's time goes, why, and what to change."""
