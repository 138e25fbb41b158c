"""The FFCV loader: which samples come in which order, how errors arrive, what an end leaves."""

import gc
import shutil
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from itertools import chain

import numba
import numpy as np
import pytest
import torch

from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.writer import EncodeSettings, write_beton
from fast_imagenet.data.augmentation import Augment
from fast_imagenet.data.sampler import epoch_order, paged_epoch_order, rank_batches
from fast_imagenet.rng import index_of
from fast_imagenet.sources.base import Source
from tests import simulated_streams
from tests.conftest import ROOT

loader = pytest.importorskip("fast_imagenet.data.ffcv_loader")

COUNT = 45


class Numbered(Source):
    """Images whose label is their number and whose color is twice that."""

    kind = "test"
    makes_pixels = True

    def __init__(self):
        super().__init__(np.arange(COUNT), [f"c{i:02}" for i in range(COUNT)])

    def name(self, index):
        return f"image {index}"

    def pixels(self, index):
        return np.full((40 + index % 3, 50, 3), 2 * index, np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("numbered") / "numbered.beton"
    write_beton(path, Numbered(), EncodeSettings(mode="proportion", quality=100))
    return path


@pytest.fixture(scope="module")
def labels(path):
    return loader.BetonFile(path).labels


def train_loader(path, **options):
    options = dict(global_batch=8, seed=3, num_workers=1) | options
    return loader.TrainLoader(path, **options)


def labels_of(batches):
    return [labels_b.tolist() for _, labels_b, *_ in batches]


@pytest.fixture(scope="module")
def one_rank(path):
    return train_loader(path)


def test_order_is_the_shared_one_and_images_belong_to_labels(one_rank, labels):
    assert len(one_rank) == COUNT // 8 and one_rank.num_classes == COUNT
    for epoch in (0, 1):
        expected = labels[rank_batches(epoch_order(COUNT, 3, epoch), 8, 0, 1)]
        seen = []
        for images_bhwc, labels_b, samples_b in one_rank.epoch(epoch, 32):
            assert images_bhwc.shape == (8, 32, 32, 3) and images_bhwc.dtype == torch.uint8
            color = images_bhwc.float().mean((1, 2, 3))
            assert (color - 2 * labels_b).abs().max() < 2
            assert labels_b.tolist() == labels[samples_b].tolist()
            seen.append(labels_b.tolist())
        assert seen == expected.tolist()


def test_resolution_changes_between_epochs(one_rank):
    assert {tuple(images.shape) for images, *_ in one_rank.epoch(0, 64)} == {(8, 64, 64, 3)}
    assert {tuple(images.shape) for images, *_ in one_rank.epoch(0, 32)} == {(8, 32, 32, 3)}


def test_start_step_leaves_out_the_first_batches(one_rank):
    assert labels_of(one_rank.epoch(4, 32, start_step=3)) == labels_of(one_rank.epoch(4, 32))[3:]


def pixels_of(batches):
    return np.concatenate([images_bhwc.numpy().copy() for images_bhwc, *_ in batches])


REPEATED = Augment(repeats=3, flip_mode="alternating", policy="trivial_augment_bilinear")


@pytest.mark.parametrize("options", [{}, {"augment": REPEATED}, {"in_memory": False}])
def test_images_depend_on_seed_epoch_and_sample_alone(tmp_path, options):
    class Noise(Numbered):  # on plain images no crop or flip would show
        def pixels(self, index):
            return np.random.default_rng(index).integers(0, 256, (40 + index % 3, 50, 3), np.uint8)

    path = tmp_path / "noise.beton"
    write_beton(path, Noise(), EncodeSettings(mode="proportion", quality=100))
    make = partial(train_loader, path, **options)
    one_rank = make()
    whole = pixels_of(one_rank.epoch(5, 24))
    assert not np.array_equal(whole, pixels_of(one_rank.epoch(6, 24)))
    np.testing.assert_array_equal(pixels_of(make(num_workers=2).epoch(5, 24)), whole)
    np.testing.assert_array_equal(pixels_of(one_rank.epoch(5, 24, start_step=2)), whole[16:])
    halves = [pixels_of(make(rank=r, world_size=2).epoch(5, 24)) for r in (0, 1)]
    joined = [half.reshape(-1, 4, 24, 24, 3) for half in halves]
    np.testing.assert_array_equal(np.concatenate(joined, 1).reshape(whole.shape), whole)
    assert not np.array_equal(pixels_of(make(seed=4).epoch(5, 24)), whole)


@pytest.mark.parametrize("in_memory", [True, False])
def test_copies_of_an_image_differ_and_keep_its_label(path, labels, in_memory):
    repeated = train_loader(path, in_memory=in_memory, augment=Augment(repeats=4, brightness=0.9))
    batches = [(x.numpy().copy(), y, keys) for x, y, keys in repeated.epoch(0, 32)]
    order, different = repeated.order(0), 0
    assert len(batches) == COUNT // 8
    for step, (images_bhwc, labels_b, keys) in enumerate(batches):
        first = order[2 * step : 2 * step + 2].tolist()
        assert index_of(keys).tolist() == first * 4  # two images, four times each
        assert labels_b.tolist() == labels[first].tolist() * 4
        different += len({image_hwc.tobytes() for image_hwc in images_bhwc})
    assert different > COUNT // 2  # images of one level each: some copies are equal


def test_a_damaged_image_is_named(path, tmp_path):
    whole = loader.BetonFile(path)
    jpegs = [index for index in range(COUNT) if whole.modes[index] == "jpg"]
    data, start = bytearray(path.read_bytes()), int(whole.offsets[jpegs[2]])
    data[start : start + 2] = b"no"
    (tmp_path / "damaged.beton").write_bytes(data)
    damaged = loader.EvalLoader(tmp_path / "damaged.beton", batch_size=COUNT)
    with pytest.raises(loader.BetonError, match=f"damaged.beton: sample {jpegs[2]}: .*write"):
        list(damaged.batches(32, 1.0))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_changed_pixel_is_noticed_as_its_page_is_first_read(path, tmp_path, in_memory):
    whole = loader.BetonFile(path)
    raws = [index for index in range(COUNT) if whole.modes[index] == "raw"]
    data, changed = bytearray(path.read_bytes()), tmp_path / "changed.beton"
    data[int(whole.offsets[raws[0]]) + 1000] ^= 1
    changed.write_bytes(data)
    for side in path.parent.glob(f"{path.name}.*"):
        shutil.copy(side, tmp_path / side.name.replace(path.name, changed.name))
    options = {"in_memory": in_memory, "batch_size": COUNT}
    with pytest.raises(loader.BetonError, match=r"changed.beton.*page|changed.beton.*byte"):
        list(loader.EvalLoader(changed, **options).batches(32, 1.0))
    with pytest.raises(loader.BetonError, match="changed.beton"):
        list(train_loader(changed, in_memory=in_memory).epoch(0, 32))
    unchecked = loader.EvalLoader(changed, check_pages=False, **options)
    assert len(list(unchecked.batches(32, 1.0))) == 1


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one_rank(path, monkeypatch, world_size, in_memory):
    """Samples and pixels, in the quasi-random order too; there the file has twelve pages."""
    monkeypatch.setattr(loader, "PAGES_IN_MEMORY", 3)

    def batches_of(rank, world_size):
        one = train_loader(path, rank=rank, world_size=world_size, in_memory=in_memory)
        if not in_memory:
            assert one._pages is not None
            one._pages = np.arange(COUNT) // 4
        return [(x.numpy().copy(), y.tolist(), s.tolist()) for x, y, s in one.epoch(2, 32)]

    whole = batches_of(0, 1)
    parts = [batches_of(rank, world_size) for rank in range(world_size)]
    for pieces, (images, seen, samples) in zip(zip(*parts, strict=True), whole, strict=True):
        assert list(chain.from_iterable(piece[1] for piece in pieces)) == seen
        assert list(chain.from_iterable(piece[2] for piece in pieces)) == samples
        assert np.array_equal(np.concatenate([piece[0] for piece in pieces]), images)
    pages = [sample // 4 for *_, samples in whole[:1] for sample in samples]
    assert (len(set(pages)) <= 3) == (not in_memory)


def test_every_validation_image_comes_once_whatever_the_ranks(path):
    for world_size in (1, 2, 4, 7):
        seen = []
        for rank in range(world_size):
            part = loader.EvalLoader(path, batch_size=16, rank=rank, world_size=world_size)
            batches = labels_of(part.batches(32, 0.875))
            assert all(len(batch) == 16 for batch in batches[:-1])
            seen += chain.from_iterable(batches)
        assert sorted(seen) == list(range(COUNT))


def test_center_crop_keeps_its_fraction_of_the_shorter_side(tmp_path):
    class Framed(Numbered):
        def pixels(self, index):
            image = np.zeros((80, 120, 3), np.uint8)
            image[20:60, 40:80] = 255  # the central square of half the shorter side
            return image

    write_beton(tmp_path / "framed.beton", Framed(), EncodeSettings(mode="raw"))
    framed = loader.EvalLoader(tmp_path / "framed.beton", batch_size=COUNT)
    ((inner, _),) = framed.batches(32, 0.5)
    assert (inner == 255).all()
    ((outer, _),) = framed.batches(32, 1.0)
    assert outer[:, 0].max() == 0 and outer[:, 16, 16].min() == 255


def test_an_error_in_the_loader_thread_reaches_the_caller(path):
    broken = train_loader(path)

    def code(**arguments):
        raise MemoryError("no memory for the batch")

    broken._loader.code = ([(code, [0])], broken._loader.code[1])
    with pytest.raises(RuntimeError, match="data loader failed: no memory for the batch") as raised:
        list(broken.epoch(0, 32))
    assert isinstance(raised.value.__cause__, MemoryError)


def arrays_in(nested):
    """All arrays of nested dictionaries, lists and tuples."""
    if isinstance(nested, np.ndarray | torch.Tensor):
        return [nested]
    parts = nested.values() if isinstance(nested, dict) else nested
    return [array for part in parts or () for array in arrays_in(part)]


def test_leaving_an_epoch_early_ends_its_thread(one_rank):
    for taken in (0, 1, 3):
        batches = one_rank.epoch(0, 32)
        for _ in range(taken):
            next(batches)
        if taken:  # the thread is there from the first batch on, and may have run to its end
            (thread,) = [t for t in gc.get_objects() if type(t) is loader._Epoch]
            buffers = [weakref.ref(part) for part in arrays_in(thread.memory_allocations)]
            assert buffers
            del thread
        batches.close()
        del batches
        gc.collect()
        assert not taken or not any(buffer() is not None for buffer in buffers)
    assert not [t for t in threading.enumerate() if isinstance(t, loader._Epoch)]
    assert len(labels_of(one_rank.epoch(0, 32))) == COUNT // 8


def test_an_epoch_left_early_decodes_no_more_than_is_under_way(path, monkeypatch):
    decoded, run = [], loader.EpochIterator.run_pipeline
    monkeypatch.setattr(
        loader.EpochIterator, "run_pipeline",
        lambda self, *batch: (decoded.append(1), run(self, *batch))[1],
    )  # fmt: skip
    many = train_loader(path, global_batch=1)
    batches = many.epoch(0, 32)
    next(batches)
    batches.close()
    assert len(decoded) < 12  # of 45


def test_quasi_random_order_visits_everything_once_a_few_pages_at_a_time():
    pages = np.repeat(np.arange(20), 7)
    order = paged_epoch_order(pages, window=4, seed=1, epoch=0)
    assert sorted(order) == list(range(140))
    for start in range(0, 140, 28):
        assert len(set(pages[order[start : start + 28]])) == 4
    assert not np.array_equal(order, paged_epoch_order(pages, 4, seed=1, epoch=1))
    assert np.array_equal(order, paged_epoch_order(pages, 4, seed=1, epoch=0))
    within = pages[order[:28]]
    assert len(set(within[:4])) > 1  # pages are mixed, not read one after the other


def test_both_modes_read_the_same_images(path):
    """Train and val of one file: the mapping is one, and every batch is equal."""
    modes = [loader.EvalLoader(path, batch_size=7, in_memory=mode) for mode in (True, False)]
    pairs = list(zip(*(one.batches(32, 0.8) for one in modes), strict=True))
    assert len(pairs) == -(-COUNT // 7)
    for (images, labels), (others, other_labels) in pairs:
        assert torch.equal(images, others) and torch.equal(labels, other_labels)
    whole = [one._loader.memory_manager.state[0] for one in (*modes, train_loader(path))]
    assert whole[0] is whole[1] is whole[2]


def test_paged_errors_of_the_disk_reach_the_caller(path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    paged = train_loader(path, in_memory=False)
    monkeypatch.setattr("fast_imagenet.data.pages.os.preadv", fail)
    with pytest.raises(loader.BetonError, match=r"numbered.beton cannot be read .Input/output"):
        list(paged.epoch(0, 32))


def test_quasi_random_loader_reads_pages_ahead(path, labels):
    quasi = train_loader(path, in_memory=False)
    seen = labels_of(quasi.epoch(0, 32))
    expected = paged_epoch_order(np.zeros(COUNT, int), 1, 3, 0)
    assert list(chain.from_iterable(seen)) == labels[expected[:40]].tolist()


def test_altered_tables_are_refused_before_compiled_code_runs(path, tmp_path, monkeypatch):
    """A bit of header, metadata or table of pointers: FFCV never sees such a file."""
    altered, whole = tmp_path / "altered.beton", path.read_bytes()
    for suffix in ("", ".json"):
        shutil.copy(f"{path}{suffix}", f"{altered}{suffix}")
    reached = []
    monkeypatch.setattr(loader, "Loader", lambda *_, **__: reached.append(1))
    start, rng = fmt.METADATA_START, np.random.default_rng(0)
    tables = [(0, start), (start, start + COUNT * fmt.SAMPLE.itemsize)]
    tables.append((len(whole) - COUNT * fmt.ALLOCATION.itemsize, len(whole)))
    for first, end in tables * 40:
        place = rng.integers(first, end)
        with open(altered, "r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 1 << int(rng.integers(8))]))
            for make in (train_loader, lambda name: loader.EvalLoader(name, batch_size=8)):
                file.flush()
                with pytest.raises(loader.BetonError, match="altered.beton"):
                    make(altered)
            file.seek(place)
            file.write(whole[place : place + 1])
    assert not reached


@pytest.mark.slow
def test_torch_keeps_its_threads(path):
    """In a process of its own: importing FFCV alone leaves torch with one thread."""
    code = f"""
import torch
torch.set_num_threads(3)
from fast_imagenet.data.ffcv_loader import TrainLoader
assert torch.get_num_threads() == 3
list(TrainLoader({str(path)!r}, global_batch=8, seed=0, num_workers=1).epoch(0, 32))
assert torch.get_num_threads() == 3
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_numba_still_writes_to_one_dimensional_bytes(one_rank):
    """FFCV marks numba's shared type read-only, and then no such function can be typed any more."""

    @numba.njit
    def fill(array):
        array[:] = 7

    bytes_1d = np.zeros(3, np.uint8)
    fill(bytes_1d)
    assert bytes_1d.tolist() == [7, 7, 7]


def test_too_few_images_are_refused_before_anything_is_compiled(path, monkeypatch):
    monkeypatch.setattr(loader, "is_compiled", lambda kernel: pytest.fail("too late"))
    with pytest.raises(ValueError, match="holds 45 images, fewer than one batch of 64"):
        train_loader(path, global_batch=64)


def test_bad_requests_are_refused_with_the_fix(path, tmp_path):
    with pytest.raises(ValueError, match="holds 45 images, fewer than one batch of 64.*lower"):
        train_loader(path, global_batch=64)
    with pytest.raises(ValueError, match="cannot be divided equally among 3 ranks"):
        train_loader(path, world_size=3).epoch(0, 32)
    with pytest.raises(ValueError, match="data.num_workers=999 but this process may use"):
        train_loader(path, num_workers=999)
    with pytest.raises(ValueError, match="does not exist"):
        train_loader(tmp_path / "none.beton")
    (tmp_path / "text.beton").write_text("not a data file" * 100)
    with pytest.raises(ValueError, match="text.beton"):
        train_loader(tmp_path / "text.beton")


@pytest.mark.slow
def test_torch_keeps_its_threads_when_the_operations_come_first():
    """As in the plan, which looks whether their kernels are compiled before it opens a loader."""
    code = """
import torch
torch.set_num_threads(3)
import fast_imagenet.ops.crop_decode
assert torch.get_num_threads() == 3
import fast_imagenet.data.ffcv_loader
assert torch.get_num_threads() == 3
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_validation_batch_takes_no_more_memory_than_there_are_images(path):
    batches = loader.EvalLoader(path, batch_size=1_000_000).batches(512, 1.0)
    assert len(next(batches)[1]) == COUNT
    batches.close()


# ------------------------------------------------------------------------------------------------
# The ring of buffers in front of a GPU, on simulated streams
# ------------------------------------------------------------------------------------------------

STEP_SECONDS = 0.005  # of the simulated GPU; a batch of two is decoded in a tenth of it


@pytest.mark.parametrize("lead", range(1, 13))
def test_no_batch_is_overwritten_before_it_is_copied_and_used(path, monkeypatch, lead):
    """The host may be `lead` steps ahead of the GPU: every step still sees its own batch."""
    wanted = [
        (images.clone(), y.clone())
        for images, y, _ in train_loader(path, global_batch=2).epoch(0, 32)
    ]
    gpu = simulated_streams.install(monkeypatch, loader)
    batches = train_loader(path, global_batch=2, device="cuda").epoch(0, 32)
    wrong, room = [], threading.Semaphore(lead)

    def step(number, images, labels_b):
        time.sleep(STEP_SECONDS)
        right = all(map(torch.equal, (images, labels_b), wanted[number]))
        wrong.extend([] if right else [number])
        room.release()

    for number, (images, labels_b, _) in enumerate(batches):
        assert room.acquire(timeout=simulated_streams.LIMIT)
        gpu.main.launch(partial(step, number, images, labels_b))
    gpu.main.synchronize()
    assert number + 1 == len(wanted)
    assert wrong == []


def test_the_first_copies_wait_for_the_work_before_the_pass(path, monkeypatch):
    """Their device memory may have been freed a moment ago, by a step that has not run yet."""
    gpu = simulated_streams.install(monkeypatch, loader)
    earlier_step = threading.Event()
    gpu.main.launch(lambda: earlier_step.wait(simulated_streams.LIMIT))
    batches = train_loader(path, global_batch=2, device="cuda").epoch(0, 32)
    next(batches)
    time.sleep(0.2)
    assert len(gpu.launched) >= 2  # images and labels of a batch
    assert not gpu.copied
    earlier_step.set()
    batches.close()
    assert len(gpu.copied) == len(gpu.launched)


def test_an_epoch_left_early_frees_no_memory_with_copies_under_way(path, monkeypatch):
    gpu = simulated_streams.install(monkeypatch, loader, copy_seconds=0.05)
    batches = train_loader(path, global_batch=2, device="cuda").epoch(0, 32)
    next(batches)
    time.sleep(0.05)  # meanwhile the batches ahead are decoded
    batches.close()
    assert len(gpu.launched) > 2
    assert len(gpu.copied) == len(gpu.launched)


def test_an_evaluation_is_not_overwritten_either(path, monkeypatch):
    """Its last batch is smaller; two crops of one file follow each other without a pause."""
    plain = [x.clone() for x, _ in loader.EvalLoader(path, batch_size=2).batches(32, 0.5)]
    gpu = simulated_streams.install(monkeypatch, loader)
    evaluation = loader.EvalLoader(path, batch_size=2, device="cuda")
    seen = []
    for ratio in (1.0, 0.5):
        for images, _ in evaluation.batches(32, ratio):
            gpu.main.launch(partial(time.sleep, STEP_SECONDS))
            gpu.main.launch(partial(lambda images: seen.append(images.clone()), images))
    gpu.main.synchronize()
    assert len(seen) == 2 * len(plain)
    assert all(map(torch.equal, seen[len(plain) :], plain))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_stay_whole_on_a_busy_gpu(path):
    """The host is ahead of the GPU by whole steps."""
    wanted = [x.double().sum((1, 2, 3)) for x, _, _ in train_loader(path).epoch(0, 64)]
    sums = []
    for images, _, _ in train_loader(path, device="cuda").epoch(0, 64):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        sums.append(images.double().sum((1, 2, 3)))
    assert torch.equal(torch.cat(sums).cpu(), torch.cat(wanted))
