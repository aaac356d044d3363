"""The compiler look-up: which one is found, what is cached, what is said when it fails."""

import ctypes
import stat
import sys
from pathlib import Path

import pytest

from suanli.base import compiler as module
from suanli.base.compiler import Compiler, CompilerError, find_compiler, run_limited
from tests.processes import gone

SOURCE = "int answer(void) { return NUMBER; }\n"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path / "a cache"))


@pytest.fixture
def compiler() -> Compiler:
    found = find_compiler()
    if found is None:
        pytest.skip("no compiler on this machine")
    return found


def source(folder: Path, text: str = SOURCE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "some file.c"
    path.write_text(text)
    return path


def fake_compiler(folder: Path, body: str, name: str = "cc") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_builds_from_and_into_paths_with_spaces(compiler: Compiler, tmp_path: Path) -> None:
    library = compiler.build_shared(source(tmp_path / "my files"), ["-DNUMBER=42"])
    assert answer(library) == 42
    assert library.parent == tmp_path / "a cache" / "native"
    assert [p.name for p in library.parent.iterdir()] == [library.name]  # nothing half-built


def test_same_input_is_built_once_and_other_flags_apart(compiler: Compiler, tmp_path: Path) -> None:
    path = source(tmp_path)
    first = compiler.build_shared(path, ["-DNUMBER=1"])
    written = first.stat().st_mtime_ns
    assert compiler.build_shared(path, ["-DNUMBER=1"]) == first
    assert first.stat().st_mtime_ns == written
    second = compiler.build_shared(path, ["-DNUMBER=2"])
    assert (answer(first), answer(second)) == (1, 2)


def test_changed_source_version_or_processor_is_another_library(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path)
    names = {compiler.build_shared(path, ["-DNUMBER=1"])}
    path.write_text(SOURCE + "/* changed */\n")
    names.add(compiler.build_shared(path, ["-DNUMBER=1"]))
    newer = Compiler(command=compiler.command, version="other", kind=compiler.kind)
    names.add(newer.build_shared(path, ["-DNUMBER=1"]))
    monkeypatch.setattr(module, "_machine", lambda: "a processor with fewer features")
    names.add(compiler.build_shared(path, ["-DNUMBER=1"]))
    assert len(names) == 4


def test_cache_that_cannot_be_written_falls_to_a_temporary_folder(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the cache folder should be")
    monkeypatch.setenv("SUANLI_CACHE", str(blocked))
    library = compiler.build_shared(source(tmp_path), ["-DNUMBER=7"])
    assert answer(library) == 7
    assert blocked not in library.parents


def test_no_temporary_folder_is_made_where_the_cache_can_be_written(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> Path:
        raise AssertionError("a folder that nobody needs")

    monkeypatch.setattr(module, "_temporary_folder", made)
    assert answer(compiler.build_shared(source(tmp_path), ["-DNUMBER=8"])) == 8


def test_error_names_the_file_and_the_first_error(compiler: Compiler, tmp_path: Path) -> None:
    path = source(tmp_path, "int broken( {\n")
    with pytest.raises(CompilerError, match=r"cannot compile some file\.c: .*error") as caught:
        compiler.build_shared(path)
    assert "\n" not in str(caught.value)
    assert caught.value.output
    assert not list((tmp_path / "a cache" / "native").iterdir())


def test_missing_source_is_said(compiler: Compiler, tmp_path: Path) -> None:
    with pytest.raises(CompilerError, match="cannot read"):
        compiler.build_shared(tmp_path / "absent.c")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell script")
def test_hanging_compiler_is_ended_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    body = f"sleep 60 &\necho $! > '{pid_file}'\nwait"
    slow = Compiler(command=(str(fake_compiler(tmp_path / "bin", body)),), version="1", kind="gcc")
    with pytest.raises(CompilerError, match="took more than"):
        slow.build_shared(source(tmp_path), timeout_s=2.0)  # in which the shell has begun
    assert gone(int(pid_file.read_text()))


@pytest.mark.parametrize(
    ("command", "version", "shown"),
    [
        (("/usr/bin/cc",), "cc (Debian) 12.2.0", "cc (Debian) 12.2.0"),
        (("cc",), "gcc (GCC) 14", "cc: gcc (GCC) 14"),
        (("my gcc", "-O1"), "gcc 9", "my gcc -O1: gcc 9"),
    ],
)
def test_its_name_is_said_once(command: tuple[str, ...], version: str, shown: str) -> None:
    assert str(Compiler(command=command, version=version, kind="gcc")) == shown


@pytest.mark.skipif(sys.platform == "win32", reason="needs shell scripts")
class TestFinding:
    @pytest.fixture(autouse=True)
    def _clear(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CC", raising=False)

    def test_cc_variable_goes_first_and_may_hold_arguments(
        self, compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if compiler.kind == "zig":
            pytest.skip("needs a system compiler behind the script")
        wrapper = fake_compiler(tmp_path, f'exec {compiler.command[0]} "$@"', "my cc")
        monkeypatch.setenv("CC", f"'{wrapper}' -O1")
        found = find_compiler()
        assert found is not None
        assert found.command == (str(wrapper), "-O1")

    def test_compiler_without_headers_is_passed_over(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        body = '[ "$1" = --version ] && echo "gcc 1.0" && exit 0; echo "no string.h: error"; exit 1'
        fake_compiler(tmp_path, body)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(module, "present", lambda name: False)
        module._find.cache_clear()
        assert find_compiler() is None

    def test_nothing_at_all_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        monkeypatch.setattr(module, "present", lambda name: False)
        module._find.cache_clear()
        assert find_compiler() is None

    def test_zig_serves_where_the_system_has_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("ziglang")
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        module._find.cache_clear()
        found = find_compiler()
        assert found is not None
        assert found.kind == "zig"
        library = found.build_shared(source(tmp_path), ["-O2", "-DNUMBER=5"])
        assert answer(library) == 5

    def test_unusable_cc_variable_does_not_hide_the_others(
        self, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CC", "no-such-compiler --flag")
        module._find.cache_clear()
        found = find_compiler()
        assert found is not None
        assert found.command == compiler.command


@pytest.fixture(autouse=True, scope="module")
def _forget() -> object:
    yield
    module._find.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of others are Linux's")
def test_the_system_ends_what_outlives_this_process() -> None:
    code, said = run_limited(["sh", "-c", "sleep 0.3; ulimit -t"], 5.0)
    assert code == 0
    assert said.strip() == "35"
