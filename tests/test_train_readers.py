"""The processes that read a data set: what a bad sample, a crash, a hang and a signal do."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from suanli.base import codec
from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.checkpoints import newest_whole
from suanli.training.checks import check_samples
from suanli.training.readers import Readers, ReadingError
from suanli.training.stopping import StopRequests
from suanli.workloads.stream import Stream
from tests.stream_parts import STREAMED, Broken, Pictures, Stuck, taken
from tests.train_parts import make_model, new_loop, recipe


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "sample 17 of the data set cannot be read: OSError: image file is truncated$"),
        ("nan", "sample 17 of the data set holds NaN"),
        ("label", "label 7 of sample 17 .* classes 0 to 2"),
        ("shape", r"sample 17 .* holds float32 \[1, 4, 8\], another float32 \[1, 8, 8\]"),
        ("dtype", r"sample 17 .* holds float64"),
        ("object", "sample 17 of the data set holds a object"),
        ("dict", r"sample 17 of the data set is a dict \(it has to be"),
        ("more", "sample 17 of the data set has 3 parts"),
    ],
)
def test_a_bad_sample_is_one_line_with_its_index(how: str, words: str, workers: int) -> None:
    # the part's own places are others than the data set's
    train = Stream(Broken(how, noise=False)).part(torch.arange(69, -1, -1))
    checked = check_samples(make_model(), recipe(), train)
    with pytest.raises(BadInputError, match=words) as caught:
        taken(checked, STREAMED.with_(workers=workers, prefetch=workers), 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("how", "words"), [("killed", "SIGKILL"), ("exit", "code 3")])
def test_a_worker_that_ends_is_one_line_with_the_sample(how: str, words: str) -> None:
    with pytest.raises(ReadingError, match=rf"{words}, at sample 17 \(.*fewer") as caught:
        taken(Stream(Broken(how)), STREAMED.with_(workers=2, prefetch=2), 3)
    assert "\n" not in str(caught.value)


def test_signals_to_the_group_do_not_end_the_workers() -> None:
    readers = Readers(Stream(Pictures()), size=8, workers=2, ahead=1)
    readers.ask(0, torch.arange(8))
    readers.take()
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    readers.ask(0, torch.arange(8))
    assert len(readers.take()) == 8
    readers.close()


def test_a_sample_that_never_comes_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import suanli.training.loop as module

    monkeypatch.setattr(module, "_LONGEST_WAIT_S", 0.0)
    loop = new_loop(recipe(), STREAMED.with_(workers=1, prefetch=1), train=Stream(Stuck()))
    stop = StopRequests()
    loop._over = lambda: ""  # type: ignore[method-assign]  # the request comes while it waits
    asking = threading.Timer(0.3, stop.ask)
    asking.start()
    with pytest.raises(ReadingError, match="sample 17 of the data set is still not read"):
        loop.run(stop)
    asking.join()


def test_at_the_interpreter_s_end_workers_end_too() -> None:
    code = (
        "import torch\n"
        "from suanli.training.readers import Readers\n"
        "from suanli.workloads.stream import Stream\n"
        "from tests.stream_parts import Pictures\n"
        "readers = Readers(Stream(Pictures()), size=8, workers=1)\n"
        "readers.ask(0, torch.arange(8))\n"
        "print(readers._workers[0].process.pid)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root,
        timeout=100, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert not psutil.pid_exists(int(done.stdout))


@pytest.mark.slow
def test_workers_that_are_spawned_read_the_same() -> None:
    found = []
    for method in ("fork", "spawn"):
        readers = Readers(Stream(Pictures()), size=8, seed=2, workers=2, method=method)
        readers.ask(1, torch.arange(8))
        found.append(readers.take())
        readers.close()
    assert torch.equal(found[0].inputs[0], found[1].inputs[0])


@pytest.mark.slow
def test_a_run_with_workers_is_stopped_as_a_group_killed_and_gone_on_with(tmp_path: Path) -> None:
    plan, whole, out = tmp_path / "plan.json", tmp_path / "whole", tmp_path / "run"
    plan.write_text(codec.dumps(TrainPlan(workers=2, prefetch=2)))
    root, ref = Path(__file__).parent.parent, f"{Path(__file__).with_name('slow_pictures.py')}"
    words = [sys.executable, "-m", "suanli.cli", "train", f"{ref}:recipe", "--epochs", "3"]
    words += ["--plan", str(plan), "--checkpoint", "0.05", "--device", "cpu", "-o"]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for number in (signal.SIGTERM, signal.SIGKILL):
        resume = ["--resume"] if out.exists() else []
        process = subprocess.Popen(
            [*words, str(out), *resume], env=env, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        seen = newest_whole(out / "checkpoints")
        while newest_whole(out / "checkpoints") == seen:
            assert process.poll() is None
            time.sleep(0.02)
        readers = psutil.Process(process.pid).children()
        assert len(readers) == 2
        if number == signal.SIGTERM:  # as a scheduler does: to all of them
            os.killpg(process.pid, number)
        else:
            process.kill()
        assert process.wait(30) == (130 if number == signal.SIGTERM else -9)
        _, left = psutil.wait_procs(readers, timeout=10)
        assert not left
    for place, more in ((out, ["--resume"]), (whole, [])):
        subprocess.run([*words, str(place), *more], env=env, check=True, capture_output=True)
    one, other = (load_file(place / "weights.safetensors") for place in (out, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
