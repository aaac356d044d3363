"""Layer 4: several processes that train one model."""
