"""The kernels that ship: what they compute, what they are held to, what they cost.

The operators that models call stand in `suanli.kernels.operators`.
"""

from functools import cache
from importlib import import_module

from suanli.base.errors import BadInputError
from suanli.kernels.declaration import Declaration

_FAMILIES = (
    "linear_cross_entropy",
    "cross_entropy",
    "norms",
    "gates",
    "batch_norm",
    "optimizers",
    "int8_linear",
    "images",
)


@cache
def shipped() -> dict[str, Declaration]:
    """All kernels that ship, by name. Imports torch, not Triton."""
    found: dict[str, Declaration] = {}
    for family in _FAMILIES:
        module = import_module(f"{__name__}.{family}")
        found |= {k.name: k for k in vars(module).values() if isinstance(k, Declaration)}
    return found


def shipped_kernel(name: str) -> Declaration:
    """One kernel that ships.

    Raises:
        BadInputError: None has this name.
    """
    if name not in shipped():
        raise BadInputError(
            f"no kernel {name!r} ships", next_step=f"there are {', '.join(shipped())}"
        )
    return shipped()[name]
