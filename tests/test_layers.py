"""Who may import whom: strictly downward, imports inside functions included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "suanli"
LAYERS = {
    "base": 0,
    "devices": 1,
    "workloads": 1,
    "cost": 1,
    "measure": 2,
    "plans": 3,
    "kernels": 3,
    "predicting": 3,
    "parallel": 4,
    "training": 5,
    "engines": 5,
    "jobs": 6,
    "profiling": 6,
    "serving": 6,
    "reports": 6,
    "api": 7,
    "api_kernel": 7,
    "api_predict": 7,
    "api_queue": 7,
    "api_profile": 7,
    "api_report": 7,
    "cli_output": 8,
    "cli_kernel": 9,
    "cli_engines": 9,
    "cli_predict": 9,
    "cli_queue": 9,
    "cli_profile": 9,
    "cli_report": 9,
    "cli": 10,
    "__main__": 11,
}
FILES = sorted(ROOT.rglob("*.py"))


def _part(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def _imports(tree: ast.AST, here: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{here}:{node.lineno}: relative import"
            assert node.module is not None
            if node.module == "suanli":
                found += [(node.lineno, f"suanli.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant) and str(literal.value).startswith("suanli."):
                found.append((node.lineno, str(literal.value)))
    return [(line, name) for line, name in found if name.partition(".")[0] == "suanli"]


def violations(source: str, path: Path) -> list[str]:
    """Lines of `source` that import upwards or sideways, were it the file at `path`."""
    relative = path.relative_to(ROOT)
    mine = relative.parts[0].removesuffix(".py")
    if mine == "__init__":
        return []  # the package's lazy table of public names
    wrong = []
    for line, name in _imports(ast.parse(source), path):
        other = _part(name)
        if other in ("", "__version__", mine):
            continue
        if LAYERS[other] >= LAYERS[mine]:
            wrong.append(f"{relative}:{line}: {mine} imports {name}")
    return wrong


def test_every_part_has_a_layer() -> None:
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert parts - {"__init__"} <= LAYERS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), path) == []


def test_the_test_sees_upward_imports() -> None:
    planted = "def f():\n    from suanli.engines.engine import Engine\n    return Engine\n"
    assert violations(planted, ROOT / "plans" / "search.py")
    assert violations("import suanli.workloads.record", ROOT / "devices" / "cpu.py")
    assert not violations("from suanli.base import codec", ROOT / "devices" / "cpu.py")


def test_base_has_no_torch() -> None:
    for path in (ROOT / "base").glob("*.py"):
        names = [
            name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
            )
        ]
        assert not [name for name in names if name.partition(".")[0] == "torch"], path


def _modules_after(code: str) -> set[str]:
    probe = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_help_does_not_import_torch() -> None:
    code = (
        "sys.argv = ['suanli', '--help']\n"
        "import suanli.cli\n"
        "try:\n    suanli.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
    )
    loaded = _modules_after(code)
    assert "suanli.cli" in loaded
    assert not loaded & {"torch", "numpy", "openvino", "onnxruntime", "sklearn", "transformers"}


def test_import_suanli_does_not_import_torch() -> None:
    assert "torch" not in _modules_after("import suanli")


def test_public_names() -> None:
    import suanli

    assert set(suanli.__all__) == {
        "Engine",
        "Workload",
        "__version__",
        "doctor",
        "export",
        "load",
        "optimize",
        "predict",
        "profile",
        "rebuild",
        "report",
        "run",
        "train",
    }
    for name in suanli.__all__:
        assert getattr(suanli, name) is not None
