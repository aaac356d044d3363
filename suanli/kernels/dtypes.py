"""dtypes of kernels by their short names."""

import torch

from suanli.base.errors import BadInputError
from suanli.kernels.declaration import DTYPES


def torch_dtype(name: str) -> torch.dtype:
    """The dtype behind a short name.

    Raises:
        BadInputError: There is none of this name.
    """
    if name not in DTYPES:
        raise BadInputError(f"unknown dtype {name!r}", next_step=f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def short_name(dtype: torch.dtype) -> str:
    """The short name of a dtype; torch's own where there is none."""
    names = {value: key for key, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def item_bytes(name: str) -> int:
    """Bytes of one element.

    Raises:
        BadInputError: There is no dtype of this name.
    """
    return torch_dtype(name).itemsize
