"""The user's own signing key, the keys that the user trusts, and signatures of short messages.

A SHA-256 shows damage, not origin. What Suanli writes and later loads as code is therefore signed
with Ed25519 (RFC 8032) by a key that is made on first use and never leaves the machine:
`config_dir()/key`, 32 raw bytes, readable by its owner alone. In a container the environment
variable `SUANLI_KEY` gives the key instead, as a path or as base64. Public keys of others that the
user trusts are files in `config_dir()/trusted_keys`.
"""

import base64
import contextlib
import hashlib
import os
import re
import stat
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from suanli.base import codec
from suanli.base.errors import ArtefactError, BadInputError, SuanliError
from suanli.base.files import config_dir, write_atomic
from suanli.base.results import PublicKey

_KEY_BYTES = 32
_KEY_FILE_LIMIT = 4096
_PURPOSE = b"suanli engine manifest 1\n"  # what the key signs here means nothing elsewhere
_RACE_WAIT_S = 2.0
_made_here: set[bytes] = set()  # public key of `_key_of_this_process`, once there is one


@dataclass(frozen=True, kw_only=True)
class SignatureFile:
    """What stands in `signature.json`. Both values are base64.

    Attributes:
        algorithm: "ed25519".
        public_key: 32 bytes.
        signature: 64 bytes over the purpose line and the message.
    """

    algorithm: str
    public_key: str
    signature: str


class SigningKey:
    """A private key. It shows itself only by its fingerprint."""

    def __init__(self, seed: bytes) -> None:
        """Take the 32 bytes of an Ed25519 private key.

        Raises:
            BadInputError: There are not 32 bytes.
        """
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        if len(seed) != _KEY_BYTES:
            raise BadInputError(f"a signing key has {_KEY_BYTES} bytes, this one {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"SigningKey({fingerprint(self.public_key)})"

    def sign(self, message: bytes) -> str:
        """The text of a `signature.json` for `message`."""
        signature = self._key.sign(_PURPOSE + message)
        return codec.dumps(
            SignatureFile(
                algorithm="ed25519",
                public_key=base64.b64encode(self.public_key).decode(),
                signature=base64.b64encode(signature).decode(),
            )
        )


def signer(message: bytes, signature_text: bytes) -> bytes:
    """The public key that signed `message`, whoever's it is.

    Args:
        message: What was signed.
        signature_text: The bytes of `signature.json`.

    Raises:
        ArtefactError: The signature is malformed or is not one of this message.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        found = codec.loads(SignatureFile, signature_text.decode("utf-8"))
        public_key = base64.b64decode(found.public_key, validate=True)
        signature = base64.b64decode(found.signature, validate=True)
        if codec.dumps(found).encode() != signature_text:  # one spelling, so that damage shows
            raise ArtefactError("signature.json is damaged")
        if found.algorithm != "ed25519":
            raise ArtefactError("signature.json names an unknown algorithm")
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _PURPOSE + message)
    except InvalidSignature:
        raise ArtefactError("signature.json does not belong to this manifest.json") from None
    except ValueError as error:  # not UTF-8, not base64, not 32 bytes
        raise ArtefactError(f"signature.json is damaged: {error}") from None
    return public_key


def fingerprint(public_key: bytes) -> str:
    """Sixteen hexadecimal digits that name a public key (of its SHA-256)."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def own_key(*, keep: bool = True) -> SigningKey:
    """The user's key; made and stored on first use.

    Args:
        keep: Whether the key must last. If not, and none can be stored, a key of this process is
            given: in others, what it signs opens only as a stranger's would.

    Raises:
        BadInputError: `SUANLI_KEY` or the stored key cannot be used.
        SuanliError: There is no key and none can be stored.
    """
    given = os.environ.get("SUANLI_KEY")
    if given:
        return SigningKey(_seed_from(given))
    path = config_dir() / "key"
    try:
        if not path.exists():
            _store_new(path)
        return SigningKey(_read_own(path))
    except OSError as error:
        if not keep:
            return _key_of_this_process()
        raise SuanliError(
            f"no signing key can be kept at {path}: {error.strerror or error}",
            next_step="set SUANLI_CONFIG to a folder that can be written, "
            "or SUANLI_KEY to a key (32 bytes, as a file or base64)",
        ) from None


@cache
def _key_of_this_process() -> SigningKey:
    _made_here.add((key := SigningKey(os.urandom(_KEY_BYTES))).public_key)
    return key


def trusted(public_key: bytes) -> bool:
    """Whether the key is the user's own or stands in `trusted_keys`. Makes no key."""
    if public_key in _made_here:
        return True
    return public_key in _own_public_keys() or public_key in trusted_keys()


def trusted_keys() -> set[bytes]:
    """The public keys of others that the user trusts. Files that hold no key count for nothing."""
    return {public_key for _, public_key in _trusted_files()}


def _trusted_files() -> list[tuple[Path, bytes]]:
    """The files in `trusted_keys` that hold a key, with it."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(_trusted_folder().glob("*.pub")):
            with contextlib.suppress(OSError, ValueError, BadInputError):
                found.append((path, parse_public_key(_read_limited(path).decode("ascii"))))
    return found


def trust(public_key: bytes) -> Path:
    """Trust a public key from now on.

    Returns:
        The file it stands in; deleting it withdraws the trust.

    Raises:
        BadInputError: It is no public key.
        SuanliError: It cannot be stored.
    """
    if len(public_key) != _KEY_BYTES:
        raise BadInputError(f"a public key has {_KEY_BYTES} bytes, this one {len(public_key)}")
    path = _trusted_folder() / f"{fingerprint(public_key)}.pub"
    try:
        write_atomic(path, base64.b64encode(public_key) + b"\n")
    except OSError as error:
        raise SuanliError(
            f"cannot write {path}: {error.strerror or error}",
            next_step="set SUANLI_CONFIG to a folder that can be written",
        ) from None
    return path


def trust_text(given: str) -> str:
    """Trust the public key in a file, or written out as base64.

    Returns:
        Its fingerprint.

    Raises:
        BadInputError: It is no public key, or the user's own.
        SuanliError: It cannot be stored.
    """
    public_key = _public_key_from(given)
    if public_key in _own_public_keys():
        raise BadInputError(
            f"{fingerprint(public_key)} is your own key, which is trusted anyway",
            next_step="give the key of whoever made the engine",
        )
    trust(public_key)
    return fingerprint(public_key)


def distrust(given: str) -> str:
    """Withdraw the trust in a key of another.

    Args:
        given: Its fingerprint, or what `trust_text` takes.

    Returns:
        Its fingerprint.

    Raises:
        BadInputError: No such key is trusted.
        SuanliError: Its file cannot be removed.
    """
    kept = {fingerprint(key): key for key in trusted_keys()}
    name = given.strip().lower()
    if name not in kept:
        name = "" if re.fullmatch("[0-9a-f]{16}", name) else fingerprint(_public_key_from(given))
    if name not in kept:
        raise BadInputError(
            f"{given} is not among the trusted keys", next_step="`suanli trust` lists them"
        )
    for path, public_key in _trusted_files():
        if public_key == kept[name]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise SuanliError(f"cannot remove {path}: {error.strerror or error}") from None
    return name


def named(public_key: bytes) -> PublicKey:
    """A public key as people exchange it."""
    return PublicKey(
        fingerprint=fingerprint(public_key), public_key=base64.b64encode(public_key).decode()
    )


def _public_key_from(given: str) -> bytes:
    """The public key in a file, or the one that is written out.

    Raises:
        BadInputError: It is none, or the file cannot be read.
    """
    path = Path(given)
    try:
        written_out = not path.is_file()
    except (OSError, ValueError):  # too long for a path, or with characters that none has
        written_out = True
    if written_out:
        try:
            return parse_public_key(given)
        except BadInputError:
            raise BadInputError(
                f"{given[:120]!r} is neither a file nor a public key",
                next_step="`suanli trust` of its owner shows the public key",
            ) from None
    try:
        content = _read_limited(path)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) == _KEY_BYTES:
        raise BadInputError(
            f"{path} may be a private key, which nobody should give away",
            next_step="`suanli trust` of its owner shows the public key",
        )
    return parse_public_key(content.decode("ascii", errors="replace"))


def parse_public_key(text: str) -> bytes:
    """The 32 bytes of a public key written as base64.

    Raises:
        BadInputError: It is none.
    """
    try:
        public_key = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        public_key = b""
    if len(public_key) != _KEY_BYTES:
        raise BadInputError("this is no public key (base64 of 32 bytes is needed)")
    return public_key


def _trusted_folder() -> Path:
    return config_dir() / "trusted_keys"


def _own_public_keys() -> set[bytes]:
    seeds = []
    given = os.environ.get("SUANLI_KEY")
    if given:
        seeds.append(_seed_from(given))
    with contextlib.suppress(OSError):
        path = config_dir() / "key"
        if path.exists():
            seeds.append(_read_own(path))
    return {SigningKey(seed).public_key for seed in seeds}


def _seed_from(given: str) -> bytes:
    """The key in `SUANLI_KEY`. No message repeats the value: it may be the secret itself."""
    next_step = "give the path of a file of 32 bytes, or the base64 of 32 bytes"
    content = given.encode()
    with contextlib.suppress(OSError, ValueError):  # base64 can be too long to be a path
        if Path(given).is_file():
            content = _read_limited(Path(given))
            if len(content) == _KEY_BYTES:
                return content
    try:
        seed = base64.b64decode(content.strip(), validate=True)
    except ValueError:
        raise BadInputError("SUANLI_KEY holds no key", next_step=next_step) from None
    if len(seed) != _KEY_BYTES:
        raise BadInputError(f"SUANLI_KEY holds {len(seed)} bytes", next_step=next_step)
    return seed


def _read_own(path: Path) -> bytes:
    """The stored key, once it is whole: without hard links another process may still write it."""
    deadline = time.monotonic() + _RACE_WAIT_S
    while True:
        seed = _read_limited(path)
        if len(seed) == _KEY_BYTES:
            break
        if time.monotonic() > deadline:
            raise BadInputError(
                f"{path} is no signing key: {len(seed)} bytes instead of {_KEY_BYTES}",
                next_step=f"remove {path}; a new key is made, and engines are rebuilt",
            )
        time.sleep(0.02)
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise BadInputError(
            f"{path} can be read by other users, so it vouches for nothing",
            next_step=f"chmod 600 {path}, or remove it to get a new key",
        )
    return seed


def _store_new(path: Path) -> None:
    """Store a new key unless another process was first. A reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".key.")  # mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            path.hardlink_to(temporary)  # atomic, and fails where a key is there already
        except FileExistsError:
            return
        except OSError:
            _store_exclusively(path, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)


def _store_exclusively(path: Path, seed: bytes) -> None:
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(seed)


def _read_limited(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_KEY_FILE_LIMIT)
