"""Encryption of checkpoints at rest: AES-256-GCM with a key that the user keeps in a file.

A file is a header and pieces of 64 MiB, each with a nonce of its own; what file it is, the piece's
number and whether it is the last are authenticated too, so that pieces cannot be exchanged, moved
or cut off. Texts that stay readable get a tag (HMAC-SHA256, RFC 2104), which nobody makes without
the key. Without the key's file the checkpoints are lost: nothing else opens them.
"""

import base64
import binascii
import hmac
import os
import struct
import time
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from suanli.base.errors import ArtefactError, BadInputError

_HEADER = b"suanli-aes256gcm-2\n"
_PIECE = 64 << 20
_NONCE = 12  # bytes, as NIST SP 800-38D recommends for GCM
_TAG = 16
_KEY_BYTES = 32
_TAGS = b"suanli: tags of texts"  # what the key of the tags is derived for: no key has two uses
_WAIT_S = 5.0  # for another process that makes the key


class Cipher:
    """Encrypts and decrypts whole files, and tags texts."""

    def __init__(self, key: bytes | Path) -> None:
        """Take a key of 32 bytes, or the file that will hold it when it is used."""
        self._key = key

    @classmethod
    def from_file(cls, path: Path, *, make: bool = False) -> "Cipher":
        """Read a key (32 bytes as base64); where there is none yet, `ready` makes it.

        Args:
            path: Its file; made with mode 0600.
            make: Whether a new one may be made.

        Raises:
            BadInputError: The file is absent, or holds no key, or cannot be made.
        """
        if make and not path.exists():
            if not os.access(next(filter(Path.is_dir, path.parents), Path()), os.W_OK):
                raise BadInputError(f"cannot write the key {path}: its folder takes no files")
            return cls(path)
        return cls(cls._read(path))

    def ready(self) -> None:
        """Have the key, and make it where that was allowed and there still is none.

        Raises:
            BadInputError: The file cannot be written, or holds no key.
        """
        if isinstance(self._key, Path):
            try:
                self._key.parent.mkdir(parents=True, exist_ok=True)
                _make_key(self._key)
            except OSError as error:
                raise BadInputError(f"cannot write the key {self._key}: {error.strerror}") from None
            self._key = self._read(self._key)

    @cached_property
    def _bytes(self) -> bytes:
        self.ready()
        assert isinstance(self._key, bytes)
        return self._key

    @cached_property
    def _aes(self) -> AESGCM:
        return AESGCM(self._bytes)

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            key = base64.b64decode(path.read_bytes().strip(), validate=True)
        except OSError as error:
            raise BadInputError(
                f"cannot read the key {path}: {error.strerror}",
                next_step="a run that was begun needs the key it was begun with",
            ) from None
        except binascii.Error:
            key = b""
        if len(key) != _KEY_BYTES:
            raise BadInputError(
                f"{path} holds no key", next_step="32 bytes as base64; a new file makes one"
            )
        return key

    def tag(self, text: bytes) -> str:
        """What shows that somebody with the key wrote this text, as 64 hexadecimal digits."""
        own = hmac.digest(self._bytes, _TAGS, "sha256")
        return hmac.digest(own, text, "sha256").hex()

    def tagged(self, text: bytes, tag: str) -> bool:
        """Whether the tag is the text's."""
        return hmac.compare_digest(self.tag(text).encode(), tag.encode(errors="replace"))

    def encrypted(self, payload: bytes, name: str) -> bytes:
        """A file's content as it goes to disk; it opens under the same name only."""
        pieces = [payload[i : i + _PIECE] for i in range(0, max(len(payload), 1), _PIECE)]
        result = [_HEADER]
        for number, piece in enumerate(pieces):
            nonce = os.urandom(_NONCE)
            about = _about(name, number, last=number == len(pieces) - 1)
            result += [nonce, self._aes.encrypt(nonce, piece, about)]
        return b"".join(result)

    def decrypted(self, payload: bytes, name: str) -> bytes:
        """The file's content again.

        Raises:
            ArtefactError: It was made with another key, or changed since.
        """
        if not payload.startswith(_HEADER):
            raise ArtefactError(f"{name} is not encrypted as its checkpoint says")
        body = payload[len(_HEADER) :]
        whole = _NONCE + _PIECE + _TAG
        pieces = [body[i : i + whole] for i in range(0, len(body), whole)]
        result = []
        for number, piece in enumerate(pieces):
            about = _about(name, number, last=number == len(pieces) - 1)
            try:
                result.append(self._aes.decrypt(piece[:_NONCE], piece[_NONCE:], about))
            except (InvalidTag, ValueError):
                raise ArtefactError(
                    f"{name} cannot be decrypted: another key, or it was changed"
                ) from None
        return b"".join(result)


def _make_key(path: Path) -> None:
    """Write a fresh key; where another process of the same run is first, its key is there after."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        deadline = time.monotonic() + _WAIT_S
        while not path.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.01)
        return
    with os.fdopen(handle, "wb") as file:
        file.write(base64.b64encode(os.urandom(_KEY_BYTES)) + b"\n")


def _about(name: str, number: int, *, last: bool) -> bytes:
    return name.encode() + struct.pack("<QB", number, last)
