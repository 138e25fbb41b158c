"""Make FFCV accept functions that need no compiling, and spread a kernel over threads.

FFCV compiles every stage of a pipeline with numba at every start, which takes 10 to 13 s and can
never be cached on disk (its code is closures over C pointers). The operations here are thin Python
functions around module-level kernels that are cached; FFCV only has to leave them alone. This is
the one place that changes FFCV, and `Compiler.compile` the one thing that is changed.

Threads are ordinary Python threads around kernels that release the interpreter lock, not numba's
parallel loops: those abort the process when a training and a validation loader run at the same
time under the `workqueue` layer, and under `omp` do not survive a fork.
"""

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
from ffcv.pipeline.compiler import Compiler

LARGEST_RANGE = 4  # images: from one operation to the next they stay in the core's own cache


def enable_precompiled() -> None:
    """Let `Compiler.compile` return functions marked `precompiled = True` as they are.

    Safe to call more than once; every operation of this package calls it. Also names numba's
    threading layer (omp, which every Linux wheel has) for FFCV's own operations, unless
    NUMBA_THREADING_LAYER is set: the `workqueue` fallback aborts with two loaders.
    """
    if "NUMBA_THREADING_LAYER" not in os.environ:
        numba.config.THREADING_LAYER = "omp"
    if getattr(Compiler.compile, "keeps_precompiled", False):
        return
    compile_original = Compiler.compile

    def compile_unless_done(code: Any, signature: Any = None) -> Any:
        if getattr(code, "precompiled", False):
            return code
        return compile_original(code, signature)

    compile_unless_done.keeps_precompiled = True  # type: ignore[attr-defined]
    Compiler.compile = staticmethod(compile_unless_done)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads for all operations; `process` gives a forked child its own, the parent's are gone."""
    return ThreadPoolExecutor(threads, thread_name_prefix="fast_imagenet")


def thread_count(samples: int) -> int:
    """Threads for a batch: as many as numba may use, at most one per sample."""
    return min(numba.get_num_threads(), max(1, samples))


def split_batch(count: int, threads: int) -> Iterator[tuple[int, int]]:
    """Ranges (first, end) that cover 0 to count - 1, for threads that take one after the other.

    Images differ in time: a range is a part of what is left, down to single images, so that all
    threads end nearly together; and a call costs some microseconds of the interpreter's lock.
    """
    first = 0
    while first < count:
        end = first + max(1, min(LARGEST_RANGE, (count - first) // (2 * threads)))
        yield first, end
        first = end


def run_threads(work: Callable[[int, int, int], Any], count: int) -> None:
    """Call work(thread, first, end) for ranges that cover a batch of `count` images, concurrently.

    The caller is thread 0 of `thread_count(count)`. A thread takes the next range when it has done
    one; after a failure none is taken any more.

    Raises: whatever a call raises, after all have ended.
    """
    threads = thread_count(count)
    ranges = iter(list(split_batch(count, threads)))  # a list's iterator gives each item once

    def run(thread: int) -> None:
        try:
            for first, end in ranges:
                work(thread, first, end)
        except BaseException:
            list(ranges)  # leaves none to the others
            raise

    # Twice: two loaders (training and validation) may wait in each other's queue otherwise.
    pool = _pool(2 * threads, os.getpid())
    others = [pool.submit(run, thread) for thread in range(1, threads)]
    try:
        run(0)
    finally:
        failures = [failure for failure in (other.exception() for other in others) if failure]
    if failures:
        raise failures[0]
