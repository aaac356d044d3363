"""What stands around a person's module: `torch.compile`, `DataParallel` and the like."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class TakenOut:
    """A module without what stood around it.

    Attributes:
        module: The person's own, whose paths and lines operators carry.
        compiled: Whether `torch.compile` was around it, or `module.compile()` was called.
        parallel: Name of the class that spread it over devices or processes; "" for none.
    """

    module: nn.Module
    compiled: bool
    parallel: str

    @property
    def notes(self) -> list[str]:
        """What is to be said of a module that is profiled without them."""
        said = []
        if self.parallel:
            said.append(
                f"the module is taken out of {self.parallel}: one device is profiled; give a step "
                "of your own to profile it as it is"
            )
        return said


def taken_out(model: nn.Module) -> TakenOut:
    """The module inside its wrappers, and what these were."""
    compiled, parallel, module = False, "", model
    while True:
        compiled = compiled or getattr(module, "_compiled_call_impl", None) is not None
        inner = module._modules.get("_orig_mod")
        compiled = compiled or inner is not None
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            parallel, inner = type(module).__name__, module.module
        if inner is None:
            return TakenOut(module=module, compiled=compiled, parallel=parallel)
        module = inner
