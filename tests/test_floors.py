"""A package imports only from floors below it, and the neighbours decide, do and judge never import each other."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "qpruner"
FLOORS = {
    "errors": 0, "files": 0, "progress": 0, "fields": 1, "plan": 1, "recipe": 1, "matrix": 1, "targets": 1, "vllm": 1,
    "math": 2, "model": 3, "decide": 4, "do": 4, "judge": 4, "artifact": 5, "report": 5, "run": 5, "workers": 5,
    "recipes": 5, "testing": 5, "support": 6, "shape": 6, "prepare": 6, "job": 6, "refitting": 6, "rounding": 6,
    "deciding": 6, "joint": 6, "drafting": 6, "recovering": 6, "merging": 6, "judging": 6, "damage": 6, "body": 6,
    "loading": 6, "model_card": 6, "serving": 6, "chat": 6, "compress": 6, "retraining": 6, "facts": 6, "study": 6,
    "exporting": 6, "evaluating": 6, "inspecting": 6, "api": 6, "cli": 7,
}  # fmt: skip
SIDE_BY_SIDE = {"decide", "do", "judge"}


def imports_of(path: Path) -> set[str]:
    """First names below qpruner that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "qpruner":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("qpruner."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("qpruner.")}
    return found


def offence(package: str, imported: str) -> str | None:
    if imported not in FLOORS:
        return None
    if package in SIDE_BY_SIDE and imported in SIDE_BY_SIDE and package != imported:
        return f"{package} imports its neighbour {imported}"
    if FLOORS[imported] > FLOORS[package]:
        return f"{package} (floor {FLOORS[package]}) imports {imported} (floor {FLOORS[imported]})"
    return None


def test_no_import_points_upwards():
    offences = []
    for path in sorted(SOURCE.rglob("*.py")):
        package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if package == "__init__":
            continue
        assert package in FLOORS, f"{package} has no floor; give it one in this test and in docs/architecture.md"
        offences += [f"{path.relative_to(SOURCE)}: {o}" for i in imports_of(path) if (o := offence(package, i))]
    assert not offences, offences[0]


@pytest.mark.parametrize("package, imported", [("math", "model"), ("decide", "do"), ("plan", "run")])
def test_the_walk_sees_an_offence(package, imported):
    assert offence(package, imported)


def test_the_plan_needs_no_torch():
    for name in ("fields", "plan", "recipe", "targets", "vllm", "errors"):
        assert "import torch" not in (SOURCE / f"{name}.py").read_text()
