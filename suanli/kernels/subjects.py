"""From a name to a kernel in Triton: one that ships, or one in a person's own Python file."""

from suanli.base.errors import BadInputError
from suanli.kernels.declaration import Declaration
from suanli.kernels.shipped import shipped_kernel
from suanli.kernels.spec import load


def find_kernel(ref: str) -> Declaration:
    """The Triton kernel behind a reference.

    Args:
        ref: The name of one that ships, "file.py:name", or "file.py" with one kernel in it.

    Raises:
        BadInputError: There is no such file or name, it is no Triton kernel, or the file fails.
    """
    file = ref.rpartition(":")[0] if ".py:" in ref else ref
    if not file.endswith(".py"):
        return shipped_kernel(ref)
    kernel = load(ref)
    if not isinstance(kernel, Declaration):
        raise BadInputError(f"{kernel.name} is CUDA C++, not Triton")
    return kernel
