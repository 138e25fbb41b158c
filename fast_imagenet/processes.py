"""Processes that end with the one that started them, also where they hang or are stopped.

multiprocessing's fork server imports this module before anything else and so asks the system to
kill it when the thread that started it ends. Elsewhere the import does nothing.
"""

import ctypes
import signal
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from multiprocessing import forkserver, resource_tracker
from typing import Any

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
HANG_UP = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else ()  # nohup
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, *HANG_UP)


def end_with_parent() -> None:
    """Let the system kill this process when the thread that started it ends. Raises: OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def start_resource_tracker() -> None:
    """Start multiprocessing's helper so that a hang-up of the terminal does not end it.

    It outlives SIGINT and SIGTERM by itself. Ended, it is started anew and reports false leaks.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # inherited
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_server(blocked: Iterable[int]) -> None:
    """Start multiprocessing's fork server from a thread that lives as long as this process.

    Args: blocked: numbers of the signals that the server and all its children do not answer.
    Raises: OSError: it cannot be started.
    """
    started: Future[None] = Future()
    threading.Thread(target=_serve, args=(blocked, started), daemon=True).start()
    started.result()


def _serve(blocked: Iterable[int], started: Future) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    server: Any = forkserver._forkserver
    before = server._forkserver_pid
    try:
        forkserver.ensure_running()
    except BaseException as error:
        started.set_exception(error)
        return
    started.set_result(None)
    if server._forkserver_pid != before:
        threading.Event().wait()  # the server ends when this thread does


if any("multiprocessing.forkserver" in argument for argument in sys.orig_argv):
    end_with_parent()
