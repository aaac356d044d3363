"""Layer 5: build, save, load and run an inference plan."""
