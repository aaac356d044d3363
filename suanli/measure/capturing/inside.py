"""What kernels of torch's CPU library allocate inside themselves, which fake tensors do not show.

Seen in the profiler's memory events of torch 2.13 with oneDNN on a Xeon with AMX; sizes in bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from suanli.cost.cpu_manner import SMALL_IMAGE

_HALVES = (torch.bfloat16, torch.float16)
_WIDE_KERNEL = 3  # side of a kernel above which oneDNN gets even a single small image
_MEANS = (torch.ops.aten.mean.dim, torch.ops.aten.mean.default)
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_PACKED_FROM = (
    64  # queries and keys, from which on attention packs keys and values (FlashAttention)
)
# oneDNN's LSTM: states of [B, H] that a call keeps beside the gates of all moments; bytes that it
# leaves for the backward pass by moment and number of [B, H], and of [B, I - H] where inputs are
# wider than states, by the width of an element: in 16 bits a part stays in fp32.
_CALL_STATES = 10
_LEFT_BYTES, _LEFT_WIDER_BYTES = {4: 44, 2: 36}, {4: 24, 2: 20}


def inside_call(func: Any, args: Sequence[Any]) -> int:
    """Bytes that one call allocates and frees again.

    Args:
        func: The operator, below autograd.
        args: Its positional arguments.
    """
    if func in _MEANS and args[0].dtype in _HALVES:
        return int(args[0].numel()) * 4  # it is brought to fp32 as a whole
    if func is _FLASH and args[0].dtype is torch.bfloat16 and _packs():
        queries, keys, values = args[:3]
        if min(queries.shape[-2], keys.shape[-2]) >= _PACKED_FROM:
            return int(keys.nbytes + values.nbytes)
    return 0


def columns(args: Sequence[Any], out: torch.Tensor) -> int | None:
    """Bytes of the matrix of windows that torch's own convolution multiplies with the weights.

    Torch leaves a single small image in fp32 to it, as `use_mkldnn` in its Convolution.cpp says.

    Args:
        args: Of `aten::convolution`.
        out: What it gave.

    Returns:
        None where oneDNN computes it.
    """
    inputs, weight, transposed, groups = args[0], args[1], bool(args[6]), int(args[8])
    kernel = weight.shape[2:]
    large = weight.dim() > 4 or inputs.shape[0] > 1 or inputs.numel() > SMALL_IMAGE
    wide = len(kernel) == 2 and min(kernel) > _WIDE_KERNEL
    if inputs.dtype is not torch.float32 or groups > 1 or large or wide:
        return None
    if prod(kernel) == 1 and prod(args[3]) == 1 and not any(args[4]):
        return 0  # the image is the matrix
    side, depth = (inputs, out.shape[1]) if transposed else (out, inputs.shape[1])
    return int(depth * prod(kernel) * prod(side.shape[2:]) * inputs.element_size())


def _packs() -> bool:
    """Whether products in bf16 have tiles, for which matrices are laid out anew."""
    return bool(torch.cpu._is_amx_tile_supported())


@contextmanager
def shortcuts(note: Callable[[int], None]) -> Iterator[None]:
    """Tell what `nn.MultiheadAttention` needs where it takes its shortcut in inference.

    The shortcut is one call below Python, and so is kept away while a model is followed. It holds
    queries, keys and values twice, or once and the scores of all pairs.

    Args:
        note: Told the bytes when such a module begins.
    """

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.MultiheadAttention) and _has_shortcut(module, args):
            given = args[0]
            samples, length = given.shape[0], given.shape[1]
            scores = samples * module.num_heads * length * length * given.element_size()
            note(max(6 * given.nbytes, 3 * given.nbytes + scores))

    handle = register_module_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()


def _has_shortcut(module: nn.MultiheadAttention, args: tuple[Any, ...]) -> bool:
    """Torch's own conditions (`nn.MultiheadAttention.forward`), those that models differ in."""
    alike = len(args) >= 3 and args[0] is args[1] is args[2] and args[0].dim() == 3
    return (
        alike
        and not module.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and module._qkv_same_embed_dim
        and module.batch_first
        and module.in_proj_bias is not None
        and module.bias_k is None
        and not module.add_zero_attn
        and module.num_heads % 2 == 0
    )


class WholeLstm(TorchFunctionMode):
    """Runs LSTMs as oneDNN does: one call per layer and direction.

    On fake tensors torch takes LSTMs apart, on a CPU oneDNN computes them, in its own memory.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "lstm" or kwargs or not _is_plain(args):
            return func(*args, **kwargs)
        return _lstm(args)


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether it is neither a packed sequence nor projected."""
    if len(args) != 9 or isinstance(args[1], torch.Tensor):
        return False
    data, _, weights, biases, layers, _, _, both, _ = args
    known = data.dtype in (torch.float32, *_HALVES)
    return known and len(weights) == layers * (1 + both) * (4 if biases else 2)


def _lstm(args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `torch.lstm`: [T, B, I] -> [T, B, H], [L, B, H], [L, B, H]."""
    data, states, weights, biases, layers, dropout, train, both, batch_first = args
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        data, weights = data.to(dtype), [w.to(dtype) for w in weights]
    data = (data.transpose(0, 1) if batch_first else data).contiguous()
    per, directions = (4 if biases else 2), (2 if both else 1)
    hidden: list[torch.Tensor] = []
    cells: list[torch.Tensor] = []
    layer_of: Any = _OneLayer.apply
    for layer in range(layers):
        outs = []
        for at in range(layer * directions, (layer + 1) * directions):
            mine = weights[per * at : per * (at + 1)]
            out, last, cell = layer_of(data, states[0][at], states[1][at], train, *mine)
            outs.append(out)
            hidden.append(last)
            cells.append(cell)
        data = torch.cat(outs, -1) if both else outs[0]
        if dropout and train and layer < layers - 1:
            data = nn.functional.dropout(data, dropout)
    out = data.transpose(0, 1) if batch_first else data
    return out, torch.stack(hidden), torch.stack(cells)


class _OneLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        data: torch.Tensor,
        hidden: torch.Tensor,
        cell: torch.Tensor,
        train: bool,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, B, I] -> [T, B, H], [B, H], [B, H]."""
        times, samples, inner = data.shape
        size = weights[1].shape[1]
        out = data.new_empty(times, samples, size)
        last, ends = data.new_empty(samples, size), data.new_empty(samples, size)
        if train:
            width, wider = data.element_size(), max(0, inner - size)
            by_moment = _LEFT_BYTES[width] * size + _LEFT_WIDER_BYTES[width] * wider
            left = width * times * samples * 4 * size + (times + 1) * samples * by_moment
            kept = data.new_empty(left, dtype=torch.uint8)
            context.save_for_backward(data, out, hidden, cell, *weights, kept)
        _in_call(data, weights, train=train)
        return out, last, ends

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of data, states and weights."""
        data, _, hidden, cell, *weights, _ = context.saved_tensors
        given = gradients[0].contiguous()
        found = [torch.empty_like(t) for t in (data, hidden, cell)]
        passed = [torch.empty_like(w) for w in weights]
        _in_call(data, weights, train=True)
        del given
        return (*found, None, *passed)


def _in_call(data: torch.Tensor, weights: Sequence[torch.Tensor], *, train: bool) -> None:
    """Allocate and free what one call needs: weights in blocks, gates, wide inputs once more."""
    times, samples, inner = data.shape
    size = weights[1].shape[1]
    needed = weights[0].numel() + weights[1].numel() + _CALL_STATES * samples * size
    if not (train and data.dtype in _HALVES):
        needed += times * samples * 4 * size
    if not train and inner > size:
        needed += times * samples * inner
    data.new_empty(needed)
