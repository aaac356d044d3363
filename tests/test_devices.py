"""Devices: the processor's facts from planted files, GPUs from planted drivers, the catalogue."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from suanli import devices
from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.hardware import GpuInfo
from suanli.devices import catalogue, cpu_facts, cpu_info, derived_flops, gpu_infos, sheet_for
from suanli.devices.catalogue import read_sheet
from suanli.devices.cgroup import cpu_quota, memory_left, memory_limit
from suanli.devices.cpu import CpuDevice
from suanli.devices.cpu_facts import cache_sizes, parse_cpuinfo, spread_cpus, usable_cores
from suanli.devices.cuda import CudaDevice
from suanli.devices.energy import PackageEnergy
from suanli.devices.gpu_facts import driver_versions
from suanli.devices.null import NullDevice

SKYLAKE = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8124M CPU @ 3.00GHz
flags\t\t: fpu sse2 avx avx2 fma f16c avx512f avx512bw avx512vl

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8124M CPU @ 3.00GHz
flags\t\t: fpu sse2 avx avx2 fma f16c avx512f avx512bw avx512vl
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd40
"""


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


class TestProcessor:
    def test_without_matrix_units(self, tmp_path: Path) -> None:
        info = cpu_info(plant(tmp_path, {"proc/cpuinfo": SKYLAKE}))
        assert info.model.startswith("Intel(R) Xeon(R) Platinum 8124M")
        assert "avx512f" in info.features
        assert not [f for f in info.features if f.startswith("amx") or f == "avx512_vnni"]

    def test_arm_is_named_by_its_part(self) -> None:
        model, features = parse_cpuinfo(GRAVITON)
        assert model == "Arm Neoverse V1"
        assert features == ("neon", "neon_fp16", "neon_dot", "i8mm", "bf16", "sve")

    def test_unknown_arm_part_says_its_numbers(self) -> None:
        model, _ = parse_cpuinfo("CPU implementer : 0x99\nCPU part : 0x123\nFeatures : asimd\n")
        assert model == "Arm processor (implementer 0x99, part 0x123)"

    def test_empty_cpuinfo_is_no_crash(self) -> None:
        assert parse_cpuinfo("") == ("unknown", ())

    def test_no_proc_at_all_is_no_crash(self, tmp_path: Path) -> None:
        info = cpu_info(tmp_path)
        assert info.usable_cores >= 1
        assert info.cache_bytes == {}

    def test_caches_skip_instructions(self, tmp_path: Path) -> None:
        base = "sys/devices/system/cpu/cpu0/cache"
        rows = (("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2048K"))
        for i, (kind, level, size) in enumerate(rows):
            plant(
                tmp_path,
                {
                    f"{base}/index{i}/type": f"{kind}\n",
                    f"{base}/index{i}/level": f"{level}\n",
                    f"{base}/index{i}/size": f"{size}\n",
                },
            )
        assert cache_sizes(tmp_path) == {"L1d": 48 * 1024, "L2": 2 * 2**20}

    def test_threads_go_to_different_cores_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cpu_facts, "allowed_cpus", lambda: [0, 1, 2, 3])
        for cpu, pair in enumerate(["0-1", "0-1", "2-3", "2-3"]):
            plant(
                tmp_path,
                {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": pair},
            )
        assert spread_cpus(2, tmp_path) == [0, 2]
        assert spread_cpus(3, tmp_path) == [0, 2, 1]

    def test_amx_is_not_asked_for_where_there_is_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cpu_facts, "_read", lambda path: SKYLAKE)
        assert devices.request_amx() is None


class TestControlGroups:
    def test_version_2_tightest_of_the_ancestors(self, tmp_path: Path) -> None:
        plant(
            tmp_path,
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/pod/box/memory.max": "4294967296\n",
                "sys/fs/cgroup/pod/box/memory.current": "3221225472\n",
                "sys/fs/cgroup/pod/box/memory.stat": "anon 5\ninactive_file 1073741824\n",
                "sys/fs/cgroup/pod/memory.max": "max\n",
            },
        )
        assert cpu_quota(tmp_path) == 1.5
        assert memory_limit(tmp_path) == 4 * 2**30
        assert memory_left(tmp_path) == 2 * 2**30

    def test_version_2_inside_a_container_where_the_path_is_the_hosts(self, tmp_path: Path) -> None:
        plant(
            tmp_path,
            {
                "proc/self/cgroup": "0::/kubepods/pod1/abc\n",
                "sys/fs/cgroup/cpu.max": "50000 100000",
                "sys/fs/cgroup/memory.max": "1000000000",
            },
        )
        assert cpu_quota(tmp_path) == 0.5
        assert usable_cores(tmp_path) == 1
        assert memory_limit(tmp_path) == 1_000_000_000

    def test_version_1(self, tmp_path: Path) -> None:
        plant(
            tmp_path,
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1073741824",
            },
        )
        assert cpu_quota(tmp_path) == 1.0
        assert memory_limit(tmp_path) == 2**31
        assert memory_left(tmp_path) == 2**30

    def test_no_limits(self, tmp_path: Path) -> None:
        plant(
            tmp_path,
            {
                "proc/self/cgroup": "4:cpu:/\n3:memory:/\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
        )
        assert cpu_quota(tmp_path) is None
        assert memory_limit(tmp_path) is None
        assert memory_left(tmp_path) is None

    def test_memory_is_the_smaller_of_machine_and_group(self, tmp_path: Path) -> None:
        plant(
            tmp_path,
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "123456789\n"},
        )
        info = cpu_info(tmp_path)
        assert info.memory_bytes == 123456789
        assert info.memory_available_bytes <= 123456789


class TestEnergy:
    def test_grows_over_a_wrap_and_sums_packages(self, tmp_path: Path) -> None:
        base = "sys/class/powercap"
        plant(
            tmp_path,
            {
                f"{base}/intel-rapl:0/energy_uj": "900000",
                f"{base}/intel-rapl:0/max_energy_range_uj": "1000000",
                f"{base}/intel-rapl:0:0/energy_uj": "5",
                f"{base}/intel-rapl:1/energy_uj": "0",
            },
        )
        energy = PackageEnergy(tmp_path)
        assert energy.joules() == 0
        plant(
            tmp_path,
            {
                f"{base}/intel-rapl:0/energy_uj": "100000",
                f"{base}/intel-rapl:1/energy_uj": "300000",
            },
        )
        assert energy.joules() == pytest.approx(0.5)

    def test_unreadable_is_none_not_zero(self, tmp_path: Path) -> None:
        assert PackageEnergy(tmp_path).joules() is None
        plant(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": "denied"})
        assert PackageEnergy(tmp_path).joules() is None


class TestCpuDevice:
    def test_fingerprint_changes_with_features_and_not_with_time(self, tmp_path: Path) -> None:
        one = plant(tmp_path / "a", {"proc/cpuinfo": SKYLAKE})
        two = plant(tmp_path / "b", {"proc/cpuinfo": SKYLAKE.replace(" avx512f", "")})
        first = CpuDevice(one).info
        assert first == CpuDevice(one).info
        assert first.fingerprint != CpuDevice(two).info.fingerprint

    def test_events_measure_and_refuse_what_was_not_recorded(self) -> None:
        cpu = CpuDevice()
        start, end = cpu.event(), cpu.event()
        start.record()
        with pytest.raises(ValueError, match="recorded"):
            end.seconds_since(start)
        end.record()
        assert end.seconds_since(start) >= 0

    def test_memory_is_this_process(self) -> None:
        use = CpuDevice().memory()
        assert 0 < use.used <= use.peak <= use.total

    def test_unknown_device_names_those_that_are_here(self) -> None:
        with pytest.raises(BadInputError, match="cpu"):
            devices.device("tpu")
        with pytest.raises(BadInputError, match="devices here"):
            devices.device("cuda:97")

    def test_importing_the_layer_costs_no_torch(self) -> None:
        code = "import sys, suanli.devices; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class FakeNvml:
    """A driver with two cards; `broken` names calls that this card or driver cannot answer."""

    NVML_CLOCK_SM = 1

    def __init__(self, *, broken: tuple[str, ...] = (), init_fails: bool = False) -> None:
        self._broken = broken
        self._init_fails = init_fails
        self.open = 0

    def nvmlInit(self) -> None:
        if self._init_fails:
            raise RuntimeError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def __getattr__(self, name: str) -> Any:
        if name in self._broken:
            return self._refuse
        answers = {
            "nvmlSystemGetDriverVersion": lambda: b"535.104.05",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: 12020,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": lambda uuid: int(uuid[-1]),
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=(handle + 1) * 2**30),
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 0),
            "nvmlDeviceGetPowerManagementLimit": lambda handle: 400_000,
            "nvmlDeviceGetName": lambda handle: f"card {handle}",
            "nvmlDeviceGetNumGpuCores": lambda handle: 6912,
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: 1410,
            "nvmlDeviceGetNvLinkState": lambda handle, link: int(link < 12),
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 2500 + handle,
            "nvmlDeviceGetPowerUsage": lambda handle: 71_500,
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError("Not Supported")


def fake_torch(*uuids: str, available: bool = True) -> Any:
    cards = [
        SimpleNamespace(
            name=f"torch card {uuid}",
            total_memory=7,
            major=8,
            minor=0,
            multi_processor_count=108,
            uuid=uuid,
        )
        for uuid in uuids
    ]
    cuda = SimpleNamespace(
        is_available=lambda: available,
        device_count=lambda: len(cards),
        get_device_properties=lambda index: cards[index],
    )
    return SimpleNamespace(cuda=cuda)


class TestGpus:
    def test_no_driver_is_an_empty_list(self) -> None:
        nvml = FakeNvml(init_fails=True)
        assert gpu_infos(nvml=nvml, torch=fake_torch(available=False)) == []
        assert nvml.open == 0

    def test_driver_alone(self) -> None:
        nvml = FakeNvml()
        gpus = gpu_infos(nvml=nvml, use_torch=False)
        assert [gpu.name for gpu in gpus] == ["card 0", "card 1"]
        assert gpus[0].multiprocessors == 108  # 6912 lanes / 64
        assert gpus[0].driver == "535.104.05"
        assert gpus[0].links == 12
        assert gpus[0].power_limit_w == 400
        assert nvml.open == 0

    def test_torch_order_wins_and_hidden_cards_are_left_out(self) -> None:
        gpus = gpu_infos(nvml=FakeNvml(), torch=fake_torch("1"))
        assert [(gpu.name, gpu.index) for gpu in gpus] == [("card 1", 0)]
        assert gpus[0].memory_bytes == 2 * 2**30

    def test_torch_without_a_driver_binding(self) -> None:
        gpus = gpu_infos(nvml=FakeNvml(init_fails=True), torch=fake_torch("0"))
        assert gpus[0].name == "torch card 0"
        assert gpus[0].driver is None

    @pytest.mark.parametrize(
        "call",
        [
            "nvmlDeviceGetNvLinkState",
            "nvmlDeviceGetPowerManagementLimit",
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetNumGpuCores",
            "nvmlDeviceGetUUID",
            "nvmlSystemGetDriverVersion",
            "nvmlDeviceGetCudaComputeCapability",
        ],
    )
    def test_a_figure_that_cannot_be_read_is_none(self, call: str) -> None:
        gpus = gpu_infos(nvml=FakeNvml(broken=(call,)), use_torch=False)
        assert len(gpus) == 2

    def test_driver_says_the_newest_cuda(self) -> None:
        assert driver_versions(FakeNvml()) == ("535.104.05", "12.2")
        assert driver_versions(FakeNvml(init_fails=True)) == (None, None)

    def test_energy_and_power_are_found_by_uuid(self) -> None:
        gpu = GpuInfo(name="x", index=0, memory_bytes=1, uuid="GPU-1")
        cuda = CudaDevice(gpu, torch=fake_torch("1"), nvml=FakeNvml())
        assert cuda.energy_j() == pytest.approx(2.501)
        assert cuda.power_w() == 71.5
        old = FakeNvml(broken=("nvmlDeviceGetTotalEnergyConsumption",))
        assert CudaDevice(gpu, torch=fake_torch("1"), nvml=old).energy_j() is None

    def test_null_device_keeps_its_own_time_and_memory(self) -> None:
        gpu = GpuInfo(name="NVIDIA L4", index=3, memory_bytes=100, compute_capability="8.9")
        null = NullDevice(gpu, tick=lambda n: 0.25 * (n + 1))
        first, second = null.event(), null.event()
        first.record()
        null.advance(1.0)
        second.record()
        assert second.seconds_since(first) == 1.5
        null.allocate(60)
        null.allocate(-20)
        assert (null.memory().used, null.memory().peak, null.memory().total) == (40, 60, 100)
        assert null.info.name == "cuda:3"


class TestCatalogue:
    def flops(self, name: str, dtype: str) -> float:
        sheet = sheet_for(name)
        assert sheet is not None, name
        rate = sheet.flops(dtype)
        assert rate is not None, (name, dtype)
        return rate / 1e12

    def test_rates_are_dense(self) -> None:
        assert self.flops("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(989, abs=1)
        assert self.flops("NVIDIA H100 80GB HBM3", "tf32") == pytest.approx(495, abs=1)
        assert self.flops("NVIDIA L4", "fp16") == pytest.approx(121, abs=1)
        assert self.flops("NVIDIA GeForce RTX 4090", "fp16") == pytest.approx(165, abs=1)

    def test_bandwidth_and_memory_traps(self) -> None:
        l4, a10 = sheet_for("NVIDIA L4"), sheet_for("NVIDIA A10")
        assert l4 is not None and l4.memory_bytes_per_s == 300e9
        assert a10 is not None and a10.memory_gb == 24

    def test_only_whole_names_match(self) -> None:
        a10, a10g = sheet_for("NVIDIA A10"), sheet_for("NVIDIA A10G")
        assert a10 is not None and a10g is not None and a10.name != a10g.name
        assert sheet_for("NVIDIA GeForce RTX 4090 Laptop GPU") is None
        ti, plain = (sheet_for(f"NVIDIA GeForce RTX 3090{s}") for s in (" Ti", ""))
        assert ti is not None and plain is not None and ti.name != plain.name
        assert sheet_for("NVIDIA A100-SXM4-80GB MIG 1g.10gb") is None

    def test_older_drivers_leave_the_maker_out(self) -> None:
        assert sheet_for("A100-SXM4-80GB") is sheet_for("NVIDIA  A100-SXM4-80GB")

    def test_every_sheet_is_plausible_and_sourced(self) -> None:
        names = [name for sheet in catalogue() for name in sheet.nvml_names]
        assert len(catalogue()) >= 45
        assert len(names) == len(set(names))
        for sheet in catalogue():
            assert sheet.sources, sheet.name
            rates = sheet.dense_tflops
            assert rates and all(0 < rate < 20000 for rate in rates.values())
            if "bf16" in rates and "tf32" in rates:
                assert rates["tf32"] == pytest.approx(rates["bf16"] / 2, rel=0.02), sheet.name
            if "bf16" in rates and "int8" in rates:
                assert 2 <= rates["int8"] / rates["bf16"] + 0.05 <= 4.1, sheet.name

    def test_derived_rates_bound_the_sheets(self) -> None:
        boost = {"H100 SXM5 80GB": 1980, "A100 SXM4 80GB": 1410, "Tesla T4": 1590, "L4": 2040}
        for sheet in catalogue():
            if sheet.name not in boost:
                continue
            assert sheet.multiprocessors is not None
            for dtype, tflops in sheet.dense_tflops.items():
                rate = derived_flops(
                    sheet.compute_capability, sheet.multiprocessors, boost[sheet.name], dtype
                )
                assert rate is not None, (sheet.name, dtype)
                assert 0.98 <= rate / 1e12 / tflops <= 1.1, (sheet.name, dtype)

    def test_unknown_families_are_none_and_newer_minors_follow_their_family(self) -> None:
        assert derived_flops("99.0", 100, 1000, "bf16") is None
        assert derived_flops("7.0", 80, 1530, "bf16") is None
        assert derived_flops("12.1", 48, 2400, "bf16") == derived_flops("12.0", 48, 2400, "bf16")

    def test_damaged_sheet_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "card.toml"
        path.write_text("name = ")
        with pytest.raises(ArtefactError, match=r"card\.toml"):
            read_sheet(path)
        path.write_text('name = "x"\n')
        with pytest.raises(ArtefactError, match=r"card\.toml"):
            read_sheet(path)
