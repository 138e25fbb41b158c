"""Order of an epoch: a function of (seed, epoch) alone, and the same batches for any world size."""

from itertools import chain

import numpy as np
import pytest

from fast_imagenet.data.sampler import (
    _stable_argsort,
    epoch_order,
    paged_epoch_order,
    rank_batches,
    repeated_order,
)
from fast_imagenet.rng import COPY, index_of
from tests.reference import repeated_augmentation


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_is_a_permutation(n):
    order = epoch_order(n, seed=3, epoch=5)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_depends_on_seed_and_epoch_and_nothing_else():
    base = epoch_order(200, seed=0, epoch=0)
    np.random.seed(123)  # the global generator must play no part
    assert np.array_equal(base, epoch_order(200, seed=0, epoch=0))
    assert not np.array_equal(base, epoch_order(200, seed=1, epoch=0))
    assert not np.array_equal(base, epoch_order(200, seed=0, epoch=1))
    assert not np.array_equal(epoch_order(200, seed=1, epoch=0), epoch_order(200, seed=0, epoch=1))


def test_values_are_pinned():
    """A change here would make resumed runs see other batches."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(8, seed=2**63, epoch=7).tolist() == [6, 0, 4, 2, 3, 7, 5, 1]


@pytest.mark.parametrize("repeats", [1, 3, 4])
@pytest.mark.parametrize("batch", [128, 256])
def test_repeated_augmentation_is_that_of_the_ranks_of_deit(repeats, batch):
    order = epoch_order(1030, seed=2, epoch=1)
    batches = rank_batches(repeated_order(order, repeats, batch), batch, 0, 1)
    expected = repeated_augmentation(order.tolist(), repeats, 4, batch)
    assert len(batches) == len(expected)
    for keys, ranks in zip(batches, expected, strict=True):
        assert sorted(index_of(keys).tolist()) == sorted(chain.from_iterable(ranks))
        for part in np.split(index_of(keys), range(0, batch, batch // repeats)):
            assert len(set(part)) == len(part)  # no forward pass of this size has an image twice
        pairs = index_of(keys).reshape(-1, 2)
        assert (pairs[:, 0] != pairs[:, 1]).all()
    seen = batches.reshape(-1)
    assert len(np.unique(seen)) == len(seen) and set(seen // COPY) == set(range(repeats))


@pytest.mark.parametrize("bits", [0, 3, 10, 20, 64])
def test_numbers_are_sorted_as_a_stable_sort_does(bits):
    """Few different numbers, high or low: many are equal, or in all but their low bits."""
    rng = np.random.default_rng(bits)
    for n in (0, 1, 2, 3, 64, 65, 1000, 4097):
        for shift in {0, (64 - bits) // 2, 64 - max(bits, 1)}:
            numbers = rng.integers(0, 2**bits, n, np.uint64) << np.uint64(shift)
            order = _stable_argsort(numbers)
            assert order.dtype == np.int64
            assert np.array_equal(order, np.argsort(numbers, kind="stable"))


@pytest.mark.parametrize("window", [1, 3, 50])
def test_paged_order_is_that_of_its_definition(window):
    """Page numbers with gaps, in any order; a window of single pages counts beyond 16 bits."""
    for n, page_count in ((1000, 40), (70_000, 70_000)):
        rng = np.random.default_rng(n)
        pages = 7 + 2 * rng.permutation(np.arange(n) % page_count)
        shuffled = epoch_order(n, 1, 2)
        page_rank = np.argsort(epoch_order(page_count, 1, 2**63 + 2))
        windows = page_rank[(pages[shuffled] - 7) // 2] // window
        expected = shuffled[np.argsort(windows, kind="stable")]
        for kind in (np.int32, np.int64):
            assert np.array_equal(paged_epoch_order(pages.astype(kind), window, 1, 2), expected)


def test_every_position_is_equally_likely():
    """Mean position of sample 0 over 400 epochs: (n - 1) / 2, within 4 standard errors."""
    n, epochs = 50, 400
    where = [int(np.flatnonzero(epoch_order(n, 0, epoch) == 0)[0]) for epoch in range(epochs)]
    assert abs(np.mean(where) - (n - 1) / 2) < 4 * np.sqrt((n * n - 1) / 12 / epochs)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_side_by_side_are_the_global_batches(world_size):
    order = epoch_order(103, seed=1, epoch=2)
    parts = [rank_batches(order, 20, rank, world_size) for rank in range(world_size)]
    assert all(part.shape == (5, 20 // world_size) for part in parts)
    assert np.array_equal(np.concatenate(parts, axis=1), order[:100].reshape(5, 20))


def test_fewer_samples_than_a_batch_is_no_step():
    assert rank_batches(np.arange(7), 8, 0, 2).shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: epoch_order(-1, 0, 0), "n = -1"),
        (lambda: epoch_order(4, -1, 0), "seed = -1"),
        (lambda: epoch_order(4, 0, 2**64), "epoch = "),
        (lambda: rank_batches(np.arange(9), 9, 0, 2), "multiple of 2"),
        (lambda: rank_batches(np.arange(9), 0, 0, 1), "training.batch_size"),
        (lambda: rank_batches(np.arange(9), 2, 2, 2), "rank 2 of 2"),
    ],
)
def test_errors_name_value_and_fix(call, words):
    with pytest.raises(ValueError, match=words):
        call()
