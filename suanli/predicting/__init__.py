"""Layer 3: what a workload would do on other machines, and which of them to choose."""
