"""The user's key: made once, kept private, and what it signs."""

import base64
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from suanli.base.errors import ArtefactError, BadInputError, SuanliError
from suanli.engines import signing


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUANLI_CONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("SUANLI_KEY", raising=False)
    return tmp_path / "config"


def test_a_key_is_made_once_and_is_private(config: Path) -> None:
    first = signing.own_key()
    assert signing.own_key().public_key == first.public_key
    assert stat.S_IMODE((config / "key").stat().st_mode) == 0o600
    assert (config / "key").stat().st_size == 32
    assert sorted(path.name for path in config.iterdir()) == ["key"]
    assert signing.trusted(first.public_key)


def test_a_signature_holds_for_its_message_and_no_other() -> None:
    key = signing.own_key()
    text = key.sign(b"message").encode()
    assert signing.signer(b"message", text) == key.public_key
    with pytest.raises(ArtefactError, match="does not belong"):
        signing.signer(b"messagf", text)


def test_the_key_signs_for_one_purpose_only() -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key = signing.own_key()
    found = signing.codec.loads(signing.SignatureFile, key.sign(b"message"))
    with pytest.raises(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(key.public_key).verify(
            base64.b64decode(found.signature), b"message"
        )


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{}",
        b"\xff\xfe",
        b"[" * 4000,
        b'{"algorithm": "none", "public_key": "", "signature": ""}',
        b'{"algorithm": "ed25519", "public_key": "AAAA", "signature": "AAAA"}',
        b'{"algorithm": "ed25519", "public_key": "!!", "signature": "AAAA"}',
    ],
)
def test_a_malformed_signature_is_refused_in_one_line(damage: bytes) -> None:
    with pytest.raises(ArtefactError) as caught:
        signing.signer(b"message", damage)
    assert "\n" not in str(caught.value)


def test_another_algorithm_is_refused_even_with_a_right_signature() -> None:
    text = signing.own_key().sign(b"m").replace("ed25519", "ed448").encode()
    with pytest.raises(ArtefactError, match="unknown algorithm"):
        signing.signer(b"m", text)


def test_asking_for_trust_makes_no_key(config: Path) -> None:
    assert not signing.trusted(bytes(32))
    assert not config.exists()


def test_a_key_can_be_trusted_and_the_trust_withdrawn(config: Path) -> None:
    other = signing.SigningKey(os.urandom(32)).public_key
    assert not signing.trusted(other)
    path = signing.trust(other)
    assert path.parent == config / "trusted_keys"
    assert signing.trusted(other)
    (path.parent / "junk.pub").write_bytes(b"\xff no key")
    (path.parent / "short.pub").write_text(base64.b64encode(b"short").decode())
    assert signing.trusted_keys() == {other}
    path.unlink()
    assert not signing.trusted(other)


def test_a_public_key_of_the_wrong_length_is_not_trusted() -> None:
    with pytest.raises(BadInputError, match="31"):
        signing.trust(bytes(31))
    with pytest.raises(BadInputError):
        signing.parse_public_key("not base64 at all")


@pytest.mark.parametrize("form", ["raw file", "base64 file", "base64"])
def test_containers_give_the_key_in_the_environment(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = bytes(range(32))
    text = base64.b64encode(seed).decode()
    path = tmp_path / "a key"
    path.write_bytes(seed if form == "raw file" else text.encode() + b"\n")
    monkeypatch.setenv("SUANLI_KEY", text if form == "base64" else str(path))
    key = signing.own_key()
    assert key.public_key == signing.SigningKey(seed).public_key
    assert signing.trusted(key.public_key)


def test_a_wrong_key_in_the_environment_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = base64.b64encode(bytes(31)).decode()
    for value in (secret, "x" * 5000, "no/such/file"):
        monkeypatch.setenv("SUANLI_KEY", value)
        with pytest.raises(BadInputError) as caught:
            signing.own_key()
        assert value not in str(caught.value)
        assert "SUANLI_KEY" in str(caught.value)


def test_the_stored_key_keeps_its_trust_beside_one_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = signing.own_key().public_key
    monkeypatch.setenv("SUANLI_KEY", base64.b64encode(bytes(32)).decode())
    assert signing.own_key().public_key != stored
    assert signing.trusted(stored)


@pytest.mark.skipif(os.name != "posix", reason="no such modes")
def test_a_key_that_others_can_read_is_refused(config: Path) -> None:
    signing.own_key()
    (config / "key").chmod(0o644)
    with pytest.raises(BadInputError, match="chmod 600"):
        signing.own_key()


def test_a_truncated_key_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "_RACE_WAIT_S", 0.05)
    config.mkdir()
    (config / "key").write_bytes(b"short")
    (config / "key").chmod(0o600)
    with pytest.raises(BadInputError, match="5 bytes"):
        signing.own_key()


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("SUANLI_CONFIG", str(blocker / "config"))
    with pytest.raises(SuanliError, match="SUANLI_CONFIG"):
        signing.own_key()
    passing = signing.own_key(keep=False).public_key
    assert signing.own_key(keep=False).public_key == passing
    assert signing.trusted(passing)
    call = f"signing.trusted(bytes.fromhex({passing.hex()!r}))"
    code = f"from suanli.engines import signing; print({call})"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert elsewhere.stdout.strip() == "False"


def test_without_hard_links_the_key_is_still_made_once(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    key = signing.own_key()
    assert signing.own_key().public_key == key.public_key
    assert stat.S_IMODE((config / "key").stat().st_mode) == 0o600
    assert sorted(path.name for path in config.iterdir()) == ["key"]


def test_processes_that_start_together_agree_on_one_key(config: Path) -> None:
    code = (
        "import sys; from suanli.engines import signing; signing.SigningKey(bytes(32));"
        "print('ready', flush=True); sys.stdin.readline();"
        "print(signing.own_key().public_key.hex())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "SUANLI_CONFIG": str(config)},
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    keys = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert keys == {signing.own_key().public_key.hex()}
    assert sorted(path.name for path in config.iterdir()) == ["key"]


def test_a_key_does_not_show_itself() -> None:
    seed = os.urandom(32)
    key = signing.SigningKey(seed)
    assert seed.hex() not in repr(key)
    assert signing.fingerprint(key.public_key) in repr(key)
