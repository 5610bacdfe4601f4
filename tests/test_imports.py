"""The house's rules, read from the source: arrows go one way, files are short, TRL has one door, no pickle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rlhf_kit"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450

ROOMS = {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
ROOMS |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}

# What each room may import of the others; within a room everything goes, as long as there is no cycle.
MAY_IMPORT: dict[str, set[str]] = {
    "tasks": {"models"},
    "files": set(),
    "models": set(),
    "memory": {"models"},
    "progress": set(),
    "stats": set(),
    "runs": set(),
    "plots": {"stats"},
    "data": {"tasks"},
    "rewards": {"tasks", "models"},
    "sampling": {"models", "rewards"},
    "feedback": {"tasks", "data", "models", "rewards", "progress", "stats", "plots", "train"},
    "rating": {"feedback", "data"},
    "train": {"models", "rewards", "sampling", "progress", "files"},
    "ppo": {"models", "memory", "rewards", "progress"},
    "evaluate": {"tasks", "models", "rewards", "sampling", "stats"},
    "presets": {"tasks"},
    "notebook": {"models", "presets", "plots", "runs", "feedback", "progress"},
    "pipeline": ROOMS - {"cli", "notebook", "report", "pipeline"},
    "report": ROOMS - {"cli", "notebook", "report"},
    "cli": ROOMS - {"cli"},
}
# The package's own door shows what is inside.
MAY_IMPORT["__init__"] = ROOMS - {"cli"}


def module_name(path: Path) -> str:
    """rlhf_kit/models/loading.py -> rlhf_kit.models.loading; a folder's __init__.py is the folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, module, name) of every import, relative ones made absolute; name is empty for `import module`."""
    package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def inner_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of what a file imports of rlhf_kit: the file where the name is looked up."""
    for line, module, name in imports(path):
        if module == "rlhf_kit" or module.startswith("rlhf_kit."):
            yield line, f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_arrows_go_one_way(path: Path) -> None:
    room = room_of(module_name(path))
    assert room in MAY_IMPORT, f"{room} is a new room: give it a row in MAY_IMPORT, and one in the README's file tree"
    wrong = [
        f"{where(path, line)}: {room} may not import {room_of(module)}"
        for line, module in inner_imports(path)
        if room_of(module) not in MAY_IMPORT[room] | {room}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycles_between_rooms_as_allowed_nor_between_files_as_written() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()
    TopologicalSorter({module_name(path): {module for _, module in inner_imports(path)} for path in FILES}).prepare()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < MAX_LINES, f"{path.name} has {lines} lines: it is two things, make it a folder with the same door"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_train_imports_trl_and_only_its_public_names(path: Path) -> None:
    for line, module, name in imports(path):
        if module.split(".")[0] == "trl":
            assert room_of(module_name(path)) == "train", f"{where(path, line)}: all contact with TRL is in train"
            assert module == "trl" and name and not name.startswith("_"), (
                f"{where(path, line)}: write `from trl import PublicName`; the rest moves with each release"
            )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_that_runs_the_code_of_a_file_it_loads(path: Path) -> None:
    unsafe = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for line, module, name in imports(path):
        assert module.split(".")[0] not in unsafe, f"{where(path, line)}: weights are safetensors, the rest json or csv"
        assert module != "torch" or name not in {"save", "load"}, f"{where(path, line)}: torch.{name} is pickle"
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"save", "load"}, f"{where(path, node.lineno)}: torch.{node.attr} is pickle"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            safe = isinstance(node.value, ast.Constant) and node.value.value is False
            assert safe, f"{where(path, node.lineno)}: a model directory must not bring code that runs"
