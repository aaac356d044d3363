"""CUDA C++ executed on the CPU: what is right passes, what is planted is found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError
from suanli.kernels.cuda import checking
from suanli.kernels.cuda.checking import check_cuda
from suanli.kernels.declaration import Source
from suanli.kernels.spec import Launch, load
from tests.kernel_parts import REFS, kinds, only_case, ref, simple, swapped

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("name", sorted(REFS))
def test_examples_are_right(name: str) -> None:
    kernel = load(ref(name))
    cases = check_cuda(kernel)  # type: ignore[arg-type]
    assert len(cases) >= 2
    assert [case.reason for case in cases if case.status != "verified"] == []
    assert all(case.error_share is not None and case.error_share <= 1 for case in cases)


def broken(name: str, old: str, new: str):
    """An example with one change in its source."""
    kernel = load(ref(name))
    text = kernel.text()  # type: ignore[union-attr]
    assert old in text
    return replace(kernel, source=text.replace(old, new))  # type: ignore[type-var]


FAULTS = [
    ("matmul", "        __syncthreads();\n    }\n    if", "    }\n    if", {"race"}),
    ("softmax", "= value;\n    __syncthreads();", "= value;", {"race"}),
    ("histogram", "atomicAdd(&local[values[i] & 255], 1)", "local[values[i] & 255] += 1", {"race"}),
    ("reduction", "atomicAdd(total, sum)", "*total += sum", {"race"}),
    ("vector_add", "if (i < n)", "if (i <= n)", {"out-of-bounds"}),
    ("stencil", "row >= height", "row > height", {"out-of-bounds"}),
    ("convolution", "s >= width", "s > width", set()),
    ("vector_add", "if (i < n)", "if (i < n - 1)", {"unwritten"}),
    ("scan", "if (i < columns) y", "if (begin == 0 && i < columns) y", {"unwritten"}),
    (
        "transpose_padded",
        "out[other * rows + row] = tile[threadIdx.x]",
        "out[other * rows + row] = tile[31 - threadIdx.x]",
        set(),
    ),
]


@pytest.mark.parametrize(("name", "old", "new", "expected"), FAULTS)
def test_planted_faults_are_found(name: str, old: str, new: str, expected: set[str]) -> None:
    cases = check_cuda(broken(name, old, new))
    rejected = [case for case in cases if case.status == "rejected"]
    assert rejected
    assert set().union(*map(kinds, rejected)) >= expected
    assert all(case.reason for case in rejected)


def test_missing_barrier_names_both_lines() -> None:
    body = (
        "    __shared__ float s[64];\n    s[threadIdx.x] = x[i];\n    y[i] = s[63 - threadIdx.x];"
    )
    case = only_case(simple(body, reference=swapped))
    assert case.status == "rejected"
    race = next(f for f in case.findings if f.kind == "race")
    assert race.where == "kernel.cu:6"
    assert "line 5" in race.text and "__syncthreads()" in race.text


def test_barrier_mends_it() -> None:
    body = (
        "    __shared__ float s[64];\n    s[threadIdx.x] = x[i];\n    __syncthreads();\n"
        "    y[i] = s[63 - threadIdx.x];"
    )
    assert only_case(simple(body, reference=swapped)).status == "verified"


def test_syncwarp_orders_a_warp_and_no_more() -> None:
    body = (
        "    __shared__ float s[64];\n    s[threadIdx.x] = x[i];\n    __syncwarp();\n"
        "    y[i] = s[threadIdx.x ^ OTHER];"
    )
    within = simple(
        body.replace("OTHER", "31"),
        reference=lambda inputs: (inputs["x"].reshape(2, 32).flip(1).reshape(-1),),
    )
    assert only_case(within).status == "verified"
    across = simple(body.replace("OTHER", "63"), reference=swapped)
    assert "race" in kinds(only_case(across))


def test_shuffle_does_not_order_memory() -> None:
    body = (
        "    __shared__ float s[64];\n    s[threadIdx.x] = x[i];\n"
        "    __shfl_sync(0xffffffff, 1, 0);\n    y[i] = s[threadIdx.x ^ 1];"
    )
    assert "race" in kinds(only_case(simple(body)))


def test_divergent_barrier_and_exit_before_it() -> None:
    divergent = "    if (threadIdx.x < 32) __syncthreads(); else __syncthreads();\n    y[i] = x[i];"
    assert kinds(only_case(simple(divergent))) == {"divergent-barrier"}
    left = "    y[i] = x[i];\n    if (threadIdx.x > 40) return;\n    __syncthreads();"
    assert kinds(only_case(simple(left))) == {"barrier-after-exit"}


def test_deadlock_is_named() -> None:
    body = (
        "    y[i] = x[i];\n    if (threadIdx.x == 3) __syncthreads();\n"
        "    else __shfl_sync(0xffffffff, 1, 0);"
    )
    case = only_case(simple(body))
    assert "deadlock" in kinds(case)
    assert "never come" in next(f.text for f in case.findings if f.kind == "deadlock")


def test_endless_loop_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    build = checking.build

    def without_limit(*given: Any, timeout_s: float) -> Any:
        return build(*given)  # the limit is the launch's: a busy machine builds for longer

    monkeypatch.setattr(checking, "build", without_limit)
    body = "    volatile int wait = 1;\n    while (wait) {}\n    y[i] = x[i];"
    case = only_case(simple(body), timeout_s=2.0)
    assert case.status == "failed"
    assert "did not end within 2 s" in case.reason


def test_far_write_ends_the_launch_and_not_this_process() -> None:
    case = only_case(simple("    y[i] = x[i];\n    if (i == 5) y[1 << 28] = 1.0f;"))
    assert case.status == "rejected"
    assert "out-of-bounds" in kinds(case)
    assert "thread 5 of block 0" in case.reason


def test_out_of_bounds_read_is_found_though_it_harms_nothing() -> None:
    case = only_case(
        simple("    float next = x[i + 1];\n    y[i] = next * 0.0f == 0 ? x[i] : x[i];")
    )
    assert kinds(case) == {"out-of-bounds"}
    assert "reads x[64]" in case.reason


def test_input_may_not_be_written() -> None:
    case = only_case(simple("    y[i] = x[i];\n    ((float *)x)[i] = 0.0f;"))
    assert "input-written" in kinds(case)


def test_reading_what_nobody_wrote() -> None:
    shared = (
        "    __shared__ float s[64];\n    float v = s[threadIdx.x];\n"
        "    y[i] = v == 1.0f ? 0.0f : x[i];"
    )
    assert kinds(only_case(simple(shared))) == {"uninitialised-shared"}
    output = "    float v = y[i];\n    y[i] = v == 1.0f ? 0.0f : x[i];"
    assert kinds(only_case(simple(output))) == {"uninitialised-output"}


def test_races_between_blocks_and_the_fence_that_orders_them() -> None:
    plain = "    y[i] = x[i];\n    y[0] = x[i];"
    assert "race" in kinds(only_case(simple(plain, blocks=2)))
    # the last block to arrive, by an atomic ticket behind a fence, may read what all others wrote
    last = """
    y[i] = x[i];
    __threadfence();
    __syncthreads();
    __shared__ bool last;
    if (threadIdx.x == 0) last = atomicAdd(&arrived, 1) == gridDim.x - 1;
    __syncthreads();
    if (last && threadIdx.x == 0)
        for (int k = 0; k < n; k++) y[k] = 2.0f * y[k];
    """
    doubled = simple(
        last,
        blocks=3,
        head="__device__ int arrived = 0;",
        reference=lambda inputs: (2 * inputs["x"],),
    )
    assert only_case(doubled).status == "verified"
    early = replace(doubled, source=doubled.text().replace("__syncthreads();", "", 1))
    assert "race" in kinds(only_case(early))
    unfenced = replace(doubled, source=doubled.text().replace("__threadfence();", ""))
    assert "race" in kinds(only_case(unfenced))


def test_dynamic_shared_memory_and_its_end() -> None:
    body = (
        "    extern __shared__ float s[];\n    s[threadIdx.x] = x[i];\n    __syncthreads();\n"
        "    y[i] = s[63 - threadIdx.x];"
    )
    assert only_case(simple(body, shared=256, reference=swapped)).status == "verified"
    small = only_case(simple(body, shared=128, reference=swapped))
    assert "out-of-bounds" in kinds(small)
    assert "dynamic shared memory" in small.reason


def test_warp_operations() -> None:
    body = """
    unsigned full = 0xffffffff;
    int lane = threadIdx.x % 32;
    int ok = __ballot_sync(full, lane % 2) == 0xaaaaaaaa;
    ok &= __any_sync(full, lane == 7) && !__all_sync(full, lane == 7);
    ok &= __shfl_sync(full, lane, 5) == 5 && __shfl_xor_sync(full, lane, 3) == (lane ^ 3);
    ok &= __shfl_up_sync(full, lane, 2) == (lane < 2 ? lane : lane - 2);
    ok &= __shfl_down_sync(full, lane, 4, 8) == (lane % 8 < 4 ? lane + 4 : lane);
    ok &= __reduce_add_sync(full, lane) == 496 && __reduce_max_sync(full, lane) == 31;
    ok &= __match_any_sync(full, lane / 4) == 15u << (lane / 4 * 4);
    ok &= __popc(255) == 8 && __clz(1) == 31 && __ffs(8) == 4 && __brev(1) == 0x80000000;
    ok &= __syncthreads_count(lane < 3) == 6 && __syncthreads_or(lane == 1);
    y[i] = ok ? x[i] : -1.0f;
    """
    assert only_case(simple(body)).status == "verified"


def test_lanes_outside_a_mask() -> None:
    case = only_case(simple("    y[i] = __shfl_sync(0x0000ffff, x[i], threadIdx.x);"))
    assert {"lane-outside-mask"} <= kinds(case)


def test_fp16_overflow_is_found() -> None:
    def inputs(sizes, dtype, device, seed):
        return {"x": Source(device, seed).uniform(sizes["n"], dtype=dtype) + 60}

    body = (
        "    __half sum = __float2half(0.0f);\n"
        "    for (int k = 0; k < n; k++) sum = SUM;\n"
        "    y[i] = __half2float(sum) / n;"
    )
    kernel = simple(
        body.replace("SUM", "sum + __float2half(x[k] * 100.0f)"),
        head="#include <cuda_fp16.h>",
        inputs=inputs,
        reference=lambda given: ((100 * given["x"]).mean().expand(64).clone(),),
        roundings=64,
    )
    case = only_case(kernel)
    assert case.status == "rejected"
    assert "it is inf" in case.reason


def test_half_conversions_equal_torch() -> None:
    head = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>"
    values = torch.cat(
        [
            torch.logspace(-9, 6, 2000),
            -torch.logspace(-9, 6, 2000),
            torch.tensor([0.0, 65504.0, 65519.9, 65520.0, 2049.0, 2051.0, 5.96e-8, 2.9e-8]),
        ]
    )
    for small, convert, dtype in (
        ("__half", "__half2float(__float2half(x[i]))", torch.float16),
        ("__nv_bfloat16", "__bfloat162float(__float2bfloat16(x[i]))", torch.bfloat16),
    ):
        kernel = simple(
            f"    if (i < n) y[i] = {convert}; // {small}",
            head=head,
            blocks=63,
            inputs=lambda *_: {"x": values.clone()},
            check_sizes=({"n": len(values)},),
            bench_sizes=({"n": len(values)},),
            reference=lambda given, d=dtype: (values.to(d).to(given["x"].dtype),),
        )
        case = only_case(kernel)
        assert case.status == "verified", case.reason
        assert case.max_abs_error == 0


MMA = r"""
#include <cuda_fp16.h>
extern "C" __global__ void kernel(const __half *a, const __half *b, float *c, int n) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    unsigned ra[4], rb[2];
    for (int r = 0; r < 4; r++)
        ra[r] = *(const unsigned *)(a + (g + 8 * (r % 2)) * 16 + 2 * t + 8 * (r / 2));
    for (int r = 0; r < 2; r++)
        rb[r] = *(const unsigned *)(b + g * 16 + 2 * t + 8 * r);
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    asm volatile("NAME "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "r"(rb[0]), "r"(rb[1]));
    for (int k = 0; k < 4; k++) c[(g + 8 * (k / 2)) * 8 + 2 * t + k % 2] = d[k];
}
"""


def mma_kernel(name: str):
    def inputs(sizes, dtype, device, seed):
        source = Source(device, seed)
        a, b = source.normal(16, 16, dtype=dtype), source.normal(8, 16, dtype=dtype)
        return {"a": a, "b": b}

    return simple(
        "",
        source=MMA.replace("NAME", name),
        inputs=inputs,
        outputs=lambda sizes, dtype: {"c": ((16, 8), torch.float32)},
        arguments=("a", "b", "c", "n"),
        reference=lambda given: (given["a"].double() @ given["b"].double().T,),
        launch=lambda sizes, config: Launch(grid=(1,), block=(32,)),
        dtypes=("fp16",),
        depth=lambda sizes: 16,
    )


def test_mma_sync_is_emulated() -> None:
    case = only_case(mma_kernel("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"))
    assert case.status == "verified", case.reason


def test_other_matrix_instructions_are_refused_with_a_reason() -> None:
    case = only_case(mma_kernel("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"))
    assert case.status == "refused"
    assert "wgmma" in case.reason and "kernel.cu:11" in case.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("other<<<1, 32>>>(x);", "launches kernels"),
        ("float v = tex1D<float>(0, 1.0f);", "texture"),
        ("__pipeline_memcpy_async(y, x, 4);", "asynchronous copies"),
    ],
)
def test_what_has_no_equal_is_refused(line: str, reason: str) -> None:
    case = only_case(simple(f"    y[i] = x[i];\n    {line}"))
    assert case.status == "refused"
    assert reason in case.reason and "kernel.cu:5" in case.reason


def test_uncoalesced_and_bank_conflicts_are_flagged() -> None:
    body = (
        "    __shared__ float s[2048];\n"
        "    for (int k = 0; k < 32; k++) s[threadIdx.x * 32 + k] = x[i];\n"
        "    y[i] = s[threadIdx.x * 32];\n"
    )
    case = only_case(simple(body))
    assert case.status == "verified"
    flagged = {f.kind: f for f in case.findings}
    assert flagged["bank-conflict"].factor == 32
    strided = simple(
        "    y[i] = x[i * 8 % n];", reference=lambda g: (g["x"][torch.arange(64) * 8 % 64],)
    )
    case = only_case(strided)
    assert next(f.factor for f in case.findings if f.kind == "uncoalesced") == 8.0


def test_compile_error_names_the_line_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = Path(ref("vector_add")).read_text()
    file.write_text(text.replace("c[i] = a[i] + b[i];", "c[i] = a[i] + d[i];"))
    line = 1 + text[: text.index("c[i] = a")].count("\n")
    with pytest.raises(BadInputError, match=rf"mine\.py:{line}: .*'d' was not declared"):
        check_cuda(load(str(file)))  # type: ignore[arg-type]


def test_wrong_number_of_arguments() -> None:
    with pytest.raises(BadInputError, match="does not take the 2 arguments"):
        check_cuda(simple("    y[i] = x[i];", arguments=("x", "y")))
