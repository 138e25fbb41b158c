"""A conversion with a fault in it: it ends with a sentence, and nothing is left of it."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from fast_imagenet.beton import disk_space, output_lock, pool
from fast_imagenet.beton import format as fmt
from fast_imagenet.beton import merge as merge_module
from fast_imagenet.beton.encode import Chunk, EncodedImage
from fast_imagenet.beton.merge import merge
from fast_imagenet.beton.reader import BetonFile
from fast_imagenet.beton.writer import write_beton
from tests import faults
from tests.conftest import ROOT
from tests.faults import CannotInject, Faulty, inject, leftovers, name_space, start

SAID = {
    "oversized": "faulty/17.JPEG: 66000 x 1 pixels",
    "full_disk": "No space left on device after 1.0 MB (the unfinished file was removed)",
    "short_disk": "train.beton needs about 2.9 MB; 1.0 MB are free on its disk: free some, choose",
    "full_shm": "in /dev/shm and 0.0 kB are free: remove what ended programs",
    "short_shm": "in /dev/shm and 0.0 kB are free: remove what ended programs",
}


@pytest.mark.parametrize("kind", SAID)
def test_a_fault_ends_the_command_and_nothing_is_left(kind, tmp_path):
    try:
        found = inject(kind, tmp_path, workers=1)
    except CannotInject as error:
        pytest.skip(str(error))
    assert found.status == 1
    assert SAID[kind] in found.message
    assert ("check_space=false" in found.message) == kind.startswith("short")
    assert "Traceback" not in found.message
    assert found.leftovers == []
    assert found.seconds < 60  # it did not hang; how soon it ends is measured on a quiet machine


def test_limit_on_the_size_of_files_is_a_sentence(tmp_path):
    """As under `ulimit -f`; also where no small disk can be mounted."""
    code = """
import resource, sys
from fast_imagenet.beton.writer import write_beton
from fast_imagenet.beton.encode import EncodeSettings
from tests.faults import Faulty
resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, 9 << 20))
try:
    write_beton(sys.argv[1], Faulty(shape=(100, 120)), EncodeSettings(mode="raw"))
except OSError as error:
    sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.beton")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "File too large after" in done.stderr and "free some space, choose" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------
# Estimates
# ------------------------------------------------------------------------------------------------


def chunks_of(sizes, skipped=0):
    images = [EncodedImage(bytes(int(size)), fmt.MODE_JPG, 1, 1, 0) for size in sizes]
    return [Chunk(images, skipped=[("name", "why")] * skipped)]


def test_estimate_is_the_mean_of_what_was_seen():
    rng = np.random.default_rng(0)
    sizes = rng.gamma(4, 10_000, 100_000)
    need, least = disk_space.estimate_file(chunks_of(sizes[:64]), len(sizes))
    row = fmt.SAMPLE.itemsize + fmt.ALLOCATION.itemsize
    true = sizes.sum() + row * len(sizes)
    assert abs(need - true) < 0.25 * true
    assert least < true
    assert 0.6 * need < least < 0.95 * need
    assert disk_space.estimate_file(chunks_of([100] * 64), 64) == (64 * (100 + row),) * 2
    half, _ = disk_space.estimate_file(chunks_of([100] * 32, skipped=32), 6400)
    assert half == 3200 * (100 + row)
    assert disk_space.estimate_file(chunks_of([], skipped=5), 10) == (0, 0)


def test_only_what_is_clearly_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 1_000_000_000)
    path = tmp_path / "train.beton"
    printed = f"{path} needs about 1.2 GB; 1.0 GB are free on its disk"
    assert disk_space.check_disk(path, 1.2e9, 0.9e9) == printed
    with pytest.raises(OSError, match=r"needs about 1\.2 GB; 1\.0 GB are free.*check_space=false"):
        disk_space.check_disk(path, 1.2e9, 1.01e9)
    both = r"needs about 600\.0 MB and 500\.0 MB for the files after it"
    with pytest.raises(OSError, match=both):
        disk_space.check_disk(path, 6e8, 6e8, more=5e8)
    assert disk_space.check_disk(path, 0, 0)


def test_the_space_of_files_still_to_come_is_reported(tmp_path):
    printed = []
    write_beton(tmp_path / "x.beton", Faulty(), later=40, report=printed.append)
    row = fmt.SAMPLE.itemsize + fmt.ALLOCATION.itemsize
    size = sum(BetonFile(tmp_path / "x.beton").sizes) + 80 * row
    reported = re.search(
        r"x\.beton needs about ([\d.]+) kB and ([\d.]+) kB for the files after", *printed
    )
    assert [float(number) * 1e3 for number in reported.groups()] == pytest.approx(
        [size, size / 2], rel=0.02
    )  # 64 of 80 images are seen


def test_a_job_that_fits_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 1_000_000)
    disk_space.check_shm(900_000)
    with pytest.raises(OSError, match=r"need 1\.1 MB in /dev/shm and 1\.0 MB are free.*shm-size"):
        disk_space.check_shm(1_000_001)


def test_merge_reports_the_size_and_names_no_flag_of_the_writer(tmp_path, monkeypatch):
    parts = [tmp_path / f"{number}.beton" for number in range(2)]
    for number, path in enumerate(parts):
        write_beton(path, Faulty(), shard=(number, 2))
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out.beton"
    with monkeypatch.context() as patch:
        patch.setattr(disk_space, "free_bytes", lambda folder: 1000)
        with pytest.raises(OSError, match=r"needs 16\.8 MB and 1\.0 kB are free") as short:
            merge(out, parts)
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(merge_module, "_write", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="choose another folder for OUT") as during:
        merge(out, parts)
    assert "--" not in str(short.value) + str(during.value)
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------------------------------
# Killed writers, second writers
# ------------------------------------------------------------------------------------------------


def wait_for_a_worker(process, folder):
    """Until a slow worker has begun; fails when the command ends before."""
    deadline = time.monotonic() + 60
    while not list(folder.glob("fault.*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_with_all_its_processes_and_cleared_by_the_next(tmp_path):
    """SIGKILL to the whole group leaves locks in /dev/shm, which nobody could remove."""
    process = start("slow", tmp_path, workers=1)
    try:
        wait_for_a_worker(process, tmp_path)
        path = tmp_path / "out" / "train.beton"
        second = subprocess.run(
            [sys.executable, "write_dataset.py", "--source.kind=synthetic",
             "--source.split=train", f"--write.folder={path.parent}"],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert second.returncode == 2
    holder = f"is being written by process {process.pid} on {socket.gethostname()}"
    assert holder in " ".join(second.stderr.split())
    left = leftovers(process.pid, path.parent, grace=10)
    assert left[0] == f"{path}.lock"
    assert left[1:] and all(name.startswith("/dev/shm/sem.fast-imagenet-") for name in left[1:])
    write_beton(path, Faulty(), workers=1)
    assert leftovers(process.pid, path.parent) == [str(path), f"{path}.json"]


def test_locks_of_the_living_and_of_others_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "SHM", tmp_path)
    done = subprocess.Popen(["true"])
    done.wait()
    here, elsewhere = os.stat("/proc/self/ns/pid").st_ino, 1
    kept = [f"{os.getpid()}-{here}-a", f"{os.getppid()}-{here}-b", "odd"]
    names = [*kept, f"{done.pid}-{here}-c", f"{done.pid}-{elsewhere}-d"]
    for name in names:
        (tmp_path / f"sem.fast-imagenet-{name}").touch()
    (tmp_path / "sem.mp-abc").touch()

    def left():
        pool.remove_dead_locks()
        return {path.name.removeprefix("sem.fast-imagenet-") for path in tmp_path.iterdir()}

    assert left() == {*kept, names[4], "sem.mp-abc"}
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    assert left() == {*kept, "sem.mp-abc"}


def test_lock_of_another_machine_is_dead_when_nobody_touches_it(tmp_path, monkeypatch):
    lock, path = tmp_path / "x.beton.lock", tmp_path / "x.beton"
    lock.write_text("1 elsewhere\n")
    assert "process 1 on the machine 'elsewhere'" in output_lock.find_output_problem(path, False)
    old = time.time() - output_lock.DEAD_SECONDS - 5
    os.utime(lock, (old, old))
    assert output_lock.find_output_problem(path, False) is None
    lock.write_text(f"{os.getppid()} {socket.gethostname()}\n")
    os.utime(lock, (old, old))  # here the process itself is asked
    assert "is being written" in output_lock.find_output_problem(path, False)
    lock.unlink()
    monkeypatch.setattr(output_lock, "BEAT_SECONDS", 0.01)
    threads = set(threading.enumerate())
    with output_lock.lock_output(path, overwrite=False):
        os.utime(lock, (old, old))
        deadline = time.monotonic() + 20
        while lock.stat().st_mtime == old and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock.stat().st_mtime > old + 1
    assert set(threading.enumerate()) <= threads and not lock.exists()


def test_writer_that_was_taken_over_does_not_publish(tmp_path, monkeypatch):
    path = tmp_path / "x.beton"

    def steal(self, index):
        path.with_name("x.beton.lock").write_text("1 elsewhere\n")
        return f"{index}"

    monkeypatch.setattr(Faulty, "name", steal)
    with pytest.raises(FileExistsError, match="was taken over by another process"):
        write_beton(path, Faulty())
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.beton.lock"]
    assert path.with_name("x.beton.lock").read_text() == "1 elsewhere\n"


def test_no_mounts_no_fault(monkeypatch, tmp_path):
    monkeypatch.setattr(faults.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(CannotInject):
        start("full_disk", tmp_path)


def test_a_disk_that_is_memory_holds_all_of_the_file(tmp_path):
    """A hole that is read through a map takes memory, and ends the process where there is none."""
    try:
        space = name_space()
    except CannotInject as error:
        pytest.skip(str(error))
    command = [sys.executable, "write_dataset.py", "--source.kind=synthetic", "--write.limit=80"]
    command += ["--source.split=train", "--write.workers=1", f"--write.folder={tmp_path}/disk/out"]
    (tmp_path / "disk").mkdir()
    disk = tmp_path / "disk"
    script = f"mount -t tmpfs -o size=$0 tmpfs {disk} && " + '"$@" >/dev/null; status=$?; '
    script += f"cd {disk}/out && stat -c '%n %b' * 2>/dev/null; exit $status"
    for size, status in (("4200k", 1), ("20m", 0)):
        done = subprocess.run(
            [*space, "sh", "-c", script, size, *command],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert ("No space left on device after" in done.stderr) == (status == 1)
        blocks = dict(line.split() for line in done.stdout.splitlines())
        if status:
            assert not blocks
        else:
            assert sorted(blocks) == ["train.beton", "train.beton.json"]
            assert int(blocks["train.beton"]) * 512 > 8 << 20  # no hole is left


def test_a_pool_ends_when_a_worker_was_stopped_in_the_middle_of_its_result():
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    assert executor.submit(abs, -1).result(60) == 1
    thread = executor._executor_manager_thread
    begin = (1 << 20).to_bytes(4, "big") + b"of more"
    os.write(executor._result_queue._writer.fileno(), begin)
    pool._stop(executor, [])
    thread.join(20)
    assert not thread.is_alive()
