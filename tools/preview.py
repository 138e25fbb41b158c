"""Look before you train: a PNG of what a config does to images.

    python -m tools.preview --config rn50_88_epochs_strong.yaml
    python -m tools.preview --config demo.yaml --epoch=9 --draws=6 --augment.blur=0.5

One row per image: as it is stored, with the crops of the next epochs drawn in; every stage of the
pipeline alone; the whole pipeline, epoch by epoch; and the views of the evaluation. Epochs count
from 0, as start_ramp does: epoch 0 is the log's epoch 1. The images come out of the functions that
a run calls and depend on (seed, epoch, sample) as there, so the column "epoch 0" holds what the
network gets in epoch 0. One thing differs: Mixup and CutMix pair the images of the sheet, so that
the partners can be recognized.

Arrays: images_bhwc uint8 [b, h, w, 3], RGB; samples_b int64 [b], places in the data file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from fastargs import Param
from PIL import Image, ImageDraw, ImageFont

from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.config import Int, Str, extended, read_config
from fast_imagenet.data.augmentation import Augment, crop_caption, stages_of
from fast_imagenet.data.class_lists import class_name
from fast_imagenet.data.sampler import epoch_order
from fast_imagenet.engine.schedules import resolution_at
from fast_imagenet.files import write_atomically
from fast_imagenet.program import run_program
from fast_imagenet.terminal import announce
from fast_imagenet.validation import unwritable, validate

SEARCHED_EPOCHS = 200  # to find one in which a stage of small probability does something
# Settings of a run that a sheet does not need: what is wrong with them does not matter here.
UNUSED = ("data.val_dataset", "logging.folder", "model.checkpoint", "training.resume", "WORLD_SIZE")
UNUSED += ("RANK", "LOCAL_", "MASTER_PORT")
# Of Okabe and Ito: distinct for color-blind readers, on dark and light images.
COLORS = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167)]
COLORS += [(213, 94, 0), (0, 114, 178)]
FILLS = {"const": "mean color", "rand": "one noise color", "pixel": "noise"}
Box = tuple[int, int, int, int]  # top, left, height, width
Norm = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of pixels in 0..1
LEGEND = "A stage alone: on the center crop, in the first epoch in which it changes the image. "
MIXED = "0.83 + 0.17 of #5: fractions of the image and of its partner, in pixels and in label."
PAPER, INK, MUTED, RULE = (252, 252, 250), (28, 30, 36), (112, 116, 126), (214, 214, 210)
MARGIN, GAP, GROUP_GAP, ROW_GAP = 32, 10, 34, 14
SMALLEST_CELL, LARGEST_CELL = 160, 256
TITLE, GROUP, NAME, TEXT = 26, 13, 16, 13  # sizes of letters, px
LINE = 17  # height of a line of TEXT


def read_settings(script: ModuleType, argv: list[str] | None = None) -> SimpleNamespace:
    """The settings of a run and of the sheet; every mistake is reported at once, exit status 2."""
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


def _problems(cfg: SimpleNamespace) -> list[str]:
    out, backend = Path(cfg.out), cfg.data.backend
    replaceable = not out.exists() or (out.is_file() and os.access(out, os.W_OK))
    unpaired = cfg.count % 2 != 0 and (cfg.augment.mixup > 0 or cfg.augment.cutmix > 0)
    not_png = f"--out={out} does not end in .png: the sheet is a PNG"
    not_replaceable = f"--out={out} exists and cannot be replaced: choose another name"
    odd = f"--count={cfg.count}: augment.mixup and augment.cutmix pair images; choose an even count"
    not_ours = f"data.backend={backend}: the sheet shows the operations of the ffcv backend, same "
    not_ours += "recipe; add --data.backend=ffcv and a .beton file as --data.train_dataset"
    rules = [(not cfg.out.endswith(".png"), not_png)]
    rules += [(not replaceable, not_replaceable), (unpaired, odd), (backend != "ffcv", not_ours)]
    own = [sentence for broken, sentence in rules if broken] + unwritable("--out", cfg.out)
    return own + [problem for problem in validate(cfg) if not problem.startswith(UNUSED)]


@dataclass
class Column:
    """One image per row, the text above them and below each."""

    title: str
    detail: str
    images: list[np.ndarray]  # uint8 [h, w, 3]
    captions: list[str]
    color: tuple[int, int, int] | None = None  # of the crops that belong to it
    boxes: list[list[Box]] = field(default_factory=list)  # per image


class Stored:
    """Some samples of a data file, ready for the decoders of fast_imagenet.ops."""

    def __init__(self, file: BetonFile, samples_b: np.ndarray, resize: str = "auto") -> None:
        self.path, self.samples_b, self.resize = file.path, samples_b, resize
        self.originals = [file.image(index) for index in samples_b]  # refuses damaged ones
        self.heights, self.widths = file.heights[samples_b], file.widths[samples_b]
        beyond = np.zeros(64, np.uint8)  # the kernels look a little beyond the end
        stored = [np.frombuffer(file.read(index), np.uint8) for index in samples_b]
        self._bytes = [np.concatenate([one, beyond]) for one in stored]
        raw = file.modes[samples_b] == "raw"
        columns = (
            [one.ctypes.data for one in self._bytes],
            file.sizes[samples_b],
            raw,
            self.heights,
            self.widths,
        )
        self._located = np.stack([np.asarray(column, np.int64) for column in columns], axis=1)

    def crops(self, decoder: Any) -> np.ndarray:
        """int64 [b, 5]: top, left, height, width, mirrored."""
        return decoder.draw(self.samples_b, self.heights, self.widths, decoder.output_size)

    def decode(self, decoder: Any) -> np.ndarray:
        """images_bhwc of the decoder's output_size."""
        images_bhwc = np.empty((len(self.samples_b), *decoder.output_size, 3), np.uint8)
        status = decoder.apply(self._located, self.crops(decoder), images_bhwc)
        if status.any():
            index = self.samples_b[np.flatnonzero(status)[0]]
            raise ValueError(f"{self.path}: sample {index} cannot be decoded; write the file again")
        return images_bhwc

    def center_crop(self, size: int, ratio: float) -> np.ndarray:
        """images_bhwc as an evaluation gets them."""
        from fast_imagenet.data.ffcv_loader import resize_method
        from fast_imagenet.ops import CenterCropDecode

        return self.decode(CenterCropDecode(size, ratio, method=resize_method(self.resize)))


class Pipeline:
    """The operations of a run at any epoch, together and each alone; sizes: epoch -> pixels."""

    def __init__(
        self, stored: Stored, augment: Augment, sizes: Callable[[int], int], seed: int, norm: Norm
    ) -> None:
        from fast_imagenet.data.ffcv_loader import image_operations

        self.stored, self.augment, self.sizes = stored, augment, sizes
        self.decoder, *self.operations = image_operations(augment, sizes(0), seed)
        self._mean, self._std = map(np.float32, norm)
        self._norm, self._seed = norm, seed

    def _decoder_at(self, epoch: int) -> Any:
        self.decoder.set_epoch(epoch)
        self.decoder.output_size = self.sizes(epoch)
        return self.decoder

    def crops(self, epoch: int) -> np.ndarray:
        """int64 [b, 5]: top, left, height, width, mirrored."""
        return self.stored.crops(self._decoder_at(epoch))

    def crop(self, epoch: int) -> np.ndarray:
        """images_bhwc after the first operation."""
        return self.stored.decode(self._decoder_at(epoch))

    def change(self, operation: Any, images_bhwc: np.ndarray, epoch: int) -> np.ndarray:
        """A copy after one of `operations`."""
        operation.set_epoch(epoch)
        return operation.transform(images_bhwc.copy(), self.stored.samples_b)

    def batch(
        self, images_bhwc: np.ndarray, epoch: int, augment: Augment | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What happens on the device: (images_bhwc back in 0..255, targets_bb: their fractions)."""
        import torch

        from fast_imagenet.data.device_transforms import BatchTransforms

        augment, count = augment or self.augment, len(images_bhwc)
        prepare = BatchTransforms(augment, *self._norm, count, 0.0, self._seed)
        batch = (torch.from_numpy(images_bhwc), torch.arange(count), self.stored.samples_b)
        # the epoch stands for the step: the images of a sheet are not a batch of the run
        images_bchw, targets = prepare(*batch, epoch, epoch)
        if targets.ndim == 1:
            targets = torch.eye(count)
        pixels = images_bchw.float().permute(0, 2, 3, 1).numpy() * self._std + self._mean
        return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8), targets.numpy()

    def whole(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """What the network gets in an epoch: (images_bhwc, targets_bb)."""
        images_bhwc = self.crop(epoch)
        for operation in self.operations:
            images_bhwc = self.change(operation, images_bhwc, epoch)
        return self.batch(images_bhwc, epoch)


def stored_column(p: Pipeline, epochs: range, names: list[str]) -> Column:
    """The images as they are, with the crops of some epochs."""
    crops = [p.crops(epoch) for epoch in epochs]
    boxes = [[tuple(crop[b, :4].tolist()) for crop in crops] for b in range(len(names))]
    captions = [
        f"#{sample}  {name}\n{image.shape[1]} x {image.shape[0]} px"
        for sample, name, image in zip(p.stored.samples_b, names, p.stored.originals, strict=True)
    ]
    detail = "frames: the crops of the epochs on the right"
    return Column("As stored", detail, p.stored.originals, captions, boxes=boxes)


def stage_columns(p: Pipeline, epoch: int) -> Iterator[Column]:
    """Each stage alone, on the center crop; an image in the first epoch that changes it."""
    a, crops = p.augment, p.crop(epoch)
    yield Column(*crop_caption(a), list(crops), [f"epoch {epoch}"] * len(crops))
    plain = p.stored.center_crop(p.sizes(epoch), 1.0)
    for stage, operation in zip(stages_of(a), p.operations, strict=True):
        changes = first_changes(partial(p.change, operation, plain), plain, epoch)
        yield Column(*stage.caption(a), *changes)
    if a.erasing:
        only = replace(a, mixup=0.0, cutmix=0.0)
        detail = f"{a.erasing:.0%} of images, {FILLS[a.erasing_mode]}"
        detail += f", up to {a.erasing_count} boxes" if a.erasing_count > 1 else ""
        changes = first_changes(lambda epoch: p.batch(plain, epoch, only)[0], plain, epoch)
        yield Column("Erasing", detail, *changes)
    if a.mixup or a.cutmix:
        images_bhwc, targets_bb = p.batch(plain, epoch, replace(a, erasing=0.0))
        kinds = [kind for kind, alpha in (("Mixup", a.mixup), ("CutMix", a.cutmix)) if alpha]
        detail = ", ".join(f"{kind} alpha {getattr(a, kind.lower()):g}" for kind in kinds)
        captions = _mix_captions(targets_bb, p.stored.samples_b)
        yield Column(" or ".join(kinds), detail, list(images_bhwc), captions)


def first_changes(
    change: Callable[[int], np.ndarray], plain: np.ndarray, epoch: int
) -> tuple[list[np.ndarray], list[str]]:
    """Each image in the first epoch, from `epoch` on, that changes it; and captions naming it."""
    images, waiting, last = list(plain), set(range(len(plain))), epoch + SEARCHED_EPOCHS
    captions = [f"unchanged in {SEARCHED_EPOCHS} epochs"] * len(plain)
    while waiting and epoch < last:
        changed = change(epoch)
        for b in [b for b in waiting if (changed[b] != plain[b]).any()]:
            images[b], captions[b] = changed[b], f"epoch {epoch}"
            waiting.remove(b)
        epoch += 1
    return images, captions


def whole_columns(p: Pipeline, epochs: range) -> Iterator[Column]:
    """All stages after each other, as the network gets them, one column per epoch."""
    for k, epoch in enumerate(epochs):
        images_bhwc, targets_bb = p.whole(epoch)
        crops = p.crops(epoch)
        area = crops[:, 2] * crops[:, 3] / (p.stored.heights * p.stored.widths)
        captions = [
            f"crop {area[b]:.0%}{', mirrored' * int(crops[b, 4])}\n{mix}".rstrip()
            for b, mix in enumerate(_mix_captions(targets_bb, p.stored.samples_b))
        ]
        color = COLORS[k % len(COLORS)]
        yield Column(f"Epoch {epoch}", f"{p.sizes(epoch)} px", list(images_bhwc), captions, color)


def validation_columns(stored: Stored, validation: SimpleNamespace) -> Iterator[Column]:
    """The center crops of standard eval and config eval."""
    v = validation
    standard, config = (v.plain_resolution, v.plain_crop_ratio), (v.resolution, v.crop_ratio)
    both = {standard: "Standard and config eval"}
    views = {standard: "Standard eval", config: "Config eval"} if standard != config else both
    for (size, ratio), title in views.items():
        mirrored = v.lr_tta and config == (size, ratio)
        detail = f"{size} px, crop {ratio:.4g}" + (", and mirrored" if mirrored else "")
        images = list(stored.center_crop(size, ratio))
        yield Column(title, detail, images, [""] * len(images))


def _mix_captions(targets_bb: np.ndarray, samples_b: np.ndarray) -> list[str]:
    """'0.83 + 0.17 of #5' for mixed images, '' for the others."""
    texts = []
    for b, row in enumerate(targets_bb):
        others = (k for k in np.flatnonzero(row > 5e-4) if k != b)
        more = "".join(f" + {row[k]:.2f} of #{samples_b[k]}" for k in others)
        texts.append(f"{row[b]:.2f}{more}" if more else "")
    return texts


def cell_size(size: int) -> int:
    """Side at which images of `size` px are shown, a whole multiple where it is enlarged."""
    return min(LARGEST_CELL, size * max(1, -(-SMALLEST_CELL // size)))


def draw_sheet(
    title: str, subtitle: str, groups: dict[str, list[Column]], size: int
) -> Image.Image:
    """Groups of columns, all with as many images, under their headings; size: of a cell, px."""
    columns = [column for group in groups.values() for column in group]
    details = max(len(_wrap(column.detail, size)) for column in columns)
    captions = [caption for column in columns for caption in column.captions]
    top, row = MARGIN + 96, size + LINE * (1 + max(c.count("\n") for c in captions)) + ROW_GAP
    first_row = top + 36 + NAME + 10 + LINE * details
    width = 2 * MARGIN + len(columns) * (size + GAP) - GAP + (len(groups) - 1) * (GROUP_GAP - GAP)
    width, bottom = max(width, 720), first_row + row * len(columns[0].images) + ROW_GAP
    mixes = any(" of #" in caption for caption in captions)
    legend = _wrap(LEGEND + MIXED * mixes, width - 2 * MARGIN)
    sheet = Image.new("RGB", (width, bottom + LINE * len(legend) + MARGIN - 6), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, bottom), "\n".join(legend), MUTED, _font(TEXT), spacing=LINE - TEXT)
    pen.text((MARGIN, MARGIN - 6), title, INK, _font(TITLE))
    pen.text((MARGIN, MARGIN + 32), subtitle, MUTED, _font(TEXT + 1))
    x = MARGIN
    for heading, group in groups.items():
        pen.text((x, top - 22), heading.upper(), MUTED, _font(GROUP))
        pen.line([(x, top), (x + len(group) * (size + GAP) - GAP, top)], RULE, 2)
        for column in group:
            _draw_column(
                sheet, column, (x, top + 14), range(first_row, bottom - ROW_GAP, row), size
            )
            x += size + GAP
        x += GROUP_GAP - GAP
    return sheet


def _draw_column(
    sheet: Image.Image, column: Column, corner: tuple[int, int], rows: range, size: int
) -> None:
    pen, (x, y) = ImageDraw.Draw(sheet), corner
    if column.color:
        pen.rectangle([x, y + 2, x + 11, y + 13], column.color)
    pen.text((x + 18 * bool(column.color), y - 2), column.title, INK, _font(NAME))
    for k, line in enumerate(_wrap(column.detail, size)):
        pen.text((x, y + NAME + 8 + LINE * k), line, MUTED, _font(TEXT))
    for b, (image, top) in enumerate(zip(column.images, rows, strict=True)):
        cell = _fit(image, column.boxes[b] if column.boxes else None, size)
        sheet.paste(cell, (x, top + size - cell.height))
        for k, line in enumerate(column.captions[b].split("\n")):
            place = (x, top + size + 4 + LINE * k)
            pen.text(place, _cut(line, size), MUTED if k else INK, _font(TEXT))


def _fit(image_hwc: np.ndarray, boxes: list[Box] | None, side: int) -> Image.Image:
    """An image in a cell, with frames. Without (None) it is what a network gets, and is enlarged
    by whole multiples, so that its pixels can be seen."""
    height, width = image_hwc.shape[:2]
    scale = side / max(height, width)
    enlarged = boxes is None and scale >= 1
    scale = int(scale) if enlarged else scale
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    cell = Image.fromarray(image_hwc).resize(size, method)
    pen, x_scale, y_scale = ImageDraw.Draw(cell), size[0] / width, size[1] / height
    for k, (top, left, tall, wide) in enumerate(boxes or []):
        x, right = round(left * x_scale), round((left + wide) * x_scale)
        y, bottom = round(top * y_scale), round((top + tall) * y_scale)
        corners = [x, y, max(x, right - 1), max(y, bottom - 1)]
        pen.rectangle(corners, outline=COLORS[k % len(COLORS)], width=2)
    return cell


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # comes with Pillow: the same letters everywhere


def _wrap(text: str, size: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = _font(TEXT).getlength(longer) <= size or not lines[-1]
        lines[-1:] = [longer] if fits else [lines[-1], word]
    return lines


def _cut(text: str, size: int) -> str:
    """The text, shortened with an ellipsis where it is wider than a cell."""
    shown = text
    while _font(TEXT).getlength(shown) > size:
        text = text[:-1]
        shown = f"{text.rstrip()}..."
    return shown


def make_sheet(cfg: SimpleNamespace, script: ModuleType) -> Image.Image:
    """The sheet of a config; `script` is the module train_imagenet."""
    file = BetonFile(cfg.data.train_dataset)
    if cfg.count > file.num_samples:
        count = f"{file.num_samples} image{'s' * (file.num_samples != 1)}"
        raise ValueError(f"--count={cfg.count}, but {file.path} holds {count}: lower it")
    seed, epochs = cfg.training.seed, range(cfg.epoch, cfg.epoch + cfg.draws)
    samples_b = epoch_order(file.num_samples, seed, 0)[: cfg.count]
    known = file.sidecar.get("class_names") or file.classes
    labels = file.labels[samples_b]
    names = [class_name(known[label]) if known else f"class {label}" for label in labels]
    sizes = partial(resolution_at, **vars(cfg.resolution))
    stored = Stored(file, samples_b, cfg.data.resize)
    norm = (script.MEAN, script.STD)
    pipeline = Pipeline(stored, script.augment_of(cfg), sizes, seed, norm)
    groups = {
        "In the file": [stored_column(pipeline, epochs, names)],
        "Each stage alone": list(stage_columns(pipeline, cfg.epoch)),
        "What the network gets": list(whole_columns(pipeline, epochs)),
        "What it is evaluated on": list(validation_columns(stored, cfg.validation)),
    }
    title, size = f"{Path(cfg.logging.folder).name}: what the network sees", sizes(cfg.epoch)
    subtitle = f"{cfg.data.train_dataset}, {file.num_samples:,} images; seed {seed}; "
    subtitle += f"{size} px in epoch {cfg.epoch}"
    return draw_sheet(title, subtitle, groups, cell_size(size))


def main(argv: list[str] | None = None) -> None:
    """Read the settings, write the sheet, print where it is."""
    announce("importing PyTorch and FFCV, drawing: about 12 s")
    import train_imagenet as script

    cfg = read_settings(script, argv)
    sheet = make_sheet(cfg, script)
    write_atomically(cfg.out, lambda file: sheet.save(file, format="PNG"))
    print(f"{cfg.out}: {sheet.width} x {sheet.height} px")


if __name__ == "__main__":
    run_program("preview", main)
