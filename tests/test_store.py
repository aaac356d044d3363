"""Trials on disk: whole, damaged, shared by processes, or impossible to write."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from suanli.base.files import cache_dir
from suanli.base.hardware import DeviceInfo, Environment
from suanli.base.plan import Plan, Quantization
from suanli.base.timing import Estimate, Timing
from suanli.base.trial import OutputError, Quality, Trial, ValueCheck
from suanli.plans.store import TrialStore, failed_within, failure_kind, store_key

PLAN = Plan(backend="engine", precision="bf16", options={"pin": True, "level": 3, "mode": "a"})
STEP = Estimate(p50=6.4, lo95=6.3, hi95=6.6)


def verified(plan: Plan = PLAN, **changes: object) -> Trial:
    trial = Trial(plan=plan, status="verified", step_ms=STEP, samples_per_s=156.25)
    return replace(trial, **changes)  # type: ignore[arg-type]


def timed_out(limit_s: float) -> Trial:
    trial = Trial(plan=PLAN, status="failed", reason="no answer")
    return failed_within(trial, "timeout", limit_s)


def test_what_is_put_comes_back_in_another_store(tmp_path: Path) -> None:
    error = OutputError(
        name="logits",
        rms=0.1,
        eager_rms=0.09,
        max_abs=0.5,
        eager_max_abs=0.4,
        rms_ratio=0.55,
        max_ratio=0.6,
        bias_ratio=0.3,
        gain_ratio=0.2,
        worst_channel=3,
    )
    int8 = PLAN.with_(
        precision="int8",
        quantization=Quantization(scheme="int8-static", keep=("conv1",), calibration_samples=64),
    )
    whole = verified(
        int8,
        values=ValueCheck(ok=True, k=2.0, outputs=(error,), batches=(1, 32)),
        quality=Quality(
            metric="accuracy",
            value=0.98,
            reference=0.985,
            drop_upper95=0.004,
            budget=0.005,
            n=720,
            accepted=True,
        ),
        timings=(Timing(step_ms=STEP, batch=1, samples_per_s=156.25, repeats=100),),
        details={"opset": "20"},
        baseline=True,
        peak_bytes=10**9,
    )
    TrialStore("k", folder=tmp_path).put(whole)
    found = TrialStore("k", folder=tmp_path).get(int8.key)
    assert found == replace(whole, resumed=True)
    assert TrialStore("other", folder=tmp_path).get(int8.key) is None


def test_the_default_folder_is_the_cache() -> None:
    store = TrialStore("k")
    store.put(verified())
    assert store.path == cache_dir() / "trials" / "k.jsonl"
    assert store.path.is_file()


def test_a_trial_is_found_by_the_plan_that_was_asked_for(tmp_path: Path) -> None:
    built = PLAN.with_(float_operators=("norm",))
    TrialStore("k", folder=tmp_path).put(verified(built), key=PLAN.key)
    store = TrialStore("k", folder=tmp_path)
    found = store.get(PLAN.key)
    assert found is not None
    assert found.plan == built
    assert store.get(built.key) is None


def test_the_last_trial_of_a_plan_counts(tmp_path: Path) -> None:
    store = TrialStore("k", folder=tmp_path)
    store.put(timed_out(10.0))
    store.put(verified())
    found = TrialStore("k", folder=tmp_path).get(PLAN.key)
    assert found is not None
    assert found.status == "verified"


def test_what_was_built_does_not_come_back(tmp_path: Path) -> None:
    store = TrialStore("k", folder=tmp_path)
    store.put(verified(build_dir="../../somewhere"))
    found = store.get(PLAN.key)
    assert found is not None
    assert found.build_dir == ""


def test_skipped_trials_are_not_kept(tmp_path: Path) -> None:
    store = TrialStore("k", folder=tmp_path)
    store.put(Trial(plan=PLAN, status="skipped", reason="absent"))
    assert len(store) == 0
    assert not store.path.exists()


def test_crashes_are_kept_and_time_outs_get_a_longer_try(tmp_path: Path) -> None:
    store = TrialStore("k", folder=tmp_path)
    store.put(failed_within(Trial(plan=PLAN, status="failed", reason="SIGSEGV"), "crash", 10.0))
    crashed = TrialStore("k", folder=tmp_path).get(PLAN.key, limit_s=1e9)
    assert crashed is not None
    assert failure_kind(crashed) == "crash"

    store.put(timed_out(40.0))
    again = TrialStore("k", folder=tmp_path)
    assert again.get(PLAN.key, limit_s=41.0) is not None
    assert again.get(PLAN.key, limit_s=60.0) is None
    assert again.get(PLAN.key) is not None
    assert failure_kind(verified()) == ""


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_costs_one_trial(tmp_path: Path, cut: int) -> None:
    store = TrialStore("k", folder=tmp_path)
    other = PLAN.with_(streams=2)
    store.put(verified())
    store.put(verified(other))
    data = store.path.read_bytes()
    store.path.write_bytes(data[:-cut])
    torn = TrialStore("k", folder=tmp_path)
    assert torn.get(PLAN.key) is not None
    # without its newline only, the line is still whole
    assert (torn.get(other.key) is not None) == (cut == 1)
    assert torn.ignored_lines == (0 if cut == 1 else 1)
    third = PLAN.with_(streams=4)
    torn.put(verified(third))
    mended = TrialStore("k", folder=tmp_path)
    assert mended.get(third.key) is not None
    assert mended.get(PLAN.key) is not None


def test_damaged_lines_are_counted_and_passed_over(tmp_path: Path) -> None:
    store = TrialStore("k", folder=tmp_path)
    store.put(verified())
    good = json.loads(store.path.read_text())
    unknown = {**good, "trial": {**good["trial"], "surprise": 1}}
    bad = [
        b"\x00\xff\xfe",
        b"not json",
        b"[]",
        b"{}",
        b'{"key": 3, "trial": {}}',
        b"[" * 100_000,
        b"7" * (5 << 20),
        json.dumps(unknown).encode(),
    ]
    with store.path.open("ab") as file:
        file.write(b"\n".join(bad) + b"\n\n")
    store = TrialStore("k", folder=tmp_path)
    assert store.get(PLAN.key) is not None
    assert store.ignored_lines == len(bad)
    assert len(store) == 1


def test_figures_that_json_has_no_word_for_do_not_lose_the_trial(tmp_path: Path) -> None:
    infinite = OutputError(
        name="logits",
        rms=float("inf"),
        eager_rms=0.1,
        max_abs=float("nan"),
        eager_max_abs=0.1,
        rms_ratio=float("inf"),
        max_ratio=float("inf"),
        bias_ratio=0.0,
        gain_ratio=0.0,
    )
    rejected = verified(
        status="rejected",
        reason="not finite",
        values=ValueCheck(ok=False, k=2.0, outputs=(infinite,), reason="not finite"),
    )
    TrialStore("k", folder=tmp_path).put(rejected)
    store = TrialStore("k", folder=tmp_path)
    found = store.get(PLAN.key)
    assert found is not None
    assert found.status == "rejected"
    assert found.reason == "not finite"
    assert store.ignored_lines == 0


def test_fresh_forgets_the_earlier_trials(tmp_path: Path) -> None:
    TrialStore("k", folder=tmp_path).put(verified())
    assert TrialStore("k", fresh=True, folder=tmp_path).get(PLAN.key) is None
    assert TrialStore("k", folder=tmp_path).get(PLAN.key) is None


def test_where_nothing_can_be_written_it_works_in_memory_and_says_so(tmp_path: Path) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    store = TrialStore("k", folder=blocked / "trials")
    store.put(verified())
    store.put(verified(PLAN.with_(streams=2)))
    assert len(store) == 2
    assert store.get(PLAN.key) is not None
    assert store.notice.startswith("trials are not kept for the next run")


def test_a_full_disk_is_said_and_does_not_stop_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = TrialStore("k", folder=tmp_path)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real_write(handle, data[:10]))
    store.put(verified())
    monkeypatch.undo()
    assert "disk is full" in store.notice
    assert store.get(PLAN.key) is not None
    later = TrialStore("k", folder=tmp_path)
    assert later.ignored_lines == 1
    later.put(verified())
    assert TrialStore("k", folder=tmp_path).get(PLAN.key) is not None


def test_a_link_in_place_of_the_file_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("keep me")
    (tmp_path / "k.jsonl").symlink_to(target)
    store = TrialStore("k", folder=tmp_path)
    store.put(verified())
    assert target.read_text() == "keep me"
    assert store.notice


WRITER = """
import sys
from pathlib import Path
from suanli.base.plan import Plan
from suanli.base.trial import Trial
from suanli.plans.store import TrialStore

assert "torch" not in sys.modules
store = TrialStore("shared", folder=Path(sys.argv[1]))
for number in range(60):
    plan = Plan(backend=sys.argv[2], sub_batch=number)
    store.put(Trial(plan=plan, status="failed", reason="x" * (number * 300)))
"""


def test_two_processes_share_a_store(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name]) for name in ("first", "second")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    store = TrialStore("shared", folder=tmp_path)
    assert store.ignored_lines == 0
    assert len(store) == 120


def test_a_killed_writer_leaves_a_store_that_can_be_read(tmp_path: Path) -> None:
    endless = WRITER.replace("range(60)", "range(10**9)").replace("number * 300", "3000")
    writer = subprocess.Popen([sys.executable, "-c", endless, str(tmp_path), "first"])
    path = tmp_path / "shared.jsonl"
    try:
        while not path.exists() or path.stat().st_size < 20_000:
            assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()
    store = TrialStore("shared", folder=tmp_path)
    assert store.ignored_lines <= 1
    assert len(store) >= 5
    store.put(verified())
    assert TrialStore("shared", folder=tmp_path).get(PLAN.key) is not None


def test_the_key_changes_with_all_that_a_trial_depends_on() -> None:
    device = DeviceInfo(name="cpu", title="CPU", fingerprint="f1", memory_bytes=1)
    environment = Environment(
        suanli="0.1", python="3.11", os="Linux", machine="x", cores=2, libraries={"torch": "2.13"}
    )
    usual = {
        "workload": "w1",
        "device": device,
        "environment": environment,
        "batch": 1,
        "objective": "latency",
        "conditions": {"budget": 0.005},
    }

    def key(**changes: object) -> str:
        return store_key(**(usual | changes))  # type: ignore[arg-type]

    others = [
        key(workload="w2"),
        key(device=replace(device, fingerprint="f2")),
        key(environment=replace(environment, libraries={"torch": "2.14"})),
        key(environment=replace(environment, cores=4)),
        key(batch=2),
        key(objective="throughput"),
        key(conditions={"budget": 0.01}),
        key(conditions=None),
    ]
    assert len({key(), *others}) == len(others) + 1
    assert key(environment=replace(environment, load_average=7.5)) == key()
    assert key(device=replace(device, title="the same one")) == key()
