"""The GPU catalogue: what the makers say of each card, one TOML file a card under `gpus/`.

All rates are dense. Sheets often quote rates with structured sparsity, which are twice as high and
which no dense product reaches. A file in the user's own folder (`gpus/` in the configuration
folder) adds a card, or takes the place of the one with the same name.
"""

import difflib
import math
import re
import tomllib
from functools import cache
from pathlib import Path

from suanli.base.codec import from_json
from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.files import config_dir
from suanli.base.gpu_sheet import GpuSheet

_FOLDER = Path(__file__).parent / "gpus"
# Words that a person leaves out.
_MAKER_WORDS = ("nvidia", "geforce", "tesla", "quadro")
_MOST_NAMED = 8

# Operations per clock and multiprocessor, a multiply-add as two, dense, by compute capability.
# Worked out from the catalogue: rate / (multiprocessors x boost clock), and for the families with
# a faster professional and a slower consumer form the faster one, so that a bound stays a bound.
_PER_CLOCK: dict[str, dict[str, int]] = {
    "6.0": {"fp32": 128, "fp16": 256},
    "6.1": {"fp32": 256, "int8": 1024},
    "7.0": {"fp32": 128, "fp16": 1024},
    "7.5": {"fp32": 128, "fp16": 1024, "int8": 2048},
    "8.0": {"fp32": 128, "tf32": 1024, "bf16": 2048, "fp16": 2048, "int8": 4096},
    "8.6": {"fp32": 256, "tf32": 512, "bf16": 1024, "fp16": 1024, "int8": 2048},
    "8.7": {"fp32": 256, "tf32": 512, "bf16": 1024, "fp16": 1024, "int8": 2048},
    "8.9": {"fp32": 256, "tf32": 512, "bf16": 1024, "fp16": 1024, "fp8": 2048, "int8": 2048},
    "9.0": {"fp32": 256, "tf32": 2048, "bf16": 4096, "fp16": 4096, "fp8": 8192, "int8": 8192},
    "10.0": {"fp32": 256, "tf32": 4096, "bf16": 8192, "fp16": 8192, "fp8": 16384, "int8": 16384},
    "10.3": {"fp32": 256, "tf32": 4096, "bf16": 8192, "fp16": 8192, "fp8": 16384},
    "12.0": {"fp32": 256, "tf32": 512, "bf16": 1024, "fp16": 1024, "fp8": 2048, "int8": 2048},
}

# What a figure can be of a card that is or soon may be: a file whose figures are in other units
# (bytes, MiB, operations) lies far outside.
_SENSIBLE = {
    "memory_gb": (0.25, 8192.0, "GB"),
    "memory_gb_per_s": (1.0, 2e5, "1e9 bytes per second"),
    "dense_tflops": (1e-3, 1e6, "1e12 operations per second"),
    "multiprocessors": (1.0, 4096.0, "multiprocessors"),
    "base_clock_mhz": (50.0, 2e4, "MHz"),
    "boost_clock_mhz": (50.0, 2e4, "MHz"),
    "l2_mb": (1.0 / 64.0, 8192.0, "MiB"),
    "nvlink_gb_per_s_both_ways": (1.0, 1e5, "1e9 bytes per second"),
    "link_gb_per_s": (0.01, 1e5, "1e9 bytes per second"),
    "power_w": (5.0, 2e4, "watts"),
}
# Oldest and newest whose host and units can be told from those that were fitted.
_CAPABILITIES = (3.0, 15.0)
_RATED = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp6", "fp4", "int8", "int4")


def catalogue() -> tuple[GpuSheet, ...]:
    """All cards that are known, by name; the user's own files win.

    Raises:
        ArtefactError: A file of the catalogue is damaged.
    """
    return _merged(user_folder())


def user_folder() -> Path:
    """Where a user's own cards stand, one TOML file each."""
    return config_dir() / "gpus"


@cache
def _shipped() -> tuple[GpuSheet, ...]:
    return tuple(map(read_sheet, _FOLDER.glob("*.toml")))


def _merged(folder: Path) -> tuple[GpuSheet, ...]:
    sheets = {sheet.name: sheet for sheet in _shipped()}
    for path in sorted(folder.glob("*.toml")) if folder.is_dir() else []:
        sheet = read_sheet(path)
        sheets[sheet.name] = sheet
    return tuple(sorted(sheets.values(), key=lambda sheet: sheet.name))


def slug(sheet: GpuSheet) -> str:
    """A card's name as it is typed, such as "h100-sxm5-80gb"."""
    return "-".join(word for word in _words(sheet.name) if word not in _MAKER_WORDS)


def find_sheet(name: str) -> GpuSheet:
    """The card that a person means.

    A whole name or alias decides, with any case and without the maker's words; else the one card
    whose name holds all the words.

    Raises:
        BadInputError: No card or several cards are called so; the message lists what is near.
    """
    wanted = [word for word in _words(name) if word not in _MAKER_WORDS]
    key = _joined(wanted)
    for sheet in catalogue():
        names = (sheet.name, *sheet.aliases, *sheet.nvml_names)
        if key and key in {_joined(_words(known)) for known in names}:
            return sheet
    holding = [s for s in catalogue() if wanted and set(wanted) <= set(_words(s.name))]
    if len(holding) == 1:
        return holding[0]
    if holding:
        raise BadInputError(f"which {name}?", next_step=_listed([slug(s) for s in holding]))
    slugs = [slug(sheet) for sheet in catalogue()]
    near = difflib.get_close_matches("-".join(wanted), slugs, n=4, cutoff=0.6)
    near += [
        known for known in slugs if key and key in known.replace("-", "") and known not in near
    ]
    step = f"near names: {_listed(near)}" if near else "suanli predict --list names them all"
    raise BadInputError(f"no GPU {name!r} in the catalogue", next_step=step)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return f"{shown} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else shown


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9.]+", name.lower())


def _joined(words: list[str]) -> str:
    return "".join(word for word in words if word not in _MAKER_WORDS)


def read_sheet(path: Path) -> GpuSheet:
    """Read one card's file.

    Raises:
        ArtefactError: It cannot be read, is not TOML or not such a record, or a figure makes no
            sense.
    """
    try:
        sheet = from_json(GpuSheet, tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, ArtefactError) as error:
        raise ArtefactError(f"{path.name}: {error}") from None
    wrong = _wrong(sheet)
    if wrong:
        raise ArtefactError(f"{path.name}: {wrong}")
    return sheet


def _wrong(sheet: GpuSheet) -> str:
    """What makes no sense in a sheet, or ""; a blank figure does."""
    if not slug(sheet):
        return "the card needs a name of its own"
    if not re.fullmatch(r"\d+\.\d+", sheet.compute_capability):
        return f'compute_capability is written "8.9", not {sheet.compute_capability!r}'
    figures = {name: getattr(sheet, name) for name in _figure_names(sheet)}
    figures |= {f"dense_tflops.{dtype}": rate for dtype, rate in sheet.dense_tflops.items()}
    for name, value in figures.items():
        if not (value > 0 and math.isfinite(value)):
            return f"{name} must be a number more than 0, not {value:g}"
        least, most, unit = _SENSIBLE.get(name.partition(".")[0], (0.0, math.inf, ""))
        if not least <= value <= most:
            return f"{name} is in {unit}: from {least:g} to {most:g}, not {value:g}"
    return _wrong_kind(sheet)


def _wrong_kind(sheet: GpuSheet) -> str:
    oldest, newest = _CAPABILITIES
    if not oldest <= float(sheet.compute_capability) <= newest:
        return f"compute_capability {sheet.compute_capability} is of no card that can be predicted"
    for dtype in sheet.dense_tflops:
        if dtype not in _RATED:
            return f"dense_tflops.{dtype} is no known type: {', '.join(_RATED)}"
    return ""


def _figure_names(sheet: GpuSheet) -> list[str]:
    return [f for f in sheet.known_figures() if "." not in f and f != "memory_kind"]


def sheet_for(nvml_name: str) -> GpuSheet | None:
    """The sheet of exactly this card, or None.

    Only whole names match: an "A10G" is no "A10", a laptop's "RTX 4090" is another chip, and a
    slice of a partitioned card has a part of its rates.
    """
    wanted = _plain(nvml_name)
    for sheet in catalogue():
        if wanted in map(_plain, sheet.nvml_names):
            return sheet
    return None


def derived_flops(
    capability: str, multiprocessors: int, clock_mhz: float, dtype: str
) -> float | None:
    """Dense operations per second = multiprocessors x clock x operations per clock.

    Args:
        capability: Compute capability, such as "9.0"; an unknown minor version takes the figures
            of the highest known one below it in the same family.
        multiprocessors: How many the card has.
        clock_mhz: The highest clock that the driver reports.
        dtype: Such as "bf16".

    Returns:
        None where the family is unknown or has no unit for the dtype.
    """
    major, _, minor = capability.partition(".")
    family = [
        (int(key.split(".")[1]), rates)
        for key, rates in _PER_CLOCK.items()
        if key.split(".")[0] == major and int(key.split(".")[1]) <= int(minor or 0)
    ]
    if not family:
        return None
    per_clock = max(family, key=lambda entry: entry[0])[1].get(dtype)
    return None if per_clock is None else multiprocessors * clock_mhz * 1e6 * per_clock


def _plain(name: str) -> str:
    """Names without the maker, case and doubled spaces: older drivers leave "NVIDIA" out."""
    return re.sub(r"\s+", " ", name.strip()).lower().removeprefix("nvidia ")
