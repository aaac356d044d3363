"""Inductor ahead of time: compiled once, saved as native code, no compiling at load.

Options:
    static_batch: The batch size that the plan is for. A model with convolutions gets a second
        package in which it is fixed (see `inductor` for why); the other sizes run the free one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from suanli.base import codec
from suanli.base.errors import ArtefactError, SuanliError
from suanli.base.plan import BackendSpec, Plan
from suanli.base.signature import Signature
from suanli.engines.backend import BuildNote, Runner
from suanli.engines.backends._compiled import settings
from suanli.engines.backends._graph import convolves
from suanli.engines.backends._pieces import batch_of
from suanli.engines.backends._torch import (
    COMPILER_INSTALL,
    FlatCall,
    TorchRunner,
    conditions,
    fixed_batch,
    need_compiler,
    need_offered,
    prepared_graph,
    threads_of,
    use_inductor_cache,
)
from suanli.engines.program import Program

_FREE, _FIXED, _FACTS = "free.pt2", "fixed.pt2", "facts.json"


@dataclass(frozen=True, kw_only=True)
class _Facts:
    constant_outputs: tuple[int, ...]


class AotInductorBackend:
    """Writes one or two `.pt2` packages: a shared library with the weights inside."""

    spec = BackendSpec(
        name="aotinductor",
        install=COMPILER_INSTALL,
        packages=("torch",),
        devices=("cpu", "cuda"),
        precisions={"cpu": ("bf16", "fp32"), "cuda": ("fp16", "bf16", "tf32")},
        options={"max_autotune": (True, False)},
        option_needs={"max_autotune": ("cuda",)},
        batch_option="static_batch",
        build_s=45.0,
        promise={"fp32": 0.8, "bf16": 0.21, "cuda/bf16": 0.27, "cuda/fp16": 0.27, "tf32": 0.45},
    )

    def build(
        self,
        program: Program,
        plan: Plan,
        folder: Path,
        calibration: Sequence[tuple[torch.Tensor, ...]] | None = None,
    ) -> BuildNote:
        """Compile into the folder, see `suanli.engines.backend.Backend`."""
        need_offered(self.spec, plan)
        need_compiler(plan)
        use_inductor_cache()
        module, ready = prepared_graph(program, plan)
        signature = program.signature
        facts = _Facts(constant_outputs=tuple(sorted(ready.constant)))
        (folder / _FACTS).write_text(codec.dumps(facts), encoding="utf-8")
        fixed = fixed_batch(signature, plan)
        if signature.dynamic and not convolves(module):
            fixed = 0
        if fixed:
            _package(module, program, plan, folder / _FIXED, fixed)
        if signature.dynamic:
            _package(module, program, plan, folder / _FREE, 0)
        sizes = ("any" if signature.dynamic else "", str(fixed or ""))
        return BuildNote(plan=plan, details={"compiled_for": " ".join(filter(None, sizes))})

    def load(self, program: Program, plan: Plan, folder: Path) -> Runner:
        """Open the packages, see `suanli.engines.backend.Backend`.

        Raises:
            ArtefactError: There is none, or it cannot be opened here.
        """
        calls = {
            name: _open(folder / name, plan)
            for name in (_FREE, _FIXED)
            if (folder / name).is_file()
        }
        if not calls:
            raise ArtefactError("no compiled package in the folder")
        signature = program.signature
        call = _ByBatch(
            signature, calls.get(_FREE), calls.get(_FIXED), fixed_batch(signature, plan)
        )
        facts = codec.read(_Facts, folder / _FACTS)
        return TorchRunner(call, signature, plan, copied=facts.constant_outputs)


class _ByBatch:
    def __init__(
        self, signature: Signature, free: FlatCall | None, fixed: FlatCall | None, size: int
    ) -> None:
        self._signature, self._free, self._fixed, self._size = signature, free, fixed, size

    def __call__(self, *flat: torch.Tensor) -> Sequence[torch.Tensor]:
        matches = self._fixed is not None and batch_of(self._signature, flat) == self._size
        function = self._fixed if matches else self._free
        if function is None:
            raise SuanliError(f"this plan takes batches of {self._size} only")
        return function(*flat)


def _package(module: fx.GraphModule, program: Program, plan: Plan, path: Path, batch: int) -> None:
    """Compile for one batch size, or for any (0).

    Raises:
        SuanliError: Inductor cannot compile it; the first line of its reason is given.
    """
    signature = program.signature
    example = [t.to(plan.device) for t in program.inputs(batch or program.meta.batch)]
    shapes: Any = None
    if not batch:
        free = torch.export.Dim("batch", min=1, max=signature.max_batch)
        shapes = tuple({0: free} if spec.batched else None for spec in signature.inputs)
    try:
        with conditions(plan, threads_of(plan), building=True):
            exported = torch.export.export(module, tuple(example), dynamic_shapes=shapes)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(path), inductor_configs=_settings(plan)
            )
    except SuanliError:
        raise
    except Exception as error:  # Inductor raises many unrelated types
        text = str(error).strip() or type(error).__name__
        raise SuanliError(f"cannot be compiled ahead of time: {text.splitlines()[0]}") from error


def _settings(plan: Plan) -> dict[str, Any]:
    if plan.device.startswith("cuda"):
        return {"freezing": True, "max_autotune": bool(plan.options.get("max_autotune", True))}
    return {"freezing": True, **settings(plan)}


def _open(path: Path, plan: Plan) -> FlatCall:
    index = torch.device(plan.device).index
    try:
        compiled = torch._inductor.aoti_load_package(
            str(path), device_index=-1 if index is None else index
        )
    except Exception as error:  # whatever the loader of native code raises
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtefactError(f"{path.name} cannot be opened: {line}") from error
    loader = compiled.loader
    run = getattr(loader, "boxed_run", loader.run)

    def call(*flat: torch.Tensor) -> Sequence[torch.Tensor]:
        # not the package's own call, which parses the trees of its arguments anew each time
        outputs: Sequence[torch.Tensor] = run(list(flat))
        return outputs

    return call


BACKEND = AotInductorBackend()
