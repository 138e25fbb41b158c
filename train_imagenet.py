"""Train a classifier on ImageNet, fast: the whole recipe in one file, read from top to bottom.

    python train_imagenet.py --config rn50_32_epochs_mild.yaml     one GPU
    torchrun --nproc_per_node=8 train_imagenet.py --config ...     eight: same global batch
    python train_imagenet.py --config ... --training.eval_only=1 --model.checkpoint=FILE

To change the recipe, edit a YAML (budget), STAGES in fast_imagenet/data/augmentation.py (the table
of augmentations), fast_imagenet/engine/schedules.py (shape of a schedule) or `train_step` here.
What the recipes reach is in README.md, one row per config.

Arrays: images_bhwc uint8 as loaded; images_bchw float, normalized, channels last; labels_b int64;
samples_b int64, what keys the draws of samples: their places in the file (and copies: rng.py).
"""

import sys
from pathlib import Path
from types import SimpleNamespace as Settings
from typing import Any

try:
    from fastargs import Config, Param, Section
except ModuleNotFoundError as missing:
    sys.exit(
        f"{missing} for {sys.executable}: `make setup` installs what is needed into .venv; "
        f"then run .venv/bin/python train_imagenet.py"
    )

from fast_imagenet.config import Bool, Int, Number, OffOr, OneOf, Str, read_config, to_dict
from fast_imagenet.data.augmentation import IMAGENET, MIX_ALPHAS, POLICIES, RESIZES, Augment
from fast_imagenet.engine.schedules import SCHEDULES
from fast_imagenet.engine.signals import exit_statuses, stop_at_once
from fast_imagenet.terminal import announce, ignore_broken_pipe
from fast_imagenet.validation import validate

# ── Settings: one YAML key each; every default is a working value ─────────────────────────────────

HERE = Path(__file__).resolve().parent
CONFIG_FOLDERS = [HERE / "rn50_configs", HERE / "rn18_configs", HERE / "imagenette_configs"]
SETTINGS = Config()

# fmt: off
Section("model", "the network", SETTINGS).params(
    arch=Param(Str(), "torchvision or timm name; timm/x forces the library", default="resnet50"),
    checkpoint=Param(Str(), "weights to start from or to evaluate", default=""),
    pretrained=Param(Bool(), "the same: the library's own weights, by arch", default=False),
    new_head=Param(Bool(), "of weights, keep the body and draw a new head", default=False),
    use_ema=Param(Bool(), "take a checkpoint's EMA weights, where it has them", default=True),
    normalization=Param(
        OneOf("auto", "imagenet", "inception", "clip", "none"),
        "mean and std of the images; auto = as the weights say, else ImageNet's",
        default="auto",
    ),
    init=Param(OneOf("library", "mosaic"), "whose fresh weights it has", default="library"),
    zero_init=Param(Bool(), "start residual branches at zero (last norm)", default=True),
    drop_path=Param(Number(0, 0.9), "stochastic depth, where the network has it", default=0.0),
)
Section("data", "where images come from", SETTINGS).params(
    train_dataset=Param(Str(), ".beton (torchvision: or a folder)", default="data/train.beton"),
    val_dataset=Param(Str(), ".beton (torchvision: or a folder)", default="data/val.beton"),
    num_workers=Param(Int(0), "loader workers per rank; 0 = an equal part of the cores", default=0),
    in_memory=Param(Bool(), "false: quasi-random order, for files beyond RAM", default=True),
    backend=Param(OneOf("ffcv", "torchvision"), "what loads and transforms", default="ffcv"),
    transforms=Param(OneOf("cpu", "gpu"), "where torchvision's transforms run", default="cpu"),
    resize=Param(OneOf(*RESIZES), "filter; auto: area, torchvision bilinear", default="auto"),
    check_pages=Param(Bool(), "verify each page's checksum when it is first read", default=True),
    timeout=Param(Number(1), "longest wait for a batch, seconds; then the run ends", default=300.0),
)
Section("resolution", "training resolution in pixels", SETTINGS).params(
    min_res=Param(Int(16, 1024), "resolution up to start_ramp", default=160),
    max_res=Param(Int(16, 1024), "resolution from end_ramp on", default=160),
    start_ramp=Param(Int(0), "last epoch (from 0) at min_res", default=0),
    end_ramp=Param(Int(0), "first epoch (from 0) at max_res", default=0),
    step=Param(Int(1, 1024), "between them, multiples of this; each one is compiled", default=32),
)
Section("lr", "learning rate, evaluated at every step", SETTINGS).params(
    lr=Param(Number(0), "peak, per 256 images of the global batch", default=0.125),
    lr_schedule_type=Param(OneOf(*SCHEDULES), "shape of the schedule", default="linear"),
    lr_peak_epoch=Param(Number(0), "end of the warm-up, epochs", default=2.0),
    warmup_start=Param(Number(0, 1), "first rate, fraction of the peak", default=1e-4),
    step_length=Param(Number(1e-3), "step: epochs between drops", default=30.0),
    step_ratio=Param(Number(0, 1), "step: factor of each drop", default=0.1),
    flat_fraction=Param(Number(0, 1), "flat_cosine: fraction before the decay", default=0.72),
    min_lr=Param(Number(0), "rate at the end, per 256 images", default=0.0),
    head_multiplier=Param(Number(0), "factor of the rate of the head", default=1.0),
    layer_decay=Param(Number(0.01, 1), "factor by layer, from the head down (timm)", default=1.0),
)
Section("training", "optimization", SETTINGS).params(
    epochs=Param(Int(1, 100_000), "length of the run", default=16),
    batch_size=Param(Int(1, 1_000_000), "images per step over ALL ranks", default=256),
    micro_batch_size=Param(Int(0), "images per forward pass and rank; 0 = all", default=0),
    optimizer=Param(Str(), "sgd, or any optimizer that timm names", default="sgd"),
    momentum=Param(Number(0, 1), "of SGD", default=0.9),
    nesterov=Param(Bool(), "Nesterov momentum (sgd)", default=False),
    weight_decay=Param(Number(0), "on weights of convolution and linear layers", default=1e-4),
    norm_weight_decay=Param(Number(0), "the same on norms and biases", default=0.0),
    label_smoothing=Param(Number(0, 1), "probability spread over all classes", default=0.1),
    loss=Param(OneOf("ce", "bce", "bce_mean"), "cross-entropy; binary: sum, mean", default="ce"),
    bce_threshold=Param(Number(0, 1), "targets above it are 1, others 0; 0 = off", default=0.0),
    clip_grad=Param(Number(0), "largest gradient norm; 0 = off", default=0.0),
    use_blurpool=Param(Bool(), "blur before strided convolutions", default=True),
    blur_max_pool=Param(Bool(), "BlurPool: blur after max pooling too", default=False),
    compile=Param(OneOf("auto", "on", "off"), "torch.compile; auto = on a GPU", default="auto"),
    precision=Param(OneOf("auto", "bf16", "fp16", "fp32"), "auto = by device", default="auto"),
    gradients=Param(OneOf("fp32", "bf16"), "how they cross the ranks (DDP)", default="fp32"),
    freeze=Param(Str(empty=False), "none, backbone or names as in conv1.*,bn1.*", default="none"),
    seed=Param(Int(0, 2**31), "weights, order, augmentation", default=0),
    resume=Param(Str(), "none, auto (last checkpoint of the folder) or a file", default="none"),
    eval_only=Param(Bool(), "evaluate model.checkpoint and stop", default=False),
    dry_run=Param(Bool(), "check data, network, memory, sizes, and stop", default=False),
    checkpoint_minutes=Param(Number(0), "between checkpoints in an epoch; 0 = none", default=10.0),
    max_steps=Param(Int(0), "smoke run: end after so many steps; 0 = no limit", default=0),
)
Section("augment", "random changes to training images", SETTINGS).params(
    crop_min_area=Param(Number(0.001, 1), "smallest crop, fraction of the area", default=0.08),
    crop_max_area=Param(Number(0.001, 1), "largest crop, fraction of the area", default=1.0),
    flip=Param(Number(0, 1), "probability of a horizontal flip", default=0.5),
    flip_mode=Param(OneOf("random", "alternating"), "or every second epoch", default="random"),
    repeats=Param(Int(1, 100), "copies of an image in an epoch, which is as long", default=1),
    policy=Param(OneOf(*POLICIES), "random operations; lite: the fast ones", default="none"),
    policy_ops=Param(Int(1, 14), "rand_augment: operations per image", default=2),
    policy_magnitude=Param(Number(0, 30), "their strength, 0 to 30; timm: 0 to 10", default=9.0),
    policy_mstd=Param(Number(0, 10), "standard deviation of the strength", default=0.0),
    brightness=Param(Number(0, 10), "jitter: factor 1 - x to 1 + x; 0 = off", default=0.0),
    contrast=Param(Number(0, 10), "jitter: factor 1 - x to 1 + x; 0 = off", default=0.0),
    saturation=Param(Number(0, 10), "jitter: factor 1 - x to 1 + x; 0 = off", default=0.0),
    hue=Param(Number(0, 0.5), "jitter: shift, fraction of the circle; 0 = off", default=0.0),
    grayscale=Param(Number(0, 1), "probability of grayscale", default=0.0),
    solarize=Param(Number(0, 1), "probability of inverted highlights", default=0.0),
    blur=Param(Number(0, 1), "probability of a blur, radius 0.1 to 2 px", default=0.0),
    erasing=Param(Number(0, 1), "probability of erased boxes", default=0.0),
    erasing_mode=Param(OneOf("const", "rand", "pixel"), "mean color or noise", default="const"),
    erasing_count=Param(Int(1, 100), "largest number of boxes per image", default=1),
    mixup=Param(OffOr(*MIX_ALPHAS), "alpha of Mixup; 0 = off", default=0.0),
    cutmix=Param(OffOr(*MIX_ALPHAS), "alpha of CutMix; 0 = off", default=0.0),
    mix_by=Param(OneOf("step", "pass"), "both draw once for each", default="step"),
)
Section("ema", "exponential moving average (EMA) of the weights", SETTINGS).params(
    decay=Param(Number(0, 0.9999999), "per step; 0 = off: the EMA is the raw weights", default=0.0),
    warmup=Param(Bool(), "let the decay grow to its target", default=True),
    every=Param(Int(1), "steps between updates, each by decay ** every", default=1),
)
Section("validation", "standard eval (one center crop, no flip) and config eval", SETTINGS).params(
    every=Param(Int(1), "epochs between evaluations; the last always has one", default=1),
    resolution=Param(Int(16, 1024), "config eval: resolution in pixels", default=224),
    crop_ratio=Param(Number(0.1, 1), "config eval: crop / shorter side", default=0.875),
    lr_tta=Param(Bool(), "config eval: average with the mirrored image", default=False),
    plain_resolution=Param(Int(16, 1024), "standard eval: resolution in pixels", default=224),
    plain_crop_ratio=Param(Number(0.1, 1), "standard eval: crop / shorter side", default=0.875),
    batch_size=Param(Int(1, 1_000_000), "images per forward pass and rank", default=256),
)
Section("logging", "what a run leaves", SETTINGS).params(
    folder=Param(Str(empty=False), "of the run, for all its files", default="runs/default"),
    wandb=Param(Str(), "Weights & Biases project; empty = off", default=""),
    tensorboard=Param(Bool(), "TensorBoard files, if it is installed", default=True),
    progress=Param(Bool(), "live bar on a terminal; false: a line per epoch", default=True),
    eval_json=Param(Str(), "file for eval_only: every class; empty = off", default=""),
)
# fmt: on


def read_settings(argv: list[str] | None = None) -> Settings:
    """Settings from YAML files and flags; all mistakes are reported together, exit status 2."""
    return read_config(
        SETTINGS,
        argv,
        search=CONFIG_FOLDERS,
        check=validate,
        prog="train_imagenet.py",
        description="Train a classifier on ImageNet from .beton files.",
        switches={"--dry-run": "--training.dry_run=true"},
    )


def defaults() -> dict:
    """Every setting without a file or a flag: section -> {key: value}."""
    return to_dict(read_config(SETTINGS, [], prog="train_imagenet.py", description=""))


if __name__ == "__main__":
    ignore_broken_pipe()
    stop_at_once()
    CFG = read_settings()  # before the heavy imports: a misspelt key must not cost ten seconds
    announce("importing PyTorch and FFCV: about 10 s")

from collections.abc import Iterable, Mapping
from contextlib import closing, nullcontext
from functools import partial

import torch
from torch import nn

from fast_imagenet.data.class_lists import check_loaders
from fast_imagenet.data.device_transforms import BatchTransforms, mix_keys
from fast_imagenet.engine.distributed import (
    Distributed,
    autocast_of,
    choose_precision,
    full_precision,
    init_distributed,
)
from fast_imagenet.engine.ema import WeightAverage
from fast_imagenet.engine.evaluation import ClassScore, report_evaluation
from fast_imagenet.engine.losses import build_loss
from fast_imagenet.engine.metrics import Score, evaluation_record
from fast_imagenet.engine.optimizers import build_optimizer
from fast_imagenet.engine.run import Run, StepRecorder
from fast_imagenet.engine.schedules import ema_decay_at, lr_schedule, resolution_at
from fast_imagenet.engine.signals import SignalWatch
from fast_imagenet.engine.train_state import (
    Autocast,
    Batch,
    EvalBatches,
    Networks,
    TrainState,
)
from fast_imagenet.engine.watchdog import Watchdog
from fast_imagenet.models.blurpool import apply_blurpool
from fast_imagenet.models.factory import (
    create_model,
    init_mosaic,
    start_improbable,
    try_evaluation,
    zero_init_residual,
)
from fast_imagenet.models.fine_tuning import freeze, lr_scales, take_weights
from fast_imagenet.models.networks import ImageNetwork, build_networks, is_compiled
from fast_imagenet.models.origin import (
    bring_view,
    check_classes,
    input_norm,
    new_origin,
    origin_of,
    weights_of,
)
from fast_imagenet.models.small_maps import use_small_maps
from fast_imagenet.rng import step_seed

MEAN, STD = IMAGENET

# ── Data ──────────────────────────────────────────────────────────────────────────────────────────


def build_loaders(cfg: Settings, distributed: Distributed) -> tuple[Any, Any]:
    """Training loader (None when only evaluating) and validation loader of the chosen backend."""
    rank, world_size, device = distributed.rank, distributed.world_size, distributed.device
    common = dict(rank=rank, world_size=world_size, device=device, check_pages=cfg.data.check_pages)
    common["num_workers"] = distributed.workers(cfg.data.num_workers)
    backend: Any
    if cfg.data.backend == "ffcv":
        from fast_imagenet.data import ffcv_loader as backend

        common["in_memory"] = cfg.data.in_memory
    else:
        from fast_imagenet.data import torch_loader as backend

        common["transforms"] = cfg.data.transforms
    train, val_size = None, cfg.validation.batch_size
    val = backend.EvalLoader(
        cfg.data.val_dataset, batch_size=val_size, resize=cfg.data.resize, **common
    )
    if not cfg.training.eval_only:
        train = backend.TrainLoader(
            cfg.data.train_dataset,
            global_batch=cfg.training.batch_size,
            seed=cfg.training.seed,
            augment=augment_of(cfg),
            **common,
        )
    check_loaders(cfg.data.train_dataset, train, cfg.data.val_dataset, val, distributed.is_main)
    return train, val


def augment_of(cfg: Settings) -> Augment:
    """Section `augment` and `data.resize`, as loaders and BatchTransforms take them."""
    values = dict(vars(cfg.augment))
    area = (values.pop("crop_min_area"), values.pop("crop_max_area"))
    return Augment(crop_area=area, resize=cfg.data.resize, **values)


# ── Model ─────────────────────────────────────────────────────────────────────────────────────────


def build_model(cfg: Settings, num_classes: int, device: torch.device) -> nn.Module:
    """The raw network on its device, channels last, initialized, with BlurPool and checkpoint."""
    torch.manual_seed(cfg.training.seed)
    model: Any = create_model(cfg.model.arch, num_classes, cfg.model.drop_path)
    if cfg.model.init == "mosaic":
        init_mosaic(model)
    if cfg.model.zero_init:
        zero_init_residual(model)
    if cfg.training.loss == "bce":
        start_improbable(model, num_classes)
    origin, weights = new_origin(cfg), None
    if cfg.model.checkpoint or cfg.model.pretrained:
        weights, info = weights_of(cfg)
        origin = origin_of(info, cfg)
    if origin.blurpool:
        apply_blurpool(model, origin.blur_max_pool)
    if device.type == "cpu":
        use_small_maps(model)
    if weights is not None:
        name = cfg.model.checkpoint or "model.pretrained"
        origin.report(take_weights(model, weights, cfg.model, num_classes, name))
    freeze(model, cfg.training.freeze, num_classes)
    model.input_norm, model.origin = (origin.mean, origin.std), origin
    return model.to(device, memory_format=torch.channels_last)


def wrap_model(model: nn.Module, cfg: Settings, distributed: Distributed) -> Networks:
    """The network, and as called in training and evaluation: distributed, compiled when asked."""
    return build_networks(model, distributed, cfg.training.compile, cfg.training.gradients)


# ── State ─────────────────────────────────────────────────────────────────────────────────────────


def build_state(
    cfg: Settings, networks: Networks, num_classes: int, steps: int, distributed: Distributed
) -> TrainState:
    """Everything that a step uses, from the settings; `steps` of an epoch."""
    options, norm = cfg.training, input_norm(networks.model)
    scales = lr_scales(networks.model, cfg.lr, num_classes)
    dtype = choose_precision(options.precision, distributed.device)
    smoothing = options.label_smoothing
    as_tensor = is_compiled(networks.train_model) or distributed.device.type == "cuda"
    how = (num_classes, smoothing, options.seed)
    transforms = BatchTransforms(augment_of(cfg), *norm, *how, as_tensor=as_tensor)
    return TrainState(
        *networks,
        optimizer=build_optimizer(options, networks.model, scales),
        scaler=torch.amp.GradScaler(distributed.device.type, enabled=dtype == torch.float16),
        ema=WeightAverage(networks.model, enabled=cfg.ema.decay > 0),
        loss=build_loss(options.loss, num_classes, smoothing, options.bce_threshold),
        prepare=transforms.inputs,
        autocast=autocast_of(dtype, distributed.device),
        lr_at_epoch=lr_schedule(cfg.lr, options.epochs, options.batch_size / 256),
        decay_at_step=partial(ema_decay_at, **vars(cfg.ema)),
        seed_at_step=partial(step_seed, options.seed, distributed.rank),
        draw_at=mix_keys(cfg.augment.mix_by, distributed.rank, distributed.world_size),
        steps_per_epoch=steps,
        micro_batch=options.micro_batch_size or options.batch_size // distributed.world_size,
        clip_grad=options.clip_grad,
    )


# ── Step ──────────────────────────────────────────────────────────────────────────────────────────


def train_step(state: TrainState, batch: Batch, step: int) -> tuple[torch.Tensor, float]:
    """One step of the optimizer, not waiting for the device; (mean loss, learning rate)."""
    if state.draws:  # stochastic depth, dropout
        torch.manual_seed(state.seed_at_step(step))
    loss = forward_backward(state, batch, step)
    if state.clip_grad:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.train_model.parameters(), state.clip_grad)
    lr = state.lr_at_epoch(step / state.steps_per_epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.decay_at_step(step + 1))
    return loss, lr


def forward_backward(state: TrainState, batch: Batch, step: int) -> torch.Tensor:
    """Gradients of a rank's batch, in micro-batches; its mean loss, not waiting for the device."""
    images_bhwc, labels_b, samples_b = batch
    total = torch.zeros((), device=labels_b.device)
    micro, model = state.micro_batch, state.train_model
    samples = [samples_b[first : first + micro] for first in range(0, len(labels_b), micro)]
    parts = list(zip(images_bhwc.split(micro), labels_b.split(micro), samples, strict=True))
    for number, (images, labels, keys) in enumerate(parts, 1):
        epoch = step // state.steps_per_epoch
        draw = state.draw_at(step, number - 1, len(parts))
        inputs, targets = state.prepare(images, labels, keys, epoch, draw)
        # gradients cross the ranks once per step, with the last part
        quiet = number < len(parts) and hasattr(model, "no_sync")
        with model.no_sync() if quiet else nullcontext():
            with state.autocast():
                loss = state.loss(model(*inputs).float(), targets)
            fraction = len(labels) / len(labels_b)
            state.scaler.scale(loss * fraction).backward()
        total += loss.detach() * fraction
    return total


def train_epoch(state: TrainState, batches: Iterable[Batch], run: StepRecorder) -> None:
    """The steps of an epoch, or the rest of them, from number `run.first_step` of the run on."""
    state.train_model.train()
    for step, batch in enumerate(batches, run.first_step):
        loss, lr = train_step(state, batch, step)
        run.after_step(step, loss, lr, images=len(batch[1]))


# ── Evaluate ──────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: EvalBatches,
    cfg: Settings,
    autocast: Autocast,
    device: torch.device,
    scores: Mapping[str, Score] | None = None,
) -> dict[str, dict[str, float]]:
    """Both evaluations: {'standard': {loss, top1, top5}, 'config': ...}; one pass per crop."""
    model.eval()
    v = cfg.validation
    standard, config = (v.plain_resolution, v.plain_crop_ratio), (v.resolution, v.crop_ratio)
    scores = scores or {"standard": Score(device), "config": Score(device)}
    for view in dict.fromkeys((standard, config)):
        for images_bhwc, labels_b in batches(*view):
            with autocast():
                logits_bk = model(images_bhwc).float()
                mirrored = view == config and v.lr_tta
                flipped = model(images_bhwc.flip(2)).float() if mirrored else logits_bk
            if view == standard:
                scores["standard"].add(logits_bk, labels_b)
            if view == config:
                scores["config"].add((logits_bk + flipped) / 2, labels_b)
    return {name: score.read() for name, score in scores.items()}


def evaluate_both(
    state: TrainState, batches: EvalBatches, cfg: Settings, distributed: Distributed, last: bool
) -> dict[str, float]:
    """The log's evaluation keys: of the EMA where there is one; in the last one, which is in fp32,
    of the raw weights too."""
    distributed.average_statistics(state)
    autocast = full_precision if last else state.autocast
    common = (state.eval_model, batches, cfg, autocast, distributed.device)
    raw = evaluate(*common) if last or not cfg.ema.decay else None
    if raw is not None and not cfg.ema.decay:
        return evaluation_record(raw, raw)
    with state.ema.applied():
        return evaluation_record(raw, evaluate(*common))


# ── Train ─────────────────────────────────────────────────────────────────────────────────────────


def train(cfg: Settings, distributed: Distributed) -> None:
    """The whole run: build, resume, epochs, final weights."""
    loader, val_loader = build_loaders(cfg, distributed)
    check_classes(cfg, cfg.data.train_dataset, loader)
    model = build_model(cfg, loader.num_classes, distributed.device)
    networks = wrap_model(model, cfg, distributed)
    state = build_state(cfg, networks, loader.num_classes, len(loader), distributed)
    with Run(cfg, distributed, state, loader, val_loader, defaults()) as run:
        run.prepare(forward_backward)
        for epoch in run.epochs():
            resolution = resolution_at(epoch, **vars(cfg.resolution))
            train_epoch(state, run.batches(resolution), run)
            run.end_training()  # losses and weights are finite, and saved before an evaluation
            scores = {}
            if run.evaluates(epoch):
                last = epoch + 1 == cfg.training.epochs  # not where max_steps cuts a run short
                scores = evaluate_both(state, run.val_batches, cfg, distributed, last)
            run.end_epoch(scores)
        run.finish()


# ── Main ──────────────────────────────────────────────────────────────────────────────────────────


def evaluate_file(cfg: Settings, distributed: Distributed) -> None:
    """Evaluate model.checkpoint with both evaluations and print a table."""
    _, loader = build_loaders(cfg, distributed)
    check_classes(cfg, cfg.data.val_dataset, loader)
    device = distributed.device
    model: Any = build_model(cfg, loader.num_classes, device)
    autocast = autocast_of(choose_precision(cfg.training.precision, device), device)
    try_evaluation(model, cfg.validation, loader.num_samples // distributed.world_size, autocast)
    announce(f"evaluating {loader.num_samples:,} images")
    with closing(loader), SignalWatch(record=False), Watchdog(cfg.data.timeout) as watchdog:
        batches = watchdog.watched(loader.batches)
        both = {view: ClassScore(device, loader.num_classes) for view in ("standard", "config")}
        scores = evaluate(ImageNetwork(model), batches, cfg, autocast, device, both)
    counts = {view: score.read_classes() for view, score in both.items()}
    if distributed.is_main:
        report_evaluation(cfg, scores, counts, loader, model.origin.weights)


def main(cfg: Settings) -> None:
    """Train, or evaluate weights, as the settings say."""
    bring_view(cfg)
    with closing(init_distributed()) as distributed:
        evaluate_file(cfg, distributed) if cfg.training.eval_only else train(cfg, distributed)


if __name__ == "__main__":
    with exit_statuses("train_imagenet.py"):
        main(CFG)
