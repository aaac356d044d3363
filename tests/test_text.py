"""Results as text: all of it there, nothing taken for markup, nothing wider than the terminal."""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from suanli.base import units
from suanli.base.events import Event
from suanli.base.plan import Plan
from suanli.base.results import RunResult, SchemaName, WorkloadEntry
from suanli.base.trial import Trial
from suanli.reports import live, text
from tests import planted_results as planted


def rendered(show: Callable[..., None], result: Any, width: int = 80, **options: Any) -> str:
    file = io.StringIO()
    show(result, Console(file=file, width=width, highlight=False, markup=False, **options))
    return file.getvalue()


def widest(shown: str) -> int:
    return max(cell_len(line) for line in shown.splitlines())


def words(shown: str) -> str:
    return " ".join(shown.split())


def row_of(shown: str, start: str) -> str:
    return next(line for line in shown.splitlines() if line.strip().startswith(start))


# -- suanli optimize ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 110, 200])
def test_optimize_fits_the_terminal(width: int) -> None:
    assert widest(rendered(text.optimize, planted.optimize_result(), width)) <= min(width, 110)


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    shown = rendered(text.optimize, planted.optimize_result())
    for literal in ("[bold]no[/bold]", "[/]", "[red]1", "my[model].py:net", "[conv1]", "[b]seven"):
        assert literal in shown, literal


def test_trials_are_grouped_by_status_and_the_fastest_is_first() -> None:
    lines = rendered(text.optimize, planted.optimize_result()).splitlines()
    starts = (planted.FAST.title[:12], "eager bf16", "eager fp32", "inductor fp16", "inductor bf16")
    places = [next(i for i, line in enumerate(lines) if start in line) for start in starts]
    assert places == sorted(places)


def test_gain_is_over_the_best_verified_baseline() -> None:
    shown = rendered(text.optimize, planted.optimize_result(), width=110)
    assert "vs best" in shown
    assert "baseline" in shown
    assert "1.00x" in row_of(shown, "eager bf16")
    assert f"{21.6 / 3.9:.2f}x" in row_of(shown, planted.FAST.title)
    assert f"{21.6 / 54:.2f}x" in row_of(shown, "eager fp32")


def test_without_a_verified_baseline_no_gain_is_claimed() -> None:
    trials = tuple(t for t in planted.trials() if not t.baseline)
    shown = rendered(text.optimize, planted.optimize_result(trials=trials))
    table, _, _ = shown.partition("Timed by")
    assert "nan" not in table
    assert "x " not in row_of(table, planted.FAST.title[:12])


def test_chosen_plan_is_marked() -> None:
    shown = rendered(text.optimize, planted.optimize_result(), width=110)
    assert "chosen" in row_of(shown, planted.FAST.title)
    assert "chosen" not in row_of(shown, "eager bf16")


def test_skipped_plans_are_a_line_per_reason() -> None:
    shown = rendered(text.optimize, planted.optimize_result())
    assert words(shown).count("tensorrt not installed (pip install tensorrt-cu12)") == 1
    assert "and 3 more: tensorrt" in words(shown)
    assert "onnxruntime fp32 1t (baseline)" in shown
    table, _, below = shown.partition("Timed by")
    assert "skipped" not in table
    assert below.count("skipped") == 2  # the heading and the tally
    assert "about 1 to 30 s needed, 3 s of the search's budget left" in words(shown)
    # two reasons are shared and thirty are not: ten of these have a line
    assert "warp fp32 10t: the operator op10d is not known" in shown
    assert "op11d" not in shown
    assert "and 20 more: --json has them" in shown


def test_only_figures_with_a_unit_are_merged() -> None:
    reasons = ["its sibling int8 2x1 took 3 ms", "its sibling int8 2x1 took 12.5 ms"]
    assert text._merged(reasons) == "its sibling int8 2x1 took 3 to 12.5 ms"
    assert text._merged(["tensorrt 10 is not here"]) == "tensorrt 10 is not here"


def test_all_is_said_of_the_chosen_plan() -> None:
    shown = words(rendered(text.optimize, planted.optimize_result()))
    for said in (
        planted.FAST.key,
        "in bf16: layer0.0.conv0, layer1.0.conv1, layer2.0.conv2, layer3.0.conv3 and 5 more",
        "3.9 ms, 256 samples/s; eager fp32 source 21.5 ms",
        "13.80x (13.52 to 14.08) over eager fp32",
        "5.50x (5.39 to 5.61) over the best baseline, eager fp32 source",
        "at batch 32: 5.50x (5.39 to 5.61) over eager fp32 source",
        "530 us, derived (bound by compute): this is 0.43 % of the speed of light",
        "error 1.04x eager's own at this precision (2x is allowed)",
        "ranking agreement 98.61 % before, 98.33 % after (720 unseen samples, 3 harmed, 1 helped)",
        "drop at most 0.61 points (95 %), 1.00 are allowed",
        "3 verified, 1 rejected, 1 failed, 67 skipped in 118 s; 1 from an earlier search",
    ):
        assert said in shown, said


def test_a_gain_over_the_same_rival_is_said_once() -> None:
    base = planted.optimize_result()
    same = planted.estimate(5.5)
    races = tuple(replace(race, speedup_vs_eager=same) for race in base.confirmations)
    result = replace(base, speedup_vs_eager=same, confirmations=races)
    shown = words(rendered(text.optimize, result))
    assert "5.50x (5.39 to 5.61) over eager fp32, the best baseline" in shown
    assert "at batch 32: 5.50x (5.39 to 5.61) over eager fp32 source" in shown
    assert shown.count("5.50x (5.39 to 5.61)") == 2


@pytest.mark.parametrize(
    ("show", "result"),
    [(text.optimize, planted.optimize_result()), (text.doctor, planted.doctor_result())],
)
def test_no_line_ends_in_blanks(show: Callable[..., None], result: Any) -> None:
    shown = rendered(show, result)
    assert all(line == line.rstrip() for line in shown.splitlines())
    assert len(shown.splitlines()) > 20
    assert shown.endswith("\n")


def test_what_is_absent_is_not_made_up() -> None:
    result = planted.optimize_result(
        quality=None, values=None, sol=None, engine_dir=None, untrained=True, interrupted=True
    )
    shown = words(rendered(text.optimize, result))
    assert "not judged: the weights are random" in shown
    assert "stopped early" in shown
    for absent in ("speed of light", "eager's own at this precision", "import suanli", "None"):
        assert absent not in shown


@pytest.mark.parametrize("folder", ["e" * 120, 'a "quoted" one', "back\\slash"])
def test_the_line_to_copy_is_whole(folder: str) -> None:
    shown = rendered(text.optimize, planted.optimize_result(engine_dir=folder))
    line = row_of(shown, "engine = ")
    called: list[str] = []
    exec(line.strip(), {"suanli": type("S", (), {"load": staticmethod(called.append)})})
    assert called == [folder]


def test_ascii_terminal_gets_ascii() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="replace")
    text.optimize(planted.optimize_result(), Console(file=file, width=80, markup=False))
    text.doctor(planted.doctor_result(), Console(file=file, width=80, markup=False))
    file.flush()
    assert "openvino" in raw.getvalue().decode("ascii")


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    green = "\x1b[32m"
    result = planted.optimize_result()
    assert green in rendered(text.optimize, result, force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert green not in rendered(text.optimize, result, force_terminal=True)


# -- suanli doctor and the others -----------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 200])
def test_doctor_fits_the_terminal(width: int) -> None:
    assert widest(rendered(text.doctor, planted.doctor_result(), width)) <= min(width, 110)


def test_doctor_says_all() -> None:
    shown = rendered(text.doctor, planted.doctor_result())
    assert "Planted [Xeon] Processor" in shown
    assert "12.5 TOP/s" in row_of(shown, "matmul int8")
    assert "1 TFLOP/s" in row_of(shown, "matmul bf16")
    assert "101 %" in row_of(shown, "matmul bf16")  # 999.7 of 989
    assert "derived" in row_of(shown, "matmul fp32")
    assert "350 us" not in shown
    assert "0.35 us" in row_of(shown, "call overhead")
    assert "55 GB/s" in row_of(shown, "host to device")
    assert "80 GB/s" in row_of(shown, "read 32 KiB")
    assert "80 GB/s" in row_of(shown, "read 2 GiB")
    assert "cc (Debian 12.2.0-14+deb12u1) 12.2.0" in shown
    assert "cc: cc" not in shown
    flat = words(shown)
    assert "cuda:1 NVIDIA H200" in flat
    assert "pip install 'suanli[gpu]' tensorrt-cu12" in flat
    assert "driver runs at most 12.8" in flat
    assert "https://download.pytorch.org/whl/cu126" in flat
    assert "something else ran meanwhile" in flat
    assert "measured 2026-01-02 03:04:05 UTC" in flat


def test_a_sound_machine_has_no_notes() -> None:
    calm = tuple(item for item in planted.ceilings().items if item.spread < 0.5)
    shown = rendered(
        text.doctor, planted.doctor_result(problems=(), gpus=(), ceilings=calm, compiler=None)
    )
    assert "something else ran" not in shown
    assert "of data-" not in shown
    assert row_of(shown, "problems").split() == ["problems", "none"]
    assert row_of(shown, "GPU").split() == ["GPU", "none"]
    assert row_of(shown, "compiler").split() == ["compiler", "none"]


def test_run_names_the_portable_plan() -> None:
    result = RunResult(
        schema=SchemaName(name="suanli.run", version=1),
        verb="run",
        workload="net",
        device=planted.DEVICE,
        environment=planted.ENVIRONMENT,
        engine_dir="engine",
        plan=planted.FAST,
        portable=True,
        differences=("torch: 2.12.0 -> 2.13.0",),
        output="out[1].npy",
        output_names=("logits[0]",),
        output_shapes=((1, 10),),
        output_dtypes=("float32",),
        call_ms=0.25,
    )
    shown = rendered(text.run, result)
    for said in ("logits[0]: [1, 10] float32", "250 us", "portable plan", "torch: 2.12.0"):
        assert said in shown
    assert "wrote out[1].npy" in shown


def test_workloads_fit() -> None:
    entry = WorkloadEntry(name="a-name", note="[b] " + "words " * 40)
    shown = rendered(text.workloads, planted.workloads_result(entry))
    assert widest(shown) <= 80
    assert "[b] words" in shown


def test_trust_names_the_keys() -> None:
    mine, other = planted.public_key(1), planted.public_key(2)
    result = planted.trust_result(own=mine, trusted=(other,), added=other.fingerprint)
    shown = rendered(text.trust, result)
    assert widest(shown) <= 80
    for said in (mine.fingerprint, mine.public_key, other.fingerprint, "ask its owner"):
        assert said in shown
    assert other.public_key not in shown
    assert "nobody else" in rendered(text.trust, planted.trust_result(own=mine))


# -- the live view --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(said: str) -> Event:
    return Event(kind="step", text=said, spent_s=3.0, budget_s=120.0)


def show_search(view: live.Live) -> None:
    trials = planted.trials()
    view.event(step("capturing the model"))
    for trial in trials[:5]:
        view.event(step(f"trying {trial.plan.title} (about 5 s)"))
        for part in ("building", "checking", "timing"):
            view.event(step(part))
        view.event(Event(kind="trial", text="", trial=trial, spent_s=30.0, budget_s=120.0))
    view.event(Event(kind="note", text="[bold]no[/bold] " + "many words " * 20))


def test_a_log_has_a_line_per_trial_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SETTLED_S", 1e9)
    file = io.StringIO()
    with live.Live(console=Console(file=file)) as view:
        show_search(view)
    lines = file.getvalue().splitlines()
    assert len(lines) == 6
    assert [line.split()[2] for line in lines[:5]] == [t.status for t in planted.trials()[:5]]
    assert "[bold]no[/bold] tiles" in lines[1]
    assert lines[1].endswith("averylongwordwithoutanyspaces")
    assert lines[5].startswith("note: [bold]no[/bold]")


def test_a_log_says_what_takes_long_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SETTLED_S", 0.0)
    file = io.StringIO()
    with live.Live(console=Console(file=file)) as view:
        view.event(step("trying openvino bf16 (about 5 s)"))
        view.event(step("building"))
        end = time.monotonic() + 20
        while not file.getvalue() and time.monotonic() < end:
            time.sleep(0.02)
        for part in ("checking", "timing"):
            view.event(step(part))
            time.sleep(0.7)  # longer than the view waits between two looks
    (line,) = file.getvalue().splitlines()
    assert "/120 s  trying openvino bf16 (about 5 s)" in line


def test_a_terminal_shows_the_step_and_cuts_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    with live.Live(console=console) as view:
        show_search(view)
        view.event(step("racing the engine against the baselines"))
        assert view._animation is not None
        view._animation.refresh()
    shown = file.getvalue()
    assert "/120 s  racing the engine against the baselines" in shown
    failed = next(line for line in shown.splitlines() if "failed" in line)
    assert "…" in failed
    controls = ("\x1b[2K", "\x1b[1A", "\x1b[?25l", "\x1b[?25h", "\r")
    for control in controls:
        failed = failed.replace(control, "")
    assert cell_len(failed) < 80


def test_a_step_of_a_trial_names_its_plan() -> None:
    now = live._Step()
    now.take(step("trying eager bf16 (about 5 s)"))
    now.take(step("timing"))
    assert now.line().endswith("trying eager bf16 (about 5 s): timing")
    now.take(Event(kind="trial", text="", trial=planted.trials()[0]))
    now.take(step("writing the engine"))
    assert now.line().endswith("/120 s  writing the engine")


def test_parts_of_a_step_are_one_step() -> None:
    now = live._Step()
    now.take(step("measuring cpu: reading 1 MiB"))
    now.said = True
    now.take(step("measuring cpu: reading 2 MiB"))
    assert now.said
    now.take(step("writing"))
    assert not now.said


def test_quiet_leaves_no_trace_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_SETTLED_S", 0.0)
    file = io.StringIO()
    with live.Live(quiet=True, console=Console(file=file)) as view:
        show_search(view)
    assert file.getvalue() == ""


def test_what_a_person_prints_meanwhile_is_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with live.Live(quiet=True, console=Console(file=io.StringIO())):
        print("from forward")
    print("the answer")
    assert capsys.readouterr() == ("the answer\n", "from forward\n")


def test_forced_colour_does_not_animate_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with live.Live(console=Console(file=file)) as view:
        show_search(view)
    assert "\x1b[2K" not in file.getvalue()
    assert "\x1b[?25l" not in file.getvalue()


def test_the_line_of_a_trial() -> None:
    trial = Trial(
        plan=Plan(backend="eager"), status="verified", step_ms=planted.estimate(999.9), resumed=True
    )
    shown = live.trial_line(trial, 12.4).plain
    assert shown == "  12 s  verified      1 s  eager fp32, from an earlier search"


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (units.si(999.7e9, "FLOP/s"), "1 TFLOP/s"),
        (units.si(0.0, "B/s"), "0 B/s"),
        (units.si(1.5e18, "B/s"), "1500 PB/s"),
        (units.size(1023 * 1024), "1023 KiB"),
        (units.size(2**34), "16 GiB"),
        (units.size(0), "0 B"),
        (units.milliseconds(0.9999), "1 ms"),
        (units.milliseconds(999.9), "1 s"),
        (units.milliseconds(0.000357), "0.357 us"),
        (units.milliseconds(123_456_789), "123000 s"),
        (units.rate(0.345), "0.345"),
        (units.rate(1_234_567.8), "1,234,568"),
        (units.share(0.996), "100 %"),
        (units.share(0.00012), "0.012 %"),
        (units.percent(0.9861), "98.61 %"),
    ],
)
def test_numbers(shown: str, wanted: str) -> None:
    assert shown == wanted
