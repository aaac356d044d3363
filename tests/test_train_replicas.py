"""Several processes learn what one does with the same batches, agree on stopping, and restart."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from suanli.parallel.replicas import Replicas
from suanli.training.checkpoints import newest_whole
from suanli.training.run_folder import read_metrics

REF = f"{Path(__file__).with_name('train_parts.py')}:still_recipe"
ROOT = Path(__file__).parent.parent


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _arguments(out: Path, epochs: int) -> list[str]:
    return [
        *("-m", "suanli.cli", "train", REF, "--plan", "default", "--device", "cpu"),
        *("--epochs", str(epochs), "--checkpoint", "0.3", "-o", str(out)),
    ]


def _launch(count: int, out: Path, epochs: int) -> "subprocess.Popen[bytes]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", str(count), "--max-restarts", "2"]
    return subprocess.Popen(
        [*launcher, *options, *_arguments(out, epochs)],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _finished(process: "subprocess.Popen[bytes]") -> str:
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()[-3000:]
    return said.decode()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_they_learn_what_one_process_does(count: int, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    alone = [sys.executable, *_arguments(one, 3)]
    subprocess.run(alone, env=_environment(), check=True, capture_output=True)
    said = _finished(_launch(count, many, 3))
    assert said.count("accuracy") == 1  # one of them speaks
    losses = [[line["loss"] for line in read_metrics(f / "metrics.jsonl")] for f in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    weights = [load_file(f / "weights.safetensors") for f in (one, many)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_is_killed_and_the_run_ends_with_equal_weights(tmp_path: Path) -> None:
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    _finished(_launch(2, whole, 600))
    process = _launch(2, hurt, 600)
    while newest_whole(hurt / "checkpoints") is None:
        assert process.poll() is None
        time.sleep(0.05)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "suanli.cli" in " ".join(child.cmdline())
    ]
    workers[-1].send_signal(signal.SIGKILL)
    _finished(process)
    one, other = (load_file(f / "weights.safetensors") for f in (whole, hurt))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Replicas.from_environment("cpu")
    assert (alone.rank, alone.world, alone.first) == (0, 1, True)
    assert list(range(7))[alone.share(7)] == list(range(7))
    assert alone.from_first(0.25) == 0.25
    alone.wait()
    alone.close()
    parts = [list(range(7))[Replicas(rank, 3).share(7)] for rank in range(3)]
    assert sorted(row for part in parts for row in part) == list(range(7))
