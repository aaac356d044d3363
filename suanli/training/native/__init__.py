"""Kernels of our own for what lies between the convolutions of a training step, on the CPU."""
