"""Whatever ends the writing of a checkpoint, the last complete one loads."""

import errno
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from suanli.base.errors import ArtefactError, BadInputError
from suanli.training import checkpoints as module
from suanli.training._tree import put_together, taken_apart
from suanli.training.checkpoints import Checkpoints, newest_whole, why_not_whole
from suanli.training.encryption import Cipher
from suanli.training.events_file import EventsFile, crc32c


def _state(value: float) -> dict[str, dict[str, Any]]:
    return {
        "model": {"a.weight": torch.full((50, 3), value), "half": torch.ones(2).bfloat16()},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.99)}},
            "param_groups": [{"lr": value, "params": [0], "name": None, "on": True}],
        },
        "run": {"step": int(value), "rng": torch.arange(7, dtype=torch.uint8), "none": None},
    }


def _same(one: Any, other: Any) -> bool:
    left: dict[str, torch.Tensor] = {}
    right: dict[str, torch.Tensor] = {}
    plain = taken_apart(one, left) == taken_apart(other, right)
    return (
        plain and all(torch.equal(left[k], right[k]) for k in left) and left.keys() == right.keys()
    )


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(12, _state(12))
    loaded = kept.load()
    assert loaded is not None
    assert _same(loaded.state, _state(12))
    assert loaded.state["model"]["half"].dtype == torch.bfloat16
    assert loaded.state["optimizer"]["state"][0]["betas"] == (0.9, 0.99)
    assert {f.suffix for f in loaded.folder.iterdir()} == {".json", ".safetensors"}
    assert Checkpoints(tmp_path / "none").load() is None


def test_tree_refuses_what_is_not_data() -> None:
    with pytest.raises(TypeError, match=r"^x: a object$"):
        taken_apart({"x": object()}, {})
    with pytest.raises(ArtefactError, match="absent"):
        put_together({"$tensor": "x"}, {})


def test_keys_that_look_like_a_path_keep_their_own_values() -> None:
    one = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, "a/b'": torch.full((1,), 2.0)}
    tensors: dict[str, torch.Tensor] = {}
    found = put_together(taken_apart(one, tensors), tensors)
    assert [found["a/b"].item(), found["a"]["b"].item(), found["a/b'"].item()] == [1, 0, 2]


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing after it runs."""


@pytest.mark.parametrize("how", ["write", "fsync", "open"])
def test_killed_at_any_moment_the_last_complete_one_loads(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, moments = getattr(os, how), 0
    kept = Checkpoints(tmp_path / "run", backup=tmp_path / "backup")
    kept.save(1, _state(1))
    for at in range(1, 60):
        calls = 0

        def counted(*args: Any, at: int = at) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                if how == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])  # torn in the middle
                raise Killed
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module.os, how, counted)
            patch.setattr(module.shutil, "rmtree", lambda *_a, **_k: None)  # the dead clean nothing
            try:
                kept.save(2, _state(2))
                break
            except Killed:
                moments += 1
        loaded = kept.load()
        assert loaded is not None
        assert _same(loaded.state, _state(loaded.step))
        shutil.rmtree(tmp_path)
        kept.save(1, _state(1))
    assert moments >= 7
    loaded = kept.load()
    assert loaded is not None
    assert loaded.step == 2


def test_full_disk_leaves_the_older_ones_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, _state(1))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            kept.save(2, _state(2))
    assert [f.name for f in tmp_path.iterdir()] == ["step-000000001"]


@pytest.mark.parametrize("name", ["model.safetensors", "run.json", "complete.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_files_are_noticed_and_passed_over(name: str, damage: str, tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, _state(1))
    newest = kept.save(2, _state(2))
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x40
        file.write_bytes(content)
    loaded = kept.load()
    assert loaded is not None
    if name == "complete.json" and damage == "flip":
        return  # a byte of the marker that carries no meaning may well change
    assert loaded.step == 1
    assert len(loaded.passed_over) == 1
    assert newest_whole(tmp_path) == loaded.folder


def test_nothing_whole_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    (kept.save(1, _state(1)) / "run.json").unlink()
    with pytest.raises(ArtefactError, match=r"no checkpoint is whole; step-000000001: run\.json"):
        kept.load()


def test_a_marker_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path).save(1, _state(1))
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    (folder / "complete.json").write_text(json.dumps(marker))
    assert "no name of a file" in why_not_whole(folder)


def test_retention_backup_and_unfinished_ones(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "run", keep=2, backup=tmp_path / "backup")
    (tmp_path / "run" / "step-000000002").mkdir(parents=True)  # was being written when killed
    for step in (1, 2, 3, 4):
        kept.save(step, _state(step))
    for place in ("run", "backup"):
        names = sorted(f.name for f in (tmp_path / place).iterdir())
        assert names == ["step-000000003", "step-000000004"]
    shutil.rmtree(tmp_path / "run")
    loaded = kept.load()
    assert loaded is not None
    assert (loaded.step, loaded.folder.parent.name) == (4, "backup")


def test_a_backup_that_fails_costs_the_copies_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path / "run", keep=2, backup=tmp_path / "backup")

    def unplugged(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_copied", unplugged)
        for step in (1, 2, 3, 4):
            assert kept.save(step, _state(step)).is_dir()
            assert kept.not_copied == "Input/output error"
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == [
        "step-000000003", "step-000000004",
    ]  # fmt: skip
    kept.save(5, _state(5))
    assert (kept.not_copied, newest_whole(tmp_path / "backup").name) == ("", "step-000000005")  # type: ignore[union-attr]


def test_two_processes_make_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Cipher.from_file(tmp_path / "key", make=True)
    with monkeypatch.context() as patch:  # the second one looked before the first had made it
        patch.setattr(Path, "exists", lambda self: False)
        second = Cipher.from_file(tmp_path / "key", make=True)
    assert second.decrypted(first.encrypted(b"text", "a"), "a") == b"text"


def test_encrypted_ones_open_with_their_key_only(tmp_path: Path) -> None:
    cipher = Cipher.from_file(tmp_path / "key", make=True)
    assert not (tmp_path / "key").exists()  # nothing may come of it yet
    cipher.ready()
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    kept = Checkpoints(tmp_path / "run", cipher=cipher)
    folder = kept.save(5, _state(5))
    clear = Checkpoints(tmp_path / "clear").save(5, _state(5))
    assert (clear / "model.safetensors").read_bytes()[8:40] not in b"".join(
        f.read_bytes() for f in folder.iterdir()
    )
    again = Checkpoints(tmp_path / "run", cipher=Cipher.from_file(tmp_path / "key")).load()
    assert again is not None
    assert _same(again.state, _state(5))
    other = Cipher.from_file(tmp_path / "other", make=True)
    with pytest.raises(ArtefactError, match="another key"):
        Checkpoints(tmp_path / "run", cipher=other).load()
    with pytest.raises(ArtefactError, match="is encrypted"):
        Checkpoints(tmp_path / "run").load()


def _rewritten(folder: Path, **changes: Any) -> None:
    """The marker as somebody without the key can write it, with the sums of what is there."""
    marker = json.loads((folder / "complete.json").read_text())
    for name in marker["files"]:
        payload = (folder / name).read_bytes()
        sha256 = hashlib.sha256(payload).hexdigest()
        marker["files"][name] = {"bytes": len(payload), "sha256": sha256}
    (folder / "complete.json").write_text(json.dumps({**marker, **changes}))


@pytest.mark.parametrize("place", ["run", "backup"])
@pytest.mark.parametrize(
    "forged", ["in clear", "said to be in clear", "file of another step", "renamed", "other format"]
)
def test_with_a_key_nothing_loads_that_was_not_made_with_it(
    forged: str, place: str, tmp_path: Path
) -> None:
    cipher = Cipher(bytes(range(32)))
    kept = Checkpoints(tmp_path / "run", keep=3, backup=tmp_path / "backup", cipher=cipher)
    for step in (1, 2):
        kept.save(step, _state(step))
    shutil.rmtree(tmp_path / ({"run", "backup"} - {place}).pop())
    old, new = (tmp_path / place / f"step-00000000{step}" for step in (1, 2))
    if forged == "in clear":
        Checkpoints(tmp_path / place).save(3, _state(666))
        reason = "step-000000003: it is not encrypted, so it was not made with this key"
    elif forged == "said to be in clear":
        for file in Checkpoints(tmp_path / "clear").save(2, _state(666)).iterdir():
            (new / file.name).write_bytes(file.read_bytes())
        _rewritten(new, encrypted=True)
        reason = "step-000000002: it was made with another key, or changed since"
    elif forged == "file of another step":
        (new / "model.safetensors").write_bytes((old / "model.safetensors").read_bytes())
        _rewritten(new)
        reason = "step-000000002: it was made with another key, or changed since"
    elif forged == "renamed":
        old.rename(old.with_name("step-000000009"))
        reason = "step-000000009: it is of another step than its folder says"
    else:
        _rewritten(new, format=1)
        reason = "step-000000002: it is of another version"
    loaded = kept.load()
    assert loaded is not None
    assert loaded.passed_over == (reason,)
    assert _same(loaded.state, _state(loaded.step))
    assert newest_whole(tmp_path / place, cipher) == loaded.folder
    # what is in the way stays, and does not push out what the run itself goes on to write
    kept.save(4, _state(4))
    kept.save(5, _state(5))
    again = kept.load()
    assert again is not None
    assert _same(again.state, _state(5))


def test_a_file_s_place_is_a_part_of_its_encryption(tmp_path: Path) -> None:
    cipher = Cipher(bytes(32))
    folder = Checkpoints(tmp_path, cipher=cipher).save(7, _state(7))
    payload = (folder / "model.json").read_bytes()
    assert cipher.decrypted(payload, "step-000000007/model.json")
    with pytest.raises(ArtefactError, match="cannot be decrypted"):
        cipher.decrypted(payload, "step-000000008/model.json")


def test_an_earlier_format_is_one_line(tmp_path: Path) -> None:
    _rewritten(Checkpoints(tmp_path).save(1, _state(1)), format=1)
    with pytest.raises(ArtefactError, match="step-000000001: it is of another version"):
        Checkpoints(tmp_path).load()


def test_encryption_binds_name_order_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from suanli.training import encryption

    monkeypatch.setattr(encryption, "_PIECE", 100)
    cipher, text = Cipher(bytes(32)), bytes(range(250))
    secret = cipher.encrypted(text, "a")
    assert cipher.decrypted(secret, "a") == text
    assert cipher.decrypted(cipher.encrypted(b"", "a"), "a") == b""
    head, size = len(encryption._HEADER), 100 + 12 + 16
    pieces = [secret[head + i * size : head + (i + 1) * size] for i in range(3)]
    for wrong in (
        secret[: head + 2 * size],
        secret[:head] + pieces[1] + pieces[0] + pieces[2],
        secret[:-1],
        secret[:-1] + bytes([secret[-1] ^ 1]),
        b"plain",
    ):
        with pytest.raises(ArtefactError):
            cipher.decrypted(wrong, "a")
    with pytest.raises(ArtefactError):
        cipher.decrypted(secret, "b")


def test_a_file_that_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("not a key")
    with pytest.raises(BadInputError, match="holds no key"):
        Cipher.from_file(tmp_path / "key")
    with pytest.raises(BadInputError, match="cannot read"):
        Cipher.from_file(tmp_path / "absent")


def test_event_files_are_tensorboard_s(tmp_path: Path) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    with EventsFile(tmp_path) as events:
        events.add(300, {"loss": 0.25, "quality": 0.5})
    content = events.path.read_bytes()
    records = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        records.append(content[12 : 12 + length])
        content = content[16 + length :]
    assert len(records) == 2
    assert records[0].endswith(b"\x1a\x0dbrain.Event:2")
    # step 300 as a varint; a summary of two values: tag, then simple_value as a float
    assert records[1][9:12] == b"\x10\xac\x02"
    assert b"\x0a\x04loss\x15" + struct.pack("<f", 0.25) in records[1]
    assert b"\x0a\x07quality\x15" + struct.pack("<f", 0.5) in records[1]
