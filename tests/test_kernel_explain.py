"""What bounds each example, from the execution of some of its blocks and a card's figures."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError
from suanli.devices import catalogue
from suanli.kernels import explain as explaining
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.cuda.compile import CudaCode
from suanli.kernels.declaration import KernelWork
from suanli.kernels.explain import explain
from suanli.kernels.overlap import pcie_bytes_per_s, simulate
from tests.kernel_parts import ref

H100 = next(sheet for sheet in catalogue() if sheet.name == "H100 SXM5 80GB")
LIMITERS = {
    "vector_add": "memory bandwidth",
    "reduction": "memory bandwidth",
    "transpose_naive": "uncoalesced access",
    "transpose_conflicts": "bank conflicts",
    "transpose_padded": "memory bandwidth",
    "matmul": "shared memory bandwidth",
    "tensor_core_matmul": "cache bandwidth",
    "convolution": "cache bandwidth",
    "softmax": "memory bandwidth",
    "histogram": "atomic contention",
    "stencil": "memory bandwidth",
    "scan": "memory bandwidth",
}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler's answer without the compiler: what is tested here is the rest."""

    def compiled(kernel: Any, arch: str, **options: Any) -> CudaCode:
        launch = kernel.launch_at(options["sizes"], options["config"])
        record = CompiledKernel(
            name=kernel.function,
            arch=arch,
            compiler="none",
            registers=40,
            threads=launch.threads,
            blocks=launch.blocks,
        )
        return CudaCode(record=record, code=b"")

    monkeypatch.setattr(explaining, "compile_cuda", compiled)


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("name", sorted(LIMITERS))
def test_names_the_known_limiter(name: str) -> None:
    made = explain(ref(name), archs=("sm_90",), gpu="H100 SXM5 80GB")
    assert made.limiter is not None, made.notes
    assert made.limiter.name == LIMITERS[name], made.limiter.unit_ms
    if name in ("transpose_naive", "transpose_conflicts", "histogram"):
        assert f"{ref(name).rpartition('/')[2].partition(':')[0]}:" in made.limiter.text


@pytest.mark.usefixtures("no_compiler")
def test_occupancy_and_roofline_of_each_architecture() -> None:
    made = explain(ref("matmul"), archs=("sm_75", "sm_90"))
    turing, hopper = made.archs
    assert turing.occupancy is not None and hopper.occupancy is not None
    assert turing.occupancy.blocks == 1 and turing.occupancy.fraction == 1
    assert hopper.occupancy.blocks == 1 and hopper.occupancy.fraction == 0.5
    assert hopper.occupancy.limited_by == "registers"
    assert "32 registers" in hopper.occupancy.lift
    assert hopper.roofline is not None and hopper.roofline.bound_by == "compute"
    flops, moved = 2 * 1024**3, 3 * 4 * 1024**2
    assert hopper.roofline.arithmetic_intensity == pytest.approx(flops / moved)


@pytest.mark.usefixtures("no_compiler")
def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "_row", partial(_with_shared, explaining._row, 120_000))
    some = explain(ref("matmul"), archs=("sm_75", "sm_90"))
    assert [row.status for row in some.archs] == ["failed", "compiled"]
    assert "does not fit on sm_75: its shared memory must be less" in some.archs[0].reason
    assert "at most 65536 bytes" in some.archs[0].reason
    with pytest.raises(BadInputError, match="does not fit on sm_75"):
        explain(ref("matmul"), archs=("sm_75",))


def _with_shared(row: Any, size: int, function: CompiledKernel, *rest: Any) -> Any:
    return row(replace(function, dynamic_shared_bytes=size), *rest)


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("no_compiler")
def test_the_default_card_has_the_figures_that_are_needed() -> None:
    made = explain(ref("vector_add"))
    assert made.limiter is not None and made.limiter.name == "memory bandwidth"
    assert [overlap.streams for overlap in made.overlap] == [1, 2, 4]
    lacking = explain(ref("vector_add"), gpu="GB200 186GB")
    assert lacking.limiter is None
    assert any("GB200 186GB is not whole" in note for note in lacking.notes)


def test_the_roofline_names_both_ceilings() -> None:
    work = KernelWork(flops=10**9, bytes_read=10**6, bytes_written=0)
    roof = explaining._roofline("sm_90", work, "fp32")
    assert roof is not None
    assert roof.ridge == pytest.approx(roof.flops_per_s / roof.bytes_per_s)
    assert roof.sol_ms == pytest.approx(1e3 * max(1e9 / roof.flops_per_s, 1e6 / roof.bytes_per_s))


def test_unknown_card_and_architecture() -> None:
    with pytest.raises(BadInputError, match="no GPU 'GTX 1'"):
        explain(ref("matmul"), gpu="GTX 1")
    with pytest.raises(BadInputError, match="matmul does not take fp8"):
        explain(ref("matmul"), dtype="fp8")
    with pytest.raises(BadInputError, match="unknown architecture 'sm_1'"):
        explain(ref("matmul"), archs=("sm_1",))


def timeline(streams: int, *, up: float = 8.0, work: float = 8.0, down: float = 8.0) -> Any:
    rate = pcie_bytes_per_s(H100)
    assert rate is not None
    return simulate(
        H100,
        host_to_device_bytes=int(up / 1e3 * rate),
        device_to_host_bytes=int(down / 1e3 * rate),
        kernel_ms=work,
        streams=streams,
        chunks=8,
    )


def test_streams_overlap_copies_and_kernel() -> None:
    one, three = timeline(1), timeline(3)
    assert one.total_ms == pytest.approx(24) == pytest.approx(one.serial_ms)
    # eight chunks of 1 ms through three engines: 8 + 2 steps
    assert three.total_ms == pytest.approx(10)
    assert timeline(8).total_ms == pytest.approx(10)
    assert timeline(2).total_ms < one.total_ms


def test_the_slowest_engine_bounds_the_timeline() -> None:
    made = timeline(4, up=80.0)
    assert made.total_ms == pytest.approx(80 + 1 + 1)


def test_no_engine_and_no_stream_does_two_things_at_once() -> None:
    made = timeline(4, work=3.0, down=5.0)
    for key in ("what", "stream"):
        groups: dict[Any, list[Any]] = {}
        for slot in made.slots:
            groups.setdefault(getattr(slot, key), []).append(slot)
        for slots in groups.values():
            ordered = sorted(slots, key=lambda slot: slot.begin_ms)
            assert all(a.end_ms <= b.begin_ms + 1e-9 for a, b in itertools.pairwise(ordered))


def test_streams_need_a_known_link() -> None:
    with pytest.raises(BadInputError, match="names no PCIe generation"):
        simulate(
            replace(H100, pcie_generation=None),
            host_to_device_bytes=1,
            device_to_host_bytes=1,
            kernel_ms=1,
            streams=1,
        )
