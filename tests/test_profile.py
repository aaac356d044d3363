"""Profiles: joining of times with work, parts of the step, memory, outliers, timeline."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from suanli.base import codec
from suanli.base.profile_results import OperatorProfile, StepTimes
from suanli.base.work import SpeedOfLight
from suanli.profiling import joining, memory, rows, trace
from suanli.profiling.recording import KernelRun, record_steps
from suanli.profiling.rows import Row
from suanli.profiling.stability import stability
from suanli.profiling.stopwatch import Mark, StepTime, Stopwatch, time_steps, typical_parts
from suanli.profiling.verdict import bound_by, lost_time, step_times, verdict
from suanli.profiling.waste import read_backs, tiny_calls
from tests.profile_parts import ceilings, node, pointwise, product, recording

# -- joining --------------------------------------------------------------------------------------


def test_calls_take_the_operators_in_order() -> None:
    found = joining.join(
        recording(
            node("aten::linear", 0, 2, node("aten::t", 0, 0.1), node("aten::addmm", 0.2, 1.9)),
            node("aten::relu_", 2, 3),
            node("aten::linear", 3, 6, node("aten::addmm", 3.1, 5.9)),
        ),
        [product("a"), pointwise("relu", "b"), product("c")],
    )
    assert [(j.module, round(j.ms, 3), j.index) for j in found] == [
        ("a", 1.7, 0),
        ("b", 1.0, 1),
        ("c", 2.8, 2),
    ]


def test_what_was_not_counted_stands_for_itself() -> None:
    copy = node("aten::to", 1, 3, node("aten::_to_copy", 1, 3, node("aten::copy_", 1.1, 2.9)))
    found = joining.join(recording(node("aten::addmm", 0, 1), copy), [product("a")])
    assert [(j.node.name, j.operator is None) for j in found][1] == ("aten::copy_", True)
    assert found[1].module == "a", "it carries the module of the operator before it"


def test_a_kernel_that_hides_its_insides_keeps_its_time() -> None:
    hidden = node("custom::fused", 0, 10, node("aten::empty", 0, 0.1))
    (found,) = joining.join(recording(hidden), [])
    assert found.ms == 10


def test_an_operator_that_never_ran_is_passed_over() -> None:
    found = joining.join(
        recording(node("aten::addmm", 0, 1), node("aten::bmm", 1, 2)),
        [product("a"), product("gone", name="mm"), product("b", name="bmm")],
    )
    assert [j.module for j in found] == ["a", "b"]


def test_micro_batches_are_matched_pass_by_pass() -> None:
    def turn(at: float) -> list:
        back = node("aten::mm", at + 1, at + 2, part="backward")
        return [node("aten::addmm", at, at + 1), back]

    one = [product("x"), product("x", name="mm", phase="backward")]
    found = joining.join(recording(*turn(0), *turn(2)), one * 2)
    assert [j.index for j in found] == [0, 1, 2, 3]
    assert [j.phase for j in found] == ["forward", "backward"] * 2


def test_attention_has_one_name_whatever_kernel_runs() -> None:
    name = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    assert joining.plain_name(name) == "scaled_dot_product_attention_backward"
    assert joining.plain_name("aten::add_") == "add"


def test_the_profilers_cost_is_taken_out_call_by_call() -> None:
    step = recording(node("aten::addmm", 0, 1, node("aten::empty", 0, 0.1)), ms=2.0)
    found = joining.join(step, [product()])
    (clean,) = joining.brought_to(found, step, 1.98)
    assert clean.ms == pytest.approx(0.98)
    (rest,) = joining.brought_to(found, step, 0.1)
    assert rest.ms == pytest.approx(0.1), "a call never comes out at nothing"
    (grown,) = joining.brought_to(found, step, 3.0)
    assert grown.ms == pytest.approx(1.5), "the machine was slower while nothing was recorded"


def test_a_device_is_timed_by_its_kernels() -> None:
    call = node("aten::addmm", 0, 0.1, device_ms=5.0)
    runs = [
        KernelRun(name="Memcpy HtoD (Pageable -> Device)", start_ms=0, end_ms=1),
        KernelRun(name="gemm", start_ms=1, end_ms=6),
        KernelRun(name="other stream", start_ms=4, end_ms=7, stream=1),
    ]
    step = recording(call, ms=10, device=runs)
    (joined,) = joining.join(step, [product()])
    assert joined.ms == 5.0
    assert joining.brought_to([joined], step, 1.0)[0].ms == 5.0, (
        "the host's cost is not the device's"
    )
    assert sum(ms for _, ms in joining.transfers(step)) == 1
    assert joining.busy_ms(step, 0, 10) == 7


# -- the table ------------------------------------------------------------------------------------


def _row(**fields) -> Row:
    settings = {"name": "addmm", "phase": "forward", "count": 1, "ms": 1.0}
    return Row(**settings | fields)


def test_calls_of_one_place_are_one_row_and_its_time_the_median() -> None:
    ops = [product("a", source="m.py:3"), product("a", source="m.py:3")]
    steps = []
    for slow in (1.0, 1.0, 9.0):
        calls = recording(node("aten::addmm", 0, 1), node("aten::addmm", 1, 1 + slow))
        steps.append(joining.join(calls, ops))
    (row,) = rows.grouped(steps)
    assert (row.count, row.ms, row.source) == (2, 2.0, "m.py:3")


def test_an_update_is_one_row_whatever_its_calls_are_called() -> None:
    steps = []
    for name in ("copy_", "_fused_sgd_", "mul_"):
        update = node(f"aten::{name}", 1, 3, part="optimizer")
        calls = recording(node("aten::addmm", 0, 1), update, ms=3.0)
        steps.append(joining.join(calls, [product()]))
    found = {row.phase: row.ms for row in rows.grouped(steps)}
    assert found == {"forward": 1.0, "optimizer": 2.0}


def test_rates_and_limits_of_a_row() -> None:
    row = _row(ms=100.0, operators=[product(flops=10**9, bytes_read=10**6)])
    (found,) = rows.finished([row], step_ms=200.0, ceilings=ceilings(), precision="fp32")
    assert found.flops_per_s == pytest.approx(1e10)
    assert found.sol_ms == pytest.approx(10.0)
    assert (found.bound_by, found.share) == ("compute", 0.5)
    assert found.lost_ms == pytest.approx(90.0)
    assert found.intensity == pytest.approx(1e9 / 1.1e6)
    (unknown,) = rows.finished([row], step_ms=200.0, ceilings=None, precision="fp32")
    assert (unknown.sol_ms, unknown.lost_ms) == (None, None)


def test_an_operators_own_type_decides_its_ceiling() -> None:
    op = product(flops=10**9, dtype="bf16", bytes_read=0, bytes_written=0)
    sol, bound = rows.limit_of([op], ceilings(bf16=8.0), "fp32")
    assert (round(sol, 6), bound) == (1.25, "compute")


def test_a_call_that_is_all_overhead_says_so() -> None:
    row = _row(name="add", ms=0.002, operators=[pointwise("add", size=64)])
    (found,) = rows.finished([row], step_ms=1.0, ceilings=ceilings(), precision="fp32")
    assert found.bound_by == "overhead"


def test_a_phase_is_never_longer_than_it_was() -> None:
    table = [_row(ms=3.0), _row(ms=1.0), _row(ms=5.0, phase="backward")]
    assert rows.fitted(table, "forward", 2.0) == 2.0
    assert [row.ms for row in table] == [1.5, 0.5, 5.0]


def test_streams_that_overlap_fit_into_the_step() -> None:
    table = [_row(ms=60.0), _row(ms=60.0, phase="backward")]
    busy = {"forward": 60.0, "backward": 60.0}
    rows.within(table, busy, 90.0)
    assert sum(busy.values()) == pytest.approx(90.0)
    assert [row.ms for row in table] == [45.0, 45.0]


def test_what_was_fused_reads_once_and_writes_once() -> None:
    conv = product("conv", bytes_read=1000, parameter_bytes=400, bytes_written=800)
    relu = pointwise("relu", size=800)
    one = rows.as_one([conv, relu], "fp32")
    assert (one.bytes_read, one.bytes_written) == (1000, 800)
    assert one.flops == conv.flops + relu.flops
    assert rows.as_one([conv, relu], "bf16").bytes_read == 500


# -- parts, limits, verdict -----------------------------------------------------------------------

PARTS = {"data": 5.0, "forward": 30.0, "backward": 60.0, "optimizer": 5.0}


def test_parts_add_up_to_the_step() -> None:
    busy = {"forward": 25.0, "backward": 55.0, "optimizer": 4.0}
    times = step_times(PARTS, busy)
    assert times.total_ms == pytest.approx(100.0)
    assert (times.data_ms, times.idle_ms) == (5.0, 11.0)


def test_on_a_device_the_hosts_time_overlaps() -> None:
    parts = {"data": 40.0, "forward": 30.0, "backward": 20.0, "optimizer": 10.0}
    times = step_times(parts, {"forward": 80.0}, transfer_ms=5.0, device_bound=True)
    assert times.total_ms == pytest.approx(100.0)
    assert (times.data_ms, times.idle_ms, times.transfer_ms) == (15.0, 0.0, 5.0)


def _profile(ms: float, sol: float | None, bound: str) -> OperatorProfile:
    return OperatorProfile(
        name="x",
        module="",
        source="",
        count=1,
        time_ms=ms,
        flops=0,
        bytes=0,
        bound_by=bound,
        sol_ms=sol,
    )


def test_lost_time_leads_from_the_step_to_the_limit() -> None:
    table = [_profile(50, 10, "compute"), _profile(30, 12, "memory"), _profile(5, 1, "overhead")]
    times = StepTimes(forward_ms=85.0, data_ms=10.0, idle_ms=5.0)
    sol = SpeedOfLight(ms=8.0, bound_by="compute", compute_ms=8.0, memory_ms=2.0)
    lost = lost_time(times, table, sol)
    assert sum(item.ms for item in lost) == pytest.approx(100.0 - 8.0)
    causes = {item.cause: item.ms for item in lost}
    assert causes["traffic that fusion avoids"] == pytest.approx(13.0)
    assert causes["compute-bound, below the ceiling"] == pytest.approx(40.0)
    assert lost_time(times, table, None) == ()


def test_lost_time_adds_up_where_rows_are_faster_than_the_whole_needs() -> None:
    table = [_profile(50, 5, "compute"), _profile(30, 0, "memory")]
    times = StepTimes(forward_ms=80.0, idle_ms=20.0)
    sol = SpeedOfLight(ms=30.0, bound_by="compute", compute_ms=30.0, memory_ms=2.0)
    lost = lost_time(times, table, sol)
    assert sum(item.ms for item in lost) == pytest.approx(100.0 - 30.0)


def test_the_verdict_names_what_takes_most() -> None:
    table = [
        _row(name="convolution", ms=20.0, operators=[product(name="convolution")]),
        _row(
            name="native_batch_norm_backward",
            phase="backward",
            ms=60.0,
            operators=[pointwise("native_batch_norm_backward")],
        ),
    ]
    times = StepTimes(forward_ms=20.0, backward_ms=60.0, idle_ms=20.0)
    said = verdict("memory", times, table, None, 100.0)
    assert said.startswith("memory-bound: 60 % is normalisation, softmax and losses in backward")
    assert "data loading hidden" in said
    assert "20 % between operators" in said


def test_a_step_that_copies_does_not_wait_for_data() -> None:
    said = verdict("data", StepTimes(forward_ms=30.0, transfer_ms=70.0), [], None, 100.0)
    assert said == "copies between host and device: 70 % of the step"


def test_overhead_is_in_small_calls_or_between_them() -> None:
    idle = verdict("overhead", StepTimes(forward_ms=30.0, idle_ms=70.0), [], None, 100.0)
    assert idle == "overhead-bound: nothing is computed in 70 % of the step"
    small = verdict("overhead", StepTimes(forward_ms=95.0, idle_ms=5.0), [], None, 100.0)
    assert "calls weigh more than what they compute" in small


def test_what_binds_is_the_largest_share() -> None:
    table = [_profile(30, 1, "compute"), _profile(40, 1, "memory")]
    assert bound_by(StepTimes(forward_ms=70.0, idle_ms=10.0), table) == "memory"
    assert bound_by(StepTimes(forward_ms=70.0, data_ms=50.0), table) == "data"
    assert bound_by(StepTimes(forward_ms=70.0, idle_ms=50.0), table) == "overhead"


# -- waste ----------------------------------------------------------------------------------------


def test_values_read_one_by_one_are_found_with_what_picks_them() -> None:
    calls = [node("aten::addmm", 0, 1)]
    for i in range(10):
        at = 1 + i * 0.02
        calls += [
            node("aten::select", at, at + 0.005),
            node("aten::item", at + 0.006, at + 0.01, node("aten::_local_scalar_dense", at, at)),
        ]
    found = read_backs(recording(*calls))
    assert found.count == 10
    assert found.ms == pytest.approx(0.19, abs=0.01)


def test_looking_at_the_loss_once_is_no_waste() -> None:
    found = read_backs(recording(node("aten::addmm", 0, 1), node("aten::item", 1, 1.1)))
    assert (found.count, found.ms) == (1, 0.0)


def test_on_a_device_reading_back_costs_what_the_device_waits() -> None:
    calls, runs = [], []
    for i in range(4):
        at = 10.0 * i
        calls += [node("aten::addmm", at, at + 1), node("aten::item", at + 1, at + 6)]
        runs.append(KernelRun(name="gemm", start_ms=at + 2, end_ms=at + 6))
    found = read_backs(recording(*calls, ms=40.0, device=runs))
    assert found.count == 4
    assert found.ms == pytest.approx(3 * 6.0), "from the end of item to the next kernel, thrice"


def test_tiny_calls_are_counted() -> None:
    calls = [node("aten::add", i * 0.01, i * 0.01 + 0.004) for i in range(1000)]
    found = tiny_calls(recording(*calls), 6.0)
    assert found.count == 1000
    assert found.ms == pytest.approx(10.0)


# -- timing ---------------------------------------------------------------------------------------


def _step(ms: float, **fields) -> StepTime:
    parts = {"data": 0.0, "forward": ms, "backward": 0.0, "optimizer": 0.0}
    return StepTime(ms=ms, **{"parts": parts} | fields)


def test_the_stopwatch_gives_every_moment_to_one_part() -> None:
    watch = Stopwatch()
    for part in ("data", "forward", "backward", "forward", "backward", "optimizer"):
        watch.mark(part)
    watch.stop()
    assert set(watch.parts) == {"data", "forward", "backward", "optimizer"}
    assert all(ms >= 0 for ms in watch.parts.values())


def test_parts_of_timed_steps_add_up() -> None:
    def step(mark) -> None:
        mark("data")
        mark("forward")
        sum(range(2000))
        mark("backward")
        sum(range(1000))

    steps = time_steps(step, steps=20, max_seconds=5, first="data")
    assert len(steps) == 20
    assert sum(typical_parts(steps).values()) == pytest.approx(sorted(s.ms for s in steps)[10], 0.3)


@pytest.mark.parametrize(
    ("odd", "cause"),
    [
        (_step(50, collected_ms=39), "garbage collector"),
        (
            _step(50, parts={"data": 42.0, "forward": 8.0, "backward": 0, "optimizer": 0}),
            "its batch",
        ),
        (_step(50, faults=200_000), "pages of memory"),
        (_step(50, switched=7), "7 times"),
        (_step(50), ""),
    ],
)
def test_slow_steps_are_found_with_their_cause(odd: StepTime, cause: str) -> None:
    steps = [_step(10 + 0.01 * (i % 3)) for i in range(30)]
    steps[17] = odd
    found = stability(steps)
    (slow,) = found.outliers
    assert (slow.step, slow.ms) == (17, 50)
    assert cause in slow.cause if cause else slow.cause == ""
    assert found.spread < 0.01


def test_steady_steps_have_no_outliers() -> None:
    assert stability([_step(10 + 0.1 * (i % 7)) for i in range(30)]).outliers == ()


def test_a_recording_nests_calls_and_knows_their_parts() -> None:
    x = torch.zeros(8, 8)

    def step(mark) -> None:
        mark("forward")
        torch.nn.functional.linear(x, x)
        mark("optimizer")
        x.add_(1)

    first, second = record_steps(step, steps=2, first="forward", device="cpu")
    for found in (first, second):
        assert [part for part, _, _ in found.parts][-2:] == ["forward", "optimizer"]
        linear, add = found.roots
        assert (linear.name, linear.part) == ("aten::linear", "forward")
        assert {child.name for child in linear.children} & {"aten::matmul", "aten::addmm"}
        assert (add.name, add.part) == ("aten::add_", "optimizer")
        assert 0 <= linear.start_ms <= linear.end_ms <= add.start_ms <= found.ms


# -- memory ---------------------------------------------------------------------------------------


def _event(name: str, start: int, end: int = 0, size: int = 0) -> memory.RawEvent:
    return memory.RawEvent(name=name, start_ns=start, end_ns=end or start, size=size)


def test_the_fullest_moment_and_what_is_scratch_in_it() -> None:
    events = [
        _event("suanli.memory:begin", 0, 1),
        _event("[memory]", 5, size=100),
        _event("aten::convolution", 10, 30),
        _event("[memory]", 12, size=1000),
        _event("[memory]", 14, size=50),
        _event("[memory]", 25, size=-1000),
        _event("suanli.grad:0:70", 16, 17),
        _event("[memory]", 50, size=-100),
        _event("suanli.grad:1:70", 60, 61),
        _event("suanli.memory:end", 90, 91),
        _event("[memory]", 95, size=5000),
    ]
    found = memory._peak(events, 500)
    assert (found.total, found.gradients, found.workspace) == (1650, 0, 1000)


def test_a_gradient_that_micro_batches_add_to_counts_once() -> None:
    events = [
        _event("suanli.memory:begin", 0, 1),
        _event("suanli.grad:0:70", 5, 6),
        _event("suanli.grad:1:30", 7, 8),
        _event("suanli.grad:0:70", 15, 16),
        _event("[memory]", 20, size=100),
        _event("suanli.memory:end", 90, 91),
    ]
    assert memory._peak(events, 500).gradients == 100


# -- timeline -------------------------------------------------------------------------------------


def test_the_timeline_points_into_the_table() -> None:
    step = recording(
        node("aten::addmm", 0, 1, device_ms=1.0),
        node("aten::copy_", 1, 2, device_ms=0.5),
        device=[KernelRun(name="gemm", start_ms=0.5, end_ms=1.5, stream=7)],
    )
    joined = joining.join(step, [product("a")])
    table = rows.finished(
        rows.grouped([joined]), step_ms=2.0, ceilings=ceilings(), precision="fp32"
    )
    events = trace.timeline(step, joined, table)
    by_name = {event.name: event for event in events}
    assert table[by_name["addmm"].operator].module == "a"
    assert table[by_name["copy"].operator].name == "copy"
    assert (by_name["gemm"].track, by_name["gemm"].lane) == ("device", 0)
    assert by_name["forward"].track == "phase"


def test_very_many_events_are_cut_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_MOST", 5)
    step = recording(*(node("aten::addmm", i, i + 0.1 + 0.05 * i) for i in range(10)))
    joined = joining.join(step, [product(str(i)) for i in range(10)])
    events = trace.timeline(step, joined, [])
    assert len(events) == 5
    assert [e.start_ms for e in events] == sorted(e.start_ms for e in events)


def test_records_go_to_json_and_back() -> None:
    row = replace(_profile(1.0, 0.5, "memory"), fused=("a", "b"))
    assert codec.from_json(OperatorProfile, json.loads(codec.dumps(row))) == row


@pytest.mark.parametrize(
    ("kind", "name"), [(nn.LSTM, "lstm"), (nn.GRU, "gru"), (nn.RNN, "rnn_tanh")]
)
def test_a_recurrent_network_is_one_call_in_inference(
    kind: Callable[..., nn.Module], name: str
) -> None:
    torch.manual_seed(0)
    model, inputs = kind(8, 16, num_layers=2), torch.randn(20, 4, 8)
    with torch.inference_mode():
        expected = model(inputs)[0]
    given: list[torch.Tensor] = []

    def step(mark: Mark) -> None:
        with torch.inference_mode():
            given.append(model(inputs)[0].clone())

    for one in record_steps(step, steps=2, first="forward", device="cpu"):
        calls = [node for node in one.roots if node.name == f"aten::{name}"]
        assert [node.calls for node in calls] == [1]
        assert calls[0].ms > 0
        assert one.roots[-1].name == "aten::clone"  # what comes behind it is recorded again
    assert torch.equal(given[0], expected)
    assert name not in vars(torch._VF)

    def training_step(mark: Mark) -> None:
        model(inputs)[0].sum().backward()

    (one,) = record_steps(training_step, steps=1, first="forward", device="cpu")
    (call,) = (node for node in one.roots if node.name == f"aten::{name}")
    assert call.calls > 10  # its backward pass is counted operator by operator


def test_a_recurrent_network_that_fails_leaves_the_recorder_on() -> None:
    model = nn.LSTM(8, 16)

    def step(mark: Mark) -> None:
        with torch.inference_mode():
            with pytest.raises(RuntimeError):
                torch._VF.lstm(torch.randn(5, 2, 7), (), [], True, 1, 0.0, False, False, False)
            model(torch.randn(5, 2, 8))[0].relu()

    (one,) = record_steps(step, steps=1, first="forward", device="cpu")
    assert one.roots[-1].name == "aten::relu"
