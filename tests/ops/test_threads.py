"""Threads share a batch: every image once, nobody waits for a slow one, a failure ends the work."""

import threading
import time

import numba
import numpy as np
import pytest

from fast_imagenet.ops.precompiled import LARGEST_RANGE, run_threads, split_batch


@pytest.fixture
def two_threads():
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    before = numba.get_num_threads()
    numba.set_num_threads(2)
    yield
    numba.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 64])
@pytest.mark.parametrize("count", [0, 1, 5, 64, 256, 1000])
def test_ranges_cover_a_batch_and_end_with_single_images(count, threads):
    ranges = list(split_batch(count, threads))
    assert [b for first, end in ranges for b in range(first, end)] == list(range(count))
    sizes = [end - first for first, end in ranges]
    assert max(sizes, default=0) <= LARGEST_RANGE and sizes == sorted(sizes, reverse=True)
    assert set(sizes[-2 * threads :]) <= {1}


def test_16_threads_end_within_7_percent_of_their_mean():
    """With images that differ as those of ImageNet do, whose deviation is 0.48 of the mean."""
    generator, slowest, mean = np.random.default_rng(0), 0.0, 0.0
    for _ in range(50):
        times, ends = generator.gamma(0.48**-2, size=256), np.zeros(16)
        for first, end in split_batch(256, 16):
            ends[ends.argmin()] += times[first:end].sum()
        slowest, mean = slowest + ends.max(), mean + ends.mean()
    assert slowest < 1.07 * mean


def test_nobody_waits_behind_a_slow_image(two_threads):
    """The thread that has the first image is busy until all others are done."""
    done, others_done = [], threading.Event()

    def work(thread, first, end):
        if first == 0:
            assert others_done.wait(30)
        done.extend(range(first, end))
        if len(done) == 100 - next(split_batch(100, 2))[1]:
            others_done.set()

    run_threads(work, 100)
    assert sorted(done) == list(range(100))


@pytest.mark.parametrize("of_caller", [True, False])
def test_after_a_failure_no_range_is_taken(two_threads, of_caller):
    seen, taken = [], threading.Barrier(2, timeout=30)

    def work(thread, first, end):
        seen.append(first)
        if len(seen) <= 2:
            taken.wait()  # each thread has a range now
            if (thread == 0) == of_caller:
                raise ValueError(f"thread {thread}")
        time.sleep(0.01)

    with pytest.raises(ValueError, match=f"thread {1 - of_caller}"):
        run_threads(work, 1000)
    assert len(seen) < 10
