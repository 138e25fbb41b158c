"""The start and the end that all programs share: streams, signals, errors, exit statuses.

    if __name__ == "__main__":
        run_program("preview", main)

Only the standard library is imported at the start, for the doctor.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from fast_imagenet.processes import HANG_UP
from fast_imagenet.terminal import FULL, ignore_broken_pipe, readable

FAILED = 1  # exit statuses: an error, reported in one sentence
WRONG_SETTINGS = 2
STALLED = 70  # no batch came (sysexits: EX_SOFTWARE)
STOPPED = 75  # stopped on request, the same command resumes (sysexits: EX_TEMPFAIL)
INTERRUPTED = 130

LOWER_MEMORY = "Lower training.micro_batch_size (images per forward pass) or validation.batch_size"


def run_program(
    name: str,
    main: Callable[[], int | None],
    *,
    interrupted: str = "interrupted",
    out_of_memory: str = "",
) -> NoReturn:
    """Run `main` and end the process with the status that it returns; None is 0.

    SIGTERM and a hang-up end it as Ctrl-C does, so that its unfinished files are removed.

    Args:
        name: of the program, for its error messages.
        interrupted: what to print after such a signal.
        out_of_memory: what to change when the memory was too small.
    """
    ignore_broken_pipe()
    for number in (signal.SIGTERM, *HANG_UP):
        signal.signal(number, signal.default_int_handler)
    with errors_as_sentences(name, interrupted, out_of_memory):
        sys.exit(main())


@contextmanager
def errors_as_sentences(
    name: str, interrupted: str = "interrupted", out_of_memory: str = "", disk_full: str = ""
) -> Iterator[None]:
    """Within the block, an error that is the user's to fix ends the process with one sentence.

    Args:
        name: of the program; interrupted, out_of_memory: as run_program.
        disk_full: what to do once there is room.
    Raises:
        SystemExit: FAILED with the sentence on stderr, or INTERRUPTED. Any other error passes, with
            its traceback: it is a defect.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(readable(f"{name}: {interrupted}"), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if (sentence := error_sentence(error, out_of_memory, disk_full)) is None:
            raise
        sys.exit(readable(f"{name}: {sentence}", keep="\n"))


def error_sentence(error: BaseException, out_of_memory: str, disk_full: str) -> str | None:
    """What is wrong and what to change, for the user; None for a defect of the program."""
    from fast_imagenet.config import format_error

    if isinstance(error, ValueError):
        return str(error)
    text = str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}  # torch may not be imported yet
    if kinds & {"OutOfMemoryError", "MemoryError"} or "DefaultCPUAllocator" in text:
        return "\n".join(filter(None, (text or "out of memory", out_of_memory)))
    if kinds & {"WorkerError", "NativeLibraryError"}:
        return text
    if isinstance(error, OSError) and error.errno in FULL:
        file = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{file}; make room or choose another folder{disk_full}"
    # a path that the system refuses (rights, a folder removed meanwhile, a failing disk), or a
    # library's own words
    if isinstance(error, OSError) and (error.filename is not None or error.errno is None):
        return format_error(error)
    return None
