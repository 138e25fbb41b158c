"""Train ImageNet-class networks on FFCV files: what you would not change to change the training.

The two scripts beside this package are the program: `write_dataset.py` and `train_imagenet.py`. The
package holds the rest, one room for each part (docs/design.md draws them):

    engine/    what surrounds a training loop: checkpoints, log, signals, ranks, metrics, schedules
    data/      from a file to a batch on the device
    models/    networks by name, BlurPool, where weights come from
    ops/       FFCV operations, usable alone
    native/    the C library, compiled by setup.py: JPEGs to crops, JPEGs rewritten for the file
    beton/     the data file: write, check, read
    sources/   where images come from: folders, archives, Parquet, WebDataset, synthetic

Importing the package imports nothing else, so that a wrong setting is reported before anything
heavy is loaded.
"""
