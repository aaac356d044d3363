"""ONNX element types as torch's (numbers from `TensorProto.DataType`)."""

import torch

from suanli.workloads.importers.onnx_value import Call

_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def known_type(number: int) -> torch.dtype | None:
    """The torch type, or None where there is no such one."""
    return _TYPES.get(number)


def torch_type(number: int, call: Call) -> torch.dtype:
    """The torch type that an operator asks for.

    Raises:
        CaptureError: torch has none.
    """
    found = known_type(number)
    if found is None:
        raise call.error(f"uses element type {number}, which is not supported")
    return found
