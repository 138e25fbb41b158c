"""tf.data with TensorFlow's decoder, which leaves out what lies outside of the crop."""

import math
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from contestants import BATCH_SIZE, RATIO, SCALE, TRIES, Contestant, Task


def torchvision_box(shape: Any) -> Any:
    """(top, left, height, width) of torchvision's RandomResizedCrop, int32 [4]."""
    height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
    area = height * width * tf.random.uniform([TRIES], *SCALE)
    aspect = tf.exp(tf.random.uniform([TRIES], *map(math.log, RATIO)))
    w, h = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
    fits = tf.logical_and(w <= width, h <= height)
    first = tf.argmax(fits)
    largest = tf.minimum(width, height * RATIO[1]), tf.minimum(height, width / RATIO[0])
    w = tf.where(fits[first], w[first], tf.round(largest[0]))
    h = tf.where(fits[first], h[first], tf.round(largest[1]))
    room = tf.stack([height - h, width - w])
    corner = tf.where(fits[first], tf.floor(tf.random.uniform([2]) * (room + 1)), room // 2)
    return tf.cast(tf.concat([corner, [h, w]], 0), tf.int32)


def own_box(shape: Any) -> Any:
    """(top, left, height, width) of TensorFlow's own sampler, as its ImageNet examples call it."""
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape,
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        min_object_covered=0.1,
        aspect_ratio_range=RATIO,
        area_range=SCALE,
        max_attempts=TRIES,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], 0)


class TensorFlow(Contestant):
    """decode_and_crop_jpeg with the fast transform, bilinear resize, flip; one pipeline thread."""

    def __init__(self, task: Task, antialias: bool = False, own_crops: bool = False) -> None:
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(1)
        self.size, self.antialias = (task.size, task.size), antialias
        self.box = own_box if own_crops else torchvision_box
        options = tf.data.Options()
        options.threading.private_threadpool_size = 1
        # which would compute ahead, in the others' turns
        options.experimental_optimization.apply_default_optimizations = False
        files = tf.data.Dataset.from_tensor_slices(task.files()).repeat()
        images = files.map(self.image).batch(BATCH_SIZE).with_options(options)
        self.batches = iter(images)

    def image(self, data: Any) -> Any:
        box = self.box(tf.image.extract_jpeg_shape(data))
        image = tf.image.decode_and_crop_jpeg(data, box, channels=3, dct_method="INTEGER_FAST")
        image = tf.image.resize(image, self.size, antialias=self.antialias)
        return tf.image.random_flip_left_right(tf.cast(image, tf.uint8))

    def epoch(self, count: int) -> Iterator[Any]:
        for _ in range(0, count, BATCH_SIZE):
            yield next(self.batches).numpy()
