"""From a name to a kernel: one that ships, or one in a person's own Python file."""

from suanli.kernels.cuda.declared import declaration
from suanli.kernels.declaration import Declaration
from suanli.kernels.shipped import shipped_kernel
from suanli.kernels.spec import load


def find_kernel(ref: str) -> Declaration:
    """The kernel behind a reference; one in CUDA C++ as what runs it on a GPU.

    Args:
        ref: The name of one that ships, "file.py:name", or "file.py" with one kernel in it.

    Raises:
        BadInputError: There is no such file or name, or the file fails.
    """
    file = ref.rpartition(":")[0] if ".py:" in ref else ref
    if not file.endswith(".py"):
        return shipped_kernel(ref)
    kernel = load(ref)
    return kernel if isinstance(kernel, Declaration) else declaration(kernel)
