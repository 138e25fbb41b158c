"""One word for one thing: words that were replaced by the field's standard terms do not return.

Read are all texts that a person reads: strings, docstrings and comments of the programs, documents,
headers of configs. docs/LOG.md is a diary, and the records are as they were written.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("fast_imagenet", "tools", "benchmarks", ".")
PROGRAMS = [
    path for place in PLACES for path in (ROOT / place).glob("*.py" if place == "." else "**/*.py")
]
TEXTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *(ROOT / "records/README.md", ROOT / "benchmarks/README.md"),
    *ROOT.glob("*_configs/*.yaml"),
    *(ROOT / "Makefile", ROOT / "scripts/setup.sh", ROOT / "pyproject.toml"),
    *(ROOT / "requirements.txt", ROOT / "environment.yml"),
    *(ROOT / "benchmarks/requirements.txt", ROOT / "scripts/setup_bench.sh"),
]
FILES = sorted(path.relative_to(ROOT) for path in {*PROGRAMS, *TEXTS} - {ROOT / "docs/LOG.md"})
UNIT = r"(?:images?|samples?|cores?|second|ranks?|GPU|step|epoch|channel|class|result|process|run)"
RETIRED = {  # pattern: what is written instead
    r"pictures?": "image, or sample for an entry of a dataset",
    r"(?:go|goes|going|gone|went) on(?! the\b)": "resume, continue",
    r"mend(?:s|ed|ing)?": "fix",
    r"lack(?:s|ed|ing)?": "is missing, has no",
    r"(?<!there )(?<!There )(?:is|are) no(?! (?:longer|more|less|\w+er than)\b)(?= )": "is not a",
    r"told|said|tells?|telling": "reported, printed",
    r"test sides?|training sides?": "resolution",
    r"a share|shares? of": "fraction",
    r"wish(?:es)?": "request",
    r"embedded data ?sets?|drawn images?": "built-in synthetic dataset, synthetic images",
    r"data sets?": "dataset",
    r"(?:plain|configured) (?:protocol|top-?1|accuracy)": "standard eval, config eval",
    r"(?<!exponential )moving averages?|average of the weights|weight average": "EMA",
    r"averaged? weights": "EMA weights",
    r"trials?": "smoke run",
    r"as published": "baseline",
    rf"(?:one YAML|operations|images|milliseconds|seconds|bytes|ops) an? {UNIT}": "per",
    r"centre[sd]?|colours?|coloured|normalis\w+": "center, color, normalize",
    r"stamp(?:s|ed)?": "checksums, or what it is",
}
ALLOWED = {  # file: phrases in which a retired word is right
    "benchmarks/table.py": ("pictures",),  # a key of results until 2026-11
    "fast_imagenet/beton/checksums.py": ("stamp",),  # a key of the file format
    "fast_imagenet/engine/weights.py": ("moving average",),  # a value in files of weights
    "fast_imagenet/engine/run.py": ("moving average",),
    "fast_imagenet/ops/kernel.py": ("stamp",),  # numba's word
}


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a person reads in a file."""
    content = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(content.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def retired_words(text: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """The retired words of a text, each with what to write instead."""
    for phrase in allowed:
        text = text.replace(phrase, "")
    return [
        f"'{match[0]}' -> {instead}"
        for pattern, instead in RETIRED.items()
        for match in re.finditer(rf"(?<![\w.-])(?:{pattern})(?![\w-])", text)
    ]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_retired_word_returns(path):
    allowed = ALLOWED.get(path.as_posix(), ())
    found = [
        f"{path}:{line}: {word}"
        for line, text in texts_of(ROOT / path)
        for word in retired_words(text, allowed)
    ]
    assert found == []


def test_exceptions_are_needed():
    for name, phrases in ALLOWED.items():
        text = "\n".join(text for _, text in texts_of(ROOT / name))
        assert [phrase for phrase in phrases if phrase not in text] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("the run goes on, and 3 pictures lack a label", 3),
        ("a moving average of the data set", 2),
        ("it is no JPEG", 1),
        ("there is no longer a limit; it is no larger than 3", 0),
        ("paths such as /shared/runs, keys such as data_wait_share, the side of a box", 0),
    ],
)
def test_the_words_themselves(text, count):
    assert len(retired_words(text)) == count
