"""Functions stay short and flat: at most 40 lines and three levels of nesting."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES, NESTING = 40, 3
# in the docstring of a function that is better in one piece, with the reason
REASON = re.compile("(?:Long|Deep) because")
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FILES = sorted(
    path.relative_to(ROOT)
    for place in ("fast_imagenet", "tools", "benchmarks", ".")
    for path in (ROOT / place).glob("*.py" if place == "." else "**/*.py")
    if path.name != "conftest.py"
)


def length(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end, without those of the docstring."""
    total = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return total
    text = function.body[0]
    return total - (text.end_lineno - text.lineno + 1)


def depth(node: ast.AST) -> int:
    """The most blocks inside one another; `elif` is no deeper than its `if`."""
    return max((_depth_of(child, node) for child in ast.iter_child_nodes(node)), default=0)


def _depth_of(child: ast.AST, parent: ast.AST) -> int:
    if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
        return 0  # counted by itself
    is_elif = isinstance(parent, ast.If) and isinstance(child, ast.If) and parent.orelse == [child]
    return depth(child) + (isinstance(child, BLOCKS) and not is_elif)


def too_much(text: str) -> list[str]:
    """Functions of a source text that are too long or too deep, without a stated reason."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, FUNCTIONS) or REASON.search(ast.get_docstring(node) or ""):
            continue
        if length(node) > LINES or depth(node) > NESTING:
            found.append(f"{node.name}: {length(node)} lines, nesting {depth(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_are_short_and_flat(path):
    assert too_much((ROOT / path).read_text()) == []


def test_the_measure_itself():
    body = "\n".join(["    x = 1"] * 40)
    assert too_much(f"def f():\n{body}") == ["f: 41 lines, nesting 0"]
    assert too_much(f'def f():\n    """Long because\n    it is."""\n{body}') == []
    chain = "def f(x):\n    if x:\n        pass\n" + "    elif x:\n        pass\n" * 5
    assert too_much(chain) == []
    deep = "def f(x):\n" + "".join(f"{'    ' * k}if x:\n" for k in range(1, 5)) + " " * 20 + "pass"
    assert too_much(deep) == ["f: 6 lines, nesting 4"]
