"""torch.compile: Inductor with frozen weights.

Nothing is saved: a plan compiles again at load (from Inductor's cache on the machine that built
it). Every batch size met is compiled for itself, up to four; the ones after share one compilation
with a free batch. A fixed batch matters for convolutions, whose weights Inductor packs for oneDNN
only then: ResNet-50 at batch 1 in bf16 took 9.4 ms fixed and 15.2 ms free on two cores, BERT-base
22.6 and 23.1 ms. A model without convolutions therefore gets one fixed size only, the plan's own.

`max_autotune` is not offered on the CPU: it gave BERT-base nothing (22.6 ms) and made ResNet-50
thirty times slower (295 ms), while the build took twice as long.

Options:
    source: The user's own module under plain `torch.compile(model)`: what a person has today.
    autocast: Weights stay fp32 in the module; freezing casts them once.
    static_batch: The batch size that the plan is for; it is compiled with its size fixed.
    mode: On a GPU, `torch.compile`'s own mode.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from suanli.base.plan import BackendSpec, Plan
from suanli.engines.backend import BuildNote, Runner
from suanli.engines.backends._compiled import PerBatch, overwrites
from suanli.engines.backends._torch import (
    COMPILER_INSTALL,
    need_compiler,
    need_offered,
    prepared_graph,
    prepared_source,
    source_baseline,
    use_inductor_cache,
)
from suanli.engines.program import Program


class InductorBackend:
    """Compiles at load."""

    spec = BackendSpec(
        name="inductor",
        install=COMPILER_INSTALL,
        packages=("torch",),
        devices=("cpu", "cuda"),
        precisions={"cpu": ("bf16", "fp32"), "cuda": ("fp16", "bf16", "tf32", "fp32")},
        options={
            "mode": ("max-autotune", "default", "reduce-overhead", "max-autotune-no-cudagraphs")
        },
        option_needs={"mode": ("cuda",)},
        batch_option="static_batch",
        build_s=20.0,
        promise={
            "fp32": 0.8,
            "bf16": 0.22,
            "cuda/fp32": 0.8,
            "cuda/tf32": 0.4,
            "cuda/bf16": 0.25,
            "cuda/fp16": 0.25,
        },
        ships=False,
        baselines=(
            source_baseline("inductor", "bf16"),
            source_baseline("inductor", "fp32"),
            source_baseline("inductor", "bf16", "cuda"),
            source_baseline("inductor", "bf16", "cuda", mode="reduce-overhead"),
            source_baseline("inductor", "bf16", "cuda", mode="max-autotune"),
            source_baseline("inductor", "tf32", "cuda"),
        ),
    )

    def build(
        self,
        program: Program,
        plan: Plan,
        folder: Path,
        calibration: Sequence[tuple[torch.Tensor, ...]] | None = None,
    ) -> BuildNote:
        """Make sure that it can be compiled, see `suanli.engines.backend.Backend`."""
        need_offered(self.spec, plan)
        need_compiler(plan)
        return BuildNote(plan=plan, details={"load": "compiles again"})

    def load(self, program: Program, plan: Plan, folder: Path) -> Runner:
        """Prepare the module; each batch size compiles at its first call."""
        need_compiler(plan)
        use_inductor_cache()
        if plan.options.get("source"):
            ready = prepared_source(program, plan, lambda module: _as_is(module, plan))
            call = ready.call
        else:
            module, ready = prepared_graph(program, plan)
            call = PerBatch(module, program.signature, plan)
        return ready.runner(program.signature, plan, call, copy=overwrites(plan))


def _as_is(module: torch.nn.Module, plan: Plan) -> Callable[..., Any]:
    mode = plan.options.get("mode")
    return torch.compile(module, mode=str(mode)) if mode else torch.compile(module)


BACKEND = InductorBackend()
