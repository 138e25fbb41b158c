"""Faults for the writer, each put into a real command: `inject(kind, folder) -> Outcome`.

An image that raises, kills or ends its worker, or is too large; a disk and a /dev/shm that are
full or too small. The small disks are mounted in a name space of the command's own, so that nothing
is left mounted however it ends.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tests.odd_images import as_jpeg, saved, scene  # noqa: E402

IMAGES = 80
BAD = 17  # the image that does it
IMAGE_FAULTS = ("raise", "kill", "exit", "oversized")
SHM = Path("/dev/shm")
SMALL_DISK = "size=1m"  # the images take 3 MB

# kind -> mounts (place: options), further flags of the command
KINDS = {
    "raise": ({}, ()),
    "kill": ({}, ()),
    "exit": ({}, ()),
    "oversized": ({}, ("--write.max_side=0",)),
    "full_disk": ({"out": SMALL_DISK}, ("--write.mode=raw", "--write.check_space=false")),
    "short_disk": ({"out": SMALL_DISK}, ("--write.mode=raw",)),
    "full_shm": ({str(SHM): "size=4k"}, ("--write.check_space=false",)),
    "short_shm": ({str(SHM): "size=4k"}, ()),
}
WORKER_FAULTS = ("raise", "kill", "exit", "oversized", "full_disk", "full_shm")


class CannotInject(Exception):  # noqa: N818  no error: the machine does not allow this fault
    """This machine does not let us mount a small file system."""


class Outcome(NamedTuple):
    """What became of a command with a fault.

    Attributes:
        seconds: to the end, from the fault; of a disk or /dev/shm, from when the data was opened.
        status: exit status; negative = killed by that signal.
        message: what the command said on its standard error.
        leftovers: files below the folder, objects in /dev/shm and living processes it has left.
    """

    seconds: float
    status: int
    message: str
    leftovers: list[str]


class Faulty:
    """Eighty images, one of which does `fault`; picklable, as workers need it."""

    kind, blocks, notes, makes_pixels = "test", None, (), False
    classes, class_names = ["a", "b"], None

    def __init__(self, fault="", note="", bad=BAD, sleepy=-1, shape=(20, 24)):
        self.fault, self.note, self.bad, self.sleepy = fault, note, bad, sleepy
        self.shape, self.labels = shape, np.arange(IMAGES) % 2

    def __len__(self):
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"faulty/{index}.JPEG"

    def read(self, index: int) -> bytes:
        if index == self.sleepy:
            time.sleep(100)
        if index == self.bad and self.fault in IMAGE_FAULTS:
            return self.fail()
        if self.fault == "slow":
            Path(f"{self.note}.{os.getpid()}").touch()
            time.sleep(0.2)
        return as_jpeg(scene(*self.shape, seed=index))

    def fail(self) -> bytes:
        if self.note:
            Path(self.note).touch()
        if self.fault == "raise":
            raise ZeroDivisionError("of the test")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "exit":
            os._exit(3)
        return wide_png()


def wide_png() -> bytes:
    """A small file of an image that is wider than any JPEG can be."""
    from PIL import Image

    return saved(Image.new("RGB", (66_000, 1)), "PNG")


# ------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------


def start(kind: str, folder: Path, workers: int = 2) -> subprocess.Popen:
    """Start write_dataset.py on a Faulty source; it writes to folder/out in a session of its own.

    Args:
        kind: one of KINDS, or 'slow': 0.2 s an image and no fault, to be killed from outside.

    Raises:
        CannotInject: the fault needs a mount, which is not allowed here.
    """
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    mounts, flags = KINDS.get(kind, ({}, ()))
    command = [sys.executable, str(ROOT / "tests/faults.py"), kind, str(folder), *flags]
    command += [f"--write.folder={out}", f"--write.workers={workers}"]
    if mounts:
        places = {str(out) if place == "out" else place: how for place, how in mounts.items()}
        steps = [f"mount -t tmpfs -o {how} tmpfs {place}" for place, how in places.items()]
        command = [*name_space(), "sh", "-c", " && ".join([*steps, 'exec "$@"']), "sh", *command]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def name_space() -> list[str]:
    """The command that gives another one mounts of its own: as root, or as root of a user space."""
    for flags in ("-m", "-Urm"):
        command = ["unshare", flags]
        test = [*command, "sh", "-c", "mount -t tmpfs -o size=4k tmpfs /dev/shm"]
        with contextlib.suppress(OSError):
            if subprocess.run(test, capture_output=True, timeout=20).returncode == 0:
                return command
    raise CannotInject("small file systems cannot be mounted here: it takes root or user spaces")


def inject(kind: str, folder: Path, workers: int = 2, timeout: float = 120) -> Outcome:
    """Run the writer with one fault of KINDS; `folder` is made, and should be empty.

    Raises:
        CannotInject: see `start`.
        subprocess.TimeoutExpired: the command hangs; it is killed with all its children.
    """
    process = start(kind, folder, workers)
    try:
        _, message = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    end = time.time()
    begin = (folder / "fault").stat().st_mtime
    left = leftovers(process.pid, folder / "out") + listed(folder / "left")
    return Outcome(end - begin, process.returncode, message, left)


def leftovers(pid: int, out: Path, grace: float = 2) -> list[str]:
    """Files in `out`, and what the ended writer `pid` has left in /dev/shm and running.

    Args:
        grace: seconds that processes get to end in.
    """
    deadline = time.monotonic() + grace
    while (living := session(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    objects = [str(path) for path in SHM.glob(f"*fast-imagenet-{pid}-*")]
    return [str(path) for path in sorted(out.iterdir())] + sorted(objects) + living


def session(number: int) -> list[str]:
    """Process id and command line of every living process of session `number`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
            if int(own) == number and state != "Z":
                line = path.with_name("cmdline").read_text().replace("\0", " ")
                found.append(f"process {path.parent.name}: {line}")
    return found


def listed(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main(argv: list[str]) -> int:
    """In the command: write a Faulty source, then note what lies on mounts that end with us."""
    from fast_imagenet import sources
    from tests.faults import Faulty  # by this name, which workers can import

    kind, folder, flags = argv[0], Path(argv[1]), argv[2:]
    note = folder / "fault"
    shape = (100, 120) if "disk" in kind else (20, 24)

    def open_source(*_, **__) -> Faulty:
        if kind not in IMAGE_FAULTS:
            note.touch()
        return Faulty(kind, str(note), shape=shape)

    sources.open_source = open_source
    import write_dataset  # takes the function from there

    out = folder / "out"
    status = write_dataset.main(["--source.kind=synthetic", "--source.split=train", *flags])
    if os.path.ismount(out):
        (folder / "left").write_text("".join(f"{path}\n" for path in sorted(out.iterdir())))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
