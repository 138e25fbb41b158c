"""The trainer's own functions under a clock: what is timed here is what a run calls.

`script` is the module train_imagenet throughout. Times are seconds.
"""

from __future__ import annotations

import io
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch

from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.beton.verify import PageChecks
from fast_imagenet.config import to_dict
from fast_imagenet.engine.logger import LOG_KEYS
from fast_imagenet.engine.run_state import FRESH, save_run
from fast_imagenet.models.factory import try_network
from tools.plan.forecast import Costs, SideTimes, choose_sides
from tools.plan.storage import own_memory

MOST_SIDES = 4  # measured; others are interpolated
ROUNDS = 3  # all sides in turn: a machine that slows down slows all of them down
FEWEST = 3  # steps, or batches, of one timing, where they are not very slow
TIMED_PAGES = 8
# Shares of the seconds for measuring; what is left over is start-up.
TOGETHER, STEP, LOADER, EVALUATION = 0.5, 0.1, 0.1, 0.12
FETCHING = 0.1  # a side, where the data is not in memory
PROBED = 4  # images of the steps that tell how large a batch can be measured
SLOWEST_STEP = 1 / 40  # of the seconds: two sides and the evaluation take as long as 30 steps
MEMORY = 0.8  # of what is available, that a measured step may take


@dataclass
class Pass:
    """One timing of some batches: the wait for the first, the others, how many."""

    first: float
    rest: float
    count: int


@dataclass
class Session:
    """A run that is built like a real one, and taken apart again.

    Args:
        script: the module train_imagenet.
        cfg: settings of the run; its logging.folder is written to.
        ranks: who takes part; all of them call the same methods.
        seconds: to spend on measuring, about.
        tell: called with a line about what is done.
        cold: the training data may have to be read from the disk.
        clock: what all times are of: wall time, or processor time of this process.

    On a CPU a step may take a minute, or more memory than there is. Then smaller batches are
    measured, and what a step takes is extrapolated by the number of images: `scale`.
    """

    script: object
    cfg: SimpleNamespace
    ranks: object
    seconds: float
    tell: Callable[[str], None]
    cold: bool = True
    clock: Callable[[], float] = time.perf_counter
    room: int = 0  # bytes of main memory that were available at the start; 0 = not asked for
    watch: Callable = iter  # watchdog.Watchdog.watch: no batch is waited for without a limit
    own_peak: int = 0  # bytes of this process
    per_image: float = 0.0  # bytes that an image of a forward pass takes; 0 = not known
    fewest: int = FEWEST  # steps, or batches, of one timing
    fitting: int = 0  # images of a forward pass that fit into memory
    scale: float = 1.0  # images of a step over those of a step as it is measured
    warm: dict[int, Pass] = field(default_factory=dict)  # by side: the first passes
    starts: dict[int, float] = field(default_factory=dict)  # by side: trying, compiling
    epochs: dict[int, int] = field(default_factory=dict)  # by side: one that has it

    # ---- building --------------------------------------------------------------------------------

    def build(self) -> float:
        """Loaders, network, optimizer: returns the seconds."""
        self.tell("files and network")
        s, cfg, ranks, begin = self.script, self.cfg, self.ranks, self.now()
        self.loader, self.val_loader = s.build_loaders(cfg, ranks)
        self.steps = len(self.loader)
        classes = self.loader.num_classes
        self.model = s.build_model(cfg, classes, ranks.device)
        self.called, self.called_eval = s.wrap_model(self.model, cfg, ranks)
        self.t = s.build_training(cfg, self.model, self.called, classes, ranks)
        # sizes only: measure_evaluation takes whole batches
        s.try_evaluation(self.model, cfg.validation, 1, self.t.autocast)
        self.asked_micro_batch = self.fitting = self.t.micro_batch
        return self.now() - begin

    def limit_batch(self, side: int) -> None:
        """Measure with smaller batches where those of the run would take too long, or too much.

        Args:
            side: the largest of the run, pixels.
        """
        if self.ranks.device.type != "cpu":  # a GPU is fast, and tells when its memory is full
            return
        asked = self.cfg.training.batch_size // self.ranks.world_size
        seconds = self._probe(side, min(PROBED, asked))
        most, fits = self.seconds * SLOWEST_STEP / seconds, asked
        if self.per_image and self.room:
            fits = MEMORY * self.room / self.ranks.ranks_on_node / self.per_image
        while self.t.micro_batch > fits and (smaller := smaller_micro_batch(self.t.micro_batch)):
            self.t.micro_batch = self.fitting = smaller
        if self.t.micro_batch > fits:  # it cannot be halved
            most = min(most, max(fits, PROBED))
        most = -self.ranks.all_reduce_max(-int(most))
        if most < 2:  # even the smallest batch takes too long
            self.fewest = 1
        if most < asked:
            self._take_batch(fewer_images(asked, self.fitting, most))

    def _probe(self, side: int, images: int) -> float:
        """Seconds an image takes in a step; `per_image` becomes known."""
        self.tell(f"{side} px: {images} images")
        whole, self.t.micro_batch = self.t.micro_batch, images
        try_network(self.model.train(), [side], images)  # refuses in a sentence; first use
        before = own_memory() + sum(4 * p.numel() for p in self.model.parameters())  # gradients
        with memory_peak() as peak:  # of the first step: later ones take the same memory again
            self.script.blank_step(self.t, self.ranks.device, side)
        self.per_image = max(0, peak[0] - before) / images
        begin = time.perf_counter()
        self.script.blank_step(self.t, self.ranks.device, side)
        seconds = time.perf_counter() - begin
        self.model.zero_grad(set_to_none=True)
        self.t.micro_batch = whole
        return seconds / images

    def _take_batch(self, images: int) -> None:
        """Build loaders and step anew for so many images of a rank."""
        s, cfg, ranks = self.script, self.cfg, self.ranks
        whole = cfg.training.batch_size // ranks.world_size
        self.tell(f"batches of {images} images a rank stand for {whole}")
        self.close()
        self.scale = whole / images
        cfg.training.batch_size = images * ranks.world_size
        cfg.training.micro_batch_size = self.fitting if images % self.fitting == 0 else 0
        cfg.validation.batch_size = min(cfg.validation.batch_size, images)
        self.loader, self.val_loader = s.build_loaders(cfg, ranks)
        self.t = s.build_training(cfg, self.model, self.called, self.loader.num_classes, ranks)

    def now(self) -> float:
        """The clock, when the device has done what it was given."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)
        return self.clock()

    # ---- one timing ------------------------------------------------------------------------------

    def fed(self, epoch: int, side: int, steps: int) -> Pass:
        """The last `steps` of an epoch, loader and step together, as a resumed run takes them."""
        begin, arrived = self.now(), []
        with closing(self.loader.epoch(epoch, side, len(self.loader) - steps)) as batches:
            self.train(self._stamped(batches, arrived))
            end = self.now()
        return Pass(arrived[0] - begin, end - arrived[0], steps)

    def train(self, batches) -> None:
        """The trainer's steps on these batches, at the learning rate of a run's beginning."""
        losses, _, _ = self.script.train_epoch(
            self.t, batches, 0, len(self.loader), lambda *_: self._note_memory()
        )
        torch.stack(losses).tolist()  # waits for the device, as the run does

    def _note_memory(self) -> None:
        self.own_peak = max(self.own_peak, own_memory())

    def loaded(self, epoch: int, side: int, batches: int) -> Pass:
        """The same batches without the step."""
        begin, arrived = self.now(), []
        tail = self.loader.epoch(epoch, side, len(self.loader) - batches)
        with closing(tail) as tail:
            for _ in self._stamped(tail, arrived):
                self._sync_at_end(arrived, batches)
        # of a single batch nothing is known but the wait for it
        return Pass(arrived[0] - begin, arrived[-1] - arrived[0], max(1, len(arrived) - 1))

    def _sync_at_end(self, arrived: list[float], batches: int) -> None:
        if len(arrived) == batches:  # what was queued for the device must have arrived
            arrived[-1] = self.now()

    def _stamped(self, batches, arrived: list[float]) -> Iterator:
        """The batches; notes when each came."""
        for batch in self.watch(batches):
            arrived.append(self.clock())
            yield batch

    def stepped(self, batch: tuple, steps: int) -> Pass:
        """The step on one batch that is there already."""
        begin = self.now()
        self.train([batch] * steps)
        return Pass(0.0, self.now() - begin, steps)

    # ---- training --------------------------------------------------------------------------------

    def measure_sides(self, sides: list[int]) -> list[SideTimes]:
        """Every distinct side of the epochs, or some of them."""
        chosen = choose_sides(sides, MOST_SIDES)
        self.epochs = {side: sides.index(side) for side in chosen}
        self._warm_up(chosen[-1])  # the largest first: it decides whether the batch fits
        least = 2 * self.fewest * len(chosen) * self._pace(chosen[-1])
        if len(chosen) > 2 and least > TOGETHER * self.seconds:
            chosen = [chosen[0], chosen[-1]]
        for side in chosen[-2::-1]:
            self._warm_up(side)
        return self._rounds(chosen)

    def _warm_up(self, side: int) -> None:
        self.tell(f"{side} px: first steps")
        self._fitting(lambda: self._first_steps(side))

    def _fitting(self, act: Callable[[], None]) -> None:
        """Call it, with the micro-batch halved for as long as the GPU has too little memory."""
        while True:
            try:
                return act()
            except torch.OutOfMemoryError:
                smaller = smaller_micro_batch(self.t.micro_batch)
                if not smaller or self.ranks.world_size > 1:  # other ranks would wait
                    raise
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.t.micro_batch = self.fitting = smaller
            self.tell(f"out of memory: again with {smaller} images a forward pass")

    def _first_steps(self, side: int) -> None:
        """What a side takes once: trying, compiling, first use; and a first idea of its pace."""
        epoch, begin = self.epochs[side], self.now()
        self.script.prepare_network(
            self.cfg, self.model, self.called, self.t, [epoch], self.ranks.device
        )
        self.starts[side] = self.now() - begin
        steps = self._agree(min(self.fewest, len(self.loader)))
        first = self.loaded(epoch, side, steps)  # brings the images into memory
        if not self.warm:
            self.first_use = first.first
        self.warm[side] = self.fed(epoch, side, steps)

    def _pace(self, side: int) -> float:
        return self.warm[side].rest / self.warm[side].count

    def _agree(self, count: float) -> int:
        """The same number on every rank."""
        return self.ranks.all_reduce_max(max(1, min(int(count), len(self.loader))))

    def _rounds(self, sides: list[int]) -> list[SideTimes]:
        """All sides in turn, round after round."""
        passes = {side: {"step": [], "loader": [], "together": []} for side in sides}
        pace = {side: self._pace(side) for side in sides}
        per_side, there = self.seconds / len(sides), {}
        least = self.fewest * sum(pace.values())
        rounds = self._agree(min(ROUNDS, TOGETHER * self.seconds / least))
        for number in range(rounds):
            for side in sides:
                epoch = self.epochs[side]
                self.tell(f"{side} px: round {number + 1} of {rounds}")
                share = per_side / rounds / pace[side]  # steps in this side's time
                counts = [max(self.fewest, part * share) for part in (TOGETHER, LOADER, STEP)]
                together, loader, step = map(self._agree, counts)
                if side not in there:
                    there[side] = self._fetch(side, together)
                together = min(together, there[side])
                loader = min(loader, together)
                loader = min(len(self.loader), max(2, loader))
                passes[side]["loader"].append(self.loaded(epoch, side, loader))
                passes[side]["step"].append(self.stepped(self._batch(epoch, side), step))
                passes[side]["together"].append(self.fed(epoch, side, together))
                pace[side] = mean_seconds(passes[side]["together"])
        return [self._times(side, passes[side]) for side in sides]

    def _fetch(self, side: int, wanted: int) -> int:
        """Read the images of an epoch's last batches into memory; returns of how many.

        Reading from the disk is predicted from its rate: here it would be mixed with the step.
        """
        count, begin = self.fewest, time.perf_counter()
        while self.cold:
            count = self._agree(count)
            self.loaded(self.epochs[side], side, count)
            taken = time.perf_counter() - begin > FETCHING * self.seconds
            if count >= wanted or self.ranks.all_reduce_max(int(taken)):
                return min(wanted, count)
            count = min(wanted, 2 * count)
        return wanted

    def _batch(self, epoch: int, side: int) -> tuple:
        """A copy: the loader uses the memory of its batches again."""
        with closing(self.loader.epoch(epoch, side, len(self.loader) - 1)) as batches:
            images_bhwc, labels_b, samples_b = next(self.watch(batches))
            return images_bhwc.clone(), labels_b.clone(), np.array(samples_b)

    def _times(self, side: int, passes: dict[str, list[Pass]]) -> SideTimes:
        loader, fed = mean_seconds(passes["loader"]), passes["together"]
        together = max(mean_seconds(fed), loader)
        first_batch = float(np.mean([one.first for one in fed]))
        paces = [one.rest / one.count for one in fed]
        warm = self.warm[side]
        slower = max(0.0, warm.first + warm.rest - first_batch - warm.count * together)
        return SideTimes(
            side=side,
            step=mean_seconds(passes["step"]) * self.scale,
            loader=loader * self.scale,
            together=together * self.scale,
            first_batch=first_batch,
            start=self.starts[side] + slower,
            spread=(max(paces) - min(paces)) / float(np.mean(paces)) if paces[1:] else None,
            steps=sum(one.count for one in fed),
        )

    # ---- everything else -------------------------------------------------------------------------

    def measure_evaluation(self) -> tuple[float, float]:
        """Seconds of an evaluation of one set of weights, and what the first takes longer."""
        self.tell("evaluation")
        per_rank = -(-self.val_loader.num_samples // self.ranks.world_size)
        batches = -(-per_rank // self.cfg.validation.batch_size)
        few = min(2, self.fewest, batches)
        first, _ = self._evaluate(few, per_rank)
        count = self.ranks.all_reduce_max(int(max(few, few * EVALUATION * self.seconds / first)))
        pace, whole = self._evaluate(min(count, batches), per_rank)
        return whole, max(0.0, first - pace * few / min(count, batches))

    def _evaluate(self, batches: int, pictures: int) -> tuple[float, float]:
        """Seconds of some batches a view, and from them of all images of this rank."""
        views: list[tuple[float, float, int]] = []

        def limited(*view) -> Iterator:
            begin, seen, arrived = self.now(), 0, 0.0
            with closing(self.val_loader.batches(*view)) as all_batches:
                for batch in islice(self.watch(all_batches), batches):
                    arrived = arrived or self.now()
                    seen += len(batch[1])
                    yield batch
                views.append((arrived - begin, self.now() - arrived, seen))

        loader = SimpleNamespace(batches=limited)
        begin = self.now()
        self.script.evaluate(self.called_eval, loader, self.cfg, self.t.autocast, self.ranks.device)
        taken = self.now() - begin
        return taken, sum(first + rest * pictures / seen for first, rest, seen in views)

    def measure_saves(self) -> tuple[float, float]:
        """Seconds of last.pt, and of last.pt with best.pt."""
        self.tell("checkpoints")
        cfg, t, loader = self.cfg, self.t, self.loader
        data = {"classes": loader.classes, "images": loader.num_samples}
        state = {**FRESH, "losses": [0.0] * self.steps}
        place = (cfg.logging.folder, self.model, t, to_dict(cfg), data, self.ranks, state)
        seconds = []
        for best in (False, True, True):
            begin = self.clock()
            save_run(*place, best)
            seconds.append(self.clock() - begin)
        both = sum(seconds[1:]) / 2
        return both / 2, both

    def measure_log(self) -> tuple[float, float, float]:
        """Seconds of the log's beginning, of a line of it, and of the end of a run."""
        self.tell("log and final weights")
        stamps = [self.clock()]
        log = self.script.open_log(self.cfg, self.ranks)
        record = {**dict.fromkeys(LOG_KEYS, 1.0), "resolution": 0}
        for epoch in (1, 2):  # the first starts TensorBoard
            log.write_steps((epoch - 1) * self.steps, [0.0] * self.steps)
            log.write(**{**record, "epoch": epoch})
            stamps.append(self.clock())
        if self.ranks.is_main:
            with redirect_stdout(io.StringIO()):
                self.script.finish(self.cfg, log, self.t, self.loader, {**record, "epoch": 2})
        stamps.append(self.clock())
        first, line, end = np.diff(stamps).tolist()
        return max(0.0, first - line), line, end

    def memory(self) -> tuple[int, int]:
        """Peak and capacity in bytes: of the GPU, or of this process and what there is for it."""
        device = self.ranks.device
        if device.type != "cuda":
            more = self.fitting - self.t.micro_batch  # than were measured
            return self.own_peak + int(more * self.per_image), self.room
        capacity = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device), capacity

    def close(self) -> None:
        """End the loaders."""
        for loader in (self.loader, self.val_loader):
            loader.close()


def measure_all(session: Session, sides: list[int], start: float, ready: bool):
    """(list of SideTimes, Costs).

    Args:
        session: built.
        sides: of every epoch.
        start: seconds from the start of the process to here.
        ready: the loader's kernels were on the disk before.
    """
    try:
        session.limit_batch(max(sides))
        times = session.measure_sides(sides)
        evaluation, evaluation_start = session.measure_evaluation()
        save, save_best = session.measure_saves()
        opening, line, finish = session.measure_log()
    finally:
        session.close()
    # compiling kernels, once on a machine, is not the next run's business
    first_use = max(0.0, session.first_use - max(t.first_batch for t in times)) if ready else 0.0
    return times, Costs(
        start=start + first_use + opening,
        evaluation=evaluation,
        evaluation_start=evaluation_start,
        weights=2 if session.cfg.ema.decay else 1,
        save=save,
        save_best=save_best,
        log=line,
        finish=finish,
    )


@contextmanager
def memory_peak() -> Iterator[list[int]]:
    """[bytes of this process at the peak], once it is left."""
    peak, end = [own_memory()], threading.Event()

    def watch() -> None:
        while not end.wait(0.005):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        end.set()
        watcher.join()


def fewer_images(asked: int, micro: int, most: int) -> int:
    """Images of a rank's step to measure with: whole forward passes, or an even part of one.

    Args:
        asked: images of a rank's step.
        micro: of a forward pass; divides `asked`.
        most: that can be measured, below `asked`.
    """
    if most >= micro:
        return most // micro * micro
    return max(2, most // 2 * 2)


def mean_seconds(passes: list[Pass]) -> float:
    """Seconds a batch over all passes: their mean, as what adds up to an epoch."""
    return sum(one.rest for one in passes) / sum(one.count for one in passes)


def smaller_micro_batch(images: int) -> int:
    """The largest even divisor below `images`; 0 where there is none.

    Even, as Mixup pairs images; a divisor, so that all forward passes are equal.
    """
    return next((n for n in range(images // 2, 1, -1) if images % n == 0 and n % 2 == 0), 0)


def page_check_seconds(file: BetonFile) -> float:
    """Seconds of checking all pages of a file once; 0 where it has no sums."""
    checks, pages = PageChecks(file), np.unique(file.offsets // file.page_size)
    some = pages[:: math.ceil(len(pages) / TIMED_PAGES)]
    if checks.why_not:
        return 0.0
    PageChecks(file).check(some)  # brings them into memory
    begin = time.perf_counter()
    checks.check(some)
    return (time.perf_counter() - begin) * len(pages) / len(some)


def data_bytes(source) -> int:
    """Size of a BetonFile, or of a folder's images by a sample of them."""
    if isinstance(source, BetonFile):
        return source.path.stat().st_size
    sample = np.linspace(0, len(source) - 1, min(len(source), 200)).astype(int)
    return int(np.mean([len(source.read(int(i))) for i in sample]) * len(source))
