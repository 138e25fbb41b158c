"""Checksums: no altered file passes, and parts of a conversion become the file of a single one."""

import json
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import write_dataset
from fast_imagenet.beton import format as fmt
from fast_imagenet.beton.__main__ import main
from fast_imagenet.beton.checksums import (
    BlockChecksums,
    table_from_text,
    table_to_text,
    write_tables,
)
from fast_imagenet.beton.encode import Chunk, ConversionError, EncodedImage, EncodeSettings
from fast_imagenet.beton.merge import merge
from fast_imagenet.beton.reader import BetonError, BetonFile, sidecar_path
from fast_imagenet.beton.verify import PageChecks, verify
from fast_imagenet.beton.writer import PageFile, write_beton
from fast_imagenet.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
COUNT = 120
FLAGS = ("--source.kind=synthetic", "--source.split=train", "--source.synthetic_train=61")


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    """120 drawn images, most of them raw, in two pages of 2 MiB."""
    path = tmp_path_factory.mktemp("several") / "train.beton"
    write(path)
    assert BetonFile(path).data_end >= 3 * fmt.MIN_PAGE_SIZE
    return path


@pytest.fixture
def copy(several, tmp_path) -> Path:
    path = tmp_path / "train.beton"
    shutil.copy(several, path)
    shutil.copy(sidecar_path(several), sidecar_path(path))
    return path


def write(path: Path, page_size: int = fmt.MIN_PAGE_SIZE, **changes) -> None:
    settings = EncodeSettings(mode="proportion", jpeg_share=0.1, max_side=0)
    source = open_source("synthetic", "", "train", size=COUNT)
    write_beton(path, source, settings, page_size=page_size, **changes)


def alter(path: Path, position: int, new: bytes) -> bytes:
    """Overwrite bytes of a file; returns the old ones."""
    with open(path, "r+b") as file:
        file.seek(position)
        old = file.read(len(new))
        file.seek(position)
        file.write(new)
    return old


def flip(path: Path, position: int, bit: int) -> None:
    with open(path, "rb") as file:
        file.seek(position)
        old = file.read(1)[0]
    alter(path, position, bytes([old ^ (1 << bit)]))


def refused(path: Path, full: bool) -> bool:
    """Whether verify refuses the file, in sentences of one line that name it and a remedy."""
    findings = verify(path, full).findings
    for sentence in findings:
        assert "\n" not in sentence
        assert str(path) in sentence
        assert "again" in sentence
    return bool(findings)


# ------------------------------------------------------------------------------------------------
# Sums
# ------------------------------------------------------------------------------------------------


def test_blocks_are_summed_whatever_the_pieces():
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    data[2000:3500] = 0
    sums = BlockChecksums(1000)
    sums.add(memoryview(data[:700]))
    sums.add(memoryview(data[700:2000]))
    sums.add_zeros(1500)
    sums.add(memoryview(data[3500:]))
    expected = [zlib.crc32(data[start : start + 1000]) for start in range(0, 5000, 1000)]
    assert sums.table().tolist() == expected
    assert table_from_text(table_to_text(sums.table())).tolist() == expected


def test_sums_are_those_of_the_file(several):
    file = BetonFile(several)
    size, first = file.header_json["block_bytes"], file.header_json["first_block"]
    data = several.read_bytes()[first * size : file.data_end]
    found = [zlib.crc32(data[start : start + size]) for start in range(0, len(data), size)]
    assert found == file.block_checksums.tolist()
    assert file.header_json["settings"] == file.sidecar["settings"]
    assert file.header_json["num_samples"] == COUNT
    assert file.header_json["shard"] == [0, 1]
    assert verify(several, full=True)[:2] == ([], [])


def test_sums_when_the_page_has_grown(tmp_path):
    """Blocks keep the first page size: data begins inside a grown page."""
    path = tmp_path / "train.beton"
    with open(path, "wb") as out:
        pages = PageFile(out, 3, fmt.MIN_PAGE_SIZE)
        for size in (1000, 5 << 20, 1000):
            pages.append(raw_chunk(size // 1000, 1000))
        sums = pages.finish(FAKE_ABOUT)
    file = BetonFile(path)
    assert file.page_size == 8 << 20
    assert file.header_json["block_bytes"] == fmt.MIN_PAGE_SIZE
    assert file.header_json["first_block"] == 1
    file.block_checksums = sums
    checks = PageChecks(file)
    read = checks.check(file.offsets // file.page_size)
    assert read == file.data_end - fmt.MIN_PAGE_SIZE
    flip(path, int(file.offsets[1]) + 3_000_000, 0)
    assert refused(path, full=True)


FAKE_ABOUT = {
    "classes_sha256": "",
    "settings": {},
    "order_crc32": 0,
    "shard": [0, 1],
    "num_classes": 1000,
}


def raw_chunk(height: int, row_bytes: int):
    width = row_bytes // 3
    size = 3 * height * width
    stored = np.random.default_rng(size).bytes(size)
    return Chunk([EncodedImage(stored, fmt.MODE_RAW, width, height, 0)])


# ------------------------------------------------------------------------------------------------
# Altered files
# ------------------------------------------------------------------------------------------------


def test_any_flip_and_any_cut_is_refused(copy):
    rng, size = np.random.default_rng(1), copy.stat().st_size
    for _ in range(170):
        position, bit = int(rng.integers(size)), int(rng.integers(8))
        flip(copy, position, bit)
        assert refused(copy, full=True), (position, bit)
        flip(copy, position, bit)
    assert not refused(copy, full=True)
    for length in sorted(rng.integers(0, size, 30).tolist(), reverse=True):
        with open(copy, "r+b") as file:
            file.truncate(length)
        assert refused(copy, full=True), length


@pytest.mark.parametrize("part", ["header and fields", "metadata", "gap", "allocation table"])
def test_flips_outside_the_pages_are_refused_when_opened(part, copy):
    """All bits of the header, some of the rest: without reading a page, so before training."""
    file = BetonFile(copy)
    metadata_end = fmt.METADATA_START + COUNT * fmt.SAMPLE.itemsize
    spans = {
        "header and fields": (0, fmt.METADATA_START, 101),
        "metadata": (fmt.METADATA_START, metadata_end, 211),
        "gap": (metadata_end, fmt.MIN_PAGE_SIZE, 300_007),
        "allocation table": (file.data_end, copy.stat().st_size, 211),
    }
    start, end, step = spans[part]
    bits = list(range(8 * start, 8 * end, step))
    bits += list(range(8 * fmt.HEADER.itemsize)) if start == 0 else []
    for bit in bits:
        flip(copy, bit // 8, bit % 8)
        with pytest.raises(BetonError):
            BetonFile(copy)
        flip(copy, bit // 8, bit % 8)
    BetonFile(copy)


def test_header_without_valid_checksums_is_refused(copy):
    area = fmt.HEADER.itemsize + fmt.FIELD.fields["arguments"][1]
    for text in (b"[" * 1020, b"{}", b"7", b"\xff" * 1020, b'{"stamp":1}'):
        old = alter(copy, area, text.ljust(1020, b"\0"))
        with pytest.raises(BetonError, match="checksums in its header"):
            BetonFile(copy)
        alter(copy, area, old)


def test_file_without_checksums_is_accepted_with_a_note(copy, capsys):
    """Stock FFCV's files, and those of early versions with a class list's digest alone."""
    area = fmt.HEADER.itemsize + fmt.FIELD.fields["arguments"][1]
    digest = BetonFile(copy).class_digest
    note = {"written_by": "fast-imagenet", "num_classes": 10, "classes_sha256": digest}
    for text in (b"", json.dumps(note).encode()):
        alter(copy, area, text.ljust(1024, b"\0"))
        assert not BetonFile(copy).header_json
        assert main(["verify", str(copy), "--full"]) == 0
        assert "has no checksums" in capsys.readouterr().out
        assert "not checked" in PageChecks(copy).why_not
        assert PageChecks(copy).check(np.array([1])) == 0


def test_without_its_summary_a_file_is_still_checked_as_a_whole(copy, capsys):
    sidecar_path(copy).unlink()
    assert main(["verify", str(copy), "--full"]) == 0
    assert "is missing" in capsys.readouterr().out
    assert PageChecks(copy).why_not
    flip(copy, int(BetonFile(copy).offsets[50]), 0)
    assert main(["verify", str(copy)]) == 0
    capsys.readouterr()
    assert main(["verify", str(copy), "--full"]) == 1
    assert "the checksum of its images is wrong" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["whole", "no summary", "no checksums"])
def test_info_and_verify_say_what_is_known_and_checked(state, copy, capsys):
    file = BetonFile(copy)
    if state != "whole":
        sidecar_path(copy).unlink()
    if state == "no checksums":
        alter(copy, fmt.HEADER.itemsize + fmt.FIELD.fields["arguments"][1], bytes(1024))
    assert main(["info", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == np.bincount(file.labels).tolist()
    assert (
        found["modes"] == file.sidecar["modes"] and found["max_width"] == file.images["width"].max()
    )
    assert found["classes"] == (file.classes if state == "whole" else None)
    assert found["settings"].get("jpeg_share") == (None if state == "no checksums" else 0.1)
    checksums = {"whole": "pages and tables", "no summary": "tables", "no checksums": "none"}[state]
    assert found["checksums"] == checksums
    assert main(["info", str(copy)]) == 0
    printed = capsys.readouterr().out
    for words in (f"{COUNT} images of 10 classes", f"checksums of {checksums};", "raw; at most"):
        assert words in printed
    assert ("unusual" in printed) == (state == "whole")
    for flags, count in (([], 2), (["--full"], 3)):
        assert main(["verify", str(copy), "--json", *flags]) == 0
        verdict = json.loads(capsys.readouterr().out)
        assert len(verdict["checked"]) == (1 if state == "no checksums" else count)
        assert main(["verify", str(copy), *flags]) == 0
        assert f"no fault found in {', '.join(verdict['checked'])}" in capsys.readouterr().out
    copy.write_bytes(copy.read_bytes()[:-1])
    assert main(["info", str(copy)]) == 1
    assert main(["verify", str(copy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"]


def test_summary_of_another_file_is_refused(copy):
    summary = json.loads(sidecar_path(copy).read_text())
    sums = summary["blocks_crc32"]
    changes = [
        {"blocks_crc32": "0" * len(sums)},
        {"blocks_crc32": sums[:-8]},
        {"blocks_crc32": "no digits"},
        {"blocks_crc32": 7},
        {"classes": summary["classes"][::-1]},
    ]
    for change in changes:
        sidecar_path(copy).write_text(json.dumps({**summary, **change}))
        with pytest.raises(BetonError, match=r"train\.beton\.json"):
            BetonFile(copy)


def test_command_names_each_damaged_page(copy, capsys):
    file = BetonFile(copy)
    samples = [5, COUNT - 5]
    for sample in samples:
        flip(copy, int(file.offsets[sample]) + 100, 6)
    assert main(["verify", str(copy)]) == 0
    assert "--full" in capsys.readouterr().out
    assert main(["verify", str(copy), "--full"]) == 1
    lines = capsys.readouterr().err.splitlines()
    pages = [file.offsets[sample] // file.page_size for sample in samples]
    assert len(lines) == 2
    for line, page in zip(lines, pages, strict=True):
        assert f"page {page} " in line
    assert main(["verify", str(copy.parent / "none.beton"), str(copy)]) == 1


def test_million_samples(tmp_path):
    """Tables of ImageNet's size around pages that are a hole: checked, and a flip is found."""
    count, size, page = 1_281_167, 101_000, 8 << 20
    samples, allocations = np.zeros(count, fmt.SAMPLE), np.zeros(count, fmt.ALLOCATION)
    start, index = fmt.align_up(fmt.METADATA_START + samples.nbytes, page), np.arange(count)
    offsets = start + index // (page // size) * page + index % (page // size) * size
    images = samples["image"]
    images["height"], images["width"], images["data_ptr"] = 300, 400, offsets
    allocations["sample_id"], allocations["ptr"], allocations["size"] = index, offsets, size
    path, end = tmp_path / "train.beton", fmt.align_up(int(offsets[-1]) + size, page)
    with open(path, "wb") as out:
        write_tables(
            out, samples, [allocations], (page, start, end), BlockChecksums(page), FAKE_ABOUT
        )
    begin = time.process_time()  # not the clock: other tests may run beside this one
    assert main(["verify", str(path)]) == 0
    assert time.process_time() - begin < 1
    flip(path, fmt.METADATA_START + 24 * 700_000 + 1, 0)  # a width
    with pytest.raises(BetonError, match="the checksum of its header and tables is wrong"):
        BetonFile(path)


def test_verify_needs_numpy_only(several):
    code = (
        "import sys; from fast_imagenet.beton.__main__ import main;"
        f" assert main(['verify', {str(several)!r}, '--full']) == 0;"
        " assert not {'ffcv', 'torch', 'cv2', 'PIL', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# ------------------------------------------------------------------------------------------------
# While training
# ------------------------------------------------------------------------------------------------


def test_each_page_is_checked_once_and_a_damaged_one_named(copy):
    file = BetonFile(copy)
    pages = file.offsets // file.page_size
    flip(copy, int(file.offsets[-1]) + 9, 3)
    checks = PageChecks(copy)
    assert checks.why_not is None
    good = pages[pages < pages[-1]]
    assert checks.check(good) == len(set(good.tolist())) * file.page_size
    assert checks.check(good) == 0
    with pytest.raises(BetonError, match=rf"{copy}.*page {pages[-1]} .*samples \d+ to 119.*again"):
        checks.check(pages)


# ------------------------------------------------------------------------------------------------
# Parts
# ------------------------------------------------------------------------------------------------


def same_samples(one: Path, other: Path) -> None:
    first, second = BetonFile(one), BetonFile(other)
    assert len(first) == len(second)
    for index in range(len(first)):
        a, b = first.read(index), second.read(index)
        assert first.labels[index] == second.labels[index]
        np.testing.assert_array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8))
    assert first.modes.tolist() == second.modes.tolist()
    assert first.heights.tolist() == second.heights.tolist()


def parts_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("train.part-*.beton"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Folder with 61 images converted at once, and in three parts by the command."""
    folder = tmp_path_factory.mktemp("parts")
    flags = [*FLAGS, f"--write.folder={folder}", "--write.workers=1", "--write.max_side=64"]
    assert write_dataset.main(flags) == 0
    for number in (2, 0, 1):
        shard = [f"--source.shard={number}", "--source.shards=3"]
        assert write_dataset.main([*flags, *shard]) == 0
    assert [path.name for path in parts_in(folder)] == [
        f"train.part-000{number}-of-0003.beton" for number in range(3)
    ]
    return folder


def test_parts_become_the_file_of_a_single_conversion(parts, tmp_path, capsys):
    out = tmp_path / "new" / "train.beton"
    assert main(["merge", str(out), *map(str, parts_in(parts)[::-1])]) == 0
    assert "61 images from 3 parts" in capsys.readouterr().out
    single = parts / "train.beton"
    same_samples(out, single)
    merged, once = BetonFile(out), BetonFile(single)
    different = {"first_block", "blocks_crc32"}
    for key in set(once.header_json) - different:
        assert merged.header_json[key] == once.header_json[key], key
    different = {"seconds", "images_per_second", "file_bytes", "blocks_crc32"}
    for key in set(once.sidecar) - different:
        assert merged.sidecar[key] == once.sidecar[key], key
    assert verify(out, full=True)[:2] == ([], [])
    assert sorted(file.name for file in out.parent.iterdir()) == ["train.beton", "train.beton.json"]
    before = out.read_bytes()
    assert main(["merge", str(out), *map(str, parts_in(parts))]) == 1
    assert "exists" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_merged_file_in_several_pages_of_several_sizes(tmp_path):
    """The second part's pages are larger than the first's."""
    write(tmp_path / "once.beton")
    names = [tmp_path / f"{number}.beton" for number in range(3)]
    for number, path in enumerate(names):
        write(path, shard=(number, 3))
    grow_page(names[1])
    merge(tmp_path / "merged.beton", names)
    same_samples(tmp_path / "merged.beton", tmp_path / "once.beton")
    assert BetonFile(tmp_path / "merged.beton").page_size == 2 * fmt.MIN_PAGE_SIZE
    assert PageChecks(tmp_path / "merged.beton").check(np.arange(1, 3)) > 0


def grow_page(path: Path) -> None:
    """Make a file one of pages twice as large, as a large image at the end would have."""
    file = BetonFile(path)
    size, start = file.block_bytes, file.block_bytes * file.first_block
    data, samples = path.read_bytes(), np.zeros(len(file), fmt.SAMPLE)
    samples[:] = np.frombuffer(data[fmt.METADATA_START :][: samples.nbytes], fmt.SAMPLE)
    allocations = np.frombuffer(data[file.data_end :], fmt.ALLOCATION)
    sums, end = BlockChecksums(size), fmt.align_up(file.data_end, 2 * size)
    sums.add(memoryview(data[start : file.data_end].ljust(end - start, b"\0")))
    kept = {
        key: file.header_json[key]
        for key in ("written_by", "num_classes", "classes_sha256", "settings", "order_crc32")
    }
    with open(path, "r+b") as out:
        out.seek(file.data_end)
        out.write(bytes(end - file.data_end))
        kept["shard"] = file.header_json["shard"]
        write_tables(out, samples, [allocations], (2 * size, start, end), sums, kept)
    summary = {**file.sidecar, "blocks_crc32": table_to_text(sums.table())}
    sidecar_path(path).write_text(json.dumps(summary))


def test_only_missing_parts_are_converted_again(parts, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(parts, folder)
    flags = [*FLAGS, f"--write.folder={folder}", "--write.workers=1", "--source.shards=3"]
    flags += ["--source.shard=1", "--write.max_side=64"]
    part = parts_in(folder)[1]
    before = part.read_bytes(), part.stat().st_ino
    assert write_dataset.main(flags) == 0
    assert "complete, kept" in capsys.readouterr().out
    assert (part.read_bytes(), part.stat().st_ino) == before
    assert write_dataset.main([*flags, "--write.quality=50"]) == 1
    assert "other settings" in capsys.readouterr().err
    assert part.stat().st_ino == before[1]
    sidecar_path(part).unlink()  # killed between the two names
    assert write_dataset.main(flags) == 0
    assert sidecar_path(part).exists()
    assert part.read_bytes() == before[0]
    with open(part, "r+b") as file:
        file.truncate(1000)
    assert write_dataset.main(flags) == 1
    assert "after removing it" in capsys.readouterr().err
    part.unlink()
    assert write_dataset.main(flags) == 0
    assert part.read_bytes() == before[0]


def test_part_beyond_the_last_is_refused(tmp_path, capsys):
    flags = [*FLAGS, f"--write.folder={tmp_path}", "--source.shards=3", "--source.shard=3"]
    with pytest.raises(SystemExit) as caught:
        write_dataset.main(flags)
    assert caught.value.code == 2
    assert "must be below" in capsys.readouterr().err


def test_parts_that_do_not_belong_together(parts, tmp_path):
    first, second, third = parts_in(parts)
    out = tmp_path / "out.beton"
    with pytest.raises(ConversionError, match=r"parts \[1\] are missing"):
        merge(out, [first, third])
    with pytest.raises(ConversionError, match="there are 4 files"):
        merge(out, [first, second, third, first])
    with pytest.raises(ConversionError, match="not parts of one conversion"):
        merge(out, [first, second, parts / "train.beton"])
    lonely = tmp_path / "lonely.beton"
    shutil.copy(third, lonely)
    with pytest.raises(ConversionError, match=r"lonely\.beton\.json"):
        merge(out, [first, second, lonely])
    assert not out.exists()


def test_damaged_part_is_refused(parts, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(parts, folder)
    damaged = parts_in(folder)[1]
    flip(damaged, int(BetonFile(damaged).offsets[3]) + 50, 2)
    with pytest.raises(BetonError, match=r"part-0001.*checksum of page"):
        merge(tmp_path / "out.beton", parts_in(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_name_that_is_none_and_a_device_are_sentences(parts, capsys):
    files = [str(path) for path in sorted(parts.glob("*.part-*.beton"))]
    for name in ("", ".", "/"):
        assert main(["merge", name, *files]) == 1
        assert "is a folder where a file must go" in capsys.readouterr().err
    assert main(["verify", "/dev/zero"]) == 1
    assert "/dev/zero is not an ordinary file" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["counts", "source", "odd", "notes", "skipped", "seconds"])
def test_a_part_with_a_damaged_summary_is_named(parts, tmp_path, capsys, key):
    shutil.copytree(parts, tmp_path / "parts")
    files = sorted((tmp_path / "parts").glob("*.part-*.beton"))
    summary = json.loads(sidecar_path(files[0]).read_text())
    sidecar_path(files[0]).write_text(json.dumps(summary | {key: None}))
    assert main(["merge", str(tmp_path / "out.beton"), *map(str, files)]) == 1
    assert f"{sidecar_path(files[0])} is incomplete" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
