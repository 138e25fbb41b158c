"""The .beton file: FFCV's file format, version 2, holding one image and one label a sample.

    format.py   the layout as numpy dtypes
    writer.py   write_beton: many processes encode, one writes
    output_lock.py   the final name: one writer at a time, only ever a complete file
    encode.py   what happens to one image: resize, JPEG or raw
    reader.py   BetonFile: read and check a file with numpy alone
    checksums.py   checksums, and the stamp in the header that holds them
    verify.py   check the data pages: all at once, or as they are read in training
    merge.py    join the parts of one conversion
    __main__.py python -m fast_imagenet.beton verify|merge

Nothing is imported here, so that reading a file does not load what only writing needs.
"""
