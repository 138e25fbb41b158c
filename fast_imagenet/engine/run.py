"""What surrounds a training loop: lock, restore, log, progress bar, checkpoints, signals, summary.

with Run(cfg, distributed, state, loader, val_loader, defaults) as run:
    run.prepare(forward_backward)
    for epoch in run.epochs():
        train_epoch(state, run.batches(resolution), run)
        run.end_training()
        run.end_epoch(evaluate_both(...) if run.evaluates(epoch) else {})
    run.finish()
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import torch

from fast_imagenet.config import to_dict
from fast_imagenet.engine.distributed import Consensus, Distributed
from fast_imagenet.engine.dry_run import ForwardBackward, try_memory
from fast_imagenet.engine.evaluation import view_title, views_of
from fast_imagenet.engine.finite import NotFinite, mean_losses
from fast_imagenet.engine.json_lines import epoch_line
from fast_imagenet.engine.logger import RunLog
from fast_imagenet.engine.progress import Progress, accuracy_text, peak_memory_gb
from fast_imagenet.engine.run_lock import lock_folder
from fast_imagenet.engine.run_state import (
    Position,
    RunCheckpoints,
    data_identity,
    fork_log,
    last_checkpoint,
    refuse_finished_without_log,
)
from fast_imagenet.engine.schedules import is_evaluated, resolution_at
from fast_imagenet.engine.signals import SignalWatch
from fast_imagenet.engine.train_state import Batch, EvalBatches, TrainState
from fast_imagenet.engine.watchdog import Watchdog
from fast_imagenet.engine.weights import save_weights
from fast_imagenet.environment import redact_paths
from fast_imagenet.models.factory import prepare_network, try_evaluation

FINITE_STEPS = 50  # reading the losses waits for the device
SHOWN = 16  # images of the first batch, for trackers
SHORT = 20  # steps of a run that says nothing about the loader: it starts up meanwhile


class StepRecorder:
    """What `train_epoch` reports its steps to.

    Attributes:
        first_step: number of the first step since the start of the run.
        losses: of this rank, one per step, on the device.
        images: that this rank has seen.
    """

    def __init__(self, first_step: int = 0) -> None:
        self.first_step, self.images = first_step, 0
        self.losses: list[torch.Tensor] = []

    def after_step(self, step: int, loss: torch.Tensor, lr: float, images: int) -> None:
        """Called after every step, with its number since the start of the run."""
        self.losses.append(loss)
        self.images += images


class StepMonitor:
    """Called after every step: checks the losses, saves from time to time, stops on request.

    Args:
        signals: whose signal is obeyed.
        distributed: all ranks stop at the same step.
        minutes: between checkpoints inside an epoch; 0 = none.
        save: called with the mean loss of every step since the start of this process's epoch.
    """

    def __init__(
        self,
        signals: SignalWatch,
        distributed: Distributed,
        minutes: float,
        save: Callable[[list[float]], None],
    ) -> None:
        self._signals, self._distributed, self._save = signals, distributed, save
        self._consensus = Consensus(distributed)
        self._seconds = 60 * minutes or math.inf
        self._due = time.monotonic() + self._seconds

    def __call__(self, step: int, losses: list[torch.Tensor]) -> list[float]:
        """After `step` steps of the run; losses: of this rank, one per step since its last start.

        Returns: the means over the ranks, where they were read anyway; else nothing.
        Raises:
            Stopped: a signal came and the run is saved.
            NotFinite: a loss is not finite; nothing is saved.
        """
        due = time.monotonic() >= self._due
        request = self._consensus.ask(2 if self._signals.received else int(due))
        if not request and step % FINITE_STEPS:
            return []
        means = mean_losses(losses, step - len(losses), self._distributed)
        if request:
            self._save(means)
            self._due = time.monotonic() + self._seconds
        if request == 2:
            raise self._signals.stopped()
        return means


class Run(StepRecorder):
    """A run under way; all methods are called by every rank, in the order of the module's example.

    Entering it locks the folder, restores the run so far and refuses what cannot work, before
    anything is written; leaving it closes the loaders.

    Args:
        cfg: all settings.
        distributed: the ranks that train together.
        state: restored and saved.
        loader, val_loader: of the chosen backend.
        defaults: of all settings, for a checkpoint from before one of them was there.
    Attributes:
        remaining: epochs, from 0, that are left to train or evaluate.
        position: where the run stands.
    Raises:
        ValueError: when entered: the run cannot be resumed, or its folder is in use; the network
            cannot be evaluated. When left: a loss or a weight was not finite.
        Stopped: by a signal, after a step or in an evaluation; the run is saved.
    """

    def __init__(
        self,
        cfg: SimpleNamespace,
        distributed: Distributed,
        state: TrainState,
        loader: Any,
        val_loader: Any,
        defaults: dict[str, Any],
    ) -> None:
        super().__init__()
        self.cfg, self.distributed, self.state = cfg, distributed, state
        self.loader, self.val_loader, self.steps = loader, val_loader, len(loader)
        self.folder, self._defaults = Path(cfg.logging.folder), defaults
        self._last_step = cfg.training.max_steps or sys.maxsize
        data = data_identity(loader, val_loader)
        self._checkpoints = RunCheckpoints(self.folder, state, to_dict(cfg), data, distributed)
        self._log: RunLog | None = None
        self._first_images: torch.Tensor | None = None  # until they are shown
        self._record: dict[str, Any] = {}

    def __enter__(self) -> Run:
        cfg = self.cfg
        with ExitStack() as stack:
            stack.enter_context(lock_folder(self.folder, self.distributed.is_main))
            stack.enter_context(closing(self.loader))
            stack.enter_context(closing(self.val_loader))
            self.signals = stack.enter_context(SignalWatch())
            self.watchdog = stack.enter_context(Watchdog(cfg.data.timeout, self.signals))
            resume = cfg.training.resume
            self.position = self._checkpoints.restore(resume, self.steps, self._defaults)
            self.remaining = self._remaining_epochs()
            if self.remaining:
                samples, autocast = self._val_samples(), self.state.autocast
                try_evaluation(self.state.model, cfg.validation, samples, autocast)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if isinstance(error, NotFinite):
            raise ValueError(f"{error}; {last_checkpoint(self.folder)}") from error

    def _val_samples(self) -> int:
        """Validation samples that every rank has; the first ranks may have one more."""
        return self.val_loader.num_samples // self.distributed.world_size

    def _remaining_epochs(self) -> range:
        """An epoch whose steps are all done is evaluated before it counts as done."""
        where, last, cfg = self.position, self._last_step, self.cfg.training
        epochs, at = range(where.epoch, min(cfg.epochs, -(-last // self.steps))), ""
        if where.epoch * self.steps + where.step >= last:
            at = f"training.max_steps={last}"
        logged = where.step < self.steps and epoch_line(self.folder, where.epoch + 1)
        if epochs and not (at and logged):
            return epochs
        at = at or f"epoch {where.epoch}"
        refuse_finished_without_log(cfg.resume, self.folder, at)
        more = "" if "=" in at else "; a larger training.epochs makes it longer, where its schedule"
        print(f"{self.folder} is finished, {at}: nothing to do{more}{' allows' * bool(more)}")
        return range(0)

    def prepare(self, forward_backward: ForwardBackward) -> None:
        """Try and compile the network for all sizes to come, before the clock starts.

        A dry run tries the rest, too, and has no epochs to do.

        Raises: ValueError: as prepare_network; in a dry run as try_memory.
        """
        if self.remaining:
            v, samples = self.cfg.validation, self.val_loader.num_samples
            sizes = {resolution_at(e, **vars(self.cfg.resolution)) for e in self.remaining}
            mine = len(range(self.distributed.rank, samples, self.distributed.world_size))
            evaluated = (v.plain_resolution, v.resolution), max(1, min(v.batch_size, mine))
            prepare_network(self.state, sizes, forward_backward, *evaluated)
            if self.cfg.training.dry_run:
                self._end_dry_run(sizes, forward_backward)

    def _end_dry_run(self, sizes: set[int], forward_backward: ForwardBackward) -> None:
        """A batch of each file, and the largest step; the state is of no use afterwards."""
        v, where, self.remaining = self.cfg.validation, self.position, range(0)
        first = min(where.step, self.steps - 1)
        for batches in (
            self.loader.epoch(where.epoch, max(sizes), first),
            self.val_loader.batches(v.resolution, v.crop_ratio),
        ):
            with closing(batches):
                next(self.watchdog.watch(batches))
        memory = try_memory(
            self.state, max(sizes), forward_backward, self.distributed.ranks_on_node
        )
        if self.distributed.is_main:
            pixels = ", ".join(map(str, sorted(sizes)))
            print(f"would run: {self._first_line()}")
            print(
                f"dry run: both files give batches, the network takes {pixels} px and is evaluated "
                f"at {v.plain_resolution} and {v.resolution} px; {memory}; nothing was written"
            )

    def epochs(self) -> Iterator[int]:
        """The remaining epochs; opens the log before the first."""
        if not self.remaining:
            return
        cfg, is_main, where = self.cfg, self.distributed.is_main, self.position
        resumed = Path(cfg.training.resume)
        if cfg.training.resume not in ("none", "auto") and resumed.parent != self.folder:
            self._checkpoints.save(where, best=resumed.name == "best.pt")
            if is_main:
                fork_log(resumed, self.folder)
        self._log = open_log(cfg, self.distributed, self.steps)
        self._log.truncate_after(where.epoch)
        if is_main:
            print(self._first_line(), flush=True)
        done, total = where.epoch * self.steps + where.step, self.steps * cfg.training.epochs
        ranks, shown = self.distributed.world_size, cfg.logging.progress
        self._bar = Progress(total, done, ranks, shown, is_main)
        yield from self.remaining
        self._bar.close()

    def _first_line(self) -> str:
        """What is trained on what, where, for how long, and from which step on."""
        cfg, where = self.cfg, self.position
        weights = sum(p.numel() for p in self.state.model.parameters()) / 1e6
        line = (
            f"{cfg.model.arch}, {weights:.1f} million weights, on {self.distributed.device.type}: "
            f"{self.loader.num_samples:,} images of {self.loader.num_classes:,} classes, "
            f"{self.val_loader.num_samples:,} to evaluate; "
            f"{cfg.training.epochs} epochs of {self.steps:,} steps; {cfg.logging.folder}"
        )
        if where.epoch or where.step:
            line += f"; resumes in epoch {where.epoch + 1} after step {where.step}"
        return line

    def batches(self, resolution: int) -> Iterator[Batch]:
        """The batches of the epoch under way that are left, none waited for without a limit."""
        where, cfg = self.position, self.cfg.training
        self.first_step = where.epoch * self.steps + where.step
        self.losses, self.images, self.watchdog.waited = [], 0, 0.0
        self._resumed, self._start = replace(where), time.perf_counter()
        self._record = {"resolution": resolution}
        self._bar.epoch(where.epoch, cfg.epochs, resolution)
        minutes = cfg.checkpoint_minutes
        self._monitor = StepMonitor(self.signals, self.distributed, minutes, self._save_inside)
        last = min(self.steps, self._last_step - where.epoch * self.steps)
        if where.step >= last:
            return iter(())
        batches = self.loader.epoch(where.epoch, resolution, where.step)
        batches = self.watchdog.watch(islice(batches, last - where.step))
        tracked = self._log is not None and self._log.follows_steps
        return self._keep_images(batches) if tracked and not self.first_step else batches

    def _keep_images(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of a run's first epoch; a few images of the first are kept for trackers."""
        for number, batch in enumerate(batches):
            if number == 0:
                count = min(SHOWN, math.isqrt(len(batch[0])) ** 2)
                # a copy on its device: the loader fills this memory again
                self._first_images = batch[0][:count].clone()
            yield batch

    def after_step(self, step: int, loss: torch.Tensor, lr: float, images: int) -> None:
        """As StepRecorder; updates the bar, and saves or stops the run when it is time.

        Raises: Stopped, NotFinite.
        """
        super().after_step(step, loss, lr, images)
        self._bar.step(step, loss, lr, self.images, self.watchdog.waited)
        if means := self._monitor(step + 1, self.losses):
            self._report(step + 1, means, lr)

    def _report(self, step: int, means: list[float], lr: float) -> None:
        """Values of the last steps, for trackers; the device has just been waited for."""
        if not self._log or not self._log.follows_steps:
            return
        if self._first_images is not None:
            self._log.show_images(self._first_images.cpu().numpy())
            self._first_images = None
        spent = time.perf_counter() - self._start
        rate = self.images * self.distributed.world_size / spent
        loss = float(np.mean(means[-FINITE_STEPS:]))
        self._log.log_step(step, loss=loss, lr=lr, images_per_second=rate)

    def _advance(self, means: list[float]) -> None:
        where, resumed = self.position, self._resumed
        where.step, where.losses = resumed.step + len(means), resumed.losses + means
        where.spent = resumed.spent + time.perf_counter() - self._start
        where.waited = resumed.waited + self.watchdog.waited

    def _save_inside(self, means: list[float]) -> None:
        self._advance(means)
        self._checkpoints.save(self.position)

    def end_training(self) -> None:
        """After the steps of an epoch: the losses are read; an epoch to be evaluated is saved.

        Raises: NotFinite, of a loss or a weight.
        """
        # waits for the device, so that the clock is honest
        means = mean_losses(self.losses, self.first_step, self.distributed)
        self._advance(means)
        where, batch = self.position, self.cfg.training.batch_size
        last_step = where.epoch * self.steps + where.step - 1
        if means and (last_step + 1) % FINITE_STEPS:  # else reported already
            self._report(last_step + 1, means, self.state.lr_at_epoch(last_step / self.steps))
        self._record = {  # of the whole epoch, also where this process did only the end of it
            "epoch": where.epoch + 1,
            "train_loss": float(np.mean(where.losses)),
            "lr": self.state.lr_at_epoch(last_step / self.steps),
            **self._record,
            "images_per_second": where.step * batch / where.spent,
            "data_wait_share": where.waited / where.spent,
            "seconds": where.spent,
        }
        self._checkpoints.refuse_not_finite(where)  # before its evaluation fails of it
        if self.evaluates(where.epoch):  # an evaluation that fails must not cost the epoch
            self._checkpoints.save(where)
            self._bar.evaluating()
        self._start = time.perf_counter()

    def evaluates(self, epoch: int) -> bool:
        """Whether an evaluation follows this epoch."""
        return is_evaluated(epoch, self.remaining[-1], self.cfg.validation.every)

    @property
    def val_batches(self) -> EvalBatches:
        """The passes of one evaluation; after a signal all ranks leave it at the same batch."""
        common = -(-self._val_samples() // self.cfg.validation.batch_size)  # that every rank has
        return self.watchdog.watched(self.val_loader.batches, Consensus(self.distributed), common)

    def end_epoch(self, scores: dict[str, float]) -> None:
        """Write the log's line and save.

        An epoch without an evaluation has its losses in steps.jsonl, and no line in the log. A
        signal that came meanwhile is obeyed after the next step, or the run ends.

        Args: scores: evaluation keys of the log; {} without an evaluation.
        """
        assert self._log is not None
        where = self.position
        seconds = time.perf_counter() - self._start if scores else 0.0
        total = where.seconds + self._record["seconds"] + seconds
        self._record |= {**scores, "eval_seconds": seconds, "total_seconds": total}
        self._record["memory_gb"] = peak_memory_gb(self.distributed.device)
        self._log.write_steps(where.epoch * self.steps, where.losses)
        if scores:
            self._record = self._log.write(**self._record)
        if where.step == self.steps:  # else cut short by max_steps: it is resumed inside the epoch
            best = max(where.best, scores.get("ema_top1", where.best))
            better = best > where.best
            self.position = Position(epoch=where.epoch + 1, best=best, seconds=total)
            self._checkpoints.save(self.position, best=better)
        self._bar.report(self._record)

    def finish(self) -> None:
        """Final files and the summary line; of a finished run, where they are missing."""
        if not self.distributed.is_main or self.cfg.training.dry_run:
            return
        if self._log is None:
            if (self.folder / "summary.json").exists():
                return
            # killed before it had written them
            self._log = open_log(self.cfg, self.distributed, self.steps)
            self._record = self._log.last()
        write_final_files(self.cfg, self._log, self._checkpoints, self.steps, self._record)


def open_log(cfg: SimpleNamespace, distributed: Distributed, steps: int) -> RunLog:
    """The run's folder: settings, environment and log; rank 0 alone writes."""
    resume, enabled = cfg.training.resume != "none", distributed.is_main
    options: dict[str, Any] = dict(resume=resume, enabled=enabled, steps=steps)
    return RunLog(cfg.logging.folder, config=to_dict(cfg), **options)


def write_final_files(
    cfg: SimpleNamespace,
    log: RunLog,
    checkpoints: RunCheckpoints,
    steps_per_epoch: int,
    record: dict[str, Any],
) -> None:
    """Final weights with what made them, curves, summary.json and the summary line."""
    info = checkpoints.info() | {
        "weights": "moving average" if cfg.ema.decay else "raw",  # as load_weights reads it
        "config": redact_paths(to_dict(cfg)),
        "record": record,
    }
    weights = checkpoints.state.ema.state_dict()
    save_weights(checkpoints.folder / "weights.safetensors", weights, info)
    planned = cfg.training.epochs * steps_per_epoch
    steps, end = min(cfg.training.max_steps or planned, planned), f"epoch {record['epoch']}"
    if steps < planned:
        end = f"a smoke run: {steps} of {planned} steps (training.max_steps)"
        record = record | {"cut_short": end}
    log.finish(record)
    end += f" after {record['total_seconds'] / 60:.1f} min"
    print(data_wait_line(record["data_wait_share"], steps, cfg.data.num_workers), end="")
    print(f"{summary_line(cfg, record)}; {end}; {cfg.logging.folder}/curves.png")


def data_wait_line(fraction: float, steps: int, workers: int) -> str:
    """What to change when more than a fifth of an epoch was waiting for data; else nothing.

    Args:
        fraction: of the last epoch's time.
        steps: of the run; the first batches of a short one wait for the loader's start.
        workers: data.num_workers; 0 uses every core already.
    """
    if fraction <= 0.2 or steps < SHORT:
        return ""
    more = "raise data.num_workers, " if 0 < workers < len(os.sched_getaffinity(0)) else ""
    return (
        f"{fraction:.0%} of the last epoch was waiting for data: {more}write "
        f"smaller images (write.max_side) or lighten section augment\n"
    )


def summary_line(cfg: SimpleNamespace, record: dict[str, Any]) -> str:
    """Top-1 of both evaluations in one line; of the EMA too when there is one."""
    standard, config = (view_title(*item) for item in views_of(cfg.validation).items())
    return f"{cfg.model.arch}: top-1 {accuracy_text(record, standard, config, bool(cfg.ema.decay))}"
