"""Isolation: every way in which a worker can fail becomes a reason, and nothing survives it."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from suanli.base.errors import (
    BadInputError,
    CaptureError,
    MissingBackendError,
    TrialFailedError,
)
from suanli.measure.isolation import Worker, call_isolated, report_progress
from suanli.measure.timing import Contender, race
from tests.processes import gone, stopped

_TESTS = str(Path(__file__).parent)
_ROOT = str(Path(__file__).parent.parent)


@pytest.fixture(autouse=True)
def _targets_on_path(monkeypatch):
    monkeypatch.syspath_prepend(_TESTS)


def _failure(method: str, *, timeout_s: float = 20.0, **args) -> TrialFailedError:
    with pytest.raises(TrialFailedError) as caught:
        call_isolated("isolation_targets:Misbehaving", {}, method, timeout_s=timeout_s, **args)
    assert "\n" not in str(caught.value)
    return caught.value


def test_an_object_keeps_its_state_between_calls():
    with Worker("isolation_targets:Plain", {"start": 2}) as worker:
        assert worker.call("add", amount=3, timeout_s=20) == 5
        assert worker.call("add", amount=1, timeout_s=20) == 6
        assert worker.pid != os.getpid()
        assert worker.call("pid", timeout_s=20) == worker.pid
        assert worker.peak_bytes > 1 << 20
        pid = worker.pid
    assert gone(pid)
    assert not worker.alive
    worker.close()
    with pytest.raises(TrialFailedError, match="closed"):
        worker.call("add", amount=1, timeout_s=20)


def test_exit_functions_run_when_it_is_closed(tmp_path):
    with Worker("isolation_targets:Plain", {}) as worker:
        worker.call("write_at_exit", path=str(tmp_path / "note"), timeout_s=20)
        assert not (tmp_path / "note").exists()
    assert (tmp_path / "note").read_text() == "left"


def test_the_far_side_is_a_fresh_interpreter_with_this_path_and_environment():
    with Worker("isolation_targets:Plain", {}, env={"SUANLI_TEST_MARK": "7"}) as worker:
        assert worker.call("path", timeout_s=20) == sys.path
        assert worker.call("environment", name="SUANLI_TEST_MARK", timeout_s=20) == "7"
        assert os.getsid(worker.pid) != os.getsid(0)
    assert "SUANLI_TEST_MARK" not in os.environ


def test_messages_larger_than_any_pipe_pass_both_ways():
    text = "算力" * (3 << 20)
    with Worker("isolation_targets:Plain", {}) as worker:
        assert worker.call("echo", value=text, timeout_s=60) == text


def test_progress_arrives_in_order_and_before_the_answer():
    seen: list[int] = []
    with Worker("isolation_targets:Plain", {}) as worker:
        steps = worker.call(
            "count", steps=5, timeout_s=20, on_progress=lambda data: seen.append(data["step"])
        )
    assert steps == 5
    assert seen == [0, 1, 2, 3, 4]


def test_progress_outside_a_worker_goes_nowhere():
    report_progress(step=1)


def test_prints_reach_the_log_and_not_the_protocol(tmp_path, capfd):
    log = tmp_path / "logs" / "trial.log"
    with Worker("isolation_targets:Noisy", {}, log=log) as worker:
        assert worker.call("talk", timeout_s=20) == "truth"
    text = log.read_text()
    assert "hello from __init__" in text
    assert text.count("forged") == 2
    assert "warning: noise" in text
    assert capfd.readouterr() == ("", "")


def test_the_temporary_log_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Worker("isolation_targets:Noisy", {}):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_crash_names_its_signal_and_the_place():
    error = _failure("segfault")
    assert error.kind == "crash"
    assert "SIGSEGV in segfault" in str(error)


def test_a_crash_quotes_the_last_line_of_the_log_of_this_worker_only(tmp_path):
    error = _failure("abort")
    assert error.kind == "crash"
    assert "SIGABRT" in str(error)
    assert "OMP: Error #15: two runtimes" in str(error)
    log = tmp_path / "old.log"
    log.write_text("words of yesterday\n")
    with (
        Worker("isolation_targets:Misbehaving", {}, log=log) as worker,
        pytest.raises(TrialFailedError) as caught,
    ):
        worker.call("leave_at_once", timeout_s=20)
    assert "yesterday" not in str(caught.value)


def test_a_killed_worker_says_so():
    error = _failure("kill_self")
    assert error.kind == "crash"
    assert "SIGKILL" in str(error)


@pytest.mark.parametrize(
    ("method", "args", "code"), [("leave", {"code": 3}, 3), ("leave_at_once", {}, 0)]
)
def test_leaving_without_an_answer_is_a_crash(method, args, code):
    error = _failure(method, **args)
    assert error.kind == "crash"
    assert f"exited with code {code} without an answer" in str(error)


@pytest.mark.parametrize("method", ["hang", "hang_deaf", "flood"])
def test_a_deadline_ends_whatever_the_worker_does(method):
    with Worker("isolation_targets:Misbehaving", {}) as worker:
        pid = worker.pid
        with pytest.raises(TrialFailedError, match=f"no answer within 0.3 s in {method}") as caught:
            worker.call(method, timeout_s=0.3)
        assert caught.value.kind == "timeout"
        assert gone(pid)
        with pytest.raises(TrialFailedError, match="no answer within") as again:
            worker.call("raise_plain", timeout_s=20)
        assert again.value.kind == "timeout"


def test_a_message_to_a_deaf_worker_does_not_block():
    with Worker("isolation_targets:Plain", {}) as worker:
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(TrialFailedError) as caught:
            worker.call("echo", value="x" * (4 << 20), timeout_s=0.3)
    assert caught.value.kind == "timeout"


def test_too_much_memory_is_seen_and_stopped():
    error = _failure("eat", megabytes=2000, seconds=60, memory_bytes=200 << 20)
    assert error.kind == "memory"
    assert "above the limit of 200 MiB" in str(error)


def test_memory_of_grandchildren_counts():
    error = _failure("eat_in_grandchild", megabytes=300, memory_bytes=200 << 20)
    assert error.kind == "memory"


def test_memory_below_the_limit_passes_and_the_peak_is_reported():
    with Worker("isolation_targets:Misbehaving", {}, memory_bytes=600 << 20) as worker:
        before = worker.peak_bytes
        assert worker.call("eat", megabytes=160, timeout_s=60) == 20
        assert worker.peak_bytes - before > 120 << 20


def test_an_exception_leaves_the_worker_usable():
    with Worker("isolation_targets:Misbehaving", {}) as worker:
        with pytest.raises(TrialFailedError, match="RuntimeError: bad thing") as caught:
            worker.call("raise_plain", timeout_s=20)
        assert caught.value.kind == "error"
        with pytest.raises(TrialFailedError, match=r"^KeyError$"):
            worker.call("raise_empty", timeout_s=20)
        with pytest.raises(TrialFailedError, match="not JSON serializable"):
            worker.call("unjson", timeout_s=20)
        with pytest.raises(TrialFailedError, match="no attribute 'absent'"):
            worker.call("absent", timeout_s=20)
        with pytest.raises(TrialFailedError, match="not a public method"):
            worker.call("__init__", timeout_s=20)
        with pytest.raises(TypeError):
            worker.call("raise_plain", timeout_s=20, bad={1})
        assert math.isnan(worker.call("nan", timeout_s=20))


def test_a_failed_allocation_is_a_matter_of_memory():
    assert _failure("raise_memory").kind == "memory"


def test_own_errors_come_back_as_the_same_class_with_their_fields():
    with Worker("isolation_targets:Misbehaving", {}) as worker:
        with pytest.raises(CaptureError, match=r"stopped \(use eager\)") as capture:
            worker.call("raise_capture", timeout_s=20)
        with pytest.raises(MissingBackendError) as missing:
            worker.call("raise_missing", timeout_s=20)
    assert capture.value.operator == "aten.nonzero"
    assert capture.value.exit_code == BadInputError.exit_code
    assert missing.value.install == "pip install openvino"
    assert str(missing.value) == "openvino is not installed (pip install openvino)"


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("raise", TrialFailedError, "ValueError: no such weights second line"),
        ("suanli", BadInputError, "unknown workload"),
        ("crash", TrialFailedError, "SIGSEGV while starting"),
    ],
)
def test_failing_to_start_raises(how, error, words):
    with pytest.raises(error, match=words):
        Worker("isolation_targets:Broken", {"how": how})


def test_starting_has_a_deadline():
    with pytest.raises(TrialFailedError, match="while starting") as caught:
        Worker("isolation_targets:Broken", {"how": "hang"}, start_timeout_s=0.5)
    assert caught.value.kind == "timeout"


@pytest.mark.parametrize("target", ["no_such_module_here:Class", "isolation_targets:NoSuchClass"])
def test_a_target_that_does_not_exist_says_so(target):
    with pytest.raises(TrialFailedError, match=r"No module named|no attribute") as caught:
        Worker(target, {})
    assert caught.value.kind == "error"


def test_garbage_on_the_protocol_is_noticed():
    error = _failure("garbage")
    assert error.kind == "error"
    assert "no message" in str(error)


def test_a_child_that_holds_the_pipes_open_does_not_hide_the_end(tmp_path):
    path = tmp_path / "pid"
    error = _failure("fork_and_leave", path=str(path))
    assert error.kind == "crash"
    assert gone(int(path.read_text()))


@pytest.mark.parametrize("own_session", [False, True])
def test_grandchildren_end_with_the_worker(tmp_path, own_session):
    with Worker("isolation_targets:Misbehaving", {}) as worker:
        pid = worker.call(
            "grandchild", path=str(tmp_path / "pid"), own_session=own_session, timeout_s=20
        )
        assert psutil.pid_exists(pid)
    assert gone(pid)


def test_a_worker_killed_from_outside_is_reported_and_cleaned_up(tmp_path):
    with Worker("isolation_targets:Misbehaving", {}) as worker:
        grandchild = worker.call(
            "grandchild", path=str(tmp_path / "pid"), own_session=True, timeout_s=20
        )
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(TrialFailedError, match="SIGKILL") as caught:
            worker.call("nan", timeout_s=20)
        assert caught.value.kind == "crash"
        assert gone(grandchild)


def test_a_guardian_killed_from_outside_takes_the_worker_along():
    with Worker("isolation_targets:Misbehaving", {}) as worker:
        guardian = psutil.Process(worker.pid).ppid()
        os.kill(guardian, signal.SIGKILL)
        with pytest.raises(TrialFailedError) as caught:
            worker.call("hang", timeout_s=20)
        assert caught.value.kind == "crash"
        assert gone(worker.pid)


@pytest.mark.parametrize("state", ["busy", "paused"])
def test_everything_dies_with_a_parent_that_is_killed(tmp_path, state):
    """The parent gets SIGKILL, while the worker computes or is stopped."""
    script = textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{_TESTS!r}, {_ROOT!r}]
        from suanli.measure.isolation import Worker
        worker = Worker("isolation_targets:Misbehaving", {{}})
        child = worker.call(
            "grandchild", path={str(tmp_path / "pid")!r}, own_session=True, timeout_s=20)
        print(worker.pid, child, flush=True)
        if {state!r} == "paused":
            worker.pause()
            print("paused", flush=True)
        worker.call("hang", timeout_s=60) if {state!r} == "busy" else sys.stdin.read()
    """)
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    if state == "paused":
        parent.stdout.readline()
    parent.kill()
    parent.communicate()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_an_interrupt_of_the_caller_ends_the_worker():
    def interrupt(_data):
        raise KeyboardInterrupt

    with Worker("isolation_targets:Plain", {}) as worker:
        pid = worker.pid
        with pytest.raises(KeyboardInterrupt):
            worker.call("count", steps=1000, delay_s=0.05, timeout_s=60, on_progress=interrupt)
        assert not worker.alive
        assert gone(pid)


def test_pausing_stops_all_of_its_processes_and_resuming_lets_them_go_on(tmp_path):
    with Worker("isolation_targets:Misbehaving", {}) as worker:
        child = worker.call(
            "grandchild", path=str(tmp_path / "pid"), own_session=True, timeout_s=20
        )
        worker.pause()
        assert stopped(worker.pid)
        assert stopped(child)
        worker.resume()
        assert psutil.Process(child).status() != psutil.STATUS_STOPPED
        worker.pause()
        assert math.isnan(worker.call("nan", timeout_s=20))
        worker.pause()
    assert gone(child)


def test_two_workers_race_and_the_idle_one_is_stopped():
    with Worker("isolation_targets:Plain", {}) as a, Worker("isolation_targets:Plain", {}) as b:

        def side(mine: Worker, other: Worker) -> Contender:
            def run(n: int) -> list[float]:
                assert stopped(other.pid)
                times: list[float] = mine.call("timed", n=n, timeout_s=20)
                return times

            return Contender(run=run, pause=mine.pause, resume=mine.resume)

        found = race(side(a, b), side(b, a), blocks=(2, 2), turn_seconds=0.02)
    assert found.pairs == 4
    assert found.ratio.lo95 <= found.ratio.p50 <= found.ratio.hi95
    assert found.a_ms.p50 > 0


def test_the_deadline_of_an_isolated_call_covers_the_start():
    begin = time.monotonic()
    with pytest.raises(TrialFailedError) as caught:
        call_isolated("isolation_targets:Broken", {"how": "hang"}, "any", timeout_s=0.5)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - begin < 30


def test_no_descriptor_and_no_thread_is_left_behind():
    import threading

    def descriptors() -> int:
        return psutil.Process().num_fds()

    with Worker("isolation_targets:Plain", {}):
        pass
    before, threads = descriptors(), threading.active_count()
    for method in ("segfault", "raise_plain", "leave_at_once"):
        _failure(method)
    assert descriptors() == before
    assert threading.active_count() == threads
