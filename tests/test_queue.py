"""`suanli queue`: what is kept, which device a job gets, and what interrupted runs become."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from suanli import api_queue
from suanli.base import schema
from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.events import Event
from suanli.base.queue_results import Job, Need
from suanli.cli import app
from suanli.jobs import command, estimate
from suanli.jobs.cluster import line_for
from suanli.jobs.place import Place, next_start, why_nowhere, why_waits
from suanli.jobs.runner import Runner
from suanli.jobs.store import JobStore
from suanli.training.stopping import StopRequests

CPU = Place(device="cpu", memory_bytes=16 * 10**9, free_bytes=12 * 10**9)
GPU = Place(device="cuda:0", memory_bytes=80 * 10**9, free_bytes=70 * 10**9)
ROOT = Path(__file__).parent.parent


def job(*words: str, number: int = 1, **changes: Any) -> Job:
    return Job(id=number, command=words or ("train", "digits-resnet"), folder="/", **changes)


def needs(**seconds: float | None) -> tuple[Need, ...]:
    return tuple(Need(device=d.replace("_", ":"), seconds=s) for d, s in seconds.items())


@pytest.fixture(autouse=True)
def own_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUANLI_CONFIG", str(tmp_path / "config"))


# -- the store ----------------------------------------------------------------------------------


def test_jobs_outlive_the_process(tmp_path: Path) -> None:
    first = JobStore(tmp_path).add(job("train", "digits-resnet", needs=needs(cpu=3.0)))
    again = JobStore(tmp_path)
    assert again.all() == (first,)
    assert first.command == ("train", "digits-resnet", "-o", "runs/digits-resnet-job1")
    assert first.out == "runs/digits-resnet-job1"
    assert again.add(job("optimize", "resnet50")).command == ("optimize", "resnet50")
    again.remove(1)
    assert [j.id for j in again.all()] == [2]
    assert again.add(job()).id == 3  # numbers are not given twice
    with pytest.raises(BadInputError, match="no job 1"):
        again.get(1)


def test_two_jobs_may_not_write_to_one_folder(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.add(job("train", "digits-resnet", "-o", "here", out="here"))
    with pytest.raises(BadInputError, match="job 1 already writes to here"):
        store.add(job("train", "mnist-cnn", "-o", "here", out="here"))


def test_a_device_is_claimed_once(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    for _ in range(3):
        store.add(job())
    won: list[int] = []

    def claim(number: int) -> None:
        if JobStore(tmp_path).claim(number, "cpu") is not None:
            won.append(number)

    threads = [threading.Thread(target=claim, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get(won[0]).state == "running"
    with pytest.raises(BadInputError, match="runs"):
        store.remove(won[0])


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "queue.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(ArtefactError, match="cannot be used"):
        JobStore(tmp_path).all()


# -- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "not nothing"),
        (("doctor",), "not 'doctor'"),
        (("train",), "names its workload"),
        (("train", "x", "--device", "cpu"), "places a job"),
        (("train", "x", "--resume"), "resumes a run itself"),
    ],
)
def test_what_cannot_be_queued(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadInputError, match=said):
        command.checked(words)


def test_a_run_that_was_begun_is_resumed(tmp_path: Path) -> None:
    words = ("train", "x", "-o", "out")
    assert command.to_start(words, tmp_path, "cpu") == (*words, "--device", "cpu")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").touch()
    assert command.to_start(words, tmp_path, "cpu")[-1] == "--resume"


def test_a_folder_of_its_own_is_a_free_one(tmp_path: Path) -> None:
    attached = ("train", "a", "-omine")
    assert command.with_out(attached, 3, tmp_path) == attached
    assert command.out_of(attached) == "mine"
    words = command.with_out(("train", "a"), 3, tmp_path)
    assert words == ("train", "a", "-o", "runs/a-job3")
    (tmp_path / "runs/a-job3").mkdir(parents=True)  # of an earlier queue, whose file was removed
    assert command.with_out(("train", "a"), 3, tmp_path)[-1] == "runs/a-job3-2"
    assert command.about(("train", "a", "-omine", "--epochs", "3")) == command.about(
        ("train", "a", "-o", "other", "--epochs", "3")
    )


def test_needs_that_are_no_numbers_are_refused() -> None:
    for value in (float("inf"), float("nan"), -1.0):
        with pytest.raises(BadInputError, match="--memory"):
            api_queue.add(("train", "digits-resnet"), memory_gb=value, seconds=1.0)


def test_jobs_that_differ_in_folder_and_seed_need_the_same() -> None:
    one = command.about(("train", "x", "-o", "a", "--seed", "1", "--epochs", "2"))
    assert one == command.about(("train", "x", "--epochs", "2", "--out=b", "--fresh"))
    assert one != command.about(("train", "x", "--epochs", "3"))


# -- placement ----------------------------------------------------------------------------------


def test_a_job_goes_where_it_ends_first() -> None:
    both = job(needs=needs(cpu=100.0, cuda_0=10.0))
    start = next_start([both], [CPU, GPU], {})
    assert start is not None and start.device == "cuda:0"
    # the GPU is free in 50 s: waiting for it is faster than the CPU now
    assert next_start([both], [CPU, GPU], {"cuda:0": 50.0}) is None
    start = next_start([both], [CPU, GPU], {"cuda:0": 95.0})
    assert start is not None and start.device == "cpu"
    # nobody knows how long the GPU is busy
    start = next_start([both], [CPU, GPU], {"cuda:0": None})
    assert start is not None and start.device == "cpu"


def test_a_job_that_waits_does_not_hold_up_the_others() -> None:
    waits = job(number=1, needs=needs(cpu=100.0, cuda_0=10.0))
    small = job(number=2, needs=needs(cpu=5.0, cuda_0=4.0))
    start = next_start([waits, small], [CPU, GPU], {"cuda:0": 20.0})
    assert start is not None and (start.job.id, start.device) == (2, "cpu")


def test_without_times_a_free_gpu_comes_first() -> None:
    start = next_start([job()], [CPU, GPU], {})
    assert start is not None and start.device == "cuda:0"
    start = next_start([job()], [CPU, GPU], {"cuda:0": None})
    assert start is not None and start.device == "cpu"
    assert next_start([job()], [CPU, GPU], {"cuda:0": None, "cpu": None}) is None


def test_memory_decides_where_a_job_fits() -> None:
    large = job(
        needs=(
            Need(device="cpu", memory_bytes=20 * 10**9, seconds=1.0),
            Need(device="cuda:0", memory_bytes=75 * 10**9, seconds=9.0),
        )
    )
    assert next_start([large], [CPU, GPU], {}) is None  # the card has not that much free now
    start = next_start([large], [CPU, replace(GPU, free_bytes=76 * 10**9)], {})
    assert start is not None and start.device == "cuda:0"
    assert why_nowhere(large, [CPU, GPU]) == ""
    assert why_nowhere(large, [CPU]) == "needs 20.0 GB, cpu has 16.0 GB"
    assert why_nowhere(job(wanted="cuda:0"), [CPU]) == "cuda:0 was asked for"


def test_a_job_that_waits_for_memory_of_others_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = job(needs=(Need(device="cpu", memory_bytes=14 * 10**9),), wanted="cpu")
    words = "it waits for memory that others hold: cpu has 12.0 GB free of the 14.0 GB it needs"
    assert why_waits(large, [CPU, GPU], ()) == words
    # a job of the queue's own will end, and what fits nowhere does not wait
    assert why_waits(large, [CPU, GPU], {"cpu"}) == ""
    assert why_waits(large, [replace(CPU, free_bytes=15 * 10**9)], ()) == ""
    assert why_waits(replace(large, wanted="cuda:1"), [CPU, GPU], ()) == ""
    monkeypatch.setattr(estimate, "places", lambda: [CPU])
    made = JobStore().add(large)
    assert [j.reason for j in api_queue.listed().jobs] == [words]
    assert JobStore().get(made.id).reason == ""  # it is so now, and is not kept
    said: list[Event] = []
    free = [CPU]
    work = Runner(JobStore(), lambda: free, said.append, program=(sys.executable, "-c", ""))
    for _ in range(2):
        assert not work._start_one()
    assert [event.text for event in said] == [f"job {made.id}: {words}"]


def test_needs_are_predicted_or_taken_from_a_job_like_it() -> None:
    asked = job("train", "digits-resnet", "--epochs", "2", "--seed", "4")
    done = replace(asked, id=7, state="done", device="cpu", spent_s=12.5, peak_bytes=10**9)
    (need,) = estimate.needs_of(asked, [CPU], [done])
    assert (need.source, need.seconds, need.memory_bytes) == ("measured", 12.5, 10**9)
    other = job("train", "digits-resnet", "--epochs", "3", "--max-seconds", "5")
    (need,) = estimate.needs_of(other, [CPU], [done])
    assert need.source in ("predicted", "unknown")  # unknown where no ceilings were measured
    assert need.seconds is not None and need.seconds <= 5.0
    with pytest.raises(BadInputError):
        estimate.needs_of(job("train", "no-such-thing"), [CPU], [])
    (need,) = estimate.needs_of(job("optimize", "resnet50", "--budget", "60"), [CPU], [])
    assert need.seconds == pytest.approx(78.0)


# -- running ------------------------------------------------------------------------------------

PROGRAM = """
import os, pathlib, signal, sys, time
words = sys.argv[1:]
kind, out = words[1], pathlib.Path(words[words.index("-o") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "run.json").touch()
with (out / "starts.txt").open("a") as file:
    file.write(" ".join(words) + "\\n")
def save(*_):
    (out / "saved").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, save)
if kind == "crash" and len((out / "starts.txt").read_text().splitlines()) < 2:
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "wrong":
    print("suanli: no such thing", file=sys.stderr); sys.exit(2)
if kind == "long" and "--resume" not in words:
    (out / "ready").touch()
    time.sleep(60)
(out / "span.txt").write_text(f"{time.time()} ")
time.sleep(0.3)
with (out / "span.txt").open("a") as file:
    file.write(str(time.time()))
"""


def runner(tmp_path: Path, places: list[Place], events: list[Event]) -> tuple[JobStore, Runner]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    store = JobStore(tmp_path / "queue")
    program = (sys.executable, str(script))
    return store, Runner(store, lambda: places, events.append, program=program)


def queued(store: JobStore, tmp_path: Path, kind: str, **changes: Any) -> Job:
    made = Job(id=0, command=("train", kind), folder=str(tmp_path), **changes)
    return store.add(made)


def test_one_at_a_time_on_each_device(tmp_path: Path) -> None:
    store, work = runner(tmp_path, [CPU, GPU], [])
    for device in ("cpu", "cpu", "cuda:0"):
        queued(store, tmp_path, "short", wanted=device)
    assert work.run(StopRequests()) is False
    jobs = store.all()
    assert [j.state for j in jobs] == ["done"] * 3
    assert [j.device for j in jobs] == ["cpu", "cpu", "cuda:0"]
    assert all(j.exit_code == 0 and j.spent_s > 0.3 and j.peak_bytes for j in jobs)
    spans = [tuple(map(float, (tmp_path / j.out / "span.txt").read_text().split())) for j in jobs]
    assert spans[0][1] < spans[1][0]  # one after the other on the CPU
    said = (tmp_path / jobs[2].out / "starts.txt").read_text().split()
    assert said[-2:] == ["--device", "cuda:0"]


def test_a_crash_is_tried_again_and_resumed_but_not_for_ever(tmp_path: Path) -> None:
    events: list[Event] = []
    store, work = runner(tmp_path, [CPU], events)
    for kind in ("crash", "dies", "wrong"):
        queued(store, tmp_path, kind)
    work.run(StopRequests())
    crash, dies, wrong = store.all()
    assert (crash.state, crash.starts, crash.crashes) == ("done", 2, 1)
    starts = (tmp_path / crash.out / "starts.txt").read_text().splitlines()
    assert "--resume" not in starts[0] and starts[1].endswith("--resume")
    assert (dies.state, dies.starts, dies.reason) == ("failed", 3, "signal 9 ended it")
    assert (wrong.state, wrong.starts) == ("failed", 1)
    assert wrong.reason == "exit code 2: no such thing"
    assert any("job 3 failed: exit code 2" in event.text for event in events)


def test_stopping_saves_and_the_next_call_goes_on(tmp_path: Path) -> None:
    store, work = runner(tmp_path, [CPU], [])
    made = queued(store, tmp_path, "long")
    stop = StopRequests()

    def ask() -> None:
        while not (tmp_path / made.out / "ready").exists():
            time.sleep(0.02)
        stop.ask()

    thread = threading.Thread(target=ask)
    thread.start()
    assert work.run(stop) is True
    thread.join()
    assert (tmp_path / made.out / "saved").exists()
    stopped = store.get(made.id)
    assert (stopped.state, stopped.device, stopped.reason) == ("waiting", "", "it was stopped")
    again = Runner(store, lambda: [CPU], lambda _: None, program=work._program)
    assert again.run(StopRequests()) is False
    assert store.get(made.id).state == "done"


def test_a_job_whose_queue_was_killed_is_waited_for_and_gone_on_with(tmp_path: Path) -> None:
    store, work = runner(tmp_path, [CPU], [])
    made = queued(store, tmp_path, "short")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.6)"])
    store.claim(made.id, "cpu")
    from suanli.jobs.runner import _born

    store.change(made.id, lambda j: replace(j, pid=child.pid, born=_born(child.pid)))
    reaper = threading.Thread(target=child.wait)
    reaper.start()
    work.run(StopRequests())
    reaper.join()
    ended = store.get(made.id)
    assert (ended.state, ended.starts) == ("done", 2)


def test_a_job_that_fits_nowhere_fails(tmp_path: Path) -> None:
    store, work = runner(tmp_path, [CPU], [])
    made = queued(store, tmp_path, "short", wanted="cuda:3")
    work.run(StopRequests())
    assert store.get(made.id).state == "failed"
    assert store.get(made.id).reason == "cuda:3 was asked for"


# -- clusters -----------------------------------------------------------------------------------


def test_the_line_for_slurm() -> None:
    host = Need(device="cpu", memory_bytes=2**30, seconds=9000.0)
    need = Need(device="cuda:0", memory_bytes=2**33, seconds=600.0)  # of the GPU's memory
    made = job("train", "a b", "-o", "out", out="out", needs=(host, need))
    line = line_for("slurm", made)
    for part in ("sbatch", "--gres=gpu:1", "--mem=1280M", "--time=21", "--requeue", "B:TERM@60"):
        assert part in line
    assert "--resume" in line and "exec suanli train" in line
    assert "--gres" not in line_for("slurm", replace(made, wanted="cpu"))
    with pytest.raises(BadInputError, match="slurm, kubernetes"):
        line_for("lsf", made)


def test_the_lines_for_kubernetes() -> None:
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    need = Need(device="cpu", memory_bytes=2**30)
    made = job("train", "it's", "-o", "out", out="out", needs=(need,))
    data = yaml.safe_load(line_for("kubernetes", made))
    (container,) = data["spec"]["template"]["spec"]["containers"]
    assert data["kind"] == "Job" and data["metadata"]["name"] == "suanli-out"
    assert container["resources"]["limits"] == {"memory": "1280Mi", "nvidia.com/gpu": 1}
    # what the shell is given starts the run, and goes on with one that was begun
    shell = container["command"][2].replace("exec suanli", "echo")
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["train", "it's", "-o", "out"]


def test_names_are_what_kubernetes_takes() -> None:
    for out in ("跑/模型 1", "Ünï_code", "-", "a" * 90):
        line = line_for("kubernetes", job("train", "a", "-o", out, out=out))
        (name,) = re.findall(r"metadata: {name: (.*)}", line)
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name), name


# -- the command line ---------------------------------------------------------------------------


def call(*words: str) -> Any:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    limits = ("--memory", "1", "--time", "9")
    words = ("train", "digits-resnet", "--epochs", "1", "-o", "mine")
    data = json.loads(call("queue", "add", "--json", *limits, *words).stdout)
    jsonschema.validate(data, json.loads(schema.text("queue")))
    (made,) = data["jobs"]
    assert made["command"] == list(words)
    assert made["needs"][0]["seconds"] == 9.0
    listed = call("queue", "list").stdout
    assert "waiting" in listed and "train digits-resnet" in listed
    assert "sbatch" in call("queue", "add", "--print", "slurm", *limits, *words).stdout
    call("queue", "remove", "1")
    assert "No jobs" in call("queue", "list").stdout


def test_a_folder_with_a_finished_run_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, limits = ("train", "digits-resnet", "-o", "mine"), {"memory_gb": 1.0, "seconds": 9.0}
    for interrupted, noted in ((True, False), (False, True)):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "result.json").write_text(json.dumps({"interrupted": interrupted}))
        (made,) = api_queue.add(words, **limits).jobs  # type: ignore[arg-type]
        assert ("holds a run that has ended" in made.reason) == noted
        api_queue.remove(made.id)


def test_options_of_the_verb_are_looked_at_at_once() -> None:
    result = CliRunner().invoke(app, ["queue", "add", "train", "digits-resnet", "--epoch", "1"])
    assert result.exit_code == 2
    assert not JobStore().all()


@pytest.mark.slow
def test_a_real_run_is_stopped_and_gone_on_with(tmp_path: Path) -> None:
    def suanli(*words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "suanli", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )

    words = ["--memory", "1", "--time", "60", "train", "digits-resnet", "--plan", "default"]
    assert suanli("queue", "add", *words, "--epochs", "3", "-o", "out").wait() == 0
    first = suanli("queue", "run")
    metrics = tmp_path / "out" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 130
    second = suanli("queue", "run", "--json")
    said, _ = second.communicate(timeout=300)
    (done,) = json.loads(said)["jobs"]
    assert (done["state"], done["starts"]) == ("done", 2)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["resumed_from"] > 0 and result["stopped"] == "epochs"
