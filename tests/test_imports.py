"""Imports run one way, from the programs down to the ground floor: docs/design.md, "The rooms"."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {
    *(
        "arch_names",
        "config",
        "config_list",
        "environment",
        "erasing",
        "files",
        "kernel_cache",
        "machine",
    ),
    *("native", "processes", "program", "rng", "terminal", "validation"),
}
FLOORS = (  # from the ground up; a module imports from its own floor and those below
    {f"fast_imagenet.{name}" for name in GROUND},
    {"fast_imagenet.ops", "fast_imagenet.beton", "fast_imagenet.sources"},
    {"fast_imagenet.engine", "fast_imagenet.data", "fast_imagenet.models"},
    {"train_imagenet", "write_dataset", "setup"},
    {"tools", "benchmarks"},
)
OWN = {"fast_imagenet", "train_imagenet", "write_dataset", "tools", "benchmarks", "tests"}
FILES = sorted(
    path.relative_to(ROOT)
    for place in ("fast_imagenet", "tools", "benchmarks", ".")
    for path in (ROOT / place).glob("*.py" if place == "." else "**/*.py")
    if path.name != "conftest.py"
)


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of this repository that a file imports, anywhere in it: also inside functions."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{name.name}" for name in node.names}
    return {name for name in found if name.partition(".")[0] in OWN}


def floor_of(module: str) -> int:
    parts = module.split(".")
    for number, rooms in enumerate(FLOORS):
        if {".".join(parts[:2]), parts[0]} & rooms:
            return number
    if parts[0] == "fast_imagenet" and len(parts) == 1:
        return 0
    raise AssertionError(f"{module} is in no room: give it one in FLOORS and in docs/design.md")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_its_floor_and_below(path):
    floor = floor_of(module_of(path))
    upward = sorted(name for name in imports_of(path) if floor_of(name) > floor)
    assert not upward, f"{path} imports from a floor above it: {', '.join(upward)}"
