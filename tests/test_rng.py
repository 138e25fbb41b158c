"""Keyed random numbers: equal in numba and numpy, equal to a slow version, uniform, independent."""

import numpy as np
import pytest
from numba import njit

from fast_imagenet import rng
from tests import reference

N = 40_000
# scipy.stats.chi2.ppf(1 - 1e-6, 255): exceeded once in a million by a fair generator.
CHI2_255 = 373.0
KEYS = [(0, 0, 0, 0, 0), (1, 2, 3, 4, 5), (-1, 0, 2**40, 7, 1), (2**63 - 1, 10**6, 1, 1, 2**33)]


@njit
def many(n, kind):
    out = np.empty(n)
    for i in range(n):
        if kind == 0:
            out[i] = rng.uniform(3, 4, i, 5, 6)
        elif kind == 1:
            out[i] = rng.integer(-3, 14, 3, 4, i, 5, 6)
        else:
            out[i] = rng.normal(3, 4, i, 5, 6)
    return out


def chi2_uniform(values, bins=256):
    counts = np.bincount((values * bins).astype(int), minlength=bins)
    return ((counts - len(values) / bins) ** 2).sum() / (len(values) / bins)


def chi2_joint(first, second):
    """Uniformity of pairs over a 16 x 16 grid: sensitive to any dependence of two sequences."""
    cells = (first * 16).astype(int) * 16 + (second * 16).astype(int)
    return chi2_uniform((cells + 0.5) / 256)


@pytest.mark.parametrize("key", KEYS)
def test_hash_equals_slow_reference(key):
    expected = reference.hash_key(*key)
    assert int(rng.hash_key(*key)) == expected
    assert int(rng.hash_array(*key)[0]) == expected


def test_hash_is_frozen():
    # A changed constant would silently change every run that is resumed or repeated.
    assert int(rng.hash_key(1, 2, 3, 4, 5)) == 0x90BB69B7166551DE


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        (0, lambda i: rng.uniform_array(3, 4, i, 5, 6)),
        (1, lambda i: rng.integer_array(-3, 14, 3, 4, i, 5, 6)),
    ],
)
def test_numba_equals_numpy_exactly(kind, array):
    np.testing.assert_array_equal(many(2000, kind), array(np.arange(2000)))


def test_normals_agree_between_numba_and_numpy():
    expected = rng.normal_array(3, 4, np.arange(2000), 5, 6)
    np.testing.assert_allclose(many(2000, 2), expected, rtol=0, atol=1e-12)


def test_range_and_dtype():
    i = np.arange(N)
    values = rng.uniform_array(0, 0, i, 1)
    assert values.min() >= 0
    assert values.max() < 1
    integers = rng.integer_array(-2, 3, 0, 0, i, 1)
    assert integers.dtype == np.int64
    assert sorted(set(integers.tolist())) == [-2, -1, 0, 1, 2]


@pytest.mark.parametrize("axis", range(5), ids=["seed", "epoch", "sample", "stream", "counter"])
def test_uniform_along_every_key_word(axis):
    key = [9, 8, 7, 6, 5]
    key[axis] = np.arange(N)
    assert chi2_uniform(rng.uniform_array(*key)) < CHI2_255
    # The low bits too: a float only shows the high ones.
    low = (rng.hash_array(*key) & np.uint64(255)).astype(np.float64) / 256
    assert chi2_uniform(low) < CHI2_255


@pytest.mark.parametrize("axis", range(5), ids=["seed", "epoch", "sample", "stream", "counter"])
@pytest.mark.parametrize("step", [1, 2, 256, 2**32])
def test_neighbors_are_independent(axis, step):
    samples = np.arange(N, dtype=np.int64)
    key, neighbor = [9, 8, samples, 6, 5], [9, 8, samples, 6, 5]
    neighbor[axis] = neighbor[axis] + step
    assert chi2_joint(rng.uniform_array(*key), rng.uniform_array(*neighbor)) < CHI2_255


def test_swapped_key_words_are_independent():
    i = np.arange(N) + 1
    for other in ([0, i, 0, 0, 0], [0, 0, 0, i, 0], [0, 0, 0, 0, i]):
        pair = rng.uniform_array(0, 0, i, 0, 0), rng.uniform_array(*other)
        assert chi2_joint(*pair) < CHI2_255


@pytest.mark.parametrize("axis", range(5), ids=["seed", "epoch", "sample", "stream", "counter"])
def test_one_flipped_input_bit_flips_half_of_the_output(axis):
    base = [3, 1, np.arange(200), 2, 0]
    before = rng.hash_array(*base)
    for bit in range(0, 62, 3):
        changed = list(base)
        changed[axis] = np.asarray(base[axis]) ^ np.int64(1 << bit)
        flipped = np.bitwise_count(before ^ rng.hash_array(*changed)).mean()
        assert 30.5 < flipped < 33.5, (bit, flipped)  # 32 expected, standard error 0.28


def test_normal_moments_and_tails():
    values = rng.normal_array(1, 2, np.arange(200_000), 3)
    assert abs(values.mean()) < 0.012
    assert abs(values.std() - 1) < 0.008
    assert abs((values**3).mean()) < 0.03
    assert abs((values**4).mean() - 3) < 0.1
    assert abs((np.abs(values) > 1.959964).mean() - 0.05) < 0.0025


def test_integer_range_is_checked():
    with pytest.raises(ValueError, match=r"\[5, 5\)"):
        rng.integer_array(5, 5, 0, 0, 0, 0)


def test_a_stream_by_name_is_none_of_the_numbers():
    names = [rng.stream_of(name) for name in ("posterize", "rain", "")]
    numbers = [value for name, value in vars(rng).items() if name.startswith("STREAM_")]
    assert len(set(names + numbers)) == len(names) + len(numbers)
    assert rng.stream_of("posterize") == names[0] == 6135776291
