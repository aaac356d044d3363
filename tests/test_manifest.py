"""Damage, forgery and malice in an engine folder: each refused before anything is parsed."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from suanli.base import codec
from suanli.base.errors import EXIT_BAD_INPUT, ArtefactError, UntrustedError
from suanli.engines import manifest as manifests
from suanli.engines import signing
from suanli.engines.engine import Engine
from suanli.engines.manifest import Manifest, check, read_manifest, seal, unsafe_parts
from suanli.engines.program import Program
from tests.engine_parts import OTHER, PLAN, make_engine, make_program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return make_program(tmp_path_factory.mktemp("program"))


@pytest.fixture
def engine(tmp_path: Path, program: Program) -> Path:
    """An engine to damage: a copy, because what is written shares its files with the program."""
    make_engine(tmp_path / "first", program, tmp_path)
    shutil.copytree(tmp_path / "first", tmp_path / "engine")
    return tmp_path / "engine"


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Sign a changed manifest with the user's own key, as no honest writer would."""
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    payload = json.dumps(data).encode()
    (folder / "manifest.json").write_bytes(payload)
    (folder / "signature.json").write_text(signing.own_key().sign(payload))


def refused(folder: Path, match: str | None = None) -> str:
    with pytest.raises(ArtefactError, match=match) as caught:
        check(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return message


def test_a_sealed_engine_is_whole(engine: Path) -> None:
    manifest = check(engine)
    on_disk = {str(p.relative_to(engine)) for p in engine.rglob("*") if p.is_file()}
    assert set(manifest.files) == on_disk - {"manifest.json", "signature.json"}
    assert manifest.variants[0].plan == PLAN
    assert codec.loads(Manifest, codec.dumps(manifest)) == manifest


def test_every_flipped_byte_is_found(engine: Path) -> None:
    flips = 0
    for path in sorted(p for p in engine.rglob("*") if p.is_file()):
        original = path.read_bytes()
        step = max(1, len(original) // 12)
        for position in {0, len(original) - 1, *range(0, len(original), step)}:
            damaged = bytearray(original)
            damaged[position] ^= 0x20
            path.write_bytes(damaged)
            message = refused(engine)
            if path.name not in ("manifest.json", "signature.json"):
                assert str(path.relative_to(engine)) in message
            flips += 1
        path.write_bytes(original)
    assert flips > 60
    check(engine)


def test_every_truncated_file_is_found(engine: Path) -> None:
    for path in sorted(p for p in engine.rglob("*") if p.is_file()):
        original = path.read_bytes()
        for length in (0, len(original) // 2, len(original) - 1):
            path.write_bytes(original[:length])
            refused(engine)
        path.write_bytes(original + b"\0")
        refused(engine)
        path.write_bytes(original)


def test_every_missing_file_is_named(engine: Path) -> None:
    for path in sorted(p for p in engine.rglob("*") if p.is_file()):
        original = path.read_bytes()
        path.unlink()
        assert path.name in refused(engine)
        path.write_bytes(original)


@pytest.mark.parametrize("where", ["extra.bin", "program/extra.json", "variants/0/nested/x.so"])
def test_an_extra_file_is_named(engine: Path, where: str) -> None:
    (engine / where).write_text("x")
    assert Path(where).name in refused(engine, "does not belong")


@pytest.mark.parametrize("where", ["program/weights.safetensors", "variants/0/built.bin"])
def test_a_link_to_the_same_bytes_is_refused(engine: Path, tmp_path: Path, where: str) -> None:
    shutil.move(engine / where, tmp_path / "elsewhere")
    (engine / where).symlink_to(tmp_path / "elsewhere")
    refused(engine, "link")


def test_a_linked_folder_is_refused(engine: Path, tmp_path: Path) -> None:
    shutil.move(engine / "variants", tmp_path / "elsewhere")
    (engine / "variants").symlink_to(tmp_path / "elsewhere")
    refused(engine, "link")


@pytest.mark.parametrize("name", ["manifest.json", "signature.json"])
def test_a_linked_manifest_or_signature_is_refused(engine: Path, tmp_path: Path, name: str) -> None:
    shutil.move(engine / name, tmp_path / "elsewhere")
    (engine / name).symlink_to(tmp_path / "elsewhere")
    refused(engine)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_does_not_hang_the_check(engine: Path) -> None:
    for name in ("program/meta.json", "signature.json"):
        original = (engine / name).read_bytes()
        (engine / name).unlink()
        os.mkfifo(engine / name)
        refused(engine)
        (engine / name).unlink()
        (engine / name).write_bytes(original)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.bin",
        "program/../../outside.bin",
        "/etc/hostname",
        "program//x",
        "program/./x",
        "program\\x",
        "C:/x",
        "manifest.json",
        "program",
        "program/" + "x" * 600,
        "program/a\0b",
        "program/a\u202eb",
        "",
    ],
)
def test_paths_out_of_the_folder_are_refused_even_when_signed(engine: Path, path: str) -> None:
    (engine.parent / "outside.bin").write_text("x")
    reseal(engine, lambda data: data["files"].update({path: {"sha256": "0" * 64, "size_bytes": 1}}))
    refused(engine, "unusable path")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d["variants"][0].update(folder="../elsewhere"), "unusable folder"),
        (lambda d: d["variants"][0].update(folder="/tmp"), "unusable folder"),
        (lambda d: d["variants"].clear(), "no variant"),
        (lambda d: d["variants"].append(d["variants"][0]), "two variants"),
        (lambda d: d["variants"][0].update(min_batch=0), "serves batches"),
        (lambda d: d["variants"][0].update(max_batch=9), "serves batches"),
        (lambda d: d["variants"][0].update(min_batch=2), "no variant for batch 1"),
        (lambda d: d["files"]["program/meta.json"].update(size_bytes=-1), "absurd"),
        (lambda d: d["files"]["program/meta.json"].update(size_bytes=2**60), "absurd"),
        (lambda d: d["files"]["program/meta.json"].update(sha256="xyz"), "no SHA-256"),
        (lambda d: d["files"]["program/meta.json"].update(size_bytes=1), "instead of 1"),
        (lambda d: d.update(unknown=1), "unknown"),
        (lambda d: d.pop("environment"), "environment"),
        (lambda d: d.update(name="a\x1b[31mb"), "cannot be printed"),
        (lambda d: d["schema"].update(version=99), "format 99"),
        (lambda d: d["schema"].update(name="other"), "another kind"),
        (lambda d: (d["schema"].update(version=2), d.pop("device")), "format 2"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused_even_when_signed(
    engine: Path, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    reseal(engine, change)
    refused(engine, match)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b'{"schema": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'"' + b'\\"' * 500_000,
        b"\xff" * 100,
        b'{"files": 1e999999}',
        b"1" * 10_000,
    ],
    ids=["empty", "null", "lists", "objects", "just below", "quotes", "bytes", "huge", "digits"],
)
def test_hostile_text_is_refused_even_when_signed(engine: Path, payload: bytes) -> None:
    (engine / "manifest.json").write_bytes(payload)
    (engine / "signature.json").write_text(signing.own_key().sign(payload))
    refused(engine)


def test_a_nested_calling_convention_is_refused(engine: Path) -> None:
    tree = "[" * 5000 + "]" * 5000
    reseal(engine, lambda data: data["signature"].update(in_tree=tree))
    refused(engine, "nested deeper")


def test_a_huge_manifest_is_not_read(engine: Path) -> None:
    with (engine / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no space here, and would take all memory
    refused(engine, "larger than")
    reseal_target = engine / "signature.json"
    with reseal_target.open("wb") as file:
        file.truncate(1 << 30)
    refused(engine)


def test_a_folder_of_too_many_files_is_refused(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "_MOST_FILES", 3)
    refused(engine, "more than 3 files")


def test_no_engine_at_all(tmp_path: Path) -> None:
    refused(tmp_path, "is no engine")
    refused(tmp_path / "absent", "is no engine")


# -- origin ---------------------------------------------------------------------------------------


def made_elsewhere(
    folder: Path, program: Program, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setenv("SUANLI_CONFIG", str(scratch / "their config"))
        make_engine(folder, program, scratch)


def test_an_engine_of_a_stranger_is_refused_and_says_what_trust_means(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_elsewhere(tmp_path / "theirs", program, tmp_path, monkeypatch)
    with pytest.raises(UntrustedError) as caught:
        check(tmp_path / "theirs")
    assert caught.value.exit_code == EXIT_BAD_INPUT
    for part in ("graph.json", "with your rights", "--trust"):
        assert part in str(caught.value)
    check(tmp_path / "theirs", trust=True)
    _, public_key = read_manifest(tmp_path / "theirs")
    signing.trust(public_key)
    check(tmp_path / "theirs")


def test_trust_does_not_excuse_damage(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_elsewhere(tmp_path / "theirs", program, tmp_path, monkeypatch)
    (tmp_path / "theirs/variants/0/built.bin").write_text("bf16 quicK")
    with pytest.raises(ArtefactError, match=r"built\.bin"):
        check(tmp_path / "theirs", trust=True)


def test_a_stolen_signature_does_not_fit(tmp_path: Path, program: Program) -> None:
    make_engine(tmp_path / "one", program, tmp_path)
    make_engine(tmp_path / "two", program, tmp_path, ranges=((OTHER, 1, 8),))
    shutil.copy(tmp_path / "one/signature.json", tmp_path / "two/signature.json")
    refused(tmp_path / "two", "does not belong")


def test_a_stranger_who_signs_a_changed_engine_anew_stays_a_stranger(engine: Path) -> None:
    payload = (engine / "manifest.json").read_bytes()
    stranger = signing.SigningKey(bytes(range(32)))
    (engine / "signature.json").write_text(stranger.sign(payload))
    with pytest.raises(UntrustedError, match=signing.fingerprint(stranger.public_key)):
        check(engine)


def test_a_trusted_public_key_on_a_strangers_signature_does_not_help(engine: Path) -> None:
    payload = (engine / "manifest.json").read_bytes()
    mine = json.loads((engine / "signature.json").read_text())["public_key"]
    theirs = signing.SigningKey(bytes(range(32)))
    forged = codec.loads(signing.SignatureFile, theirs.sign(payload))
    (engine / "signature.json").write_text(codec.dumps(replace(forged, public_key=mine)))
    refused(engine, "does not belong")


def test_nothing_is_opened_before_the_check(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_elsewhere(tmp_path / "theirs", program, tmp_path, monkeypatch)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("something was opened")

    monkeypatch.setattr("suanli.engines.engine.Program", forbidden)
    monkeypatch.setattr("suanli.engines.engine._Loader", forbidden)
    with pytest.raises(UntrustedError):
        Engine.load(tmp_path / "theirs")


def plain(manifest: Manifest, **files: str) -> Manifest:
    """The manifest of an engine that holds only these files."""
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    data = codec.to_json(manifest)
    data["files"] = dict.fromkeys(files.values(), entry)
    return codec.from_json(Manifest, data)


@pytest.mark.parametrize(
    "name",
    [
        *("a.so", "a.pt2", "a.PT2", "a.plan", "a.engine", "a.pt", "a.pkl", "a.py", "a.dll"),
        *("a.zip", "a", "graph.json", "Graph.JSON", "a.safetensors.so", "a.keras"),
    ],
)
def test_what_can_run_code_needs_trust(engine: Path, name: str) -> None:
    manifest = plain(check(engine), path=f"variants/0/{name}")
    assert unsafe_parts(manifest) == [f"variants/0/{name}"]


def test_plain_data_needs_no_trust(engine: Path) -> None:
    manifest = plain(check(engine), a="variants/0/m.xml", b="variants/0/m.bin", c="program/w.onnx")
    assert unsafe_parts(manifest) == []


@pytest.mark.parametrize(
    "context",
    [
        '{"__enum__": true, "fqn": "antigravity:X", "name": "Y"}',
        '[{"\\u005f_enum__": true, "fqn": "antigravity:X", "name": "Y"}]',
        '{"default_factory_module": "os", "default_factory_name": "abort", "dict_context": []}',
    ],
)
def test_a_calling_convention_that_imports_needs_trust(engine: Path, context: str) -> None:
    tree = [1, {"type": "builtins.dict", "context": context, "children_spec": []}]
    data = codec.to_json(plain(check(engine), a="variants/0/m.xml"))
    data["signature"]["out_tree"] = json.dumps(tree)
    assert unsafe_parts(codec.from_json(Manifest, data)) == [
        "the calling convention in manifest.json"
    ]


def test_a_model_built_from_source_needs_trust(engine: Path) -> None:
    data = codec.to_json(plain(check(engine), a="variants/0/m.xml"))
    data["workload"] = "/somewhere/model.py:net"
    assert unsafe_parts(codec.from_json(Manifest, data)) == ["the source '/somewhere/model.py:net'"]


# -- sealing --------------------------------------------------------------------------------------


def test_a_manifest_that_could_not_be_read_back_is_never_written(engine: Path) -> None:
    sound = check(engine)
    broken = replace(sound, variants=())
    with pytest.raises(ArtefactError):
        seal(engine, broken, signing.own_key())
    assert not (engine / "signature.json").exists()


def test_sealing_refuses_links_and_forgets_empty_folders(engine: Path) -> None:
    sound = check(engine)
    (engine / "variants/0/empty/inner").mkdir(parents=True)
    seal(engine, sound, signing.own_key())
    assert not (engine / "variants/0/empty").exists()
    check(engine)
    (engine / "variants/0/link").symlink_to("/etc/hostname")
    with pytest.raises(ArtefactError, match="link"):
        seal(engine, sound, signing.own_key())


def test_a_read_only_folder_is_checked_and_left_alone(engine: Path) -> None:
    for path in [*engine.rglob("*"), engine]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(engine.rglob("*"))
    check(engine)
    assert sorted(engine.rglob("*")) == before
    for path in [engine, *engine.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
