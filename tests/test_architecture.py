"""The folders there are, and that imports go down only: read from the imports themselves, lazy ones too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "deadhead"

# From top to bottom. An import goes down, or stays in its folder; folders on one floor know nothing of each other.
FLOORS = (
    ("__init__", "__main__"),
    ("cli",),
    ("report",),
    ("export", "training"),
    ("streaming",),
    ("checkpoints",),
    ("compensation", "criteria"),
    ("measure",),
    ("cutting",),
    ("attaching",),
    ("gates",),
    ("layouts",),
    ("plans", "data"),
    ("disk",),
    ("models", "recipes", "errors", "modes"),
)
# The same for the rooms in training/.
TRAINING_FLOORS = (("__init__", "runs"), ("phases",), ("callbacks",), ("recipes", "processes"))


def modules() -> dict[str, Path]:
    """Every module of the package by its name without "deadhead."; a folder's own is the folder."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports anywhere, in functions and for type checkers too."""
    path = MODULES[name]
    package = ["deadhead", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            # What is imported may be a module itself.
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            head, _, inner = target.partition(".")
            if head == "deadhead" and inner:
                known = inner if inner in MODULES else inner.rpartition(".")[0]
                yield known or "__init__"


EDGES = {name: {target for target in imports(name) if target in MODULES and target != name} for name in MODULES}


def floor_of(name: str, floors: tuple[tuple[str, ...], ...]) -> int:
    room = name.split(".")[0]
    return next(level for level, rooms in enumerate(floors) if room in rooms)


def test_every_room_has_a_floor_and_few_modules_stand_at_the_top() -> None:
    rooms = {name.split(".")[0] for name in MODULES}
    assert rooms == {room for floor in FLOORS for room in floor}
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_imports_go_down() -> None:
    wrong = []
    for name in sorted(MODULES):
        for target in sorted(EDGES[name]):
            # `__version__` is the one thing that is taken from the top.
            if target.split(".")[0] in (name.split(".")[0], "__init__"):
                continue
            if floor_of(target, FLOORS) <= floor_of(name, FLOORS):
                wrong.append(f"{name} imports {target}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_imports_in_training_go_down() -> None:
    wrong = []
    for name in sorted(name for name in MODULES if name.startswith("training.")):
        inner = name.removeprefix("training.")
        for target in sorted(target for target in EDGES[name] if target.startswith("training.")):
            below = target.removeprefix("training.")
            if below.split(".")[0] == inner.split(".")[0]:
                continue
            if floor_of(below, TRAINING_FLOORS) <= floor_of(inner, TRAINING_FLOORS):
                wrong.append(f"{name} imports {target}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_no_module_is_in_a_circle() -> None:
    state: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        state[name] = 1
        path.append(name)
        for target in sorted(EDGES[name] - {"__init__"}):
            assert state.get(target) != 1, f"circle: {' → '.join([*path[path.index(target) :], target])}"
            if target not in state:
                visit(target)
        path.pop()
        state[name] = 2

    for name in sorted(MODULES):
        if name not in state:
            visit(name)


def test_contributing_names_every_folder() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    folders = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert [name for name in folders if f"`{name}/`" not in text] == []
