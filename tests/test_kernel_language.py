"""What of CUDA C++ the execution on the CPU knows, and what it finds wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError, SuanliError
from suanli.kernels.cuda import host_build
from suanli.kernels.cuda.host_build import build
from suanli.kernels.cuda.shared_variables import plain_name, shared_variables
from suanli.kernels.spec import Launch
from tests.kernel_parts import is_named, kinds, only_case, simple, swapped

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
HALF = "#include <cuda_fp16.h>"
GROUPS = "#include <cooperative_groups.h>\nnamespace cg = cooperative_groups;"


def in_tiles(inputs: Any) -> tuple[torch.Tensor, ...]:
    """Each element the sum of its sixteen."""
    sums = inputs["x"].reshape(4, 16).sum(1, keepdim=True)
    return (sums.expand(4, 16).reshape(64),)


def highest(inputs: Any) -> tuple[torch.Tensor, ...]:
    return (inputs["x"].max().expand(64).clone(),)


RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "masks of part of a warp": (
        """
    float v = x[i];
    if (threadIdx.x % 32 < 16) y[i] = __shfl_xor_sync(0xffff, __shfl_xor_sync(0xffff, v, 1), 1);
    else { unsigned m = 0xffff0000u; y[i] = __shfl_xor_sync(m, __shfl_xor_sync(m, v, 2), 2); }
    """,
        {},
    ),
    "lanes that are together": (
        """
    float v = x[i];
    if (threadIdx.x % 3 == 0) {
        unsigned m = __activemask();
        int leader = __ffs(m) - 1;
        y[i] = v + 0 * __shfl_sync(m, v, leader) + (__popc(m) < 10 ? 100 : 0);
    } else y[i] = v;
    int same;
    unsigned all = __match_all_sync(0xffffffffu, 5, &same);
    if (!same || all != 0xffffffffu) y[i] = 0;
    """,
        {},
    ),
    "compare and swap after a plain load": (
        """
    __shared__ int best;
    if (threadIdx.x == 0) best = __float_as_int(-1e30f);
    __syncthreads();
    int old = best, assumed;
    do {
        assumed = old;
        if (x[i] <= __int_as_float(assumed)) break;
        old = atomicCAS(&best, assumed, __float_as_int(x[i]));
    } while (old != assumed);
    __syncthreads();
    y[i] = __int_as_float(best);
    """,
        {"reference": highest},
    ),
    "a lock and what it guards": (
        """
    while (atomicCAS(&lock, 0, 1) != 0) {}
    __threadfence();
    total += 1;
    __threadfence();
    atomicExch(&lock, 0);
    y[i] = x[i];
    """,
        {"head": "__device__ int lock = 0; __device__ int total = 0;"},
    ),
    "waiting for another thread of the block": (
        """
    __shared__ int flag;
    if (threadIdx.x == 63) flag = 0;
    __syncthreads();
    if (threadIdx.x == 0) { while (atomicAdd(&flag, 0) == 0) {} }
    if (threadIdx.x == 63) atomicExch(&flag, 1);
    y[i] = x[i];
    """,
        {},
    ),
    "waiting for an earlier block by ticket": (
        """
    __shared__ int mine;
    volatile int *done = flags;
    if (threadIdx.x == 0) {
        mine = atomicAdd(&ticket, 1);
        if (mine > 0) while (done[mine - 1] == 0) {}
        __threadfence();
        done[mine] = 1;
    }
    y[i] = x[i];
    """,
        {"head": "__device__ int flags[16]; __device__ int ticket;", "blocks": 4},
    ),
    "templates with shared memory": (
        """
    float a = turned<float, 64>(x[i]);
    int b = turned<int, 64>(threadIdx.x);
    y[i] = b == 63 - threadIdx.x ? a : -1;
    """,
        {
            "head": """
template <typename T, int N> __device__ T turned(T v) {
    __shared__ T s[N];
    s[threadIdx.x] = v;
    __syncthreads();
    T made = s[N - 1 - threadIdx.x];
    __syncthreads();
    return made;
}""",
            "reference": swapped,
        },
    ),
    "constants, restrict, cached loads": (
        "    y[i] = x[i] * C[threadIdx.x % 4] * same(x, i);",
        {
            "head": "__constant__ float C[4] = {1.0f, 1.0f, 1.0f, 1.0f};\n"
            "__device__ __forceinline__ float same(const float *__restrict__ p, int i) {\n"
            "    return __ldg(p + i) == p[i] ? 1.0f : 0.0f;\n}",
        },
    ),
    "vectors of four": (
        """
    if (threadIdx.x < n / 4) {
        float4 v = reinterpret_cast<const float4 *>(x)[threadIdx.x];
        reinterpret_cast<float4 *>(y)[threadIdx.x] = v;
    }
    """,
        {},
    ),
    "structures that are not aligned to their size": (
        "    Pair p = reinterpret_cast<const Pair *>(x + 1)[0];\n    y[i] = x[i] + 0 * p.a;",
        {"head": "struct Pair { float a, b; };"},
    ),
    "pairs of halves": (
        """
    __half2 h = __floats2half2_rn(x[i], x[i]);
    h = h2rcp(h2exp(__hsub2(h, h)));
    half a = x[i];
    bool same = __hge(a, a) && __hle(a, a) && !__hne(a, a) && __hbeq2(h, h);
    y[i] = same ? x[i] * __low2float(h) * __high2float(h) : 0;
    """,
        {"head": HALF},
    ),
    "atomic operations on halves": (
        """
    __shared__ half2 pair;
    __shared__ half one;
    if (threadIdx.x == 0) { pair = __float2half2_rn(0.f); one = __float2half(0.f); }
    __syncthreads();
    atomicAdd(&pair, __float2half2_rn(1.f));
    atomicAdd(&one, __float2half(1.f));
    __syncthreads();
    y[i] = x[i] + (__low2float(pair) + __half2float(one) - 128.f);
    """,
        {"head": HALF},
    ),
    "whole numbers": (
        """
    unsigned a = 0x01020304, b = 0x01010101;
    int ok = __vadd4(a, b) == 0x02030405 && __funnelshift_l(0x80000000u, 1, 1) == 3;
    ok &= __dp4a(0x01010101, 0x02020202, 1) == 9 && __sad(3, 5, 1) == 3 && __hadd(3, 6) == 4;
    ok &= __vmaxs4(0x80017f00, 0x01ff0001) == 0x01017f01 && __umul64hi(1ull << 63, 4) == 2;
    y[i] = ok ? x[i] : 0;
    """,
        {},
    ),
    "functions": (
        """
    float s, c;
    __sincosf(0.0f, &s, &c);
    float r = s + c + rcbrtf(8.f) + normcdff(0.f) + sinpif(0.5f) + cospif(0.f) + erfcxf(0.f);
    y[i] = fabsf(r - 5.0f) < 1e-5f ? x[i] : r;
    """,
        {},
    ),
    "types of the built-in variables": (
        """
    uint3 t = threadIdx;
    const dim3 b = blockDim;
    dim3 d = blockIdx;
    ulonglong2 wide = make_ulonglong2(1, 2);
    y[d.x * b.x + t.x] = x[i] + 0 * wide.y;
    """,
        {},
    ),
    "grids of three dimensions": (
        """
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int at = block * blockDim.x * blockDim.y * blockDim.z + t;
    y[at] = x[at];
    """,
        {"launch": lambda sizes, config: Launch(grid=(2, 2, 2), block=(2, 2, 2))},
    ),
    "one index through two dimensions": (
        "    __shared__ float s[8][8];\n    s[0][threadIdx.x] = x[i];\n    __syncthreads();\n"
        "    y[i] = s[0][63 - threadIdx.x];",
        {"reference": swapped},
    ),
    "alignment and order of qualifiers": (
        """
    __shared__ alignas(16) float s[64];
    static __shared__ float t[64];
    volatile __shared__ float u[64];
    alignas(16) __shared__ float w[64];
    s[threadIdx.x] = x[i]; t[threadIdx.x] = 0; u[threadIdx.x] = 0; w[threadIdx.x] = 0;
    __syncthreads();
    float4 v = reinterpret_cast<float4 *>(s)[15 - threadIdx.x / 4];
    float part[4] = {v.w, v.z, v.y, v.x};
    y[i] = part[threadIdx.x % 4] + t[63 - threadIdx.x] + u[threadIdx.x] + w[threadIdx.x];
    """,
        {"reference": swapped},
    ),
    "a block as a group": (
        "    cg::thread_block b = cg::this_thread_block();\n    __shared__ float s[64];\n"
        "    s[b.thread_rank()] = x[i];\n    b.sync();\n    y[i] = s[63 - b.thread_rank()];",
        {"head": GROUPS, "reference": swapped},
    ),
    "tiles of a block": (
        """
    auto tile = cg::tiled_partition<16>(cg::this_thread_block());
    float v = x[i];
    for (int step = tile.size() / 2; step > 0; step /= 2) v += tile.shfl_down(v, step);
    v = tile.shfl(v, 0);
    float again = cg::reduce(tile, x[i], cg::plus<float>());
    auto few = cg::coalesced_threads();
    bool ok = fabsf(again - v) < 1e-4f && few.size() == 32 && tile.ballot(1) == 0xffff;
    y[i] = ok ? v : 0;
    """,
        {
            "head": GROUPS + "\n#include <cooperative_groups/reduce.h>",
            "reference": in_tiles,
            "depth": lambda sizes: 16,
        },
    ),
    "two buffers in turn": (
        """
    __shared__ float s[2][64];
    s[0][threadIdx.x] = x[i];
    __syncthreads();
    for (int k = 0; k < 5; k++) {
        s[(k + 1) & 1][threadIdx.x] = s[k & 1][63 - threadIdx.x];
        __syncthreads();
    }
    y[i] = s[1][threadIdx.x];
    """,
        {"reference": swapped},
    ),
}


PUBLISHED = """
    __shared__ float d;
    __shared__ int ready;
    if (threadIdx.x == 0) ready = 0;
    __syncthreads();
    if (threadIdx.x == 40) { d = 5.0f; FENCE atomicExch(&ready, 1); }
    if (threadIdx.x == 3) { while (atomicAdd(&ready, 0) == 0) {} FENCE }
    y[i] = threadIdx.x == 3 && d != 5.0f ? 0 : x[i];
"""
RIGHT["published behind a fence"] = (PUBLISHED.replace("FENCE", "__threadfence_block();"), {})


@pytest.mark.parametrize("what", RIGHT)
def test_right_kernels_pass(what: str) -> None:
    body, changes = RIGHT[what]
    case = only_case(simple(body, **changes))
    assert case.status == "verified", case.reason


S = "    __shared__ float s[64];\n    s[threadIdx.x] = x[i];\n    __syncthreads();\n"
WRONG: dict[str, tuple[str, str, str]] = {
    "beyond a shared array": (
        "    __shared__ float s[64];\n    s[threadIdx.x + 1] = x[i];\n    y[i] = x[i];",
        "out-of-bounds",
        "thread 63 of block 0 writes s[64], outside of s",
    ),
    "before a shared array": (
        S + "    y[i] = x[i] + 0 * s[(int)threadIdx.x - 1];",
        "out-of-bounds",
        "reads s[-1], outside of s",
    ),
    "from one shared array into the next": (
        "    __shared__ float t[64];\n    t[threadIdx.x] = 0;\n"
        + S
        + "    float *p = s;\n    y[i] = x[i] + 0 * p[64];",
        "out-of-bounds",
        "outside of",
    ),
    "far from a shared array": (
        S + "    s[threadIdx.x * 9000] = 1.0f;\n    y[i] = x[i];",
        "out-of-bounds",
        "",
    ),
    "beyond a local array": (
        "    float a[4];\n    for (int j = 0; j <= 4; j++) a[j] = x[i];\n    y[i] = a[0];",
        "out-of-bounds",
        "takes index 4 of a, declared as float [4]",
    ),
    "a misaligned vector in shared memory": (
        S + "    float4 v = *reinterpret_cast<float4 *>(&s[1]);\n    y[i] = x[i] + 0 * v.x;",
        "misaligned",
        "accesses s at an address",
    ),
    "a misaligned vector in global memory": (
        "    float4 v = *reinterpret_cast<const float4 *>(x + 1);\n    y[i] = x[i] + 0 * v.x;",
        "misaligned",
        "accesses x at an address",
    ),
    "volatile in place of a barrier": (
        """
    __shared__ volatile float s[64];
    s[threadIdx.x] = x[i];
    __syncthreads();
    int t = threadIdx.x;
    if (t < 32) { s[t] += s[t + 32]; s[t] += s[t + 16]; }
    y[i] = x[i];""",
        "race",
        "__syncwarp()",
    ),
    "a barrier that came too early": (
        """
    __shared__ float s[2][64];
    s[0][threadIdx.x] = x[i];
    __syncthreads();
    for (int k = 0; k < 4; k++) s[(k + 1) & 1][threadIdx.x] = s[k & 1][63 - threadIdx.x];
    y[i] = x[i];""",
        "race",
        "with no __syncthreads() between",
    ),
    "counting and reading with no barrier": (
        """
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, 1);
    y[i] = count > 0 ? x[i] : 0;""",
        "race",
        "count[0] that thread",
    ),
    "published with no fence": (PUBLISHED.replace("FENCE", ""), "race", "reads d[0]"),
    "an assertion": (
        "    y[i] = x[i];\n    assert(i < 10);",
        "trap",
        "assert(i < 10) does not hold in thread 10 of block 0",
    ),
    "a trap": ("    y[i] = x[i];\n    if (i == 7) __trap();", "trap", "in thread 7 of block 0"),
    "waiting for what never comes": (
        """
    __shared__ int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    while (atomicAdd(&flag, 0) == 0) {}
    y[i] = x[i];""",
        "deadlock",
        "waits in a loop",
    ),
    "lanes that are not there": (
        "    y[i] = x[i] + 0 * __shfl_sync(0x55555555u, x[i], threadIdx.x);",
        "lane-outside-mask",
        "",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_are_named(what: str) -> None:
    is_named(*WRONG[what])


def test_races_in_templates_are_found() -> None:
    head = """
template <int N> __device__ float turned(float v) {
    __shared__ float s[N];
    s[threadIdx.x] = v;
    return s[N - 1 - threadIdx.x];
}"""
    case = only_case(simple("    y[i] = turned<64>(x[i]);", head=head, reference=swapped))
    assert "race" in kinds(case)
    assert case.findings[0].where == "kernel.cu:5"


def test_storing_the_same_value_twice_is_a_warning() -> None:
    body = "    __shared__ int any;\n    if (threadIdx.x == 0) any = 0;\n    __syncthreads();\n"
    body += "    if (x[i] < 100.0f) any = VALUE;\n    __syncthreads();\n"
    body += "    y[i] = any ? x[i] : 0.0f;"
    case = only_case(simple(body.replace("VALUE", "1")))
    assert case.status == "verified", case.reason
    (finding,) = [f for f in case.findings if f.kind == "race"]
    assert finding.severity == "warning" and "the same value" in finding.text
    assert "race" in kinds(only_case(simple(body.replace("VALUE", "1 + threadIdx.x"))))


REFUSED = {
    "unknown": ("    y[i] = x[i] + 0 * __viaddmax_s32(1, 2, 3);", "", "'__viaddmax_s32'"),
    "grid barrier": ("    cg::this_grid().sync();\n    y[i] = x[i];", GROUPS, "whole grid"),
    "asynchronous copy": (
        "    __shared__ float s[64];\n"
        '    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(0), "l"(x));',
        "",
        "cp.async",
    ),
    "pipeline": ("    __pipeline_commit();", "#include <cuda_pipeline.h>", "asynchronous copies"),
    "heap": ("    float *p = (float *)malloc(16);\n    y[i] = p[0];", "", "allocates itself"),
    "earlier block by number": (
        """
    volatile int *done = flags;
    if (threadIdx.x == 0) {
        if (blockIdx.x > 0) while (done[blockIdx.x - 1] == 0) {}
        done[blockIdx.x] = 1;
    }
    y[i] = x[i];""",
        "__device__ int flags[16];",
        "waits in a loop for another block",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, head, reason = REFUSED[what]
    monkeypatch.setattr(host_build, "_compiles_for_a_gpu", lambda *_: True)
    case = only_case(simple(body, head=head, blocks=4))
    assert case.status == "refused", case.reason
    assert reason in case.reason and "kernel.cu:" in case.reason


def test_a_build_that_takes_too_long_is_ended() -> None:
    with pytest.raises(BadInputError, match=r"kernel: .* took more than 0\.001 s"):
        only_case(simple("    y[i] = x[i] + 0 * 12345;"), timeout_s=0.001)


def test_shared_variables_are_read_from_the_library() -> None:
    kernel = simple(S + "    __shared__ double d[3];\n    d[0] = 0;\n    y[i] = s[threadIdx.x];")
    built = build(kernel, {"n": 64}, {}, "fp32")
    _, found = shared_variables(built.kernel)
    assert {v.name: v.size for v in found if v.name} == {"s": 256, "d": 24}


def test_names_of_variables() -> None:
    assert plain_name("_ZZ6kernelE1s") == "s"
    assert plain_name("_ZZ6kernelE4tile_0") == "tile"
    assert plain_name("_ZZ3revIfLi64EET_S0_iE6values") == "values"
    assert plain_name("_ZZ1fILi8EEvvE2a1") == "a1"
    assert plain_name("_ZGVZ6kernelE1s") == ""
    assert plain_name("buffer") == "buffer"


def test_other_libraries_have_no_anchor(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF\x01" + bytes(200))
    with pytest.raises(SuanliError, match="64 bits"):
        shared_variables(other)
