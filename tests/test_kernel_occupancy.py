"""Theoretical occupancy against NVIDIA's own header, compiled here where a toolkit has it."""

import ctypes
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from suanli.base.compiler import find_compiler
from suanli.base.errors import BadInputError
from suanli.kernels.cuda import toolkit
from suanli.kernels.occupancy import LIMITS, lift, occupancy

CASES = 20_000
# Threads and shared memory (KiB) of a multiprocessor, shared memory of a block (KiB) at most and
# what the driver reserves of it (bytes): device properties, written down independently of the code.
DEVICES = {
    "sm_60": (2048, 64, 48, 0),
    "sm_61": (2048, 96, 48, 0),
    "sm_70": (2048, 96, 96, 0),
    "sm_75": (1024, 64, 64, 0),
    "sm_80": (2048, 164, 163, 1024),
    "sm_86": (1536, 100, 99, 1024),
    "sm_87": (1536, 164, 163, 1024),
    "sm_89": (1536, 100, 99, 1024),
    "sm_90": (2048, 228, 227, 1024),
    "sm_100": (2048, 228, 227, 1024),
    "sm_103": (2048, 228, 227, 1024),
    "sm_120": (1536, 100, 99, 1024),
    "sm_121": (1536, 100, 99, 1024),
}
ORACLE = r"""
#include <stddef.h>
#include "cuda_occupancy.h"
void blocks(int n, const long *in, int *out) {
    for (int i = 0; i < n; i++, in += 9) {
        struct cudaOccDeviceProp device = {0};
        device.computeMajor = in[0], device.computeMinor = in[1];
        device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = in[2];
        device.regsPerBlock = 65536, device.regsPerMultiprocessor = 65536, device.warpSize = 32;
        device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = in[3];
        device.numSms = 1, device.sharedMemPerBlockOptin = in[4];
        device.reservedSharedMemPerBlock = in[5];
        struct cudaOccFuncAttributes function = {0};
        function.maxThreadsPerBlock = 1024, function.numRegs = in[7];
        function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, function.numBlockBarriers = 1;
        function.maxDynamicSharedSizeBytes = in[8];
        struct cudaOccDeviceState state = {0};
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        struct cudaOccResult result = {0};
        int code = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state,
                                                           in[6], in[8]);
        out[i] = code ? -code : result.activeBlocksPerMultiprocessor;
    }
}
"""


def header() -> Path | None:
    compiler = toolkit.nvcc()
    roots = list(toolkit.include_folders())
    if compiler is not None:
        roots += [compiler.resolve().parent.parent / "include", Path("/usr/local/cuda/include")]
    return next((root for root in roots if (root / "cuda_occupancy.h").is_file()), None)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder, compiler = header(), find_compiler()
    if folder is None or compiler is None:
        if os.environ.get("SUANLI_REQUIRE_CUDA_TOOLKIT"):
            pytest.fail("no cuda_occupancy.h, and here it must not be missing")
        pytest.skip("needs a C compiler and cuda_occupancy.h (CUDA toolkit)")
    work = tmp_path_factory.mktemp("oracle")
    (work / "oracle.c").write_text(ORACLE)
    os.environ["SUANLI_CACHE"] = str(work)
    return ctypes.CDLL(str(compiler.build_shared(work / "oracle.c", [f"-I{folder}", "-w"])))


def test_equals_the_header_on_random_cases(oracle: ctypes.CDLL) -> None:
    assert DEVICES.keys() == LIMITS.keys()
    draw = random.Random(1)
    cases = []
    for _ in range(CASES):
        arch = draw.choice(list(DEVICES))
        most = DEVICES[arch][2] * 1024
        shared = draw.choice([0, draw.randrange(most + 1), draw.randrange(1, 4096), most])
        cases.append((arch, draw.randrange(1, 1025), draw.randrange(1, 256), shared))
    flat = []
    for arch, threads, registers, shared in cases:
        per_sm, sm_kib, block_kib, reserved = DEVICES[arch]
        flat += [int(arch[3:-1]), int(arch[-1]), per_sm, sm_kib * 1024, block_kib * 1024, reserved]
        flat += [threads, registers, shared]
    out = (ctypes.c_int * CASES)()
    oracle.blocks(CASES, (ctypes.c_long * len(flat))(*flat), out)
    wrong = Counter()
    examples = []
    for case, right in zip(cases, out, strict=True):
        arch, threads, registers, shared = case
        mine = occupancy(arch, threads=threads, registers=registers, dynamic_shared_bytes=shared)
        if mine.blocks != right:
            wrong[arch] += 1
            examples.append((case, mine.blocks, right))
    assert not wrong, (wrong, examples[:5])
    assert len(set(out)) > 20  # the cases are of all kinds


def test_names_the_limit() -> None:
    assert occupancy("sm_90", threads=256, registers=255).limited_by == "registers"
    assert occupancy("sm_90", threads=1024, registers=32).limited_by == "warps"
    assert occupancy("sm_90", threads=32, registers=16).limited_by == "blocks"
    full = occupancy("sm_90", threads=128, registers=16, static_shared_bytes=48 * 1024)
    assert full.limited_by == "shared memory"


@pytest.mark.parametrize("arch", sorted(LIMITS))
def test_what_would_lift_it_does(arch: str) -> None:
    draw = random.Random(arch)
    for _ in range(60):
        threads, registers = draw.randrange(32, 1025, 32), draw.randrange(16, 256)
        shared = draw.randrange(0, LIMITS[arch].block_shared_bytes)
        now = occupancy(arch, threads=threads, registers=registers, static_shared_bytes=shared)
        words = lift(arch, threads=threads, registers=registers, static_shared_bytes=shared)
        if now.fraction >= 1:
            assert words == ""
        if "registers a thread" in words:
            registers = int(words.split("at most ")[1].split()[0])
        if "bytes of shared" in words:
            shared = int(words.split(" bytes of shared")[0].split()[-1])
        if "larger blocks" in words or "divide" in words or not words:
            continue
        after = occupancy(arch, threads=threads, registers=registers, static_shared_bytes=shared)
        assert after.blocks > now.blocks, (words, now, after)


def test_refuses_what_no_card_has() -> None:
    with pytest.raises(BadInputError, match="unknown architecture 'sm_99'"):
        occupancy("sm_99", threads=32, registers=32)
    with pytest.raises(BadInputError, match="1025 threads"):
        occupancy("sm_90", threads=1025, registers=32)
