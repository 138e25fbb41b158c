"""Names of networks, read from the sources of timm and torchvision: importing these takes seconds.

Both register a network with a decorator. tests/test_arch_names.py compares with their own lists.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)\(", re.M)
_RENAMED = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.M | re.S)
_KEY = re.compile(r"^\s*['\"]([\w.]+)['\"]\s*:", re.M)
LIBRARIES = ("torchvision", "timm")


@cache
def known_names(library: str) -> frozenset[str]:
    """Names of a library's classifiers, of timm also those with a tag, as in 'resnet50.a1_in1k'.

    Empty where the library is not installed, or registers its networks in another way.
    """
    spec = importlib.util.find_spec(library)
    folders = spec.submodule_search_locations if spec else None
    names: set[str] = set()
    tagged: set[str] = set()
    for file in Path(folders[0], "models").glob("*.py") if folders else ():
        text = file.read_text(encoding="utf-8", errors="replace")
        names.update(_REGISTERED.findall(text))
        for renamed in _RENAMED.findall(text):
            names.update(_KEY.findall(renamed))
        if library == "timm":
            tagged.update(name for name in _KEY.findall(text) if "." in name)
    return frozenset(names | {name for name in tagged if name.partition(".")[0] in names})


def unknown_arch(arch: str) -> str | None:
    """Why neither library has a network of this name, with the nearest names; None: it may have.

    Args:
        arch: name such as resnet50; timm/resnet50 or torchvision/resnet50 names the library, too.
    """
    prefix, _, name = arch.rpartition("/")
    if prefix not in ("", *LIBRARIES):
        return f"{prefix}/ is not a library; write NAME, torchvision/NAME or timm/NAME"
    names = {library: known_names(library) for library in ([prefix] if prefix else LIBRARIES)}
    if not all(names.values()) or any(_has(library, name) for library in names):
        return None
    near = difflib.get_close_matches(name.lower(), sorted(frozenset().union(*names.values())), 3)
    near = [f"{prefix}/{one}" if prefix else one for one in near]
    hint = f"did you mean {' or '.join(near)}?" if near else "check the name"
    return f"not a classifier of {' or '.join(names)}; {hint}"


def _has(library: str, name: str) -> bool:
    names = known_names(library)
    arch, _, tag = name.partition(".")
    if library == "timm" and not any(one.startswith(f"{arch}.") for one in names if tag):
        return arch in names  # its tags are not in the source
    return name in names
