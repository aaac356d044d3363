"""CUDA C++ to machine code without a GPU: figures, messages and limits of the compilers."""

import re
import stat
from pathlib import Path

import pytest

from suanli.base.errors import BadInputError, MissingBackendError, SuanliError
from suanli.kernels.compiled import CompiledKernel
from suanli.kernels.cuda import compile as compiling
from suanli.kernels.cuda import sass, toolkit
from suanli.kernels.cuda.compile import compile_cuda, usage
from suanli.kernels.spec import CudaKernel, Launch, load
from tests.kernel_parts import REFS, ref, simple
from tests.processes import gone

needs_nvcc = pytest.mark.skipif(toolkit.nvcc() is None, reason="needs nvcc (CUDA toolkit)")
needs_nvrtc = pytest.mark.skipif(
    not toolkit.nvrtc_libraries(), reason=f"needs NVRTC: {toolkit.INSTALL}"
)
needs_any = pytest.mark.skipif(
    toolkit.nvcc() is None and not toolkit.nvrtc_libraries(),
    reason=f"needs nvcc or NVRTC: {toolkit.INSTALL}",
)
COPY = "    if (i < n) y[i] = x[i];"


def compiled(kernel: CudaKernel, arch: str = "sm_90", **options: float) -> compiling.CudaCode:
    sizes = kernel.bench_sizes[0]
    config = kernel.default_config(sizes)
    return compile_cuda(kernel, arch, sizes=sizes, config=config, dtype=kernel.dtypes[0], **options)


@needs_any
def test_figures_of_a_kernel() -> None:
    kernel = load(ref("matmul"))
    assert isinstance(kernel, CudaKernel)
    made = compiled(kernel).record
    assert made.arch == "sm_90"
    assert 16 <= made.registers <= 128
    assert made.static_shared_bytes == 2 * 32 * 32 * 4
    assert made.threads == 1024
    assert re.match(r"(nvcc|NVRTC) \d+", made.compiler)


@needs_any
def test_spills_are_counted() -> None:
    many = "".join(f"    float v{k} = x[i + {k} * n];\n" for k in range(96))
    many += "    __syncthreads();\n    float s = 0.0f;\n"
    many += "".join(f"    s += v{k} * v{(k * 7 + 3) % 96};\n" for k in range(96))
    kernel = simple(many + "    y[i] = s;")
    text = kernel.text().replace("__global__", "__global__ __launch_bounds__(1024, 2)")
    made = compiled(simple("", source=text)).record
    assert made.registers <= 32
    assert made.spill_store_bytes > 0 and made.spill_load_bytes > 0 and made.spills


@needs_any
def test_compile_error_names_the_line_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = Path(ref("vector_add")).read_text()
    file.write_text(text.replace("a[i] + b[i]", "a[i] + d[i]"))
    line = 1 + text[: text.index("a[i] + b[i]")].count("\n")
    kernel = load(str(file))
    assert isinstance(kernel, CudaKernel)
    with pytest.raises(BadInputError, match=rf'mine\.py:{line}: identifier "d" is undefined'):
        compiled(kernel)


@needs_nvrtc
def test_nvrtc_gives_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "nvcc", lambda: None)
    made = compiled(simple(COPY))
    assert made.record.compiler.startswith("NVRTC")
    assert made.record.registers > 0
    assert made.code.startswith(b"\x7fELF")
    with pytest.raises(BadInputError, match=r'kernel\.cu:4: identifier "d" is undefined'):
        compiled(simple("    y[i] = d;"))
    half = simple("    y[i] = __half2float(__float2half(x[i]));", head="#include <cuda_fp16.h>")
    assert compiled(half).record.registers > 0
    head = "#include <stdint.h>\n#include <cmath>\n#include <float.h>"
    body = (
        "    uint32_t u = INT32_MAX;\n    y[i] = fminf(x[i] * u, FLT_MAX) < INFINITY ? M_PI : NAN;"
    )
    assert compiled(simple(body, head=head)).record.registers > 0


@needs_nvrtc
def test_old_architectures_go_to_nvrtc() -> None:
    if not any(".so.12" in path.name for path in toolkit.nvrtc_libraries()):
        pytest.skip("needs NVRTC 12 for sm_60: pip install nvidia-cuda-nvrtc-cu12")
    assert compiled(simple(COPY), "sm_60").record.compiler.startswith("NVRTC 12")


def test_unknown_architecture() -> None:
    with pytest.raises(BadInputError, match=r"unknown architecture 'sm_42'.*sm_90"):
        compiled(simple(COPY), "sm_42")


def test_launch_over_the_limit_is_refused_before_compiling() -> None:
    big = simple(COPY, launch=lambda sizes, config: Launch(grid=(1,), block=(2048,)))
    with pytest.raises(BadInputError, match=r"block\.x is 2048"):
        compiled(big)


def test_without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "nvcc", lambda: None)
    monkeypatch.setattr(toolkit, "nvrtc_libraries", lambda: ())
    with pytest.raises(MissingBackendError, match=r"suanli\[kernels\]"):
        compiled(simple(COPY))


def fake_nvcc(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(toolkit, "nvcc", lambda: path)
    monkeypatch.setattr(toolkit, "nvrtc_libraries", lambda: ())
    return path


def test_compiler_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    fake_nvcc(tmp_path, f"sleep 300 & echo $! > {pid}; wait", monkeypatch)
    with pytest.raises(BadInputError, match="took more than 2 s and was ended"):
        compiled(simple(COPY), timeout_s=2.0)  # in which the shell has begun
    assert gone(int(pid.read_text())), "the compiler's child lives on"


def test_compiler_that_crashes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvcc(tmp_path, "echo 'nvcc error: cicc died with status 0xC0000005'; exit 1", monkeypatch)
    with pytest.raises(BadInputError, match="cicc died"):
        compiled(simple(COPY))


def test_what_ptxas_says_is_read() -> None:
    said = (
        "ptxas info    : Compiling entry function 'other' for 'sm_90'\n"
        "ptxas info    : Used 99 registers\n"
        "ptxas info    : Compiling entry function 'mine' for 'sm_90'\n"
        "ptxas info    : Function properties for mine\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, "
        "2048 bytes smem, 356 bytes cmem[0]\n"
    )
    made = usage(CompiledKernel(name="mine", arch="sm_90", compiler="x", registers=0), said)
    assert (made.registers, made.static_shared_bytes, made.stack_bytes) == (40, 2048, 16)
    assert (made.spill_store_bytes, made.spill_load_bytes) == (8, 12)
    with pytest.raises(SuanliError, match='extern "C" __global__'):
        usage(CompiledKernel(name="absent", arch="sm_90", compiler="x", registers=0), said)


LISTING = """
\t.section\t.text.mine,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0040*/                   STS [R9], R4 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/                   LDL R4, [R1] ;
        /*0070*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0080*/                   MUFU.EX2 R5, R5 ;
        /*0090*/                   SHFL.DOWN PT, R6, R5, 0x10, 0x1f ;
        /*00a0*/                   STG.E desc[UR4][R2.64], R5 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   NOP;
\t.section\t.text.other,"ax",@progbits
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
"""


def test_instructions_are_told_apart() -> None:
    mix = sass.parse(LISTING, "mine")
    assert mix is not None
    assert mix.total == 12
    assert (mix.tensor_core, mix.global_loads, mix.wide_loads) == (2, 1, 1)
    assert (mix.global_stores, mix.wide_stores, mix.shared, mix.local) == (1, 0, 1, 1)
    assert (mix.atomics, mix.barriers, mix.shuffles, mix.special) == (1, 1, 1, 1)
    assert sass.parse("") is None


@needs_any
@pytest.mark.skipif(toolkit.disassembler() is None, reason="needs nvdisasm: pip install triton")
def test_tensor_cores_and_wide_loads_show_in_the_machine_code() -> None:
    kernel = load(ref("tensor_core_matmul"))
    assert isinstance(kernel, CudaKernel)
    mix = sass.instruction_mix(compiled(kernel).code, "tensor_core_matmul")
    assert mix is not None and mix.tensor_core > 0
    wide = simple("    ((float4 *)y)[i] = ((const float4 *)x)[i];")
    mix = sass.instruction_mix(compiled(wide).code, "kernel")
    assert mix is not None and mix.wide_loads == 1 and mix.wide_stores == 1
    assert mix.tensor_core == 0


@pytest.mark.slow
@needs_any
@pytest.mark.parametrize("name", sorted(REFS))
@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
def test_every_example_compiles_everywhere(name: str, arch: str) -> None:
    kernel = load(ref(name))
    assert isinstance(kernel, CudaKernel)
    if name == "tensor_core_matmul" and arch in ("sm_60", "sm_61"):
        with pytest.raises(BadInputError):
            compiled(kernel, arch)
        return
    try:
        assert compiled(kernel, arch).record.registers > 0
    except MissingBackendError:
        pytest.skip(f"no compiler here knows {arch}")
