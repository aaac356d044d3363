"""The replay of glibc's heap, against cases counted by hand and against glibc itself."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from suanli.base.compiler import find_compiler
from suanli.base.memory import Block, Footprint, MemoryKind
from suanli.cost.heap import Heap, handed_out_anew

KIB, MIB = 2**10, 2**20


def step(*blocks: tuple[int, int, int | None], kind: MemoryKind = "activations") -> Footprint:
    """A step of (bytes, born, dies)."""
    found = tuple(Block(kind=kind, size_bytes=s, born=b, dies=d) for s, b, d in blocks)
    return Footprint(batch=1, training=False, blocks=found, calls=len(found))


def test_blocks_beyond_the_most_come_anew_in_every_step() -> None:
    anew = handed_out_anew(step((64 * MIB, 1, 2), (64 * MIB, 3, 4)))
    assert anew == pytest.approx(128 * MIB, rel=1e-3)


def test_a_block_that_comes_again_stays_in_the_heap() -> None:
    assert handed_out_anew(step((MIB, 1, 2), (MIB, 3, 4))) == 0


def test_the_heaps_end_is_given_back_beyond_twice_the_largest_block() -> None:
    together = step((4 * MIB, 1, 4), (4 * MIB, 2, 4), (4 * MIB, 3, 4))
    assert handed_out_anew(together) == pytest.approx(12 * MIB, rel=0.05)


def test_what_stays_is_not_counted() -> None:
    assert handed_out_anew(step((64 * MIB, 0, None), (MIB, 1, 2))) == 0


def test_gradients_stay_until_the_next_step() -> None:
    gradients = step((64 * MIB, 1, None), kind="gradients")
    assert handed_out_anew(gradients) == pytest.approx(64 * MIB, rel=1e-3)


def test_many_ends_of_the_heap_do_not_all_come_anew() -> None:
    blocks = []
    for turn in range(40):
        blocks += [(MIB, 4 * turn + i, 4 * turn + 4) for i in (1, 2, 3)]
    assert handed_out_anew(step(*blocks)) == pytest.approx(10 * MIB, rel=0.01)


def test_neighbours_are_joined_and_the_best_fit_is_taken() -> None:
    heap = Heap()
    for name, size in enumerate((50, 100, 50, 80, 50)):
        heap.allocate(name, size * KIB)
    grown = heap.grown
    heap.release(1)
    heap.release(3)
    heap.allocate(5, 80 * KIB)  # into the hole of 80, not of 100
    heap.allocate(6, 100 * KIB)
    assert heap.grown == grown
    for name in (5, 6, 2):
        heap.release(name)
    heap.allocate(7, 230 * KIB)
    assert heap.grown == grown
    heap.release(99)  # nothing of that name


# In C, so that nothing but the blocks is on the heap; standard input has no buffer there.
_CHILD = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

static char input[65536];
static void *live[64];

static long faults(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_minflt;
}

int main(void) {
    long counted[4];
    prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
    setvbuf(stdin, NULL, _IONBF, 0);
    input[fread(input, 1, sizeof input - 1, stdin)] = 0;
    for (int turn = 0; turn < 4; turn++) {
        long before = faults();
        int name, used;
        long size;
        for (char *at = input; sscanf(at, "%d %ld\\n%n", &name, &size, &used) == 2; at += used) {
            if (size < 0) {
                free(live[name]);
            } else {
                live[name] = malloc(size);
                memset(live[name], 1, size);
            }
        }
        counted[turn] = faults() - before;
    }
    for (int turn = 0; turn < 4; turn++) printf("%ld\\n", counted[turn] * getpagesize());
    return 0;
}
"""


def groups(*sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Blocks of these MiB come together and go in the same order, group by group."""
    events, name = [], 0
    for group in sizes:
        names = range(name, name + len(group))
        events += [(n, MIB * size) for n, size in zip(names, group, strict=True)]
        events += [(n, -1) for n in names]
        name += len(group)
    return events


def faults_of(events: list[tuple[int, int]], folder: Path) -> list[int]:
    """Bytes of the pages that a process touched first, in each of four turns of these events."""
    source, program = folder / "child.c", folder / "child"
    source.write_text(_CHILD)
    compiler = find_compiler()
    assert compiler is not None
    subprocess.run([*compiler.command, "-o", str(program), str(source)], check=True)
    lines = "".join(f"{name} {size}\n" for name, size in events)
    # settings of the allocator that a person has made are not those of the replay
    plain = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    plain.pop("LD_PRELOAD", None)
    done = subprocess.run(
        [program], input=lines, stdout=subprocess.PIPE, text=True, check=True, env=plain
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replays glibc")
@pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    "sizes",
    [
        *(((4, 4, 4), (40,)), ((4, 1, 4, 1, 4),), ((2, 2, 2, 2), (1, 1, 1))),
        *(((8, 1, 3), (2,) * 5, (30, 1)), ((1, 33, 1), (5, 5, 5)), ((3, 1, 3, 1), (2, 2, 2))),
    ],
)
def test_the_replay_is_glibcs(tmp_path: Path, sizes: tuple[tuple[int, ...], ...]) -> None:
    events = groups(*sizes)
    counted = faults_of(events, tmp_path)
    heap = Heap()
    for turn in counted:
        before = heap.mapped + heap.grown
        for name, size in events:
            if size < 0:
                heap.release(name)
            else:
                heap.allocate(name, size)
        assert heap.mapped + heap.grown - before == pytest.approx(turn, rel=0.01, abs=65536)
