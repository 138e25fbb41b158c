"""The live bar of a training run, and the memory that the run took."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from tqdm import tqdm


class Progress:
    """A bar over all steps of a run: loss, lr, images/s, wait for data, time left.

    It is shown on a terminal only. Reading the loss waits for the device, so that happens once a
    second at most. The accuracy of an epoch is a line that stays, with the bar or without it.

    Args:
        total: optimizer steps of the whole run.
        done: steps finished before.
        ranks: processes that train together; rates are over all of them.
        bar: False hides the bar.
        is_main: False prints nothing at all.
    """

    def __init__(
        self, total: int, done: int = 0, ranks: int = 1, bar: bool = True, is_main: bool = True
    ) -> None:
        hidden = None if bar and is_main else True  # None: unless stderr is a terminal
        self._bar = tqdm(total=total, initial=done, unit="step", smoothing=0.02, disable=hidden)
        self._ranks, self._is_main = ranks, is_main
        self._epoch_start = self._shown = time.perf_counter()

    def epoch(self, epoch: int, epochs: int, resolution: int) -> None:
        """Begin an epoch at a training resolution in pixels."""
        self._epoch_start = self._shown = time.perf_counter()
        self._bar.set_description(f"epoch {epoch + 1}/{epochs} {resolution} px")

    def step(self, step: int, loss: torch.Tensor, lr: float, images: int, waited: float) -> None:
        """After a step: `images` of this rank and `waited` seconds so far in this epoch."""
        now = time.perf_counter()
        if self._bar.disable or now - self._shown < 1:
            return
        self._shown, spent = now, now - self._epoch_start
        rate = images * self._ranks / spent
        self._bar.set_postfix_str(
            f"loss {loss.item():.3f} lr {lr:.4f} {rate:.0f} img/s data wait {waited / spent:.0%}"
        )
        self._bar.update(step + 1 - self._bar.n)

    def evaluating(self) -> None:
        """The steps of an epoch are done, and an evaluation follows, in which the bar stands."""
        self._bar.set_description(f"{self._bar.desc.removesuffix(': ')}, evaluating")

    def report(self, record: dict[str, Any]) -> None:
        """One line on stdout for a finished epoch; with a bar only where it was evaluated."""
        evaluated = "ema_plain_top1" in record
        if not self._is_main or not (self._bar.disable or evaluated):
            return
        accuracy = f"top-1 {accuracy_text(record)}, " if evaluated else ""
        tqdm.write(  # above a bar
            f"epoch {record['epoch']}: {record['resolution']} px, loss {record['train_loss']:.3f}, "
            f"{accuracy}{record['images_per_second']:.0f} img/s, "
            f"data wait {record['data_wait_share']:.0%}, {record['total_seconds'] / 60:.1f} min",
            file=sys.stdout,
        )
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def accuracy_text(
    record: dict[str, Any],
    standard: str = "standard eval",
    config: str = "config eval",
    ema: bool | None = None,
) -> str:
    """Top-1 of both evaluations, under these names, of the weights that were evaluated.

    Args:
        ema: whether to show that of the EMA, too; None: where it differs.
    """
    texts = []
    for key, name in (("plain_top1", standard), ("top1", config)):
        average = record[f"ema_{key}"]
        raw = record.get(key)
        shown = average != raw if ema is None else ema
        text = f"EMA {average:.2f} %"
        if raw is not None:
            text = f"{raw:.2f} %{f' ({text})' if shown else ''}"
        texts.append(f"{text} {name}")
    return ", ".join(texts)


def peak_memory_gb(device: torch.device) -> float:
    """Peak of the GPU's allocations, or on a CPU of this process's memory, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
