"""Operator tables of decoder-only transformers, for jobs of which only the sizes are published."""

from dataclasses import dataclass

from suanli.base.work import Operator, Phase, Work


@dataclass(frozen=True, kw_only=True)
class Gpt:
    """Sizes of a GPT.

    Attributes:
        fused_attention: Whether scores stay on the chip (flash attention); else they are written,
            scaled and masked, passed through softmax and dropout, each in memory.
        dropout: Whether dropout runs (vTrain's Megatron yes, MPT no).
    """

    layers: int
    wide: int
    heads: int
    length: int
    words: int
    fused_attention: bool = True
    dropout: bool = False


def gpt_work(sizes: Gpt, batch: int, *, states: int = 2) -> Work:
    """One micro-batch: forward, backward and an Adam update, element sizes as of fp32.

    Widths: tokens t = batch * length, hidden h. Per block: norm, qkv product, attention, output
    product, norm, two products of 4h, and the sums between them.
    """
    found: list[Operator] = []
    for layer in range(sizes.layers):
        found += _block(sizes, batch, f"blocks.{layer}", "forward")
    found += _ends(sizes, batch, "forward") + _ends(sizes, batch, "backward")
    for layer in reversed(range(sizes.layers)):
        found += _block(sizes, batch, f"blocks.{layer}", "backward")
    h = sizes.wide
    parameters = sizes.layers * (12 * h * h + 13 * h) + (sizes.words + sizes.length) * h
    update = Operator(
        name="adam_step",
        phase="optimizer",
        flops=13 * parameters,
        bytes_read=(2 + states) * 4 * parameters,
        bytes_written=(1 + states) * 4 * parameters,
        parameter_bytes=4 * parameters,
    )
    return Work(
        operators=(*found, update),
        batch=batch,
        parameters=parameters,
        parameter_bytes=4 * parameters,
        input_bytes=8 * batch * sizes.length,
        output_bytes=4,
    )


def _block(g: Gpt, batch: int, module: str, phase: Phase) -> list[Operator]:
    t, h = batch * g.length, g.wide
    back = phase == "backward"
    found = [_rows("native_layer_norm", t, h, module, phase)]
    found += _product(t, 3 * h, h, module, phase)
    found += _attention(g, batch, module, phase)
    found += _product(t, h, h, module, phase)
    sums = 4 if g.dropout else 2  # dropout and residual sums: reads and writes of t x h
    found += [_sweep("add", t * h * (3 + (2 if g.dropout else 0)), module, phase)] * (sums // 2)
    found.append(_rows("native_layer_norm", t, h, module, phase))
    found += _product(t, 4 * h, h, module, phase)
    found.append(_sweep("gelu", 4 * t * h * (3 if back else 2), module, phase))
    found += _product(t, h, 4 * h, module, phase)
    found += [_sweep("add", t * h * (3 + (2 if g.dropout else 0)), module, phase)] * (sums // 2)
    return found


def _ends(g: Gpt, batch: int, phase: Phase) -> list[Operator]:
    t, h = batch * g.length, g.wide
    found = [_sweep("embedding", 2 * t * h, "", phase), *_product(t, g.words, h, "head", phase)]
    return [*found, _sweep("_log_softmax", 3 * t * g.words, "", phase)]


def _attention(g: Gpt, batch: int, module: str, phase: Phase) -> list[Operator]:
    b, s, d = batch * g.heads, g.length, g.wide // g.heads
    passes = 2 if phase == "backward" else 1
    q = (b, s, d)
    if g.fused_attention:
        flops = (5 if passes == 2 else 4) * (b * s * s * d) * (2 if passes == 2 else 1)
        moved = 4 * b * s * d
        name = "scaled_dot_product_attention" + ("_backward" if passes == 2 else "")
        return [
            Operator(
                name=name,
                phase=phase,
                module=module,
                flops=flops,
                needed_flops=flops // 2,
                bytes_read=3 * passes * moved,
                bytes_written=moved * (3 if passes == 2 else 1),
                input_shapes=(q, q, q),
                output_shapes=(q,),
                matmul=True,
            )
        ]
    found = [_sweep("copy", 6 * b * s * d, module, phase)]
    for _ in range(passes):
        found += [_bmm(b, s, s, d, module, phase), _bmm(b, s, d, s, module, phase)]
    found.append(_sweep("masked_fill", 2 * b * s * s, module, phase))
    found.append(_rows("_softmax", b * s, s, module, phase))
    if g.dropout:
        found.append(_sweep("dropout", int(2.25 * b * s * s), module, phase))
    return found


def _product(m: int, n: int, k: int, module: str, phase: Phase) -> list[Operator]:
    if phase == "forward":
        return [_matmul("addmm", (m, n, k), module, phase)]
    sides = [_matmul("mm", (m, k, n), module, phase), _matmul("mm", (n, k, m), module, phase)]
    return [*sides, _sweep("sum", m * n, module, phase)]


def _matmul(name: str, sizes: tuple[int, int, int], module: str, phase: Phase) -> Operator:
    m, n, k = sizes
    return Operator(
        name=name,
        phase=phase,
        module=module,
        flops=2 * m * n * k,
        bytes_read=4 * (m * k + k * n),
        bytes_written=4 * m * n,
        parameter_bytes=4 * k * n if phase == "forward" else 0,
        input_shapes=((m, k), (k, n)),
        output_shapes=((m, n),),
        matmul=True,
    )


def _bmm(b: int, m: int, n: int, k: int, module: str, phase: Phase) -> Operator:
    return Operator(
        name="bmm",
        phase=phase,
        module=module,
        flops=2 * b * m * n * k,
        bytes_read=4 * b * (m * k + k * n),
        bytes_written=4 * b * m * n,
        input_shapes=((b, m, k), (b, k, n)),
        output_shapes=((b, m, n),),
        matmul=True,
    )


def _rows(name: str, rows: int, length: int, module: str, phase: Phase) -> Operator:
    back = phase == "backward"
    size = 4 * rows * length
    return Operator(
        name=name + ("_backward" if back else ""),
        phase=phase,
        module=module,
        flops=rows * length,
        bytes_read=size * (2 if back else 1),
        bytes_written=size,
        input_shapes=((rows, length),),
        output_shapes=((rows, length),),
    )


def _sweep(name: str, moved: int, module: str, phase: Phase) -> Operator:
    """Reads and writes of `moved` elements in all."""
    return Operator(
        name=name,
        phase=phase,
        module=module,
        flops=moved,
        bytes_read=2 * moved,
        bytes_written=2 * moved,
        input_shapes=((moved,),),
        output_shapes=((moved,),),
    )
