"""python -m tools.preview: the sheet shows what the run gets, with captions."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import train_imagenet
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.data.augmentation import POLICIES, Augment
from fast_imagenet.data.ffcv_loader import TrainLoader
from tests import reference
from tests.conftest import ROOT
from tools import preview

SIDE = 32
EVERYTHING = Augment(
    policy="rand_augment_lite",
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    grayscale=0.1,
    solarize=0.1,
    blur=0.1,
    erasing=0.25,
    mixup=0.2,
    cutmix=1.0,
)


@pytest.fixture
def arguments(tiny_beton, tmp_path):
    """A config, a data file and a place for the sheet."""
    return [
        "--config=demo.yaml",
        f"--data.train_dataset={tiny_beton / 'train.beton'}",
        "--data.val_dataset=nowhere.beton",
        f"--out={tmp_path / 'sheet.png'}",
    ]


def pipeline(tiny_beton, augment, samples=(3, 1, 4, 15), seed=5):
    stored = preview.Stored(BetonFile(tiny_beton / "train.beton"), np.array(samples))
    sizes = lambda epoch: SIDE + 32 * (epoch > 2)  # noqa: E731
    norm = (train_imagenet.MEAN, train_imagenet.STD)
    return preview.Pipeline(stored, augment, sizes, seed, norm)


# ---- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["none", "rand_augment_lite"])
def test_an_epoch_of_the_sheet_holds_the_pixels_of_the_run(tiny_beton, policy):
    augment = replace(EVERYTHING, policy=policy, erasing=0.0, mixup=0.0, cutmix=0.0)
    loader = TrainLoader(
        tiny_beton / "train.beton", global_batch=16, seed=5, num_workers=1, augment=augment
    )
    for epoch, side in ((0, SIDE), (3, SIDE + 32)):
        images_bhwc, _, samples_b = next(loader.epoch(epoch, side))
        shown, fractions = pipeline(tiny_beton, augment, samples_b[::-1]).whole(epoch)
        np.testing.assert_array_equal(shown, images_bhwc.numpy()[::-1])
        np.testing.assert_array_equal(fractions, np.eye(16))


def test_the_part_of_the_device_is_shown_as_pixels(tiny_beton):
    p = pipeline(tiny_beton, replace(EVERYTHING, erasing=1.0, mixup=0.0, cutmix=0.0))
    plain = np.full((4, SIDE, SIDE, 3), 7, np.uint8)
    erased, _ = p.batch(plain, 0)
    mean_color = np.rint(np.multiply(train_imagenet.MEAN, 255)).astype(int).tolist()
    for image in erased:  # some pixels are erased and some are not
        assert np.unique(image.reshape(-1, 3), axis=0).tolist() == [[7, 7, 7], mean_color]


def test_fractions_of_mixed_images_are_those_of_their_pixels(tiny_beton):
    p = pipeline(tiny_beton, Augment(mixup=1.0))
    plain = np.zeros((4, 8, 8, 3), np.uint8)
    plain[::2] = 200
    mixed, fractions = p.batch(plain, 3)
    assert 0.02 < fractions[0, 0] < 0.98 and fractions[0, 1] == pytest.approx(1 - fractions[0, 0])
    np.testing.assert_allclose(mixed[:, 0, 0, 0], 200 * fractions[:, ::2].sum(1), atol=0.51)
    texts = preview._mix_captions(fractions, p.stored.samples_b)
    partner = p.stored.samples_b[1]
    assert texts[0] == f"{fractions[0, 0]:.2f} + {fractions[0, 1]:.2f} of #{partner}"
    assert preview._mix_captions(np.eye(2), np.array([8, 9])) == ["", ""]


def test_every_stage_has_a_column_with_words_of_its_own(tiny_beton):
    titles = set()
    for policy in list(POLICIES)[1:]:
        columns = list(
            preview.stage_columns(pipeline(tiny_beton, replace(EVERYTHING, policy=policy)), 0)
        )
        assert len({column.title for column in columns}) == len(columns) == 8
        titles |= {column.title for column in columns}
        for column in columns:
            assert len(column.images) == len(column.captions) == 4
            assert {image.shape for image in column.images} == {(SIDE, SIDE, 3)}
    assert len(titles) == 7 + len(POLICIES) - 1
    assert [c.title for c in preview.stage_columns(pipeline(tiny_beton, Augment()), 0)] == [
        "Crop and flip"
    ]


def test_a_rare_stage_is_shown_in_the_first_epoch_that_does_something():
    plain = np.zeros((3, 2, 2, 3), np.uint8)

    def change(epoch):  # image b changes in epochs 10 + b, 20 + b; the last never
        return plain + np.array([epoch in (10, 20), epoch in (11, 21), False])[
            :, None, None, None
        ] * np.uint8(epoch)

    images, captions = preview.first_changes(change, plain, 9)
    assert captions == ["epoch 10", "epoch 11", f"unchanged in {preview.SEARCHED_EPOCHS} epochs"]
    assert [int(image.max()) for image in images] == [10, 11, 0]
    assert preview.first_changes(change, plain, 11)[1][:2] == ["epoch 20", "epoch 11"]


def test_frames_lie_around_the_crops_of_the_loader(tiny_beton):
    p = pipeline(tiny_beton, Augment(flip=0.0))
    p.decoder.reduced_decode = False  # other pixels than Pillow's decoder
    column = preview.stored_column(p, range(2), list("abcd"))
    for epoch in range(2):
        crops = p.crop(epoch)
        for b, (image, boxes) in enumerate(zip(column.images, column.boxes, strict=True)):
            top, left, height, width = boxes[epoch]
            crop = (top, left, height, width, 0)
            small = reference.crop_resize(np.asarray(image), crop, (SIDE, SIDE), "area")
            assert np.abs(small.astype(int) - crops[b]).max() <= 1


# ---- drawing -------------------------------------------------------------------------------------


def test_images_of_a_network_keep_their_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    side = preview.cell_size(SIDE)
    assert side == 160
    cell = np.asarray(preview._fit(image, None, side))
    np.testing.assert_array_equal(cell, image.repeat(5, 0).repeat(5, 1))
    assert [preview.cell_size(size) for size in (16, 100, 160, 224, 600)] == [
        160,
        200,
        160,
        224,
        256,
    ]
    assert preview._fit(image[:, :7], [], 200).size == (44, 200)  # as stored: fills the cell
    assert preview._fit(rng.integers(0, 256, (1, 1000, 3), np.uint8), [], 160).size == (160, 1)


def test_a_frame_is_drawn_where_its_crop_lies():
    cell = np.asarray(preview._fit(np.zeros((80, 160, 3), np.uint8), [(10, 20, 30, 40)], 320))
    rows, columns = np.flatnonzero(cell.any((1, 2))), np.flatnonzero(cell.any((0, 2)))
    assert (rows[0], rows[-1]) == (20, 79) and (columns[0], columns[-1]) == (40, 119)
    assert (cell[20, 60] == preview.COLORS[0]).all() and not cell[50, 80].any()


def test_a_sheet_has_a_cell_for_every_image():
    greys = [[np.full((20, 20, 3), 10 * c + r, np.uint8) for r in range(3)] for c in range(1, 5)]
    columns = [preview.Column("A title", "some words " * 9, column, ["x"] * 3) for column in greys]
    sheet = preview.draw_sheet("t", "s", {"one": columns[:1], "two": columns[1:]}, 100)
    pixels = np.asarray(sheet)
    for column in greys:
        for image in column:
            assert (pixels == image[0, 0]).all(2).sum() >= 100 * 100
    assert preview._cut("a very long caption, too long", 80).endswith("...")
    assert all(
        preview._font(preview.TEXT).getlength(line) <= 100
        for line in preview._wrap("some words " * 9, 100)
    )


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_writes_a_sheet(arguments, tmp_path, capsys):
    flags = [
        "--count=2",
        "--draws=3",
        "--epoch=7",
        "--augment.mixup=0.2",
        "--resolution.max_res=96",
    ]
    preview.main([*arguments, *flags, "--resolution.start_ramp=8", "--resolution.end_ramp=9"])
    printed = capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as image:
        assert printed == f"{tmp_path / 'sheet.png'}: {image.width} x {image.height} px\n"
        assert image.format == "PNG" and image.mode == "RGB"
        first = image.tobytes()
    preview.main([*arguments, *flags, "--resolution.start_ramp=8", "--resolution.end_ramp=9"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.tobytes() == first


def test_help_lists_its_own_settings_and_those_of_the_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        preview.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    for name in ("--out", "--count", "--draws", "--epoch", "--augment.policy", "--training.seed"):
        assert f"  {name} " in text
    assert ("out",) not in train_imagenet.SETTINGS.entries


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data.train_dataset=no.beton"], "data.train_dataset=no.beton does not exist"),
        (["--config=none.yaml"], "none.yaml"),
        (
            ["--augment.polcy=none"],
            "'--augment.polcy=none' is not a setting; did you mean augment.policy",
        ),
        (["--augment.erasing=2"], "augment.erasing = '2': must be a number from 0 to 1"),
        (["--out=sheet.jpg"], "--out=sheet.jpg does not end in .png"),
        (["--out=no/such/folder/x.png"], "is not a folder that can be written to"),
        (["--count=3", "--augment.cutmix=1"], "--count=3: augment.mixup and augment.cutmix pair"),
        (["--count=0"], "must be a whole number from 1 to 32"),
        (["--data.backend=torchvision"], "add --data.backend=ffcv"),
    ],
)
def test_a_wrong_setting_is_reported_with_the_fix(arguments, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stopped:
        preview.main([*arguments, *flags])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in printed and "1 problem in the settings" in printed


def test_a_place_that_cannot_be_replaced_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "sheet.png").mkdir()
    with pytest.raises(SystemExit) as stopped:
        preview.main(arguments)
    assert stopped.value.code == 2
    assert "exists and cannot be replaced" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [5000, 100])
def test_a_damaged_file_is_one_sentence(arguments, tiny_beton, tmp_path, cut):
    damaged = tmp_path / "damaged.beton"
    damaged.write_bytes((tiny_beton / "train.beton").read_bytes()[:-cut])
    with pytest.raises(ValueError, match="damaged.beton.*write it again"):
        preview.main([*arguments, f"--data.train_dataset={damaged}"])


def test_more_images_than_there_are(arguments, tiny_beton, tmp_path):
    shutil.copy(tiny_beton / "train.beton", tmp_path / "train.beton")
    few = [f"--data.train_dataset={tmp_path / 'train.beton'}"]
    limited = BetonFile(tmp_path / "train.beton").num_samples
    assert limited > 32  # so this cannot be asked for; the file is made smaller instead
    command = [sys.executable, "write_dataset.py", "--source.kind=synthetic", "--write.limit=10"]
    command += ["--source.split=train", f"--write.folder={tmp_path / 'few'}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    few = [f"--data.train_dataset={tmp_path / 'few' / 'train.beton'}", "--count=12"]
    with pytest.raises(ValueError, match="--count=12, but .* holds 10 images: lower it"):
        preview.main([*arguments, *few])


@pytest.mark.parametrize("config", ["rn50_88_epochs_strong.yaml", "rn50_300_epochs.yaml"])
def test_a_sheet_of_photographs(photos, config, tmp_path):
    folder = tmp_path / "photos"
    for split in ("train", "val"):
        for k, path in enumerate(sorted((photos / "imagenet_samples").iterdir())[::40]):
            (folder / split / f"class{k}").mkdir(parents=True)
            shutil.copy(path, folder / split / f"class{k}")
    command = [sys.executable, "write_dataset.py", "--source.kind=image_folder"]
    command += [f"--source.path={folder}", f"--write.folder={tmp_path}", "--source.split=train"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    data = f"--data.train_dataset={tmp_path / 'train.beton'}"
    preview.main([f"--config={config}", data, f"--out={tmp_path / 'sheet.png'}"])
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width > 1500
