"""A step over new tokens when the keys and values of earlier ones are kept."""

from dataclasses import replace
from functools import lru_cache

from suanli.base.work import Operator, Work
from suanli.cost.model_shape import ModelShape
from suanli.cost.rates import element_bytes

_ATTENTION = "scaled_dot_product_attention"


@lru_cache(maxsize=32)
def with_context(work: Work, shape: ModelShape, tokens: int) -> Work:
    """The same work with attention over `tokens` earlier tokens of every sample as well.

    Each query meets them all: two products as long as the context, and their keys and values are
    read once.

    Args:
        work: Captured over the new tokens alone, in inference.
        shape: Of the model; keys and values are kept at their own number of heads.
        tokens: Earlier tokens per sample.
    """
    operators = tuple(
        _longer(op, shape.kv_heads, tokens) if _is_attention(op) else op for op in work.operators
    )
    kept = sum(_kept(op, shape.kv_heads, tokens) for op in work.operators if _is_attention(op))
    return replace(work, operators=operators, kept_elements=kept)


def _is_attention(op: Operator) -> bool:
    return op.name == _ATTENTION and all(len(s) == 4 for s in op.input_shapes[:3])


def _kept(op: Operator, kv_heads: int, tokens: int) -> int:
    """Elements of the keys and values of all earlier tokens."""
    query, key, value = op.input_shapes[:3]
    return query[0] * kv_heads * tokens * (key[3] + value[3])


def _longer(op: Operator, kv_heads: int, tokens: int) -> Operator:
    query, key, value = op.input_shapes[:3]
    batch, heads, new, _ = query
    flops = 2 * batch * heads * new * tokens * (key[3] + value[3])
    kept = _kept(op, kv_heads, tokens)
    grown = tuple((*shape[:2], shape[2] + tokens, shape[3]) for shape in (key, value))
    return replace(
        op,
        flops=op.flops + flops,
        needed_flops=None if op.needed_flops is None else op.needed_flops + flops,
        bytes_read=op.bytes_read + int(kept * element_bytes(op.dtype)),
        input_shapes=(query, *grown, *op.input_shapes[3:]),
    )
