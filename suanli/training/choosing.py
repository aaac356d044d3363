"""The plan of a run: the one asked for, the default, or the fastest that a search finds."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from suanli.base import codec
from suanli.base.errors import SuanliError
from suanli.base.events import Event, Listener
from suanli.base.files import cache_dir
from suanli.base.hardware import Ceilings
from suanli.base.leftovers import temporary_folder
from suanli.base.train_plan import TrainPlan
from suanli.devices import device as find_device
from suanli.measure.ceilings import ceilings
from suanli.measure.environment import environment
from suanli.parallel.replicas import Replicas
from suanli.plans.ranking import ranked
from suanli.plans.store import TrialStore, store_key
from suanli.training.exchange import Exchange, Facts
from suanli.training.fit import default_plan
from suanli.training.readers import stays
from suanli.training.recipe import Recipe
from suanli.training.request import TrainRequest
from suanli.training.trials import Chosen, PlanSearch, situation_of
from suanli.training.work_of import quick_ms, step_work
from suanli.workloads.record import Samples
from suanli.workloads.stream import Stream

# A search may take this part of what the run is expected to take, and is not begun under so much;
# above two minutes it may take the lesser part.
_SEARCH_SHARE, _LEAST_SEARCH_S = 0.25, 20.0
_LONG_SEARCH_SHARE, _LONG_SEARCH_S = 0.05, 120.0
_MOST_WAIT_S = 3600.0  # of other processes for the first one's search, beside what it is given
_CHECK_SECONDS = 20.0  # what the reference steps may cost, roughly
_RUNS_OF_A_CHECK = 8.0  # eager fp32 steps that one checked step costs, the float64 ones counted


class PlanChoice:
    """Finds the plan of one run.

    Attributes:
        chosen: What the search found; None where there was none.
        ceilings: Of the device, where the search looked them up.
    """

    def __init__(
        self,
        recipe: Recipe,
        request: TrainRequest,
        replicas: Replicas,
        listener: Listener,
        note: Callable[[str], None],
        processes: int = 1,
    ) -> None:
        """Take in what is asked.

        Args:
            recipe: What is trained; its batch is what one process computes in a step.
            request: What is asked.
            replicas: The processes that need the plan.
            listener: Told what is going on.
            note: Told what a person should know.
            processes: Among how many the cores are divided.
        """
        self._processes = processes
        self._recipe, self._request, self._replicas = recipe, request, replicas
        self._listener, self._note = listener, note
        self.chosen: Chosen | None = None
        self.ceilings: Ceilings | None = None

    def plan(self, model: nn.Module, train: Samples) -> TrainPlan:
        """The plan that was asked for, or found.

        Raises:
            KeyboardInterrupt: The search was stopped; what was tried is in the store.
            SuanliError: Not even the plain loop works.
        """
        request = self._request
        if isinstance(request.plan, TrainPlan):
            changes = {"sharded": True} if request.sharded else {}
            return request.plan.with_(**changes).checked()
        plain = default_plan(self._recipe, request.device, train)
        if self._replicas.world > 1:
            return self._for_several(plain, model, train)
        if request.plan == "default":
            return plain
        eager_ms = quick_ms(model, self._recipe, train, request.device)
        batches = -(-len(train) // self._recipe.settings.batch)
        read_ms = self._reading_ms(train, plain)
        expected_s = 1e-3 * max(eager_ms, read_ms) * batches * self._recipe.settings.epochs
        if request.max_seconds is not None:
            expected_s = min(expected_s, request.max_seconds)
        budget_s = request.budget_s
        if budget_s is None:
            longest_s = max(_LONG_SEARCH_S, _LONG_SEARCH_SHARE * expected_s)
            budget_s = min(longest_s, _SEARCH_SHARE * expected_s)
            if budget_s < _LEAST_SEARCH_S:
                return self._without_search(model, train, plain, expected_s)
        self.chosen = self._searched(model, train, budget_s, eager_ms)
        if self.chosen.found.interrupted:
            raise KeyboardInterrupt  # what was tried is in the store
        if self.chosen.note:
            self._note(self.chosen.note)
        return self.chosen.plan

    def _reading_ms(self, train: Samples, plain: TrainPlan) -> float:
        """What reading a batch takes at the least, where it goes on beside the steps."""
        if not isinstance(train, Stream) or plain.data == "resident":
            return 0.0
        each_s = train.nature().read_s / max(1, plain.workers)
        return 1e3 * each_s * self._recipe.settings.batch

    def _without_search(
        self, model: nn.Module, train: Samples, plain: TrainPlan, expected_s: float
    ) -> TrainPlan:
        """What an earlier search found, or the default plan."""
        short = f"no search of the plan: the whole run takes about {expected_s:.0f} s"
        store = None if self._request.fresh else self._store(model)
        found = ranked(store.all()) if store is not None else ()
        plans = [TrainPlan.from_plan(trial.plan) for trial in found]
        if not stays(train, self._request.device):  # the data may have grown since
            plans = [plan for plan in plans if plan.data == "streamed"]
        if not plans:
            self._note(f"{short}; --budget SECONDS searches all the same")
            return plain
        self._note(
            f"{short}; the plan is the fastest of {len(plans)} verified ones of earlier searches"
        )
        return plans[0]

    def _for_several(self, plain: TrainPlan, model: nn.Module, train: Samples) -> TrainPlan:
        """One plan for several processes: the first one searches, on its own share of a batch."""
        request, world = self._request, self._replicas.world
        if request.sharded:
            if request.plan == "auto":
                self._note("a sharded run takes the default plan; --plan FILE gives another")
            # parameters in shares want tensors without gaps, and operators of torch's own
            return plain.with_(
                sharded=True, memory_layout="contiguous", kernels=(), micro_batch=0
            ).checked()
        if request.plan == "default":
            return plain

        def search() -> str:
            settings = self._recipe.settings
            share = replace(settings, batch=-(-settings.batch // world))
            mine = replace(self._recipe, settings=share)
            alone = PlanChoice(mine, request, Replicas(), self._listener, self._note, world)
            found = alone.plan(model, train)
            self.chosen, self.ceilings = alone.chosen, alone.ceilings
            return codec.dumps(found)

        limit_s = _MOST_WAIT_S + (request.budget_s or 0.0)
        told = self._replicas.told_by_first(search, limit_s=limit_s)
        return codec.loads(TrainPlan, told).checked()

    def _searched(
        self, model: nn.Module, train: Samples, budget_s: float, eager_ms: float
    ) -> Chosen:
        request, settings = self._request, self._recipe.settings
        self._say(f"looking up the ceilings of {request.device}")
        self.ceilings = ceilings(request.device)
        images = any(part.dim() == 4 for part in train.head(1).inputs)
        check_steps = int(1e3 * _CHECK_SECONDS / (_RUNS_OF_A_CHECK * eager_ms))
        facts = Facts(
            settings=settings,
            seed=request.seed,
            check_steps=min(4, max(2, check_steps)),
            total_steps=settings.epochs * -(-len(train) // settings.batch),
            trained=tuple(n for n, p in model.named_parameters() if p.requires_grad),
            streamed=isinstance(train, Stream),
            prune=request.prune,
        )
        scratch = cache_dir() / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        folder = temporary_folder(scratch, "train-")  # what a killed search left goes
        try:
            exchange = self._exchange(folder, model, train, facts)
            work = step_work(model, self._recipe, train)
            situation = situation_of(
                self._recipe,
                model,
                request.device,
                images=images,
                blocks=_has_blocks(model),
                flops=float(work.flops) if work is not None else None,
                train=train,
                processes=self._processes,
            )
            finder = PlanSearch(self._recipe, exchange, situation, self._listener)
            return finder.run(budget_s=budget_s, eager_ms=eager_ms, store=self._store(model))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _exchange(self, folder: Path, model: nn.Module, train: Samples, facts: Facts) -> Exchange:
        """The start of the run as files, for the trials."""
        try:
            return Exchange.write(folder, model, self._recipe, train, facts)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise SuanliError(
                f"the trials' files cannot be written to {folder.parent}: {reason}",
                next_step="make room there, or --plan default, which needs no search",
            ) from None

    def _store(self, model: nn.Module) -> TrialStore | None:
        """Earlier trials of the same model, settings, machine and libraries.

        What is trained and pruned counts: a step with a frozen body is another computation, and
        is proved by its head's gradients alone.
        """
        if not self._recipe.ref:
            return None
        shapes = sorted((n, list(t.shape), str(t.dtype)) for n, t in model.state_dict().items())
        settings = codec.to_json(self._recipe.settings)
        settings = {k: v for k, v in settings.items() if k != "epochs"}
        key = store_key(
            workload=f"train {_named(self._recipe.ref)} {shapes} {settings}",
            device=find_device(self._request.device).info,
            environment=environment(),
            batch=self._recipe.settings.batch,
            objective="throughput",
            conditions={
                "threads": torch.get_num_threads(),
                "trained": ",".join(n for n, p in model.named_parameters() if p.requires_grad),
                "prune": self._request.prune,
            },
        )
        return TrialStore(key, fresh=self._request.fresh)

    def _say(self, text: str) -> None:
        self._listener(Event(kind="step", text=text))


def _named(ref: str) -> str:
    """A reference without its options; of a person's file its content counts as well."""
    base = ref.partition("?")[0]
    path = Path(base.rpartition(":")[0])
    if path.suffix != ".py" or not path.is_file():
        return base
    return f"{base} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _has_blocks(model: nn.Module) -> bool:
    norms = nn.modules.batchnorm._BatchNorm
    if any(isinstance(m, norms) for m in model.modules()):
        return False
    return any(isinstance(m, nn.ModuleList | nn.Sequential) for m in model.modules())
