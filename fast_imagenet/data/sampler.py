"""In which order an epoch visits its samples, and which rank gets which of them.

The order depends on (seed, epoch) alone and the global batch is cut into contiguous slices, so one
rank with 256 images per step and four ranks with 64 each train on the same batches, and a resumed
epoch needs no state but its number.
NumPy only.
"""

import numpy as np

from fast_imagenet.rng import COPY


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 .. n-1 that depends on nothing but its three arguments.

    Args: n: number of samples. seed, epoch: of the run. Each 0 .. 2**64 - 1.
    Returns: int64 [n].
    Raises: ValueError: an argument is out of range.
    """
    for name, value in (("n", n), ("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} = {value} is out of range; give 0 to 2**64 - 1")
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
    # Sorting raw bits instead of Generator.permutation: NumPy promises the bits of Philox for good,
    # but lets the algorithms of Generator change between versions (NEP 19), and then a run resumed
    # after an update would see other batches.
    return _stable_argsort(bits)


def _stable_argsort(bits: np.ndarray) -> np.ndarray:
    """np.argsort(bits, kind="stable") of uint64 [n], int64 [n]; a tenth of its time for millions.

    A number's place takes that of its low bits, and sorting numbers is far faster than sorting
    places by numbers. The few whose high bits are equal are put in order afterwards.
    """
    places = np.uint64((1 << max(len(bits) - 1, 0).bit_length()) - 1)
    keys = bits & ~places
    keys |= np.arange(len(bits), dtype=np.uint64)
    keys.sort()
    equal = np.flatnonzero((keys[1:] ^ keys[:-1]) <= places)
    keys &= places
    order = keys.view(np.int64)
    if len(equal):
        among = np.union1d(equal, equal + 1)
        tied = order[among]
        order[among] = tied[np.lexsort((tied, bits[tied]))]
    return order


def repeated_order(order: np.ndarray, repeats: int, global_batch: int) -> np.ndarray:
    """Repeated augmentation: the first samples of an order, each several times, as many in all.

    A batch holds the copies of its samples one after the other, the first of all, then the second
    of all: copies of one image meet in no pair of Mixup, nor in a forward pass of at most
    global_batch // repeats images.

    Args: order: int64 [n]. repeats: copies of each sample, >= 1. global_batch: as `rank_batches`.
    Returns: int64 [n], keys of samples (rng.py).
    Source: references/classification/sampler.py of pytorch/vision and RepeatAugSampler of timm; the
        same copies in each batch, which there are spread over the ranks.
    """
    place = np.arange(len(order))
    keys = order[place // repeats] + COPY * (place % repeats)
    return keys[np.lexsort((place % repeats, place // global_batch))]


def rank_batches(order: np.ndarray, global_batch: int, rank: int, world_size: int) -> np.ndarray:
    """The part of each global batch that one rank trains on; the incomplete last batch is dropped.

    Global batch s is order[s * global_batch : (s + 1) * global_batch]; rank r takes the r-th of
    its world_size contiguous slices.

    Args: order: int64 [n], as from `epoch_order`. global_batch: images per optimizer step over all
        ranks, a multiple of world_size. rank: 0 .. world_size - 1.
    Returns: int64 [n // global_batch, global_batch // world_size].
    Raises: ValueError: an argument is out of range, or the batch does not divide evenly.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} does not exist; ranks go from 0 up")
    if global_batch < 1 or global_batch % world_size:
        raise ValueError(
            f"a global batch of {global_batch} images cannot be divided equally among {world_size} "
            f"ranks; make training.batch_size a multiple of {world_size}"
        )
    steps, per_rank = len(order) // global_batch, global_batch // world_size
    batches = order[: steps * global_batch].reshape(steps, world_size, per_rank)
    return np.ascontiguousarray(batches[:, rank])


def paged_epoch_order(pages: np.ndarray, window: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation that touches few pages at a time: for files that do not fit in memory.

    The pages are visited in random order, `window` of them together, and the samples of each window
    are shuffled. So at most 2 * window pages are in use at any moment.

    Args: pages: int64 [n], the page that holds each sample. window: pages that are shuffled
        together, >= 1. seed, epoch: as `epoch_order`.
    Returns: int64 [n].
    Raises: ValueError: an argument is out of range.
    """
    if window < 1:
        raise ValueError(f"window = {window} pages is out of range; give at least 1")
    shuffled = epoch_order(len(pages), seed, epoch)
    used = np.bincount(pages) > 0
    page_count = int(used.sum())
    # another epoch number for the pages: their order must not follow that of the samples
    page_rank = np.argsort(epoch_order(page_count, seed, 2**63 + epoch))
    window_of_page = np.zeros(len(used), np.int64)
    window_of_page[used] = page_rank // window
    windows = window_of_page[pages[shuffled]]
    if page_count <= window << 16:
        windows = windows.astype(
            np.uint16
        )  # of which NumPy's stable sort takes a tenth of the time
    return shuffled[np.argsort(windows, kind="stable")]
