"""ONNX Runtime's profile read as layers, each with the modules that it comes from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suanli.base.lazy import present
from suanli.engines.backend import LayerTime
from suanli.engines.onnx_export import SCOPES

_PRECISIONS = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "uint8": "int8",
}
# a fused layer ends at most this many operators after the one that gives it its type
_FUSED_DEPTH = 3


def layer_events(events: Sequence[dict[str, Any]], origins: "Origins") -> list[LayerTime]:
    """Layers of the last call in a profile, in the order in which they ran.

    Args:
        events: The parsed profile.
        origins: Of the model that ran.
    """
    layers: dict[str, LayerTime] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name = event["name"].removesuffix("_kernel_time")
        facts = event.get("args", {})
        kind = str(facts.get("op_name", ""))
        types = facts.get("input_type_shape") or [{}]
        layers[name] = LayerTime(
            name=name,
            kind=kind,
            time_ms=event["dur"] / 1000,
            precision=_PRECISIONS.get(next(iter(types[0]), ""), ""),
            origin=origins.of(name, kind),
        )
    return list(layers.values())


class Origins:
    """Looks up the modules behind a layer by the names that ONNX Runtime gives its layers."""

    def __init__(self, path: Path) -> None:
        """Read the graph of an ONNX file; without the onnx package nothing is known."""
        self._by_name: dict[str, Any] = {}
        self._by_output: dict[str, Any] = {}
        if present("onnx"):
            import onnx

            for node in onnx.load(str(path), load_external_data=False).graph.node:
                self._by_name[node.name] = node
                for output in node.output:
                    self._by_output[output] = node

    def of(self, layer: str, kind: str) -> tuple[str, ...]:
        """Module paths in a layer, the one that gives it its type first.

        A fused layer is called after the value that it ends with, so the search for the operator of
        the layer's type goes from there towards the inputs.
        """
        node = self._by_name.get(layer) or self._by_output.get(layer.removesuffix("_nchwc"))
        chain: list[Any] = []
        while node is not None and len(chain) <= _FUSED_DEPTH:
            chain.append(node)
            if kind.endswith(node.op_type):
                break
            made = [self._by_output[name] for name in node.input if name in self._by_output]
            same = [other for other in made if kind.endswith(other.op_type)]
            node = (same or made or [None])[0]
        else:
            chain = chain[:1]
        paths = [path for node in reversed(chain) if (path := _module_path(node))]
        return tuple(dict.fromkeys(paths))


def _module_path(node: Any) -> str:
    """Path of the module that a node comes from, as the exporter wrote it; "" where unknown."""
    for name in node.input[1:2]:
        if name.endswith(".weight"):  # a folded batch norm leaves its own path on the convolution
            return str(name.removesuffix(".weight"))
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    modules = [name for name in names[:-1] if name]  # the last one is the node itself
    return modules[-1] if modules else ""
