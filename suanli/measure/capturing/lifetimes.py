"""Follows every allocation of a step that runs on fake tensors, from birth to death."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from suanli.base.memory import Block, MemoryKind
from suanli.measure.capturing.inside import columns, inside_call
from suanli.measure.capturing.places import Places
from suanli.measure.capturing.traffic import plain_tensors, tensors_in


@dataclass
class _Life:
    kind: MemoryKind
    size: int
    born: int
    dies: int | None = None
    module: str = ""
    forward: bool = True


_BLOCK = 16  # channels that oneDNN handles together on processors with 512-bit registers


def _in_blocks(channels: int) -> int:
    return -(-channels // _BLOCK) * _BLOCK


def _blocked_gradients(gradient: torch.Tensor, inputs: torch.Tensor) -> int:
    """Bytes of the blocked copies that the gradient of a convolution's weights is made from."""
    if _channels_last(gradient) or _channels_last(inputs):
        return 0
    copied = inputs.element_size() < 4 or inputs.shape[1] >= _BLOCK
    return int(gradient.nbytes + (inputs.nbytes if copied else 0))


def _channels_last(tensor: torch.Tensor) -> bool:
    if tensor.dim() != 4 or tensor.shape[1] == 1:
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


class Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operator call made a storage and after which it was gone.

    Storages of fake tensors live exactly as long as real ones would: Python's references and those
    that autograd holds for the backward pass decide. Views share their base's storage and cost
    nothing. What a kernel allocates inside itself is not seen, but for what is known of the CPU's.

    Attributes:
        calls: Operator calls so far.
        forward: Whether what comes now belongs to the forward pass.
        last: Name of the operator that ran last, for the message when the model stops.
    """

    supports_higher_order_operators = True

    def __init__(self, places: Places, *, cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0
        self.forward = True
        self._places, self._cpu = places, cpu
        self.last = ""
        self._known: Any = WeakIdKeyDictionary()
        self._lives: list[_Life] = []
        self._forward_calls = 0

    def hold(self, tensors: Iterable[tuple[str, torch.Tensor]], kind: MemoryKind) -> None:
        """Note what is there before the step, by the path of the module that has it."""
        for module, tensor in tensors:
            for inner in plain_tensors(tensor):
                self._see(inner, kind, born=0, module=module)

    def name_gradients(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Once the backward pass is over: what the parameters' gradients stand in."""
        for module, parameter in parameters:
            if parameter.grad is not None:
                life = self._known.get(parameter.grad.untyped_storage())
                if life is not None:
                    life.kind, life.module = "gradients", module

    def start_backward(self) -> None:
        """The forward pass is over."""
        self.forward = False
        self._forward_calls = self.calls

    def blocks(self) -> tuple[Block, ...]:
        """All allocations in order of birth."""
        turn = self._forward_calls or None
        return tuple(
            Block(
                kind=life.kind,
                size_bytes=life.size,
                born=life.born,
                dies=life.dies,
                module=life.module,
                saved=life.forward
                and life.kind == "activations"
                and turn is not None
                and (life.dies is None or life.dies > turn),
            )
            for life in self._lives
            if life.size
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.last = str(func)
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        if self._cpu:
            if func is torch.ops.aten.convolution.default:
                self._blocked_convolution(args, out)
            elif func is torch.ops.aten.convolution_backward.default:
                self.scratch(_blocked_gradients(args[0], args[1]))
            self.scratch(inside_call(func, args))
        for tensor in tensors_in(out):
            self._see(tensor, "activations", born=self.calls)
        return out

    def scratch(self, size: int) -> None:
        """Note bytes that come and go now."""
        if size:
            self._scratch(size, until=self.calls)

    def scratch_between(self, size: int) -> None:
        """Note bytes that come and go before the next call, when the last one's waste is gone."""
        self.calls += 1
        self.scratch(size)

    def _blocked_convolution(self, args: tuple[Any, ...], out: torch.Tensor) -> None:
        """What oneDNN needs besides, where data does not lie channels last.

        It computes in blocks of sixteen channels: copies of input and weight come first and go
        again, the blocked output stays until the plain one is filled, in 16-bit types by way of
        a second copy, and so are those of transposed convolutions. Seen in the profiler's memory
        events of torch 2.13; fp32 inputs of few channels are taken as they are.
        """
        inputs, weight, transposed = args[0], args[1], bool(args[6])
        unfolded = columns(args, out)
        if unfolded is not None:
            self.scratch(unfolded)
            return
        if _channels_last(inputs):
            return
        narrow = inputs.element_size() < 4
        per_channel = out.numel() // max(1, out.shape[1])
        blocked = per_channel * _in_blocks(out.shape[1]) * out.element_size()
        weights = weight.nbytes // weight.shape[0] * _in_blocks(weight.shape[0])
        for size in (weights, inputs.nbytes if narrow or inputs.shape[1] >= _BLOCK else 0):
            self._scratch(size, until=self.calls)
        self._scratch(blocked, until=self.calls + 1)
        self.calls += 1
        if narrow or transposed:
            self._scratch(out.nbytes, until=self.calls)

    def _scratch(self, size: int, *, until: int) -> None:
        life = _Life(kind="workspace", size=size, born=self.calls, dies=until)
        life.module = self._places.module
        self._lives.append(life)

    def _see(
        self, tensor: torch.Tensor, kind: MemoryKind, *, born: int, module: str | None = None
    ) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        life = _Life(kind=kind, size=int(storage.nbytes()), born=born, forward=self.forward)
        life.module = self._places.module if module is None else module
        self._known[storage] = life
        self._lives.append(life)
        weakref.finalize(storage, self._gone, life).atexit = False

    def _gone(self, life: _Life) -> None:
        life.dies = self.calls


class FusedAttention(TorchFunctionMode):
    """Runs attention as the fused kernels do that every GPU has: no matrix of all pairs.

    Memory-efficient and flash attention keep queries, keys, values, the output and one number per
    query for the backward pass (Dao et al., "FlashAttention", 2022).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        apply: Any = _Attention.apply
        return apply(named["query"], named["key"], named["value"])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """[..., Q, D], [..., K, D], [..., K, V] -> [..., Q, V]."""
        out = query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=value.dtype)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        context.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of query, key and value."""
        query, key, value, _, _ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
