"""Text that a program writes: safe to show, and written even where nobody reads it.

Class names and file names come from data, so their control characters are escaped. Only the
standard library is imported here, for the doctor.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on a disk

# C0, DEL, C1; marks that turn the direction of text; separators of lines
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def readable(text: str, keep: str = "") -> str:
    r"""`text` with control characters as \x1b or \u202e and every byte that is not UTF-8 as \xff.

    Args:
        keep: control characters that stay.
    """

    def escaped(found: re.Match[str]) -> str:
        letter = found[0]
        return letter if letter in keep else letter.encode("unicode_escape").decode("ascii")

    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, as a broken JSON file may hold
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _UNSEEN.sub(escaped, text)


def plural(count: int, noun: str) -> str:
    """'1 class', '2 classes', '1,000 files': the count with its noun."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def announce(doing: str) -> None:
    """Say on stderr what is done during the next seconds, and how long that usually takes.

    For what can take more than 3 s without a word. Under torchrun it is printed once per node.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(readable(doing), file=sys.stderr, flush=True)


def on_terminal(text: str) -> str:
    """What a program writes, with lines and tabs; and `\\r` at its ends only, for progress bars."""
    body = text.strip("\r")
    start, end = (text[: text.index(body)], text[len(text.rstrip("\r")) :]) if body else (text, "")
    return start + readable(body, keep="\n\t") + end


class _SafeStream:
    """A stream that escapes control characters and outlives its reader.

    Once nobody reads it any more, what is written is dropped; as long as the disk of its file is
    full, too.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._was_full = stream, False

    def write(self, text: str) -> int:
        self._try(self._stream.write, on_terminal(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., Any], *values: str) -> None:
        try:
            call(*values)
        except OSError as error:
            if error.errno in FULL:
                if not self._was_full and self is not sys.stderr:
                    note = f"note: the output is incomplete: {error.strerror}"
                    print(note, file=sys.stderr)
                self._was_full = True
            elif error.errno in (errno.EPIPE, errno.EIO):  # a reader, a terminal that is gone
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())  # takes what is still in the buffer, too
                os.close(nowhere)
            else:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ignore_broken_pipe() -> None:
    """Let no program end because of what reads its output or its errors.

    It may have ended (`| head`, `tee`), never have been there (`>&-`), be a file on a full disk,
    or not know a letter (a terminal that is not UTF-8): that letter is written as its code. To be
    called before anything else is opened, which would get the number of a closed stream.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; the lowest free number is its own
            stream = open(os.devnull, mode)  # noqa: SIM115  for as long as the program lives
            os.set_inheritable(stream.fileno(), True)  # else it is closed for all children
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _SafeStream(sys.stdout), _SafeStream(sys.stderr)
