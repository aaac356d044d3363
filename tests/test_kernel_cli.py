"""`suanli kernel` as a person calls it: tables, JSON and one clear line for what is wrong."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from suanli import cli
from suanli.base import schema
from suanli.base.compiler import find_compiler
from suanli.base.kernel_results import KernelTrial, KernelTuneResult
from suanli.kernels import verbs
from suanli.kernels.cuda import toolkit
from tests.kernel_parts import ref, simple

needs_host = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
needs_cuda = pytest.mark.skipif(
    toolkit.nvcc() is None and not toolkit.nvrtc_libraries(), reason="needs nvcc or NVRTC"
)


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`suanli kernel` in this process, with what it prints."""

    def run(*words: str) -> Done:
        code = cli._run(["kernel", *words])
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run


def conforming(text: str, verb: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(text)
    jsonschema.validate(record, json.loads(schema.text(verb)))
    return record


@needs_host
def test_check_is_right_and_wrong(tmp_path: Path, call: Call) -> None:
    done = call("check", ref("vector_add"), "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    record = conforming(done.stdout, "kernel-check")
    assert record["ok"] and record["language"] == "CUDA C++"
    assert any("unverified on a GPU" in note for note in record["notes"])

    wrong = tmp_path / "wrong.py"
    wrong.write_text(Path(ref("vector_add")).read_text().replace("i < n", "i <= n"))
    done = call("check", str(wrong), "--device", "cpu")
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert "vector_add (CUDA C++) is not verified" in said
    assert "reads a[1], outside of a" in said


@needs_cuda
@needs_host
def test_explain_is_a_table_and_json(call: Call) -> None:
    done = call("explain", ref("transpose_naive"), "--arch", "sm_90", "--json")
    assert done.returncode == 0, done.stderr
    record = conforming(done.stdout, "kernel-explain")
    assert record["limiter"]["name"] == "uncoalesced access"
    assert record["archs"][0]["registers"] > 0
    assert [overlap["streams"] for overlap in record["overlap"]] == [1, 2, 4]


def test_one_clear_line_each(tmp_path: Path, call: Call) -> None:
    text = Path(ref("vector_add")).read_text()
    no_reference = tmp_path / "no_reference.py"
    line = next(row for row in text.splitlines() if row.strip().startswith("reference="))
    no_reference.write_text(text.replace(line + "\n", ""))
    too_big = tmp_path / "too_big.py"
    too_big.write_text(text.replace("(256, 128, 512, 1024)", "(2048,)"))
    for words, message in (
        (("check", str(no_reference)), "vector_add has no reference"),
        (("explain", str(too_big)), "block.x is 2048, the most is 1024"),
        (("explain", ref("vector_add"), "--arch", "sm_99"), "unknown architecture 'sm_99'"),
        (("explain", str(tmp_path / "absent.py")), "no file"),
        (("tune", ref("transpose_naive")), "names no tunables"),
        (("check", "no_such_kernel"), "no_such_kernel"),
    ):
        done = call(*words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("suanli: ") and message in last
        assert "Traceback" not in done.stderr


@needs_cuda
@needs_host
def test_tune_without_a_gpu_says_that_it_ranks() -> None:
    record = verbs.kernel_tune(ref("vector_add"), gpu="H100 SXM5 80GB")
    assert record.ranking and record.verified
    assert record.config is not None and len(record.trials) == 4
    assert any("ranking" in note for note in record.notes)


def test_text_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    from suanli.devices import device
    from suanli.measure.environment import environment
    from suanli.reports import kernel_text

    result = KernelTuneResult(
        schema=schema.name("kernel-tune"),
        verb="kernel tune",
        workload="x.py",
        device=device("cpu").info,
        environment=environment(),
        kernel="mine",
        sizes={"n": 4},
        dtype="fp32",
        where="compiled for H100, not run",
        ranking=True,
        verified=False,
        config={"BLOCK": 64},
        step_ms=None,
        trials=(
            KernelTrial(config={"BLOCK": 64}, status="ranked", predicted_ms=0.01, occupancy=0.5),
            KernelTrial(config={"BLOCK": 32}, status="failed", reason="does not compile"),
        ),
        notes=("a ranking by the static model",),
    )
    kernel_text.tune(result)
    said = capsys.readouterr().out
    assert "first of the ranking" in " ".join(said.split()) or "ranking" in said
    assert "BLOCK=64" in said and "not verified" in said


def test_host_headers_ship_with_the_package() -> None:
    import tomllib

    root = Path(__file__).parent.parent
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = data["package-data"]["suanli"]
    shipped = {path for pattern in patterns for path in (root / "suanli").glob(pattern)}
    needed = {p for p in (root / "suanli" / "kernels" / "host").rglob("*") if p.is_file()}
    assert needed <= shipped
    assert simple("").text()
