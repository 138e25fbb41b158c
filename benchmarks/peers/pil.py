"""Loaders on PIL images and on torch's tensors: torchvision, timm, Pillow and pillow-simd.

`strong`: also RandAugment (2 operations, magnitude 9), ColorJitter 0.4/0.4/0.4, RandomErasing 0.25.
"""

import io

import numpy as np
import PIL
import torch
from PIL import Image
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from contestants import PerImage, Task, draw_box


class Torchvision(PerImage):
    """torchvision's v2 transforms on PIL images; erasing on the uint8 tensor."""

    stack = staticmethod(torch.stack)
    to_tensor = (v2.PILToTensor(),)

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        torch.set_num_threads(1)
        color = [v2.RandAugment(2, 9), v2.ColorJitter(0.4, 0.4, 0.4)] if task.strong else []
        erase = [v2.RandomErasing(0.25)] if task.strong else []
        crop = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([*crop, *color, *self.to_tensor, *erase])

    def image(self, data: bytes) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB"))


class Tensors(Torchvision):
    """The same on tensors that torchvision decodes, antialiased."""

    to_tensor = ()
    decode = staticmethod(decode_jpeg)

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in self.files]

    def image(self, data: torch.Tensor) -> torch.Tensor:
        return self.transform(self.decode(data))


class TorchCodec(Tensors):
    """Decoded by torchcodec, which torchvision recommends since 0.29."""

    def __init__(self, task: Task) -> None:
        from torchcodec.decoders import decode_jpeg as decode

        super().__init__(task)
        self.decode = decode


class Timm(PerImage):
    """timm's training transform, the part that its users run on the CPU: erasing comes later."""

    def __init__(self, task: Task) -> None:
        from timm.data.transforms_factory import transforms_imagenet_train

        super().__init__(task)
        self.transform = transforms_imagenet_train(
            self.size,
            use_prefetcher=True,
            interpolation="bilinear",
            color_jitter=0.4 if task.strong else None,
            force_color_jitter=task.strong,
            auto_augment="rand-m9" if task.strong else None,
            re_prob=0.25 if task.strong else 0.0,
        )

    def image(self, data: bytes) -> np.ndarray:
        return np.asarray(self.transform(Image.open(io.BytesIO(data)).convert("RGB")))


class Draft(PerImage):
    """Pillow's fast calls: decoded at 1/2 or less where the crop allows it, resized from a box."""

    def __init__(self, task: Task, simd: bool = False) -> None:
        super().__init__(task)
        if simd and "post" not in PIL.__version__:  # as only pillow-simd's versions end
            raise ImportError("pillow-simd is not installed")

    def image(self, data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        width, height = image.size
        y, x, h, w = draw_box(self.rng, height, width)
        image.draft("RGB", (self.size * width // w, self.size * height // h))
        fx, fy = image.size[0] / width, image.size[1] / height
        box = (x * fx, y * fy, (x + w) * fx, (y + h) * fy)
        image = image.convert("RGB").resize((self.size, self.size), Image.BILINEAR, box)
        if self.rng.random() < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        return np.asarray(image)
