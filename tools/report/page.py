"""A run as one HTML file (page.html.j2), with what its network gets wrong.

Arrays: images_bhwc uint8 [b, h, w, 3]; n: samples of the file, in its order; k: classes.
"""

from __future__ import annotations

import io
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

import train_imagenet as script
from fast_imagenet.config import read_config
from fast_imagenet.data.class_lists import class_name
from fast_imagenet.data.samples import center_crop, open_dataset, to_hwc
from fast_imagenet.engine.distributed import init_distributed
from fast_imagenet.engine.json_lines import read_jsonl, read_object
from fast_imagenet.engine.plots import draw_curves
from fast_imagenet.environment import REPOSITORY
from fast_imagenet.files import write_atomically
from fast_imagenet.models.networks import ImageNetwork
from fast_imagenet.terminal import announce
from tools.report.records import Run, read_run
from tools.report.tables import NETWORKS, templates
from tools.report.yaml_files import RecordError, flags_of

THUMBNAIL = 176  # px, longest side
BEGINNING = ("model.pretrained", "model.new_head", "model.use_ema", "training.freeze")


def write_page(
    folder: Path,
    out: Path | None = None,
    val: str | None = None,
    weights: Path | None = None,
    worst: int = 24,
) -> list[str]:
    """Write the page of a run, finished or not; returns what was written and what is missing in it.

    Args:
        out: the file; default: page.html in the folder.
        val, weights: default: those of the run.
        worst: how many misclassified images are shown.
    Raises:
        ValueError: the folder holds no run, or weights and data do not exist or fit the run.
    """
    run = read_run(folder)
    out = out or run.folder / "page.html"
    if out.suffix != ".html":
        raise RecordError(f"--out={out} does not end in .html: the page is HTML")
    files, mistakes, notes = find_files(run, val, weights), None, []
    if isinstance(files, str):
        notes = [f"the network's mistakes are not shown, they were not computed: {files}"]
        if (real := real_val(run)) and not Path(real).exists():
            notes.append(f"the run had it at {real}")
    else:
        mistakes = find_mistakes(run, *files, worst)
    entries = script.SETTINGS.entries
    defaults = {".".join(key): str(param.default) for key, param in entries.items()}
    page = render_page(run, mistakes, files if isinstance(files, str) else "", defaults).encode()
    write_atomically(out, lambda file: file.write(page))
    return [f"{out}: {len(page) / 1e6:.2f} MB", *notes]


def render_page(run: Run, found: Mistakes | None, missing: str, defaults: dict[str, str]) -> str:
    """The HTML of a run; `missing`: why no mistakes were found; `defaults`: of settings by name."""
    name = Path(run.setting("logging.folder", "")).name or run.folder.absolute().name
    arch = run.setting("model.arch", "unknown network")
    values = dict(name=name, network=NETWORKS.get(arch, arch), run=run, numbers=run.numbers)
    values |= dict(found=found, missing=missing, defaults=defaults)
    page = templates().get_template("page.html.j2")
    return page.render(values, curves=_curves(run))


def _curves(run: Run) -> bytes:
    """The PNG of the curves."""
    draw_curves(run.log, read_jsonl(run.folder / "steps.jsonl")).savefig(file := io.BytesIO())
    return file.getvalue()


@dataclass(frozen=True)
class Mistake:
    """An image that was classified wrongly."""

    sample: int  # its place in the file
    label: int  # the true class
    guess: int  # the likeliest class of the network
    label_probability: float
    guess_probability: float
    jpeg: bytes  # the square that was evaluated, at most THUMBNAIL px


@dataclass(frozen=True)
class Mistakes:
    """Result of the pass, standard eval."""

    names: list[str]  # of the classes
    labels_n: np.ndarray  # int64, true classes
    guesses_n: np.ndarray  # int64, likeliest classes
    worst: list[Mistake]  # the smallest probability of the true class first
    source: str  # names of the two files

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * (self.labels_n == self.guesses_n).mean()

    @cached_property
    def pairs(self) -> list[tuple[int, int, int]]:
        """(true, guessed, images) of wrong pairs, most images first; memory as the images have."""
        wrong_n = self.labels_n != self.guesses_n
        keys_n = self.labels_n[wrong_n] * len(self.names) + self.guesses_n[wrong_n]
        keys, images = np.unique(keys_n, return_counts=True)
        order = np.argsort(-images, kind="stable")
        columns = (*np.divmod(keys[order], len(self.names)), images[order])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def confused(self, count: int) -> list[tuple[str, str, str, str]]:
        """The most frequent pairs: (true, guessed, images, fraction of the true class)."""
        sums = np.bincount(self.labels_n)
        return [(self.names[true], self.names[guess], f"{n:,}", f"{n / sums[true]:.1%}")
                for true, guess, n in self.pairs[:count]]  # fmt: skip

    def classes(self) -> list[tuple[str, str, str, str]]:
        """(class, accuracy, images, most often taken for), the lowest accuracy first."""
        sums, names = np.bincount(self.labels_n), self.names
        correct = np.bincount(self.labels_n[self.labels_n == self.guesses_n], minlength=len(sums))
        guesses = {true: names[guess] for true, guess, _ in reversed(self.pairs)}
        order = sorted(np.flatnonzero(sums), key=lambda k: (correct[k] / sums[k], k))
        return [(names[k], f"{correct[k] / sums[k]:.1%}", f"{sums[k]:,}", guesses.get(k, ""))
                for k in order]  # fmt: skip

    def matrix(self) -> list[list[int]]:
        """Images, true class x guessed class; of few classes."""
        counts_kk = np.zeros((len(self.names), len(self.names)), np.int64)
        np.add.at(counts_kk, (self.labels_n, self.guesses_n), 1)
        return counts_kk.tolist()


def find_files(run: Run, val: str | None, weights: Path | None) -> tuple[Path, Path] | str:
    """(weights, validation data) of a run, or a sentence on what is missing and not asked for."""
    for name, path in (("--val", val), ("--weights", weights)):
        if path and not Path(path).exists():
            raise RecordError(f"{name}={path} does not exist")
    weights = weights or run.folder / "weights.safetensors"
    if not weights.exists():
        return f"{weights.name} is not in the folder of the run; name a file with --weights."
    setting, real = run.setting("data.val_dataset", ""), real_val(run)
    candidates = [val or real] if val or real else [setting, REPOSITORY / setting] * bool(setting)
    if places := [path for path in map(Path, candidates) if path.exists()]:
        return weights, places[0]
    name = Path(real or setting).name or "which"  # the page may be sent to others: no folders
    return f"the validation data, {name}, is not where the run had it; name it with --val."


def real_val(run: Run) -> str:
    """Where the run had its validation data; '' where that is not known, as of a record."""
    data = read_object(run.folder / "config.json").get("data", {})
    before = read_object(run.folder / "paths.json")  # of an earlier version
    path = str(before.get("data.val_dataset") or data.get("val_dataset", ""))
    return path if path.startswith("/") else ""


def find_mistakes(run: Run, weights: Path, val: Path, count: int) -> Mistakes:
    """Run the standard eval and keep the worst `count` images."""
    cfg = settings_of(run, weights, val)
    announce("evaluating the weights: FFCV is imported first, about 10 s")
    distributed = init_distributed()
    _, loader = script.build_loaders(cfg, distributed)
    with closing(loader):
        model = script.build_model(cfg, loader.num_classes, distributed.device)
        labels_n, guesses_n, probabilities_n2 = _evaluate(cfg, model, loader)
    wrong_n = np.flatnonzero(labels_n != guesses_n)
    wrong_n = wrong_n[np.argsort(probabilities_n2[wrong_n, 0], kind="stable")][:count]
    source, ratio = open_dataset(val, "val"), cfg.validation.plain_crop_ratio
    pairs_n2 = probabilities_n2.tolist()
    worst = [Mistake(n, int(labels_n[n]), int(guesses_n[n]), pairs_n2[n][0], pairs_n2[n][1],
                     thumbnail(source, n, ratio)) for n in wrong_n.tolist()]  # fmt: skip
    names = class_names(source, loader.num_classes)
    return Mistakes(names, labels_n, guesses_n, worst, f"{weights.name} on {val.name}")


@torch.no_grad()
def _evaluate(cfg: SimpleNamespace, model: torch.nn.Module, loader: Any) -> list[np.ndarray]:
    """True classes, guesses, and the probabilities of both, of every image."""
    network, parts = ImageNetwork(model).eval(), []
    view = cfg.validation.plain_resolution, cfg.validation.plain_crop_ratio
    for images_bhwc, labels_b in loader.batches(*view):
        logits_bk = network(images_bhwc).float()
        probabilities_bk, guesses_b = logits_bk.softmax(1), logits_bk.argmax(1)
        pair_b2 = probabilities_bk.gather(1, torch.stack([labels_b, guesses_b], 1))
        # a copy: the loader fills the same memory again
        parts.append([x.clone().cpu().numpy() for x in (labels_b, guesses_b, pair_b2)])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def settings_of(run: Run, weights: Path, val: Path) -> SimpleNamespace:
    """The run's settings, as an evaluation of these files; settings it does not have: defaults."""
    known = [key for key in script.SETTINGS.entries if key[1] in run.settings.get(key[0], {})]
    values = {f"{section}.{key}": run.settings[section][key] for section, key in known}
    values |= {"training.eval_only": True, "model.checkpoint": weights, "data.val_dataset": val}
    # of the run's training, and of the weights that it began with; these know theirs
    for name in ("training.use_blurpool", "training.blur_max_pool", *BEGINNING):
        values.pop(name, None)
    values |= {"data.num_workers": 0, "data.transforms": "cpu", "training.compile": "off"}
    values |= {"data.backend": "torchvision"} if val.is_dir() else {}
    return read_config(script.SETTINGS, flags_of(values), prog="report page", description="")


def class_names(source: Any, count: int) -> list[str]:
    """Names of the classes: of the file, else of timm for wnids, else identifiers or numbers."""
    sidecar = getattr(source, "sidecar", {})
    names = sidecar.get("class_names") or getattr(source, "class_names", None) or source.classes
    names = [str(name) for name in names or []]
    words = Counter(map(class_name, names))  # ImageNet has two cranes
    names = [f"{word} ({name})" if words[word := class_name(name)] > 1 else word for name in names]
    return names + [f"class {k}" for k in range(len(names), count)]


def thumbnail(source: Any, sample: int, crop_ratio: float) -> bytes:
    """The central square of an image as JPEG."""
    rgb_hwc = to_hwc(source.read(sample))
    height, width = rgb_hwc.shape[:2]
    region = center_crop(height, width, sample, crop_ratio)
    box = (region.left, region.top, region.left + region.width, region.top + region.height)
    image, file = Image.fromarray(rgb_hwc).crop(box), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, "JPEG", quality=80, optimize=True)
    return file.getvalue()
