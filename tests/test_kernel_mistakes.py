"""Mistakes that a run on the CPU could hide, and right kernels that look like mistakes."""

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from suanli.api_kernel import kernel_check
from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError
from suanli.kernels.cuda import acceptance, toolkit
from suanli.kernels.cuda.acceptance import refusals
from suanli.kernels.declaration import Source
from suanli.kernels.spec import CudaKernel, Launch
from tests.kernel_parts import is_named, kinds, only_case, simple, swapped

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
COMPILED = pytest.mark.skipif(
    toolkit.nvcc() is None and not toolkit.nvrtc_libraries(), reason="needs nvcc or NVRTC"
)
STRUCTS = """
struct Big { float a[10]; };
__device__ Big big(float v) { Big b; for (int k = 0; k < 10; k++) b.a[k] = v; return b; }
__device__ float first(Big b) { return b.a[0]; }
__device__ float head(float4 v) { return v.x; }
"""
GROUPS = "#include <cooperative_groups.h>\nnamespace cg = cooperative_groups;"
BARRIER = "    __syncthreads();\n"

# What a function gives back or takes by value goes through shared memory: with a barrier between
# it is right, and without one a race.
EXCHANGES = {
    "a structure that a function returns": (
        "    __shared__ Big s[64];\n    s[threadIdx.x] = big(x[i]);\n",
        "    y[i] = first(s[63 - threadIdx.x]);",
    ),
    "a vector that a function returns": (
        "    __shared__ float4 s[64];\n    s[threadIdx.x] = make_float4(x[i], 0, 0, 0);\n",
        "    y[i] = s[63 - threadIdx.x].x;",
    ),
    "a vector by value": (
        "    __shared__ float4 s[64];\n    s[threadIdx.x] = make_float4(x[i], 1, 2, 3);\n",
        "    y[i] = head(s[63 - threadIdx.x]);",
    ),
    "a pointer": (
        "    __shared__ float s[64];\n    put(s, x[i]);\n",
        "    y[i] = s[63 - threadIdx.x];",
    ),
    "dynamic memory of a function": (
        "    turn()[threadIdx.x] = x[i];\n",
        "    y[i] = turn()[63 - threadIdx.x];",
    ),
}
HELPERS = (
    STRUCTS
    + "__device__ void put(float *s, float v) { s[threadIdx.x] = v; }\n"
    + "__device__ float *turn() { extern __shared__ float t[]; return t; }\n"
)


@pytest.mark.parametrize("what", EXCHANGES)
def test_exchanges_through_functions(what: str) -> None:
    store, load = EXCHANGES[what]
    given: dict[str, Any] = {"head": HELPERS, "reference": swapped, "shared": 256}
    assert only_case(simple(store + BARRIER + load, **given)).reason == ""
    assert "race" in kinds(only_case(simple(store + load, **given)))


def test_a_race_inside_a_function_names_the_call() -> None:
    head = (
        "__device__ void put(float *s, float v) {\n    s[threadIdx.x] = v;\n}\n"
        "__device__ float get(float *s) {\n    return s[63 - threadIdx.x];\n}"
    )
    body = "    __shared__ float s[64];\n    put(s, x[i]);\n    y[i] = get(s);"
    case = only_case(simple(body, head=head, reference=swapped))
    race = next(f for f in case.findings if f.kind == "race")
    assert race.where == "kernel.cu:5"
    assert race.text.startswith("called at line 11, thread")
    assert "(line 2, called at line 10)" in race.text


HIDDEN = {
    "a sum that begins nowhere": "    float sum;\n    for (int k = 0; k < 1; k++) sum += x[i];\n"
    "    y[i] = sum;",
    "an element that nobody set": "    float a[8];\n    a[0] = x[i];\n    y[i] = a[0] + a[3];",
}


@pytest.mark.parametrize("what", HIDDEN)
def test_local_variables_do_not_begin_with_zero(what: str) -> None:
    case = only_case(simple(HIDDEN[what]))
    assert case.status == "rejected"
    assert "64 of 64 values" in case.reason


MISTAKES: dict[str, tuple[str, str, str]] = {
    "a histogram that begins nowhere": (
        "    __shared__ int h[4];\n    atomicAdd(&h[threadIdx.x % 4], 1);\n    __syncthreads();\n"
        "    y[i] = x[i] + (h[threadIdx.x % 4] - 16);",
        "uninitialised-shared",
        "reads h[0], which no thread of the block wrote",
    ),
    "adding to an output that begins nowhere": (
        "    atomicAdd(&y[i], x[i]);",
        "uninitialised-output",
        "reads y[0], an output, before",
    ),
    "an array into the one declared with it": (
        "    __shared__ float a[64], b[64];\n    a[threadIdx.x] = x[i]; b[threadIdx.x] = 0;\n"
        "    __syncthreads();\n    y[i] = a[threadIdx.x + 1] * 0 + x[i];",
        "out-of-bounds",
        "takes index 64 of a, declared as float [64]",
    ),
    "a pointer to another thread's variable": (
        "    __shared__ float *p[64];\n    float v = x[i];\n    p[threadIdx.x] = &v;\n"
        "    __syncthreads();\n    y[i] = *p[63 - threadIdx.x];\n    __syncthreads();",
        "foreign-local",
        "goes through a pointer to a local variable of thread 63",
    ),
    "far beyond an argument": (
        "    y[i] = x[i] + 0 * x[i + 300000];",
        "out-of-bounds",
        "reads x[300000], outside of x",
    ),
    "far before an argument": (
        "    y[i] = x[i] + 0 * x[i - 300000];",
        "out-of-bounds",
        "reads x[-300000], outside of x",
    ),
    "two kinds of shuffle at once": (
        "    float v = x[i];\n    if (threadIdx.x % 32 < 16) v = __shfl_up_sync(~0u, v, 1);\n"
        "    else v = __shfl_xor_sync(~0u, v, 1);\n    y[i] = x[i] + 0 * v;",
        "deadlock",
        "waits for threads that never come",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named(what: str) -> None:
    is_named(*MISTAKES[what])


def test_bytes_of_one_element_by_several_threads_are_no_race() -> None:
    """Packing: four threads write the bytes of one float, and each byte is written once."""
    body = (
        "    unsigned char *to = (unsigned char *)y;\n"
        "    const unsigned char *from = (const unsigned char *)x;\n"
        "    for (int k = 0; k < 4; k++) to[k * 64 + threadIdx.x] = from[k * 64 + threadIdx.x];"
    )
    assert only_case(simple(body)).reason == ""
    twice = body.replace("to[k * 64 + threadIdx.x]", "to[k * 64 + threadIdx.x / 2]")
    assert "race" in kinds(only_case(simple(twice)))


def test_groups_that_match() -> None:
    body = """
    auto tile = cg::tiled_partition<16>(cg::this_thread_block());
    int same = 0;
    bool ok = tile.match_any(threadIdx.x % 2) == (threadIdx.x % 2 ? 0xaaaa : 0x5555);
    ok &= tile.match_all(7, same) == 0xffff && same;
    y[i] = ok ? x[i] : 0;
    """
    assert only_case(simple(body, head=GROUPS)).reason == ""


def bounded(most: str, threads: int = 64) -> CudaKernel:
    source = (
        "#define MOST 32\n"
        f'extern "C" __global__ void __launch_bounds__({most}) kernel('
        "const float *x, float *y, int n) {\n    y[threadIdx.x] = x[threadIdx.x];\n}\n"
    )
    return simple("", source=source, threads=threads)


def test_launch_bounds_hold_for_the_launch() -> None:
    for most in ("64", "MOST * 2, 2"):
        assert only_case(bounded(most)).reason == ""
    with pytest.raises(BadInputError, match=r"kernel\.cu:2: a block of the launch has 64 threads"):
        only_case(bounded("MOST, 1"))


@pytest.mark.parametrize("head", ["template <typename T> __global__", "__global__"])
def test_the_entry_point_must_have_c_linkage(head: str) -> None:
    """A GPU's driver finds no other by its name."""
    name = "T" if "template" in head else "float"
    source = f"{head} void kernel(const {name} *x, {name} *y, int n) {{ y[0] = x[0]; }}\n"
    with pytest.raises(BadInputError, match='kernel is no extern "C" __global__ function'):
        only_case(simple("", source=source))


def test_copies_count_for_the_line_that_makes_them() -> None:
    """A structure is copied by a function of the compiler's own, which has no line here."""
    body = "    __shared__ float4 s[64];\n    s[threadIdx.x] = make_float4(x[i], 0, 0, 0);\n"
    body += "    float4 v = s[63 - threadIdx.x];\n    y[i] = v.x;"
    case = only_case(simple(body, reference=swapped))
    race = next(f for f in case.findings if f.kind == "race")
    assert race.where == "kernel.cu:6" and "wrote (line 5) with" in race.text


def test_what_a_kernel_prints_is_kept() -> None:
    body = '    if (i < 2) printf("x[%d] is fine\\n", i);\n    y[i] = x[i];'
    case = only_case(simple(body))
    assert case.status == "verified"
    assert case.printed == "x[0] is fine\nx[1] is fine\n"
    flood = only_case(
        simple('    for (int k = 0; k < 999; k++) printf("%d ", k);\n    y[i] = x[i];')
    )
    assert flood.status == "verified" and len(flood.printed) == 16384


def test_a_recursion_without_end_fails_and_says_why() -> None:
    head = (
        "__device__ float down(float v, int d) {\n"
        "    volatile float a[64]; a[0] = v;\n"
        "    return d > 0 ? down(a[0], d + 1) + 1 : v;\n}"
    )
    case = only_case(simple("    y[i] = down(x[i], i + 1);", head=head))
    assert case.status == "failed" and "256 KB" in case.reason


def test_a_header_beside_the_source_counts_for_the_build(tmp_path: Path) -> None:
    (tmp_path / "kernel.cu").write_text(
        '#include "scale.cuh"\nextern "C" __global__ void kernel(const float *x, float *y, int n) '
        "{\n    y[threadIdx.x] = SCALE * x[threadIdx.x];\n}\n"
    )
    header = tmp_path / "scale.cuh"
    (tmp_path / "factor.cuh").write_text("#define SCALE 1.0f\n")
    header.write_text('#include "factor.cuh"\n')
    kernel = simple("", source=tmp_path / "kernel.cu")
    assert only_case(kernel).reason == ""
    (tmp_path / "factor.cuh").write_text("#define SCALE 2.0f\n")
    assert only_case(kernel).status == "rejected"


class Parameters(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_float), ("tag", ctypes.c_int))


def test_a_structure_as_an_argument() -> None:
    source = (
        "struct Parameters { float scale; int tag; };\n"
        'extern "C" __global__ void kernel(const float *x, float *y, Parameters p) {\n'
        "    y[threadIdx.x] = p.scale * x[threadIdx.x] * (p.tag == 7);\n}\n"
    )

    def inputs(sizes: Any, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        made = Source(device, seed).normal(sizes["n"], dtype=dtype)
        return {"x": made, "p": Parameters(2.0, 7)}

    kernel = simple(
        "",
        source=source,
        inputs=inputs,
        arguments=("x", "y", "p"),
        reference=lambda given: (2 * given["x"],),
    )
    assert only_case(kernel).reason == ""
    other = replace(
        kernel, source=source.replace("float scale; int tag;", "double scale; int tag;")
    )
    assert "another size or kind" in only_case(other).reason
    number = replace(kernel, arguments=("x", "y", "n"))
    assert "another size or kind" in only_case(number).reason


# -- what NVIDIA's compiler or a card would not take ----------------------------------------------

REFUSED = {
    "a minimum of floats": (
        "    __shared__ float m;\n    if (threadIdx.x == 0) m = 1e30f;\n    __syncthreads();\n"
        "    atomicMin(&m, x[i]);\n    __syncthreads();\n    y[i] = x[i] + 0 * m;",
        "",
        "kernel.cu:7: ",
    ),
    "much static shared memory": (
        "    __shared__ float s[20000];\n    s[threadIdx.x] = x[i];\n    y[i] = s[threadIdx.x];",
        "",
        "shared",
    ),
    "a function of the host": (
        '    y[i] = x[i] + 0 * atoi("3");',
        "#include <stdlib.h>",
        "kernel.cu:4: ",
    ),
}


@COMPILED
@pytest.mark.parametrize("what", REFUSED)
def test_what_only_the_cpu_takes_is_no_kernel(what: str) -> None:
    body, head, text = REFUSED[what]
    kernel = simple(body, head=head)
    assert only_case(kernel).status == "verified"
    (case,), notes = refusals(kernel)
    assert case.status == "failed" and text in case.reason
    assert case.where == "compiled for sm_80" and not notes


@COMPILED
def test_too_many_registers_for_the_block() -> None:
    """1,024 threads of more than 64 registers: compiled well, and no card starts it."""
    body = (
        "    float a[80];\n#pragma unroll\n    for (int k = 0; k < 80; k++) a[k] = x[(i + k) % n];"
    )
    body += "\n    __syncthreads();\n    float sum = 0;\n#pragma unroll\n"
    body += "    for (int k = 0; k < 80; k++) sum += a[k] * a[79 - k] * a[(k * 7) % 80];\n"
    body += "    y[i] = sum;"
    kernel = simple(body, threads=1024, launch=lambda s, c: Launch(grid=(1,), block=(1024,)))
    (case,), _ = refusals(kernel)
    assert "no block fits on sm_80 for its registers: it takes at most 64 registers" in case.reason


def test_without_their_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> Any:
        raise acceptance.MissingBackendError("nvcc or NVRTC", toolkit.INSTALL)

    monkeypatch.setattr(acceptance, "compile_cuda", absent)
    cases, (note,) = refusals(simple("    y[i] = x[i];"))
    assert cases == [] and "none is installed" in note and "pip install" in note


@COMPILED
def test_check_has_both_verdicts(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "examples/kernels/vector_add.py").read_text()
    path = tmp_path / "mine.py"
    path.write_text(
        text.replace("c[i] = a[i] + b[i];", "{ c[i] = a[i] + b[i]; atomicMin(&c[i], c[i]); }")
    )
    if text == path.read_text():
        pytest.fail("the example has changed")
    wrong = kernel_check(str(path), device="cpu")
    assert not wrong.ok
    assert {case.status for case in wrong.cases if case.where.startswith("host")} == {"verified"}
    assert [case.status for case in wrong.cases if case.where.startswith("compiled")] == ["failed"]
