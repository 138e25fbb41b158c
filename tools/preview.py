"""Look before you train: a PNG of what a config does to images.

    python -m tools.preview --config rn50_88_epochs_strong.yaml
    python -m tools.preview --config demo.yaml --epoch=9 --draws=6 --augment.blur=0.5

One row an image: as it is stored, with the crops of the next epochs drawn in; every stage of the
pipeline alone; the whole pipeline, epoch by epoch; and the views it is tested in. Epochs count
from 0, as start_ramp does: epoch 0 is the one that the log calls 1. The images come
out of the functions that a run calls and depend on (seed, epoch, sample) as there, so the column
"epoch 0" holds what the network gets in epoch 0. One thing differs: the partners of Mixup and
CutMix are images of the sheet, so that they can be recognised.

A front end like the two scripts: it takes the settings that train_imagenet.py declares and so runs
from the folder of that script. Nothing imports it.

Arrays: images_bhwc uint8 [b, h, w, 3], RGB; samples_b int64 [b], places in the data file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from fastargs import Param
from PIL import Image, ImageDraw, ImageFont

from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.config import Int, Str, extended, format_error, read_config
from fast_imagenet.data.augmentation import Augment
from fast_imagenet.data.sampler import epoch_order
from fast_imagenet.engine.schedules import resolution_at
from fast_imagenet.files import write_atomically
from fast_imagenet.terminal import ignore_broken_pipe
from fast_imagenet.validation import unwritable, validate

SEARCHED_EPOCHS = 200  # to find one in which a stage of small probability does something
# Settings of a run that a sheet does not need: what is wrong with them does not matter here.
UNUSED = ("data.val_dataset", "logging.folder", "model.checkpoint", "training.resume", "WORLD_SIZE")
UNUSED += ("RANK", "LOCAL_", "MASTER_PORT")

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


def read_settings(script, argv: list[str] | None = None):
    """The settings of a run and of the sheet; every mistake is told at once, exit status 2.

    Args:
        script: the module train_imagenet.
        argv: the words after the command; None takes `sys.argv[1:]`.
    """
    params = {
        "out": Param(Str(empty=False), "the image, a .png", default="preview.png"),
        "count": Param(Int(1, 32), "images, drawn with the seed", default=4),
        "draws": Param(Int(1, 16), "epochs of the whole pipeline", default=4),
        "epoch": Param(Int(0), "the first of them", default=0),
    }
    return read_config(
        extended(script.SETTINGS, "sheet", "what is shown, and where it goes", params),
        argv,
        search=script.CONFIG_FOLDERS,
        check=_problems,
        prog="-m tools.preview",
        description="Show what the settings of a run do to images, as a PNG.",
    )


def _problems(cfg) -> list[str]:
    mixing = cfg.augment.mixup > 0 or cfg.augment.cutmix > 0
    rules = [
        (
            not cfg.out.endswith(".png"),
            f"--out={cfg.out} does not end in .png: the sheet is a PNG",
        ),
        unwritable("--out", cfg.out),
        (
            Path(cfg.out).exists()
            and not (Path(cfg.out).is_file() and os.access(cfg.out, os.W_OK)),
            f"--out={cfg.out} is there and cannot be replaced: choose another name",
        ),
        (
            mixing and cfg.count % 2 != 0,
            f"--count={cfg.count}: augment.mixup and augment.cutmix pair images; choose an even "
            f"count",
        ),
        (
            cfg.data.backend != "ffcv",
            f"data.backend={cfg.data.backend}: the sheet shows the operations of the ffcv backend, "
            f"same recipe; add --data.backend=ffcv and a .beton file as --data.train_dataset",
        ),
    ]
    mine = [sentence for broken, sentence in rules if broken]
    return mine + [problem for problem in validate(cfg) if not problem.startswith(UNUSED)]


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


@dataclass
class Column:
    """One image a row, and what stands above and below them."""

    title: str
    detail: str
    images: list[np.ndarray]  # uint8 [h, w, 3]
    captions: list[str]
    color: tuple[int, int, int] | None = None  # of the crops that belong to it
    boxes: list[list[tuple]] = field(default_factory=list)  # an image: (top, left, height, width)


class Stored:
    """Some samples of a data file, ready for the decoders of fast_imagenet.ops."""

    def __init__(self, file: BetonFile, samples_b: np.ndarray) -> None:
        self.path, self.samples_b = file.path, samples_b
        self.originals = [file.image(index) for index in samples_b]  # refuses damaged ones
        self.heights, self.widths = file.heights[samples_b], file.widths[samples_b]
        self._bytes = [_padded(file.read(index)[0]) for index in samples_b]
        raw = file.modes[samples_b] == "raw"
        places = [stored.ctypes.data for stored in self._bytes]
        columns = (places, file.sizes[samples_b], raw, self.heights, self.widths)
        self._located = np.stack([np.asarray(column, np.int64) for column in columns], axis=1)

    def crops(self, decoder) -> np.ndarray:
        """int64 [b, 5]: top, left, height, width, mirrored."""
        return decoder.draw(self.samples_b, self.heights, self.widths, decoder.output_size)

    def decode(self, decoder) -> np.ndarray:
        """images_bhwc of the decoder's output_size."""
        images_bhwc = np.empty((len(self.samples_b), *decoder.output_size, 3), np.uint8)
        status = decoder.apply(self._located, self.crops(decoder), images_bhwc)
        if status.any():
            index = self.samples_b[np.flatnonzero(status)[0]]
            raise ValueError(f"{self.path}: sample {index} cannot be decoded; write the file again")
        return images_bhwc


def _padded(stored: bytes | np.ndarray) -> np.ndarray:
    """The bytes with room behind them: the kernels look a little beyond the end."""
    flat = np.frombuffer(stored, np.uint8) if isinstance(stored, bytes) else stored.reshape(-1)
    return np.concatenate([flat, np.zeros(64, np.uint8)])


class Pipeline:
    """The operations of a run at any epoch, together and each alone.

    Args:
        stored: the images.
        augment: the recipe.
        sizes: epoch -> side in pixels.
        seed: of the run.
        mean, std: of the three channels, for pixels in 0..1.
    """

    def __init__(self, stored: Stored, augment: Augment, sizes, seed: int, mean, std) -> None:
        from fast_imagenet.data.ffcv_loader import image_operations

        self.stored, self.augment, self.sizes = stored, augment, sizes
        self.decoder, *self.operations = image_operations(augment, sizes(0), seed)
        self._mean, self._std, self._seed = np.float32(mean), np.float32(std), seed

    def crops(self, epoch: int) -> np.ndarray:
        """int64 [b, 5]: top, left, height, width, mirrored."""
        self.decoder.set_epoch(epoch)
        self.decoder.output_size = self.sizes(epoch)
        return self.stored.crops(self.decoder)

    def crop(self, epoch: int) -> np.ndarray:
        """images_bhwc after the first operation."""
        self.decoder.set_epoch(epoch)
        self.decoder.output_size = self.sizes(epoch)
        return self.stored.decode(self.decoder)

    def change(self, operation, images_bhwc: np.ndarray, epoch: int) -> np.ndarray:
        """A copy after one of `operations`."""
        operation.set_epoch(epoch)
        return operation.transform(images_bhwc.copy(), self.stored.samples_b)

    def batch(self, images_bhwc: np.ndarray, epoch: int, augment: Augment | None = None):
        """What happens on the device: (images_bhwc back in 0..255, targets_bb).

        targets_bb [b, b]: shares of the sheet's images in each result.
        """
        import torch

        from fast_imagenet.data.device_transforms import BatchTransforms

        count = len(images_bhwc)
        prepare = BatchTransforms(
            augment or self.augment, tuple(self._mean), tuple(self._std), count, 0.0, self._seed
        )
        images_bchw, targets = prepare(
            torch.from_numpy(images_bhwc),
            torch.arange(count),
            self.stored.samples_b,
            epoch,
            epoch,  # for want of a step: the images of a sheet are no batch of the run
        )
        if targets.ndim == 1:
            targets = torch.eye(count)
        pixels = images_bchw.float().permute(0, 2, 3, 1).numpy() * self._std + self._mean
        return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8), targets.numpy()

    def whole(self, epoch: int):
        """What the network gets in an epoch: (images_bhwc, targets_bb)."""
        images_bhwc = self.crop(epoch)
        for operation in self.operations:
            images_bhwc = self.change(operation, images_bhwc, epoch)
        return self.batch(images_bhwc, epoch)


# ------------------------------------------------------------------------------------------------
# Columns
# ------------------------------------------------------------------------------------------------

# Of Okabe and Ito: told apart by everybody, on dark and light images.
COLORS = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
]


def stored_column(p: Pipeline, epochs: range, names: list[str]) -> Column:
    """The images as they are, with the crops of some epochs."""
    boxes = [[] for _ in names]
    for epoch in epochs:
        for picture, crop in zip(boxes, p.crops(epoch), strict=True):
            picture.append(tuple(int(side) for side in crop[:4]))
    sizes = [f"{image.shape[1]} x {image.shape[0]}" for image in p.stored.originals]
    captions = [
        f"#{sample}  {name}\n{size} px"
        for sample, name, size in zip(p.stored.samples_b, names, sizes, strict=True)
    ]
    detail = "frames: the crops of the epochs on the right"
    return Column("As stored", detail, p.stored.originals, captions, boxes=boxes)


def stage_columns(p: Pipeline, epoch: int) -> Iterator[Column]:
    """Each stage alone, on the central square; an image in the first epoch that changes it."""
    from fast_imagenet.data.ffcv_loader import RESIZE
    from fast_imagenet.ops import CenterCropDecode

    crops = p.crop(epoch)
    yield Column(*_words(p.decoder, p.augment), list(crops), [f"epoch {epoch}"] * len(crops))
    plain = p.stored.decode(CenterCropDecode(p.sizes(epoch), 1.0, method=RESIZE))
    for operation in p.operations:

        def alone(epoch, operation=operation):
            return p.change(operation, plain, epoch)

        yield Column(*_words(operation, p.augment), *first_changes(alone, plain, epoch))
    a = p.augment
    if a.erasing:
        only = replace(a, mixup=0.0, cutmix=0.0)
        title, detail = "Erasing", f"{a.erasing:.0%} of images, {_FILLS[a.erasing_mode]}"
        detail += f", up to {a.erasing_count} boxes" if a.erasing_count > 1 else ""
        changes = first_changes(lambda epoch: p.batch(plain, epoch, only)[0], plain, epoch)
        yield Column(title, detail, *changes)
    if a.mixup or a.cutmix:
        images_bhwc, targets_bb = p.batch(plain, epoch, replace(a, erasing=0.0))
        kinds = {"Mixup": a.mixup, "CutMix": a.cutmix}
        title = " or ".join(kind for kind, alpha in kinds.items() if alpha)
        detail = ", ".join(f"{kind} alpha {alpha:g}" for kind, alpha in kinds.items() if alpha)
        yield Column(title, detail, list(images_bhwc), _shares(targets_bb, p.stored.samples_b))


def first_changes(
    change: Callable[[int], np.ndarray], plain: np.ndarray, epoch: int
) -> tuple[list[np.ndarray], list[str]]:
    """Each image in the first epoch, from `epoch` on, that changes it; and captions saying so."""
    images = list(plain)
    captions = [f"unchanged in {SEARCHED_EPOCHS} epochs"] * len(plain)
    waiting = set(range(len(plain)))
    for tried in range(epoch, epoch + SEARCHED_EPOCHS):
        if not waiting:
            break
        changed = change(tried)
        for b in [b for b in waiting if (changed[b] != plain[b]).any()]:
            images[b], captions[b] = changed[b], f"epoch {tried}"
            waiting.remove(b)
    return images, captions


def whole_columns(p: Pipeline, epochs: range) -> Iterator[Column]:
    """All stages after each other, as the network gets them, one column an epoch."""
    for k, epoch in enumerate(epochs):
        images_bhwc, targets_bb = p.whole(epoch)
        crops = p.crops(epoch)
        area = crops[:, 2] * crops[:, 3] / (p.stored.heights * p.stored.widths)
        captions = _shares(targets_bb, p.stored.samples_b)
        for b, crop in enumerate(crops):
            text = f"crop {area[b]:.0%}" + (", mirrored" if crop[4] else "")
            captions[b] = "\n".join(filter(None, (text, captions[b])))
        yield Column(
            f"Epoch {epoch}",
            f"{p.sizes(epoch)} px",
            list(images_bhwc),
            captions,
            COLORS[k % len(COLORS)],
        )


def validation_columns(stored: Stored, validation) -> Iterator[Column]:
    """The central crops of both protocols."""
    from fast_imagenet.data.ffcv_loader import RESIZE
    from fast_imagenet.ops import CenterCropDecode

    v = validation
    plain, configured = (v.plain_resolution, v.plain_crop_ratio), (v.resolution, v.crop_ratio)
    views = {plain: "Plain", configured: "Configured"}
    if plain == configured:
        views = {plain: "Both protocols"}
    for (side, ratio), title in views.items():
        images_bhwc = stored.decode(CenterCropDecode(side, ratio, method=RESIZE))
        mirrored = v.lr_tta and title != "Plain"
        detail = f"{side} px, crop {ratio:.4g}" + (", and mirrored" if mirrored else "")
        yield Column(title, detail, list(images_bhwc), [""] * len(images_bhwc))


def _shares(targets_bb: np.ndarray, samples_b: np.ndarray) -> list[str]:
    """'0.83 + 0.17 of #5' for mixed images, '' for the others."""
    texts = []
    for b, row in enumerate(targets_bb):
        others = [k for k in np.flatnonzero(row > 5e-4) if k != b]
        more = "".join(f" + {row[k]:.2f} of #{samples_b[k]}" for k in others)
        texts.append(f"{row[b]:.2f}{more}" if more else "")
    return texts


_FILLS = {"const": "mean colour", "rand": "one noise colour", "pixel": "noise"}
_POLICIES = {
    "rand_augment_lite": "RandAugment lite",
    "rand_augment": "RandAugment",
    "rand_augment_timm": "RandAugment timm",
    "trivial_augment": "TrivialAugmentWide",
    "auto_augment": "AutoAugment",
    "three_augment": "3-Augment",
}


def _words(operation, a: Augment) -> tuple[str, str]:
    """Title and detail of an operation."""
    kind = type(operation).__name__
    jitter = ("brightness", "contrast", "saturation", "hue")
    noise = f"±{a.policy_mstd:g}" if a.policy_mstd else ""
    strength = f"{a.policy_ops} operations, magnitude {a.policy_magnitude:g}{noise}"
    words = {
        "CropDecode": (
            "Crop and flip",
            f"{a.crop_area[0]:.3g} to {a.crop_area[1]:.3g} of the area, flip {a.flip:.0%}",
        ),
        "ColorJitter": (
            "Colour jitter",
            ", ".join(f"{name} {getattr(a, name):g}" for name in jitter if getattr(a, name)),
        ),
        "RandomGrayscale": ("Grayscale", f"{a.grayscale:.0%} of images"),
        "RandomSolarize": ("Solarize", f"{a.solarize:.0%} of images, threshold 128"),
        "GaussianBlur": ("Blur", f"{a.blur:.0%} of images, radius 0.1 to 2 px"),
    }
    policy = (_POLICIES.get(a.policy, kind), strength if "rand" in a.policy else "")
    return words.get(kind, policy)


# ------------------------------------------------------------------------------------------------
# Drawing
# ------------------------------------------------------------------------------------------------

LEGEND = (
    "Alone, a stage is shown on the central square, in the first epoch in which it changes the "
    "image. "
)
MIXED = "0.83 + 0.17 of #5: shares of the image and of its partner, in pixels and in label."
PAPER, INK, MUTED, RULE = (252, 252, 250), (28, 30, 36), (112, 116, 126), (214, 214, 210)
MARGIN, GAP, GROUP_GAP, ROW_GAP = 32, 10, 34, 14
SMALLEST_CELL, LARGEST_CELL = 160, 256
TITLE, GROUP, NAME, TEXT = 26, 13, 16, 13  # sizes of letters, px
LINE = 17  # height of a line of TEXT


def cell_side(size: int) -> int:
    """Side at which images of `size` px are shown, a whole multiple where it is enlarged."""
    return min(LARGEST_CELL, size * max(1, -(-SMALLEST_CELL // size)))


def draw_sheet(
    title: str, subtitle: str, groups: dict[str, list[Column]], side: int
) -> Image.Image:
    """Groups of columns on paper.

    Args:
        groups: heading -> columns, all of them with as many images.
        side: of a cell, px.
    """
    columns = [column for group in groups.values() for column in group]
    details = [_wrap(column.detail, side) for column in columns]
    lines = max(caption.count("\n") + 1 for column in columns for caption in column.captions)
    top = MARGIN + 96
    first_row = top + 30 + NAME + 10 + LINE * max(map(len, details)) + 6
    row = side + LINE * lines + ROW_GAP
    width = 2 * MARGIN + len(columns) * (side + GAP) - GAP + (len(groups) - 1) * (GROUP_GAP - GAP)
    width, bottom = max(width, 720), first_row + row * len(columns[0].images) + ROW_GAP
    mixes = any(" of #" in caption for column in columns for caption in column.captions)
    legend = _wrap(LEGEND + MIXED * mixes, width - 2 * MARGIN)
    sheet = Image.new("RGB", (width, bottom + LINE * len(legend) + MARGIN - 6), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, bottom), "\n".join(legend), MUTED, _font(TEXT), spacing=LINE - TEXT)
    pen.text((MARGIN, MARGIN - 6), title, INK, _font(TITLE))
    pen.text((MARGIN, MARGIN + 32), subtitle, MUTED, _font(TEXT + 1))
    x, wrapped = MARGIN, iter(details)
    for heading, group in groups.items():
        right = x + len(group) * (side + GAP) - GAP
        pen.text((x, top - 22), heading.upper(), MUTED, _font(GROUP))
        pen.line([(x, top), (right, top)], RULE, 2)
        for column in group:
            _draw_column(sheet, column, next(wrapped), (x, top + 14), first_row, row, side)
            x += side + GAP
        x += GROUP_GAP - GAP
    return sheet


def _draw_column(sheet, column: Column, detail, corner, first_row: int, row: int, side: int):
    pen, (x, y) = ImageDraw.Draw(sheet), corner
    if column.color:
        pen.rectangle([x, y + 2, x + 11, y + 13], column.color)
    pen.text((x + 18 * bool(column.color), y - 2), column.title, INK, _font(NAME))
    for k, line in enumerate(detail):
        pen.text((x, y + NAME + 8 + LINE * k), line, MUTED, _font(TEXT))
    for b, image in enumerate(column.images):
        cell = _fit(image, column.boxes[b] if column.boxes else None, side)
        bottom = first_row + row * b + side
        sheet.paste(cell, (x, bottom - cell.height))
        for k, line in enumerate(column.captions[b].split("\n")):
            text = _cut(line, side)
            pen.text((x, bottom + 4 + LINE * k), text, MUTED if k else INK, _font(TEXT))


def _fit(image_hwc: np.ndarray, boxes: list[tuple] | None, side: int) -> Image.Image:
    """An image in a cell, with frames. Without (None) it is what a network gets, and is enlarged
    by whole multiples, so that its pixels can be seen."""
    height, width = image_hwc.shape[:2]
    scale = side / max(height, width)
    pixels_show = boxes is None and scale >= 1
    scale = int(scale) if pixels_show else scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if pixels_show else Image.Resampling.LANCZOS
    cell = Image.fromarray(image_hwc).resize(size, method)
    pen, x_scale, y_scale = ImageDraw.Draw(cell), size[0] / width, size[1] / height
    for k, (top, left, tall, wide) in enumerate(boxes or []):
        ends = (left * x_scale, top * y_scale, (left + wide) * x_scale, (top + tall) * y_scale)
        low_x, low_y, high_x, high_y = map(round, ends)
        corners = [low_x, low_y, max(low_x, high_x - 1), max(low_y, high_y - 1)]
        pen.rectangle(corners, outline=COLORS[k % len(COLORS)], width=2)
    return cell


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # comes with Pillow: the same letters everywhere


def _wrap(text: str, side: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font(TEXT).getlength(longer) <= side or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _cut(text: str, side: int) -> str:
    """The text, shortened with an ellipsis where it is wider than a cell."""
    if _font(TEXT).getlength(text) <= side:
        return text
    while text and _font(TEXT).getlength(f"{text}...") > side:
        text = text[:-1]
    return f"{text.rstrip()}..."


# ------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------


def make_sheet(cfg, script) -> Image.Image:
    """The sheet of a config. `script`: the module train_imagenet."""
    file = BetonFile(cfg.data.train_dataset)
    if cfg.count > file.num_samples:
        raise ValueError(
            f"--count={cfg.count}, but {file.path} holds {file.num_samples} images: lower it"
        )
    samples_b = epoch_order(file.num_samples, cfg.training.seed, 0)[: cfg.count]
    labels = file.labels[samples_b]
    known = file.sidecar.get("class_names") or file.classes
    names = [known[label] if known else f"class {label}" for label in labels]

    def sizes(epoch):
        return resolution_at(epoch, **vars(cfg.resolution))

    stored = Stored(file, samples_b)
    augment, epochs = script.augment_of(cfg), range(cfg.epoch, cfg.epoch + cfg.draws)
    pipeline = Pipeline(stored, augment, sizes, cfg.training.seed, script.MEAN, script.STD)
    groups = {
        "In the file": [stored_column(pipeline, epochs, names)],
        "Each stage alone": list(stage_columns(pipeline, cfg.epoch)),
        "What the network gets": list(whole_columns(pipeline, epochs)),
        "What it is tested on": list(validation_columns(stored, cfg.validation)),
    }
    title = f"{Path(cfg.logging.folder).name}: what the network sees"
    subtitle = (
        f"{cfg.data.train_dataset}, {file.num_samples:,} images; seed {cfg.training.seed}; "
        f"{sizes(cfg.epoch)} px in epoch {cfg.epoch}"
    )
    return draw_sheet(title, subtitle, groups, cell_side(sizes(cfg.epoch)))


def main(argv: list[str] | None = None) -> None:
    """Read the settings, write the sheet, say where it is."""
    import train_imagenet as script

    cfg = read_settings(script, argv)
    try:
        sheet = make_sheet(cfg, script)
        write_atomically(cfg.out, lambda file: sheet.save(file, format="PNG"))
    except (ValueError, OSError) as error:
        sys.exit(f"preview: {format_error(error)}")
    print(f"{cfg.out}: {sheet.width} x {sheet.height} px")


if __name__ == "__main__":
    ignore_broken_pipe()
    main()
