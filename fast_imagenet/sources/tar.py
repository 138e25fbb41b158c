"""Images read in place inside uncompressed tar files: an index of offsets, no extraction."""

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fast_imagenet.sources.base import MAX_IMAGE_BYTES, PackedNames, Source, SourceError

# What tarfile raises on a damaged archive: it checks little of numbers and extra headers.
UNREADABLE = (
    *(tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, LookupError, zlib.error),
)
MAX_HEADER_BYTES = 1 << 20  # long names and attributes, which tarfile reads into memory
_EXTRA_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class SmallHeaders(tarfile.TarInfo):
    """A member whose extra headers must be small: tarfile reads whatever size they claim."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTRA_HEADERS and not 0 <= self.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extra header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]  # of the standard library


class Member(NamedTuple):
    """A regular file inside a tar: its name, and where its bytes lie in the tar."""

    name: str
    offset: int
    size: int


def list_members(path: Path, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Regular files of the tar that lies at bytes `start` to `end` of the file `path`.

    Raises:
        SourceError: not a tar, a compressed or truncated one, or one with links or devices in it.
    """
    where = f"{path}, byte {start:,}" if start else str(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:", tarinfo=SmallHeaders) as archive:
                yield from _regular_files(archive, where, size if end is None else end)
    except SourceError:
        raise
    except UNREADABLE as error:
        raise SourceError(
            f"{where} is not a complete, uncompressed tar ({error}): fetch it again, or unpack its"
            " compression"
        ) from error


def _regular_files(archive: tarfile.TarFile, where: str, end: int) -> Iterator[Member]:
    while (info := archive.next()) is not None:
        # tarfile keeps every member that it has seen: a million of them are 1 GB
        archive.members = []  # type: ignore[attr-defined]
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            what = f"{where} holds {info.name!r}, a link, device or sparse file"
            raise SourceError(f"{what}: it must hold plain files only")
        if info.offset_data + info.size > end:
            raise SourceError(f"{where} is truncated inside {info.name!r}: fetch it again")
        yield Member(info.name, info.offset_data, info.size)
    if archive.fileobj.tell() - archive.offset < tarfile.BLOCKSIZE:
        raise SourceError(f"{where} has no end mark, so its end is missing: fetch it again")


def check_member(member: Member, path: Path) -> Member:
    """Refuse an image whose size makes no sense, before it is read."""
    if member.size > MAX_IMAGE_BYTES:
        raise SourceError(
            f"{path} holds {member.name!r} of {member.size:,} bytes: an image may have"
            f" {MAX_IMAGE_BYTES:,} at most"
        )
    return member


class TarSource(Source):
    """Images at known places of a few large files, which are opened on first use and kept open.

    Args:
        paths: the files.
        files: int64 [n], which of `paths` holds an image.
        members: the images.
        labels, classes, class_names: see Source.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        files: Sequence[int],
        members: Sequence[Member],
        labels: np.ndarray | Sequence[int],
        classes: Sequence[str],
        class_names: Sequence[str] | None = None,
    ) -> None:
        self._open: dict[int, BinaryIO] = {}
        super().__init__(labels, classes, class_names)
        self._paths = list(paths)
        self._files = np.asarray(files, np.int64)
        self._offsets = np.array([member.offset for member in members], np.int64)
        self._sizes = np.array([member.size for member in members], np.int64)
        self._names = PackedNames(member.name for member in members)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for handle in self._open.values():
            handle.close()

    def name(self, index: int) -> str:
        return f"{self._paths[self._files[index]]}/{self._names[index]}"

    def read(self, index: int) -> bytes:
        number, size = int(self._files[index]), int(self._sizes[index])
        if number not in self._open:
            self._open[number] = open(self._paths[number], "rb")  # noqa: SIM115
        self._open[number].seek(int(self._offsets[index]))
        data = self._open[number].read(size)
        if len(data) != size:
            raise SourceError(
                f"{self._paths[number]} ends {size - len(data)} bytes before an image does: the"
                " archive is truncated, fetch it again"
            )
        return data
