"""What of a model's build decides how it can be spread: its repeated layers and its heads."""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

from suanli.base.work import Operator, Work
from suanli.cost.rates import element_bytes

_ENTRY = re.compile(r"^(.*?)\.?(\d+)(?:\.(.*))?$")
_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The repeated part of a model.

    Attributes:
        prefix: Path of the list of layers; None where nothing repeats.
        layers: How many layers follow each other; 1 where nothing repeats.
        heads: Attention heads; 0 where there is no attention in every layer.
        kv_heads: Heads of keys and values.
        shared: First path components below a layer that hold matrix products, whose data
            tensor parallelism splits.
        boundary_bytes: What passes from a layer to the next, as captured.
        kv_bytes_per_token: Keys and values of one token of one sample in all layers, at two bytes
            an element; 0 without attention.
    """

    prefix: str | None
    layers: int
    heads: int
    kv_heads: int
    shared: frozenset[str]
    boundary_bytes: int
    kv_bytes_per_token: int

    def within(self, module: str) -> str | None:
        """The path below its layer of a module, "" for the layer itself; None outside of all."""
        if self.prefix is None or not module.startswith(self.prefix):
            return None
        rest = module[len(self.prefix) :].lstrip(".")
        number, _, below = rest.partition(".")
        return below if number.isdigit() else None

    def split_by_tensor(self, module: str) -> bool:
        """Whether tensor parallelism splits what this module makes."""
        below = self.within(module)
        return bool(below) and below is not None and below.partition(".")[0] in self.shared


def model_shape(work: Work) -> ModelShape:
    """Find the repeated layers: the list of modules whose entries hold most operations.

    Attention counts where every layer has the same number of heads, from the shapes
    [B, heads, T, D] of its operators.
    """
    forward = [op for op in work.operators if op.phase == "forward"]
    weight: Counter[str] = Counter()
    entries: dict[str, set[str]] = {}
    for op in forward:
        found = _ENTRY.match(op.module)
        if found:
            weight[found[1]] += op.flops
            entries.setdefault(found[1], set()).add(found[2])
    if not weight:
        return ModelShape(
            prefix=None,
            layers=1,
            heads=0,
            kv_heads=0,
            shared=frozenset(),
            boundary_bytes=work.output_bytes,
            kv_bytes_per_token=0,
        )
    prefix = weight.most_common(1)[0][0]
    inside = [op for op in forward if (m := _ENTRY.match(op.module)) and m[1] == prefix]
    attention = [op for op in inside if op.name == _ATTENTION and len(op.input_shapes[0]) == 4]
    layers = len(entries[prefix])
    heads, kv_heads = _heads(attention, layers)
    kv_heads = _projected(inside, attention, kv_heads) if heads else 0
    return ModelShape(
        prefix=prefix,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        shared=frozenset(_child(op.module) for op in inside if op.matmul) - {""},
        boundary_bytes=_boundary(inside, work),
        kv_bytes_per_token=sum(_token_bytes(op, kv_heads) for op in attention),
    )


def _heads(attention: list[Operator], layers: int) -> tuple[int, int]:
    if not attention or len(attention) % layers:
        return 0, 0
    kinds = {(op.input_shapes[0][1], op.input_shapes[1][1]) for op in attention}
    return kinds.pop() if len(kinds) == 1 else (0, 0)


def _projected(inside: list[Operator], attention: list[Operator], seen: int) -> int:
    """Heads that keys have before they are repeated for grouped queries.

    The narrowest product between the layer's input and its attention makes keys or values.
    """
    width = attention[0].input_shapes[1][3]
    first = inside.index(attention[0])
    home = _child(attention[0].module)
    widths = [
        op.output_shapes[0][-1]
        for op in inside[:first]
        if op.matmul and op.output_shapes and _child(op.module) == home
    ]
    heads = min(widths, default=0) // width
    return heads if 0 < heads < seen and seen % heads == 0 else seen


def _token_bytes(op: Operator, kv_heads: int) -> int:
    """Keys and values of one token: [B, heads, T, D] each, two bytes an element."""
    return sum(2 * kv_heads * shape[3] for shape in op.input_shapes[1:3])


def _child(module: str) -> str:
    found = _ENTRY.match(module)
    return (found[3] or "").partition(".")[0] if found else ""


def _boundary(inside: list[Operator], work: Work) -> int:
    last = [op for op in inside if op.matmul and op.output_shapes][-1:]
    if not last:
        return work.output_bytes
    return int(prod(last[0].output_shapes[0]) * element_bytes(last[0].dtype))
