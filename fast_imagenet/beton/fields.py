"""The fields of a .beton file: which hold image and label, among whatever else FFCV wrote.

FFCV's writer takes any number of fields, of any names and in any order. One image and one label are
read; what cannot be told is refused as what it is, before anything of it is used.
"""

import json
from dataclasses import dataclass

import numpy as np

from fast_imagenet.beton import format as fmt

_PLACE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_POINTER = np.dtype("<u8")
KINDS = {  # type_id -> name, metadata of a sample, whether it has a row in the allocation table
    0: ("float", np.dtype("<f8"), False),
    fmt.INT_FIELD: ("integer", np.dtype("<i8"), False),
    fmt.IMAGE_FIELD: ("RGB image", fmt.IMAGE, True),
    3: ("bytes", _PLACE, True),
    4: ("array", _POINTER, True),
    5: ("JSON", _PLACE, True),
    6: ("tensor", _POINTER, True),
}
CUSTOM = 255
MAX_FIELDS = 64


class FieldError(ValueError):
    """The fields cannot be read; the message goes on after the file's name, without a remedy."""


@dataclass(frozen=True)
class Fields:
    """What a sample consists of.

    Attributes:
        image, label: names of the two fields that are read.
        unused: names of all others.
        label_first: whether the label stands before the image.
        dtype: of one sample's metadata; its names are those of the fields.
        allocations: rows of a sample in the allocation table.
    """

    image: str
    label: str
    unused: tuple[str, ...]
    label_first: bool
    dtype: np.dtype
    allocations: int

    def note(self) -> str:
        """What was chosen, where the file's fields are not simply 'image' and 'label'; else ''."""
        if (self.image, self.label, self.unused) == ("image", "label", ()):
            return ""
        rest = f"; unused: {', '.join(self.unused)}" if self.unused else ""
        return f"images are read from field '{self.image}', labels from field '{self.label}'{rest}"


def read_fields(descriptors: np.ndarray) -> Fields:
    """Find image and label.

    Args:
        descriptors: FIELD [fields].

    Raises:
        FieldError: a field has an unknown size, or it cannot be told which are image and label.
    """
    kinds = {}
    for descriptor in descriptors:
        name, kind = _name(descriptor), int(descriptor["type_id"])
        if kind == CUSTOM:
            raise FieldError(f"has the field '{name}' of a custom type, whose size only FFCV's user"
                             " knows")  # fmt: skip
        if kind not in KINDS or name in kinds:
            what = f"of the unknown type {kind}" if kind not in KINDS else "twice"
            raise FieldError(f"has the field '{name}' {what}")
        if KINDS[kind][0] in ("array", "tensor") and not _is_array(descriptor["arguments"]):
            raise FieldError(f"has the field '{name}', an array of a type that FFCV cannot read")
        kinds[name] = kind
    image, label = _choose(kinds, "image", fmt.IMAGE_FIELD), _choose(kinds, "label", fmt.INT_FIELD)
    order = list(kinds)
    return Fields(
        image,
        label,
        tuple(name for name in order if name not in (image, label)),
        order.index(label) < order.index(image),
        np.dtype([(name, KINDS[kind][1]) for name, kind in kinds.items()], align=True),
        sum(KINDS[kind][2] for kind in kinds.values()),
    )


def _choose(kinds: dict[str, int], wanted: str, kind: int) -> str:
    """The field of this name or, where there is none, the only one of this kind."""
    found = [name for name, one in kinds.items() if one == kind]
    if wanted in kinds:
        found = [wanted] if wanted in found else []
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"'{name}' ({KINDS[one][0]})" for name, one in kinds.items())
    rule = f"an {KINDS[kind][0]} must be named '{wanted}', or be the only one of its kind"
    raise FieldError(f"has the fields {listed}: {rule}")


def _name(descriptor: np.void) -> str:
    try:
        name = descriptor["name"].tobytes().decode("ascii").split("\0")[0]
    except UnicodeDecodeError as error:
        raise FieldError("has a field whose name is not ASCII") from error
    if not name.isprintable():
        raise FieldError("has a field whose name is not printable")
    return name


def _is_array(arguments: np.ndarray) -> bool:
    """Whether FFCV can read the description of an NDArrayField or TorchTensorField.

    Source: ffcv 1.0.2, ffcv/fields/ndarray.py: 32 sides, the length of a text, and the text.
    """
    *sides, length = np.array(arguments[: 33 * 8]).view("<u8").tolist()
    text = arguments[33 * 8 :][:length].tobytes()
    try:
        (described,) = json.loads(text)
        return any(sides) and np.dtype([tuple(described)])["f0"].itemsize > 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
