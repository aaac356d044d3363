"""What the documentation shows runs as it stands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [text for kind, text in found if kind == language]


def commands(path: Path) -> list[str]:
    lines = [line for text in blocks(path, "") for line in text.splitlines()]
    return [line.partition("  #")[0] for line in lines if line.startswith("suanli ")]


# what stands on several pages (the README in two languages) runs once
SNIPPETS = [
    (page, text)
    for text, page in {t: page for page in reversed(PAGES) for t in blocks(page, "python")}.items()
]
COMMANDS = [(page, line) for page in PAGES for line in commands(page)]


@pytest.mark.usefixtures("quick_ceilings")
@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=lambda x: getattr(x, "name", None))
def test_python_runs(page: Path, text: str, tmp_path: Path) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda x: getattr(x, "name", x))
def test_commands_name_options_that_exist(page: Path, line: str) -> None:
    from typer.main import get_command

    from suanli.cli import app

    words = shlex.split(re.sub(r"[\[\]|…]|\.\.\.", " ", line))
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    called = [verbs[words[1]]]
    if hasattr(called[0], "commands"):
        called = [called[0].commands[words[2]]]
        # a command in a command: `suanli queue add train ...`
        called += [verbs[word] for word in words[3:] if words[2] == "add" and word in verbs]
    known = {
        option
        for command in called
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    used = {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)}
    assert used <= known | {"--help"}, used - known


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_both_readmes_say_the_same_commands() -> None:
    english, chinese = (ROOT / "README.md", ROOT / "README.zh-CN.md")
    assert commands(english) == commands(chinese)
    assert blocks(english, "python") == blocks(chinese, "python")
    assert blocks(english, "")[0] == blocks(chinese, "")[0]


def test_decisions_are_numbered() -> None:
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
