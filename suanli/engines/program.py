"""A model as it travels between processes: an exported program as JSON beside safetensors.

The folder holds `meta.json`, `graph.json` (torch's own serialised graph, which is JSON),
`weights.safetensors` and `inputs.safetensors`; nothing in it is a pickle. Reading a graph is still
not safe for a file of unknown origin: torch evaluates shape expressions and guard code in it. The
engine's signature decides whether it is read at all.
"""

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base import codec
from suanli.base.errors import ArtefactError, CaptureError
from suanli.base.lazy import present
from suanli.base.signature import Signature, TensorSpec
from suanli.engines._batch_dimension import marked, output_shapes
from suanli.workloads.record import Inputs

_META, _GRAPH = "meta.json", "graph.json"
_WEIGHTS, _INPUTS = "weights.safetensors", "inputs.safetensors"


@dataclass(frozen=True, kw_only=True)
class ProgramMeta:
    """What stands in `meta.json`.

    Attributes:
        ref: How to build the source module anew; "" where it lives in no file.
        exported: Whether `graph.json` exists.
        why_not: Why the model could not be exported; "" if it was.
        batch: Samples in `inputs.safetensors`.
    """

    version: int
    name: str
    ref: str
    exported: bool
    why_not: str
    signature: Signature
    batch: int
    torch: str


class Program:
    """A captured model in a folder. Open it in any process; what is costly loads on first use."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `capture` wrote.

        Raises:
            ArtefactError: The folder is not a program.
        """
        self.folder = Path(folder)
        self.meta = codec.read(ProgramMeta, self.folder / _META)

    @property
    def signature(self) -> Signature:
        """Calling convention of the model."""
        return self.meta.signature

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name, fp32 as the model had them."""
        weights: dict[str, torch.Tensor] = {}
        for key, tensor in self._stored.items():
            kind, name = key.split(":", 1)
            if kind == "param":
                weights[name] = nn.Parameter(tensor, requires_grad=False)
            elif kind == "buffer":
                weights[name] = tensor
        return weights

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / _WEIGHTS)

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        """The exported program, fp32.

        Raises:
            CaptureError: The model could not be exported.
            ArtefactError: The graph cannot be read by this torch.
        """
        if not self.meta.exported:
            raise CaptureError(f"{self.meta.name} has no exported program: {self.meta.why_not}")
        constants = {
            name.removeprefix("const:"): tensor
            for name, tensor in self._stored.items()
            if name.startswith("const:")
        }
        text = (self.folder / _GRAPH).read_text(encoding="utf-8")
        register_known_trees(self.signature.out_tree)
        return _deserialize(text, dict(self.weights), constants)

    def exported_module(self) -> nn.Module:
        """A fresh evaluation-mode module of the exported graph, taking the user's arguments."""
        module = self.exported.module(check_guards=False)
        # `Module.to` changes parameters in place: they must not be the program's own objects
        own: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    fresh = nn.Parameter(weight.detach(), requires_grad=False)
                    part._parameters[name] = own.setdefault(id(weight), fresh)
        # torch replaces `train` and `eval` of an exported module by methods that raise; it has one
        # mode, so here they only set the flag
        for name in ("train", "eval"):
            vars(module).pop(name, None)
        return module.eval()

    def source_module(self) -> nn.Module:
        """The user's own module with these weights, where it can be built here; else the exported.

        Baselines run this one, so that they pay what the user pays today.
        """
        if not self.meta.ref:
            return self.exported_module()
        from suanli.workloads.resolve import resolve

        module = resolve(self.meta.ref).make_model().eval()
        module.load_state_dict(self.weights, strict=True)
        return module

    def inputs(self, batch: int) -> list[torch.Tensor]:
        """Flat example inputs of `batch` samples: the stored ones, repeated or cut."""
        stored = load_file(self.folder / _INPUTS)
        flat = []
        for index, spec in enumerate(self.signature.inputs):
            tensor = stored[str(index)]
            if spec.batched:
                times = -(-batch // tensor.shape[0])
                tensor = tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch].contiguous()
            flat.append(tensor)
        return flat

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call, in the signature's order.

        Raises:
            ArtefactError: The tree or a constant argument differs from the captured call.
        """
        return flatten_call(self.signature, args, kwargs)

    def call(self, module: nn.Module, flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Call a module that takes the user's arguments with flat tensors; gives flat tensors."""
        args, kwargs = unflatten_call(self.signature, flat)
        leaves = pytree.tree_leaves(module(*args, **kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def capture(
    model: nn.Module,
    inputs: Inputs,
    *,
    folder: Path,
    name: str,
    ref: str = "",
    max_batch: int = 256,
    dynamic: bool = True,
) -> Program:
    """Export a model and write it as a program.

    Args:
        model: In evaluation mode, on the CPU.
        inputs: A call of the model with a batch of at least two where `dynamic` is asked.
        folder: Where to write; made if absent.
        name: Short name for messages.
        ref: How to build the module anew, see `Workload.ref`.
        max_batch: Largest batch; the one and only where the model cannot take others.
        dynamic: Whether to try for any batch from 1 to `max_batch`.

    Returns:
        The program. Where the export fails its `meta.exported` is False and only plans on the
        source module can be tried.

    Raises:
        CaptureError: The model does not even run on the inputs, or an output's size depends on the
            batch in another way than by one dimension that is the batch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model.eval()
    leaves = pytree.tree_leaves((tuple(inputs.args), dict(inputs.kwargs)))
    batch = _batch_of(leaves)
    result = _run_once(model, inputs)
    exported, is_dynamic, why_not = _export(model, inputs, batch, max_batch if dynamic else 0)
    results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    shapes: list[tuple[int, ...]] = [marked(t, batch) for t in results]
    if is_dynamic:
        shapes = output_shapes(model, inputs, batch, results, exported)
    signature = _signature(
        model,
        inputs,
        result,
        shapes,
        batch=batch,
        max_batch=max_batch if is_dynamic else batch,
        dynamic=is_dynamic,
    )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state = {
        f"{'param' if key in parameters else 'buffer'}:{key}": _own(value)
        for key, value in model.state_dict().items()
    }
    if exported is not None:
        graph, constants = _serialize(exported)
        (folder / _GRAPH).write_text(graph, encoding="utf-8")
        state |= {f"const:{key}": _own(value) for key, value in constants.items()}
    save_file(state, folder / _WEIGHTS)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    save_file({str(i): _own(tensor) for i, tensor in enumerate(tensors)}, folder / _INPUTS)
    meta = ProgramMeta(
        version=1,
        name=name,
        ref=ref,
        exported=exported is not None,
        why_not=why_not,
        signature=signature,
        batch=batch,
        torch=torch.__version__,
    )
    (folder / _META).write_text(codec.dumps(meta), encoding="utf-8")
    return Program(folder)


def flatten_call(
    signature: Signature, args: Sequence[Any], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """The tensors of a call, in the signature's order.

    Raises:
        ArtefactError: The tree, a constant argument, a dtype or a shape differs.
    """
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if pytree.treespec_dumps(tree) != signature.in_tree:
        names = ", ".join(spec.name for spec in signature.inputs)
        raise ArtefactError(f"called with other arguments than it was built for ({names})")
    for position, value in signature.static_inputs.items():
        if isinstance(leaves[position], torch.Tensor) or leaves[position] != value:
            raise ArtefactError(f"argument {position} is fixed at {value!r} in this engine")
    flat = [leaf for i, leaf in enumerate(leaves) if i not in signature.static_inputs]
    check_inputs(signature, flat)
    return flat


def check_inputs(signature: Signature, flat: Sequence[Any]) -> int:
    """Hold flat inputs against the signature.

    Returns:
        The batch size.

    Raises:
        ArtefactError: A number, dtype or shape is wrong; the message names the input.
    """
    if len(flat) != len(signature.inputs):
        raise ArtefactError(f"{len(signature.inputs)} tensors are needed, {len(flat)} were given")
    batch: int | None = None
    for spec, tensor in zip(signature.inputs, flat, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise ArtefactError(f"{spec.name} must be a tensor, not {type(tensor).__name__}")
        if str(tensor.dtype).removeprefix("torch.") != spec.dtype:
            raise ArtefactError(f"{spec.name} must be {spec.dtype}, not {tensor.dtype}")
        wanted = spec.shape[1:] if spec.batched else spec.shape
        given = tuple(tensor.shape[1:] if spec.batched else tensor.shape)
        if tensor.dim() != len(spec.shape) or given != wanted:
            shape = ", ".join("batch" if size == -1 else str(size) for size in spec.shape)
            raise ArtefactError(f"{spec.name} must be [{shape}], not {list(tensor.shape)}")
        if spec.batched:
            if batch is not None and tensor.shape[0] != batch:
                raise ArtefactError(f"{spec.name} has {tensor.shape[0]} samples, others {batch}")
            batch = int(tensor.shape[0])
    return signature.max_batch if batch is None else batch


def unflatten_call(
    signature: Signature, flat: Sequence[torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The user's arguments from flat tensors."""
    args, kwargs = _fill(signature.in_tree, signature.static_inputs, flat)
    return args, kwargs


def unflatten_result(signature: Signature, flat: Sequence[torch.Tensor]) -> Any:
    """The user's result from flat tensors."""
    return _fill(signature.out_tree, signature.static_outputs, flat)


def _fill(tree: str, static: dict[int, Any], flat: Sequence[torch.Tensor]) -> Any:
    register_known_trees(tree)
    spec = pytree.treespec_loads(tree)
    tensors = iter(flat)
    leaves = [static[i] if i in static else next(tensors) for i in range(spec.num_leaves)]
    return pytree.tree_unflatten(leaves, spec)


def register_known_trees(tree: str) -> None:
    """Make torch know the result classes named in `tree`, for the one library that is trusted.

    A name in an artefact must not decide what is imported, so this is a fixed list of one.
    """
    if "transformers.modeling_outputs" in tree and present("transformers"):
        import transformers.modeling_outputs  # noqa: F401


def _own(tensor: torch.Tensor) -> torch.Tensor:
    # safetensors refuses tensors that share memory (tied weights, views)
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _batch_of(leaves: Sequence[Any]) -> int:
    sizes = [int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
    return sizes[0] if sizes else 1


def _run_once(model: nn.Module, inputs: Inputs) -> Any:
    try:
        with torch.inference_mode():
            return model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"the model does not run on its example inputs: {line}",
            next_step="check the shapes and dtypes of the inputs",
        ) from error


def _export(
    model: nn.Module, inputs: Inputs, batch: int, max_batch: int
) -> tuple[torch.export.ExportedProgram | None, bool, str]:
    """Export with a free batch if it can be, else with a fixed one, else say why not."""
    attempts = [_dynamic_shapes(inputs, batch, max_batch), None] if max_batch > 1 else [None]
    why_not = ""
    for shapes in attempts:
        try:
            with torch.no_grad(), _quiet_export():
                exported = torch.export.export(
                    model, tuple(inputs.args), dict(inputs.kwargs), dynamic_shapes=shapes
                )
        except Exception as error:  # torch.export raises many unrelated types
            why_not = _first_line(error)
            continue
        return exported, shapes is not None, ""
    # the module itself, which is all that can be run then, takes any batch
    return None, max_batch > 1, why_not


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep torch from logging whole graphs when an export fails; the exception says enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__)[:300]


def _dynamic_shapes(inputs: Inputs, batch: int, max_batch: int) -> Any:
    dim = torch.export.Dim("batch", min=1, max=max_batch)

    def spec(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return {0: dim}
        return None

    args = pytree.tree_map(spec, tuple(inputs.args))
    kwargs = pytree.tree_map(spec, dict(inputs.kwargs))
    return (*args, *kwargs.values()) if not kwargs else _by_name(inputs, args, kwargs)


def _by_name(inputs: Inputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # torch.export takes a tuple for positional arguments only; with keywords it matches the
    # structure of args followed by kwargs
    return (*args, *[kwargs[name] for name in inputs.kwargs])


def _signature(
    model: nn.Module,
    inputs: Inputs,
    result: Any,
    shapes: Sequence[tuple[int, ...]],
    *,
    batch: int,
    max_batch: int,
    dynamic: bool,
) -> Signature:
    leaves, in_tree = pytree.tree_flatten((tuple(inputs.args), dict(inputs.kwargs)))
    out_leaves, out_tree = pytree.tree_flatten(result)
    names = input_names(model, inputs)
    static_in = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
    static_out = {
        i: leaf for i, leaf in enumerate(out_leaves) if not isinstance(leaf, torch.Tensor)
    }
    for where, static in (("argument", static_in), ("result", static_out)):
        for leaf in static.values():
            if not (leaf is None or isinstance(leaf, bool | int | float | str)):
                raise CaptureError(f"{where} of type {type(leaf).__name__} cannot be captured")
    tensors = [
        (name, t) for name, t in zip(names, leaves, strict=True) if isinstance(t, torch.Tensor)
    ]
    results = [leaf for leaf in out_leaves if isinstance(leaf, torch.Tensor)]
    return Signature(
        inputs=tuple(
            TensorSpec(name=name, dtype=_dtype(t), shape=marked(t, batch)) for name, t in tensors
        ),
        outputs=tuple(
            TensorSpec(name=f"output{i}", dtype=_dtype(t), shape=shape)
            for i, (t, shape) in enumerate(zip(results, shapes, strict=True))
        ),
        max_batch=max_batch,
        dynamic=dynamic,
        in_tree=pytree.treespec_dumps(in_tree),
        out_tree=pytree.treespec_dumps(out_tree),
        static_inputs=static_in,
        static_outputs=static_out,
    )


def input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """One name per leaf of `(args, kwargs)`, from the signature of `forward`.

    Raises:
        CaptureError: `forward` is no Python function, such as TorchScript's.
    """
    import inspect

    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (ValueError, TypeError) as error:
        raise CaptureError(
            f"a {type(model).__name__} cannot be captured: {_first_line(error)}",
            next_step="give an nn.Module whose forward is a Python function",
        ) from None
    named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    names: list[str] = []
    for i, value in enumerate(inputs.args):
        base = named[i] if i < len(named) and named[i] != "kwargs" else f"input{i}"
        count = len(pytree.tree_leaves(value))
        names += [base] if count == 1 else [f"{base}_{j}" for j in range(count)]
    for key, value in inputs.kwargs.items():
        count = len(pytree.tree_leaves(value))
        names += [key] if count == 1 else [f"{key}_{j}" for j in range(count)]
    return names


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _serialize(exported: torch.export.ExportedProgram) -> tuple[str, dict[str, torch.Tensor]]:
    # torch.export.save writes the same JSON, but beside pickled sample inputs; these are the
    # functions it calls for the graph itself
    from torch._export.serde.serialize import (
        EnumEncoder,
        ExportedProgramSerializer,
        _dataclass_to_dict,
    )

    serialized = ExportedProgramSerializer().serialize(exported)
    text = json.dumps(_dataclass_to_dict(serialized.exported_program), cls=EnumEncoder)  # type: ignore[no-untyped-call]
    constants = {
        name: value for name, value in exported.constants.items() if isinstance(value, torch.Tensor)
    }
    return text, constants


def _deserialize(
    text: str, state: dict[str, torch.Tensor], constants: dict[str, torch.Tensor]
) -> torch.export.ExportedProgram:
    from torch._export.serde.schema import ExportedProgram as Graph
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    try:
        graph = _dict_to_dataclass(Graph, json.loads(text))  # type: ignore[no-untyped-call]
        return ExportedProgramDeserializer().deserialize(graph, state, constants, None)
    except Exception as error:  # the reader raises whatever the broken part makes it raise
        raise ArtefactError(
            f"this torch ({torch.__version__}) cannot read the program: {_first_line(error)}"
        ) from error
