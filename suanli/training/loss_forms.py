"""What a loss function is made of, where it is torch's mean cross-entropy over some rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_ORDER = (
    *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction"),
    "label_smoothing",
)


@dataclass(frozen=True, kw_only=True)
class CrossEntropyForm:
    """A loss that is `cross_entropy(logits, target)` with the mean over rows.

    Attributes:
        rows: (output, labels) -> (logits, target), what the loss does before.
        ignore_index: Target of rows that do not count.
        label_smoothing: As in `torch.nn.functional.cross_entropy`.
    """

    rows: fx.GraphModule
    ignore_index: int
    label_smoothing: float

    def takes_rows(self) -> bool:
        """Whether the loss only picks and lines up rows of [B, T, V] (or [B, V]), whatever V is.

        Then it can be given the inputs of the last linear layer in the place of its outputs.
        """
        return self._same_rows((2, 3)) or self._same_rows((6,))

    def _same_rows(self, shape: tuple[int, ...]) -> bool:
        labels = torch.zeros(shape, dtype=torch.int64)
        picked = []
        for width in (5, 7):
            flat = torch.arange(6.0 * width).reshape(6, width)
            try:
                # not called, because a traced module prints what fails inside it
                logits, target = fx.Interpreter(self.rows).run(flat.reshape(*shape, width), labels)
            except (RuntimeError, IndexError, TypeError):
                return False
            if logits.dim() != 2 or logits.shape[1] != width or target.shape != logits.shape[:1]:
                return False
            picked.append((logits[:, 0] / width).long().clamp(0, 5))
            if not all(self._picks(values, shape, picked[-1]) for values in _probes(flat)):
                return False
        return torch.equal(*picked)

    def _picks(self, values: torch.Tensor, shape: tuple[int, ...], rows: torch.Tensor) -> bool:
        """Whether the loss gives rows of [6, V] as they are."""
        labels = torch.zeros(shape, dtype=torch.int64)
        try:
            given = values.reshape(*shape, values.shape[1])
            logits, _ = fx.Interpreter(self.rows).run(given, labels)
        except (RuntimeError, IndexError, TypeError):
            return False
        return logits.dtype == values.dtype and torch.equal(logits, values[rows])


def _probes(flat: torch.Tensor) -> list[torch.Tensor]:
    """Values over all sizes and both signs: a loss may clip, or take what is positive."""
    return [flat, (flat + 1) * 1e30, (flat + 1) * -1e30]


def cross_entropy_form(loss: Loss | None) -> CrossEntropyForm | None:
    """The form of a loss by tracing it; None where it is another loss, or cannot be traced.

    Args:
        loss: `loss(output, labels)`: a function, a partial one, or a module.
    """
    if loss is None:
        return None
    call = loss.forward if isinstance(loss, nn.Module) else loss

    def traced(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return call(output, labels)  # `call` itself may have no code to take apart

    try:
        graph = _Tracer().trace(traced)
    except Exception:  # a person's function may raise anything when it meets a proxy
        return None
    calls = [n for n in graph.nodes if n.op == "call_function"]
    found = [n for n in calls if n.target is functional.cross_entropy]
    (out,) = (n for n in graph.nodes if n.op == "output")
    if len(found) != 1 or out.args != (found[0],):
        return None
    given: dict[str, Any] = {**dict(zip(_ORDER, found[0].args, strict=False)), **found[0].kwargs}
    if given.get("reduction", "mean") != "mean" or any(
        given.get(name) is not None for name in ("weight", "size_average", "reduce")
    ):
        return None
    out.args = ((given["input"], given["target"]),)
    graph.erase_node(found[0])
    graph.eliminate_dead_code()
    graph.lint()
    return CrossEntropyForm(
        rows=fx.GraphModule(nn.Module(), graph),
        ignore_index=int(given.get("ignore_index", -100)),
        label_smoothing=float(given.get("label_smoothing", 0.0)),
    )


class _Tracer(fx.Tracer):
    """Takes functions apart that hold no modules of their own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False
