"""The person's own module against its exported graph, where trials could only run the graph."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils import _pytree as pytree

from suanli.base.results import Confirmation
from suanli.base.timing import Estimate
from suanli.base.trial import Trial
from suanli.engines.session import Session
from suanli.measure.timing import Contender, race

_MARGIN = 1.03  # below, the two are taken as one
_SECONDS = 4.0


def speed_over_graph(model: nn.Module, session: Session) -> Estimate:
    """How many times as fast a module is as the graph that was exported from it.

    Other processes cannot build a module that came from Python as an object: their baselines run
    the exported graph. What `forward` chooses at run time (PyTorch's fused path of transformer
    layers, say) is not in it. Both are timed in this process, in turns, in inference mode, at the
    asked batch.

    Args:
        model: In evaluation mode.
        session: What was captured of it.
    """
    device = session.wish.device
    inputs = session.workload.make_inputs(session.batches[0])
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(device), (inputs.args, dict(inputs.kwargs))
    )
    sync = torch.cuda.synchronize if device.startswith("cuda") else None
    own = model if device == "cpu" else copy.deepcopy(model).to(device)

    def side(module: nn.Module) -> Contender:
        return Contender.here(lambda: module(*args, **kwargs), sync=sync)

    graph = session.program.exported_module().to(device)
    with torch.inference_mode():
        return race(side(graph), side(own), blocks=(3, 12), max_seconds=_SECONDS).ratio


def over_own_module(
    confirmations: Sequence[Confirmation], trials: Sequence[Trial], speed: Estimate
) -> tuple[tuple[Confirmation, ...], str]:
    """The races with the person's own module in place of its graph, where that is faster.

    Args:
        confirmations: The asked batch first; only that one is compared.
        trials: Where eager fp32 is found.
        speed: `speed_over_graph` at the asked batch.

    Returns:
        The races, and what to say of them; "" where the module is no faster than its graph.
    """
    first, *others = confirmations
    if speed.lo95 <= _MARGIN or first.speedup_vs_eager is None:
        return tuple(confirmations), ""
    over = Estimate(
        p50=first.speedup_vs_eager.p50 / speed.p50,
        lo95=first.speedup_vs_eager.lo95 / speed.hi95,
        hi95=first.speedup_vs_eager.hi95 / speed.lo95,
    )
    said = (
        f"your module, called as it is, is {speed.p50:.2f}x as fast as its exported graph, which "
        f"the trials ran; the speed-ups at batch {first.batch} are over your module"
    )
    changed = replace(first, speedup_vs_eager=over)
    if over.p50 < first.speedup_vs_best_baseline.p50:
        eager = next(
            trial.plan
            for trial in trials
            if trial.baseline and trial.plan.backend == "eager" and trial.plan.precision == "fp32"
        )
        changed = replace(
            changed,
            best_baseline=eager,
            speedup_vs_best_baseline=over,
            baseline_ms=first.step_ms.scaled(over.p50),
        )
    return (changed, *others), said
