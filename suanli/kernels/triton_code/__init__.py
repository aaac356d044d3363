"""Triton functions, one file a family. Imported only where Triton is installed."""
