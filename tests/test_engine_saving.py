"""Engines written, copied, interrupted and given out: whole, or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from suanli import api
from suanli.base import codec, schema
from suanli.base.errors import ArtefactError, BadInputError, SuanliError, UntrustedError
from suanli.base.plan import Plan
from suanli.engines import assembly
from suanli.engines import engine as engines
from suanli.engines.assembly import BuiltVariant, write_engine
from suanli.engines.backends import backends
from suanli.engines.engine import Engine, export, run_file
from suanli.engines.manifest import check
from suanli.engines.program import Program, capture
from suanli.workloads.record import Inputs
from tests.engine_parts import (
    OTHER,
    PLAN,
    Net,
    QuickBackend,
    assert_same,
    contents,
    example,
    expected,
    make_engine,
    make_program,
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return make_program(tmp_path_factory.mktemp("program"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> QuickBackend:
    backend = QuickBackend()
    monkeypatch.setattr(engines, "_backend_table", lambda extra: {"quick": backend})
    return backend


@pytest.fixture
def folder(tmp_path: Path, program: Program) -> Path:
    make_engine(tmp_path / "engine", program, tmp_path)
    return tmp_path / "engine"


# -- writing --------------------------------------------------------------------------------------


def test_weights_are_not_stored_twice_while_building(
    folder: Path, program: Program, tmp_path: Path
) -> None:
    shipped, source = folder / "program/weights.safetensors", program.folder
    assert shipped.stat().st_ino == (source / "weights.safetensors").stat().st_ino


def test_caches_beside_the_program_do_not_ship(tmp_path: Path) -> None:
    source = make_program(tmp_path / "program")
    (source.folder / "onnx").mkdir()
    (source.folder / "onnx" / "model.onnx").write_bytes(b"cache")
    manifest = make_engine(tmp_path / "engine", source, tmp_path)
    assert not any("onnx" in path for path in manifest.files)


def test_spaces_and_other_scripts_in_paths(
    tmp_path: Path, program: Program, quick: QuickBackend
) -> None:
    target = tmp_path / "mein Ordner 算力" / "das Netz ü"
    make_engine(target, program, tmp_path)
    with Engine.load(target) as engine:
        assert_same(engine(*example(3)), expected(3))
        engine.save(tmp_path / "copy 拷贝")
    check(tmp_path / "copy 拷贝")


def test_a_copy_is_whole_and_needs_the_first_no_more(
    tmp_path: Path, program: Program, quick: QuickBackend
) -> None:
    make_engine(tmp_path / "temporary", program, tmp_path, temporary=True)
    engine = Engine.load(tmp_path / "temporary", temporary=True)
    assert engine.save(tmp_path / "kept") == tmp_path / "kept"
    engine.close()
    assert not (tmp_path / "temporary").exists()
    with Engine.load(tmp_path / "kept") as kept:
        assert_same(kept(*example(3)), expected(3))


def test_a_forgotten_temporary_engine_leaves_nothing(
    tmp_path: Path, program: Program, quick: QuickBackend
) -> None:
    make_engine(tmp_path / "temporary", program, tmp_path, temporary=True)
    engine = Engine.load(tmp_path / "temporary", temporary=True)
    del engine
    import gc

    gc.collect()
    assert not (tmp_path / "temporary").exists()
    assert quick.runners[0].closed


def test_copying_a_strangers_engine_does_not_vouch_for_it(
    tmp_path: Path, program: Program, quick: QuickBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setenv("SUANLI_CONFIG", str(tmp_path / "their config"))
        make_engine(tmp_path / "theirs", program, tmp_path)
    with Engine.load(tmp_path / "theirs", trust=True) as engine:
        engine.save(tmp_path / "copy")
    with pytest.raises(UntrustedError):
        Engine.load(tmp_path / "copy")


def test_an_engine_damaged_after_opening_is_not_copied(
    folder: Path, tmp_path: Path, quick: QuickBackend
) -> None:
    with Engine.load(folder) as engine:
        (folder / "variants/0/nested/more.bin").unlink()
        (folder / "variants/0/nested/more.bin").write_bytes(b"other")
        with pytest.raises(ArtefactError, match=r"more\.bin"):
            engine.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_without_a_home_an_engine_lives_for_this_process_only(
    tmp_path: Path, program: Program, quick: QuickBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUANLI_CONFIG", str(tmp_path / "file" / "config"))
    with pytest.raises(SuanliError, match="SUANLI_KEY"):
        make_engine(tmp_path / "engine", program, tmp_path)
    make_engine(tmp_path / "engine", program, tmp_path, temporary=True)
    with Engine.load(tmp_path / "engine", temporary=True) as engine:
        assert_same(engine(*example(3)), expected(3))
        with pytest.raises(SuanliError, match="SUANLI_KEY"):
            engine.save(tmp_path / "kept")


@pytest.mark.parametrize("what", ["file", "project", "engine with more"])
def test_a_slip_of_the_target_costs_nothing(
    what: str, tmp_path: Path, program: Program, folder: Path
) -> None:
    target = tmp_path / "target"
    if what == "file":
        target.write_text("mine")
    elif what == "project":
        target.mkdir()
        (target / "thesis.tex").write_text("mine")
    else:
        make_engine(target, program, tmp_path)
        (target / "thesis.tex").write_text("mine")
    before = contents(target) if target.is_dir() else target.read_text()
    with pytest.raises(BadInputError):
        make_engine(target, program, tmp_path)
    assert (contents(target) if target.is_dir() else target.read_text()) == before


def test_an_empty_folder_an_engine_and_a_link_to_one_are_replaced(
    tmp_path: Path, program: Program
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    make_engine(link, program, tmp_path)
    make_engine(link, program, tmp_path, ranges=((OTHER, 1, 8),))
    assert link.is_symlink()
    assert check(real).variants[0].plan == OTHER
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_refused_verification_keeps_the_older_engine(
    folder: Path, program: Program, tmp_path: Path
) -> None:
    before = contents(folder)

    def refuse(fresh: Path) -> None:
        check(fresh)
        raise SuanliError("wrong answers")

    with pytest.raises(SuanliError, match="wrong answers"):
        make_engine(folder, program, tmp_path, ranges=((OTHER, 1, 8),), verify=refuse)
    assert contents(folder) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["place", "seal"])
def test_a_full_or_broken_disk_keeps_the_older_engine(
    folder: Path,
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    where: str,
) -> None:
    before = contents(folder)

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(assembly, where, fail)
    with pytest.raises(SuanliError) as caught:
        make_engine(folder, program, tmp_path)
    message = str(caught.value)
    assert str(folder) in message
    assert ("no space" in message) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert contents(folder) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


_WRITER = """
import os, sys
from pathlib import Path
import tests.engine_parts as parts
from suanli.engines import assembly
from suanli.engines.engine import Engine
from suanli.engines.program import Program

target, program, scratch, step = sys.argv[1:]
if step == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
else:
    from suanli.base import files
    def wait(*args, **kwargs):
        print("here", flush=True)
        sys.stdin.readline()
    if step == "seal":
        assembly.seal = wait
    elif step == "replace":
        files._exchanged = wait
    elif step == "remove":
        files.shutil.rmtree = wait
try:
    assembly.copy_engine(Path(program), Path(target), key=assembly.signing.own_key())
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="no kill -9")
@pytest.mark.parametrize("step", ["seal", "replace", "remove"])
def test_kill_leaves_one_engine_whole(
    step: str, folder: Path, program: Program, tmp_path: Path
) -> None:
    make_engine(tmp_path / "newer", program, tmp_path, ranges=((OTHER, 1, 8),))
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder), str(tmp_path / "newer"), "", step],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "here\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=30)
    plan = check(folder).variants[0].plan
    assert plan == (OTHER if step == "remove" and sys.platform == "linux" else PLAN)


@pytest.mark.skipif(os.name != "posix", reason="no such limit")
def test_a_real_write_error_is_one_line_and_keeps_the_older_engine(
    folder: Path, program: Program, tmp_path: Path
) -> None:
    make_engine(tmp_path / "newer", program, tmp_path, ranges=((OTHER, 1, 8),))
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(folder), str(tmp_path / "newer"), "", "limit"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert "SuanliError no space left to write" in done.stdout, done.stderr
    assert check(folder).variants[0].plan == PLAN
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# -- files in, formats out ------------------------------------------------------------------------


@pytest.fixture
def opened(folder: Path, quick: QuickBackend) -> Any:
    with Engine.load(folder) as engine:
        yield engine


def test_arrays_from_files(opened: Engine, tmp_path: Path) -> None:
    x, shift = (tensor.numpy() for tensor in example(3))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "s.npy", np.asfortranarray(shift).astype(">f4"))
    np.savez(tmp_path / "both.npz", shift=shift, x=x)
    wanted = expected(3)
    for paths in ([tmp_path / "both.npz"], [tmp_path / "x.npy", tmp_path / "s.npy"]):
        found = run_file(opened, paths)
        assert list(found) == [spec.name for spec in opened.signature.outputs]
        for array, value in zip(found.values(), wanted.values(), strict=True):
            np.testing.assert_allclose(array, value.numpy(), rtol=1e-5, atol=1e-6)


def _lying_header(path: Path) -> None:
    np.save(path, np.zeros(4, np.float32))
    data = path.read_bytes().replace(b"(4,)", b"(2000000000000,)")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda p: np.save(p, np.array([{}, 1], dtype=object)), "Python objects"),
        (lambda p: p.write_bytes(b""), r"is no \.npy or \.npz"),
        (lambda p: p.write_bytes(b"PK\x03\x04 nonsense"), "damaged"),
        (lambda p: p.write_bytes(b"\x80\x04N."), r"is no \.npy or \.npz"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"), "damaged"),
        (_lying_header, "damaged|memory"),
        (lambda p: np.save(p, np.zeros((2, 6), np.float32)), "2 inputs are needed"),
        (lambda p: p.mkdir(), "cannot be read"),
        (lambda p: None, "no file"),
    ],
)
def test_files_that_hold_no_inputs(
    opened: Engine, tmp_path: Path, write: Callable[[Path], Any], match: str
) -> None:
    path = tmp_path / "input.npy"
    write(path)
    with pytest.raises(BadInputError, match=match) as caught:
        run_file(opened, [path])
    assert "\n" not in str(caught.value)
    assert "pickle" not in str(caught.value), "nobody should be told to allow pickles"


def test_archives_that_do_not_fit(opened: Engine, tmp_path: Path) -> None:
    x, shift = (tensor.numpy() for tensor in example(3))
    path = tmp_path / "input.npz"
    np.savez(path, x=x)
    with pytest.raises(BadInputError, match=r"input\.npz lacks shift"):
        run_file(opened, [path])
    np.savez(path, x=x, shift=shift, other=x)
    with pytest.raises(BadInputError, match="unknown other"):
        run_file(opened, [path])
    np.savez(path, x=x.astype(np.float64), shift=shift)
    with pytest.raises(BadInputError, match='astype\\("float32"\\)'):
        run_file(opened, [path])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00 nonsense")
    with pytest.raises(BadInputError, match="damaged"):
        run_file(opened, [path])


def test_export_as_safetensors_gives_the_models_own_weights(folder: Path, tmp_path: Path) -> None:
    out = export(folder, tmp_path / "out", kind="safetensors")
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(load_file(out / "weights.safetensors"))
    with torch.no_grad():
        assert_same(model(*example(2)), expected(2))
    assert '"backend": "quick"' in (out / "plan.json").read_text()
    export(folder, tmp_path / "out", kind="safetensors")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BadInputError, match=r"notes\.txt"):
        export(folder, tmp_path / "out", kind="safetensors")


def test_export_says_what_it_wrote(folder: Path, tmp_path: Path) -> None:
    result = api.export(folder, tmp_path / "out", kind="safetensors")
    jsonschema.validate(codec.to_json(result), json.loads(schema.text("export")))
    assert (result.output, result.kind) == (str(tmp_path / "out"), "safetensors")
    assert Path(result.output).is_dir()


def test_export_refuses_what_it_cannot_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="unknown kind"):
        export(folder, tmp_path / "out", kind="pickle")
    with pytest.raises(BadInputError, match="folder"):
        export(folder, tmp_path, kind="onnx")
    (folder / "program/graph.json").unlink()
    with pytest.raises(ArtefactError, match=r"graph\.json is missing"):
        export(folder, tmp_path / "out.onnx")


def test_export_as_onnx_answers_the_same(folder: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = export(folder, tmp_path / "deep" / "net.onnx")
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x, shift = (tensor.numpy() for tensor in example(batch))
        found = session.run(None, {"x": x, "shift": shift})
        for array, value in zip(found, expected(batch).values(), strict=True):
            np.testing.assert_allclose(array, value.numpy(), rtol=1e-4, atol=1e-5)
    check(folder)


# -- a real model through the real table of backends ----------------------------------------------

_READER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from suanli.engines.engine import Engine

with Engine.load(Path(sys.argv[1])) as engine:
    assert not engine.portable and not engine.differences, engine.differences
    kept = load_file(sys.argv[2])
    found = engine(attention_mask=kept["mask"], input_ids=kept["ids"])
    torch.testing.assert_close(found.last_hidden_state, kept["hidden"], rtol=1e-4, atol=1e-4)
    print(type(found).__name__, engine.plan.title)
"""


def test_a_fresh_process_gets_the_models_own_result_class(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.int64)
    source = capture(
        model,
        Inputs(kwargs={"input_ids": ids, "attention_mask": mask}),
        folder=tmp_path / "program",
        name="bert",
        max_batch=4,
    )
    plan = Plan(backend="eager")
    (tmp_path / "build").mkdir()
    note = backends()["eager"].build(source, plan, tmp_path / "build")
    built = BuiltVariant(plan=note.plan, folder=tmp_path / "build", min_batch=1, max_batch=4)
    write_engine(tmp_path / "engine", program=source, variants=[built])
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.contiguous()
    save_file({"ids": ids, "mask": mask, "hidden": hidden}, tmp_path / "kept.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _READER, tmp_path / "engine", tmp_path / "kept.safetensors"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["BaseModelOutputWithPoolingAndCrossAttentions", "eager", "fp32"]
