"""Imports point down: the table of docs/design.md, read from the import statements."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "openkeye"

ALLOWED = {
    "common": set(),
    "kernels": {"common"},
    "inputs": {"common"},
    "frameforge": {"common"},
    "model": {"kernels", "inputs", "common"},
    "data": {"inputs", "frameforge", "common"},
    "agents": {"inputs", "common"},
    "tasks": {"agents", "frameforge", "inputs", "common"},
    "engine": {"model", "kernels", "inputs", "common"},
    "train": {"model", "data", "kernels", "inputs", "common"},
    "recipes": {"distill", "rl", "train", "data", "inputs", "model", "common"},
    "rl": {"engine", "train", "tasks", "agents", "model", "data", "kernels", "inputs", "frameforge", "common"},
    "distill": {"rl", "engine", "train", "tasks", "agents", "model", "data", "kernels", "inputs", "frameforge", "common"},
}
MODEL_MAY_TAKE_FROM_INPUTS = {"openkeye.inputs.model_input", "openkeye.inputs.patches"}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "openkeye")
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name and (name == "openkeye" or name.startswith("openkeye."))}


def test_imports_point_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.relative_to(PACKAGE).parts[0]
        if folder in ("apps", "__init__.py"):
            continue
        assert folder in ALLOWED, f"folder openkeye/{folder} has no floor: add it to docs/design.md and to this table"
        for name in imported_modules(path):
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 else ""
            if target and target != folder and target not in ALLOWED[folder] and not target.startswith("__"):
                wrong.append(f"{path.relative_to(PACKAGE.parent)} imports {name}")
            if folder == "model" and target == "inputs" and name not in MODEL_MAY_TAKE_FROM_INPUTS:
                wrong.append(f"{path.relative_to(PACKAGE.parent)} imports {name}: the model knows only the records of inputs")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_apps():
    wrong = [
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "apps"
        and any(name.startswith("openkeye.apps") for name in imported_modules(path))
    ]
    assert not wrong, wrong


def test_inside_a_folder_imports_make_no_circle():
    graph = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): imported_modules(path)
        for path in PACKAGE.rglob("*.py")
    }
    finished, open_path = set(), []

    def visit(module: str) -> None:
        assert module not in open_path, " -> ".join([*open_path[open_path.index(module) :], module])
        if module in finished or module not in graph:
            return
        open_path.append(module)
        for target in sorted(graph[module]):
            if target != "openkeye":
                visit(target)
        open_path.pop()
        finished.add(module)

    for module in sorted(graph):
        if not module.endswith("__init__"):
            visit(module)
