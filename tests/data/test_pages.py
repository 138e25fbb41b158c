"""What a loader reads: one mapping for all, pages ahead of their batches, errors as sentences."""

import os
import threading
import tracemalloc

import numpy as np
import pytest

from benchmarks.data import PAGE, write_made_up
from fast_imagenet.beton.reader import BetonError, BetonFile
from fast_imagenet.data import pages

COUNT = 24_000  # samples, in two pages


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_made_up(tmp_path_factory.mktemp("pages") / "made.beton", COUNT)


@pytest.fixture
def reads(monkeypatch):
    """Every read of the file, as byte and thread, in the order of their ends."""
    done, read = [], os.preadv

    def record(descriptor, buffers, place):
        count = read(descriptor, buffers, place)
        done.append((place, threading.current_thread().name))
        return count

    monkeypatch.setattr(pages.os, "preadv", record)
    return done


def epoch(path, batches):
    return pages.PagesAhead(BetonFile(path)).schedule_epoch([np.array(b) for b in batches])


def first_pages(path, *samples):
    return {int(page) for page in BetonFile(path).offsets[list(samples)] // PAGE}


def test_loaders_of_one_file_share_its_mapping(path, tmp_path):
    first, second = BetonFile(path), BetonFile(path)
    assert first.data is second.data
    for kind in (pages.WholeFile, pages.PagesAhead):
        memory, pointers, sizes = kind(first).state
        assert memory is second.data and pointers is None
        assert np.may_share_memory(sizes, memory)
    copy = tmp_path / "made.beton"
    write_made_up(copy, COUNT)
    assert BetonFile(copy).data is not first.data


def test_pages_are_read_before_their_batch_and_once(path, reads):
    batches = [[0, 1], [1, COUNT - 1], [2]]
    with epoch(path, batches):
        pass
    assert not reads
    context = epoch(path, batches)
    with context:
        for number, batch in enumerate(batches):
            context.start_batch(number)
            assert first_pages(path, *batch) <= {place // PAGE for place, _ in reads}
    places = [place for place, _ in reads]
    assert len(places) == len(set(places)) == 2 * PAGE // pages.PIECE
    assert all("pages" in name for _, name in reads)


def test_the_pages_of_the_next_batches_are_asked_for(path, reads, monkeypatch):
    for ahead, expected in ((0, {0}), (1, {0, COUNT - 1})):
        monkeypatch.setattr(pages, "AHEAD", ahead)
        context = epoch(path, [[0], [COUNT - 1], [0]])
        with context:
            context.start_batch(0)
            for batch in context._reads:
                for read in batch:
                    read.result()
        assert {place // PAGE for place, _ in reads} == first_pages(path, *expected)
        reads.clear()


def test_a_page_that_is_left_is_given_back_and_read_anew(path, reads, monkeypatch):
    monkeypatch.setattr(pages, "AHEAD", 0)
    monkeypatch.setattr(pages, "LEFT_AFTER", 2)
    context = epoch(path, [[0], *[[COUNT - 1]] * 4, [0]])
    with context:
        for number in range(5):
            context.start_batch(number)
        given_back = context._last[sorted(first_pages(path, 0, COUNT - 1))]
        assert given_back.tolist() == [-1, 4]
        reads.clear()
        context.start_batch(5)
        assert {place // PAGE for place, _ in reads} == first_pages(path, 0)


@pytest.mark.parametrize("fault", ["cannot be read .Input/output error", "has become shorter"])
def test_a_read_that_fails_is_a_sentence(path, monkeypatch, fault):
    def fail(*_):
        if "shorter" in fault:
            return 0
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(pages.os, "preadv", fail)
    context = epoch(path, [[0]])
    with context, pytest.raises(BetonError, match=f"made.beton {fault}.*again"):
        context.start_batch(0)


def test_a_file_that_is_gone_is_a_sentence(tmp_path):
    path = write_made_up(tmp_path / "gone.beton", 10)
    context = epoch(path, [[0]])
    os.unlink(path)
    with pytest.raises(BetonError, match=r"gone.beton cannot be read .No such file"):
        context.__enter__()
    context.__exit__()


def test_an_epoch_ends_though_a_read_hangs(path, monkeypatch):
    released, under_way, ended = threading.Event(), threading.Event(), []

    def hang(*_):
        under_way.set()
        ended.append(released.wait(5))
        return 0

    monkeypatch.setattr(pages.os, "preadv", hang)
    context = epoch(path, [[0]])
    with context:
        threading.Thread(target=pytest.raises, args=(BetonError, context.start_batch, 0)).start()
        assert under_way.wait(30)
    assert not ended
    released.set()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_loader_takes_no_memory_that_grows_with_the_samples(tmp_path, in_memory):
    """Everything that NumPy and Python allocate, while it is built and after."""
    loader = pytest.importorskip("fast_imagenet.data.ffcv_loader")
    count = 400_000
    path = write_made_up(tmp_path / "many.beton", count)
    options = dict(global_batch=8, seed=0, num_workers=1, in_memory=in_memory)
    train = loader.TrainLoader(path, **options)  # imports and caches
    tracemalloc.start()
    try:
        another = loader.TrainLoader(path, **options)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert another._loader.memory_manager.state[0] is train._loader.memory_manager.state[0]
    assert held / count < (1 if in_memory else 5)  # paged: a page number for each
    assert peak / count < 40
