"""CUDA streams and events simulated by threads, to ask on a CPU what a GPU may do in which order.

A `Stream` carries out what is launched on it one after the other, in a thread of its own; nobody
waits for it unless told to, as on a GPU. `install` puts the simulation under FFCV's epoch iterator
and gives the loader a `ToDevice` whose copies are launched on these streams.
"""

import queue
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import torch

LIMIT = 30  # seconds after which a wait is given up: an error instead of a test that hangs
_CURRENT = threading.local()


class Stream:
    """Work launched on it runs in order; the launch itself returns at once."""

    def __init__(self):
        self._work = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            self._work.get()()

    def launch(self, work):
        self._work.put(work)

    def wait_event(self, event):
        flag = event.flag  # as it is now: an event recorded anew later is another point in time
        self.launch(lambda: flag.wait(LIMIT))

    def wait_stream(self, other):
        self.wait_event(Event().record(other))

    def synchronize(self):
        assert Event().record(self).flag.wait(LIMIT), "the stream did not come to an end"


class Event:
    """A point in the work of a stream."""

    def __init__(self):
        self.flag = threading.Event()
        self.flag.set()  # one that was never recorded keeps nobody waiting

    def record(self, stream):
        self.flag = threading.Event()
        stream.launch(self.flag.set)
        return self

    def wait(self):
        _CURRENT.stream.wait_event(self)


@contextmanager
def current(stream):
    """`stream` is where this thread launches its work meanwhile."""
    before, _CURRENT.stream = getattr(_CURRENT, "stream", None), stream
    try:
        yield
    finally:
        _CURRENT.stream = before


def launch(work):
    """Launch `work` on the current stream."""
    _CURRENT.stream.launch(work)


def install(monkeypatch, loader_module, copy_seconds: float = 0.0) -> SimpleNamespace:
    """Simulate a GPU below `loader_module` (fast_imagenet.data.ffcv_loader).

    Args: copy_seconds: how long a copy of a batch's images takes at least.
    Returns: `main`, the stream of the training step; `launched` and `copied`, one entry per copy.
    """
    import ffcv.loader.epoch_iterator as iterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation

    gpu = SimpleNamespace(main=Stream(), launched=[], copied=[])

    class ToDevice(Operation):
        def __init__(self, device, non_blocking):
            super().__init__()
            self.device, self.non_blocking = device, non_blocking

        def generate_code(self):
            def to_device(host, device):
                device = device[: len(host)]

                def copy():
                    time.sleep(copy_seconds)
                    device.copy_(host)
                    gpu.copied.append(1)

                gpu.launched.append(1)
                launch(copy)
                return device

            return to_device

        def declare_state_and_memory(self, state):
            memory = AllocationQuery(state.shape, dtype=state.dtype, device=torch.device("cpu"))
            return replace(state, device=self.device), memory

    cuda = SimpleNamespace(
        Stream=Stream, Event=Event, stream=current, current_stream=lambda: gpu.main
    )
    monkeypatch.setattr(iterator, "ch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(iterator, "IS_CUDA", True)
    monkeypatch.setattr(loader_module, "ToDevice", ToDevice)
    return gpu
