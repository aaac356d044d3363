"""torchao: the linear layers in int8 or fp8, the rest in bf16 or fp32, compiled by Inductor.

Weights are quantised again at every load, from the program's fp32 ones; the result is the same each
time. Activations are quantised per row as they come, so no calibration is needed.

Schemes: "int8-dynamic" (weights and activations), "int8-weight" (weights only: saves memory
traffic), "fp8-dynamic" (GPUs of compute capability 8.9 and later).

`quantization.keep` holds names of linear layers, such as "encoder.layer.0.output.dense", or
patterns of them with `*`.

Options:
    rest: What everything but the quantised layers runs in.
    static_batch, mode: As in the inductor backend.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from suanli.base.errors import SuanliError
from suanli.base.lazy import need
from suanli.base.plan import BackendSpec, Plan
from suanli.engines.backend import BuildNote, Runner
from suanli.engines.backends._compiled import PerBatch, overwrites
from suanli.engines.backends._graph import attribute
from suanli.engines.backends._precision import operator_name
from suanli.engines.backends._torch import (
    Prepared,
    need_compiler,
    prepared_graph,
    use_inductor_cache,
)
from suanli.engines.program import Program

INSTALL = "pip install torchao"

_CONFIGS = {
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "int8-weight": "Int8WeightOnlyConfig",
    "fp8-dynamic": "Float8DynamicActivationFloat8WeightConfig",
}
_ROW = 16  # fp8 products on tensor cores want both sizes of the weight to be multiples of it


class TorchAoBackend:
    """Quantises linear layers, then compiles."""

    spec = BackendSpec(
        name="torchao",
        install=INSTALL,
        packages=("torchao",),
        devices=("cpu", "cuda"),
        quantizations={
            "cpu": ("int8-dynamic", "int8-weight"),
            "cuda": ("fp8-dynamic", "int8-dynamic", "int8-weight"),
        },
        options={
            "rest": ("bf16", "fp32"),
            "mode": ("max-autotune", "default", "max-autotune-no-cudagraphs"),
        },
        option_needs={"rest": ("cpu",), "mode": ("cuda",)},
        batch_option="static_batch",
        build_s=25.0,
        promise={
            "int8-dynamic": 0.3,
            "int8-weight": 0.3,
            "cuda/fp8-dynamic": 0.2,
            "cuda/int8-dynamic": 0.25,
            "cuda/int8-weight": 0.3,
        },
        ships=False,
    )

    def build(
        self,
        program: Program,
        plan: Plan,
        folder: Path,
        calibration: Sequence[tuple[torch.Tensor, ...]] | None = None,
    ) -> BuildNote:
        """Make sure that there is something to quantise, see `suanli.engines.backend.Backend`."""
        need_compiler(plan)
        module, _ = _float_graph(program, plan)
        layers = linear_layers(module)
        chosen = _chosen(layers, plan)
        details = {
            "quantized_layers": str(len(chosen)),
            "kept_layers": str(len(layers) - len(chosen)),
        }
        return BuildNote(plan=plan, details={**details, "load": "compiles again"})

    def load(self, program: Program, plan: Plan, folder: Path) -> Runner:
        """Quantise and prepare; each batch size compiles at its first call."""
        need_compiler(plan)
        use_inductor_cache()
        module, ready = _float_graph(program, plan)
        chosen = _chosen(linear_layers(module), plan)
        quantise(module, chosen, _scheme(plan))
        call = PerBatch(module, program.signature, plan)
        return ready.runner(program.signature, plan, call, copy=overwrites(plan))


def linear_layers(module: fx.GraphModule) -> dict[str, nn.Linear]:
    """Put an `nn.Linear` in the place of every product with a constant weight.

    Args:
        module: Flat module, changed in place.

    Returns:
        Name of the layer -> the layer, in the order of the graph. A name is the path of the weight
        without its last part; a weight used twice makes two layers.
    """
    found: dict[str, nn.Linear] = {}
    for node in list(module.graph.nodes):
        parts = _product(module, node)
        if parts is None:
            continue
        operand, weight, bias, path = parts
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        name = path if path not in found else f"{path}.{len(found)}"
        found[name] = layer
        slot = f"linear_{len(found)}"
        module.add_module(slot, layer)
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.call_module(slot, (operand,)))
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return found


def _product(
    module: fx.GraphModule, node: fx.Node
) -> tuple[fx.Node, torch.Tensor, torch.Tensor | None, str] | None:
    """Operand, weight [out, in], bias [out] and name of a product with a constant weight."""
    name = operator_name(node)
    if name == "linear":
        operand, weight, bias = (*node.args, None)[:3]
    elif name == "addmm" and not node.kwargs:
        bias, operand, weight = node.args
    else:
        return None
    if not isinstance(operand, fx.Node):
        return None
    constants = [n for n in (weight, bias) if n is not None]
    if any(not isinstance(n, fx.Node) or n.op != "get_attr" for n in constants):
        return None
    assert isinstance(weight, fx.Node)
    value = attribute(module, str(weight.target)).detach()
    if name == "addmm":
        value = value.t()
    offset = attribute(module, str(bias.target)).detach() if isinstance(bias, fx.Node) else None
    if value.dim() != 2 or (offset is not None and offset.dim() != 1):
        return None
    path = str(weight.meta.get("suanli_path", weight.target)).rpartition(".")[0]
    return operand, value, offset, path or weight.name


def quantise(module: fx.GraphModule, layers: Sequence[nn.Linear], scheme: str) -> None:
    """Quantise layers of a module in place.

    Raises:
        MissingBackendError: torchao is absent.
        SuanliError: torchao cannot do it here; its reason is given.
    """
    with _quiet():
        library = need("torchao.quantization", INSTALL)
        config: Any = getattr(library, _CONFIGS[scheme])()
        chosen = {id(layer) for layer in layers}
        try:
            library.quantize_(module, config, filter_fn=lambda layer, _: id(layer) in chosen)
        except (AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SuanliError(f"torchao cannot quantise to {scheme}: {line}") from error


def _chosen(layers: dict[str, nn.Linear], plan: Plan) -> list[nn.Linear]:
    """The layers that are quantised.

    Raises:
        SuanliError: There is none.
    """
    scheme = _scheme(plan)
    keep = plan.quantization.keep if plan.quantization else ()
    chosen = [
        layer
        for name, layer in layers.items()
        if not any(fnmatchcase(name, pattern) for pattern in keep)
        and (scheme != "fp8-dynamic" or not any(size % _ROW for size in layer.weight.shape))
    ]
    if not chosen:
        raise SuanliError("the model has no linear layer that could be quantised")
    return chosen


def _float_graph(program: Program, plan: Plan) -> tuple[fx.GraphModule, Prepared]:
    rest = plan.options.get("rest", "bf16")
    if rest not in ("bf16", "fp32"):
        raise SuanliError(f"torchao runs the rest in bf16 or fp32, not in {rest}")
    return prepared_graph(program, plan.with_(precision=rest))


def _scheme(plan: Plan) -> str:
    scheme = plan.quantization.scheme if plan.quantization else ""
    if scheme not in TorchAoBackend.spec.quantizations[plan.device.partition(":")[0]]:
        raise SuanliError(f"torchao does not offer {scheme or 'plans without quantisation'}")
    return scheme


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torchao says at import: extensions of other machines, old names."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


BACKEND = TorchAoBackend()
