"""Read the settings of a script: defaults < YAML files < flags, all problems reported at once.

A script declares its settings with fastargs (a private `Config`, one `Section` block per topic)
and calls `read_config`. Of fastargs only the declarations and `collect` are used: its own reading
lets a misspelt YAML key pass, takes `--x=false` for true and 16.9 epochs for 16, lets environment
variables win, and exits with status 0 after an error. Every default must pass its own checker.

    SETTINGS = Config()
    Section("training", "how long, how fast", SETTINGS).params(
        epochs=Param(Int(1), "passes over the data", default=16),
    )
    cfg = read_config(SETTINGS, prog="train_imagenet.py", description="Train a network.")
    cfg.training.epochs

YAML scalars are read as the text in the file and checked by the same checkers as flags, so `010`,
`no` and `1e-4` mean the same in both. Nothing heavy is imported here: a wrong setting is reported
within a second.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import yaml
from fastargs import Config, Param, Section
from fastargs.validation import Checker

from fast_imagenet.config_list import list_configs

MAX_FILE_BYTES = 100_000  # the longest config here has 2,000; YAML is read slowly
MAX_PROBLEMS = 50  # a file with more is not a settings file
WIDTH = 100
_BOOL_WORDS = dict.fromkeys(("true", "1", "yes", "on"), True)
_BOOL_WORDS |= dict.fromkeys(("false", "0", "no", "off"), False)
_PLAIN_NULLS = {"", "~", "null", "Null", "NULL"}
Key = tuple[str, ...]  # the path of a setting: section, name


# ------------------------------------------------------------------------------------------------
# Checkers: what a setting may be
# ------------------------------------------------------------------------------------------------


class _Rule(Checker):
    """A checker that says its rule (`help`) when `parse` finds no value."""

    def parse(self, value: Any) -> Any:
        """The value that `value`, of any type, stands for; None when it breaks the rule."""
        raise NotImplementedError

    def check(self, value: Any) -> Any:
        """The value; ValueError with the rule when `value` breaks it."""
        parsed = self.parse(value)
        if parsed is None:
            raise ValueError(self.help())
        return parsed


class Int(_Rule):
    """A whole number from `lo` to `hi`, both included; `hi=None` leaves it open up to 2**63 - 1."""

    def __init__(self, lo: int = 0, hi: int | None = None) -> None:
        self.lo, self.hi = lo, hi

    def parse(self, value: Any) -> int | None:
        text = str(value).strip()
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", text):
            return None
        hi = 2**63 - 1 if self.hi is None else self.hi
        return int(text) if self.lo <= int(text) <= hi else None

    def help(self) -> str:
        return "a whole number" + _range_words(self.lo, self.hi)


class Number(_Rule):
    """A finite number from `lo` to `hi`, both included; None leaves an end open."""

    def __init__(self, lo: float | None = None, hi: float | None = None) -> None:
        self.lo, self.hi = lo, hi

    def parse(self, value: Any) -> float | None:
        number = _float_or_nan(str(value).strip())
        low = -math.inf if self.lo is None else self.lo
        high = math.inf if self.hi is None else self.hi
        return number if math.isfinite(number) and low <= number <= high else None

    def help(self) -> str:
        return "a number" + _range_words(self.lo, self.hi)


class OffOr(Number):
    """0 for off, or a finite number from `lo` to `hi`, both included."""

    def parse(self, value: Any) -> float | None:
        return 0.0 if _float_or_nan(str(value).strip()) == 0 else super().parse(value)

    def help(self) -> str:
        return f"0 for off, or {super().help()}"


class Bool(_Rule):
    """true or false; also 1/0, yes/no, on/off, in any case of letters."""

    def parse(self, value: Any) -> bool | None:
        return _BOOL_WORDS.get(str(value).strip().lower())

    def help(self) -> str:
        return "true or false"


class OneOf(_Rule):
    """One of the given words; help and errors list them in the order given."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def check(self, value: Any) -> str:
        """The word itself; ValueError for any other, with the nearest one."""
        if value not in self.names:
            near = difflib.get_close_matches(str(value).lower(), self.names, 1)
            raise ValueError(self.help() + (f" (did you mean {near[0]}?)" if near else ""))
        return value

    def help(self) -> str:
        return "one of " + ", ".join(self.names)


class Str(_Rule):
    """Any text on one line; `empty=False` refuses the empty one."""

    def __init__(self, empty: bool = True) -> None:
        self.empty = empty

    def check(self, value: Any) -> str:
        """The text; ValueError for control characters, and for '' where that is refused."""
        if not isinstance(value, str) or not (value.isprintable() and (value or self.empty)):
            raise ValueError(self.help() + ", printable, on one line")
        return value

    def help(self) -> str:
        return "text" if self.empty else "text, not empty"


def _range_words(lo: float | None, hi: float | None) -> str:
    if hi is None:
        return "" if lo is None else f" >= {lo}"
    return f" <= {hi}" if lo is None else f" from {lo} to {hi}"


def _float_or_nan(text: str) -> float:
    try:
        return float(text) if re.fullmatch(r"[-+.0-9eE]+", text) else math.nan
    except ValueError:
        return math.nan


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """One value as somebody wrote it, and where."""

    key: Key
    value: Any
    place: str


class Places(dict):
    """Where each given setting was given; trees of the same values are equal without it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places)

    __hash__ = None


@dataclass
class _Reading:
    """What has been read so far, in the order of precedence, and what is wrong with it."""

    entries: dict[Key, Any]
    given: list[_Given] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def take(self, one: _Given) -> None:
        """Check a value where it was given: one that is overridden later must be valid, too."""
        param = self.entries[one.key]
        try:
            param.checker.check(one.value)
        except (TypeError, ValueError) as error:
            rule = str(error) or param.checker.help()
            if param.default not in (None, ""):
                rule += f"; the default is {_plain(param.default)}"
            name = ".".join(one.key)
            self.problems.append(f"{one.place}: {name} = {_show(one.value)}: must be {rule}")
        self.given.append(one)


def extended(settings: Config, name: str, title: str, params: dict[str, Param]) -> Config:
    """A script's settings and a section of a tool's own, whose flags need no prefix.

    Args:
        settings: the script's; not changed.
        name, title: of the section, for `--help`.
        params: the tool's settings; their values are at the top of the tree.
    """
    both = Config()
    section = Section(name, title, both)
    for key, param in params.items():
        param.section = section
        both.entries[key,] = param
        both.sections_to_entries[name,].append((key,))
    both.sections.update(settings.sections)
    both.sections_to_entries.update(settings.sections_to_entries)
    both.entries.update(settings.entries)
    return both


def read_config(
    settings: Config,
    argv: Sequence[str] | None = None,
    *,
    search: Sequence[Path] = (),
    check: Callable[[SimpleNamespace], list[str]] | None = None,
    prog: str,
    description: str,
    switches: dict[str, str] | None = None,
) -> SimpleNamespace:
    """Read defaults, YAML files and flags into a tree of namespaces, or report every problem.

    Flags are `--section.key=value` or `--section.key value`; `--config`, `--config-file` and `-C`
    name YAML files and may be repeated. The last value given wins, flags over files. Environment
    variables have no effect. A file is read once, so `--config <(command)` works. `--list-configs`
    prints what there is in `search`, `--print-config` the settings as they are, valid each by
    itself; neither returns.

    Args:
        settings: the declared settings; not changed, so they may be read many times.
        argv: the words after the script's name; None takes `sys.argv[1:]`.
        search: folders in which a bare file name, with or without its .yaml, is looked up when it
            is not an existing path.
        check: gets the tree once every value is valid by itself; returns further problems.
        prog: the script's name for messages.
        description: first lines of `--help`.
        switches: short flags without a value -> the flags that they stand for.

    Returns:
        `SimpleNamespace` of sections, each one of values (`cfg.training.epochs`); picklable. Its
        `_places` holds where each given setting was given: 'command line', or a line of a file.

    Raises:
        SystemExit: 2 with all problems on stderr in plain text; 0 after `--help`, `-h`,
            `--list-configs` or `--print-config`.
    """
    switches = switches or {}
    words = [switches.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    if {"-h", "--help"} & set(words):
        _print_and_end(_help_text(settings, prog, description, search, switches))
    if search and "--list-configs" in words:
        _print_and_end(list_configs(search))
    reading = _Reading(settings.entries)
    files, flags = _split_words([word for word in words if word != "--print-config"], reading)
    for name in files:
        _read_file(name, search, reading)
    for flag in flags:
        reading.take(flag)
    cfg = _resolve(settings, reading)
    if cfg is not None and "--print-config" in words:
        _print_and_end(to_yaml(cfg))
    if cfg is not None and check is not None:
        try:
            reading.problems += check(cfg)
        except OSError as error:  # a name that is too long, a folder without rights
            reading.problems.append(format_error(error))
    if cfg is None or reading.problems:
        _report(reading.problems, prog)
        raise SystemExit(2)
    return cfg


def format_error(error: Exception) -> str:
    """An error as a sentence: what the system refuses, and what to check; or its own words."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    name = os.fsdecode(error.filename) if not isinstance(error.filename, int) else "a file"
    place = _show_path(name) if len(name) <= 400 else f"{_show_path(name[:76])}..."
    return f"{place}: {error.strerror}; check the path, its rights and its disk"


def to_dict(cfg: SimpleNamespace) -> dict[str, Any]:
    """The tree of namespaces as nested dictionaries, ready for JSON or YAML."""
    return {
        key: to_dict(value) if isinstance(value, SimpleNamespace) else value
        for key, value in vars(cfg).items()
        if key != "_places"
    }


def to_yaml(cfg: SimpleNamespace) -> str:
    """The tree as a settings file; a comment says where a value was given, if it was."""
    lines, places = [], getattr(cfg, "_places", {})
    for section, branch in to_dict(cfg).items():
        is_section = isinstance(branch, dict)
        lines += [f"{section}:"] if is_section else []
        for key, value in (branch if is_section else {section: branch}).items():
            if value is None:  # not given, and without a default
                continue
            line = yaml.safe_dump({key: value}, allow_unicode=True, width=math.inf).rstrip()
            place = places.get(f"{section}.{key}" if is_section else key, "")
            lines.append("  " * is_section + line + (f"  # {place}" if place else ""))
    return "\n".join(lines)


def _print_and_end(text: str) -> NoReturn:
    print(text)
    raise SystemExit(0)


def _split_words(words: Sequence[str], reading: _Reading) -> tuple[list[str], list[_Given]]:
    """File names and flags from the command line. Not argparse: it stops at its first error."""
    files, flags = [], []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, has_value, value = word.partition("=")
        if word.startswith("-C") and len(word) > 2:
            name, has_value, value = "-C", "=", word[2:].removeprefix("=")
        is_file = name in ("-C", "--config", "--config-file")
        key = tuple(name[2:].split(".")) if name.startswith("--") else ()
        if not is_file and key not in reading.entries:
            reading.problems.append(_unknown_flag(word, name[2:] if key else "", reading))
            if key and not has_value and queue and not queue[0].startswith("-"):
                queue.pop(0)
            continue
        if not has_value and (not queue or queue[0].startswith("--")):
            reading.problems.append(f"{name}: a value must follow, as in {name}=VALUE")
            continue
        value = value if has_value else queue.pop(0)
        if is_file:
            files.append(value)
        else:
            flags.append(_Given(key, value, "command line"))
    return files, flags


def _unknown_flag(word: str, name: str, reading: _Reading) -> str:
    place = f"command line: {_show(word)}"
    if name:
        return f"{place} is not a setting{_near_setting(name, reading.entries)}"
    if word.endswith((".yaml", ".yml")):
        return f"{place} has no --config before it; write --config {shlex.quote(word)}"
    return f"{place} is not a setting; write --section.key=value"


def _resolve(settings: Config, reading: _Reading) -> SimpleNamespace | None:
    """Merge in order of precedence and build the tree; None after any problem."""
    if reading.problems:
        return None
    merged = Config()
    merged.sections, merged.entries = settings.sections, dict(settings.entries)
    for one in reading.given:
        merged.collect({".".join(one.key): one.value})
    tree = SimpleNamespace(_places=Places((".".join(g.key), g.place) for g in reading.given))
    for key in merged.entries:
        branch = tree
        for part in key[:-1]:
            branch = branch.__dict__.setdefault(part, SimpleNamespace())
        setattr(branch, key[-1], merged[key])
    return tree


# ------------------------------------------------------------------------------------------------
# YAML files
# ------------------------------------------------------------------------------------------------


class _NoAliases:
    """Refuses aliases while nodes are composed: a few of them can fill the memory."""

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            event = self.peek_event()  # type: ignore[attr-defined]
            reason = f"alias *{event.anchor}: aliases are not read; write the value out"
            raise yaml.composer.ComposerError(None, None, reason, event.start_mark)
        return super().compose_node(parent, index)  # type: ignore[misc]


class _TextLoader(_NoAliases, yaml.BaseLoader):
    """Composes nodes with text scalars, for settings."""


class _PlainLoader(_NoAliases, yaml.SafeLoader):
    """Constructs plain values, each key of a mapping once: the last of two would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            word = key.value if isinstance(key, yaml.ScalarNode) else None
            if word is not None and word in seen:
                reason = f"{_show(word)} is given twice; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, reason, key.start_mark)
            seen.add(word)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """Plain values of a YAML file other than settings: small, UTF-8, without aliases.

    Raises:
        ValueError: it cannot be read; the message names the file and the reason.
    """
    try:
        return yaml.load(_read_text(Path(path)), Loader=_PlainLoader)
    except Exception as error:  # a tag on a value that it does not fit raises all kinds
        raise ValueError(f"{_show_path(str(path))} cannot be read: {_reason(error)}") from error


def _read_file(name: str, search: Sequence[Path], reading: _Reading) -> None:
    file = _show_path(name)
    try:
        root = yaml.compose(_read_text(_find_file(name, search)), Loader=_TextLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        option = "--config " if isinstance(error, (OSError, ValueError)) else ""
        reading.problems.append(f"{option}{file}: {_reason(error)}")
        return
    if root is None or _is_null(root):
        return
    if isinstance(root, yaml.MappingNode):
        _take_settings(root, (), file, reading, {})
        return
    fix = "write sections as `training:` with keys below"
    reading.problems.append(f"{file}: holds no settings; {fix}")


def _reason(error: Exception) -> str:
    """Why a YAML file cannot be read."""
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unknown reason"
        return f"not readable as YAML: {f'line {mark.line + 1}: ' if mark else ''}{what}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)


def _find_file(name: str, search: Sequence[Path]) -> Path:
    full = name if Path(name).suffix in (".yaml", ".yml") else f"{name}.yaml"
    for path in map(Path, dict.fromkeys((name, full))):
        if path.exists() and not path.is_dir():
            return path
    if Path(name).name != name:
        return Path(name)  # to be refused in the system's words
    found = [folder / full for folder in search if (folder / full).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError("found more than once; give one of " + ", ".join(map(str, found)))
    names = sorted({file.name for folder in search for file in Path(folder).glob("*.yaml")})
    stem = Path(full).stem
    near = [one for one in names if stem in one][:8]
    near = near or difflib.get_close_matches(full, names, 3, cutoff=0.7)
    places = " here" + "".join(f", nor in {Path(folder).name}/" for folder in search)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    hint = hint or "; --list-configs names all" * bool(search)
    raise ValueError(f"no such file{places}{hint}")


def _read_text(path: Path) -> str:
    with open(path, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"larger than {MAX_FILE_BYTES:,} bytes, so it is not a settings file")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8 text; save the file as UTF-8") from error


def _take_settings(
    mapping: yaml.MappingNode, prefix: Key, file: str, reading: _Reading, lines: dict[Key, int]
) -> None:
    """Take the settings below `mapping`; what is not one, or in `lines` already, is a problem."""
    for key_node, node in mapping.value:
        if len(reading.problems) >= MAX_PROBLEMS:
            return
        line = key_node.start_mark.line + 1
        place = f"{file} line {line}"
        if not isinstance(key_node, yaml.ScalarNode):
            reading.problems.append(f"{place}: a key must be a word, not a list or a mapping")
            continue
        key = prefix + tuple(key_node.value.split("."))
        problem = _misfit(key, node, reading.entries)
        if key in lines:
            problem = f"{'.'.join(key)} is in line {lines[key]} already; keep one of them"
        lines.setdefault(key, line)
        if problem:
            reading.problems.append(f"{place}: {problem}")
        elif isinstance(node, yaml.MappingNode):
            _take_settings(node, key, file, reading, lines)
        elif key in reading.entries:
            reading.take(_Given(key, node.value, place))


def _misfit(key: Key, node: yaml.Node, entries: dict[Key, Any]) -> str | None:
    """Why this node cannot be at `key`, or None. An empty section is allowed."""
    name, is_setting = ".".join(key), key in entries
    is_section = any(path[: len(key)] == key and path != key for path in entries)
    if not (is_setting or is_section):
        return f"{_show(name)} is not a setting{_near_setting(name, entries)}"
    is_mapping = isinstance(node, yaml.MappingNode)
    if is_section and not is_setting:
        if is_mapping or _is_null(node):
            return None
        given = "a list" if isinstance(node, yaml.SequenceNode) else _show(node.value)
        return f"{name} = {given}: {name} is a section; write its keys indented below it"
    if is_mapping or isinstance(node, yaml.SequenceNode):
        return f"{name} is one value, not a {'section' if is_mapping else 'list'}"
    if node.tag != "tag:yaml.org,2002:str":
        return f"{name}: the tag {_show(node.tag)} has no meaning here; write the plain value"
    if _is_null(node):
        return f"{name} is empty; give a value, or remove the line to keep the default"
    return None


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _PLAIN_NULLS


# ------------------------------------------------------------------------------------------------
# Text for people
# ------------------------------------------------------------------------------------------------


def _near_setting(name: str, entries: dict[Key, Any]) -> str:
    """`; did you mean ...?` with at most three settings or sections of nearly this name."""
    names = [".".join(path) for path in entries]
    section, _, last = name.rpartition(".")
    siblings = {full.rpartition(".")[2]: full for full in names if full.startswith(f"{section}.")}
    near = [full for full in names if full.rpartition(".")[2] == last]
    near += [siblings[key] for key in difflib.get_close_matches(last, siblings, 2)]
    if not near:
        names += sorted({path[0] for path in entries})
        near = difflib.get_close_matches(name, names, 1)
    if not near:
        return "; see --help for all of them"
    return f"; did you mean {' or '.join(dict.fromkeys(near[:3]))}?"


def _show(value: Any) -> str:
    """The value quoted on one line, control characters escaped, cut at 80 characters."""
    text = ascii(value) if not str(value).isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...'"


def _show_path(name: str) -> str:
    return name if name.isprintable() and name else _show(name)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def interpreter() -> str:
    """This Python as one types it here: '.venv/bin/python' where it lies below, else 'python'."""
    path, here = Path(sys.executable), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else "python"


def _report(problems: list[str], prog: str) -> None:
    """Print all problems; under torchrun once per node."""
    if re.fullmatch("0*[1-9][0-9]*", os.environ.get("LOCAL_RANK", "0")):
        return
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    count += " and perhaps more" if len(problems) >= MAX_PROBLEMS else ""
    print(f"{prog}: {count} in the settings, nothing was started", file=sys.stderr)
    for number, problem in enumerate(problems, 1):
        print(f"  {number}. {problem}", file=sys.stderr)
    command = f"`{interpreter()} {prog} --help`"
    print(f"{command} lists every setting with its rule and default.", file=sys.stderr)


def _help_text(
    settings: Config, prog: str, description: str, search: Sequence[Path], switches: dict[str, str]
) -> str:
    folders = ", ".join(f"{Path(folder).name}/" for folder in search)
    bare = f" A bare name, with or without .yaml, is looked up in {folders}." if folders else ""
    order = (
        "Order: defaults < files from left to right < flags. -C and --config-file are other names"
        f" of --config.{bare} An environment variable named like a setting has no effect."
    )
    usage = f"usage: {interpreter()} {prog} [--config FILE.yaml ...] [--section.key=value ...]"
    instead = "--list-configs prints every config, its result and hours. " if folders else ""
    instead += "--print-config prints the settings as a file that --config takes."
    instead += "".join(f" {short} is {long}." for short, long in switches.items())
    lines = [usage]
    for text in (description, order, instead):
        lines += ["", *textwrap.wrap(text, WIDTH)]
    for ns, section in settings.sections.items():
        lines += ["", f"{'.'.join(ns)}: {section.desc}" if section.desc else ".".join(ns)]
        for key in settings.sections_to_entries[ns]:
            lines += _help_lines(key, settings.entries[key])
    return "\n".join(lines)


def _help_lines(key: Key, param: Any) -> list[str]:
    default = _plain(param.default) or repr("")
    text = f"{param.desc} [{param.checker.help()}; default {default}]".strip()
    name, margin = f"  --{'.'.join(key)}", " " * 32
    body = textwrap.wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin)
    if len(name) < len(margin) - 1:
        return [name.ljust(len(margin)) + body[0].lstrip(), *body[1:]]
    return [name, *body]
