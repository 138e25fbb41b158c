"""The live bar of a training run, and the memory that the run took."""

from __future__ import annotations

import resource
import time

import torch
from tqdm import tqdm


class Progress:
    """A bar over all steps of a run: loss, lr, images/s, share of time waiting for data, time left.

    It shows nothing where the output is not a terminal. Reading the loss waits for the device, so
    that happens once a second at most.

    Args:
        total: optimizer steps of the whole run.
        done: steps finished before.
        ranks: processes that train together; rates are over all of them.
        enabled: False hides the bar.
    """

    def __init__(self, total: int, done: int = 0, ranks: int = 1, enabled: bool = True) -> None:
        hidden = None if enabled else True  # None: tqdm hides it unless stderr is a terminal
        self._bar = tqdm(total=total, initial=done, unit="step", smoothing=0.02, disable=hidden)
        self._ranks, self._enabled = ranks, enabled
        self._epoch_start = self._shown = time.perf_counter()

    def epoch(self, epoch: int, epochs: int, resolution: int) -> None:
        """Begin an epoch at a training side in pixels."""
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

    def report(self, record: dict) -> None:
        """One line for a finished epoch where no bar is shown: in a file, a pipe, a batch job."""
        if not (self._enabled and self._bar.disable):
            return
        evaluated = "plain_top1" in record
        accuracy = f"top-1 {record['plain_top1']:.2f} % plain, " if evaluated else ""
        print(
            f"epoch {record['epoch']}: {record['resolution']} px, loss {record['train_loss']:.3f}, "
            f"{accuracy}{record['images_per_second']:.0f} img/s, "
            f"data wait {record['data_wait_share']:.0%}, {record['total_seconds'] / 60:.1f} min",
            flush=True,
        )

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def peak_memory_gb(device: torch.device) -> float:
    """Peak of the GPU's allocations, or on a CPU of this process's memory, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
