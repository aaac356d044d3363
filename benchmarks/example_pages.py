"""Makes the pages in docs/examples by real runs: `python -m benchmarks.example_pages`.

Run it on a quiet machine; a page made on a busy one says so in a note. Each verb runs in a process
of its own, as a person would run it, and in a folder of its own, so that no page names a path of
the machine; `profile cifar10-fast` needs SUANLI_DATA.

The pages are never edited: when what a page shows has changed, run this again.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
            subprocess.run(command, cwd=folder, env=environment, check=True)
            check(page)
            shutil.copyfile(page, TARGET / page.name)


def check(page: Path) -> None:
    """Refuse a page that is too large, or that names a place on this machine."""
    size, text = page.stat().st_size, page.read_text(encoding="utf-8")
    if size >= LIMIT_BYTES:
        raise SystemExit(f"{page.name} has {size:,} bytes")
    for place in (str(Path.home()), tempfile.gettempdir(), str(Path(__file__).parents[1])):
        if len(place) > 1 and f"{place}/" in text:
            raise SystemExit(f"{page.name} names {place}")
    print(f"   {page.name}: {size / 1000:,.0f} kB", flush=True)


if __name__ == "__main__":
    main()
