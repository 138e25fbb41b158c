"""Worker processes of the torchvision backend: fed for one pass after the other, ended for certain.

`PersistentLoader` is one DataLoader whose workers stay over the epochs. What torch leaves open is
decided here: which errors are a worker's end or a full /dev/shm, that a hanging worker is killed
after CLOSE_SECONDS, and that no worker outlives the training process.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from fast_imagenet import processes
from fast_imagenet.data.samples import Key, SampleDataset, SampleError, finish_on_device

PREFETCH = 2  # batches per worker that wait in /dev/shm: 38 MB each at 256 x 224 px
CLOSE_SECONDS = 3  # for workers to end in good order, before they are killed
RESUME = "resume with --training.resume=auto"


class WorkerError(RuntimeError):
    """The workers cannot do their work. The message says why and what to change."""


class _Batches(Sampler[list[Key]]):
    """The keys of the coming batches; set before each pass, so that workers outlive an epoch."""

    def __init__(self) -> None:
        self.keys: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class PersistentLoader:
    """One DataLoader whose workers stay, fed with the keys of one pass after the other.

    Args:
        dataset: of the samples.
        num_workers: processes that prepare batches; 0 = none, this process does it.
        device: where the batches end up.
    """

    def __init__(self, dataset: SampleDataset, num_workers: int, device: torch.device) -> None:
        self._dataset, self._device, self._finish = dataset, device, dataset.finish
        self._batches = _Batches()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        workers: dict[str, Any] = {}
        if num_workers:
            workers = {
                "multiprocessing_context": _start_method(),
                "persistent_workers": True,  # a new process imports torch: seconds, every epoch
                "prefetch_factor": PREFETCH,
                "worker_init_fn": _end_with_parent,
            }
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=_stack if self._finish else _list,
            pin_memory=device.type == "cuda" and self._finish,
            # of its own: else every pass would take a number from the run's generator
            generator=torch.Generator(),
            **workers,
        )

    def run(
        self, batches: list[np.ndarray], resolution: int, argument: int | float
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A pass over batches of sample numbers; it begins as its first batch is asked for."""
        keys = [[(int(i), resolution, argument) for i in b] for b in batches]
        try:
            yield from self._deliver(keys)
        except SampleError as error:
            # a worker's error arrives as the text of its traceback, which ends with the sentence
            raise SampleError(str(error).split("SampleError: ")[-1].strip()) from error
        except (RuntimeError, OSError, EOFError) as error:
            # OSError, EOFError: the other end of a pipe is gone
            batch_bytes = max(map(len, keys), default=0) * resolution**2 * 3
            if reason := self._failure(error, batch_bytes):
                raise WorkerError(reason) from error
            raise

    def _deliver(self, keys: list[list[Key]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._batches.keys = keys
        prepared = iter(self._loader)
        for worker in getattr(prepared, "_workers", ()):
            # deaf to SIGTERM on purpose, which torch and multiprocessing send at the end
            worker._popen.terminate = worker._popen.kill
        for images, labels_b in prepared:
            if self._stream is None:
                yield self._on_device(images, labels_b)
                continue
            with torch.cuda.stream(self._stream):
                batch = self._on_device(images, labels_b)
            step = torch.cuda.current_stream(self._device)
            step.wait_stream(self._stream)
            for tensor in batch:
                tensor.record_stream(step)  # not free before the step has used it
            yield batch

    def _failure(self, error: Exception, batch_bytes: int) -> str | None:
        """A sentence on an error of the workers, not of a sample; None: it is another one."""
        workers, gone = self._loader.num_workers, not isinstance(error, RuntimeError)
        if not workers:
            return None
        codes = _exit_codes(self._loader._iterator, wait=1 if gone else 0)
        full = gone and getattr(error, "errno", 0) == errno.ENOSPC  # of a lock
        full = full or re.search(r"/torch_.*No space left", str(error))  # of a batch
        if full or -signal.SIGBUS in codes:
            return f"{_full((PREFETCH * workers + 1) * batch_bytes)}; {RESUME}"
        if codes:
            code = codes[0]
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return (
                f"a data worker ended with {how}: if memory was too small, lower "
                f"data.num_workers; {RESUME}"
            )
        return f"a data worker is gone ({str(error) or 'no answer'}); {RESUME}" if gone else None

    def _on_device(self, images: Any, labels_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch on the device; on a GPU beside the training step, on the stream of this loader.

        torchvision's decoder waits for no work before it writes into memory that is free as torch
        sees it: freed on the stream of the training step, it may still be read by a step to come.
        """
        if not self._finish:
            if self._stream is not None:
                self._stream.synchronize()  # the batch before, not the training step
            images = finish_on_device(images, self._device, self._dataset)
        device = self._device
        return images.to(device, non_blocking=True), labels_b.to(device, non_blocking=True)

    def close(self) -> None:
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            _end_workers(iterator)


def _full(need: int) -> str:
    from fast_imagenet.beton.disk_space import SHM, free_bytes, shm_sentence  # imports cv2

    free = free_bytes(SHM) if SHM.is_dir() else 0
    return f"{shm_sentence(need, free)}, or lower data.num_workers"


def _exit_codes(iterator: Any, wait: float) -> list[int]:
    """Exit codes of workers that ended by themselves, within `wait` seconds; negative: a signal."""
    workers = getattr(iterator, "_workers", ())
    connection.wait([worker.sentinel for worker in workers], wait)
    return [worker.exitcode for worker in workers if not worker.is_alive() and worker.exitcode]


def _end_workers(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator within seconds, whatever state they are in.

    In good order where that works. A worker may hang or be stopped, and one that was killed may
    have left a lock taken or half a batch in a pipe, for which torch would wait without a limit.
    """
    for queue in (*iterator._index_queues, iterator._worker_result_queue):
        queue.cancel_join_thread()
    in_order = threading.Thread(target=iterator._shutdown_workers, daemon=True)
    in_order.start()
    in_order.join(CLOSE_SECONDS)
    left = [worker for worker in iterator._workers if worker.is_alive()]
    for worker in left:
        worker.kill()
    for worker in left:
        worker.join(CLOSE_SECONDS)


def _start_method() -> BaseContext:
    """Workers fork from a server that has imported torch and nothing has run in.

    fork would copy this process with its OpenMP threads (numba's and torch's libgomp abort or hang
    in such a child), its CUDA context and its logging threads; spawn imports torch once a worker.

    The server and all workers inherit a mask of the signals that stop a run: sent to the whole
    process group, they are the training process's to answer, which still needs its workers.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([processes.__name__, __name__])
    # started by the server otherwise, and then it takes SIGINT and SIGTERM out of the mask first
    processes.start_resource_tracker()
    processes.start_server(processes.SIGNALS)
    return context


def _end_with_parent(worker: int) -> None:
    """In a worker: end with the training process, however that one ends.

    The server ends as soon as nobody holds the other end of its pipe, so this worker must not: then
    that is the training process's end alone. The system kills this worker as the server ends, even
    where it hangs or is stopped.
    """
    processes.end_with_parent()
    if os.getppid() == 1:  # the server ended before the system was asked: nobody would end this one
        os._exit(1)
    server: Any = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


def _stack(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.utils.data.default_collate(list(images)), _shared(torch.tensor(labels))


def _list(samples: list[tuple[tuple, int]]) -> tuple[list[tuple], torch.Tensor]:
    images, labels = zip(*samples, strict=True)
    return [(_shared(data), *rest) for data, *rest in images], _shared(torch.tensor(labels))


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """In a worker, the tensor in /dev/shm already: its queue would drop what does not fit there."""
    return tensor.share_memory_() if torch.utils.data.get_worker_info() else tensor
