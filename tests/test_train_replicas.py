"""Several processes learn what one does with the same batches, agree on stopping, and restart.

All of it twice: with the whole model in each process, and with a share of it in each.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from suanli.base import codec
from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainResult
from suanli.parallel.replicas import Replicas
from suanli.training.calls import TrainOptions, train_workload
from suanli.training.checkpoints import newest_whole
from suanli.training.forward import Forward
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


def _launch(count: int, out: Path, epochs: int, *more: str) -> "subprocess.Popen[bytes]":
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = ["--nproc-per-node", str(count), "--max-restarts", "2"]
    return subprocess.Popen(
        [*launcher, *options, *_arguments(out, epochs), *more],
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _finished(process: "subprocess.Popen[bytes]") -> str:
    said, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors.decode()[-3000:]
    return said.decode()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, *_arguments(out, 3)]
    subprocess.run(command, env=_environment(), check=True, capture_output=True)
    return out


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("count", "more"),
    [
        (2, ()),
        pytest.param(4, (), marks=slow),
        pytest.param(2, ("--sharded",), marks=slow),
        pytest.param(4, ("--sharded",), marks=slow),
    ],
)
def test_they_learn_what_one_process_does(
    count: int, more: tuple[str, ...], alone: Path, tmp_path: Path
) -> None:
    one, many = alone, tmp_path / "many"
    said = _finished(_launch(count, many, 3, *more))
    assert said.count("accuracy") == 1  # one of them speaks
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (one, many)]
    # at the ends of epochs; a busy machine reports between them as well
    losses = [[line["loss"] for line in kept if line["step"] % 7 == 0] for kept in lines]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    weights = [load_file(f / "weights.safetensors") for f in (one, many)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("count", "more", "epochs"), [(2, (), 600), (4, (), 150), (2, ("--sharded",), 150)]
)
def test_one_is_killed_and_the_run_ends_with_equal_weights(
    count: int, more: tuple[str, ...], epochs: int, tmp_path: Path
) -> None:
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    _finished(_launch(count, whole, epochs, *more))
    process = _launch(count, hurt, epochs, *more)
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


def test_processes_that_are_started_again_do_not_call_the_dead_ones() -> None:
    """The store outlives them, and one that comes early must wait for the other's new address."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start in range(2):
        found = [_joining(rank, start, store.port) for rank in range(2)]
        try:
            for process in found:
                said, errors = process.communicate(timeout=60)
                assert said == b"joined", errors.decode()[-2000:]
        finally:
            for process in found:
                process.kill()
                process.wait()


def _joining(rank: int, start: int, port: int) -> "subprocess.Popen[bytes]":
    """One of two processes as torchrun starts them; the second comes late and both end at once."""
    script = (
        "import os, time; from suanli.parallel.replicas import Replicas\n"
        f"time.sleep({2 * rank}); Replicas.from_environment('cpu').wait()\n"
        "os.write(1, b'joined'); os._exit(0)"
    )
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": start}
    given = {**own, **more, "TORCHELASTIC_USE_AGENT_STORE": True}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**_environment(), **{name: str(value) for name, value in given.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shares_load_in_another_number_of_processes(tmp_path: Path) -> None:
    four, two, one = (tmp_path / name for name in ("four", "two", "one"))
    _finished(_launch(4, four, 1, "--sharded"))
    newest = newest_whole(four / "checkpoints")
    assert newest is not None
    files = {file.suffix for file in newest.iterdir()}
    assert files == {".safetensors", ".json"}  # nothing that would have to be unpickled
    assert len(list(newest.glob("shard-*"))) == 4
    for place in (two, one):
        shutil.copytree(four, place)
    _finished(_launch(2, two, 3, "--resume"))
    command = [sys.executable, *_arguments(one, 3), "--resume"]
    subprocess.run(command, env=_environment(), check=True, capture_output=True)
    losses = [[line["loss"] for line in read_metrics(f / "metrics.jsonl")] for f in (two, one)]
    assert len(losses[0]) >= 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    weights = [load_file(f / "weights.safetensors") for f in (two, one)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_share_that_is_nan_is_in_no_checkpoint(tmp_path: Path) -> None:
    out, script = tmp_path / "run", Path(__file__).with_name("sharded_nan.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(script), str(out)],
        env=_environment(), capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert done.stdout.count("ended") == 2
    newest = newest_whole(out / "checkpoints")
    assert newest is not None
    assert newest.name == "step-000000006"  # of seven


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("micro_batch", [0, 2, 4, 5, 16])
@pytest.mark.parametrize("count", [10, 3])
def test_parts_add_up_to_the_batch_however_it_is_cut(
    micro_batch: int, count: int, reduction: str
) -> None:
    def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output, labels, reduction=reduction)

    def of(plan: TrainPlan, parts: list[slice]) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        forward = Forward(model, loss, plan)
        losses = [forward.gradients((x[rows],), y[rows], 1.0, y) for rows in parts]
        assert model.weight.grad is not None
        return torch.stack(losses).sum(), model.weight.grad

    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 4, generator=draw), torch.randint(3, (count,), generator=draw)
    model = nn.Linear(4, 3)
    whole = of(TrainPlan(), [slice(None)])
    plan = TrainPlan(micro_batch=micro_batch)
    torch.testing.assert_close(of(plan, [Replicas(rank, 2).share(count) for rank in (0, 1)]), whole)
    forward = Forward(model, loss, plan)
    torch.testing.assert_close(forward.gradients((x,), y), whole[0])


def test_a_sharded_run_needs_processes_and_a_plan_that_allows_it(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="needs several processes"):
        train_workload(REF, TrainOptions(out=tmp_path / "run", sharded=True, device="cpu"))
    with pytest.raises(BadInputError, match="channels_last, kernels of our own"):
        TrainPlan(
            sharded=True, precision="bf16", memory_layout="channels_last", kernels=("fused-cnn",)
        ).checked()


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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_searches_and_all_train_with_its_plan(tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*("-m", "suanli.cli", "train", REF, "--budget", "40", "--device", "cpu")]
    environment = {**_environment(), "SUANLI_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", *command, "--epochs", "2", "-o", str(out)],
        env=environment,
        capture_output=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    result = codec.read(TrainResult, out / "result.json")
    tried = [trial for trial in result.trials if trial.status == "verified"]
    assert tried and all(trial.batch == 17 for trial in tried)  # a half of 33
    assert result.plan.as_plan().key in {trial.plan.key for trial in tried}
    assert result.steps > 0
