"""Which ways of spreading a step over N devices are legal, in the order in which to try them."""

from collections.abc import Iterator

from suanli.base.errors import BadInputError
from suanli.base.prediction import ParallelLayout
from suanli.cost.model_shape import ModelShape

_MOST_TENSOR = 8  # beyond a server's links tensor parallelism never pays
_MOST_MICRO_BATCHES = 256


def legal_splits(
    shape: ModelShape, *, devices: int, batch: int, together: int
) -> Iterator[tuple[int, int, int]]:
    """(dp, tp, pp) with dp * tp * pp = devices that divide batch, heads and layers.

    Args:
        shape: Of the model.
        devices: How many there are.
        batch: Samples of a step, over all devices.
        together: Devices that a fast link joins, within which tensor parallelism stays.
    """
    for tp in _divisors(devices):
        for pp in _divisors(devices // tp):
            dp = devices // (tp * pp)
            legal = not _obstacle(shape, dp=dp, tp=tp, pp=pp, batch=batch)
            if legal and tp <= min(_MOST_TENSOR, together):
                yield dp, tp, pp


def checked(shape: ModelShape, layout: ParallelLayout, *, devices: int, batch: int) -> None:
    """Refuse a layout that cannot be.

    Raises:
        BadInputError: It does not divide devices, batch, heads or layers; the message says which.
    """
    dp, tp, pp = layout.dp, layout.tp, layout.pp
    if min(dp, tp, pp, layout.micro_batches) < 1:
        raise BadInputError("every number of a layout must be at least 1")
    if layout.devices != devices:
        raise BadInputError(
            f"dp={dp} tp={tp} pp={pp} is {layout.devices} devices, not {devices}",
            next_step=f"give --gpus {layout.devices}",
        )
    obstacle = _obstacle(shape, dp=dp, tp=tp, pp=pp, batch=batch)
    if obstacle:
        raise BadInputError(obstacle)


def micro_batches(replica_batch: int, pp: int) -> list[int]:
    """Into how many parts a replica's batch may be cut, those worth trying first.

    Without stages few are best; with stages enough of them to keep the bubble small.
    """
    parts = [n for n in _divisors(replica_batch) if n <= _MOST_MICRO_BATCHES]
    if pp == 1:
        return parts
    full = [n for n in parts if n >= 4 * pp]
    return (full[:2] + [n for n in reversed(parts) if n not in full[:2]])[:4]


def _obstacle(shape: ModelShape, *, dp: int, tp: int, pp: int, batch: int) -> str:
    """Why a split cannot be, or ""."""
    if batch % dp:
        return f"a batch of {batch} does not divide into dp={dp} replicas"
    if tp > 1 and not shape.heads:
        return f"tp={tp} needs a model whose layers all have attention"
    if tp > 1 and shape.heads % tp:
        return f"{shape.heads} attention heads do not divide by tp={tp}"
    if tp > 1 and shape.kv_heads % tp and tp % shape.kv_heads:
        return f"{shape.kv_heads} heads of keys and values do not divide by tp={tp}"
    if pp > 1 and (not shape.heads or shape.layers % pp):
        return f"{shape.layers} layers do not divide into pp={pp} stages of equal layers"
    return ""


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
