"""An engine folder from its parts: written whole, sealed, or not at all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from suanli.base.errors import BadInputError, SuanliError
from suanli.base.files import replaced_folder
from suanli.base.plan import Plan
from suanli.engines import signing
from suanli.engines._fit import here
from suanli.engines._folder import place, place_file, write_error
from suanli.engines.manifest import (
    MANIFEST,
    PROGRAM,
    SCHEMA,
    SIGNATURE,
    VARIANTS,
    Manifest,
    Numbers,
    Variant,
    check,
    read_manifest,
    seal,
)
from suanli.engines.program import Program


@dataclass(frozen=True, kw_only=True)
class BuiltVariant:
    """A plan, the folder that its backend wrote, and the batch sizes it is to serve."""

    plan: Plan
    folder: Path
    min_batch: int
    max_batch: int


def write_engine(
    target: Path,
    *,
    program: Program,
    variants: Sequence[BuiltVariant],
    device: str = "cpu",
    numbers: Numbers | None = None,
    notes: Sequence[str] = (),
    verify: Callable[[Path], None] | None = None,
    temporary: bool = False,
) -> Manifest:
    """Write an engine; an older engine at `target` gives way only to a whole and verified one.

    Files are hard-linked where the file system can, so the program's and the variants' folders
    must not be written to afterwards; removing them is fine.

    Args:
        target: The engine's folder.
        program: The captured model.
        variants: In order of choice.
        device: Name of the device that the variants were built for, on this machine.
        numbers: What was measured and verified.
        notes: What the engine's user should know.
        verify: Called with the sealed folder before it takes its place; raises to refuse it.
        temporary: The engine lives only as long as this process, so that a throw-away key will do
            where the user's own cannot be kept.

    Raises:
        BadInputError: `target` holds something that is no engine, or cannot be written.
        ArtefactError: The parts make no sound engine.
        SuanliError: No space, no key, or `verify` refused.
    """
    key = signing.own_key(keep=not temporary)
    now = here(device)
    if now.device is None:
        raise BadInputError(f"there is no device {device!r} here")
    manifest = Manifest(
        schema=SCHEMA,
        name=program.meta.name,
        workload=program.meta.ref,
        variants=tuple(
            Variant(
                plan=built.plan,
                folder=f"{VARIANTS}/{index}",
                min_batch=built.min_batch,
                max_batch=built.max_batch,
            )
            for index, built in enumerate(variants)
        ),
        signature=program.signature,
        environment=now.environment,
        device=now.device,
        hardware=now.hardware,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        numbers=numbers or Numbers(),
        notes=tuple(notes),
    )

    def fill(fresh: Path) -> None:
        _place_program(program.folder, fresh / PROGRAM)
        for index, built in enumerate(variants):
            place(built.folder, fresh / VARIANTS / str(index), link=True)

    return _write(target, fill, manifest, key, verify)


def copy_engine(source: Path, target: Path, *, key: signing.SigningKey | None) -> Manifest:
    """Copy an engine, checked on the way.

    Args:
        source: An engine that was opened.
        target: Where the copy goes; an older engine there gives way to it.
        key: Signs the copy anew; None keeps the signature that is there, whoever's it is.

    Raises:
        ArtefactError: The source was damaged since it was opened.
        BadInputError: `target` holds something that is no engine, or cannot be written.
        SuanliError: There is no space left.
    """
    manifest, _ = read_manifest(source)

    def fill(fresh: Path) -> None:
        for name in (PROGRAM, VARIANTS):
            if (source / name).exists():
                place(source / name, fresh / name, link=False)
        for name in (MANIFEST, SIGNATURE):
            place_file(source / name, fresh / name, link=False)
        check(fresh, trust=True)

    return _write(target, fill, manifest, key, None)


def _write(
    target: Path,
    fill: Callable[[Path], None],
    manifest: Manifest,
    key: signing.SigningKey | None,
    verify: Callable[[Path], None] | None,
) -> Manifest:
    """Fill a fresh folder, seal it and let it take its place; `key` None leaves it as filled."""
    target = target.resolve()  # a link to a folder stays, and the folder is replaced
    try:
        _refuse_to_overwrite(target)
        with replaced_folder(target) as fresh:
            fill(fresh)
            if key is not None:
                manifest = seal(fresh, manifest, key)
            fresh.chmod(0o755)
            if verify is not None:
                verify(fresh)
    except OSError as error:
        raise write_error(error, target) from error
    return manifest


def _refuse_to_overwrite(target: Path) -> None:
    """Only an engine, or nothing, may be replaced: a slip of `-o` must not cost a project."""
    if not target.exists():
        return
    if not target.is_dir():
        raise BadInputError(f"{target} is a file", next_step="name a folder for the engine")
    names = {path.name for path in target.iterdir()}
    foreign = sorted(names - {MANIFEST, SIGNATURE, PROGRAM, VARIANTS})
    if names and (MANIFEST not in names or foreign):
        what = foreign[0] if foreign else sorted(names)[0]
        raise BadInputError(
            f"{target} holds {what!r}, which is no part of an engine, and would be lost",
            next_step="name an empty or a new folder",
        )


def _place_program(source: Path, target: Path) -> None:
    """The program's own files. Folders beside them are caches that backends made."""
    target.mkdir(parents=True)
    files = [entry for entry in sorted(source.iterdir()) if entry.is_file()]
    if any(entry.is_symlink() for entry in files) or not files:
        raise SuanliError(f"{source} is no program that can be shipped")
    for entry in files:
        place_file(entry, target / entry.name, link=True)
