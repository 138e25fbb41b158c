"""Train a classifier on ImageNet, fast: the whole recipe in one file, read from top to bottom.

    python train_imagenet.py --config rn50_88_epochs.yaml          one GPU
    torchrun --nproc_per_node=8 train_imagenet.py --config ...     eight: same global batch
    python train_imagenet.py --config ... --training.eval_only=1 --model.checkpoint=FILE

To change the recipe, edit a YAML (budget), STAGES in fast_imagenet/data/augmentation.py (the table
of augmentations), fast_imagenet/engine/schedules.py (shape of a schedule) or the step in
`train_epoch`. What the recipes reach is in README.md, one row per config.

Arrays: images_bhwc uint8 as loaded; images_bchw float, normalised, channels last; labels_b int64;
samples_b int64, the images' places in the file, which key everything drawn.
"""

import os
import sys
from pathlib import Path

try:
    from fastargs import Config, Param, Section
except ModuleNotFoundError as missing:
    sys.exit(
        f"{missing} for {sys.executable}: `make setup` installs what is needed into .venv; "
        f"then run .venv/bin/python train_imagenet.py"
    )

from fast_imagenet.config import (
    Bool,
    Int,
    Number,
    OffOr,
    OneOf,
    Str,
    read_config,
    to_dict,
)
from fast_imagenet.data.augmentation import MIX_ALPHAS, POLICIES, Augment
from fast_imagenet.engine.schedules import SCHEDULES
from fast_imagenet.engine.signals import SignalWatch, exit_statuses, stop_at_once
from fast_imagenet.engine.watchdog import Watchdog
from fast_imagenet.terminal import ignore_broken_pipe
from fast_imagenet.validation import validate

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Settings: one YAML key each; every default is a working value                                  │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘

HERE = Path(__file__).resolve().parent
CONFIG_FOLDERS = [HERE / "rn50_configs", HERE / "rn18_configs", HERE / "imagenette_configs"]
SETTINGS = Config()

# fmt: off
Section("model", "the network", SETTINGS).params(
    arch=Param(Str(), "torchvision or timm name; timm/x forces the library", default="resnet50"),
    checkpoint=Param(Str(), "weights to start from or to evaluate", default=""),
    use_ema=Param(Bool(), "take a checkpoint's EMA weights, where it has them", default=True),
    normalization=Param(
        OneOf("auto", "imagenet", "inception", "clip", "none"),
        "mean and std of the images; auto = as the weights say, else ImageNet's",
        default="auto",
    ),
    zero_init=Param(Bool(), "start residual branches at zero (last norm)", default=True),
    drop_path=Param(Number(0, 0.9), "stochastic depth, where the network has it", default=0.0),
)
Section("data", "where images come from", SETTINGS).params(
    train_dataset=Param(Str(), ".beton (torchvision: or a folder)", default="data/train.beton"),
    val_dataset=Param(Str(), ".beton (torchvision: or a folder)", default="data/val.beton"),
    num_workers=Param(Int(0), "loader workers a rank; 0 = its share of the cores", default=0),
    in_memory=Param(Bool(), "false: quasi-random order, for files beyond RAM", default=True),
    backend=Param(OneOf("ffcv", "torchvision"), "who loads and transforms", default="ffcv"),
    transforms=Param(OneOf("cpu", "gpu"), "where torchvision's transforms run", default="cpu"),
    check_pages=Param(Bool(), "check each page's sum as it is first read", default=True),
    timeout=Param(Number(1), "seconds without a batch that end the run", default=300.0),
)
Section("resolution", "training side in pixels", SETTINGS).params(
    min_res=Param(Int(16, 1024), "side up to start_ramp", default=160),
    max_res=Param(Int(16, 1024), "side from end_ramp on", default=160),
    start_ramp=Param(Int(0), "epochs done (from 0) up to which it stays min_res", default=0),
    end_ramp=Param(Int(0), "epochs done from which on it is max_res", default=0),
)
Section("lr", "learning rate, evaluated at every step", SETTINGS).params(
    lr=Param(Number(0), "peak, per 256 images of the global batch", default=0.125),
    lr_schedule_type=Param(OneOf(*SCHEDULES), "shape", default="linear"),
    lr_peak_epoch=Param(Number(0), "end of the warm-up, epochs", default=2.0),
    step_length=Param(Number(1e-3), "step: epochs between drops", default=30.0),
    step_ratio=Param(Number(0, 1), "step: factor of a drop", default=0.1),
    flat_fraction=Param(Number(0, 1), "flat_cosine: share before the fall", default=0.72),
    min_lr=Param(Number(0), "rate at the end, per 256 images", default=0.0),
)
Section("training", "optimisation", SETTINGS).params(
    epochs=Param(Int(1, 100_000), "length of the run", default=16),
    batch_size=Param(Int(1, 1_000_000), "images per step over ALL ranks", default=256),
    micro_batch_size=Param(Int(0), "images per forward pass and rank; 0 = all", default=0),
    optimizer=Param(Str(), "sgd, or any optimizer that timm names", default="sgd"),
    momentum=Param(Number(0, 1), "of SGD", default=0.9),
    nesterov=Param(Bool(), "Nesterov momentum (sgd)", default=False),
    weight_decay=Param(Number(0), "on weights of convolution and linear layers", default=1e-4),
    norm_weight_decay=Param(Number(0), "the same on norms and biases", default=0.0),
    label_smoothing=Param(Number(0, 1), "share given to all classes", default=0.1),
    loss=Param(OneOf("ce", "bce"), "cross-entropy, or binary over the classes", default="ce"),
    clip_grad=Param(Number(0), "largest gradient norm; 0 = off", default=0.0),
    use_blurpool=Param(Bool(), "blur before strided convolutions", default=True),
    compile=Param(OneOf("auto", "on", "off"), "torch.compile; auto = on a GPU", default="auto"),
    precision=Param(OneOf("auto", "bf16", "fp16", "fp32"), "auto = what fits", default="auto"),
    seed=Param(Int(0, 2**31), "weights, order, augmentation", default=0),
    resume=Param(Str(), "none, auto (last checkpoint of the folder) or a file", default="none"),
    eval_only=Param(Bool(), "evaluate model.checkpoint and stop", default=False),
    checkpoint_minutes=Param(Number(0), "between checkpoints in an epoch; 0 = none", default=10.0),
    max_steps=Param(Int(0), "for trials: end the run early; 0 = no limit", default=0),
)
Section("augment", "random changes to training images", SETTINGS).params(
    crop_min_area=Param(Number(0.001, 1), "smallest crop, share of the image", default=0.08),
    crop_max_area=Param(Number(0.001, 1), "largest crop, share of the image", default=1.0),
    flip=Param(Number(0, 1), "probability of a horizontal flip", default=0.5),
    policy=Param(OneOf(*POLICIES), "drawn operations; lite: fast ones", default="none"),
    policy_ops=Param(Int(1, 14), "rand_augment: operations an image", default=2),
    policy_magnitude=Param(Number(0, 30), "their strength, of 30; timm: of 10", default=9.0),
    policy_mstd=Param(Number(0, 10), "standard deviation of the strength", default=0.0),
    brightness=Param(Number(0, 10), "jitter: factor 1 - x to 1 + x; 0 = off", default=0.0),
    contrast=Param(Number(0, 10), "jitter: factor 1 - x to 1 + x; 0 = off", default=0.0),
    saturation=Param(Number(0, 10), "jitter: factor 1 - x to 1 + x; 0 = off", default=0.0),
    hue=Param(Number(0, 0.5), "jitter: shift, share of the circle; 0 = off", default=0.0),
    grayscale=Param(Number(0, 1), "probability of no colour", default=0.0),
    solarize=Param(Number(0, 1), "probability of inverted highlights", default=0.0),
    blur=Param(Number(0, 1), "probability of a blur, radius 0.1 to 2 px", default=0.0),
    erasing=Param(Number(0, 1), "probability of erased boxes", default=0.0),
    erasing_mode=Param(OneOf("const", "rand", "pixel"), "mean colour or noise", default="const"),
    erasing_count=Param(Int(1, 100), "most boxes an image", default=1),
    mixup=Param(OffOr(*MIX_ALPHAS), "alpha of Mixup; 0 = off", default=0.0),
    cutmix=Param(OffOr(*MIX_ALPHAS), "alpha of CutMix; 0 = off", default=0.0),
)
Section("ema", "moving average of the weights", SETTINGS).params(
    decay=Param(Number(0, 0.9999999), "0 = off: the average is the raw weights", default=0.0),
    warmup=Param(Bool(), "let the decay grow to its target", default=True),
)
Section("validation", "two protocols, each time both", SETTINGS).params(
    every=Param(Int(1), "epochs between evaluations; the last always has one", default=1),
    resolution=Param(Int(16, 1024), "configured: side in pixels", default=224),
    crop_ratio=Param(Number(0.1, 1), "configured: crop / shorter side", default=0.875),
    lr_tta=Param(Bool(), "configured: average with the mirrored image", default=False),
    plain_resolution=Param(Int(16, 1024), "plain (one crop, no flip): side", default=224),
    plain_crop_ratio=Param(Number(0.1, 1), "plain: crop / shorter side", default=0.875),
    batch_size=Param(Int(1, 1_000_000), "images per forward pass and rank", default=256),
)
Section("logging", "what a run leaves", SETTINGS).params(
    folder=Param(Str(empty=False), "everything lands here", default="runs/default"),
    wandb=Param(Str(), "project of Weights & Biases; empty = off", default=""),
    tensorboard=Param(Bool(), "TensorBoard files, when it is installed", default=True),
    progress=Param(Bool(), "live bar on a terminal; false: accuracy lines only", default=True),
)
# fmt: on


def read_settings(argv: list[str] | None = None):
    """Settings from YAML files and flags; every mistake is reported at once, exit status 2."""
    return read_config(
        SETTINGS,
        argv,
        search=CONFIG_FOLDERS,
        check=validate,
        prog="train_imagenet.py",
        description="Train a classifier on ImageNet from .beton files.",
    )


def defaults() -> dict:
    """Every setting without a file or a flag: section -> {key: value}."""
    return to_dict(read_config(SETTINGS, [], prog="train_imagenet.py", description=""))


if __name__ == "__main__":
    ignore_broken_pipe()
    stop_at_once()
    CFG = read_settings()  # before the heavy imports: a misspelt key must not cost ten seconds

import time
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fast_imagenet.data.class_lists import class_list, difference, notes, same_names, unequal
from fast_imagenet.data.device_transforms import BatchTransforms, normalize
from fast_imagenet.engine.checkpoint import load_into, load_weights, save_weights
from fast_imagenet.engine.distributed import (
    Consensus,
    Distributed,
    choose_precision,
    init_distributed,
)
from fast_imagenet.engine.ema import WeightAverage
from fast_imagenet.engine.finite import NotFinite, mean_losses
from fast_imagenet.engine.logger import RunLog, epoch_line, redact_paths
from fast_imagenet.engine.metrics import Score
from fast_imagenet.engine.progress import Progress, peak_memory_gb
from fast_imagenet.engine.run import StepMonitor
from fast_imagenet.engine.run_lock import lock_folder
from fast_imagenet.engine.run_state import (
    FRESH,
    catch_up_best,
    data_identity,
    last_good,
    refuse_finished_elsewhere,
    refuse_wild_weights,
    restore_run,
    run_info,
    save_run,
)
from fast_imagenet.engine.schedules import ema_decay_at, is_evaluated, lr_at, resolution_at
from fast_imagenet.models.blurpool import apply_blurpool
from fast_imagenet.models.factory import (
    create_model,
    distribute,
    start_improbable,
    try_evaluation,
    try_network,
    warm_up,
    zero_init_residual,
)
from fast_imagenet.models.origin import IMAGENET, input_norm, new_origin, origin_of
from fast_imagenet.models.small_maps import use_small_maps
from fast_imagenet.rng import step_seed

MEAN, STD = IMAGENET

# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Data                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def build_loaders(cfg, distributed: Distributed):
    """Training loader (None when only evaluating) and validation loader of the chosen backend."""
    if cfg.data.backend == "ffcv":
        from fast_imagenet.data.ffcv_loader import EvalLoader, TrainLoader

        extra = {"in_memory": cfg.data.in_memory}
    else:
        from fast_imagenet.data.torch_loader import TorchEvalLoader as EvalLoader
        from fast_imagenet.data.torch_loader import TorchTrainLoader as TrainLoader

        extra = {"transforms": cfg.data.transforms}
    place = dict(
        rank=distributed.rank, world_size=distributed.world_size, device=distributed.device, **extra
    )
    place["check_pages"] = cfg.data.check_pages
    place["num_workers"] = distributed.workers(cfg.data.num_workers)
    val = EvalLoader(cfg.data.val_dataset, batch_size=cfg.validation.batch_size, **place)
    if cfg.training.eval_only:
        tell_notes(distributed, {cfg.data.val_dataset: val})
        return None, val
    train = TrainLoader(
        cfg.data.train_dataset,
        global_batch=cfg.training.batch_size,
        seed=cfg.training.seed,
        augment=augment_of(cfg),
        **place,
    )
    if fault := unequal(train, val):
        names = f"{cfg.data.train_dataset} and {cfg.data.val_dataset}"
        raise ValueError(f"{names} {fault}; write both from one source")
    tell_notes(distributed, {cfg.data.train_dataset: train, cfg.data.val_dataset: val})
    return train, val


def tell_notes(distributed: Distributed, loaders: dict) -> None:
    """Print what a user should know of the data: file -> loader."""
    if distributed.is_main:
        print(*(f"{sentence}\n" for sentence in notes(loaders)), sep="", end="", flush=True)


def check_classes(checkpoint: str, dataset: str, loader) -> None:
    """Refuse weights that were trained on other classes than the data has, or in another order.

    Raises: ValueError: with the first class that differs.
    """
    info = load_weights(checkpoint)[1]
    classes, others = info.get("classes"), info.get("label_names")  # ours, timm's
    if classes is None and loader.classes and same_names(others, loader.classes):
        classes = others  # names of the same kind as the data's: their order counts
    if not isinstance(classes, list):
        return
    if wrong := [name for name in classes if not isinstance(name, str)]:
        raise ValueError(f"{checkpoint} names a class {wrong[0]!r:.80}, not text; use another copy")
    if fault := difference(class_list(classes), loader):
        raise ValueError(
            f"{checkpoint} was trained on other classes than {dataset} has: {fault}; give weights "
            f"and data of one class list"
        )


def augment_of(cfg) -> Augment:
    """Section `augment` of the settings, as the loaders and the batch's part take it."""
    values = dict(vars(cfg.augment))
    area = (values.pop("crop_min_area"), values.pop("crop_max_area"))
    return Augment(crop_area=area, **values)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Model                                                                                          │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def build_model(cfg, num_classes: int, device: torch.device) -> nn.Module:
    """The raw network on its device, channels last, initialised, with BlurPool and checkpoint."""
    torch.manual_seed(cfg.training.seed)
    model = create_model(cfg.model.arch, num_classes, cfg.model.drop_path)
    if cfg.model.zero_init:
        zero_init_residual(model)
    if cfg.training.loss == "bce":
        start_improbable(model, num_classes)
    origin, weights = new_origin(cfg), None
    if cfg.model.checkpoint:
        weights, info = load_weights(cfg.model.checkpoint, ema=cfg.model.use_ema)
        origin = origin_of(info, cfg, num_classes)
        origin.report()
    if origin.blurpool:
        apply_blurpool(model)
    if device.type == "cpu":
        use_small_maps(model)
    if weights is not None:
        load_into(model, weights)
    model.input_norm, model.origin = (origin.mean, origin.std), origin
    return model.to(device, memory_format=torch.channels_last)


def wrap_model(model: nn.Module, cfg, distributed: Distributed):
    """The network as called in training and in evaluation: distributed, compiled when asked."""
    train = model
    if distributed.world_size > 1:
        train = distribute(model, distributed.device)
    on = cfg.training.compile == "on"
    if not (on or (cfg.training.compile == "auto" and distributed.device.type == "cuda")):
        return train, model
    torch._dynamo.config.recompile_limit = 64  # one graph a resolution and mode; the default is 8
    compiled = torch.compile(train, dynamic=False)
    return compiled, compiled if train is model else torch.compile(model, dynamic=False)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Optimizer                                                                                      │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def decay_groups(model: nn.Module, weight_decay: float, of_norms: float = 0.0) -> list[dict]:
    """Two groups, each with its decay: weights of convolution and linear layers; norms and biases.

    By module type: ffcv-imagenet looks for 'bn' in the name and so decays downsample.1 as well.
    """
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    groups = {True: [], False: []}
    for parameter in model.parameters():
        groups[id(parameter) in decayed].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": of_norms},
    ]


def build_optimizer(cfg, model: nn.Module) -> torch.optim.Optimizer:
    """SGD in one fused call, or any optimizer that timm names; each step sets the rate."""
    options = cfg.training
    groups = decay_groups(model, options.weight_decay, options.norm_weight_decay)
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=0.0, momentum=options.momentum, nesterov=options.nesterov, fused=True
        )
    from timm.optim import create_optimizer_v2, list_optimizers

    if options.optimizer not in list_optimizers():
        raise ValueError(
            f"training.optimizer={options.optimizer} is not known to timm; try sgd, lamb or adamw"
        )
    optimizer = create_optimizer_v2(
        groups, opt=options.optimizer, lr=1.0, weight_decay=0.0, momentum=options.momentum
    )
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(
            f"training.optimizer={options.optimizer} needs second derivatives, which the step "
            f"does not take; try sgd, lamb or adamw"
        )
    return optimizer


def build_loss(kind: str, num_classes: int, smoothing: float):
    """(logits_bk, labels_b or soft targets_bk) -> mean loss; soft targets are smoothed already."""

    def loss(logits_bk, targets):
        if kind == "ce":
            hard = targets.ndim == 1
            return F.cross_entropy(logits_bk, targets, label_smoothing=smoothing if hard else 0.0)
        if targets.ndim == 1:
            targets = F.one_hot(targets, num_classes) * (1 - smoothing) + smoothing / num_classes
        # summed over the classes: their mean would shrink the gradients with their number
        return F.binary_cross_entropy_with_logits(
            logits_bk, targets.float(), reduction="sum"
        ) / len(targets)

    return loss


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Train                                                                                          │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


@dataclass
class Training:
    """What a training step uses, ready made."""

    model: nn.Module  # as called: distributed, compiled
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: WeightAverage
    loss: object  # (logits, targets) -> mean loss
    prepare: BatchTransforms  # normalise, erase, mix -> (images_bchw, targets)
    autocast: object  # () -> context
    lr_at_epoch: object  # epochs as a real number -> learning rate
    decay_at_step: object  # steps finished -> decay of the average
    seed_at_step: object  # step -> seed of torch's generator
    micro_batch: int  # images per forward pass
    clip_grad: float  # largest gradient norm, 0 = off


def train_epoch(
    t: Training, batches, first_step: int, steps_per_epoch: int, show, pause=None
) -> tuple[list, float, int]:
    """The steps of an epoch, or the rest of them.

    Args:
        batches: one a step: (images_bhwc, labels_b, samples_b).
        first_step: number of the first of them since the start of the run.
        show: called after every step, for a progress bar.
        pause: called after every step with the steps finished so far and the losses.
    Returns:
        every step's loss (on the device), seconds of waiting for data, images seen.
    """
    t.model.train()
    losses, waited, seen, batches = [], 0.0, 0, iter(batches)
    for step in count(first_step):
        asked = time.perf_counter()
        if (batch := next(batches, None)) is None:
            break
        waited += time.perf_counter() - asked
        lr = t.lr_at_epoch(step / steps_per_epoch)
        for group in t.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(t.seed_at_step(step))  # stochastic depth
        losses.append(forward_backward(t, *batch, step // steps_per_epoch, step))
        if t.clip_grad:
            t.scaler.unscale_(t.optimizer)
            nn.utils.clip_grad_norm_(t.model.parameters(), t.clip_grad)
        t.scaler.step(t.optimizer)
        t.scaler.update()
        t.optimizer.zero_grad(set_to_none=True)
        t.ema.update(t.decay_at_step(step + 1))
        seen += len(batch[1])
        show(step, losses[-1], lr, seen, waited)
        if pause:
            pause(step + 1, losses)
    return losses, waited, seen


def forward_backward(
    t: Training, images_bhwc, labels_b, samples_b, epoch: int, step: int
) -> torch.Tensor:
    """Gradients of a rank's batch, in micro-batches; its mean loss, not waiting for the device."""
    total = torch.zeros((), device=labels_b.device)
    micro = t.micro_batch
    samples = [samples_b[first : first + micro] for first in range(0, len(labels_b), micro)]
    parts = list(zip(images_bhwc.split(micro), labels_b.split(micro), samples, strict=True))
    for index, (images, labels, keys) in enumerate(parts):
        images_bchw, targets = t.prepare(images, labels, keys, epoch, step)
        # gradients cross the ranks once a step, with the last part
        quiet = index < len(parts) - 1 and hasattr(t.model, "no_sync")
        with t.model.no_sync() if quiet else nullcontext():
            with t.autocast():
                loss = t.loss(t.model(images_bchw).float(), targets)
            share = len(labels) / len(labels_b)
            t.scaler.scale(loss * share).backward()
        total += loss.detach() * share
    return total


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Evaluate                                                                                       │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


@torch.no_grad()
def evaluate(model: nn.Module, loader, cfg, autocast, device) -> dict:
    """Both protocols, {'plain': {loss, top1, top5}, 'configured': ...}; one pass a crop."""
    model.eval()
    v = cfg.validation
    plain, configured = (v.plain_resolution, v.plain_crop_ratio), (v.resolution, v.crop_ratio)
    scores = {"plain": Score(device), "configured": Score(device)}
    for view in dict.fromkeys((plain, configured)):
        for images_bhwc, labels_b in loader.batches(*view):
            images_bchw = normalize(images_bhwc, *input_norm(model))
            with autocast():
                logits_bk = model(images_bchw).float()
                mirrored = view == configured and v.lr_tta
                flipped = model(images_bchw.flip(3)).float() if mirrored else logits_bk
            if view == plain:
                scores["plain"].add(logits_bk, labels_b)
            if view == configured:
                scores["configured"].add((logits_bk + flipped) / 2, labels_b)
    return {name: score.read() for name, score in scores.items()}


def evaluate_both(
    model, raw, average: WeightAverage, loader, cfg, autocast, distributed: Distributed
) -> dict:
    """The log's evaluation keys, for the raw weights and for their average."""
    distributed.all_reduce_mean(
        dict(raw.named_buffers())
    )  # each rank's batch norm has seen its own images
    scores = evaluate(model, loader, cfg, autocast, distributed.device)
    ema_scores = scores  # with decay 0 the average is the raw weights: the same numbers
    if cfg.ema.decay:
        distributed.all_reduce_mean(average.state_dict())
        with average.applied():
            ema_scores = evaluate(model, loader, cfg, autocast, distributed.device)
    record = {"val_loss": scores["plain"]["loss"], "val_loss_ema": ema_scores["plain"]["loss"]}
    for prefix, result in (("", scores), ("ema_", ema_scores)):
        for key in ("top1", "top5"):
            record[f"{prefix}plain_{key}"] = result["plain"][key]
            record[f"{prefix}{key}"] = result["configured"][key]
    return record


# ┌────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Main                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────┘


def build_training(cfg, model: nn.Module, called: nn.Module, classes: int, distributed) -> Training:
    """Everything that a step uses, from the settings."""
    dtype = choose_precision(cfg.training.precision, distributed.device)
    scale = cfg.training.batch_size / 256
    return Training(
        model=called,
        optimizer=build_optimizer(cfg, model),
        scaler=torch.amp.GradScaler(distributed.device.type, enabled=dtype == torch.float16),
        ema=WeightAverage(model),
        loss=build_loss(cfg.training.loss, classes, cfg.training.label_smoothing),
        prepare=BatchTransforms(
            *(augment_of(cfg), *input_norm(model), classes),
            *(cfg.training.label_smoothing, cfg.training.seed),
        ),
        autocast=partial(
            torch.autocast, distributed.device.type, dtype, enabled=dtype != torch.float32
        ),
        lr_at_epoch=partial(
            lr_at,
            kind=cfg.lr.lr_schedule_type,
            epochs=cfg.training.epochs,
            peak_lr=cfg.lr.lr * scale,
            peak_epoch=cfg.lr.lr_peak_epoch,
            final_lr=cfg.lr.min_lr * scale,
            step_length=cfg.lr.step_length,
            step_ratio=cfg.lr.step_ratio,
            flat_fraction=cfg.lr.flat_fraction,
        ),
        decay_at_step=partial(ema_decay_at, decay=cfg.ema.decay, warmup=cfg.ema.warmup),
        seed_at_step=partial(step_seed, cfg.training.seed, distributed.rank),
        micro_batch=cfg.training.micro_batch_size
        or cfg.training.batch_size // distributed.world_size,
        clip_grad=cfg.training.clip_grad,
    )


@dataclass
class Run:
    """A run under way: what its epochs share."""

    cfg: object
    distributed: Distributed
    t: Training
    model: nn.Module  # raw
    loader: object  # training batches
    val_loader: object
    eval_model: nn.Module  # the network as called in evaluation
    state: dict  # where the run stands: runstate.FRESH
    last: int  # its last epoch, from 0
    save: object  # (state, best=False) -> None: writes last.pt, best.pt
    signals: SignalWatch
    watchdog: Watchdog
    log: RunLog
    bar: Progress


def run_epoch(run: Run) -> dict:
    """Train the epoch under way to its end; the log's training keys. `run.state` is kept current.

    Raises: Stopped, when the run is saved; ValueError: a loss is not finite.
    """
    cfg, t, state, distributed = run.cfg, run.t, run.state, run.distributed
    epoch, done, earlier = (state[key] for key in ("epoch", "step", "losses"))
    spent, waited_before = state["spent"], state["waited"]
    steps, resolution = len(run.loader), resolution_at(epoch, **vars(cfg.resolution))
    run.bar.epoch(epoch, cfg.training.epochs, resolution)
    start = time.perf_counter()

    def advance(losses: list[float]) -> None:
        now = {"step": done + len(losses), "losses": earlier + losses}
        state.update(now, spent=spent + time.perf_counter() - start)

    def show(step, loss, lr, seen, waited: float) -> None:
        state["waited"] = waited_before + waited
        run.bar.step(step, loss, lr, seen, waited)

    def pause_saves(losses: list[float]) -> None:
        advance(losses)
        run.save(state)

    last = min(steps, (cfg.training.max_steps or sys.maxsize) - epoch * steps)
    batches = islice(run.loader.epoch(epoch, resolution, done), last - done) if done < last else ()
    pause = StepMonitor(run.signals, distributed, cfg.training.checkpoint_minutes, pause_saves)
    first = epoch * steps + done
    watched = run.watchdog.watch(batches)
    losses, waited, _ = train_epoch(t, watched, first, steps, show, pause)
    advance(
        mean_losses(losses, first, distributed)
    )  # waits for the device, so that the clock is honest
    state["waited"] = waited_before + waited
    return {  # of the whole epoch, also where this process did only the end of it
        "epoch": epoch + 1,
        "train_loss": float(np.mean(state["losses"])),
        "lr": t.lr_at_epoch((epoch * steps + state["step"] - 1) / steps),
        "resolution": resolution,
        "images_per_second": state["step"] * cfg.training.batch_size / state["spent"],
        "data_wait_share": state["waited"] / state["spent"],
        "seconds": state["spent"],
    }


def end_epoch(run: Run, record: dict) -> dict:
    """Save, evaluate where it is due, write the log's line and save again; returns the line.

    An epoch without an evaluation has its losses in steps.jsonl, and no line in the log.

    Raises: Stopped, when a signal came in evaluation and the run is saved.
    """
    state, steps = run.state, len(run.loader)
    whole = state["step"] == steps  # else cut short by max_steps: a resumed run goes on inside it
    refuse_wild_weights(run.model, run.t, state)  # before its evaluation fails of it
    due = is_evaluated(state["epoch"], run.last, run.cfg.validation.every)
    if due:  # an evaluation that fails must not cost the epoch
        run.save(state)
    record |= evaluate_now(run) if due else {"eval_seconds": 0.0}
    total = state["seconds"] + record["seconds"] + record["eval_seconds"]
    record |= {"total_seconds": total, "memory_gb": peak_memory_gb(run.distributed.device)}
    run.log.write_steps(state["epoch"] * steps, state["losses"])
    if due:
        run.log.write(**record)
    if whole:
        best = max(state["best"], record.get("ema_top1", state["best"]))
        better = best > state["best"]
        state |= FRESH | {"epoch": state["epoch"] + 1, "losses": [], "best": best, "seconds": total}
        run.save(state, best=better)
    return record  # a signal that came meanwhile is obeyed after the next step, or the run ends


def evaluate_now(run: Run) -> dict:
    """The log's evaluation keys.

    Raises: Stopped, when a signal came meanwhile; the run is saved already.
    """
    network, start = (run.eval_model, run.model, run.t.ema), time.perf_counter()
    scores = evaluate_both(*network, watched_loader(run), run.cfg, run.t.autocast, run.distributed)
    return scores | {"eval_seconds": time.perf_counter() - start}


def samples_of(loader, distributed: Distributed) -> int:
    """Validation samples that every rank has; the first ranks may have one more."""
    return loader.num_samples // distributed.world_size


def watched_loader(run: Run):
    """The validation loader under guard: after a signal all ranks leave it at the same batch."""
    share = samples_of(run.val_loader, run.distributed)
    common = -(-share // run.cfg.validation.batch_size)  # batches that every rank has
    watch = partial(run.watchdog.watch, consensus=Consensus(run.distributed), common=common)
    return SimpleNamespace(batches=lambda *view: watch(run.val_loader.batches(*view)))


def train(cfg, distributed: Distributed) -> None:
    """The whole run: build, resume, epochs, final weights."""
    loader, val_loader = build_loaders(cfg, distributed)
    if cfg.model.checkpoint:
        check_classes(cfg.model.checkpoint, cfg.data.train_dataset, loader)
    model = build_model(cfg, loader.num_classes, distributed.device)
    called, called_eval = wrap_model(model, cfg, distributed)
    t = build_training(cfg, model, called, loader.num_classes, distributed)
    folder, settings = cfg.logging.folder, to_dict(cfg)
    data, steps = data_identity(loader, val_loader), len(loader)
    with (
        lock_folder(folder, distributed.is_main),
        closing(loader),
        closing(val_loader),
        SignalWatch() as signals,
        Watchdog(cfg.data.timeout, signals) as watchdog,
    ):
        asked = (cfg.training.resume, folder)
        state = restore_run(*asked, model, t, settings, data, defaults(), steps=steps)
        if distributed.is_main and cfg.training.resume == "auto":
            catch_up_best(folder, state)
        last_step = cfg.training.max_steps or sys.maxsize
        epochs = range(state["epoch"], min(cfg.training.epochs, -(-last_step // steps)))
        at = f"epoch {state['epoch']}"
        if cut := state["epoch"] * steps + state["step"] >= last_step:
            at = f"training.max_steps={last_step}"
        # an epoch whose steps are all done is evaluated before it counts as done
        if not epochs or (cut and state["step"] < steps and epoch_line(folder, state["epoch"] + 1)):
            refuse_finished_elsewhere(*asked, at)
            print(f"{folder} is finished, {at}: nothing to do")
            if distributed.is_main and not Path(folder, "summary.json").exists():  # killed before
                log = open_log(cfg, distributed)
                finish(cfg, log, t, loader, log.last())
            return
        try_evaluation(model, cfg.validation, samples_of(val_loader, distributed), t.autocast)
        prepare_network(cfg, model, called, t, epochs, distributed.device)
        log = open_log(cfg, distributed)
        log.truncate_after(state["epoch"])
        if distributed.is_main:
            print(
                opening_line(cfg, model, loader, val_loader, state, distributed.device), flush=True
            )
        done = steps * epochs[0] + state["step"]
        shown = (distributed.world_size, cfg.logging.progress, distributed.is_main)
        bar = Progress(steps * cfg.training.epochs, done, *shown)
        save = partial(save_run, folder, model, t, settings, data, distributed)
        network = (t, model, loader, val_loader, called_eval)
        run = Run(cfg, distributed, *network, state, epochs[-1], save, signals, watchdog, log, bar)
        for _ in epochs:
            record = end_epoch(run, run_epoch(run))
            bar.report(record)
        bar.close()
        if distributed.is_main:
            finish(cfg, log, t, loader, record)


def opening_line(cfg, model, loader, val_loader, state: dict, device) -> str:
    """What is trained on what, where, for how long, and from which step on."""
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    line = (
        f"{cfg.model.arch}, {weights:.1f} million weights, on {device.type}: "
        f"{loader.num_samples:,} images of {loader.num_classes:,} classes, "
        f"{val_loader.num_samples:,} to evaluate; "
        f"{cfg.training.epochs} epochs of {len(loader):,} steps; {cfg.logging.folder}"
    )
    if state["epoch"] or state["step"]:
        line += f"; goes on in epoch {state['epoch'] + 1} after step {state['step']}"
    return line


def prepare_network(cfg, model, called, t: Training, epochs, device: torch.device) -> None:
    """Try the network at every size of the run, and compile it for them where asked."""
    sides = sorted({resolution_at(epoch, **vars(cfg.resolution)) for epoch in epochs})
    try_network(model.train(), sides, t.micro_batch)
    if called is not model and hasattr(called, "_orig_mod"):  # compiled
        warm_up(partial(blank_step, t, device), model, sides)


def blank_step(t: Training, device: torch.device, side: int) -> None:
    """A forward and backward pass on noise, for compilation."""
    shape = (t.micro_batch, side, side, 3)
    noise = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.zeros(len(noise), dtype=torch.int64, device=device)
    forward_backward(t, noise, labels, np.arange(len(noise)), epoch=0, step=0)


def finish(cfg, log: RunLog, t: Training, loader, record: dict) -> None:
    """Final weights with what made them, curves and the summary line."""
    data = {"classes": loader.classes, "num_classes": loader.num_classes}
    info = run_info(to_dict(cfg), data, t.model) | {
        "weights": "moving average" if cfg.ema.decay else "raw",
        "config": redact_paths(to_dict(cfg)),
        "record": record,
    }
    save_weights(Path(cfg.logging.folder, "weights.safetensors"), t.ema.state_dict(), info)
    planned = cfg.training.epochs * len(loader)
    steps, trial = min(cfg.training.max_steps or planned, planned), ""
    if steps < planned:
        trial = f"a trial: {steps} of {planned} steps (training.max_steps)"
        record = record | {"cut_short": trial}
    log.finish(record)
    end = trial or f"epoch {record['epoch']}"
    end += f" after {record['total_seconds'] / 60:.1f} min"
    print(data_wait_line(record["data_wait_share"], steps, cfg.data.num_workers), end="")
    print(f"{summary_line(cfg, record)}; {end}; {cfg.logging.folder}/curves.png")


SHORT = 20  # steps of a run that says nothing about the loader: it starts up meanwhile


def data_wait_line(share: float, steps: int, workers: int) -> str:
    """What to change when more than a fifth of an epoch was waiting for data; else nothing.

    Args:
        share: of the last epoch's time.
        steps: of the run; the first batches of a short one wait for the loader's start.
        workers: data.num_workers; 0 uses every core already.
    """
    if share <= 0.2 or steps < SHORT:
        return ""
    more = "raise data.num_workers, " if 0 < workers < len(os.sched_getaffinity(0)) else ""
    return (
        f"{share:.0%} of the last epoch was waiting for data: {more}write "
        f"smaller images (write.max_side) or lighten section augment\n"
    )


def summary_line(cfg, record: dict) -> str:
    """Both protocols' top-1 in one line; of the moving average too when there is one."""
    v = cfg.validation
    views = {"plain_": f"plain {v.plain_resolution} px", "": f"{v.resolution} px"}
    views[""] += " + flip" if v.lr_tta else ""
    texts = []
    for key, view in views.items():
        ema = f" (EMA {record[f'ema_{key}top1']:.2f} %)" if cfg.ema.decay else ""
        texts.append(f"{record[f'{key}top1']:.2f} %{ema} {view}")
    return f"{cfg.model.arch}: top-1 {', '.join(texts)}"


def evaluate_file(cfg, distributed: Distributed) -> None:
    """Evaluate model.checkpoint under both protocols and print one line."""
    _, loader = build_loaders(cfg, distributed)
    check_classes(cfg.model.checkpoint, cfg.data.val_dataset, loader)
    model = build_model(cfg, loader.num_classes, distributed.device)
    dtype = choose_precision(cfg.training.precision, distributed.device)
    autocast = partial(
        torch.autocast, distributed.device.type, dtype, enabled=dtype != torch.float32
    )
    try_evaluation(model, cfg.validation, samples_of(loader, distributed), autocast)
    with closing(loader), SignalWatch(record=False), Watchdog(cfg.data.timeout) as watchdog:
        watched = SimpleNamespace(batches=lambda *view: watchdog.watch(loader.batches(*view)))
        scores = evaluate(model, watched, cfg, autocast, distributed.device)
    record = {"plain_top1": scores["plain"]["top1"], "top1": scores["configured"]["top1"]}
    cfg.ema.decay = 0.0  # a file holds one set of weights
    if distributed.is_main:
        which = f"{model.origin.weights} of {cfg.model.checkpoint}"
        print(f"{summary_line(cfg, record)}; {loader.num_samples} images; {which}")


def open_log(cfg, distributed: Distributed) -> RunLog:
    """The run's folder: settings, environment and log; rank 0 alone writes."""
    return RunLog(
        cfg.logging.folder,
        config=to_dict(cfg),
        resume=cfg.training.resume != "none",
        enabled=distributed.is_main,
        tensorboard=cfg.logging.tensorboard,
        wandb_project=cfg.logging.wandb,
    )


def main(cfg) -> None:
    """Train, or evaluate a file, as the settings say."""
    distributed = init_distributed()
    try:
        evaluate_file(cfg, distributed) if cfg.training.eval_only else train(cfg, distributed)
    except NotFinite as error:
        raise ValueError(f"{error}; {last_good(cfg.logging.folder)}") from error
    finally:
        distributed.close()


if __name__ == "__main__":
    with exit_statuses("train_imagenet.py"):
        main(CFG)
