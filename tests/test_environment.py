"""The environment record, and each problem from planted facts with the mend that is said."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from suanli.base.hardware import CpuInfo, GpuInfo
from suanli.measure.environment import environment, machine_title, problems
from suanli.measure.facts import Facts, gather_facts, openmp_runtimes
from suanli.measure.problem_rules import runs_on

CPU = CpuInfo(
    model="Some Processor",
    architecture="x86_64",
    physical_cores=8,
    logical_cores=8,
    usable_cores=8,
    features=("avx2", "avx512f", "amx_tile", "amx_bf16"),
    cache_bytes={},
    memory_bytes=64 * 2**30,
    memory_available_bytes=32 * 2**30,
)
GPU = GpuInfo(
    name="NVIDIA A100-SXM4-80GB", index=0, memory_bytes=80 * 2**30, compute_capability="8.0"
)
SOUND = Facts(
    torch="2.13.0+cpu",
    allowed_cpus=8,
    compiler="gcc",
    amx_allowed=True,
    numpy="2.4.6",
    nncf="3.4.0",
    openmp=("GNU",),
    load_average=0.5,
)
ON_GPU = replace(
    SOUND,
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    torch_sees_gpu=True,
    torch_arches=("sm_75", "sm_80", "sm_90"),
    cudnn=92000,
    driver_cuda="13.0",
    nvml=True,
)


def only(facts: Facts, *, cpu: CpuInfo = CPU, gpus: tuple[GpuInfo, ...] = ()) -> tuple[str, str]:
    """The one problem that these facts have."""
    found = problems(cpu=cpu, gpus=list(gpus), facts=facts)
    assert len(found) == 1, found
    assert found[0].mend
    assert "\n" not in found[0].what + found[0].mend
    return found[0].what, found[0].mend


def test_sound_machines_have_no_problem() -> None:
    assert problems(cpu=CPU, gpus=[], facts=SOUND) == []
    assert problems(cpu=CPU, gpus=[GPU], facts=ON_GPU) == []


class TestTorchAndDriver:
    def test_cpu_build_on_a_gpu_machine(self) -> None:
        what, mend = only(replace(SOUND, driver_cuda="13.1", nvml=True), gpus=(GPU,))
        assert "CPU only" in what
        assert mend.endswith("/whl/cu130")

    def test_cpu_build_on_an_old_card_gets_the_build_that_still_has_it(self) -> None:
        v100 = replace(GPU, name="Tesla V100-SXM2-16GB", compute_capability="7.0")
        _, mend = only(replace(SOUND, driver_cuda="13.1", nvml=True), gpus=(v100,))
        assert mend.endswith("/whl/cu126")

    def test_torch_newer_than_the_driver(self) -> None:
        facts = replace(ON_GPU, torch_sees_gpu=False, torch_arches=(), driver_cuda="12.2")
        what, mend = only(facts, gpus=(GPU,))
        assert "built for CUDA 13.0" in what and "at most 12.2" in what
        assert "cu126" in mend

    def test_hidden_by_the_environment(self) -> None:
        facts = replace(ON_GPU, torch_sees_gpu=False, torch_arches=(), visible_devices="")
        what, mend = only(facts, gpus=(GPU,))
        assert "hidden" in what
        assert mend == "unset CUDA_VISIBLE_DEVICES"

    def test_device_file_without_a_driver(self) -> None:
        facts = replace(
            ON_GPU, torch_sees_gpu=False, torch_arches=(), driver_cuda=None, gpu_nodes=("nvidia0",)
        )
        what, mend = only(facts)
        assert "driver does not answer" in what
        assert "--gpus all" in mend

    def test_other_major_version_of_cuda(self) -> None:
        what, _ = only(replace(ON_GPU, driver_cuda="12.9"), gpus=(GPU,))
        assert "13.0" in what and "12.9" in what

    def test_newer_minor_version_of_cuda_is_fine(self) -> None:
        facts = replace(ON_GPU, torch_cuda="12.8", driver_cuda="12.4")
        assert problems(cpu=CPU, gpus=[GPU], facts=facts) == []

    def test_card_that_torch_was_not_compiled_for(self) -> None:
        v100 = replace(GPU, name="Tesla V100-SXM2-16GB", compute_capability="7.0")
        what, mend = only(ON_GPU, gpus=(v100,))
        assert "capability 7.0" in what and "sm_75" in what
        assert "cu126" in mend

    @pytest.mark.parametrize(
        ("capability", "arches", "runs"),
        [
            ("8.6", ("sm_80",), True),
            ("8.0", ("sm_86",), False),
            ("9.0", ("sm_80",), False),
            ("12.0", ("sm_90", "compute_90"), True),
            ("8.9", ("compute_90",), False),
            ("9.0", ("sm_90a",), True),
            ("10.3", ("sm_100a",), False),
            ("10.3", ("sm_100f",), True),
            ("12.0", ("sm_100", "sm_120"), True),
            ("8.0", ("nonsense",), False),
        ],
    )
    def test_binary_and_ptx_targets(
        self, capability: str, arches: tuple[str, ...], runs: bool
    ) -> None:
        assert runs_on(capability, arches) is runs

    def test_missing_cudnn_and_nvml(self) -> None:
        assert "cuDNN" in only(replace(ON_GPU, cudnn=None), gpus=(GPU,))[0]
        assert only(replace(ON_GPU, nvml=False), gpus=(GPU,))[1] == "pip install nvidia-ml-py"

    def test_broken_and_old_torch(self) -> None:
        what, _ = only(replace(SOUND, torch_error="libcudart.so.13: cannot open"))
        assert "libcudart" in what
        assert "2.9.1" in only(replace(SOUND, torch="2.9.1"))[0]


class TestProcessor:
    def test_matrix_units_that_the_sandbox_forbids(self) -> None:
        what, mend = only(replace(SOUND, amx_allowed=False))
        assert "AMX" in what and "seccomp" in mend

    def test_no_matrix_units_is_no_problem(self) -> None:
        cpu = replace(CPU, features=("avx2",))
        assert problems(cpu=cpu, gpus=[], facts=replace(SOUND, amx_allowed=None)) == []

    def test_more_threads_than_cores(self) -> None:
        assert only(replace(SOUND, omp_threads=16))[1] == "export OMP_NUM_THREADS=8"

    def test_fewer_threads_than_cores(self) -> None:
        what, mend = only(replace(SOUND, omp_threads=1))
        assert "7 of 8 cores stay idle" in what
        assert mend == "unset OMP_NUM_THREADS"

    def test_quota_below_the_cores_that_are_seen(self) -> None:
        cpu = replace(CPU, usable_cores=2)
        what, mend = only(replace(SOUND, cpu_quota=2.5), cpu=cpu)
        assert "2.5 of the 8 cores" in what
        assert "OMP_NUM_THREADS=2" in mend

    def test_several_openmp_runtimes(self) -> None:
        assert "GNU, Intel" in only(replace(SOUND, openmp=("GNU", "Intel")))[0]

    def test_no_compilers(self) -> None:
        assert "suanli[compiler]" in only(replace(SOUND, compiler=None))[1]
        assert "torch.compile" in only(replace(SOUND, cxx=False))[0]

    def test_numpy_that_nncf_cannot_use(self) -> None:
        assert only(replace(SOUND, numpy="2.5.0"))[1] == "pip install 'numpy<2.5'"
        assert problems(cpu=CPU, gpus=[], facts=replace(SOUND, numpy="2.5.0", nncf=None)) == []

    def test_little_memory_and_busy_machine(self) -> None:
        assert "1 GiB" in only(SOUND, cpu=replace(CPU, memory_available_bytes=2**30))[0]
        assert "load 9.0 on 8 cores" in only(replace(SOUND, load_average=9.0))[0]


class TestFacts:
    def test_of_this_machine(self) -> None:
        facts = gather_facts()
        assert facts.torch is not None
        assert facts.allowed_cpus >= 1
        assert not facts.torch_error

    def test_openmp_runtimes_by_their_maker(self, tmp_path: Path) -> None:
        maps = tmp_path / "proc/self/maps"
        maps.parent.mkdir(parents=True)
        lines = (
            "7f r-xp 00 08:01 1 /x/torch/lib/libgomp-24e2ab19.so.1.0.0",
            "7f r-xp 00 08:01 2 /x/sklearn.libs/libgomp-a34b3233.so.1.0.0",
            "7f r-xp 00 08:01 3 /x/lib/libiomp5.so",
            "7f r-xp 00 08:01 4 /x/lib/libc.so.6",
        )
        maps.write_text("\n".join(lines))
        assert openmp_runtimes(tmp_path) == ("GNU", "Intel")
        assert openmp_runtimes(tmp_path / "absent") == ()

    @pytest.mark.parametrize(("text", "threads"), [("4", 4), ("4,2", 4), ("", None), ("x", None)])
    def test_omp_threads(
        self, text: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert gather_facts().omp_threads == threads


class TestEnvironment:
    def test_names_libraries_and_imports_none(self) -> None:
        code = (
            "import sys; from suanli.measure.environment import environment; e = environment();"
            "heavy = {'torch', 'openvino', 'onnxruntime', 'transformers', 'nncf'};"
            "assert 'torch' in e.libraries and 'numpy' in e.libraries, e;"
            "sys.exit(len(heavy & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_is_stable_but_for_the_load(self) -> None:
        assert environment().differences(environment()) == []

    def test_processors_with_the_same_name_are_told_apart(self) -> None:
        plain = replace(CPU, features=("avx2",))
        assert machine_title(CPU, []) != machine_title(plain, [])
        assert machine_title(plain, [GPU, GPU]).endswith("+ 2 x NVIDIA A100-SXM4-80GB")
