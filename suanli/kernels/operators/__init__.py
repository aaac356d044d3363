"""The shipped kernels as `torch.library` operators: PyTorch on a CPU, Triton on a GPU.

Each has a fake-tensor registration, and where training needs it an autograd one, so that
`torch.compile` and `torch.export` can use it.
"""
