"""The writer's worker processes: chunks encoded in parallel, passed on in order.

A worker that raises, dies or hangs ends the conversion with the name of its image, and none is
left running. The names of their locks in /dev/shm begin with `fast-imagenet-<process id>`, so that
the next conversion can remove those of a killed one.
"""

import errno
import multiprocessing
import os
import pickle
import re
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from fast_imagenet.beton import encode
from fast_imagenet.beton.disk_space import LOCK_BYTES, SHM, check_shm, free_bytes, shm_sentence
from fast_imagenet.beton.encode import Chunk, ConversionError, EncodeSettings
from fast_imagenet.beton.output_lock import is_other_process
from fast_imagenet.processes import start_resource_tracker
from fast_imagenet.sources.base import Source

CHUNK = 16  # images per task: large enough to hide the cost of a task, small enough to stop soon
WINDOW = 3  # tasks waiting per worker: bounds the memory of finished chunks that wait their turn
STALL_SECONDS = 600  # longest wait for one chunk: a hanging file server must not hang the command
STOP_SECONDS = 3  # for workers to end by themselves; a stopped or stuck one is killed then
LOCK_NAME = "fast-imagenet"
OLD_SECONDS = 600  # the names of locks are needed while workers start, no longer than this


def encoded(
    source: Source,
    indices: np.ndarray,
    settings: EncodeSettings,
    workers: int,
    check_space: bool = True,
) -> Generator[Chunk, None, None]:
    """Encoded chunks in the order of `indices`, made by `workers` processes (0: in this one).

    Raises:
        ConversionError: an image failed, or the worker that was at it; the message names it.
        OSError: /dev/shm cannot hold what the workers share; with `check_space` before they start.
    """
    parts = (indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK))
    if not workers:
        for part in parts:
            yield encode.encode_chunk(source, part, settings, lambda index: None)
        return
    others = multiprocessing.active_children()
    pool, slots = _start(pickle.dumps((source, settings)), workers, check_space)
    waiting: deque[Future[Chunk]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(encode.work, part))
            if len(waiting) > WINDOW * workers:
                yield waiting.popleft().result(STALL_SECONDS)
        while waiting:
            yield waiting.popleft().result(STALL_SECONDS)
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ConversionError(
            f"{_being_read(source, slots)}: a worker process died here (killed, or out of memory);"
            " fewer --write.workers need less memory"
        ) from error
    except TimeoutError as error:
        what = f"nothing was finished for {STALL_SECONDS} s, the storage seems to hang"
        raise ConversionError(f"{_being_read(source, slots)}: {what}") from error
    finally:
        _stop(pool, others)


def _start(job: bytes, workers: int, check_space: bool) -> tuple[ProcessPoolExecutor, Any]:
    """The pool, and the shared array in which its workers note their current image."""
    remove_dead_locks()
    if check_space:
        check_shm(len(job))
    # spawn: a forked child would inherit locks that threads of OpenCV, numba or a test hold
    start_resource_tracker()
    context = multiprocessing.get_context("spawn")
    try:
        with _named_locks():
            slots = context.Array("q", [0] + [-1] * workers)
            # Shared memory, not an argument: Python fills the pipe of arguments before it checks
            # that the child still lives, so a child that dies at once would block a large one.
            shared = context.RawArray("B", job)
            arguments = shared, slots, os.getpid()
            return ProcessPoolExecutor(workers, context, encode.start_worker, arguments), slots
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(shm_sentence(LOCK_BYTES + len(job), free_bytes(SHM))) from error


@contextmanager
def _named_locks() -> Iterator[None]:
    """Semaphores made meanwhile have our name and process id instead of random letters alone."""
    names = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # no public way
    before = names["semprefix"]
    if SHM.is_dir():  # elsewhere names are short
        names["semprefix"] = f"/{LOCK_NAME}-{os.getpid()}-{_process_space()}"
    try:
        yield
    finally:
        names["semprefix"] = before


def remove_dead_locks() -> None:
    """Remove semaphores of conversions that were killed together with all their processes.

    Containers may share /dev/shm and not see each other's processes: there the age decides.
    """
    form = re.compile(rf"sem\.{LOCK_NAME}-(\d+)-(\d+)-.*")
    for path in SHM.glob(f"sem.{LOCK_NAME}-*"):
        found = form.fullmatch(path.name)
        if not found or int(found[1]) == os.getpid() or is_other_process(int(found[1])):
            continue
        with suppress(OSError):  # gone meanwhile, or another user's
            is_old = time.time() - path.stat().st_mtime > OLD_SECONDS
            if is_old or int(found[2]) == _process_space():
                path.unlink()


def _process_space() -> int:
    """A number that processes share when they see each other under the same process ids."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _being_read(source: Source, slots: Any) -> str:
    """Names of the images that the workers were at."""
    indices = [index for index in slots[1:] if index >= 0]
    return " or ".join(source.name(index) for index in indices[:4]) or "before the first image"


def _stop(pool: ProcessPoolExecutor, others: list) -> None:
    """End all child processes but `others` now, whatever they are doing, and wait for them."""
    results: Any = pool._result_queue  # no public way; None when it has ended
    pool.shutdown(wait=False, cancel_futures=True)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in workers:
        worker.join(max(0, deadline - time.monotonic()))
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(STOP_SECONDS)  # a process inside a dead file server's call outlives SIGKILL
    if results is not None:  # the pool's thread would wait for the rest of a result cut short
        results._writer.close()
