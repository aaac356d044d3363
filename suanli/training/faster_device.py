"""`--device auto`: small work may be faster on the CPU than on a GPU, so both are tried.

A GPU step of a small network is mostly the launching of its kernels. Work that would keep a CPU
busy for seconds per step goes to the GPU without a trial.
"""

from collections.abc import Callable

from torch import nn

from suanli.training.fit import default_plan
from suanli.training.forward import machine_as_planned
from suanli.training.recipe import Recipe
from suanli.training.work_of import quick_ms, step_work
from suanli.workloads.record import Samples

# Operations of a step from which a CPU is not tried: 5 s at 100 GFLOP/s, which any server reaches.
_MOST_FLOPS = 5e11

StepMs = Callable[[str], float]


def faster_device(
    model: nn.Module,
    recipe: Recipe,
    train: Samples,
    gpu: str,
    step_ms: StepMs | None = None,
) -> tuple[str, str]:
    """The device on which a step of the default plan takes less time.

    Args:
        model: On the CPU; it is not changed.
        recipe: What is trained.
        train: Its training samples.
        gpu: Name of the GPU.
        step_ms: Times a step on a device; a stand-in for tests.

    Returns:
        Its name, and a line on what was measured ("" where nothing was).
    """
    work = step_work(model, recipe, train)
    if work is None or work.flops > _MOST_FLOPS:
        return gpu, ""
    timed = step_ms or (lambda device: _timed(model, recipe, train, device))
    on_gpu, on_cpu = timed(gpu), timed("cpu")
    best = "cpu" if on_cpu < on_gpu else gpu
    return best, f"a step takes {on_cpu:.3g} ms on the CPU, {on_gpu:.3g} ms on {gpu}: {best} it is"


def _timed(model: nn.Module, recipe: Recipe, train: Samples, device: str) -> float:
    plan = default_plan(recipe, device, train)
    with machine_as_planned(plan):
        return quick_ms(model, recipe, train, device, plan)
