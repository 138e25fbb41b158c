"""Loaders on torch's uint8 tensors: torchvision's transforms, two decoders."""

import torch
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from contestants import PerImage, Task


class Torchvision(PerImage):
    """Decoded and transformed by torchvision, antialiased."""

    stack = staticmethod(torch.stack)
    decode = staticmethod(decode_jpeg)

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        torch.set_num_threads(1)
        self.files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in self.files]
        stages = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip()]
        if task.strong:
            stages += [v2.RandAugment(2, 9), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomErasing(0.25)]
        self.transform = v2.Compose(stages)

    def image(self, data: torch.Tensor) -> torch.Tensor:
        return self.transform(self.decode(data))


class TorchCodec(Torchvision):
    """Decoded by torchcodec, which torchvision recommends since 0.29."""

    def __init__(self, task: Task) -> None:
        from torchcodec.decoders import decode_jpeg as decode

        super().__init__(task)
        self.decode = decode
