"""The .beton file: FFCV's file format, version 2, with one image and one label per sample.

    format.py        the layout as numpy dtypes
    fields.py        which fields hold image and label, in a file of any writer
    checksums.py     checksums of the data pages, and the JSON in the header that holds them
    reader.py        BetonFile: read and check a file with numpy alone
    verify.py        check the data pages: all at once, or as they are read in training
    writer.py        write_beton: many processes encode, one writes
    encode.py        one image: resize, JPEG or raw
    jpeg.py          JPEG with restart markers
    pool.py          the worker processes
    disk_space.py    refuse a disk that is too small before writing
    output_lock.py   one writer per file, and only complete files under the final name
    summary.py       the summary, <file>.json
    merge.py         join the parts of one conversion
    __main__.py      python -m fast_imagenet.beton verify|merge

Nothing is imported here, so that reading a file does not load what only writing needs.
"""
