"""Milliseconds per image of each operation: ours, stock FFCV's, Pillow's and torchvision's.

    python benchmarks/op_kernels.py --images FOLDER --json out.json

One core, batches of crops of photographs at 160 and 224 px, every operation at full probability.
Operations that work in place get a fresh copy of the batch each time, outside the timing. What is
timed stands in operations.py.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import common

LEAST_SECONDS = 0.01  # a timed call repeats its batch until it lasts so long
FLAGS = common.IMAGES | {
    "limit": {"default": 64, "help": "different images at most"},
    "sides": {"type": int, "nargs": "+", "default": [160, 224], "help": "resolutions, px"},
}


def read_arguments(argv):
    parser = common.argument_parser(__doc__, images=True, rounds=5)
    parser.set_defaults(limit=64)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="pixels")
    return parser.parse_args(argv)


# ==== Who does it: each makes a function that runs one batch ======================================


def ours(operation):
    """An operation of this package: changes the batch in place, or fills its own."""

    def make(images_bhwc):
        import numpy as np

        samples = np.arange(len(images_bhwc))
        return lambda batch: operation.transform(batch, samples)

    return make


def ours_normalize(dtype: str):
    """Normalize, compiled into FFCV's pipeline like stock NormalizeImage."""
    from fast_imagenet.ops import Normalize

    return stock(Normalize(MEAN, STD, dtype))


def stock(*operations):
    """FFCV operations one after the other, compiled as its loader compiles them."""

    def make(images_bhwc):
        import numpy as np

        state, stages = _first_state(images_bhwc.shape[1:]), []
        for operation in operations:
            state, stage = _stage(operation, state, len(images_bhwc))
            stages.append(stage)
        indices = np.arange(len(images_bhwc))

        def run(batch):
            for code, memory, with_indices in stages:
                batch = code(batch, memory, indices) if with_indices else code(batch, memory)
            return batch

        return run

    return make


def _first_state(shape):
    import numpy as np
    import torch
    from ffcv.pipeline.state import State

    return State(jit_mode=True, device=torch.device("cpu"), dtype=np.dtype("u1"), shape=shape)


def _stage(operation, state, count: int):
    import numpy as np
    from ffcv.pipeline.compiler import Compiler

    state, query = operation.declare_state_and_memory(state)
    memory = None if query is None else np.empty((count, *query.shape), query.dtype)
    source = operation.generate_code()
    return state, (Compiler.compile(source), memory, getattr(source, "with_indices", False))


def pillow(function):
    """A function of one PIL image."""

    def make(images_bhwc):
        from PIL import Image

        pictures = [Image.fromarray(image) for image in images_bhwc]
        return lambda batch: [function(picture) for picture in pictures]

    return make


def tensor(transform):
    """A torchvision transform of one uint8 tensor (3, h, w) at a time."""

    def make(images_bhwc):
        import torch

        pictures = torch.from_numpy(images_bhwc).permute(0, 3, 1, 2).contiguous()
        return lambda batch: [transform(picture) for picture in pictures]

    return make


def whole_batch(function):
    """A function of the uint8 batch as a tensor [b, h, w, 3]."""

    def make(images_bhwc):
        import torch

        return lambda batch: function(torch.from_numpy(batch))

    return make


# ==== The operations ==============================================================================


def color_operations() -> dict:
    """Name -> who -> maker, for what changes one image's colours."""
    from ffcv.transforms import RandomBrightness, RandomContrast, RandomSaturation
    from PIL import Image, ImageEnhance, ImageFilter, ImageOps
    from torchvision.transforms import v2

    from fast_imagenet import ops

    def enhance(enhancer):
        return pillow(lambda picture: enhancer(picture).enhance(random.uniform(0.6, 1.4)))

    def jitter(stock_ops, by_pillow, **strength):
        return {
            "ours": ours(ops.ColorJitter(**strength)),
            "ffcv": stock_ops and stock(*stock_ops),
            "pillow": by_pillow or pillow(v2.ColorJitter(**strength)),
            "torchvision": tensor(v2.ColorJitter(**strength)),
        }

    all_three = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    stock_three = [kind(0.4, 1) for kind in (RandomBrightness, RandomContrast, RandomSaturation)]
    return {
        "brightness": jitter([stock_three[0]], enhance(ImageEnhance.Brightness), brightness=0.4),
        "contrast": jitter([stock_three[1]], enhance(ImageEnhance.Contrast), contrast=0.4),
        "saturation": jitter([stock_three[2]], enhance(ImageEnhance.Color), saturation=0.4),
        "hue": jitter(None, None, hue=0.1),
        "ColorJitter 0.4/0.4/0.4": jitter(stock_three, None, **all_three),
        "grayscale": {
            "ours": ours(ops.RandomGrayscale(1.0)),
            "pillow": pillow(lambda picture: Image.merge("RGB", [picture.convert("L")] * 3)),
            "torchvision": tensor(v2.Grayscale(3)),
        },
        "solarize": {
            "ours": ours(ops.RandomSolarize(128, 1.0)),
            "pillow": pillow(partial(ImageOps.solarize, threshold=128)),
            "torchvision": tensor(v2.RandomSolarize(128, 1.0)),
        },
        "Gaussian blur": {
            "ours": ours(ops.GaussianBlur((0.1, 2.0), 1.0)),
            "pillow": pillow(
                lambda picture: picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2)))
            ),
            "torchvision": tensor(v2.GaussianBlur(23, (0.1, 2.0))),
        },
    }


def policy_operations() -> dict:
    """Name -> who -> maker, for the automatic policies; torchvision's on PIL images too."""
    from timm.data.auto_augment import rand_augment_transform
    from torchvision.transforms import v2

    from fast_imagenet import ops

    def policy(operation, peer):
        return {"ours": ours(operation), "pillow": pillow(peer), "torchvision": tensor(peer)}

    timm = rand_augment_transform("rand-m9-inc1", {"translate_const": 100})
    return {
        "RandAugment lite": policy(ops.RandAugment(2, 9, mode="lite"), v2.RandAugment(2, 9)),
        "RandAugment full": policy(ops.RandAugment(2, 9, mode="full"), v2.RandAugment(2, 9)),
        "RandAugment timm": {
            "ours": ours(ops.RandAugment(2, 9, mode="timm")),
            "pillow": pillow(timm),
        },
        "TrivialAugmentWide": policy(ops.TrivialAugmentWide(), v2.TrivialAugmentWide()),
        "AutoAugment": policy(ops.AutoAugment(), v2.AutoAugment()),
        "ThreeAugment": {
            "ours": ours(ops.ThreeAugment()),
            "pillow": pillow(
                v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(128, 1.0), v2.GaussianBlur(23)])
            ),
        },
    }


def batch_operations(side: int) -> dict:
    """Name -> who -> maker, for erasing, moving, flipping, normalising and mixing."""
    import numpy as np
    import torch
    from ffcv.transforms import Cutout, ImageMixup, NormalizeImage, RandomTranslate
    from torchvision.transforms import v2

    from fast_imagenet import ops

    table = np.array(MEAN) * 255, np.array(STD) * 255
    to_float = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    shift = side // 8
    return {
        "erasing": {
            "ours": ours(ops.RandomErasing(1.0, "const")),
            "ffcv": stock(Cutout(side // 3)),
            "torchvision": tensor(v2.RandomErasing(1.0)),
        },
        "translate": {
            "ours": ours_translate(shift),
            "ffcv": stock(RandomTranslate(shift)),
            "pillow": pillow(v2.RandomAffine(0, (0.125, 0.125))),
            "torchvision": tensor(v2.RandomAffine(0, (0.125, 0.125))),
        },
        "crop, resize and flip": resize_and_flip(side),
        "normalize to float32": {
            "ours": ours_normalize("float32"),
            "ffcv": stock(NormalizeImage(*table, np.float32)),
            "torchvision": tensor(to_float),
        },
        "normalize to float16": {
            "ours": ours_normalize("float16"),
            "ffcv": stock(NormalizeImage(*table, np.float16)),
        },
        "mixup and normalize to float32": {
            "ours": whole_batch(mixup_ours),
            "ffcv": stock(ImageMixup(0.2, True), NormalizeImage(*table, np.float32)),
            "torchvision": whole_batch(mixup_torchvision),
        },
    }


def ours_translate(shift: int):
    """The nearest-neighbour map of the policies, as a move of whole pixels."""

    def make(images_bhwc):
        import numpy as np

        from fast_imagenet.ops.geometry import SLACK, resample_nearest, shift_map

        source = np.empty(images_bhwc[0].nbytes + SLACK, np.uint8)

        def run(batch):
            for image_hwc in batch:
                source[: image_hwc.nbytes] = image_hwc.reshape(-1)
                move = (random.randint(-shift, shift), random.randint(-shift, shift))
                inverse = shift_map(*map(float, move))
                resample_nearest(np.uintp(source.ctypes.data), inverse, (0, 0, 0), image_hwc)

        return run

    return make


def mixup_ours(images_bhwc):
    from fast_imagenet.data.device_transforms import Mixing, normalize_and_mix

    return normalize_and_mix(images_bhwc, MEAN, STD, Mixing(lam=0.7, box=None))


def mixup_torchvision(images_bhwc):
    import torch
    from torchvision.transforms import v2

    images_bchw = images_bhwc.permute(0, 3, 1, 2)
    images_bchw = v2.functional.to_dtype(images_bchw, torch.float32, scale=True)
    images_bchw = v2.functional.normalize(images_bchw, list(MEAN), list(STD))
    labels = torch.zeros(len(images_bchw), dtype=torch.int64)
    return v2.MixUp(alpha=0.2, num_classes=10)(images_bchw, labels)


def resize_and_flip(side: int) -> dict:
    """The part of the decoders behind the decoding: a crop, 1.3 times the size, mirrored by half.

    The image is enlarged beforehand; only shrinking and mirroring are timed.
    """
    from PIL import Image
    from torchvision.transforms import v2

    tall, wide = int(1.3 * side), int(1.4 * side)

    def enlarge(image_hwc):
        import cv2

        return cv2.resize(image_hwc, (wide, tall))

    def by_function(function, convert=lambda image: image):
        def make(images_bhwc):
            large = [convert(enlarge(image)) for image in images_bhwc]
            return lambda batch: [function(image) for image in large]

        return make

    def by_ours(image):
        import numpy as np

        from fast_imagenet.ops.resize import BILINEAR, resize_box

        resized = np.empty((side, side, 3), np.uint8)
        place, result = np.uintp(image.ctypes.data), np.uintp(resized.ctypes.data)
        source = (place, 3 * wide, (0, tall), (0, wide), (0.0, 0.0, float(tall), float(wide)))
        resize_box(*source, result, side, side, random.random() < 0.5, BILINEAR)
        return resized

    def by_pillow(image):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image

    flip, shrink = v2.RandomHorizontalFlip(), v2.Resize((side, side))
    return {
        "ours": by_function(by_ours),
        "ffcv": stock_resize_and_flip(enlarge),
        "pillow": by_function(by_pillow, Image.fromarray),
        "torchvision": by_function(lambda image: flip(shrink(image)), v2.functional.to_image),
    }


def stock_resize_and_flip(enlarge):
    """FFCV's INTER_AREA resize into the batch, then RandomHorizontalFlip."""

    def make(images_bhwc):
        from ffcv.libffcv import resize_crop
        from ffcv.transforms import RandomHorizontalFlip

        large = [enlarge(image) for image in images_bhwc]
        flip = stock(RandomHorizontalFlip())(images_bhwc)

        def run(batch):
            for image, target in zip(large, batch, strict=True):
                resize_crop(image, 0, image.shape[0], 0, image.shape[1], target)
            return flip(batch)

        return run

    return make


# ==== Main ========================================================================================


def crops(images: list, side: int):
    """uint8 [b, side, side, 3]: the images, squeezed to a square."""
    import cv2
    import numpy as np

    return np.stack(
        [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images]
    )


def timed(run, images_bhwc, smoke: bool):
    """A function that returns ms an image of `run` over the batch."""

    def once() -> float:
        batch = images_bhwc.copy()
        begin = time.perf_counter()
        run(batch)
        return time.perf_counter() - begin

    once()  # compiles
    repeats = 1 if smoke else max(1, round(LEAST_SECONDS / once()))
    return lambda: 1e3 * sum(once() for _ in range(repeats)) / repeats / len(images_bhwc)


def measure(images: list, size: int, arguments: argparse.Namespace) -> dict[str, dict]:
    """Operation -> who -> ms per image, median and spread; on the images squeezed to a square."""
    import cv2
    import numpy as np
    import operations

    squares = [cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA) for image in images]
    images_bhwc, times = np.stack(squares), {}
    for name, makers in operations.operations_at(size).items():
        runs = {who: make(images_bhwc) for who, make in makers.items()}
        runs = {who: timed(run, images_bhwc, arguments.smoke) for who, run in runs.items()}
        times[name] = common.interleave(runs, arguments.rounds)
        medians = ", ".join(f"{who} {value['median']:.3f}" for who, value in times[name].items())
        print(f"{size} px, {name}: {medians} ms")
    return times


def main() -> None:
    arguments = common.read_arguments(None, __doc__, rounds=5, **FLAGS)
    machine = common.start(1, arguments.smoke)
    import data

    images = data.read_images(arguments.images, arguments.limit, arguments.max_side)
    times = {str(size): measure(images, size, arguments) for size in arguments.sides}
    result = {"milliseconds": times, "data": {"images": len(images)}, "machine": machine}
    common.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
