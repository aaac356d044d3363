"""Several cards: collectives, layouts; and the CPU at hand."""

from dataclasses import replace

import pytest

from suanli.base.errors import BadInputError
from suanli.base.hardware import Ceiling, Ceilings, DeviceInfo
from suanli.base.prediction import Link, ParallelLayout
from suanli.base.work import Operator, Work
from suanli.cost.collective_time import Fabric, collective_s, fabric_of
from suanli.cost.cpu_time import predict_cpu_ms
from suanli.cost.parameters import parameters
from suanli.cost.predictor import predict_operators
from suanli.cost.scaling import blocks_of, predict_parallel
from suanli.cost.work_kernels import How
from suanli.devices.catalogue import catalogue

CARDS = {sheet.name: sheet for sheet in catalogue()}
A100 = CARDS["A100 SXM4 80GB"]
LINKS = parameters().links


def block(layer: int, phase: str, tokens: int = 4096, wide: int = 2048) -> list[Operator]:
    found = []
    for n, k in ((3 * wide, wide), (wide, wide), (4 * wide, wide), (wide, 4 * wide)):
        for _ in range(2 if phase == "backward" else 1):
            found.append(
                Operator(
                    name="mm", phase=phase, module=f"h.{layer}.mlp", flops=2 * tokens * n * k,  # type: ignore[arg-type]
                    bytes_read=4 * (tokens * k + n * k), bytes_written=4 * tokens * n,
                    parameter_bytes=4 * n * k if phase == "forward" else 0, matmul=True,
                    input_shapes=((tokens, k), (k, n)), output_shapes=((tokens, n),),
                )
            )  # fmt: skip
    return found


def model(layers: int = 8) -> Work:
    operators = [op for i in range(layers) for op in block(i, "forward")]
    operators += [op for i in reversed(range(layers)) for op in block(i, "backward")]
    held = sum(op.parameter_bytes for op in operators)
    operators.append(
        Operator(name="adam_step", phase="optimizer", flops=held, bytes_read=4 * held,
                 bytes_written=3 * held, parameter_bytes=held)
    )  # fmt: skip
    return Work(
        operators=tuple(operators), batch=4, parameters=held // 4, parameter_bytes=held,
        input_bytes=1, output_bytes=1,
    )  # fmt: skip


WORK = model()


def ms(layout: ParallelLayout, work: Work = WORK) -> float:
    return predict_parallel(work, A100, layout, dtype="bf16").step_ms.p50


def test_blocks_are_found_by_path() -> None:
    blocks = blocks_of(WORK)
    assert blocks.count == 8
    assert blocks.boundary_bytes == 4 * 4096 * 2048


def test_one_card_is_the_plain_prediction() -> None:
    alone = predict_operators(WORK, A100, dtype="bf16").step_ms.p50
    assert ms(ParallelLayout()) == pytest.approx(alone, rel=0.03)


def test_each_way_to_share_shortens_a_step_but_not_for_nothing() -> None:
    whole = ms(ParallelLayout(micro_batches=8))
    shared = {
        "dp": ms(ParallelLayout(dp=4, micro_batches=2)),
        "tp": ms(ParallelLayout(tp=4, micro_batches=8)),
        "pp": ms(ParallelLayout(pp=4, micro_batches=8)),
    }
    for how, time in shared.items():
        assert whole / 4 < time < whole, how


def test_bubbles_shrink_with_micro_batches() -> None:
    def per_batch(count: int) -> float:
        return ms(ParallelLayout(pp=4, micro_batches=count)) / count

    costs = [per_batch(count) for count in (1, 2, 8, 64)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] / costs[-1] == pytest.approx(4, rel=0.15)


def test_recomputing_costs_a_forward_pass() -> None:
    plain, again = ms(ParallelLayout()), ms(ParallelLayout(recompute=True))
    assert 1.2 < again / plain < 1.4


def test_what_is_recomputed_takes_energy_too() -> None:
    plain, again = (
        predict_parallel(WORK, A100, ParallelLayout(recompute=r), dtype="bf16")
        for r in (False, True)
    )
    assert plain.power_w is not None and again.power_w is not None
    # A third more of the same work in a third more time: the draw stays, and the joules grow.
    assert again.power_w == pytest.approx(plain.power_w, rel=0.05)
    assert again.energy_j / plain.energy_j == pytest.approx(1.33, rel=0.05)  # type: ignore[operator]


def test_the_update_is_counted_once_in_power() -> None:
    heavy = replace(WORK.operators[-1], bytes_read=100 * WORK.parameter_bytes)
    work = replace(WORK, operators=(*WORK.operators[:-1], heavy))
    one, many = (
        predict_parallel(work, A100, ParallelLayout(micro_batches=n), dtype="bf16") for n in (1, 64)
    )
    alone = predict_operators(work, A100, dtype="bf16")
    assert one.energy_j == pytest.approx(alone.energy_j, rel=0.05)
    assert many.energy_j < 40 * one.energy_j  # type: ignore[operator]


def test_replicas_under_autocast_exchange_wide_gradients() -> None:
    """Weights are fp32 there, and so are their gradients; Megatron's are narrow."""

    def waits(*, autocast: bool) -> float:
        slow = Fabric(inside=Link(kind="pcie", bytes_per_s=1e8, devices=8))
        layout = ParallelLayout(dp=8)
        how = How(dtype="bf16", autocast=autocast)
        answer = predict_parallel(WORK, A100, layout, dtype="bf16", how=how, fabric=slow)
        return answer.communication_ms

    assert waits(autocast=True) / waits(autocast=False) == pytest.approx(2.0, rel=0.05)


def test_tensor_parallel_groups_split_the_update_once() -> None:
    heavy = replace(WORK.operators[-1], bytes_read=10000 * WORK.parameter_bytes)
    work = replace(WORK, operators=(*WORK.operators[:-1], heavy))
    assert ms(ParallelLayout(), work) / ms(ParallelLayout(tp=4), work) == pytest.approx(4, rel=0.05)


def test_sharded_replicas_talk_more_and_update_less() -> None:
    plain = predict_parallel(WORK, A100, ParallelLayout(dp=8), dtype="bf16")
    sharded = predict_parallel(WORK, A100, ParallelLayout(dp=8, sharded=True), dtype="bf16")
    assert plain.communication_ms > 0
    assert sharded.energy_j is not None and plain.energy_j is not None
    tiny = model(layers=1)
    assert ms(ParallelLayout(dp=8, sharded=True), tiny) > 0


def test_several_servers_need_a_network() -> None:
    layout = ParallelLayout(dp=16)
    with pytest.raises(BadInputError, match="network"):
        ms(layout)
    slow, quick = (
        predict_parallel(
            WORK, A100, layout, dtype="bf16", fabric=fabric_of(A100, network_bytes_per_s=rate)
        ).step_ms.p50
        for rate in (25e9, 200e9)
    )
    assert quick < slow


def test_replicas_of_tensor_parallel_groups_meet_over_the_network() -> None:
    """A group of eight fills a server: two replicas are in two servers, however few they are."""

    def waits(tp: int, rate: float) -> float:
        fabric = fabric_of(A100, network_bytes_per_s=rate)
        layout = ParallelLayout(dp=2, tp=tp)
        answer = predict_parallel(WORK, A100, layout, dtype="bf16", fabric=fabric)
        return answer.communication_ms

    assert waits(8, 2e9) > 2 * waits(8, 200e9)
    assert waits(4, 2e9) == waits(4, 200e9)  # both replicas in one server
    with pytest.raises(BadInputError, match="network"):
        ms(ParallelLayout(dp=2, tp=8))


@pytest.mark.parametrize("tp", [1, 8])
def test_stages_in_several_servers_send_over_the_network(tp: int) -> None:
    layout = ParallelLayout(tp=tp, pp=16 // tp, micro_batches=4)
    slow, quick = (
        predict_parallel(
            WORK, A100, layout, dtype="bf16", fabric=fabric_of(A100, network_bytes_per_s=rate)
        ).communication_ms
        for rate in (1e9, 200e9)
    )
    assert quick < slow


def test_the_limit_counts_one_update_however_many_micro_batches() -> None:
    """Weights and the optimiser's states are moved once a step, by each replica its share."""
    wide = [replace(op, flops=op.flops // 1000) for op in WORK.operators]
    work = replace(WORK, operators=tuple(wide))  # bound by memory
    one, many, sharded = (
        predict_parallel(work, A100, layout, dtype="bf16").sol_ms
        for layout in (
            ParallelLayout(),
            ParallelLayout(micro_batches=64),
            ParallelLayout(dp=8, sharded=True),
        )
    )
    assert many == pytest.approx(one, rel=0.01)
    assert sharded < one / 4
    compute = predict_parallel(WORK, A100, ParallelLayout(micro_batches=64), dtype="bf16").sol_ms
    assert compute >= 64e3 * WORK.matmul_flops / 312e12 * 0.999


def test_intervals_widen_with_the_number_of_cards() -> None:
    one = predict_parallel(WORK, A100, ParallelLayout(), dtype="bf16")
    eight = predict_parallel(WORK, A100, ParallelLayout(dp=8), dtype="bf16")
    assert eight.spread > one.spread


@pytest.mark.parametrize("broken", [{"dp": 0}, {"tp": -1}, {"micro_batches": 0}])
def test_a_layout_of_nothing_is_refused(broken: dict[str, int]) -> None:
    with pytest.raises(BadInputError, match="at least 1"):
        ms(ParallelLayout(**broken))


# Collectives.


def test_a_collective_of_one_is_free() -> None:
    assert collective_s("all_reduce", 1e9, 1, fabric_of(A100), LINKS) == 0.0


def test_collectives_start_flat_and_end_in_proportion() -> None:
    fabric = fabric_of(A100)
    times = [collective_s("all_reduce", size, 8, fabric, LINKS) for size in (1e2, 1e4, 1e8, 1e9)]
    assert times == sorted(times)
    assert times[1] / times[0] < 1.3
    assert times[3] / times[2] == pytest.approx(10, rel=0.15)


def test_an_all_reduce_is_a_scatter_and_a_gather() -> None:
    fabric = fabric_of(A100)
    whole = collective_s("all_reduce", 1e9, 8, fabric, LINKS)
    halves = sum(
        collective_s(kind, 1e9, 8, fabric, LINKS)  # type: ignore[arg-type]
        for kind in ("all_gather", "reduce_scatter")
    )
    assert halves == pytest.approx(whole, rel=0.05)


def test_never_faster_than_the_wire() -> None:
    fabric = fabric_of(A100)
    for size in (1e4, 1e6, 1e9):
        wire = 2 * 7 / 8 * size / fabric.inside.bytes_per_s
        assert collective_s("all_reduce", size, 8, fabric, LINKS) > wire


def test_cards_without_nvlink_meet_over_the_bus() -> None:
    fabric = fabric_of(CARDS["GeForce RTX 4090"])
    assert fabric.inside.kind == "pcie"
    bare = replace(CARDS["GeForce RTX 4090"], pcie_generation=None)
    with pytest.raises(BadInputError, match="no link"):
        fabric_of(bare)


def test_a_measured_link_takes_the_place_of_the_sheets() -> None:
    for name in ("A100 SXM4 80GB", "GeForce RTX 4090"):
        card = CARDS[name]
        slow, quick = (
            fabric_of(replace(card, link_gb_per_s=rate)).inside.bytes_per_s for rate in (10, 20)
        )
        assert quick == pytest.approx(2 * slow) and quick < fabric_of(card).inside.bytes_per_s
    mesh = CARDS["Tesla V100 SXM2 32GB"]  # a copy takes some of its links, collectives all
    assert fabric_of(replace(mesh, link_gb_per_s=10)) == fabric_of(mesh)


def test_cards_that_stand_alone_meet_over_the_network() -> None:
    alone = CARDS["GH200 96GB"]
    assert fabric_of(alone).inside.devices == 1
    with pytest.raises(BadInputError, match="network"):
        collective_s("all_reduce", 1e6, 2, fabric_of(alone), LINKS)
    there = fabric_of(alone, network_bytes_per_s=50e9)
    assert collective_s("all_reduce", 1e9, 2, there, LINKS) > 1e9 / 50e9


# The CPU at hand.


def ceilings(rate: float, bandwidth: float) -> Ceilings:
    device = DeviceInfo(name="cpu", title="a CPU", fingerprint="x", memory_bytes=2**34)
    items = (
        Ceiling(what="matmul", unit="FLOP/s", dtype="fp32", hardware=rate, achieved=0.8 * rate),
        Ceiling(what="read", unit="B/s", hardware=bandwidth, working_set_bytes=2**28),
        Ceiling(what="call_overhead", unit="s", hardware=1e-6),
    )
    return Ceilings(device=device, items=items, threads=2, measured_at="")


def test_the_cpu_follows_its_ceilings() -> None:
    slow = predict_cpu_ms(WORK, ceilings(1e11, 1e10), precision="fp32")
    quick = predict_cpu_ms(WORK, ceilings(2e11, 2e10), precision="fp32")
    assert quick.p50 == pytest.approx(slow.p50 / 2, rel=0.05)
    assert slow.lo90 < slow.p50 < slow.hi90
    least = 1e3 * WORK.matmul_flops / 1e11
    assert slow.p50 > least
