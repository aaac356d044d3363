"""Which device and which plan a run takes before its first step."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from suanli.base.errors import SuanliError
from suanli.base.events import Event
from suanli.base.timing import Estimate
from suanli.base.train_plan import TrainPlan
from suanli.base.trial import Trial
from suanli.devices import cpu_info
from suanli.parallel.replicas import Replicas
from suanli.plans.search import SearchResult
from suanli.plans.store import TrialStore
from suanli.training import calls, choosing, faster_device, trainer
from suanli.training.calls import TrainOptions, train_workload
from suanli.training.choosing import PlanChoice
from suanli.training.exchange import Exchange, Facts
from suanli.training.host import TrainHost
from suanli.training.prune import pruned
from suanli.training.request import TrainRequest
from suanli.training.start import freeze, starting_point
from suanli.training.trials import Chosen, situation_of
from suanli.workloads.stream import Stream
from tests.stream_parts import Pictures
from tests.train_parts import data, recipe

REF = f"{Path(__file__).with_name('train_parts.py')}:recipe"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("on_cpu", "on_gpu", "best"), [(2.0, 5.0, "cpu"), (9.0, 5.0, "cuda:0")])
def test_small_work_goes_where_its_step_is_faster(on_cpu: float, on_gpu: float, best: str) -> None:
    made, train = recipe(), data().train
    times = {"cpu": on_cpu, "cuda:0": on_gpu}
    model = starting_point(made, train, 0)
    found, line = faster_device.faster_device(model, made, train, "cuda:0", times.__getitem__)
    assert found == best
    assert f"{on_cpu:.3g} ms on the CPU" in line


def test_large_work_is_not_tried_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made, train = recipe(), data().train
    monkeypatch.setattr(faster_device, "_MOST_FLOPS", 10.0)
    model = starting_point(made, train, 0)

    def never(device: str) -> float:
        raise AssertionError(device)

    assert faster_device.faster_device(model, made, train, "cuda:0", never) == ("cuda:0", "")


def test_auto_asks_only_where_there_is_a_gpu(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def to_cpu(model: object, made: object, train: object, gpu: str) -> tuple[str, str]:
        asked.append(gpu)
        return "cpu", "a step takes 1 ms on the CPU, 2 ms on cuda:0: cpu it is"

    monkeypatch.setattr(trainer, "faster_device", to_cpu)
    options = TrainOptions(plan="default", epochs=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    train_workload(REF, replace(options, out=tmp_path / "without"))
    assert asked == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert calls._device(replace(options, tune=3)) == "cuda:0"  # many runs: no trial for each
    monkeypatch.setattr(calls, "_device", lambda options: "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = train_workload(REF, replace(options, out=tmp_path / "with"))
    assert asked == ["cuda:0"]
    assert result.device.name == "cpu"
    assert any("cpu it is" in note for note in result.notes)


def _group(monkeypatch: pytest.MonkeyPatch, count: int) -> list[Replicas]:
    """Processes of a group, as threads that share its store."""
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    place = torch.distributed.distributed_c10d
    monkeypatch.setattr(place, "_get_default_store", lambda: store)
    return [Replicas(rank, count) for rank in range(count)]


def test_the_first_process_searches_on_its_share_and_tells_the_others(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, train = replace(recipe(batch=33), ref=REF), data().train
    model = starting_point(made, train, 0)
    plan = TrainPlan(precision="bf16", threads=3)
    asked: list[tuple[int, int]] = []

    def searched(self: PlanChoice, *_: object) -> Chosen:
        asked.append((self._recipe.settings.batch, self._processes))
        found = SearchResult(
            winner=None, runner_ups=(), trials=(), interrupted=False, seconds_spent=1.0
        )
        return Chosen(plan=plan, found=found, speedup=None, baseline=None)

    monkeypatch.setattr(PlanChoice, "_searched", searched)
    request = TrainRequest(plan="auto", device="cpu", out=tmp_path / "run", budget_s=30.0)

    def choose(replicas: Replicas) -> TrainPlan:
        return PlanChoice(made, request, replicas, lambda e: None, lambda n: None).plan(
            model, train
        )

    group = _group(monkeypatch, 3)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(choose, reversed(group))) == [plan] * 3
    assert asked == [(11, 3)]
    own = made.workload.make_model()
    cores = cpu_info().usable_cores
    for count in (1, 2, 1000):
        found = situation_of(made, own, "cpu", images=True, blocks=False, processes=count)
        assert found.machine.cores == max(1, cores // count)


def test_the_others_end_with_a_first_process_that_fails_or_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = _group(monkeypatch, 2)

    def fails() -> str:
        raise SuanliError("no plan")

    with pytest.raises(SuanliError, match="no plan"):
        first.told_by_first(fails, limit_s=1.0)
    with pytest.raises(SuanliError, match="the first process failed: no plan"):
        second.told_by_first(fails, limit_s=1.0)
    with pytest.raises(SuanliError, match="said nothing for 0 s"):
        second.told_by_first(fails, limit_s=0.0)
    assert Replicas().told_by_first(lambda: "alone", limit_s=0.0) == "alone"

    class Gone:
        def check(self, _: list[str]) -> bool:
            raise RuntimeError("connection reset by peer")

    place = torch.distributed.distributed_c10d
    monkeypatch.setattr(place, "_get_default_store", Gone)
    with pytest.raises(SuanliError, match="the first process is gone"):
        second.told_by_first(fails, limit_s=1.0)


def test_trials_of_a_file_count_for_its_content_only(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    keys = []
    for text in ("a = 1\n", "a = 2\n"):
        file.write_text(text)
        keys.append(choosing._named(f"{file}:recipe"))
    assert keys[0] != keys[1]
    assert choosing._named("digits-resnet?weights=none") == "digits-resnet"


def test_trials_of_a_frozen_or_pruned_run_are_its_own(cache: Path, tmp_path: Path) -> None:
    made, train = replace(recipe(), ref=REF), data().train
    request = TrainRequest(plan="auto", device="cpu", out=tmp_path / "run")

    def place(asked: TrainRequest, frozen: tuple[str, ...] = ()) -> Path:
        model = starting_point(made, train, 0)
        if frozen:
            freeze(model, frozen)
        choice = PlanChoice(made, asked, Replicas(), lambda e: None, lambda n: None)
        store = choice._store(model)
        assert store is not None
        return store.path

    places = [
        place(request),
        place(request, ("body.*",)),
        place(request, ("*.bias",)),
        place(replace(request, prune="0.5")),
        place(replace(request, prune="0.8")),
    ]
    assert len(set(places)) == len(places)
    assert place(replace(request, seed=3, out=tmp_path / "other")) == places[0]


def test_trials_of_a_pruned_run_prune(tmp_path: Path) -> None:
    plain, train = recipe(), data().train
    made = pruned(plain, "0.5")
    model = starting_point(made, train, 0)
    facts = Facts(
        settings=made.settings,
        seed=0,
        check_steps=2,
        total_steps=28,
        trained=tuple(name for name, _ in model.named_parameters()),
        prune="0.5",
    )
    folder = str(Exchange.write(tmp_path / "exchange", model, made, train, facts).folder)
    plan = TrainPlan()
    hosts = [TrainHost(ref=REF, plan=None, exchange=folder)]  # as a trial's own process makes it
    hosts += [TrainHost(ref="", plan=None, exchange=folder, recipe=one) for one in (made, plain)]
    apart, here, unpruned = (host.trace(plan, 0) for host in hosts)
    assert all(torch.equal(apart[name], here[name]) for name in here)
    assert not all(torch.equal(apart[name], unpruned[name]) for name in unpruned)


def test_a_full_disk_before_the_search_is_said_with_a_way_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, train = replace(recipe(), ref=REF), data().train

    def full(*_: object) -> Exchange:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Exchange, "write", full)
    request = TrainRequest(plan="auto", device="cpu", out=tmp_path / "run")
    choice = PlanChoice(made, request, Replicas(), lambda e: None, lambda n: None)
    monkeypatch.setattr(choosing, "ceilings", lambda device: None)
    with pytest.raises(SuanliError, match=r"No space left on device \(make room .*default") as told:
        choice._searched(starting_point(made, train, 0), train, 30.0, 1.0)
    assert str(cache / "scratch") in str(told.value)
    assert list((cache / "scratch").iterdir()) == []


def test_a_short_run_takes_what_an_earlier_search_found(cache: Path, tmp_path: Path) -> None:
    made, train = replace(recipe(), ref=REF), data().train
    model = starting_point(made, train, 0)
    request = TrainRequest(plan="auto", device="cpu", out=tmp_path / "run")
    notes: list[str] = []
    events: list[Event] = []

    def chosen(asked: TrainRequest) -> TrainPlan:
        notes.clear()
        choice = PlanChoice(made, asked, Replicas(), events.append, notes.append)
        return choice.plan(model, train)

    default = chosen(request)
    assert "--budget SECONDS searches all the same" in notes[0]
    store = PlanChoice(made, request, Replicas(), events.append, notes.append)._store(model)
    assert isinstance(store, TrialStore)
    found = default.with_(threads=1)
    for plan, ms, status in (
        (TrainPlan(), 9.0, "verified"),
        (found, 3.0, "verified"),
        (default.with_(data="streamed"), 1.0, "rejected"),
    ):
        step = Estimate(p50=ms, lo95=ms, hi95=ms)
        trial = Trial(plan=plan.as_plan(), status="verified", step_ms=step, samples_per_s=1e3 / ms)
        store.put(replace(trial, status=status))  # type: ignore[arg-type]
    assert chosen(request) == found
    assert "fastest of 2 verified ones" in notes[0]
    assert chosen(replace(request, fresh=True)) == default
    moving = Stream(Pictures())  # which cannot stay in memory, as they could when it was searched
    choice = PlanChoice(made, request, Replicas(), events.append, notes.append)
    assert choice.plan(model, moving) == TrainPlan()
    assert choosing._LEAST_SEARCH_S > 0
