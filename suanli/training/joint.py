"""Forward pass, loss and backward pass as one compiled graph (compile_scope "joint").

The gradients are results of the graph, so that a step needs neither autograd nor the guards and the
wrappers of `torch.compile`: on small networks these take longer than the arithmetic. What Python
decides in `forward` is decided once, when the graph is made; a graph that comes out otherwise a
second time is refused, and so is one that depends on values.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import stateless

from suanli.base.errors import BadInputError
from suanli.training.chance import chance_watched
from suanli.training.recipe import Tensors
from suanli.training.twin import refuse_hooks

_Shape = tuple[Any, ...]
_BY_MODEL = 'compile_scope "model"'


class JointGraph:
    """Gradients of a model's loss by one graph per shape of a batch.

    The first shape is compiled, and larger ones. Smaller ones, such as the last batch of an epoch,
    run operator by operator: they are too rare to compile for.

    Args:
        model: In training mode; its parameters and buffers are read at every call.
        loss: `(output, labels) -> loss`.
        context: Makes the context that the forward pass runs in, such as autocast.

    Raises:
        BadInputError: A parameter has a hook on its gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, torch.Tensor], torch.Tensor],
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        refuse_hooks(model, "one graph")
        self._model, self._loss, self._context = model, loss, context
        # where each tensor is kept: walking through the modules takes longer than a small layer
        self._places = {name: _place(model, name) for name in self._state()}
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._graphs: dict[_Shape, Callable[..., Any]] = {}
        self._copied: dict[_Shape, list[bool]] = {}

    def __call__(
        self, inputs: Tensors, labels: torch.Tensor, scale: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """Add the batch's gradients, times `scale`, to `grad`; gives the loss, detached.

        Raises:
            BadInputError: The model's Python cannot be written down as one graph.
        """
        batch = (*inputs, labels)
        key = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in batch)
        with torch.no_grad():
            state = [kept[name].detach() for kept, name in self._places.values()]
            if key not in self._graphs:
                self._graphs[key] = self._made(inputs, labels)
            loss, *gradients = self._graphs[key](*state, *batch)
        if key not in self._copied:  # what a graph hands out twice, it does at every call
            self._copied[key] = self._shared(gradients, (*state, *batch))
        for name, found, copied in zip(self._trained, gradients, self._copied[key], strict=True):
            if found is None:
                continue
            kept, own = self._places[name]
            parameter = kept[own]
            gradient = torch.empty_like(parameter).copy_(found) if copied else found
            if isinstance(scale, torch.Tensor) or scale != 1.0:
                gradient.mul_(scale)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        return loss  # type: ignore[no-any-return]

    def _shared(
        self, gradients: list[torch.Tensor | None], given: tuple[torch.Tensor, ...]
    ) -> list[bool]:
        """Whether each gradient lies in memory that is something else's too, or is no full one."""
        taken, found = {_memory(t) for t in given}, []
        for name, gradient in zip(self._trained, gradients, strict=True):
            kept, own = self._places[name]
            odd = gradient is not None and (
                _memory(gradient) in taken or gradient.stride() != kept[own].stride()
            )
            found.append(odd)
            if gradient is not None and not odd:
                taken.add(_memory(gradient))
        return found

    def _state(self) -> dict[str, torch.Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def _made(self, inputs: Tensors, labels: torch.Tensor) -> Callable[..., Any]:
        with chance_watched() as drew:
            first, second = (self._traced(inputs, labels) for _ in range(2))
            drawn = drew()
        same = first.code == second.code and _constants_equal(first, second)
        if drawn or not same:
            raise BadInputError(
                "the model's forward is not the same twice: it cannot be one graph",
                next_step=_BY_MODEL,
            )
        if self._graphs and len(labels) < max(key[-1][0][0] for key in self._graphs):
            return first
        given = [t.detach() for t in self._state().values()]
        made: Callable[..., Any] = torch._inductor.compile(first, [*given, *inputs, labels])
        return made

    def _refuse_replaced(self, given: dict[str, torch.Tensor]) -> None:
        """Raise where `forward` puts a new tensor in a buffer's place: the graph would lose it."""
        for name, buffer in self._model.named_buffers():
            if buffer is not given.get(name):
                raise BadInputError(
                    f"forward puts a new tensor in the place of the buffer {name}, which one graph "
                    "does not keep",
                    next_step=f"change it in place, or {_BY_MODEL}",
                )

    def _traced(self, inputs: Tensors, labels: torch.Tensor) -> GraphModule:
        """The graph of loss and gradients; what it changes are its arguments."""
        state = self._state()
        # the batch that is traced with must not move the model's own statistics
        copies = [t.detach().clone() for t in state.values()]

        def joint(*args: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            *batch, target = args[len(state) :]
            given = {
                name: value.requires_grad_(name in wanted) if value.is_floating_point() else value
                for name, value in zip(state, args, strict=False)
            }
            with torch.enable_grad():
                # the loss may read parameters too, where it takes in the last layer
                with stateless._reparametrize_module(self._model, given, tie_weights=True):
                    with self._context():
                        output = self._model(*batch)
                    self._refuse_replaced(given)
                    loss = self._loss(output, target)
                trained = [given[name] for name in self._trained]
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            return loss.detach(), *gradients

        wanted = set(self._trained)
        try:
            return make_fx(joint, tracing_mode="fake")(*copies, *inputs, labels)
        except BadInputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise BadInputError(f"the model's forward cannot be one graph: {reason}") from error


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _constants_equal(one: GraphModule, other: GraphModule) -> bool:
    """Whether what the graphs hold is the same, such as a number that Python computed."""
    held = [
        [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
        for graph in (one, other)
    ]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(*held, strict=True)
    )


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary of a module that holds a parameter or buffer, and its name there."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    return (module._parameters if own in module._parameters else module._buffers), own
