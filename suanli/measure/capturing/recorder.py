"""Sees every operator below autograd, forward and backward, and writes down what it costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._C._autograd import _get_sequence_nr
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from suanli.base.work import Operator, Phase
from suanli.measure.capturing import others, products
from suanli.measure.capturing.places import Place, Places
from suanli.measure.capturing.traffic import (
    Parameters,
    dtype_name,
    moved_bytes,
    stored_elements,
    tensors_in,
)

# Operators that run as one kernel somewhere, however this machine would take them apart.
WHOLE = {"scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu"}


@dataclass
class _Region:
    """A call of one of `WHOLE`: what runs inside it is one operator, and so is its backward."""

    name: str
    place: Place
    inputs: list[torch.Tensor]
    forward_flops: int = 0
    forward_needed: int = 0
    backward: products.Count | None = None
    backward_index: int | None = None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operators while it is active. Needs fake tensors below it.

    Attributes:
        operators: What was recorded, in order.
        phase: What the following operators belong to.
        last: Name of the operator that ran last, for the message when the model stops.
        read_backs: Source line of each value that the program took out of a tensor, as `item`
            does; real tensors only.
    """

    # Lets `torch.cond` and its like arrive here as operators.
    supports_higher_order_operators = True

    def __init__(self, parameters: Parameters, places: Places) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.phase: Phase = "forward"
        self.last = ""
        self.read_backs: list[str] = []
        self._parameters = parameters
        self._places = places
        self._region: _Region | None = None
        self._nodes: dict[int, tuple[Place, _Region | None]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        if func is torch.ops.prim.device.default or func.namespace == "c10d":
            return func(*args, **kwargs)  # what processes send each other is no operator
        if any(not _understood(kind) for kind in types):
            # A tensor subclass explains itself in plain operators, which come here in turn.
            return NotImplemented
        qualified, name = func._schema.name, _one_name(others.base_name(func))
        formula = products.FORMULAS.get(qualified)
        if formula is None and not others.known(func, name):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self.last = name
        arguments = _named(func, args, kwargs)
        if name == "_grouped_mm":
            left, right, offsets = (arguments[key] for key in ("self", "mat2", "offs"))
            shape = products.grouped_shape(left, right, offsets)
            out = left.new_empty(shape, dtype=arguments.get("out_dtype"))
        else:
            out = func(*args, **kwargs)
        self._record(func, name, formula, arguments, out)
        return out

    def _record(
        self,
        func: Any,
        name: str,
        formula: products.Formula | None,
        arguments: dict[str, Any],
        out: Any,
    ) -> None:
        place, region = self._whereabouts()
        outputs = tensors_in(out)
        if name == "_local_scalar_dense":
            self.read_backs.append(place.source)
        if name in others.UNSEEN or not outputs:
            return
        if formula is not None:
            count = formula(arguments, out)
            if region is not None:
                self._add_to_region(region, count)
                return
            flops, needed, counted = count.flops, count.needed, True
        else:
            if region is not None:
                self._add_to_region(region, products.Count(flops=0, needed=0))
                return
            ruled = others.operations(func, name, arguments, outputs)
            counted = ruled is not None
            flops = ruled if ruled is not None else max(o.numel() for o in outputs)
            needed = flops
        inputs = tensors_in(list(arguments.values()))
        self._write(
            name,
            place,
            inputs,
            outputs,
            count=products.Count(flops=flops, needed=needed),
            counted=counted,
            matmul=formula is not None,
            free=others.is_free(func, name),
            mark=func._schema.name.rpartition("::")[2],
        )

    def _write(  # noqa: PLR0913
        self,
        name: str,
        place: Place,
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
        *,
        count: products.Count,
        counted: bool = True,
        matmul: bool = False,
        free: bool = False,
        mark: str = "",
    ) -> None:
        read, written, of_parameters = 0, 0, 0
        if not free:
            sources = inputs[1:] if mark in others.OVERWRITES else inputs
            table, taken = _part_read(name, inputs, outputs)
            read = moved_bytes(sources, table=table, taken=taken)
            written = moved_bytes(outputs)
            needed = self.phase == "forward" and name not in others.FOLDED
            of_parameters = self._parameters.touch(sources, table=table, taken=taken, needed=needed)
        main = next((x for x in inputs if x.is_floating_point()), inputs[0] if inputs else None)
        main = outputs[0] if main is None and outputs else main
        self.operators.append(
            Operator(
                name=name,
                phase=self.phase,
                module=place.module,
                source=place.source,
                dtype=dtype_name(main.dtype) if main is not None else "fp32",
                flops=count.flops,
                needed_flops=None if count.needed == count.flops else count.needed,
                bytes_read=read,
                bytes_written=written,
                parameter_bytes=of_parameters,
                input_shapes=tuple(tuple(int(n) for n in x.shape) for x in inputs),
                output_shapes=tuple(tuple(int(n) for n in o.shape) for o in outputs),
                matmul=matmul,
                counted=counted,
            )
        )

    # Where an operator belongs.

    def _whereabouts(self) -> tuple[Place, _Region | None]:
        """Module, source line and region of the operator that is running.

        Autograd numbers its nodes as the forward pass makes them and gives the number back while
        it runs them, which leads from a gradient to the forward operator that it belongs to. A
        recomputed forward (checkpointing) runs inside modules again and is placed by those.
        """
        node = torch._C._current_autograd_node()
        if node is not None and not self._places.inside:
            return self._nodes.get(node._sequence_nr(), (Place(), None))
        place = self._region.place if self._region else self._places.here()
        newest = _get_sequence_nr() - 1
        self._nodes.setdefault(newest, (place, self._region))
        return place, self._region

    # Operators that are kept whole.

    @contextmanager
    def whole(self, name: str, arguments: list[Any]) -> Iterator[Callable[[Any], None]]:
        """Record what runs inside as one operator; the caller hands the result to what it gets."""
        if self._region is not None:
            yield lambda out: None
            return
        place = self._places.here()
        inputs = tensors_in(arguments)
        first = _get_sequence_nr()
        region = _Region(name=name, place=place, inputs=inputs)
        done: list[Any] = []
        self._region = region
        try:
            yield done.append
        finally:
            self._region = None
        for number in range(first, _get_sequence_nr()):
            self._nodes[number] = (place, region)
        if name == "scaled_dot_product_attention":
            self._count_attention(region, arguments)
        count = products.Count(flops=region.forward_flops, needed=region.forward_needed)
        self._write(name, place, inputs, tensors_in(done), count=count, matmul=True)

    def _count_attention(self, region: _Region, arguments: list[Any]) -> None:
        """Which kernel runs differs between devices; the products that it must do do not."""
        query, key, value, *rest = arguments
        causal = bool(rest[2]) if len(rest) > 2 else False
        shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
        forward = products.attention(*shapes, causal=causal, products=2)
        region.forward_flops, region.forward_needed = forward.flops, forward.needed
        scores = int(query.requires_grad) + int(key.requires_grad)
        backward = scores + (1 if scores else 0) + int(value.requires_grad)
        region.backward = products.attention(*shapes, causal=causal, products=backward)

    def _add_to_region(self, region: _Region, count: products.Count) -> None:
        if self._region is region:
            region.forward_flops += count.flops
            region.forward_needed += count.needed
            return
        first = region.backward_index is None
        if first:
            region.backward_index = len(self.operators)
            known = region.backward or products.Count(flops=0, needed=0)
            gradients = [x for x in region.inputs if x.is_floating_point()]
            backward = f"{region.name}_backward"
            self._write(backward, region.place, gradients, gradients, count=known, matmul=True)
        if region.backward is None and region.backward_index is not None:
            operator = self.operators[region.backward_index]
            self.operators[region.backward_index] = replace(
                operator,
                flops=operator.flops + count.flops,
                needed_flops=operator.least_flops + count.needed,
            )

    def _higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(func.name())
        self.last = name
        out = func(*args, **kwargs)
        place, _ = self._whereabouts()
        inputs, outputs = tensors_in(list(args)), tensors_in(out)
        flexible = name == "flex_attention"
        if flexible:
            count = products.flexible_attention(*args[:3])
        else:
            elements = max((o.numel() for o in outputs), default=0)
            count = products.Count(flops=elements, needed=0)
        self._write(name, place, inputs, outputs, count=count, counted=flexible, matmul=flexible)
        return out


class WholeCalls(TorchFunctionMode):
    """Catches the calls of `WHOLE` above autograd and marks them for the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in WHOLE:
            return func(*args, **kwargs)
        return run_whole(self._recorder, name, func, args, kwargs)


_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def run_whole(
    recorder: Recorder, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call `func` as one of `WHOLE` by its bare name."""
    if name == "scaled_dot_product_attention":
        given = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
        arguments = [given.get(argument) for argument in _ATTENTION_ARGUMENTS]
    else:
        arguments = [*args, *kwargs.values()]
    with recorder.whole(name, arguments) as finish:
        out = func(*args, **kwargs)
        finish(out)
    return out


def _understood(kind: type) -> bool:
    """Whether a tensor type holds plain data: dense tensors, parameters and fakes."""
    return kind in (torch.Tensor, torch.nn.Parameter) or issubclass(kind, FakeTensor)


def _part_read(
    name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
) -> tuple[torch.Tensor | None, int]:
    """The input of which an operator reads a part only, and the bytes of that part.

    Which rows or experts are taken depends on the data; they are taken to be different ones.
    """
    if name in others.TAKES_ROWS and inputs:
        return inputs[0], max(o.numel() * o.element_size() for o in outputs)
    if name == "_grouped_mm" and inputs[1].dim() == 3 and inputs[0].dim() == 2:
        groups, rows = int(inputs[1].shape[0]), int(inputs[0].shape[0])
        whole = stored_elements(inputs[1]) * inputs[1].element_size()
        return inputs[1], whole * min(groups, rows) // groups
    return None, 0


def _one_name(name: str) -> str:
    """The name that stands for every device's kernel of attention."""
    if not name.startswith("_scaled_dot_product"):
        return name
    suffix = "_backward" if name.endswith("_backward") else ""
    return f"scaled_dot_product_attention{suffix}"


def _named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the schema's names, defaults filled in."""
    named: dict[str, Any] = {}
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            named[argument.name] = args[index]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named
