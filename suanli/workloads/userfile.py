"""A model in a person's own Python file: `file.py:name`.

`name` is a Workload, a module, or a callable without arguments that gives a Workload, a module, or
`(module, inputs)`. Where the inputs are not given with the module, they come from a function
`example_inputs(batch)` in the file, or from shapes on the command line. The file is a program of
the person's and is run as one.
"""

import contextlib
import copy
import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.errors import BadInputError, SuanliError
from suanli.workloads import reference
from suanli.workloads.admission import (
    check_inputs,
    in_fp32,
    other_precision,
    tensors_in,
    unwrapped,
)
from suanli.workloads.examples import from_shapes
from suanli.workloads.record import Inputs, Workload
from suanli.workloads.reference import Options
from suanli.workloads.seeding import seeded

_THREE_WAYS = (
    "return (model, inputs) from it, define example_inputs(batch) in the file, "
    "or give --input-shape 3x224x224"
)


def from_file(path: Path, name: str, options: Options) -> Workload:
    """Make a workload from an object in a Python file.

    Args:
        path: The file; it may be relative.
        name: A top-level name in it.
        options: Input shapes and their type, where the file does not say them.

    Raises:
        BadInputError: The file is absent, fails, lacks the name, or gives something unusable.
    """
    path = path.resolve()
    module = load_module(path)
    if not hasattr(module, name):
        raise BadInputError(f"{path.name} has no {name}", next_step=_near(module, name))
    source = _Source(path=path, name=name, value=getattr(module, name))
    made = source.make()
    ref = reference.write(f"{path}:{name}", options)
    if isinstance(made, Workload):
        return replace(made, ref=ref)
    model, inputs = _model_and_inputs(made, source)
    make_inputs, batched = _input_maker(module, model, inputs, options, source)
    precision = other_precision(model, make_inputs(2))
    if precision is not None:  # the model is made in fp32
        make_inputs = in_fp32(make_inputs, precision)
    return Workload(
        name=f"{path.stem}:{name}",
        ref=ref,
        make_model=source.make_model,
        make_inputs=make_inputs,
        untrained=False,
        dynamic_batch=batched,
        max_batch=256 if batched else 1,
    )


def load_object(path: Path, name: str) -> Any:
    """The object of that name in a person's file, called if it is a plain function.

    Raises:
        BadInputError: The file is absent, fails, or lacks the name.
    """
    path = path.resolve()
    module = load_module(path)
    if not hasattr(module, name):
        raise BadInputError(f"{path.name} has no {name}", next_step=_near(module, name))
    return _Source(path=path, name=name, value=getattr(module, name)).make()


class _Source:
    """The named object and how to make a fresh model of it."""

    def __init__(self, *, path: Path, name: str, value: Any) -> None:
        self.path, self.name, self.value = path, name, value

    def make(self) -> Any:
        """The object itself, or what it gives when called, with fixed seeds."""
        if isinstance(self.value, nn.Module | Workload) or not callable(self.value):
            return self.value
        with seeded():
            return guarded(self.path, self.value)

    def make_model(self) -> nn.Module:
        """A fresh model, in evaluation mode, on the CPU, in fp32."""
        made = self.make()
        model, _ = _model_and_inputs(made, self)
        if made is self.value:
            model = copy.deepcopy(model)
        return model.to("cpu").float().eval()

    def __str__(self) -> str:
        return f"{self.path.name}:{self.name}"


def load_module(path: Path) -> ModuleType:
    """Run a person's Python file, once per content, with fixed seeds.

    Raises:
        BadInputError: It is absent or fails; the message names the line of theirs.
    """
    if not path.is_file():
        raise BadInputError(f"no file {path}")
    content = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]
    module_name = f"_suanli_user_{content}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise BadInputError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[module_name] = module
    try:
        with seeded():
            guarded(path, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    except BaseException:
        sys.modules.pop(module_name, None)
        raise
    return module


def guarded(path: Path, call: Callable[[], Any]) -> Any:
    """Call into the person's code; what it prints goes to standard error.

    Standard output belongs to the verb's own answer, which may be one JSON object.

    Raises:
        BadInputError: It failed; the message names the last line of theirs.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return call()
    except SuanliError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame.lineno for frame in frames if Path(frame.filename) == path]
        line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
        line = line or (theirs[-1] if theirs else None)
        where = f"{path.name}:{line}" if line else path.name
        reason = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
        raise BadInputError(f"{where}: {text}") from error


def _near(module: ModuleType, name: str) -> str:
    own = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (
            isinstance(value, nn.Module | Workload)  # also of a class from elsewhere
            or (callable(value) and getattr(value, "__module__", "") == module.__name__)
        )
    ]
    near = difflib.get_close_matches(name, own, n=3, cutoff=0.5) or own[:5]
    return f"it has {', '.join(near)}" if near else "it defines no model"


def _model_and_inputs(made: Any, source: _Source) -> tuple[nn.Module, Any]:
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if isinstance(model, nn.Module):
        return unwrapped(model), inputs
    raise BadInputError(
        f"{source} gives a {type(made).__name__}, not a model",
        next_step="it should be or return a torch.nn.Module, (module, inputs) or a suanli.Workload",
    )


def _input_maker(
    module: ModuleType, model: nn.Module, inputs: Any, options: Options, source: _Source
) -> tuple[Callable[[int], Inputs], bool]:
    """How to make inputs of any batch, and whether their first dimension is the batch."""
    if options.shapes:
        return from_shapes(model, options.shapes, options.dtype), True
    if options.dtype:
        raise BadInputError(
            "--input-dtype alone changes nothing",
            next_step="give --input-shape with it, or leave it out",
        )
    if inputs is not None:
        example = _as_inputs(inputs, str(source))
        return _repeated(example)
    maker = getattr(module, "example_inputs", None)
    if not callable(maker):
        raise BadInputError(f"no example inputs are known for {source}", next_step=_THREE_WAYS)

    def make(batch: int) -> Inputs:
        with seeded():
            made = guarded(source.path, lambda: maker(batch))
        return _as_inputs(made, f"{source.path.name}:example_inputs")

    sizes = {leaf.shape[0] for leaf in tensors_in(make(2)) if leaf.dim()}
    return make, sizes == {2}


def _as_inputs(value: Any, origin: str) -> Inputs:
    if isinstance(value, Inputs):
        made = value
    elif isinstance(value, Mapping):
        made = Inputs(kwargs=dict(value))
    elif isinstance(value, list | tuple):
        made = Inputs(args=tuple(value))
    else:
        made = Inputs(args=(value,))
    if not tensors_in(made):
        raise BadInputError(
            f"{origin}: the example inputs hold no tensor",
            next_step="give a tensor, a tuple of arguments or a dictionary of keyword arguments",
        )
    check_inputs(made, f"{origin}: the example inputs")
    return made


def _repeated(example: Inputs) -> tuple[Callable[[int], Inputs], bool]:
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in tensors_in(example)}
    if len(sizes) != 1 or sizes == {0}:
        return lambda _batch: example, False
    known = sizes.pop()

    def resize(leaf: Any, batch: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        times = -(-batch // known)
        return leaf.repeat(times, *[1] * (leaf.dim() - 1))[:batch].contiguous()

    def make(batch: int) -> Inputs:
        args, kwargs = pytree.tree_map(
            lambda leaf: resize(leaf, batch), (example.args, dict(example.kwargs))
        )
        return Inputs(args=args, kwargs=kwargs)

    return make, True
