"""An engine as its user meets it: called, saved, moved, interrupted, and given out."""

import copy
import logging
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from suanli.base.errors import ArtefactError, BadInputError, SuanliError
from suanli.base.hardware import DeviceInfo
from suanli.engines import _fit
from suanli.engines import engine as engines
from suanli.engines.engine import Engine
from suanli.engines.manifest import read_manifest
from suanli.engines.program import Program, capture
from suanli.workloads.record import Inputs
from tests.engine_parts import (
    OTHER,
    PLAN,
    QuickBackend,
    assert_same,
    example,
    expected,
    make_engine,
    make_program,
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return make_program(tmp_path_factory.mktemp("program"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> QuickBackend:
    backend = QuickBackend()
    monkeypatch.setattr(engines, "_backend_table", lambda extra: {"quick": backend})
    return backend


@pytest.fixture
def folder(tmp_path: Path, program: Program) -> Path:
    make_engine(tmp_path / "engine", program, tmp_path)
    return tmp_path / "engine"


# -- calling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 8, 9, 16, 21])
def test_any_batch_is_answered_as_the_model_answers(
    folder: Path, quick: QuickBackend, batch: int
) -> None:
    with Engine.load(folder) as engine:
        assert_same(engine(*example(batch)), expected(batch))
        assert sum(quick.runners[0].batches) == batch
        assert max(quick.runners[0].batches) <= engine.max_batch == 8


def test_arguments_may_come_by_name_and_in_any_order(folder: Path, quick: QuickBackend) -> None:
    x, shift = example(2)
    with Engine.load(folder) as engine:
        assert_same(engine(x, shift=shift), expected(2))
        assert_same(engine(shift=shift, x=x), expected(2))
        with pytest.raises(ArtefactError, match="x, shift"):
            engine(x)
        with pytest.raises(ArtefactError, match="x, shift"):
            engine(x, shift, y=x)
        with pytest.raises(ArtefactError, match="x, shift"):
            engine(x, shift, shift=shift)


class Switch(nn.Module):
    """Keyword tensors, a fixed flag, a None in the result."""

    def forward(
        self, a: torch.Tensor, *, b: torch.Tensor, twice: bool = False
    ) -> tuple[torch.Tensor, None]:
        return (a + 2 * b if twice else a + b), None


def test_fixed_arguments_and_keywords(tmp_path: Path, quick: QuickBackend) -> None:
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    source = capture(
        Switch(),
        Inputs(args=(a,), kwargs={"b": b, "twice": True}),
        folder=tmp_path / "program",
        name="switch",
        max_batch=8,
    )
    make_engine(tmp_path / "engine", source, tmp_path)
    with Engine.load(tmp_path / "engine") as engine:
        for found in (engine(a, twice=True, b=b), engine(b=b, a=a, twice=True)):
            assert found[1] is None
            torch.testing.assert_close(found[0], a + 2 * b)
        with pytest.raises(ArtefactError, match="fixed at True"):
            engine(a, b=b, twice=False)


def test_a_batch_of_no_samples_gives_an_empty_result(folder: Path, quick: QuickBackend) -> None:
    with Engine.load(folder) as engine:
        found = engine(*example(0))
        assert {name: tuple(t.shape) for name, t in found.items()} == {
            "logits": (0, 4),
            "hidden": (0, 8),
        }
        assert not quick.runners[0].batches


def test_inputs_of_any_stride_and_with_gradients_are_taken(
    folder: Path, quick: QuickBackend
) -> None:
    x, shift = example(4)
    strided = torch.empty(6, 4).t().copy_(x).requires_grad_()
    assert not strided.is_contiguous()
    with Engine.load(folder) as engine:
        found = engine(strided, shift)
        assert_same(found, expected(4))
        assert not found["logits"].requires_grad


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, s: (x.double(), s), "x must be float32"),
        (lambda x, s: (x.numpy(), s), "x must be a tensor, not ndarray"),
        (lambda x, s: (x[:, :5], s), r"x must be \[batch, 6\]"),
        (lambda x, s: (x, s[:1]), "shift has 1 samples"),
        (lambda x, s: (x[0], s), r"x must be \[batch, 6\]"),
        (lambda x, s: (x.to_sparse(), s), "dense"),
        (lambda x, s: (x.to("meta"), s), "meta"),
    ],
)
def test_wrong_inputs_are_named(
    folder: Path, quick: QuickBackend, change: Callable[..., Any], match: str
) -> None:
    with Engine.load(folder) as engine, pytest.raises(BadInputError, match=match) as caught:
        engine(*change(*example(2)))
    assert "\n" not in str(caught.value)


def test_each_batch_goes_to_its_variant(
    tmp_path: Path, program: Program, quick: QuickBackend
) -> None:
    ranges = ((PLAN, 1, 2), (OTHER, 3, 8))
    make_engine(tmp_path / "engine", program, tmp_path, ranges=ranges)
    with Engine.load(tmp_path / "engine") as engine:
        assert engine.plans == (PLAN, OTHER)
        for batch in (1, 2, 3, 8, 17):
            assert_same(engine(*example(batch)), expected(batch))
        small, large = quick.runners
        assert (small.batches, large.batches) == ([1, 2, 1], [3, 8, 8, 8])
        assert (small.marker, large.marker) == (PLAN.title, OTHER.title)


class Summed(nn.Module):
    """One output for the whole call."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x.sum()


def test_what_cannot_be_put_together_is_not_taken_apart(
    tmp_path: Path, quick: QuickBackend
) -> None:
    source = capture(
        Summed(),
        Inputs(args=(torch.randn(3, 2),)),
        folder=tmp_path / "program",
        name="summed",
        max_batch=4,
    )
    make_engine(tmp_path / "engine", source, tmp_path, ranges=((PLAN, 1, 4),))
    with Engine.load(tmp_path / "engine") as engine:
        assert engine(torch.ones(4, 2))[1] == 8
        for batch in (0, 5):
            with pytest.raises(BadInputError, match="output1 is one for a whole call"):
                engine(torch.ones(batch, 2))


def test_a_program_of_one_fixed_batch_takes_no_other(tmp_path: Path, quick: QuickBackend) -> None:
    source = make_program(tmp_path / "program", dynamic=False)
    make_engine(tmp_path / "engine", source, tmp_path, ranges=((PLAN, 4, 4),))
    with Engine.load(tmp_path / "engine") as engine:
        assert_same(engine(*example(4)), expected(4))
        for batch in (0, 1, 5, 8):
            with pytest.raises(ArtefactError, match="exactly 4 samples"):
                engine(*example(batch))


def test_checks_are_remembered_but_only_for_what_passed_them(
    folder: Path, quick: QuickBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(folder) as engine:
        assert_same(engine(*example(3)), expected(3))
        batch_of = engine._convention.batch_of
        checks: list[Any] = []

        def counted(flat: Any) -> int:
            checks.append(flat)
            return batch_of(flat)

        monkeypatch.setattr(engine._convention, "batch_of", counted)
        assert_same(engine(*example(3, 1)), expected(3, 1))
        assert not checks
        x, shift = example(3, 2)
        x.requires_grad_(True)
        turned = torch.randn(x.shape[1], x.shape[0]).t()
        answer = engine(x, shift)
        assert_same(answer, expected(3, 2))
        assert not any(value.requires_grad for value in answer.values())
        engine(turned, shift)
        assert len(checks) == 2, "these have to be brought into the form that runners take"
        for wrong in ((x.double(), shift), (x[:, :-1], shift), (x.detach().numpy(), shift), (x,)):
            with pytest.raises((ArtefactError, BadInputError)):
                engine(*wrong)
        assert_same(engine(*example(2)), expected(2))
        assert len(engine._checked) == 2


def test_layer_times_come_from_the_variant(folder: Path, quick: QuickBackend) -> None:
    with Engine.load(folder) as engine:
        assert engine.layer_times(example(2))[0].name == "all"
        with pytest.raises(BadInputError, match="1 to 8 samples"):
            engine.layer_times(example(9))


# -- threads and closing --------------------------------------------------------------------------


@pytest.mark.parametrize("concurrent", [False, True])
def test_threads_get_their_own_answers(folder: Path, quick: QuickBackend, concurrent: bool) -> None:
    quick.concurrent = concurrent
    with Engine.load(folder) as engine, ThreadPoolExecutor(8) as pool:

        def ask(seed: int) -> None:
            batch = 1 + seed % 11
            assert_same(engine(*example(batch, seed)), expected(batch, seed))

        list(pool.map(ask, range(80)))
        runner = quick.runners[0]
        assert (runner.most_inside > 1) == concurrent


def test_closing_waits_for_calls_and_refuses_later_ones(folder: Path, quick: QuickBackend) -> None:
    quick.concurrent = True
    engine = Engine.load(folder)
    runner = quick.runners[0]
    calls = [threading.Thread(target=engine, args=example(8 * 20)) for _ in range(3)]
    for call in calls:
        call.start()
    while runner.inside < len(calls):
        time.sleep(0.001)
    engine.close()
    assert runner.closed
    engine.close()
    for call in calls:
        call.join()
    with pytest.raises(SuanliError, match="closed"):
        engine(*example(1))


def in_a_fork(job: Callable[[], str]) -> str:
    """What `job` says in a forked child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, job().encode())
        finally:
            os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], 30.0)[0], "the child hangs"
        return os.read(reading, 4096).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks there")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_is_told_and_takes_nothing_from_its_parent(
    folder: Path, quick: QuickBackend
) -> None:
    engine = Engine.load(folder, temporary=True)
    engine(*example(3))

    def call_and_close() -> str:
        try:
            engine(*example(3))
        except SuanliError as error:
            engine.close()
            return f"{error}; closed: {quick.runners[0].closed}"
        return "it answered"

    said = in_a_fork(call_and_close)
    assert "does not survive a fork" in said
    assert "suanli.load" in said
    assert "closed: False" in said
    assert folder.exists()
    assert_same(engine(*example(3)), expected(3))
    engine.close()
    assert not folder.exists()


@pytest.mark.parametrize("copy_of", [pickle.dumps, copy.copy, copy.deepcopy])
def test_copies_are_refused_in_plain_words(
    folder: Path, quick: QuickBackend, copy_of: Callable[[Engine], Any]
) -> None:
    with (
        Engine.load(folder) as engine,
        pytest.raises(SuanliError, match="neither pickled nor copied"),
    ):
        copy_of(engine)


# -- other machines -------------------------------------------------------------------------------


def elsewhere(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """This machine becomes another one, after the engine was written."""
    now = _fit.here("cpu")
    environment = replace(now.environment, **changes.pop("environment", {}))
    moved = replace(now, environment=environment, **changes)
    monkeypatch.setattr(engines, "here", lambda name: moved)


def test_here_nothing_differs(
    folder: Path, quick: QuickBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), Engine.load(folder) as engine:
        assert not engine.portable
        assert engine.differences == ()
        assert engine.plan == PLAN
    assert not caplog.records


def libraries(**changes: str | None) -> dict[str, dict[str, str]]:
    merged = {**_fit.here("cpu").environment.libraries, **changes}
    return {"libraries": {name: version for name, version in merged.items() if version}}


@pytest.mark.parametrize(
    ("packages", "changes", "match"),
    [
        ((), {"hardware": "another"}, "it was built for"),
        ((), {"device": None, "hardware": ""}, "there is no cpu here"),
        ((), {"environment": {"os": "Plan9 amd64"}}, "it was built on"),
        ((), {"environment": libraries(torch="3.1.0")}, "with torch .* here it is 3.1.0"),
        (("torch",), {"environment": libraries(torch="2.1.0")}, "here it is 2.1.0"),
        (("numpy",), {"environment": libraries(numpy=None)}, "numpy .* here it is absent"),
    ],
)
def test_on_another_machine_the_portable_plan_answers_and_it_is_said(
    folder: Path,
    quick: QuickBackend,
    monkeypatch: pytest.MonkeyPatch,
    packages: tuple[str, ...],
    changes: dict[str, Any],
    match: str,
) -> None:
    quick.spec = replace(quick.spec, packages=packages)
    elsewhere(monkeypatch, **changes)
    said: list[str] = []
    with Engine.load(folder, on_warning=said.append) as engine:
        assert engine.portable
        assert engine.plan == engines.PORTABLE_PLAN
        assert not quick.runners
        for batch in (1, 11):
            assert_same(engine(*example(batch)), expected(batch))
    assert len(said) == 1
    assert "rebuild" in said[0]
    import re

    assert re.search(match, said[0])
    assert any(re.search(match, line) for line in engine.differences)


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": {"cores": 999}},
        {"environment": libraries(scikit_learn="9.9")},
        {"environment": {"python": "3.99"}},
        {"device": DeviceInfo(name="cpu", title="more", fingerprint="x", memory_bytes=1)},
    ],
)
def test_small_differences_are_said_and_the_plan_stays(
    folder: Path,
    quick: QuickBackend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    elsewhere(monkeypatch, **changes)
    with Engine.load(folder) as engine:
        assert not engine.portable
        assert len(engine.differences) == 1
    assert "measured elsewhere" in caplog.text


def test_a_patch_release_keeps_the_plan() -> None:
    assert _fit._release("2.13.0+cpu") == _fit._release("2.13.4")
    assert _fit._release("2.13.0") != _fit._release("2.12.0")
    assert _fit._release("2026.4.1") != _fit._release(None)


def test_the_hardware_fingerprint_follows_what_the_processor_can_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, cpu = _fit.hardware_fingerprint("cpu"), _fit.cpu_info()
    monkeypatch.setattr(_fit, "cpu_info", lambda: replace(cpu, usable_cores=77, memory_bytes=1))
    assert _fit.hardware_fingerprint("cpu") == mine
    monkeypatch.setattr(_fit, "cpu_info", lambda: replace(cpu, features=cpu.features[1:]))
    assert _fit.hardware_fingerprint("cpu") != mine


def test_without_the_backend_the_portable_plan_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_backend_table", lambda extra: {})
    said: list[str] = []
    with Engine.load(folder, on_warning=said.append) as engine:
        assert engine.portable
        assert_same(engine(*example(3)), expected(3))
    assert "backend quick is not installed" in said[0]


def test_only_the_variant_that_cannot_load_falls_back(
    tmp_path: Path, program: Program, quick: QuickBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges = ((PLAN, 1, 2), (OTHER, 3, 8))
    make_engine(tmp_path / "engine", program, tmp_path, ranges=ranges)
    real = quick.load

    def load(program: Program, plan: Any, folder: Path) -> Any:
        if plan == PLAN:
            raise RuntimeError("first line\nsecond line")
        return real(program, plan, folder)

    monkeypatch.setattr(quick, "load", load)
    said: list[str] = []
    with Engine.load(tmp_path / "engine", on_warning=said.append) as engine:
        assert engine.portable
        assert engine.plans == (engines.PORTABLE_PLAN, OTHER)
        for batch in (1, 5):
            assert_same(engine(*example(batch)), expected(batch))
    assert said[0].count("\n") == 0
    assert "first line" in said[0]


def test_the_choice_can_be_forced(
    folder: Path, quick: QuickBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(folder, portable=True) as engine:
        assert engine.portable
    elsewhere(monkeypatch, hardware="another")
    with Engine.load(folder, portable=False) as engine:
        assert not engine.portable


def test_a_program_swapped_for_another_is_found_even_when_sealed(
    tmp_path: Path, folder: Path, quick: QuickBackend
) -> None:
    from suanli.engines import signing
    from suanli.engines.manifest import seal

    other = make_program(tmp_path / "other", max_batch=7)
    (folder / "program/meta.json").unlink()
    (folder / "program/meta.json").write_bytes((other.folder / "meta.json").read_bytes())
    manifest, _ = read_manifest(folder)
    seal(folder, manifest, signing.own_key())
    with pytest.raises(ArtefactError, match="not the one of its manifest"):
        Engine.load(folder)
