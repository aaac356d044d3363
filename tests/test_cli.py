"""The command line: help, exit codes, one-line errors, JSON, and outputs that end early."""

import base64
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

from suanli import __version__, api, cli
from suanli.base import schema
from suanli.base.errors import ArtefactError, BadInputError, MissingBackendError
from suanli.base.lazy import present
from suanli.base.results import WorkloadEntry
from suanli.engines import signing
from suanli.workloads import catalogue
from suanli.workloads.builtins import builtin, builtin_names
from suanli.workloads.resolve import resolve
from tests import planted_results as planted

COMMANDS = (
    "doctor",
    "optimize",
    "train",
    "predict",
    "profile",
    "run",
    "rebuild",
    "export",
    "trust",
    "workloads",
)
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["suanli", *arguments])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, said.out, said.err

    return run


def said(done: tuple[int, str, str]) -> dict[str, Any]:
    """The JSON of a call that ended well, held to its verb's schema."""
    code, out, err = done
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    jsonschema.validate(found, json.loads(schema.text(found["verb"])))
    return found


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raising(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "workloads", raising)


def command_line(*arguments: str, **environment: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "suanli.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


# -- help -----------------------------------------------------------------------------------------


def test_without_arguments_help_is_printed(call: Call) -> None:
    code, out, err = call()
    assert (code, err) == (0, "")
    assert out.startswith("Usage: suanli")
    assert all(command in out for command in COMMANDS)
    assert out == call("--help")[1]
    assert "..." not in out.partition("Commands:")[2], "a summary is too long for the list"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_and_its_examples_work(call: Call, command: str) -> None:
    code, out, err = call(command, "-h")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    parser: Any = typer.main.get_command(cli.app)
    examples = [line.strip() for line in out.splitlines() if line.startswith("    suanli ")]
    assert examples
    for example in examples:
        assert shlex.split(example)[:2] == ["suanli", command]
        parser.commands[command].make_context(command, shlex.split(example)[2:])


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"suanli {__version__}\n", "")


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no such command"),
        (["optimize"], "missing argument"),
        (["optimize", "resnet50", "--foo"], "--foo"),
        (["optimize", "resnet50", "--batch", "many"], "--batch"),
        (["optimize", "resnet50", "extra"], "extra"),
        (["run", "engine"], "--input"),
        (["optimize", "resnet51"], "resnet50"),
        (["optimize", "missing.py:model"], "missing.py"),
        (["optimize", "resnet50", "--budget", "0"], "budget"),
        (["optimize", "resnet50", "--for", "speed"], "latency"),
        (["rebuild", "no-such-folder"], "no-such-folder"),
        (["export", "no-such-folder", "-o", "x.onnx"], "no-such-folder"),
        (["doctor", "--device", "warp"], "warp"),
        (["trust", "no-such-file.pub"], "neither a file nor a public key"),
        (["trust", "--remove"], "--remove needs a key"),
        (["trust", "--remove", "0123456789abcdef"], "not among the trusted keys"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    call: Call, arguments: list[str], words: str
) -> None:
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("suanli: ")
    assert len(err.splitlines()) == 1
    assert words in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BadInputError("two\nlines", next_step="mend it"), 2, "two lines (mend it)"),
        (ArtefactError("damaged"), 2, "damaged"),
        (MissingBackendError("keras", "pip install keras"), 1, "pip install keras"),
        (FileNotFoundError(2, "No such file", "x.npy"), 1, "No such file: x.npy"),
        (ImportError("libcudart.so.13 is absent"), 1, "suanli doctor"),
        (ZeroDivisionError("by zero"), 1, "internal error: ZeroDivisionError: by zero; run with"),
        (typer.BadParameter("no"), 2, "invalid value: no"),
    ],
)
def test_every_failure_is_one_line(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    monkeypatch.delenv("SUANLI_DEBUG", raising=False)
    fails(monkeypatch, error)
    got, out, err = call("workloads")
    assert (got, out) == (code, "")
    assert words in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_debug_shows_the_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUANLI_DEBUG", "1")
    fails(monkeypatch, ZeroDivisionError("by zero"))
    code, _, err = call("workloads")
    assert code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("suanli: internal error")


@pytest.mark.parametrize(
    ("error", "arguments", "code"),
    [
        (BadInputError("wrong", next_step="mend it"), ["workloads", "--json"], 2),
        (ZeroDivisionError("by zero"), ["workloads", "--json"], 1),
        (None, ["workloads", "--json", "--foo"], 2),
    ],
)
def test_failures_are_json_too(
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    arguments: list[str],
    code: int,
) -> None:
    monkeypatch.delenv("SUANLI_DEBUG", raising=False)
    if error is not None:
        fails(monkeypatch, error)
    got, out, err = call(*arguments)
    said = json.loads(out)
    jsonschema.validate(said, json.loads(schema.text("error")))
    assert got == said["exit_code"] == code
    assert said["verb"] == "workloads"
    assert err == f"suanli: {said['error']}\n"
    assert said["next_step"]


def test_interrupt_is_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, KeyboardInterrupt())
    assert call("workloads") == (130, "", "suanli: stopped\n")


def test_interrupted_search_prints_what_was_found(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planted.optimize_result(interrupted=True)
    monkeypatch.setattr(api, "optimize_workload", lambda *_, **__: found)
    code, out, err = call("optimize", "resnet50")
    assert code == 130
    assert "stopped early" in out
    assert err.endswith("suanli: stopped\n")
    code, out, _ = call("optimize", "resnet50", "--json")
    assert code == 130
    jsonschema.validate(json.loads(out), json.loads(schema.text("optimize")))


def test_options_reach_the_api(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def taken(ref: str, options: api.OptimizeOptions, **rest: Any) -> Any:
        seen.update(rest, ref=ref, options=options)
        return planted.optimize_result()

    monkeypatch.setattr(api, "optimize_workload", taken)
    line = (
        "optimize net.py:f --for throughput --batch 8 --max-batch 64 --max-drop 1.5 --budget 9 "
        "--tolerance 0.1 -o folder --data d --weights w --input-shape 3x2 --input-dtype int64 "
        "--backend eager --backend openvino --device cpu --fresh"
    )
    assert call(*line.split())[0] == 0
    assert seen.pop("on_event")
    assert seen == {
        "ref": "net.py:f",
        "data": Path("d"),
        "weights": Path("w"),
        "input_shapes": "3x2",
        "input_dtype": "int64",
        "options": api.OptimizeOptions(
            objective="throughput",
            batch=8,
            max_batch=64,
            max_drop=1.5,
            tolerance=0.1,
            budget_s=9.0,
            out=Path("folder"),
            device="cpu",
            backends=("eager", "openvino"),
            fresh=True,
        ),
    }


# -- outputs --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_ctrl_c_ends_long_work() -> None:
    probe = (
        "import sys, time\n"
        "from suanli import api, cli\n"
        "def doctor(on_event, **options):\n"
        "    sys.stderr.write('ready\\n')\n"
        "    time.sleep(100)\n"
        "api.doctor = doctor\n"
        "sys.argv = ['suanli', 'doctor']\n"
        "cli.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"suanli: stopped\n")


@pytest.mark.parametrize("arguments", [("workloads",), ("workloads", "--json"), ("--help",)])
def test_a_reader_that_leaves_is_no_error(arguments: tuple[str, ...]) -> None:
    with command_line(*arguments) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("workloads",), ("workloads", "--json")])
def test_output_that_cannot_be_written_is_said(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "suanli.cli", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("suanli: No space left on device")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("workloads",), ("--help",), ("optimize", "--help")])
def test_a_locale_without_unicode_is_enough(arguments: tuple[str, ...]) -> None:
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    with command_line(*arguments, **environment) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.decode("ascii")


def test_json_survives_a_locale_without_unicode(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = WorkloadEntry(name="算力", note="\udce9 is no character")
    monkeypatch.setattr(api, "workloads", lambda: planted.workloads_result(entry))
    _, out, _ = call("workloads", "--json")
    assert json.loads(out)["workloads"] == [{"name": entry.name, "note": entry.note}]
    assert "算力" not in out  # a lone surrogate has no UTF-8, so all of it is escaped
    entry = WorkloadEntry(name="算力", note="")
    monkeypatch.setattr(api, "workloads", lambda: planted.workloads_result(entry))
    assert "算力" in call("workloads", "--json")[1]


# -- suanli trust ---------------------------------------------------------------------------------


def test_trust_shows_adds_and_removes_keys(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUANLI_CONFIG", str(tmp_path / "theirs"))
    theirs = said(call("trust", "--json"))["own"]
    monkeypatch.setenv("SUANLI_CONFIG", str(tmp_path / "mine"))
    mine = said(call("trust", "--json"))
    assert mine["own"] != theirs
    assert mine["trusted"] == []
    file = tmp_path / "their.pub"
    file.write_text(theirs["public_key"] + "\n")
    for given in (str(file), theirs["public_key"]):
        after = said(call("trust", given, "--json"))
        assert after["trusted"] == [theirs]
        assert after["added"] == theirs["fingerprint"]
        assert signing.trusted(base64.b64decode(theirs["public_key"]))
        gone = said(call("trust", "--remove", theirs["fingerprint"], "--json"))
        assert (gone["trusted"], gone["removed"]) == ([], theirs["fingerprint"])
        assert not signing.trusted(base64.b64decode(theirs["public_key"]))
    assert said(call("trust", "--json"))["own"] == mine["own"]
    for refused, why in (
        (mine["own"]["public_key"], "own key"),
        (str(tmp_path / "mine" / "key"), "may be a private key"),
        (str(tmp_path), "neither a file"),
        ("x" * 5000, "neither a file"),
    ):
        code, out, err = call("trust", refused)
        assert (code, out) == (2, "")
        assert why in err


# -- suanli workloads -----------------------------------------------------------------------------


def test_workloads_load_neither_torch_nor_transformers() -> None:
    probe = (
        "import sys; sys.argv = ['suanli', 'workloads']\n"
        "import suanli.cli\n"
        "try:\n    suanli.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in builtin_names())


def test_without_transformers_the_list_says_so(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # what makes an import fail
    code, out, _ = call("workloads", "--json")
    notes = {entry["name"]: entry["note"] for entry in json.loads(out)["workloads"]}
    assert code == 0
    assert notes["bert-base"].endswith("needs transformers: pip install 'suanli[models]'")
    assert "needs" not in notes["resnet50"]
    with pytest.raises(MissingBackendError, match="pip install"):
        resolve("bert-base")


def test_the_list_has_the_common_keys(call: Call) -> None:
    listed = said(call("workloads", "--json"))
    assert [entry["name"] for entry in listed["workloads"]] == builtin_names()
    assert listed["environment"]["python"]


def test_every_workload_has_a_row() -> None:
    assert list(catalogue.ROWS) == builtin_names()


@pytest.mark.parametrize("name", builtin_names())
def test_rows_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUANLI_DATA", raising=False)
    row = catalogue.ROWS[name]
    if not all(present(package) for package, _ in row.needs):
        with pytest.raises(MissingBackendError):
            builtin(name, None)
        return
    bare, given = builtin(name, None), builtin(name, tmp_path)
    assert (given.data is not None) == row.labelled
    assert (given.data is not None and bare.data is None) == bool(row.data)
    assert bare.untrained != row.own_weights
    if row.data:
        (tmp_path / row.data).mkdir()
        assert given.data is not None
        with pytest.raises(BadInputError, match=row.data):
            given.data()  # it looks for its files in that folder


def test_rows_say_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bert-base", "gpt2-small", "minilm"):
        for package, install in catalogue.ROWS[name].needs:
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, package, None)
                with pytest.raises(MissingBackendError):
                    builtin(name, None)
                assert install in catalogue.ROWS[name].note
