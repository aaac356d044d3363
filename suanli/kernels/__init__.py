"""Compile, check, tune and explain kernels, and the kernels that ship."""
