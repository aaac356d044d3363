"""The kernels that ship, each with its reference, its cost and its operator."""
