"""Text from data, made safe to show: others decide what a class name or a file name holds."""

import re

# C0, DEL, C1; marks that turn the direction of text; separators of lines
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def readable(text: str, keep: str = "") -> str:
    r"""`text` with control characters as \x1b or \u202e and every byte that is not UTF-8 as \xff.

    Args:
        keep: control characters that stay.
    """
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, as a broken JSON file may hold
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _UNSEEN.sub(lambda found: _escaped(found[0], keep), text)


def on_terminal(text: str) -> str:
    """What a program writes, with lines and tabs; and `\\r` at its ends only, for progress bars."""
    body = text.strip("\r")
    start, end = (text[: text.index(body)], text[len(text.rstrip("\r")) :]) if body else (text, "")
    return start + readable(body, keep="\n\t") + end


def _escaped(character: str, keep: str) -> str:
    return character if character in keep else character.encode("unicode_escape").decode("ascii")
