"""What an engine folder says of itself, sealed by a signature over it and a hash of every file.

The order of checking is the point: the bytes of `manifest.json` are held against `signature.json`
first; only then are they parsed; only then is the folder walked and hashed; only then may anybody
read what it holds. Between the check and the reading the folder must not be open to writers who
are not trusted; no file format can help against those.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from suanli.base import codec
from suanli.base.errors import ArtefactError, UntrustedError
from suanli.base.hardware import DeviceInfo, Environment
from suanli.base.plan import Plan, Precision
from suanli.base.results import Confirmation, SchemaName, TimedPlan
from suanli.base.signature import Signature
from suanli.base.timing import Estimate
from suanli.base.trial import Quality, ValueCheck
from suanli.base.work import SpeedOfLight
from suanli.engines import signing
from suanli.engines._folder import read_limited, remove_empty_folders, sha256, walk

MANIFEST, SIGNATURE, PROGRAM, VARIANTS = (
    "manifest.json",
    "signature.json",
    "program",
    "variants",
)
SCHEMA = SchemaName(name="suanli.engine", version=1)

_MANIFEST_LIMIT = 8 << 20
_SIGNATURE_LIMIT = 4096
_MOST_FILES = 10_000
_LARGEST_FILE = 1 << 42  # 4 TiB: beyond any model, so a lie
_DEEPEST = 48
_LONGEST_PATH = 512

# Formats that are read as plain data. Whatever is not listed counts as able to run code.
_PLAIN = {".json", ".safetensors", ".txt", ".onnx", ".data", ".xml", ".bin"}
_UNSAFE_NAMES = {"graph.json"}  # torch evaluates expressions that stand in it
_PLAIN_NODES = {None, "builtins.tuple", "builtins.list", "builtins.dict"}
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass(frozen=True, kw_only=True)
class FileHash:
    """One file of an engine: SHA-256 in hexadecimal, and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One built plan of an engine and the batch sizes that it serves.

    Attributes:
        folder: Relative path of what the backend wrote, such as "variants/0".
        min_batch: Smallest batch it serves.
        max_batch: Largest batch it serves.
    """

    plan: Plan
    folder: str
    min_batch: int
    max_batch: int


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What was measured and verified when the engine was made, as in `OptimizeResult`.

    None and empty stand for what was not measured or not judged. `max_drop` (a fraction),
    `tolerance`, `backends` and `precision` are what was asked for, so that `rebuild` can ask again.
    """

    objective: str = "latency"
    batch: int = 1
    untrained: bool = True
    flops: int | None = None
    parameters: int | None = None
    baseline: TimedPlan | None = None
    chosen: TimedPlan | None = None
    speedup_vs_eager: Estimate | None = None
    speedup_vs_best_baseline: Estimate | None = None
    confirmations: tuple[Confirmation, ...] = ()
    quality: Quality | None = None
    values: ValueCheck | None = None
    sol: SpeedOfLight | None = None
    max_drop: float = 0.005
    tolerance: float | None = None
    backends: tuple[str, ...] = ()
    precision: Precision = "bf16"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What stands in `manifest.json`.

    Attributes:
        name: The model's short name.
        workload: How to build the workload anew; "" where it lives in no file.
        variants: In order of choice: the first whose range holds a batch serves it.
        environment: Libraries and system that the numbers were measured with.
        device: The device that the plans were built for.
        hardware: Fingerprint of what built code depends on, see `hardware_fingerprint`.
        files: Every file but `manifest.json` and `signature.json`, by relative path.
        created: UTC, ISO 8601.
    """

    schema: SchemaName
    name: str
    workload: str
    variants: tuple[Variant, ...]
    signature: Signature
    environment: Environment
    device: DeviceInfo
    hardware: str
    created: str
    numbers: Numbers = field(default_factory=Numbers)
    files: dict[str, FileHash] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def suanli(self) -> str:
        """The version of Suanli that made it."""
        return self.environment.suanli

    @property
    def max_batch(self) -> int:
        """Largest batch that any variant serves."""
        return max(variant.max_batch for variant in self.variants)


def seal(folder: Path, manifest: Manifest, key: signing.SigningKey) -> Manifest:
    """Hash every file of a complete folder, write `manifest.json` and sign it.

    Args:
        folder: Holds `program/` and the variants' folders. Empty folders in it are removed.
        manifest: What to write; its `files` are replaced by what is found.
        key: Signs.

    Returns:
        The manifest as written.

    Raises:
        ArtefactError: The folder holds a link or something that is no file, or the manifest would
            not pass its own check.
        OSError: The folder cannot be written.
    """
    for name in (MANIFEST, SIGNATURE):
        (folder / name).unlink(missing_ok=True)
    remove_empty_folders(folder)
    files = {
        path: FileHash(sha256=sha256(folder / path), size_bytes=size)
        for path, size in sorted(walk(folder))
    }
    sealed = codec.from_json(Manifest, {**codec.to_json(manifest), "files": codec.to_json(files)})
    payload = codec.dumps(sealed).encode()
    _parse(payload)
    (folder / MANIFEST).write_bytes(payload)
    (folder / SIGNATURE).write_text(key.sign(payload), encoding="utf-8")
    return sealed


def read_manifest(folder: Path) -> tuple[Manifest, bytes]:
    """The manifest and the public key that signed it. No file of the folder is looked at.

    Raises:
        ArtefactError: There is no engine, or its manifest is not the one that was signed.
    """
    if not (folder / MANIFEST).is_file():
        raise ArtefactError(f"{folder} is no engine: it has no {MANIFEST}")
    payload = read_limited(folder, MANIFEST, _MANIFEST_LIMIT)
    signature = read_limited(folder, SIGNATURE, _SIGNATURE_LIMIT)
    public_key = signing.signer(payload, signature)
    return _parse(payload), public_key


def check(folder: Path, *, trust: bool = False) -> Manifest:
    """Hold a folder against its signature and hashes, and decide whether it may be opened.

    Args:
        folder: An engine folder.
        trust: Open it although its key is neither the user's own nor a trusted one.

    Raises:
        ArtefactError: Something was changed, added or taken away; the message names the file.
        UntrustedError: It is whole, holds what can run code, and nobody vouches for its maker.
    """
    manifest, public_key = read_manifest(folder)
    _check_files(folder, manifest)
    if trust or signing.trusted(public_key):
        return manifest
    unsafe = unsafe_parts(manifest)
    if unsafe:
        more = f" and {len(unsafe) - 1} more" if len(unsafe) > 1 else ""
        raise UntrustedError(
            f"{folder.name} is signed by key {signing.fingerprint(public_key)}, which is neither "
            f"yours nor trusted, and opening {unsafe[0]}{more} can run code of whoever made it, "
            "with your rights",
            next_step="if you know its maker, open it with --trust (in Python trust=True)",
        )
    return manifest


def unsafe_parts(manifest: Manifest) -> list[str]:
    """What in the engine is native code, or has a reader that may run what stands in it."""
    parts = [
        path
        for path in manifest.files
        if PurePosixPath(path).suffix.lower() not in _PLAIN
        or PurePosixPath(path).name.lower() in _UNSAFE_NAMES
    ]
    if manifest.workload and f"{PROGRAM}/graph.json" not in manifest.files:
        parts.append(f"the source {manifest.workload!r}")
    for tree in (manifest.signature.in_tree, manifest.signature.out_tree):
        if not _plain_tree(tree):
            parts.append(f"the calling convention in {MANIFEST}")
            break
    return parts


def _plain_tree(text: str) -> bool:
    """Whether reading a tree imports nothing: torch imports what enums and factories name."""
    try:
        _, root = json.loads(text)
        nodes = [root]
        while nodes:
            node = nodes.pop()
            keys = json.loads(node["context"]) if node["context"] is not None else None
            if node["type"] not in _PLAIN_NODES or not _plain_keys(keys):
                return False
            nodes += node["children_spec"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return True


def _plain_keys(keys: object) -> bool:
    return keys is None or (
        isinstance(keys, list) and all(isinstance(key, str | int) for key in keys)
    )


def _parse(payload: bytes) -> Manifest:
    """A manifest whose every part is sound in itself."""
    if len(payload) > _MANIFEST_LIMIT:
        raise ArtefactError(f"{MANIFEST} is larger than {_MANIFEST_LIMIT} bytes")
    _check_depth(payload, MANIFEST)
    try:
        manifest = codec.loads(Manifest, payload.decode("utf-8"))
    except UnicodeDecodeError:
        raise ArtefactError(f"{MANIFEST} is not UTF-8") from None
    except ArtefactError as error:
        # another version has other fields, so its number is the better reason
        raise ArtefactError(_other_version(payload) or f"{MANIFEST}: {error}") from None
    if manifest.schema != SCHEMA:
        raise ArtefactError(_other_version(payload) or f"{MANIFEST} is of another kind")
    if not manifest.name.isprintable():
        raise ArtefactError(f"{MANIFEST} gives a name that cannot be printed")
    for tree in (manifest.signature.in_tree, manifest.signature.out_tree):
        _check_depth(tree.encode(errors="replace"), f"the signature in {MANIFEST}")
    if len(manifest.files) > _MOST_FILES:
        raise ArtefactError(f"{MANIFEST} lists more than {_MOST_FILES} files")
    for path, entry in manifest.files.items():
        _check_path(path)
        if not 0 <= entry.size_bytes <= _LARGEST_FILE:
            raise ArtefactError(f"{MANIFEST} gives {path} an absurd size")
        if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
            raise ArtefactError(f"{MANIFEST} gives {path} no SHA-256")
    _check_variants(manifest)
    return manifest


def _check_variants(manifest: Manifest) -> None:
    """Every batch that the signature takes is served, and nothing lies outside the folder."""
    if not manifest.variants:
        raise ArtefactError(f"{MANIFEST} names no variant")
    folders = [variant.folder for variant in manifest.variants]
    for folder in folders:
        if not re.fullmatch(rf"{VARIANTS}/[0-9]{{1,4}}", folder):
            raise ArtefactError(f"{MANIFEST} names the unusable folder {folder!r}")
    if len(set(folders)) < len(folders):
        raise ArtefactError(f"{MANIFEST} names one folder for two variants")
    if any(variant.plan.options.get("source") for variant in manifest.variants):
        raise ArtefactError(f"{MANIFEST} names a plan that runs files from outside the engine")
    limit = manifest.signature.max_batch
    for variant in manifest.variants:
        if not 1 <= variant.min_batch <= variant.max_batch <= limit:
            raise ArtefactError(
                f"{variant.folder} serves batches {variant.min_batch} to {variant.max_batch} "
                f"of a program that takes 1 to {limit}"
            )
    covered = 0 if manifest.signature.dynamic else limit - 1
    for variant in sorted(manifest.variants, key=lambda v: v.min_batch):
        if variant.min_batch > covered + 1:
            break
        covered = max(covered, variant.max_batch)
    if covered < manifest.max_batch:
        raise ArtefactError(f"{MANIFEST} names no variant for batch {covered + 1}")


def _other_version(payload: bytes) -> str:
    """What to say of a manifest that an older or newer Suanli wrote; "" for this version's."""
    try:
        schema = json.loads(payload)["schema"]
        name, version = schema["name"], int(schema["version"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""
    if name != SCHEMA.name or version == SCHEMA.version:
        return ""
    return (
        f"this engine has format {version}, this Suanli reads format {SCHEMA.version}: "
        "rebuild it, or use the Suanli that made it"
    )


def _check_path(path: str) -> None:
    """Only plain relative paths below the folder, spelled in one way."""
    parts = path.split("/")
    plain = (
        0 < len(path) <= _LONGEST_PATH
        and path.isprintable()
        and not any(char in path for char in '\\:*?"<>|')
        and all(part not in ("", ".", "..") for part in parts)
        and parts[0] in (PROGRAM, VARIANTS)
        and len(parts) > 1
    )
    if not plain:
        raise ArtefactError(f"{MANIFEST} lists the unusable path {path[:120]!r}")


def _check_depth(payload: bytes, what: str) -> None:
    """Refuse nested text before a recursive parser sees it. Linear in the text's length."""
    depth = 0
    for char in _STRING.sub(b"", payload).translate(None, _NOT_BRACKETS):
        depth += 1 if char in b"[{" else -1
        if depth > _DEEPEST:
            raise ArtefactError(f"{what} is nested deeper than {_DEEPEST} levels")


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Names first, then sizes, then contents: what is cheap refuses what is not."""
    found = dict(walk(folder))
    for name in (MANIFEST, SIGNATURE):
        found.pop(name, None)
    for path in sorted(manifest.files.keys() - found.keys()):
        raise ArtefactError(f"{path} is missing from {folder.name}")
    for path in sorted(found.keys() - manifest.files.keys()):
        raise ArtefactError(f"{path[:200]!r} in {folder.name} does not belong to the engine")
    for path, entry in manifest.files.items():
        if found[path] != entry.size_bytes:
            raise ArtefactError(
                f"{path} has {found[path]} bytes instead of {entry.size_bytes}: it was changed"
            )
    for path, entry in manifest.files.items():
        if sha256(folder / path) != entry.sha256:
            raise ArtefactError(f"{path} is not what was sealed: it was changed")
