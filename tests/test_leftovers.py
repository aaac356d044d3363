"""What killed processes left is removed; what belongs to a living one is not."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from suanli.base import leftovers
from suanli.base.files import replaced_folder, write_atomic

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")


def aged(path: Path) -> Path:
    os.utime(path, (1e9, 1e9), follow_symlinks=False)
    return path


def killed(code: str, *arguments: Path) -> None:
    """Run code that says "ready" and then waits, and kill it there."""
    program = f"import sys, time\nfrom pathlib import Path\n{code}\n"
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)


WRITE = """
from suanli.base.files import replaced_folder
with replaced_folder(Path(sys.argv[1])) as fresh:
    (fresh / "half").write_text("")
    print("ready", flush=True)
    time.sleep(100)
"""


def test_the_folder_of_a_killed_writer_goes_at_the_next_write(tmp_path: Path) -> None:
    target = tmp_path / "an [engine]"
    killed(WRITE, target)
    killed(WRITE, target.with_name("other"))
    left, other = sorted(tmp_path.iterdir())
    with replaced_folder(target):
        assert left.exists(), "it is not old yet"
    aged(left), aged(other)
    with replaced_folder(target) as fresh:
        (fresh / "whole").write_text("")
    assert not left.exists()
    assert other.exists(), "it belongs to another engine"
    assert (target / "whole").exists()


def test_an_older_folder_that_never_came_back_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "engine"
    killed(WRITE, target)
    (left,) = tmp_path.iterdir()
    old = left.rename(left.with_name(left.name + ".old"))
    (aged(old) / "older").write_text("")
    aged(old)
    with pytest.raises(ZeroDivisionError), replaced_folder(target):
        assert (target / "older").exists()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_what_a_killed_writer_left_of_a_file_goes_when_it_is_written(tmp_path: Path) -> None:
    pid, start, place = leftovers.owner().rstrip(".").split("-")
    if start == "0":
        pytest.skip("this system does not tell when a process started")
    dead = f"{pid}-{int(start) - 1}-{place}"
    left, other = (tmp_path / f".{name}.{dead}.abc" for name in ("result.json", "plan.json"))
    for path in (left, other):
        path.touch()
        aged(path)
    write_atomic(tmp_path / "result.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "result.json"]


def test_nothing_of_a_living_process_goes(tmp_path: Path) -> None:
    mine = aged(leftovers.temporary_folder(tmp_path, "engine-"))
    leftovers.sweep(tmp_path, "engine-")
    assert mine.exists()


def test_a_number_that_is_used_again_is_not_the_owner(tmp_path: Path) -> None:
    pid, start, place = leftovers.owner().rstrip(".").split("-")
    if start == "0":
        pytest.skip("this system does not tell when a process started")
    reused = tmp_path / f"engine-{pid}-{int(start) - 1}-{place}.abc"
    unknown = tmp_path / f"engine-{pid}-0-{place}.abc"
    elsewhere = tmp_path / f"engine-{pid}-{int(start) - 1}-{'0' * 8}.abc"
    unmarked = tmp_path / "engine-my-own"
    for path in (reused, unknown, elsewhere, unmarked):
        path.mkdir()
        aged(path)
    leftovers.sweep(tmp_path, "engine-")
    assert sorted(tmp_path.iterdir()) == sorted([unknown, elsewhere, unmarked])


def test_no_link_is_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("")
    pid, start, place = leftovers.owner().rstrip(".").split("-")
    link = tmp_path / f"engine-{pid}-{int(start) + 1}-{place}.abc"
    link.symlink_to(kept)
    leftovers.sweep(tmp_path, "engine-", older_than_s=0)
    assert not link.is_symlink()
    assert (kept / "file").exists()


@pytest.mark.parametrize(
    ("code", "prefix"),
    [
        ("from suanli.measure.isolation import _new_log; _new_log()", "suanli-worker-"),
        (
            "from suanli.engines.session import scratch_folder as f; s = f(); s.__enter__()",
            "",
        ),
        ("from suanli.engines.staging import temporary_engine; temporary_engine()", "engine-"),
        ("from suanli.base.compiler import _temporary_folder as f; f()", "suanli-native-"),
        (
            "from suanli.base import compiler as c\n"
            "c.Compiler._compile = lambda *_: (print('ready', flush=True), time.sleep(100))\n"
            "c.Compiler(command=('cc',), version='1', kind='gcc').build_shared(Path(c.__file__))",
            ".build.",
        ),
        (
            "import os; from suanli.base import files\n"
            "os.fsync = lambda _: (print('ready', flush=True), time.sleep(100))\n"
            "files.write_atomic(files.cache_dir() / 'weights.safetensors', b'half')",
            ".weights.safetensors.",
        ),
    ],
)
def test_each_kind_of_leftover_is_known(
    code: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    killed(code + "\nprint('ready', flush=True); time.sleep(100)")
    (left,) = list(tmp_path.rglob(prefix + "[0-9]*-*-*.*"))
    leftovers.sweep(left.parent, prefix)
    assert left.exists()
    aged(left)
    leftovers.sweep(left.parent, prefix)
    assert not left.exists()
