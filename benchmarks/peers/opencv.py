"""Loaders on numpy arrays: a JPEG library, and OpenCV or the library itself for the rest."""

from collections.abc import Iterator

import cv2
import numpy as np

from contestants import BATCH_SIZE, PerImage, Task, draw_box

cv2.setNumThreads(1)


class SimpleJpeg(PerImage):
    """simplejpeg with its fast transform and upsampling, OpenCV's INTER_AREA."""

    def __init__(self, task: Task) -> None:
        import simplejpeg

        super().__init__(task)
        self.decode = simplejpeg.decode_jpeg

    def image(self, data: bytes) -> np.ndarray:
        image = self.decode(data, fastdct=True, fastupsample=True)
        y, x, h, w = draw_box(self.rng, *image.shape[:2])
        return self.finish(image[y : y + h, x : x + w])

    def finish(self, crop: np.ndarray) -> np.ndarray:
        image = cv2.resize(crop, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return cv2.flip(image, 1) if self.rng.random() < 0.5 else image


class NvImageCodec(SimpleJpeg):
    """nvImageCodec's CPU decoders, a batch at a time, which decode the crop's rows and columns."""

    def __init__(self, task: Task) -> None:
        from nvidia import nvimgcodec as codec

        PerImage.__init__(self, task)
        backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
        cpu = codec.NVIMGCODEC_DEVICE_CPU_ONLY
        self.codec = codec
        self.decoder = codec.Decoder(cpu, max_num_cpu_threads=1, backends=backends)

    def crop(self, data: bytes) -> object:
        stream = self.codec.CodeStream(data)
        y, x, h, w = draw_box(self.rng, stream.height, stream.width)
        return stream.get_sub_code_stream(region=self.codec.Region(y, x, y + h, x + w))

    def epoch(self, count: int) -> Iterator[np.ndarray]:
        for first in range(0, count, BATCH_SIZE):
            places = range(first, min(count, first + BATCH_SIZE))
            crops = [self.crop(self.files[place % len(self.files)]) for place in places]
            images = self.decoder.decode(crops)
            yield np.stack([self.finish(np.asarray(image)) for image in images])


class Kornia(PerImage):
    """kornia-rs alone: its libjpeg-turbo decoder, crop, resize and flip."""

    def __init__(self, task: Task) -> None:
        from kornia_rs import imgproc, io

        super().__init__(task)
        self.decode, self.ops = io.ImageDecoder().decode, imgproc

    def image(self, data: bytes) -> np.ndarray:
        image = self.decode(data)
        y, x, h, w = draw_box(self.rng, *image.shape[:2])
        image = self.ops.crop(image, x, y, w, h)
        image = self.ops.resize(image, (self.size, self.size), "bilinear")
        return self.ops.horizontal_flip(image) if self.rng.random() < 0.5 else image


class Albumentations(PerImage):
    """AlbumentationsX on arrays that OpenCV decodes."""

    def __init__(self, task: Task) -> None:
        import albumentations as A

        super().__init__(task)
        stages = [A.RandomResizedCrop((self.size, self.size)), A.HorizontalFlip(p=0.5)]
        self.transform = A.Compose(stages)

    def image(self, data: bytes) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return self.transform(image=image)["image"]
