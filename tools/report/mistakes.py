"""What a network gets wrong: one pass over the validation images with a run's weights.

Arrays: images_bhwc uint8 [b, h, w, 3]; n: samples of the file, in its order; k: classes.
"""

from __future__ import annotations

import io
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fast_imagenet.config import read_config
from fast_imagenet.engine.logger import PATHS, REPOSITORY
from tools.report.records import RecordError, Run, read_object

THUMBNAIL = 176  # px, longest side


@dataclass(frozen=True)
class Picture:
    """An image that was taken for something else.

    Attributes:
        sample: its place in the file.
        label, guess: classes, the true one and the likeliest of the network.
        label_share, guess_share: probabilities that the network gives them.
        jpeg: the square that was tested, at most THUMBNAIL px.
    """

    sample: int
    label: int
    guess: int
    label_share: float
    guess_share: float
    jpeg: bytes


@dataclass(frozen=True)
class Mistakes:
    """Result of the pass, plain protocol.

    Attributes:
        names: of the classes.
        counts_kk: int64, true class x guessed class.
        worst: wrong images, the smallest probability of the truth first.
        source: names of the two files.
    """

    names: list[str]
    counts_kk: np.ndarray
    worst: list[Picture]
    source: str

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * np.trace(self.counts_kk) / self.counts_kk.sum()

    def confused(self) -> list[tuple[int, int, int]]:
        """(true, guessed, images), most images first, without the right ones."""
        wrong_kk = self.counts_kk * (1 - np.eye(len(self.counts_kk), dtype=np.int64))
        order = np.argsort(-wrong_kk, axis=None, kind="stable")[: np.count_nonzero(wrong_kk)]
        pairs = np.stack(np.unravel_index(order, wrong_kk.shape), axis=1).tolist()
        return [(label, guess, int(wrong_kk[label, guess])) for label, guess in pairs]

    def classes(self) -> list[tuple[int, int, int]]:
        """(class, its images, right ones), the worst share first; without empty classes."""
        sums, right = self.counts_kk.sum(1), np.diag(self.counts_kk)
        rows = [(k, int(sums[k]), int(right[k])) for k in np.flatnonzero(sums).tolist()]
        return sorted(rows, key=lambda row: (row[2] / row[1], row[0]))


def find_files(run: Run, val: str | None, weights: Path | None) -> tuple[Path, Path] | str:
    """(weights, validation data) of a run, or the sentence that says what is not at hand.

    Raises:
        RecordError: a file that was asked for is not there.
    """
    for name, path in (("--val", val), ("--weights", weights)):
        if path and not Path(path).exists():
            raise RecordError(f"{name}={path} does not exist")
    weights = weights or run.folder / "weights.safetensors"
    if not weights.exists():
        return f"{weights.name} is not in the folder of the run; name a file with --weights."
    if val:
        return weights, Path(val)
    said, real = run.setting("data.val_dataset", ""), real_val(run)
    candidates = [Path(real)] if real else [Path(said), REPOSITORY / said] if said else []
    if places := [path for path in candidates if path.exists()]:
        return weights, places[0]
    name = Path(real or said).name or "which"  # the page may be sent to others: no folders
    return f"the validation data, {name}, is not where the run had it; name it with --val."


def real_val(run: Run) -> str:
    """Where the run had its validation data; '' for a record, or a run of an earlier version."""
    return str(read_object(run.folder / PATHS).get("data.val_dataset", ""))


def find_mistakes(script, run: Run, weights: Path, val: Path, count: int) -> Mistakes:
    """Evaluate under the plain protocol and keep the worst `count` images.

    Args:
        script: the module train_imagenet, whose loaders and network are used.
    Raises:
        ValueError: the weights do not fit the settings, or the files are refused.
    """
    from fast_imagenet.engine.distributed import init_distributed

    cfg = settings_of(script, run, weights, val)
    distributed = init_distributed()
    _, loader = script.build_loaders(cfg, distributed)
    with closing(loader):
        model = script.build_model(cfg, loader.num_classes, distributed.device)
        labels_n, guesses_n, shares_n2 = _pass(script, cfg, model, loader)
    counts_kk = np.zeros((loader.num_classes, loader.num_classes), np.int64)
    np.add.at(counts_kk, (labels_n, guesses_n), 1)
    wrong = np.flatnonzero(labels_n != guesses_n)
    wrong = wrong[np.argsort(shares_n2[wrong, 0], kind="stable")][:count]
    source, ratio = _open(val), cfg.validation.plain_crop_ratio
    worst = [
        Picture(
            *(int(n), int(labels_n[n]), int(guesses_n[n])),
            *map(float, shares_n2[n]),
            thumbnail(source, int(n), ratio),
        )
        for n in wrong
    ]
    names = class_names(source, loader.num_classes)
    return Mistakes(names, counts_kk, worst, f"{weights.name} on {val.name}")


@torch.no_grad()
def _pass(script, cfg, model, loader) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True classes, guesses, and the probabilities of both, of every image."""
    model.eval()
    parts = []
    view = cfg.validation.plain_resolution, cfg.validation.plain_crop_ratio
    for images_bhwc, labels_b in loader.batches(*view):
        logits_bk = model(script.normalize(images_bhwc, *script.input_norm(model))).float()
        shares_bk, guesses_b = F.softmax(logits_bk, 1), logits_bk.argmax(1)
        pair_b2 = shares_bk.gather(1, torch.stack([labels_b, guesses_b], 1))
        # a copy: the loader fills the same memory again
        parts.append([x.clone().cpu().numpy() for x in (labels_b, guesses_b, pair_b2)])
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def settings_of(script, run: Run, weights: Path, val: Path):
    """The run's settings, as an evaluation of these files; what a newer script added: defaults."""
    known = {".".join(key) for key in script.SETTINGS.entries}
    values = {
        f"{section}.{key}": value
        for section, keys in run.settings.items()
        for key, value in keys.items()
        if f"{section}.{key}" in known
    }
    values |= {"training.eval_only": True, "model.checkpoint": weights, "data.val_dataset": val}
    values.pop("training.use_blurpool", None)  # of the run's training; the weights know theirs
    values |= {"data.num_workers": 0, "data.transforms": "cpu", "training.compile": "off"}
    if val.is_dir():
        values["data.backend"] = "torchvision"
    flags = [
        f"--{name}={str(x).lower() if isinstance(x, bool) else x}" for name, x in values.items()
    ]
    return read_config(script.SETTINGS, flags, prog="report page", description="")


def _open(val: Path):
    from fast_imagenet.data.samples import open_dataset

    return open_dataset(val, "val")


def class_names(source, count: int) -> list[str]:
    """Names of the classes: words where the file has them, else identifiers, else numbers."""
    sidecar = getattr(source, "sidecar", {})
    names = sidecar.get("class_names") or getattr(source, "class_names", None) or source.classes
    names = [str(name) for name in names or []]
    return names + [f"class {k}" for k in range(len(names), count)]


def thumbnail(source, sample: int, crop_ratio: float) -> bytes:
    """The central square of an image as JPEG."""
    from fast_imagenet.data.samples import CenterCrop, read_stored, to_chw

    rgb_hwc = to_chw(read_stored(source, sample)).permute(1, 2, 0).numpy()
    region = CenterCrop()(*rgb_hwc.shape[:2], sample, crop_ratio)
    box = (region.left, region.top, region.left + region.width, region.top + region.height)
    image, file = Image.fromarray(np.ascontiguousarray(rgb_hwc)).crop(box), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=80, optimize=True)
    return file.getvalue()
