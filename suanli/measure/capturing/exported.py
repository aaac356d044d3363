"""Runs an exported program node by node on fake tensors."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from suanli.base.errors import CaptureError
from suanli.measure.capturing import fakes
from suanli.measure.capturing.places import Places, place_of_node
from suanli.measure.capturing.recorder import WHOLE, Recorder, run_whole

_STATE = {InputKind.PARAMETER, InputKind.BUFFER}


class ExportedRun:
    """An exported program with fake state.

    Attributes:
        named_parameters: Its parameters by name.
        tensors: Its parameters and buffers.
    """

    def __init__(self, program: ExportedProgram, mode: FakeTensorMode, memo: fakes.Fakes) -> None:
        self._program = program
        self._state: dict[str, Any] = {}
        self.named_parameters: list[tuple[str, torch.Tensor]] = []
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT or spec.target is None:
                continue
            value = _stored(program, spec.target)
            if isinstance(value, torch.Tensor):
                value = fakes.fake_tensor(value, mode, memo)
            self._state[spec.target] = value
            if spec.kind is InputKind.PARAMETER:
                self.named_parameters.append((spec.target, value))
        self.tensors = [
            self._state[spec.target]
            for spec in program.graph_signature.input_specs
            if spec.kind in _STATE and spec.target is not None
        ]

    def following(self, places: Places) -> AbstractContextManager[None]:
        """Nothing to follow: the nodes themselves know where they come from."""
        return nullcontext()

    def __call__(
        self, recorder: Recorder, places: Places, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the graph and return the user's outputs, flat.

        Raises:
            CaptureError: The inputs are not those that the program was exported with.
        """
        flat = iter(_flat_inputs(self._program, args, kwargs))
        feed = []
        for spec in self._program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT or spec.target is None:
                try:
                    feed.append(next(flat))
                except StopIteration:
                    raise CaptureError(
                        "too few inputs for the exported program", operator="placeholder"
                    ) from None
            else:
                feed.append(self._state[spec.target])
        out = _Nodes(self._program.graph_module, recorder, places).run(*feed)
        specs = self._program.graph_signature.output_specs
        return [
            value
            for value, spec in zip(out, specs, strict=True)
            if spec.kind in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
        ]


def _stored(program: ExportedProgram, target: str) -> Any:
    if target in program.state_dict:
        return program.state_dict[target]
    return program.constants[target]


def _flat_inputs(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """Inputs in the order of the graph; keywords go where the program expects them."""
    expected = program.call_spec.in_spec
    if expected is not None and kwargs:
        names = list(expected.child(1).context)
        if set(names) != set(kwargs):
            raise CaptureError(
                f"the exported program takes the keywords {', '.join(names) or 'none'}",
                operator="placeholder",
            )
        kwargs = {name: kwargs[name] for name in names}
    return pytree.tree_leaves((args, kwargs), is_leaf=lambda leaf: leaf is None)


class _Nodes(Interpreter):
    """Tells the recorder where each node comes from, and which nodes are one operator."""

    def __init__(self, module: torch.fx.GraphModule, recorder: Recorder, places: Places) -> None:
        super().__init__(module)
        self._recorder = recorder
        self._places = places

    def run_node(self, n: Node) -> Any:
        self._places.fixed = place_of_node(n.meta)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._call_wrapper(target, args, kwargs)
        schema = getattr(target, "_schema", None)
        name = schema.name.partition("::")[2] if schema is not None else ""
        if name in WHOLE:
            return run_whole(self._recorder, name, target, args, kwargs)
        return super().call_function(target, args, kwargs)

    def _call_wrapper(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Parts of a graph that ran under other settings: run them node by node as well."""
        if target.name() == "wrap_with_set_grad_enabled":
            enabled, body, *operands = args
            with torch.set_grad_enabled(bool(enabled) and torch.is_grad_enabled()):
                return _Nodes(body, self._recorder, self._places).run(*operands)
        if target.name() == "wrap_with_autocast":
            device, dtype, enabled, cache, body, *operands = args
            with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache):
                return _Nodes(body, self._recorder, self._places).run(*operands)
        return super().call_function(target, args, kwargs)
