"""Every operation of the package bare, in a stock FFCV Loader and in TrainLoader: the same bytes.

Operations are found by looking into fast_imagenet.ops, so that a new one fails here until it has a
case. The stock Loader runs in a process of its own, in which data/ffcv_loader.py, with what it
fixes in FFCV, is never imported.
"""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.pipeline.state import State
from ffcv.transforms import ToTensor

from fast_imagenet import ops
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.data.augmentation import POLICIES, STAGES, Augment
from fast_imagenet.ops.operation import KeyedOperation
from tests import ops_data
from tests.conftest import ROOT
from tools.preview import Stored

# numba complains when FFCV drops compiled functions; nothing can be done about it here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SIZE = (24, 40)  # height, width of the output: not square, so that swapped axes show
SEED, ORDER_SEED = 11, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Operation -> pipelines that use it, as functions of the seed. A decoder is put before the changes.
DECODERS = {
    "CropDecode": [
        lambda seed, **more: ops.CropDecode(SIZE, (0.2, 1.0), flip=0.5, seed=seed, **more)
    ],
    "CenterCropDecode": [lambda seed: ops.CenterCropDecode(SIZE, 0.8)],
}
CHANGES = {
    "RandAugment": [
        lambda seed: [ops.RandAugment(2, 15, mode="lite", mstd=2.0, seed=seed)],
        lambda seed: [ops.RandAugment(3, 20, mode="full", seed=seed)],
        lambda seed: [ops.RandAugment(2, 9, mode="timm", mstd=0.5, seed=seed)],
    ],
    "TrivialAugmentWide": [lambda seed: [ops.TrivialAugmentWide(seed=seed)]],
    "AutoAugment": [lambda seed: [ops.AutoAugment(seed=seed)]],
    "ThreeAugment": [lambda seed: [ops.ThreeAugment(seed=seed)]],
    "ColorJitter": [lambda seed: [ops.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8, seed=seed)]],
    "RandomGrayscale": [lambda seed: [ops.RandomGrayscale(0.5, seed=seed)]],
    "RandomSolarize": [lambda seed: [ops.RandomSolarize(100, 0.5, seed=seed)]],
    "GaussianBlur": [lambda seed: [ops.GaussianBlur((0.5, 2.0), 0.9, seed=seed)]],
    "Normalize": [
        lambda seed: [ops.Normalize(MEAN, STD)],
        lambda seed: [ops.Normalize(MEAN, STD, "float16")],
        lambda seed: [ops.Normalize(MEAN, STD, "bfloat16")],
    ],
    "RandomErasing": [
        lambda seed: [ops.RandomErasing(0.5, count=3, seed=seed)],
        lambda seed: [ops.Normalize(MEAN, STD), ops.RandomErasing(0.5, "rand", seed=seed)],
        lambda seed: [
            ops.Normalize(MEAN, STD, "float16"),
            ops.RandomErasing(1, "pixel", seed=seed),
        ],
        lambda seed: [
            ops.Normalize(MEAN, STD, "bfloat16"),
            ops.RandomErasing(1, "rand", seed=seed),
        ],
    ],
}
FIXED = {"CenterCropDecode", "Normalize"}  # these draw nothing
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.uint16}


def cases():
    """Name -> function of the seed: [decoder, *changes]; 'then': the decoder has the changes."""
    found, crop = {}, DECODERS["CropDecode"][0]
    for name, decoders in DECODERS.items():
        for k, make in enumerate(decoders):
            found[f"{name}_{k}"] = lambda seed, make=make: [make(seed)]
    for name, changes in CHANGES.items():
        for k, make in enumerate(changes):
            found[f"{name}_{k}"] = lambda seed, make=make: [crop(seed), *make(seed)]
            if all(isinstance(change, KeyedOperation) for change in make(0)):
                found[f"{name}_{k}_then"] = lambda seed, make=make: [crop(seed, then=make(seed))]
    return found


def set_epoch(operations, epoch):
    for operation in operations:
        if hasattr(operation, "set_epoch"):
            operation.set_epoch(epoch)


def test_no_operation_is_left_out():
    public = [getattr(ops, name) for name in ops.__all__]
    found = {x.__name__ for x in public if isinstance(x, type) and issubclass(x, Operation)}
    assert found == DECODERS.keys() | CHANGES.keys()
    assert len(found) == 12


# ---- one file for all ----------------------------------------------------------------------------

SIDES = [(1, 1), (1, 1000), (1000, 1), (5, 7), (23, 41), (24, 40), (300, 200), (90, 700), (131, 97)]
COUNT = 3 * len(SIDES) + 2


def write_images(path):
    """COUNT images, some smaller than the output, some of one pixel's width, raw and JPEG."""
    images = [ops_data.image(*SIDES[k % len(SIDES)], seed=k) for k in range(COUNT)]
    np.random.seed(2)  # FFCV draws here which images are stored raw
    return ops_data.write_file(path, images, mode="proportion", compress_probability=0.5)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = write_images(tmp_path_factory.mktemp("mixed") / "mixed.beton")
    assert {"jpg", "raw"} == set(BetonFile(path).modes[:9]) == set(BetonFile(path).modes)
    return path


@pytest.fixture(scope="module")
def stored(path):
    return Stored(BetonFile(path), np.arange(COUNT))


def bare(stored, operations, epoch):
    """A batch of all images, without FFCV."""
    set_epoch(operations, epoch)
    decoder, *changes = operations
    images_bhwc, changes = stored.decode(decoder), [*decoder.then, *changes]
    for operation in changes:
        if isinstance(operation, ops.Normalize):
            images_bhwc = operation.transform(images_bhwc)
        else:
            images_bhwc = operation.transform(images_bhwc, stored.samples_b)
    return images_bhwc


# ---- a stock Loader, in a process of its own -----------------------------------------------------

RUNS = [
    (1, 8),
    (2, 7),
    (4, COUNT),
]  # threads, batch size; the last batch of the first two is partial
EPOCHS = (0, 5)


def run_stock(path, out):
    """What stock Loaders give for all cases, by sample: arrays 'case/threads/epoch' in a .npz."""
    seen = {}
    for threads, batch in RUNS:
        pipelines = {name: make(SEED) for name, make in cases().items()}
        specs = {
            name: PipelineSpec("image", transforms=[*operations, ToTensor()])
            for name, operations in pipelines.items()
        }
        loader = Loader(
            path,
            batch_size=batch,
            num_workers=threads,
            order=OrderOption.RANDOM,
            seed=ORDER_SEED,
            drop_last=False,
            pipelines={"image": None, "label": None, **specs},
        )
        for epoch in EPOCHS:
            set_epoch(itertools.chain(*pipelines.values()), epoch)
            loader.next_epoch = epoch
            order = np.random.default_rng(ORDER_SEED + epoch).permutation(COUNT)
            batches = [[part.clone() for part in batch] for batch in loader]
            assert len(batches) == -(-COUNT // batch)
            for name, parts in zip(pipelines, zip(*batches, strict=True), strict=True):
                images = torch.cat([part.view(torch.uint8) for part in parts]).numpy()
                by_sample = np.empty_like(images)
                by_sample[order] = images
                seen[f"{name}/{threads}/{epoch}"] = by_sample
                seen[f"{name}/dtype"] = str(parts[0].dtype)
    assert "fast_imagenet.data.ffcv_loader" not in sys.modules
    np.savez(out, **seen)


@pytest.fixture(scope="module")
def stock(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("stock") / "seen.npz"
    code = f"from tests.ops.test_ops_in_loader import run_stock; run_stock({path!r}, {str(out)!r})"
    environment = {**os.environ, "NUMBA_NUM_THREADS": "4"}  # more than this machine may have
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(out)


@pytest.mark.parametrize("name", cases())
def test_stock_loader_gives_the_bytes_of_the_bare_operation(stock, stored, name):
    """For 1, 2, 4 threads, three batch sizes, in another process, in an epoch skipped to."""
    for epoch in EPOCHS:
        expected = bare(stored, cases()[name](SEED), epoch)
        assert expected.shape == (COUNT, *SIZE, 3)
        assert stock[f"{name}/dtype"] == str(torch.from_numpy(expected[:0]).dtype)
        for threads, _ in RUNS:
            seen = stock[f"{name}/{threads}/{epoch}"]
            np.testing.assert_array_equal(seen, expected.view(np.uint8), f"{threads}, {epoch}")


@pytest.mark.parametrize("name", cases())
def test_an_operation_does_something_and_goes_by_seed_and_epoch(stored, name):
    plain = bare(stored, cases()["CropDecode_0"](SEED), 0)
    first, again, later, other = (
        bare(stored, cases()[name](seed), epoch)
        for seed, epoch in ((SEED, 0), (SEED, 0), (SEED, 1), (SEED + 1, 0))
    )
    np.testing.assert_array_equal(first, again)
    assert np.isfinite(first.astype(np.float32)).all()
    if name.startswith("CropDecode"):
        plain = bare(stored, cases()["CenterCropDecode_0"](SEED), 0)
    changed = (first != plain).any((1, 2, 3))
    assert changed.mean() > 0.3  # images of a few colors may stay as they are
    if name.partition("_")[0] in FIXED - {"Normalize"}:
        np.testing.assert_array_equal(first, later)
        np.testing.assert_array_equal(first, other)
    else:
        assert (first != later).any((1, 2, 3)).mean() > 0.5
        assert (first != other).any((1, 2, 3)).mean() > 0.5


# ---- TrainLoader ---------------------------------------------------------------------------------

ALL = Augment(
    crop_area=(0.2, 1.0),
    policy="rand_augment_lite",
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.3,
    solarize=0.3,
    blur=0.3,
)
SIDE = 28


def test_every_stage_is_in_the_loader_test():
    off = [stage.name for stage in STAGES if not stage.wanted(ALL)]
    assert not off, f"switch on in ALL: {', '.join(off)}"


def train_loader(path, augment=ALL, **options):
    from fast_imagenet.data.ffcv_loader import TrainLoader

    options = dict(global_batch=8, seed=SEED, num_workers=1) | options
    return TrainLoader(path, augment=augment, **options)


def collected(batches):
    """(by sample, uint8 [COUNT, SIDE, SIDE, 3]; which samples came, in order)."""
    by_sample, order = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8), []
    for images_bhwc, _, samples_b in batches:
        by_sample[samples_b] = images_bhwc.numpy()
        order += samples_b.tolist()
    return by_sample, order


def bare_recipe(stored, augment, epoch):
    from fast_imagenet.data.ffcv_loader import image_operations

    decoder, *changes = operations = image_operations(augment, SIDE, SEED)
    set_epoch(operations, epoch)
    images_bhwc = stored.decode(decoder)
    for operation in changes:
        operation.transform(images_bhwc, stored.samples_b)
    return images_bhwc


@pytest.mark.parametrize("policy", POLICIES)
def test_train_loader_gives_the_bytes_of_the_bare_operations(path, stored, policy):
    augment = replace(ALL, policy=policy)
    expected, loader = bare_recipe(stored, augment, 4), train_loader(path, augment)
    assert [images.shape[1] for images, *_ in loader.epoch(0, SIDE - 8)] == [SIDE - 8] * 3
    seen, order = collected(loader.epoch(4, SIDE))
    assert len(order) == COUNT // 8 * 8
    np.testing.assert_array_equal(seen[order], expected[order])


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"global_batch": 5}, {"in_memory": False}])
def test_train_loader_does_not_care_how_it_is_cut(path, stored, options):
    if options.get("num_workers", 1) > len(os.sched_getaffinity(0)):
        pytest.skip("one core")
    expected = bare_recipe(stored, ALL, 2)
    seen, order = collected(train_loader(path, **options).epoch(2, SIDE))
    np.testing.assert_array_equal(seen[order], expected[order])


def test_ranks_and_a_resumed_epoch_see_the_images_of_one_whole_run(path):
    loader = train_loader(path)
    list(loader.epoch(0, SIDE))
    whole, order = collected(loader.epoch(1, SIDE))
    resumed, rest = collected(train_loader(path).epoch(1, SIDE, start_step=2))
    assert rest == order[16:]
    np.testing.assert_array_equal(resumed[rest], whole[rest])
    for rank in (0, 1):
        part, mine = collected(train_loader(path, rank=rank, world_size=2).epoch(1, SIDE))
        assert len(mine) == len(order) // 2
        np.testing.assert_array_equal(part[mine], whole[mine])


# ---- where an operation may stand ----------------------------------------------------------------


@pytest.mark.parametrize("name", CHANGES)
def test_after_to_tensor_it_is_refused_with_the_mend(name):
    operation = CHANGES[name][0](0)[-1]
    after = State(jit_mode=False, device=torch.device("cpu"), dtype=torch.uint8, shape=(*SIZE, 3))
    with pytest.raises(ValueError, match=f"{name} comes after ToTensor.*put it before"):
        operation.declare_state_and_memory(after)
    wrong = replace(after, jit_mode=True, dtype=np.dtype("i8"))
    with pytest.raises(ValueError, match=f"{name} was given int64 .*it takes uint8.*CropDecode"):
        operation.declare_state_and_memory(wrong)


def test_what_cannot_follow_in_one_visit_is_refused(path):
    cases = [
        (ops.Normalize(MEAN, STD), "then takes KeyedOperations; put Normalize behind the decoder"),
        (ops.RandomErasing(1, "pixel"), "mode is 'pixel' on uint8 images"),
    ]
    for operation, words in cases:
        pipelines = {"image": [ops.CropDecode(SIZE, then=[operation])], "label": None}
        with pytest.raises(ValueError, match=words):
            Loader(path, batch_size=8, num_workers=1, pipelines=pipelines)


def test_operations_of_a_decoder_count_its_epochs(path):
    changes = [ops.RandomGrayscale(seed=SEED), ops.GaussianBlur(seed=SEED)]
    decoders = [
        ops.CropDecode(SIZE, then=changes[:1]),
        ops.CenterCropDecode(SIZE, 1, then=changes[1:]),
    ]
    for decoder, change in zip(decoders, changes, strict=True):
        pipelines = {"image": [decoder, ToTensor()], "label": None}
        loader = Loader(path, batch_size=COUNT, num_workers=1, pipelines=pipelines)
        for _ in range(3):
            assert len(list(loader)) == 1
        assert change._epoch == decoder._epoch == 4  # one more when the loader is built
        decoder.set_epoch(9)
        assert len(list(loader)) == 1 and change._epoch == 9


def test_a_loader_refuses_a_wrong_order_at_once(path):
    decoder = ops.CropDecode(SIZE)
    wrong = [decoder, ToTensor(), ops.RandomGrayscale()]
    with pytest.raises(ValueError, match="RandomGrayscale comes after ToTensor"):
        Loader(path, batch_size=8, num_workers=1, pipelines={"image": wrong, "label": None})


# ---- statistics of the draws ---------------------------------------------------------------------

DRAWS = 4000
# Policies replace each other and so share their streams.
POLICY_OPS = {"RandAugment", "TrivialAugmentWide", "AutoAugment", "ThreeAugment"}


def drawn(seed, epoch, first=0):
    """(operation, choice) -> float64 [DRAWS]: all that every case's last operation draws."""
    samples, found = np.arange(first, first + DRAWS), {}
    for name, make in cases().items():
        kind, operation = name.partition("_")[0], make(seed)[-1]
        if kind in FIXED or name.endswith("then"):
            continue
        set_epoch([operation], epoch)
        if kind == "CropDecode":
            sides = np.full(DRAWS, 400), np.full(DRAWS, 500)
            arrays = (operation.draw(samples, *sides, SIZE),)
        else:
            arrays = operation.draw(samples, (160, 200))
        for a, array in enumerate(arrays):
            columns = np.asarray(array, np.float64).reshape(DRAWS, -1).T
            for c, column in enumerate(columns):
                if len(np.unique(column)) > 1 and not np.array_equal(column, samples):
                    found[name, f"{a}.{c}"] = column
    return found


def table_excess(x, y):
    """Chi-square of x against y in 5 x 5 groups, in its deviations above its mean."""
    groups = [np.searchsorted(np.unique(np.quantile(v, [0.2, 0.4, 0.6, 0.8])), v) for v in (x, y)]
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(groups), 1)
    counts = counts[counts.any(1)][:, counts.any(0)]
    expected = np.outer(counts.sum(1), counts.sum(0)) / len(x)
    freedom = max(1, (counts.shape[0] - 1) * (counts.shape[1] - 1))
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


LARGEST = 7.5  # deviations; of thousands of tables of independent numbers none comes near


def test_neighboring_samples_epochs_and_seeds_draw_independently():
    now, later, other = drawn(SEED, 3), drawn(SEED, 4), drawn(SEED + 1, 3)
    assert {name.partition("_")[0] for name, _ in now} == (DECODERS.keys() | CHANGES.keys()) - FIXED
    for key, column in now.items():
        pairs = {
            "next sample": (column[:-1], column[1:]),
            "next but one": (column[:-2], column[2:]),
            "next epoch": (column, later[key]),
            "next seed": (column, other[key]),
            "next sample, next epoch": (column[1:], later[key][:-1]),
        }
        excess = {what: table_excess(*pair) for what, pair in pairs.items()}
        assert max(excess.values()) < LARGEST, (key, excess)


def test_operations_draw_independently_of_each_other():
    columns, compared = drawn(SEED, 3), 0
    for (one, x), (two, y) in itertools.combinations(columns.items(), 2):
        kinds = {one[0].partition("_")[0], two[0].partition("_")[0]}
        if len(kinds) == 1 or kinds <= POLICY_OPS:
            continue
        assert table_excess(x, y) < LARGEST, (one, two)
        compared += 1
    assert compared > 100


def test_chances_are_the_stated_ones():
    for make, fraction in (
        (lambda: ops.RandomGrayscale(0.1, seed=SEED), 0.1),
        (lambda: ops.RandomSolarize(128, 0.3, seed=SEED), 0.3),
        (lambda: ops.GaussianBlur(p=0.6, seed=SEED), 0.6),
        (lambda: ops.ColorJitter(0.4, p=0.7, seed=SEED), 0.7),
        (lambda: ops.RandomErasing(0.25, seed=SEED), 0.25),
    ):
        operation, plain = make(), np.full((DRAWS, 12, 12, 3), 200, np.uint8)
        plain[:, ::2, 1::2] = (90, 30, 60)
        changed = (operation.transform(plain.copy(), np.arange(DRAWS)) != plain).any((1, 2, 3))
        spread = np.sqrt(fraction * (1 - fraction) / DRAWS)
        assert abs(changed.mean() - fraction) < 4 * spread, type(operation).__name__
    crops = ops.CropDecode(SIZE, flip=0.5, seed=SEED).draw(
        np.arange(DRAWS), np.full(DRAWS, 300), np.full(DRAWS, 300), SIZE
    )
    assert abs(crops[:, 4].mean() - 0.5) < 4 * np.sqrt(0.25 / DRAWS)
