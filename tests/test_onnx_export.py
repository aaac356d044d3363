"""The ONNX file has the signature's names, takes any batch, and is whole or not there."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from suanli.base.errors import CaptureError, SuanliError
from suanli.engines import onnx_export
from suanli.engines.program import Program, capture
from suanli.workloads.record import Inputs
from tests import small_programs as small

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def answers(path: Path, program: Program, flat: list[torch.Tensor]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [spec.name for spec in program.signature.inputs]
    wanted = [spec.name for spec in program.signature.outputs]
    feed = {name: t.numpy() for name, t in zip(names, flat, strict=True)}
    given = {spec.name for spec in session.get_inputs()}
    assert given == set(names)
    return [torch.from_numpy(np.asarray(a)) for a in session.run(wanted, feed)]


@pytest.mark.parametrize("kind", ["conv", "bert", "gpt2", "resnet"])
def test_names_shapes_and_values(kind: str, tmp_path: Path) -> None:
    program = small.build(kind, tmp_path / "program")
    path = onnx_export.export_onnx(program, tmp_path / "deep" / "out.onnx")
    graph = onnx.load(str(path)).graph
    assert [value.name for value in graph.input] == [s.name for s in program.signature.inputs]
    assert [value.name for value in graph.output] == [s.name for s in program.signature.outputs]
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    onnx.checker.check_model(str(path), full_check=True)
    assert str(Path.cwd()).encode() not in path.read_bytes(), "paths of this machine are inside"
    assert b"line " not in path.read_bytes(), "source lines are inside"
    assert [p.name for p in path.parent.iterdir()] == ["out.onnx"], "small models are one file"
    for batch in (1, 3, small.MAX_BATCH):
        flat = small.fresh_inputs(program, batch)
        assert small.worst_error(answers(path, program, flat), small.eager(program, flat)) < 1e-5


class Collides(nn.Module):
    def forward(self, output0: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
        return output0 + add


def test_an_input_called_like_an_output_is_refused(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    program = small.program_of(Collides(), tmp_path / "clash", x, x.clone())
    with pytest.raises(CaptureError, match="output0 is both an input and an output"):
        onnx_export.export_onnx(program, tmp_path / "clash.onnx")


class Repeats(nn.Module):
    """`output1` and `add` are also names that the exporter gives to values inside."""

    def forward(self, x: torch.Tensor, add: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output1 = x + add
        return output1, x, output1, output1 * 2


def test_results_given_twice_and_inputs_passed_on(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    program = small.program_of(Repeats(), tmp_path / "program", x, x.clone())
    path = onnx_export.export_onnx(program, tmp_path / "out.onnx")
    flat = small.fresh_inputs(program, 5)
    assert small.worst_error(answers(path, program, flat), small.eager(program, flat)) < 1e-6


def test_large_weights_go_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_SINGLE_FILE_BYTES", 1000)
    program = small.build("conv", tmp_path / "program")
    path = onnx_export.program_onnx(program)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    moved = path.parent.rename(tmp_path / "moved")
    flat = small.fresh_inputs(program, 2)
    values = answers(moved / "model.onnx", program, flat)
    assert small.worst_error(values, small.eager(program, flat)) < 1e-5


def _export(folder: str) -> bytes:
    return onnx_export.program_onnx(Program(Path(folder))).read_bytes()


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        onnx_export.publish(tmp_path / name, tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "first"
    with pytest.raises(OSError, match="nowhere"):
        onnx_export.publish(tmp_path / "second", tmp_path / "nowhere" / "target")


@pytest.mark.slow
def test_two_processes_at_once_agree(tmp_path: Path) -> None:
    program = small.build("conv", tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_export, [str(tmp_path)] * 2)
    assert first == second == (program.folder / "onnx" / "model.onnx").read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".onnx")]


class Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i1e(x)


def test_an_operator_without_onnx_is_named(tmp_path: Path) -> None:
    program = small.program_of(Complex(), tmp_path, torch.randn(3, 4))
    with pytest.raises(CaptureError, match="cannot be written as ONNX") as caught:
        onnx_export.program_onnx(program)
    assert "i1e" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if "onnx" in p.name] == []


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_without_a_graph_it_says_why(tmp_path: Path) -> None:
    inputs = Inputs(args=(torch.ones(2, 3),))
    program = capture(Branches(), inputs, folder=tmp_path, name="branches", max_batch=2)
    with pytest.raises(SuanliError, match="branches has no exported program"):
        onnx_export.export_onnx(program, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
