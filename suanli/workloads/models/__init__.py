"""Network definitions of the built-in workloads, each for one device, plain torch."""
