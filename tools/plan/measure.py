"""The trainer's own functions under a clock: what is timed here is what a run calls.

Times are seconds, sizes bytes. On a CPU a step may take a minute, or more memory than there is.
Then smaller batches are measured, and a step is extrapolated by its number of images: `scale`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from fast_imagenet.config import to_dict
from fast_imagenet.engine.distributed import Distributed
from fast_imagenet.engine.dry_run import PROBED, memory_per_image
from fast_imagenet.engine.logger import LOG_KEYS
from fast_imagenet.engine.run import StepRecorder, open_log, write_final_files
from fast_imagenet.engine.run_state import Position, RunCheckpoints
from fast_imagenet.machine import process_memory
from fast_imagenet.models.factory import blank_step, prepare_network, try_evaluation, try_network
from fast_imagenet.models.networks import compile_network
from tools.plan.forecast import Costs, Times, choose_resolutions

MOST_RESOLUTIONS = 4  # measured; others are interpolated
ROUNDS = 3  # all resolutions in turn: a machine that slows down slows all of them down
FEWEST = 3  # steps, or batches, of one timing, where they are not very slow
# Fractions of the seconds for measuring; what is left over is start-up.
TOGETHER, STEP, LOADER, EVALUATION = 0.5, 0.1, 0.1, 0.12
FETCHING = 0.1  # per resolution, where the data is not in memory
SLOWEST_STEP = 1 / 40  # of the seconds: two resolutions and the evaluation take as long as 30 steps
MEMORY = 0.8  # of what is available, that a measured step may take


class Pass(NamedTuple):
    """One timing of some batches: the wait for the first, the others, how many."""

    first: float
    rest: float
    count: int


@dataclass
class Session:
    """A run that is built like a real one, and taken apart again; all ranks call the same."""

    script: ModuleType  # train_imagenet
    cfg: SimpleNamespace  # settings of the run; its logging.folder is written to
    distributed: Distributed
    seconds: float  # to spend on measuring, about
    report: Callable[[str], None]  # called with a line about what is done
    cold: bool = True  # the training data may have to be read from the disk
    room: int = 0  # main memory that was available at the start; 0 = not known
    watch: Callable[[Iterable[Any]], Iterator[Any]] = iter  # limits the wait for a batch
    own_peak: int = 0  # of this process
    per_image: float = 0.0  # that an image of a forward pass takes; 0 = not known
    fewest: int = FEWEST  # steps, or batches, of one timing
    fitting: int = 0  # images per forward pass that fit into memory
    scale: float = 1.0  # images of a step over those of a step as it is measured
    first_use: float = 0.0  # wait for the very first batch
    warm: dict[int, Pass] = field(default_factory=dict)  # by resolution: the first passes
    starts: dict[int, float] = field(default_factory=dict)  # by resolution: trying, compiling
    epochs: dict[int, int] = field(default_factory=dict)  # by resolution: one that has it
    ways: dict[str, float] = field(default_factory=dict)  # as measure_ways

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.distributed.device

    def build(self) -> float:
        """Loaders, network, optimizer: returns the seconds."""
        self.report("files and network")
        s, cfg, distributed, begin = self.script, self.cfg, self.distributed, self.now()
        self.loader, self.val_loader = s.build_loaders(cfg, distributed)
        self.steps, classes = len(self.loader), self.loader.num_classes
        self.model = s.build_model(cfg, classes, distributed.device)
        self.networks = s.wrap_model(self.model, cfg, distributed)
        self.state = s.build_state(cfg, self.networks, classes, self.steps, distributed)
        # sizes only: measure_evaluation takes whole batches
        try_evaluation(self.model, cfg.validation, 1, self.state.autocast)
        self.fitting = self.state.micro_batch
        return self.now() - begin

    def limit_batch(self, resolution: int) -> None:
        """Measure smaller batches where the run's take too long or too much at its largest size."""
        if self.device.type != "cpu":  # a GPU is fast, and reports that its memory is full
            return
        fits = asked = self.cfg.training.batch_size // self.distributed.world_size
        most = self.seconds * SLOWEST_STEP / self._probe(resolution, min(PROBED, asked))
        if self.per_image and self.room:
            fits = MEMORY * self.room / self.distributed.ranks_on_node / self.per_image
        state = self.state
        while state.micro_batch > fits and (smaller := smaller_micro_batch(state.micro_batch)):
            state.micro_batch = self.fitting = smaller
        if self.state.micro_batch > fits:  # it cannot be halved
            most = min(most, max(fits, PROBED))
        most = -self.distributed.all_reduce_max(-int(most))
        if most < 2:  # even the smallest batch takes too long
            self.fewest = 1
        if most < asked:
            self._take_batch(asked, fewer_images(asked, self.fitting, most))

    def _probe(self, resolution: int, images: int) -> float:
        """Seconds per image of a step; `per_image` becomes known."""
        self.report(f"{resolution} px: {images} images")
        forward_backward = self.script.forward_backward
        try_network(self.model.train(), [resolution], images)  # refuses in a sentence; first use
        self.per_image = memory_per_image(self.state, resolution, images, forward_backward)
        whole, self.state.micro_batch = self.state.micro_batch, images
        begin = time.perf_counter()
        blank_step(self.state, resolution, forward_backward)
        seconds = time.perf_counter() - begin
        self.model.zero_grad(set_to_none=True)
        self.state.micro_batch = whole
        return seconds / images

    def _take_batch(self, asked: int, images: int) -> None:
        """Build loaders and step anew for so many images per rank."""
        cfg, distributed = self.cfg, self.distributed
        self.report(f"batches of {images} images per rank stand for {asked}")
        self.close()
        self.scale = asked / images
        cfg.training.batch_size = images * distributed.world_size
        cfg.training.micro_batch_size = self.fitting if images % self.fitting == 0 else 0
        cfg.validation.batch_size = min(cfg.validation.batch_size, images)
        self.loader, self.val_loader = self.script.build_loaders(cfg, distributed)
        classes = self.loader.num_classes
        size = (classes, len(self.loader))
        self.state = self.script.build_state(cfg, self.networks, *size, distributed)

    def now(self) -> float:
        """The time when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def train(self, batches: Iterable[tuple]) -> None:
        """The trainer's steps on these batches, at the learning rate of a run's beginning."""
        steps = StepRecorder()
        self.script.train_epoch(self.state, batches, steps)
        torch.stack(steps.losses).tolist()  # waits for the device, as the run does
        self.own_peak = max(self.own_peak, process_memory("RssAnon", "RssShmem"))

    def timed(self, resolution: int, count: int, with_step: bool) -> Pass:
        """The last batches of an epoch as a resumed run takes them, with the step or without."""
        begin, arrived = self.now(), []

        def noted(batches: Iterable[tuple]) -> Iterator[tuple]:
            for batch in self.watch(batches):
                arrived.append(time.perf_counter())
                yield batch

        skipped = len(self.loader) - count
        with closing(self.loader.epoch(self.epochs[resolution], resolution, skipped)) as batches:
            if with_step:
                self.train(noted(batches))
            else:
                for _ in islice(noted(batches), count):
                    pass
            end = self.now()  # what was queued for the device has arrived
        # of a single batch without a step nothing is known but the wait for it
        rest = end - arrived[0] if with_step or count > 1 else 0.0
        return Pass(arrived[0] - begin, rest, count if with_step else max(1, count - 1))

    def stepped(self, resolution: int, steps: int) -> Pass:
        """The step on one batch that is there already."""
        last = self.loader.epoch(self.epochs[resolution], resolution, len(self.loader) - 1)
        with closing(last) as batches:  # a copy: the loader uses the memory of its batches again
            images_bhwc, labels_b, samples_b = next(self.watch(batches))
            batch = images_bhwc.clone(), labels_b.clone(), np.array(samples_b)
        begin = self.now()
        self.train([batch] * steps)
        return Pass(0.0, self.now() - begin, steps)

    def measure_training(self, resolutions: list[int]) -> list[Times]:
        """Every distinct resolution of the epochs, or some of them."""
        chosen = choose_resolutions(resolutions, MOST_RESOLUTIONS)
        self.epochs = {resolution: resolutions.index(resolution) for resolution in chosen}
        self._first_steps(chosen[-1])  # the largest first: it decides whether the batch fits
        least = 2 * self.fewest * len(chosen) * mean_seconds([self.warm[chosen[-1]]])
        if len(chosen) > 2 and least > TOGETHER * self.seconds:
            chosen = [chosen[0], chosen[-1]]
        for resolution in chosen[-2::-1]:
            self._first_steps(resolution)
        return self._rounds(chosen)

    def _first_steps(self, resolution: int) -> None:
        """What a resolution takes once: trying, compiling, first use; and an idea of its pace."""
        self.report(f"{resolution} px: first steps")

        def steps() -> None:
            begin = self.now()
            prepare_network(self.state, [resolution], self.script.forward_backward)
            self.starts[resolution] = self.now() - begin
            count = self._agree(self.fewest)
            first = self.timed(resolution, count, False)  # brings the images into memory
            if not self.warm:
                self.first_use = first.first
            self.warm[resolution] = self.timed(resolution, count, True)

        self.fit_memory(steps)

    def fit_memory(self, act: Callable[[], None]) -> None:
        """Call it, with the micro-batch halved for as long as the GPU has too little memory."""
        while True:
            try:
                return act()
            except torch.OutOfMemoryError:
                smaller = smaller_micro_batch(self.state.micro_batch)
                if not smaller or self.distributed.world_size > 1:  # other ranks would wait
                    raise
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.state.micro_batch = self.fitting = smaller
            self.report(f"out of memory: again with {smaller} images per forward pass")

    def _agree(self, count: float) -> int:
        """The same number on every rank, from 1 to the steps of an epoch."""
        return self.distributed.all_reduce_max(max(1, min(int(count), len(self.loader))))

    def _rounds(self, resolutions: list[int]) -> list[Times]:
        """All resolutions in turn, round after round."""
        passes = {r: {"step": [], "loader": [], "together": []} for r in resolutions}
        pace = {r: mean_seconds([self.warm[r]]) for r in resolutions}
        most = TOGETHER * self.seconds / self.fewest / sum(pace.values())
        rounds, fetched = self._agree(min(ROUNDS, most)), {}
        for number in range(rounds):
            for r in resolutions:
                self.report(f"{r} px: round {number + 1} of {rounds}")
                steps = self.seconds / len(resolutions) / rounds / pace[r]  # in this one's time
                together, loader, step = (
                    self._agree(max(self.fewest, part * steps)) for part in (TOGETHER, LOADER, STEP)
                )
                if r not in fetched:
                    fetched[r] = self._fetch(r, together)
                together = min(together, fetched[r])
                loader = min(len(self.loader), max(2, min(loader, together)))
                passes[r]["loader"].append(self.timed(r, loader, False))
                passes[r]["step"].append(self.stepped(r, step))
                passes[r]["together"].append(self.timed(r, together, True))
                pace[r] = mean_seconds(passes[r]["together"])
        return [self._times(r, **passes[r]) for r in resolutions]

    def _fetch(self, resolution: int, wanted: int) -> int:
        """Read the images of an epoch's last batches into memory; returns of how many.

        Reading from the disk is predicted from its rate: here it would be mixed with the step.
        """
        count, begin = self.fewest, time.perf_counter()
        while self.cold:
            count = self._agree(count)
            self.timed(resolution, count, False)
            taken = time.perf_counter() - begin > FETCHING * self.seconds
            if count >= wanted or self.distributed.all_reduce_max(int(taken)):
                return min(wanted, count)
            count = min(wanted, 2 * count)
        return wanted

    def _times(
        self, resolution: int, step: list[Pass], loader: list[Pass], together: list[Pass]
    ) -> Times:
        alone, warm = mean_seconds(loader), self.warm[resolution]
        both = max(mean_seconds(together), alone)
        first_batch = float(np.mean([one.first for one in together]))
        paces = [one.rest / one.count for one in together]
        slower = max(0.0, warm.first + warm.rest - first_batch - warm.count * both)
        return Times(
            resolution=resolution,
            step=mean_seconds(step) * self.scale,
            loader=alone * self.scale,
            together=both * self.scale,
            first_batch=first_batch,
            start=self.starts[resolution] + slower,
            spread=(max(paces) - min(paces)) / float(np.mean(paces)) if paces[1:] else None,
            steps=sum(one.count for one in together),
        )

    def measure_ways(self, resolution: int) -> dict[str, float]:
        """Seconds of a step on a batch that is there, 'eager' and 'compiled'.

        {} without a GPU, with several ranks, and where one of the two does not fit.
        """
        if self.device.type == "cpu" or self.distributed.world_size > 1:  # no second wrapper of DDP
            return {}
        self.report(f"{resolution} px: compiled and eager in turn")
        chosen = self.state.train_model
        eager = getattr(chosen, "_orig_mod", chosen)
        compiled = compile_network(eager) if eager is chosen else chosen
        passes: dict[str, list[Pass]] = {"eager": [], "compiled": []}
        try:
            for _ in range(1 + ROUNDS):  # the first is not counted
                for name, self.state.train_model in (("eager", eager), ("compiled", compiled)):
                    passes[name].append(self.stepped(resolution, FEWEST))
        except torch.OutOfMemoryError:  # what the run does fits, the other does not
            return {}
        finally:
            self.state.train_model = chosen
        return {name: mean_seconds(found[1:]) for name, found in passes.items()}

    def measure_evaluation(self) -> tuple[float, float]:
        """Seconds of an evaluation of one set of weights, and what the first takes longer."""
        self.report("evaluation")
        images = -(-self.val_loader.num_samples // self.distributed.world_size)
        batches = -(-images // self.cfg.validation.batch_size)
        few = min(2, self.fewest, batches)
        first, _ = self._evaluate(few, images)
        wanted = max(few, few * EVALUATION * self.seconds / first)
        count = self.distributed.all_reduce_max(int(wanted))
        pace, whole = self._evaluate(min(count, batches), images)
        return whole, max(0.0, first - pace * few / min(count, batches))

    def _evaluate(self, batches: int, images: int) -> tuple[float, float]:
        """Seconds of some batches per view, and from them of all images of this rank."""
        views: list[tuple[float, float, int]] = []

        def limited(*view) -> Iterator[tuple]:
            begin, seen, arrived = self.now(), 0, 0.0
            with closing(self.val_loader.batches(*view)) as all_batches:
                for batch in islice(self.watch(all_batches), batches):
                    arrived = arrived or self.now()
                    seen += len(batch[1])
                    yield batch
                views.append((arrived - begin, self.now() - arrived, seen))

        network, autocast, begin = self.networks.eval_model, self.state.autocast, self.now()
        self.script.evaluate(network, limited, self.cfg, autocast, self.device)
        taken = self.now() - begin
        return taken, sum(first + rest * images / seen for first, rest, seen in views)

    def measure_saves(self) -> float:
        """Seconds of last.pt with best.pt; last.pt takes half of them."""
        self.report("checkpoints")
        checkpoints, times = self._checkpoints(), []
        for best in (False, True, True):  # the first is not counted
            times.append(time.perf_counter())
            checkpoints.save(Position(losses=[0.0] * self.steps), best)
        return (time.perf_counter() - times[1]) / 2

    def _checkpoints(self) -> RunCheckpoints:
        folder, loader = Path(self.cfg.logging.folder), self.loader
        data = {"classes": loader.classes, "num_classes": loader.num_classes}
        return RunCheckpoints(folder, self.state, to_dict(self.cfg), data, self.distributed)

    def measure_log(self) -> tuple[float, float, float]:
        """Seconds of the log's beginning, of a line of it, and of the end of a run."""
        self.report("log and final weights")
        times, record = [time.perf_counter()], {**dict.fromkeys(LOG_KEYS, 1.0), "resolution": 0}
        log = open_log(self.cfg, self.distributed, steps=1)
        for epoch in (1, 2):  # the first starts TensorBoard
            log.write_steps((epoch - 1) * self.steps, [0.0] * self.steps)
            log.write(**{**record, "epoch": epoch})
            times.append(time.perf_counter())
        if self.distributed.is_main:
            with redirect_stdout(io.StringIO()):
                last = {**record, "epoch": 2}
                write_final_files(self.cfg, log, self._checkpoints(), self.steps, last)
        first, line, end = np.diff([*times, time.perf_counter()]).tolist()
        return max(0.0, first - line), line, end

    def memory(self) -> tuple[int, int]:
        """Peak and capacity: of the GPU, or of this process and what there is for it."""
        device = self.device
        if device.type != "cuda":
            more = self.fitting - self.state.micro_batch  # than were measured
            return self.own_peak + int(more * self.per_image), self.room
        capacity = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device), capacity

    def measure(self, resolutions: list[int], start: float) -> tuple[list[Times], Costs]:
        """What the parts of a run take; closes the loaders.

        Args:
            resolutions: of every epoch.
            start: seconds from the start of the process to here.
        """
        with closing(self):
            self.limit_batch(max(resolutions))
            times = self.measure_training(resolutions)
            self.ways = self.measure_ways(max(resolutions))
            evaluation = self.measure_evaluation()
            save_best = self.measure_saves()
            opening, line, finish = self.measure_log()
        first_use = max(0.0, self.first_use - max(t.first_batch for t in times))
        start += first_use + opening
        weights = 2 if self.cfg.ema.decay else 1
        return times, Costs(start, *evaluation, weights, save_best / 2, save_best, line, finish)

    def close(self) -> None:
        """End the loaders."""
        for loader in (self.loader, self.val_loader):
            loader.close()


def fewer_images(asked: int, micro: int, most: int) -> int:
    """At most `most` < `asked` images of a rank's step: whole forward passes, or an even part."""
    return most // micro * micro if most >= micro else max(2, most // 2 * 2)


def mean_seconds(passes: list[Pass]) -> float:
    """Seconds per batch over all passes: their mean, as what adds up to an epoch."""
    return sum(one.rest for one in passes) / sum(one.count for one in passes)


def smaller_micro_batch(images: int) -> int:
    """The largest even divisor below `images`; 0 where there is none.

    Even, as Mixup pairs images; a divisor, so that all forward passes are equal.
    """
    return next((n for n in range(images // 2, 1, -1) if images % n == 0 and n % 2 == 0), 0)
