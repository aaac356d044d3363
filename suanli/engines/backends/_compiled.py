"""A flat module under torch.compile, one compilation per batch size while that pays."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from suanli.base.plan import Plan
from suanli.base.signature import Signature
from suanli.engines.backends._graph import convolves
from suanli.engines.backends._pieces import batch_of
from suanli.engines.backends._torch import FlatCall, fixed_batch

_STATIC_SIZES = 4
_DEFAULT_MODE = "max-autotune"


class PerBatch:
    """A module compiled per batch size, and from some number of sizes on once for all others."""

    def __init__(self, module: fx.GraphModule, signature: Signature, plan: Plan) -> None:
        """Prepare; nothing is compiled before the first call.

        Args:
            module: Flat module.
            signature: Its calling convention.
            plan: Its options "static_batch" and "mode" are used.
        """
        self._module = module
        self._signature = signature
        self._settings = settings(plan)
        self._sizes = _STATIC_SIZES if convolves(module) else 0
        self._static: dict[int, FlatCall] = {}
        self._any: FlatCall | None = None
        self._seen: set[int] = set()
        fixed = fixed_batch(signature, plan)
        if fixed:
            self._static[fixed] = self._compiled(dynamic=False)

    def __call__(self, *flat: torch.Tensor) -> Sequence[torch.Tensor]:
        """Run, compiling first if this batch size is new."""
        import torch._inductor.config as inductor

        batch = batch_of(self._signature, flat)
        function = self._static.get(batch)
        if function is None and len(self._static) < self._sizes:
            function = self._static[batch] = self._compiled(dynamic=False)
        if function is None:
            if self._any is None:
                self._any = self._compiled(dynamic=True)
            function = self._any
        if batch in self._seen:
            return function(*flat)
        # dynamo reads this setting while it traces, and `options` reach Inductor only after that
        with inductor.patch(freezing=True):
            outputs = function(*flat)
        self._seen.add(batch)
        return outputs

    def _compiled(self, *, dynamic: bool) -> FlatCall:
        # a copy has code of its own, so that torch's caches of compiled code stay apart
        module = fx.GraphModule(self._module, self._module.graph)
        return torch.compile(module, dynamic=dynamic, options=self._settings)


def settings(plan: Plan) -> dict[str, Any]:
    """Inductor's settings for a plan of the exported graph.

    On the CPU the generated kernels carry their names for the profiler, else it sees nothing of
    them; that costs less than a microsecond a kernel.
    """
    if not plan.device.startswith("cuda"):
        return {"cpp.enable_kernel_profile": True}
    mode = str(plan.options.get("mode", _DEFAULT_MODE))
    return dict(torch._inductor.list_mode_options(mode))


def overwrites(plan: Plan) -> bool:
    """Whether a call overwrites the outputs of the one before, as CUDA graphs do."""
    if not plan.device.startswith("cuda"):
        return False
    default = "default" if plan.options.get("source") else _DEFAULT_MODE
    return plan.options.get("mode", default) in ("max-autotune", "reduce-overhead")
