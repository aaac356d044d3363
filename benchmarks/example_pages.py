"""Makes the pages in docs/examples by real runs: `python -m benchmarks.example_pages`.

Run it on a quiet machine; a page made on a busy one says so in a note. Each verb runs in a process
of its own, as a person would run it, and in a folder of its own, so that no page names a path of
the machine; `profile cifar10-fast` needs SUANLI_DATA.

The pages are never edited: when what a page shows has changed, run this again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "docs" / "examples"
LIMIT_BYTES = 2_000_000
PAGES: dict[str, tuple[str, ...]] = {
    "profile-resnet50": ("profile", "resnet50", "--batch", "8", "--check", "2"),
    "profile-bert-base": ("profile", "bert-base", "--batch", "4"),
    "profile-cifar10-fast": ("profile", "cifar10-fast", "--train"),
    "optimize-digits-resnet": (
        "optimize", "digits-resnet", "--max-drop", "1", "--budget", "100", "-o", "digits-engine",
    ),
    "profile-digits-engine": ("profile", "digits-engine"),
}  # fmt: skip
NEEDS = {"profile-digits-engine": "optimize-digits-resnet"}


def main() -> None:
    """Make all the pages, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", choices=[*PAGES], help="only these")
    wanted = parser.parse_args().pages or list(PAGES)
    needed = [NEEDS[name] for name in wanted if name in NEEDS]
    TARGET.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    with tempfile.TemporaryDirectory() as folder:
        for name in [n for n in PAGES if n in wanted or n in needed]:
            page = Path(folder) / f"{name}.html"
            command = [sys.executable, "-m", "suanli", *PAGES[name], "--report", page.name]
            print(f"== suanli {' '.join(command[3:])}", flush=True)
            done = subprocess.run(
                [*command, "--json"],
                cwd=folder,
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
            )
            check_rows(name, json.loads(done.stdout))
            check(page)
            shutil.copyfile(page, TARGET / page.name)


def check_rows(name: str, result: dict[str, Any]) -> None:
    """Refuse a profile that leaves an operator of over 1 % of the step without module or line.

    A loss stands in no module, an update in all of them, and what a backend adds of its own, such
    as changes of layout, nowhere.
    """
    for row in result.get("operators", []):
        counted = row["flops"] or row["bytes"]
        anywhere = row["phase"] == "optimizer" or "loss" in row["name"] or "nll" in row["name"]
        placed = row["source"] or result["subject"] == "engine"  # an engine holds no lines
        if row["share"] > 0.01 and counted and not (placed and (row["module"] or anywhere)):
            raise SystemExit(f"{name}: {row['name']} has no module or no source line")


def check(page: Path) -> None:
    """Refuse a page that is too large, or that names a place on this machine."""
    size, text = page.stat().st_size, page.read_text(encoding="utf-8")
    if size >= LIMIT_BYTES:
        raise SystemExit(f"{page.name} has {size:,} bytes")
    for place in places():
        if place in text:
            raise SystemExit(f"{page.name} names {place}")
    print(f"   {page.name}: {size / 1000:,.0f} kB", flush=True)


def places() -> list[str]:
    """Folders of this machine that no page may name."""
    folders = [Path.home(), Path(tempfile.gettempdir()), Path(__file__).resolve().parents[1]]
    folders += [Path(sys.prefix), Path(sys.base_prefix), Path.cwd()]
    folders += [Path(os.environ[n]) for n in ("SUANLI_DATA", "SUANLI_CACHE") if n in os.environ]
    return sorted({f"{folder}/" for folder in folders if len(folder.parts) > 1})


if __name__ == "__main__":
    main()
