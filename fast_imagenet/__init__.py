"""Train ImageNet-class networks on FFCV files: what you would not change to change the training.

The two scripts beside this package are the program: `write_dataset.py` and `train_imagenet.py`. The
package holds the rest:

    config.py          read_config: defaults < YAML files < flags, every problem reported at once
    schedules.py       lr_at, resolution_at, ema_decay_at: pure functions of progress
    rng.py             keyed random numbers: hash(seed, epoch, sample, stream)
    metrics.py ema.py blurpool.py
    ops/               FFCV operations, one file each
    loader.py          the only file that touches ffcv.Loader
    torch_pipeline.py torch_augment.py   the same recipe on torchvision and a DataLoader
    augment.py         Augment: every random change to training images, as plain values
    batch_transforms.py   on the device: normalise, erase, mix
    beton/             the data file: write, check, read
    recode/            the writer's C library: plain JPEGs written anew
    sources/           where images come from: folders, archives, parquet, web data sets, drawn
    ones checkpoint.py runlog.py

Importing the package imports nothing else, so that a wrong setting is reported before anything
heavy is loaded.
"""
