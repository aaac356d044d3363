"""Maps what a compiler or a backend ran back to the operators that were captured."""

import re
from collections.abc import Sequence

from suanli.base.work import Operator, Phase
from suanli.engines.backend import LayerTime
from suanli.profiling.rows import Row

_NUMBER = re.compile(r"_\d+$")
_BRANCHES = 1  # products between the one that an operator stands behind and the kernel that has it
_PRODUCTS = (
    "conv",
    "gemm",
    "matmul",
    "fullyconnected",
    "linear",
    "addmm",
    "bmm",
    "attention",
    "mm",
)


def spread(
    layers: Sequence[LayerTime], operators: Sequence[Operator], phase: Phase = "forward"
) -> list[Row]:
    """Rows for layers that ran, each with the captured operators that are in it.

    A layer takes the operators of the modules that the backend names as its origin. Products that
    no layer named go to the layers of products that named none, in order, where there are as many
    of each. What is left stands in the graph behind a product: a kernel that a compiler made behind
    it and named after the operator computes it, else it was fused into the product's layer.

    Args:
        layers: In execution order.
        operators: Of the same phase, in execution order, as captured.
        phase: Of the rows.
    """
    counted = [op for op in operators if op.flops + op.bytes_read + op.bytes_written > 0]
    owner: list[int | None] = [None] * len(counted)
    _by_origin(layers, counted, owner)
    _by_order(layers, counted, owner)
    _behind(layers, counted, owner)
    rows: list[Row] = []
    for index, layer in enumerate(layers):
        mine = [i for i, layer_index in enumerate(owner) if layer_index == index]
        rows.append(_row(layer, [counted[i] for i in mine], mine, phase))
    _placed_by_neighbours(layers, rows)
    return merged(rows)


def _by_origin(
    layers: Sequence[LayerTime], operators: Sequence[Operator], owner: list[int | None]
) -> None:
    by_module: dict[str, list[int]] = {}
    for index, op in enumerate(operators):
        by_module.setdefault(op.module, []).append(index)
    # the layer that computes a module's product is its owner; reorders may name it too
    ranked = sorted(range(len(layers)), key=lambda i: not _is_product(layers[i]))
    for place in ranked:
        for name in layers[place].origin:
            for index in by_module.get(name.partition("/")[0], []) if name else []:
                if owner[index] is None and (
                    not operators[index].matmul or _is_product(layers[place])
                ):
                    owner[index] = place
            _outside_modules(name, place, operators, owner)


def _outside_modules(
    name: str, place: int, operators: Sequence[Operator], owner: list[int | None]
) -> None:
    """Give a layer the operator outside of all modules that it names, as "mean_1:ReduceMean"."""
    called = _NUMBER.sub("", name.partition(":")[0])
    for index, op in enumerate(operators):
        if owner[index] is None and not op.module and op.name == called:
            owner[index] = place
            return


def _by_order(
    layers: Sequence[LayerTime], operators: Sequence[Operator], owner: list[int | None]
) -> None:
    taken = {place for place in owner if place is not None}
    free = [i for i, layer in enumerate(layers) if i not in taken and _is_product(layer)]
    left = [i for i, op in enumerate(operators) if op.matmul and owner[i] is None]
    for convolutions in (True, False):
        places = [i for i in free if ("conv" in _words(layers[i])) == convolutions]
        indices = [i for i in left if ("conv" in operators[i].name) == convolutions]
        if len(places) == len(indices):
            for place, index in zip(places, indices, strict=True):
                owner[index] = place


def _behind(
    layers: Sequence[LayerTime], operators: Sequence[Operator], owner: list[int | None]
) -> None:
    last: int | None = None
    product: int | None = None
    for index, op in enumerate(operators):
        if owner[index] is None:
            generated = None if product is None else _generated_behind(layers, product, op.name)
            owner[index] = last if generated is None else generated
        else:
            product = owner[index]
        last = owner[index]


def _generated_behind(layers: Sequence[LayerTime], product: int, name: str) -> int | None:
    """The next kernel that a compiler made and named after the operator, two products on at most.

    What joins two branches of a model runs behind the products of both.
    """
    passed = 0
    for place in range(product + 1, len(layers)):
        if _is_generated(layers[place]) and name in _words(layers[place]):
            return place
        passed += _is_product(layers[place])
        if passed > _BRANCHES:
            return None
    return None


def _placed_by_neighbours(layers: Sequence[LayerTime], rows: Sequence[Row]) -> None:
    """Kernels that a compiler made for no operator of the count stand where what runs before does.

    Args:
        layers: In execution order.
        rows: One each.
    """
    known = [row for row in rows if row.operators]
    module, source = (known[0].module, known[0].source) if known else ("", "")
    for layer, row in zip(layers, rows, strict=True):
        if row.operators:
            module, source = row.module, row.source
        elif _is_generated(layer):
            row.module, row.source = module, source


def _is_product(layer: LayerTime) -> bool:
    """Whether a layer computes a product: Inductor names its fused kernels after all around it."""
    words = _words(layer)
    named = any(word in words for word in _PRODUCTS)
    return named and "reorder" not in words and not _is_generated(layer)


def _is_generated(layer: LayerTime) -> bool:
    """Whether Inductor made the kernel from operators other than a template's product."""
    words = _words(layer)
    return "_fused_" in words and "tem_fused" not in words


def _words(layer: LayerTime) -> str:
    return f"{layer.kind} {layer.name}".lower()


def _row(layer: LayerTime, operators: list[Operator], indices: list[int], phase: Phase) -> Row:
    main = max(operators, key=lambda op: (op.matmul, op.flops), default=None)
    names = tuple(dict.fromkeys(op.name for op in operators))
    return Row(
        name=main.name if main is not None else layer.kind,
        phase=phase,
        module=main.module if main is not None else (layer.origin[0] if layer.origin else ""),
        source=main.source if main is not None else "",
        count=1,
        ms=layer.time_ms,
        operators=operators,
        fused=names if len(operators) > 1 else (),
        kernel=layer.name,
        precision=layer.precision,
        indices=indices,
    )


def merged(rows: Sequence[Row]) -> list[Row]:
    """One row for all layers of a kind that stand for no operator, such as changes of layout."""
    kept: list[Row] = []
    others: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.operators or row.module:
            kept.append(row)
            continue
        key = (row.name, row.precision)
        first = others.setdefault(key, row)
        if first is not row:
            first.count += 1
            first.ms += row.ms
    return kept + list(others.values())
