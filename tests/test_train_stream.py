"""Data sets that are read while a run goes on: order, resuming, what stays resident, the search."""

import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Subset, TensorDataset
from torch.utils.data import WeightedRandomSampler as Weighted

import suanli
from suanli.base import codec
from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.plans.situation import Situation
from suanli.plans.train_space import TrainSituation, train_candidates
from suanli.training.batches import Batches, _taken
from suanli.training.calls import TrainOptions, train_module, train_workload
from suanli.training.exchange import Exchange, Facts
from suanli.training.fit import default_plan
from suanli.training.host import TrainHost
from suanli.training.judging import judge
from suanli.training.readers import chunks, stays
from suanli.training.start import starting_point
from suanli.workloads.datasets import (
    PictureFolder,
    Scaling,
    find_pictures,
    read_image_folder,
    split,
)
from suanli.workloads.given import as_data, as_samples
from suanli.workloads.labelled import with_labelled_data
from suanli.workloads.module import of_module
from suanli.workloads.record import Data, Samples
from suanli.workloads.stream import Stream
from tests.stream_parts import STREAMED, Broken, Kind, Pictures, taken
from tests.train_parts import make_model, new_loop, recipe, samples, state_of


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def equal(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


# -- order and chance ----------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (1, 2), (3, 1), (2, 5)])
def test_batches_depend_on_the_seed_and_not_on_who_reads(workers: int, prefetch: int) -> None:
    plain = taken(Stream(Pictures()), STREAMED, 8)  # three batches an epoch
    plan = STREAMED.with_(workers=workers, prefetch=prefetch)
    assert equal(plain, taken(Stream(Pictures()), plan, 8))
    assert not equal(plain, taken(Stream(Pictures()), plan, 8, seed=4))


def test_what_samples_draw_depends_on_the_epoch_and_leaves_the_caller_alone() -> None:
    made = recipe(augmentation=())
    torch.manual_seed(5)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = taken(Stream(Pictures(32)), STREAMED, 2, made=made)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    brightness = [inputs.mean(dim=(1, 2, 3)).sort().values for inputs, _ in found]
    assert not torch.allclose(*brightness)  # the same pictures, drawn anew in the second epoch
    still = taken(Stream(Pictures(32, noise=False)), STREAMED, 2, made=made)
    brightness = [inputs.mean(dim=(1, 2, 3)).sort().values for inputs, _ in still]
    assert torch.equal(*brightness)


def test_read_or_resident_the_batches_are_the_same() -> None:
    pictures = Pictures(noise=False)
    tensors = Samples(inputs=(torch.from_numpy(pictures.pictures),), labels=pictures.labels)
    wanted = taken(tensors, TrainPlan(), 7)
    resident = TrainPlan(data="resident")
    assert equal(wanted, taken(Stream(pictures), resident, 7))
    assert equal(wanted, taken(Stream(pictures), STREAMED.with_(workers=2, prefetch=2), 7))
    assert equal(wanted, taken(Stream(pictures), STREAMED, 7))


@pytest.mark.parametrize("at", [2, 3, 4])
def test_from_a_place_the_same_batches_come(at: int) -> None:
    plan = STREAMED.with_(workers=2, prefetch=2)
    batches = Batches(Stream(Pictures()), recipe(), plan, 3)
    for _ in range(at):
        batches.next()
    place = batches.place
    wanted = [batches.next() for _ in range(4)]
    batches.move_to(place)  # as a rollback does
    again = [batches.next() for _ in range(4)]
    batches.close()
    other = Batches(Stream(Pictures()), recipe(), STREAMED, 3)
    other.move_to(place)
    resumed = [other.next() for _ in range(4)]
    for one, two, three in zip(wanted, again, resumed, strict=True):
        assert torch.equal(one.inputs[0], two.inputs[0])
        assert torch.equal(one.inputs[0], three.inputs[0])
        assert torch.equal(one.after.now, three.after.now)


def test_half_and_resumed_with_other_workers_is_the_whole() -> None:
    made = recipe(epochs=3)
    whole = new_loop(made, STREAMED, train=Stream(Pictures()))
    whole.run()
    half = new_loop(made, STREAMED.with_(workers=2, prefetch=2), train=Stream(Pictures()), steps=4)
    half.run()
    rest = new_loop(made, STREAMED.with_(workers=1), train=Stream(Pictures()))
    rest.restore(half.state())
    rest.run()
    one, other = state_of(whole), state_of(rest)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


class Endless(Kind):
    """A million samples of four megabytes."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1_000_000,), float(index % 3)), index % 3


def test_more_than_fits_into_memory_is_read_as_it_is_needed() -> None:
    data = as_data(Endless())
    assert [len(p) for p in (data.train, data.search, data.acceptance)] == [
        800_000,
        100_000,
        100_000,
    ]
    assert not stays(data.train, "cpu")
    plan = default_plan(recipe(), "cpu", data.train)
    assert (plan.data, plan.workers, plan.prefetch) == ("streamed", 1, 2)
    made = recipe(batch=4, augmentation=())
    for inputs, labels in taken(data.train, plan, 3, made=made):
        assert torch.equal(inputs[:, 0].long(), labels)
    with pytest.raises(BadInputError, match=r"3200\.0 GB in memory"):
        _ = data.train.inputs


def test_a_process_of_several_reads_its_own_samples_only() -> None:
    pictures = Pictures(32)
    batches = Batches(
        Stream(pictures), recipe(augmentation=()), STREAMED, 3, lambda n: slice(1, n, 2)
    )
    mine = batches.next()
    pictures.reads.clear()
    batches.next()
    assert len(pictures.reads) == 16
    whole = Batches(Stream(Pictures(32)), recipe(augmentation=()), STREAMED, 3).next()
    assert torch.equal(mine.inputs[0][1::2], whole.inputs[0][1::2])
    assert torch.equal(mine.labels[1::2], whole.labels[1::2])


# -- what is kept in memory ----------------------------------------------------------------------


class Counting(Pictures):
    """What it gives depends on how often it was asked."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture, label = super().__getitem__(index)
        return picture + np.float32(len(self.reads)), label


def test_only_samples_that_stay_the_same_become_resident() -> None:
    still, moving, odd = (Stream(kind) for kind in (Pictures(noise=False), Pictures(), Counting()))
    assert [s.nature().fixed for s in (still, moving, odd)] == [True, False, False]
    assert [s.nature().repeatable for s in (still, moving, odd)] == [True, True, False]
    assert default_plan(recipe(), "cpu", still).data == "resident"
    assert default_plan(recipe(), "cpu", moving).data == "streamed"
    own = replace(recipe(), plan=TrainPlan(data="resident", precision="bf16"))
    changed = default_plan(own, "cpu", moving)
    assert (changed.data, changed.precision) == ("streamed", "bf16")
    with pytest.raises(BadInputError, match="gives other ones each time"):
        taken(moving, TrainPlan(data="resident"), 1)


def test_whole_sets_are_read_in_order_and_judged() -> None:
    pictures = Pictures(70, noise=False)
    pieces = list(chunks(Stream(pictures), 16))
    assert [len(piece) for piece in pieces] == [16, 16, 16, 16, 6]
    assert torch.equal(
        torch.cat([p.labels for p in pieces if p.labels is not None]), pictures.labels
    )
    tensors = Samples(inputs=(torch.from_numpy(pictures.pictures),), labels=pictures.labels)
    model = make_model()
    assert judge(model, Stream(pictures)) == judge(model, tensors)
    assert torch.equal(Stream(pictures).inputs[0], tensors.inputs[0])


def test_an_epoch_s_own_arrangement_needs_memory() -> None:
    made = replace(recipe(), arrange=lambda inputs, epoch, generator: inputs)
    with pytest.raises(BadInputError, match="arranges whole epochs"):
        Batches(Stream(Pictures()), made, STREAMED, 0)
    Batches(Stream(Pictures(noise=False)), made, TrainPlan(data="resident"), 0).next()


# -- the forms in which data comes ---------------------------------------------------------------


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(3), 0)])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_loaders_give_their_data_set_and_are_refused_where_they_decide() -> None:
    pictures = Pictures()
    loader: DataLoader[Any] = DataLoader(pictures, batch_size=7, shuffle=True, num_workers=3)
    found = as_samples(loader)
    assert isinstance(found, Stream)
    assert found.dataset is pictures
    assert default_plan(recipe(), "cpu", found).workers == 3
    plain = TensorDataset(torch.zeros(9, 2), torch.ones(9, 3), torch.zeros(9, dtype=torch.long))
    assert [list(part.shape) for part in as_samples(plain).inputs] == [[9, 2], [9, 3]]
    some: Any = [
        (DataLoader(pictures, sampler=Weighted([1.0] * 70, 70)), "a sampler of its own"),
        (
            DataLoader(pictures, sampler=RandomSampler(pictures, replacement=True)),
            "a sampler of its own",
        ),
        (
            DataLoader(pictures, sampler=RandomSampler(pictures, num_samples=9)),
            "a sampler of its own",
        ),
        (DataLoader(pictures, collate_fn=list), "a collate_fn"),
        (DataLoader(pictures, worker_init_fn=print), "worker_init_fn"),
        (DataLoader(pictures, batch_size=None), "no batch size"),
        (DataLoader(Rows()), "Rows has no length"),
        (Rows(), "map-style"),
        (Subset(pictures, []), "the data set is empty"),
        (7, "data cannot be a int"),
    ]
    for given, words in some:
        with pytest.raises(BadInputError, match=words):
            as_samples(given)


def test_parts_may_be_data_sets() -> None:
    one, other = Pictures(40), samples(30, 4)
    found = as_data(Data(train=one, search=DataLoader(Pictures(20)), acceptance=other))  # type: ignore[arg-type]
    assert isinstance(found.train, Stream)
    assert isinstance(found.search, Stream)
    assert found.acceptance is other


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_own_module_learns_from_a_loader(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    loader: DataLoader[Any] = DataLoader(Pictures(400), batch_size=25, shuffle=True, num_workers=2)
    options: dict[str, Any] = {"plan": "default", "device": "cpu", "lr": 0.1, "epochs": 3}
    run = suanli.train(model, loader, functional.cross_entropy, out=tmp_path / "a", **options)
    assert run.result.batch == 25
    assert run.result.plan.workers == 2
    assert run.result.quality is not None
    assert run.result.quality.value > 0.7
    assert any("2 processes read the data set" in note for note in run.result.notes)
    same = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    still = Pictures(400, noise=False)
    run = suanli.train(same, still, functional.cross_entropy, out=tmp_path / "b", **options)
    assert run.result.plan.data == "resident"
    assert any("all 320 stay in memory" in note for note in run.result.notes)
    odd = suanli.train(
        same, Counting(60), functional.cross_entropy, out=tmp_path / "c", **{**options, "epochs": 1}
    )
    assert any("not be the same bit for bit" in note for note in odd.result.notes)


def test_a_corrupt_sample_costs_no_step_and_the_run_goes_on_once_it_is_mended(
    tmp_path: Path,
) -> None:
    def started(pictures: Pictures, out: Path, **more: Any) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        parts = Data(train=pictures, search=samples(30, 2), acceptance=samples(30, 3))  # type: ignore[arg-type]
        options = {"plan": TrainPlan(workers=1, prefetch=1), "device": "cpu", "batch": 16}
        run = train_module(
            model, parts, functional.cross_entropy, out=out, **options, epochs=3, **more
        )
        return run.model.state_dict()

    wanted = started(Pictures(), tmp_path / "whole")
    bad = tmp_path / "bad"
    at = _late_sample()
    with pytest.raises(BadInputError, match=f"sample {at} "):
        started(Broken("raises", at), bad)
    (kept,) = (bad / "checkpoints").iterdir()
    assert int(kept.name.removeprefix("step-")) >= 3
    found = started(Pictures(), bad, resume=True)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def _late_sample() -> int:
    """A sample of the fourth batch of the first epoch, which no check looks at before."""
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    probed = {row * 69 // 31 for row in range(32)} | set(range(16))
    return next(int(row) for row in order[48:64] if int(row) not in probed)


# -- the search ----------------------------------------------------------------------------------


def test_the_search_tries_none_one_and_all_cores() -> None:
    machine = Situation(
        device="cpu", cores=6, objective="throughput", batch=32, present=frozenset()
    )
    made = TrainSituation(machine=machine, images=True, fits=False, reads=4)
    plans = [TrainPlan.from_plan(c.plan) for c in train_candidates(made, eager_ms=20.0)]
    assert {plan.workers for plan in plans} == {0, 1, 4, 6}
    assert all(plan.data == "streamed" for plan in plans)
    fitting = replace(made, fits=True, reads=0)
    plans = [TrainPlan.from_plan(c.plan) for c in train_candidates(fitting, eager_ms=20.0)]
    assert {(p.data, p.workers) for p in plans} == {
        *(("resident", 0), ("streamed", 0), ("streamed", 1), ("streamed", 6))
    }
    tensors = replace(made, fits=True, reads=None)
    plans = [TrainPlan.from_plan(c.plan) for c in train_candidates(tensors, eager_ms=20.0)]
    assert {plan.workers for plan in plans} == {0}
    with pytest.raises(BadInputError, match="workers read samples that are streamed"):
        TrainPlan(workers=1, data="resident").checked()


class OfTheProcess(Pictures):
    """What it gives depends on who asks."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture, label = super().__getitem__(index)
        return picture + np.float32(os.getpid() % 97), label


def _trial(folder: Path, pictures: Pictures, plan: TrainPlan) -> TrainHost:
    """A host of a plan for a run on these pictures."""
    made = recipe()
    data = Data(train=pictures, search=samples(30, 2), acceptance=samples(30, 3))  # type: ignore[arg-type]
    made = replace(made, workload=replace(made.workload, data=lambda: data))
    model = starting_point(made, Stream(pictures), 0)
    names = tuple(name for name, _ in model.named_parameters())
    facts = Facts(
        settings=made.settings, seed=0, check_steps=2, total_steps=9, trained=names, streamed=True
    )
    Exchange.write(folder, model, made, Stream(pictures), facts)
    return TrainHost(ref="", exchange=str(folder), recipe=made, plan=codec.to_json(plan))


def test_workers_that_read_otherwise_are_caught_before_a_plan_is_timed(tmp_path: Path) -> None:
    plan = TrainPlan(workers=1, prefetch=1)
    for kind, wrong in ((OfTheProcess, True), (Pictures, False)):
        host = _trial(tmp_path / kind.__name__, kind(), plan)
        assert host._reads_otherwise(plan) == wrong
    check = _trial(tmp_path / "again", OfTheProcess(), plan).check(2.0)
    assert not check["ok"]
    assert "read other samples" in check["reason"]


def test_timed_steps_of_a_trial_read_the_data_set(tmp_path: Path) -> None:
    pictures = Pictures()
    for plan, reads in ((TrainPlan(), True), (TrainPlan(data="resident"), False)):
        host = _trial(tmp_path / plan.data, pictures, plan)
        pictures.reads.clear()
        host.calls(2)
        assert bool(pictures.reads) == reads
        host._close()
        host._setting.__exit__(None, None, None)


# -- folders of pictures --------------------------------------------------------------------------


def _folder(root: Path) -> Path:
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    for name, level in (("cat", 40), ("dog", 200)):
        (root / name).mkdir(parents=True)
        for index in range(20):
            image.new("RGB", (20, 16), (level + index,) * 3).save(root / name / f"{index}.png")
    return root


def test_a_folder_of_pictures_is_decoded_one_by_one(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "pets")
    shape = (3, 16, 16)
    workload = of_module(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), torch.zeros(2, *shape))
    data = with_labelled_data(workload, folder).load()
    parts = [data.train, data.search, data.acceptance]
    assert all(isinstance(part, Stream) for part in parts)
    assert [len(part) for part in parts] == [28, 2, 10]
    assert data.classes == ("cat", "dog")
    old = split(*read_image_folder(folder, side=16), scaling=Scaling())
    for part, other in zip(parts, (old.train, old.search, old.acceptance), strict=True):
        assert torch.equal(part.inputs[0], other.inputs[0])
        assert part.labels is not None and other.labels is not None
        assert torch.equal(part.labels, other.labels)
    files, _ = find_pictures(folder)
    moved = Stream(PictureFolder(files, side=16, transform=lambda x: x + torch.rand(())))
    assert not moved.nature().fixed
    (folder / "dog" / "3.png").write_bytes(b"no picture")
    with pytest.raises(BadInputError, match=r"sample \d+ of the data set: 3.png: a picture cannot"):
        _ = with_labelled_data(workload, folder).load().train.inputs


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_search_takes_workers_where_reading_waits(tmp_path: Path) -> None:
    ref = f"{Path(__file__).with_name('slow_pictures.py')}:recipe"
    options = TrainOptions(out=tmp_path / "run", device="cpu", budget_s=90, epochs=1)
    result = train_workload(ref, options)
    verified = [TrainPlan.from_plan(t.plan) for t in result.trials if t.status == "verified"]
    assert {plan.workers > 0 for plan in verified} == {True, False}
    assert result.plan.workers > 0  # a sample waits 4 ms for its file, in vain only with none
    assert result.speedup is not None
    assert result.speedup.lo95 > 1.0


class Turned(Kind):
    """Arrays whose strides are negative, and a label that is no number."""

    def __init__(self, label: Any = 1) -> None:
        self.label = label

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return np.arange(12.0, dtype=np.float32).reshape(1, 3, 4)[:, :, ::-1], self.label


def test_arrays_that_were_turned_round_are_taken() -> None:
    parts = Stream(Turned()).read(0)
    assert parts[0][0, 0].tolist() == [3.0, 2.0, 1.0, 0.0]
    with pytest.raises(BadInputError, match="sample 0 of the data set is no tensor"):
        Stream(Turned(np.str_("cat"))).read(0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_lie_in_memory_as_the_samples_do(
    channels: int, layout: torch.memory_format
) -> None:
    images = torch.rand(6, channels, 4, 4).contiguous(memory_format=layout)
    rows = torch.tensor([4, 1])
    found = _taken(images, rows)
    assert torch.equal(found, images[rows])
    # strides of one channel are ambiguous, and libraries choose their algorithm by them
    assert found.stride() == images[:2].contiguous(memory_format=layout).stride()
