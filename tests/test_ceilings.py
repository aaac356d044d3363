"""Ceilings: the loops, the rates read off their stamps, GPUs on a null device, the cache."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from suanli.base import codec
from suanli.base.compiler import find_compiler
from suanli.base.hardware import Ceiling, Ceilings, GpuInfo
from suanli.devices import CpuDevice, cpu_info, sheet_for
from suanli.devices.null import NullDevice
from suanli.measure import ceilings as module
from suanli.measure import ceilings_cpu, ceilings_cuda, ceilings_torch
from suanli.measure.ceilings import (
    better_of,
    cache_path,
    ceilings,
    measure_ceilings,
    measure_device,
)
from suanli.measure.ceilings_cpu import read_sizes
from suanli.measure.ceilings_cuda import measure_gpu, timed
from suanli.measure.native import (
    ARITHMETIC,
    clock_hz,
    common_rates,
    native_loops,
    possible_loops,
    run_pinned,
    summed_rates,
)
from suanli.measure.native.build import _survivors

MIB = 2**20
AMX = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C compiler here")


@pytest.fixture(scope="module")
def measured() -> Ceilings:
    """The processor's ceilings in a fraction of the usual time."""
    return measure_ceilings("cpu", seconds=4)


class TestLoops:
    def test_every_dtype_gets_its_widest_unit(self) -> None:
        chosen = {loop.dtype: loop.name for loop in possible_loops(AMX, amx_allowed=True)}
        assert chosen == {"fp32": "fp32_vector", "bf16": "bf16_tiles", "int8": "int8_tiles"}

    @pytest.mark.parametrize("allowed", [False, None])
    def test_no_tile_loop_without_permission(self, allowed: bool | None) -> None:
        chosen = {loop.dtype: loop.name for loop in possible_loops(AMX, amx_allowed=allowed)}
        assert chosen == {"fp32": "fp32_vector", "bf16": "bf16_vector", "int8": "int8_vnni"}

    def test_arm_and_unknown_processors(self) -> None:
        arm = {x.dtype: x.name for x in possible_loops(("neon", "neon_dot"), amx_allowed=None)}
        assert arm == {"fp32": "fp32_vector", "int8": "int8_dot"}
        assert [x.dtype for x in possible_loops((), amx_allowed=None)] == ["fp32"]

    @needs_compiler
    def test_all_that_the_features_allow_is_built_and_runs(self) -> None:
        loops = possible_loops(cpu_info().features, amx_allowed=None)
        native, why = native_loops(loop.name for loop in loops)
        assert native is not None, why
        assert native.runnable == {loop.name for loop in loops}

    @needs_compiler
    def test_stamps_grow_and_end_on_time(self) -> None:
        native, why = native_loops(["fp32_vector"])
        assert native is not None, why
        stamps = native.arithmetic("fp32_vector", 10, 0.001)
        assert len(stamps) >= 2
        assert all(b >= a for a, b in itertools.pairwise(stamps))

    @needs_compiler
    def test_copy_loop_copies(self) -> None:
        import numpy as np

        native, why = native_loops([])
        assert native is not None, why
        room = np.zeros(2 * 8192 + 64, dtype=np.uint8)
        start = -room.ctypes.data % 64
        data = room[start : start + 2 * 8192]
        data[:8192] = np.arange(8192) % 251
        native.traffic("copy", data.ctypes.data, 8192, 2048, 0.001)
        assert (data[8192:] == data[:8192]).all()

    @needs_compiler
    def test_instruction_that_is_refused_ends_the_probe_only(self, tmp_path: Path) -> None:
        compiler = find_compiler()
        assert compiler is not None
        source = tmp_path / "bad.c"
        body = "(long a, long b, double c, void *d)"
        source.write_text(
            "#include <signal.h>\n"
            f"long suanli_first{body} {{ return 1; }}\n"
            f"long suanli_refused{body} {{ raise({int(signal.SIGILL)}); return 1; }}\n"
            f"long suanli_last{body} {{ return 1; }}\n"
        )
        library = compiler.build_shared(source)
        assert _survivors(library, ["first", "refused", "last"]) == ["first", "last"]

    def test_clock_is_that_of_a_processor(self) -> None:
        hertz = clock_hz(0.05)
        assert hertz is None or 2e8 < hertz < 1e10

    def test_error_in_one_thread_is_raised_and_nobody_hangs(self) -> None:
        def work(i: int) -> list[float]:
            raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            run_pinned(work, [0, 0])

    def test_every_loop_of_the_table_exists_in_the_source(self) -> None:
        text = (Path(module.__file__).parent / "native" / "loops.c").read_text()
        for loop in ARITHMETIC:
            assert f"({loop.name}," in text, loop.name


class TestRates:
    def test_common_rate_is_the_sum_of_all_threads(self) -> None:
        even = [i * 0.001 for i in range(101)]
        rates = common_rates([even, even], 5.0, 0.01)
        assert rates.best == pytest.approx(2 * 5.0 / 0.001)
        assert rates.spread == pytest.approx(0, abs=1e-9)

    def test_time_in_which_only_one_runs_does_not_count(self) -> None:
        first = [i * 0.001 for i in range(101)]
        late = [0.05 + i * 0.001 for i in range(101)]
        assert common_rates([first, late], 1.0, 0.01).best == pytest.approx(2000, rel=1e-6)

    def test_threads_that_never_ran_together_are_not_added(self) -> None:
        first = [0.0, 0.1, 0.2]
        after = [0.3, 0.4, 0.5]
        assert common_rates([first, after], 1.0, 0.01).best == pytest.approx(4 / 0.5)

    def test_summed_rate_forgets_an_interruption(self) -> None:
        even = [i * 0.001 for i in range(51)]
        stopped = even + [t + 0.5 for t in even[1:]]
        assert summed_rates([stopped, even], 1.0, 0.002).best == pytest.approx(2000, rel=1e-6)

    def test_summed_rate_is_never_read_inside_a_block(self) -> None:
        assert summed_rates([[0.0, 1.0, 3.0]], 1.0, 0.002).best == pytest.approx(1.0)


def _beaten(found: Ceilings) -> list[tuple[Ceiling, float]]:
    """Products from registers that torch is faster than, with its rate."""
    beaten = []
    for item in found.items:
        if item.what != "matmul" or item.how.startswith("no "):
            continue  # computed in fp32, which has a figure of its own
        # Asked again here: on a busy machine the whole measurement may have skipped it.
        reached = ceilings_torch.matmul(str(item.dtype), 0.1)
        assert reached is not None, item.dtype
        assert item.mark == "measured"
        assert item.hardware is not None
        rate = max(item.achieved or 0, reached.rate)
        if item.hardware < rate:
            beaten.append((item, rate))
    return beaten


class TestProcessor:
    def test_items_are_complete_and_dtypes_are_known(self, measured: Ceilings) -> None:
        whats = {item.what for item in measured.items}
        assert whats == {"matmul", "read", "copy", "call_overhead"}
        assert {i.dtype for i in measured.items if i.what == "matmul"} >= {"fp32", "bf16", "fp16"}
        assert measured.threads == cpu_info().usable_cores
        assert all(item.how and item.spread >= 0 for item in measured.items)

    @needs_compiler
    def test_no_library_beats_the_registers(self, measured: Ceilings) -> None:
        found, beaten = measured, _beaten(measured)
        for _ in range(2):  # a busy machine may have kept the loops from their rate
            if beaten:
                found = better_of(found, measure_ceilings("cpu", seconds=4))
                beaten = _beaten(found)
        assert not beaten

    def test_bound_on_reads_never_rises_with_size(self, measured: Ceilings) -> None:
        sizes = [2.0**n for n in range(10, 33)]
        rates = [measured.read_bytes_per_s(size) for size in sizes]
        assert all(rate is not None and rate > 0 for rate in rates)
        assert rates == sorted(rates, key=lambda rate: -(rate or 0))

    def test_survives_json(self, measured: Ceilings) -> None:
        assert codec.loads(Ceilings, codec.dumps(measured)) == measured

    def test_overhead_is_a_time(self, measured: Ceilings) -> None:
        assert 0 < measured.overhead_s() < 1e-3

    def test_torch_keeps_its_threads(self) -> None:
        import torch

        before = torch.get_num_threads()
        with ceilings_torch.threads(before + 1):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before

    def test_dtype_without_an_instruction_is_bound_by_fp32(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = self.derived(monkeypatch, features=("avx2", "fma"))
        assert found["bf16"].hardware == found["fp32"].hardware
        assert "no bf16 unit" in found["bf16"].how

    def test_without_a_compiler_figures_are_derived_and_say_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = self.derived(monkeypatch, features=("avx2", "fma", "avx512f", "avx512_vnni"))
        assert found["fp32"].mark == "derived"
        assert "no C compiler" in found["fp32"].how
        assert found["fp32"].hardware == pytest.approx(3e9 * 64 * found["threads"].hardware)
        assert found["int8"].hardware == pytest.approx(3e9 * 256 * found["threads"].hardware)

    def derived(
        self, monkeypatch: pytest.MonkeyPatch, *, features: tuple[str, ...]
    ) -> dict[str, Ceiling]:
        from dataclasses import replace

        monkeypatch.setattr(ceilings_cpu, "native_loops", lambda names: (None, "no C compiler"))
        monkeypatch.setattr(ceilings_cpu, "clock_hz", lambda: 3e9)
        monkeypatch.setattr(ceilings_cpu, "request_amx", lambda: None)
        cpu = replace(cpu_info(), features=features, memory_available_bytes=64 * MIB)
        items = ceilings_cpu.measure_cpu(cpu, 0.5, lambda _: None)
        reads = [i for i in items if i.what == "read"]
        assert reads and all(i.achieved or i.mark == "derived" for i in reads)
        threads = Ceiling(what="matmul", unit="", hardware=float(cpu.usable_cores))
        return {i.dtype: i for i in items if i.dtype is not None} | {"threads": threads}

    def test_no_compiler_and_no_clock_leaves_what_torch_reaches(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ceilings_cpu, "_clock", lambda: None)
        monkeypatch.setattr(ceilings_cpu, "native_loops", lambda names: (None, "no C compiler"))
        items = ceilings_cpu.measure_cpu(cpu_info(), 0.2, lambda _: None)
        assert all(item.hardware is None for item in items)
        assert {"read", "call_overhead"} <= {item.what for item in items}

    def test_read_sizes_follow_memory_and_threads(self) -> None:
        assert read_sizes(2, 64 * MIB) == [32 * 1024, MIB, 4 * MIB, 16 * MIB]
        assert read_sizes(1, 0) == [16 * 1024]
        many = read_sizes(96, 2**40)
        assert many[0] == 96 * 16 * 1024
        assert all(n % (96 * 1024) == 0 for n in many)
        assert many == sorted(set(many))


def null(name: str, capability: str, *, tick: float = 0.05, links: int | None = 18) -> NullDevice:
    gpu = GpuInfo(
        name=name,
        index=0,
        memory_bytes=16 * MIB,
        compute_capability=capability,
        multiprocessors=100,
        clock_mhz=1500,
        links=links,
    )
    return NullDevice(gpu, tick=lambda _: tick)


def by_dtype(items: list[Ceiling]) -> dict[str, Ceiling]:
    return {item.dtype: item for item in items if item.dtype is not None}


class TestGpu:
    def test_known_card_has_its_sheet_and_the_measured_figure(self) -> None:
        items = measure_gpu(null("NVIDIA H100 80GB HBM3", "9.0"), [], 0.05, lambda _: None)
        bf16 = by_dtype(items)["bf16"]
        assert bf16.mark == "datasheet"
        assert bf16.hardware == bf16.datasheet == pytest.approx(989.5e12)
        # The scripted clock gives every block of one call 50 ms.
        assert bf16.achieved == pytest.approx(2 * 128**3 / 0.05)
        assert set(by_dtype(items)) == {"fp32", "tf32", "bf16", "fp16", "int8", "fp8"}
        assert {i.what for i in items} >= {"copy", "call_overhead", "host_to_device"}

    def test_unknown_card_is_derived_from_its_counts(self) -> None:
        found = by_dtype(measure_gpu(null("Some Card", "8.6"), [], 0.05, lambda _: None))
        assert found["bf16"].mark == "derived"
        assert found["bf16"].hardware == pytest.approx(100 * 1.5e9 * 1024)
        assert found["bf16"].datasheet is None
        assert "fp8" not in found

    def test_old_card_has_no_dtype_that_it_would_emulate(self) -> None:
        found = by_dtype(measure_gpu(null("Tesla V100-SXM2-16GB", "7.0"), [], 0.05, lambda _: None))
        assert set(found) == {"fp32", "fp16"}

    def test_card_of_an_unknown_family_is_measured_only(self) -> None:
        found = by_dtype(measure_gpu(null("Future Card", "42.0"), [], 0.05, lambda _: None))
        assert found["fp16"].hardware is None
        assert found["fp16"].mark == "measured"
        assert found["fp16"].achieved is not None

    def test_product_that_torch_refuses_leaves_the_sheet(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(dtype: str, *_: object) -> None:
            raise RuntimeError(f"no kernel for {dtype}\nlong trace")

        monkeypatch.setattr(ceilings_cuda, "product", refuse)
        found = by_dtype(measure_gpu(null("NVIDIA L4", "8.9"), [], 0.05, lambda _: None))
        assert found["fp16"].hardware == pytest.approx(121e12)
        assert found["fp16"].achieved is None
        assert "no kernel for fp16" in found["fp16"].how and "\n" not in found["fp16"].how

    def test_links_count_one_direction(self) -> None:
        items = measure_gpu(null("NVIDIA H100 80GB HBM3", "9.0"), ["cpu"], 0.05, lambda _: None)
        link = next(item for item in items if item.what == "link")
        assert link.datasheet == 450e9
        alone = measure_gpu(null("NVIDIA L4", "8.9"), [], 0.05, lambda _: None)
        assert not [item for item in alone if item.what == "link"]

    def test_reads_take_memory_only_beyond_the_cache(self) -> None:
        card = null("NVIDIA L4", "8.9")
        bench = ceilings_cuda._Bench(
            device=card,
            gpu=card.gpu,
            sheet=sheet_for("NVIDIA L4"),
            room=0,
            share=1.0,
            progress=lambda _: None,
        )
        cached, mark, _ = ceilings_cuda._read_hardware(bench, 32 * MIB)
        assert (cached, mark) == (100 * 1.5e9 * 64, "derived")
        memory, mark, _ = ceilings_cuda._read_hardware(bench, 256 * MIB)
        assert (memory, mark) == (300e9, "datasheet")

    def test_times_are_device_time_per_call(self) -> None:
        calls = itertools.count()
        card = null("x", "9.0", tick=0.002)
        durations = timed(card, lambda: next(calls), 0.05)
        assert len(durations) >= 5
        assert durations == pytest.approx([0.002 / 5] * len(durations))  # 10 ms blocks of 5 calls
        assert card.synchronized >= 1

    def test_whole_path_for_a_device_at_hand(self) -> None:
        found = measure_device(null("NVIDIA L4", "8.9"), seconds=0.05)
        assert found.device.title == "NVIDIA L4"
        assert found.peak_flops("fp16") == pytest.approx(121e12)
        assert codec.loads(Ceilings, codec.dumps(found)) == found

    @pytest.mark.gpu
    def test_real_card(self) -> None:
        found = measure_ceilings("cuda:0", seconds=25)
        for item in found.items:
            if item.what == "matmul" and item.hardware and item.achieved:
                assert item.achieved <= item.hardware, item
        assert found.peak_flops("fp16")


class TestCache:
    @pytest.fixture(autouse=True)
    def _counted(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SUANLI_CACHE", str(tmp_path / "cache"))
        self.runs = 0
        self.mark = "measured"
        self.spreads: Iterator[float] = iter(())
        self.took, self.asked = 10.0, list[object]()

        def measure(target: CpuDevice, *, seconds: float, **_: object) -> Ceilings:
            self.runs += 1
            self.asked.append(seconds)
            item = Ceiling(
                what="matmul",
                unit="FLOP/s",
                dtype="fp32",
                hardware=float(self.runs),
                spread=next(self.spreads, 0.01),
                mark=self.mark,
                how="no C compiler" if self.mark == "derived" else "loop",
            )
            return Ceilings(
                device=target.info,
                items=(item,),
                threads=2,
                measured_at="now",
                seconds_spent=self.took,
            )

        monkeypatch.setattr(module, "measure_device", measure)

    def test_measured_once_and_again_on_request(self) -> None:
        assert ceilings("cpu") == ceilings("cpu")
        assert self.runs == 1
        assert ceilings("cpu", refresh=True).peak_flops("fp32") == 2
        assert ceilings("cpu").peak_flops("fp32") == 2
        assert self.runs == 2

    def test_wide_spreads_are_measured_again_at_once_and_at_the_next_call(self) -> None:
        self.spreads = iter([0.9, 0.8, 0.7, 0.02])
        assert ceilings("cpu").rounds == 2
        assert ceilings("cpu").rounds == 3
        found = ceilings("cpu")
        assert (found.rounds, found.peak_flops("fp32"), found.items[0].spread) == (4, 4, 0.02)
        assert ceilings("cpu") == found
        assert self.runs == 4

    def test_a_second_round_keeps_to_the_seconds_that_are_promised(self) -> None:
        self.spreads = itertools.repeat(0.9)
        ceilings("cpu")
        assert self.asked == [25, 12.0]  # and three to end what has begun
        self.took = 15.0
        assert ceilings("cpu", refresh=True).rounds == 1
        assert self.asked[2:] == [25]

    def test_a_machine_that_is_always_busy_is_not_measured_for_ever(self) -> None:
        self.spreads = itertools.repeat(0.9)
        for _ in range(9):
            ceilings("cpu")
        assert self.runs == 4

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"device": 3}', "\x00\x01"])
    def test_damaged_file_is_measured_anew_and_replaced(self, text: str) -> None:
        ceilings("cpu")
        path = cache_path(CpuDevice())
        path.write_text(text)
        ceilings("cpu")
        assert self.runs == 2
        assert codec.read(Ceilings, path).peak_flops("fp32") == 2

    def test_other_core_count_is_another_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = cache_path(CpuDevice())
        monkeypatch.setattr(module, "usable_cores", lambda: 97)
        assert cache_path(CpuDevice()) != before

    def test_cache_that_cannot_be_written_is_no_error(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        monkeypatch.setenv("SUANLI_CACHE", str(blocked))
        assert ceilings("cpu").items
        assert ceilings("cpu").items
        assert self.runs == 2

    def test_derived_figures_give_way_once_there_is_a_compiler(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.mark = "derived"
        monkeypatch.setattr(module, "find_compiler", lambda: None)
        ceilings("cpu")
        ceilings("cpu")
        assert self.runs == 1
        monkeypatch.setattr(module, "find_compiler", object)
        self.mark = "measured"
        assert ceilings("cpu").items[0].mark == "measured"
        assert self.runs == 2


def test_of_two_rounds_each_figure_is_the_better_one() -> None:
    def round_of(*items: Ceiling) -> Ceilings:
        return Ceilings(device=CpuDevice().info, items=items, threads=2, measured_at="now")

    def read(rate: float, n_bytes: int) -> Ceiling:
        return Ceiling(what="read", unit="B/s", hardware=rate, working_set_bytes=n_bytes)

    def overhead(seconds: float) -> Ceiling:
        return Ceiling(what="call_overhead", unit="s", achieved=seconds)

    one = round_of(read(10, 64), read(3, 128), overhead(1e-6))
    two = round_of(read(9, 64), read(4, 128), overhead(2e-6), read(2, 256))
    found = module.better_of(one, two)
    assert [item.best for item in found.items] == [10, 4, 1e-6, 2]
    assert found.rounds == 2


def test_what_a_library_reaches_the_hardware_can_do() -> None:
    loop = Ceiling(what="read", unit="B/s", hardware=5.0, spread=0.6, working_set_bytes=64)
    library = ceilings_torch.Achieved(rate=7.0, spread=0.1, how="torch sum")
    found = ceilings_cpu._joined(loop, library)
    assert (found.hardware, found.achieved, found.spread) == (7.0, 7.0, 0.1)
    slower = ceilings_torch.Achieved(rate=4.0, spread=0.1, how="torch sum")
    assert ceilings_cpu._joined(loop, slower).hardware == 5.0


def test_probe_needs_nothing_of_suanli() -> None:
    probe = Path(module.__file__).parent / "native" / "probe.py"
    code = f"import runpy, sys; sys.argv = ['x', 'none']; runpy.run_path({str(probe)!r})"
    code += "; sys.exit(any(name.startswith('suanli') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-S", "-c", code], check=False).returncode == 0
