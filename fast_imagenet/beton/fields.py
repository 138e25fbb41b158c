"""The fields of a .beton file: which hold image and label, among whatever else FFCV wrote.

FFCV's writer takes any number of fields, of any names and in any order. One image and one label are
read; a file in which these are not clear is refused before anything of it is used.
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
FIX = "write it again with one image and one label per sample, as write_dataset.py does"


@dataclass(frozen=True)
class Fields:
    """What a sample consists of.

    Attributes:
        image, label: names of the two fields that are read.
        unused: names of all others.
        dtype: of one sample's metadata; its names are those of the fields.
        allocations: rows of a sample in the allocation table.
    """

    image: str
    label: str
    unused: tuple[str, ...]
    dtype: np.dtype
    allocations: int

    def note(self) -> str:
        """Which fields are read, where they are not simply 'image' and 'label'; else ''."""
        if (self.image, self.label, self.unused) == ("image", "label", ()):
            return ""
        rest = f"; unused: {', '.join(self.unused)}" if self.unused else ""
        return f"images are read from field '{self.image}', labels from field '{self.label}'{rest}"


def read_fields(descriptors: np.ndarray) -> Fields:
    """Find image and label.

    Args:
        descriptors: FIELD [fields].

    Raises:
        FormatError: a field has an unknown size, or it is not clear which are image and label.
    """
    kinds: dict[str, int] = {}
    for descriptor in descriptors:
        name, kind = _name(descriptor), int(descriptor["type_id"])
        if fault := _fault(kind, name in kinds, descriptor["arguments"]):
            raise _refused(f"has the field '{name}'{fault}")
        kinds[name] = kind
    image, label = _choose(kinds, "image", fmt.IMAGE_FIELD), _choose(kinds, "label", fmt.INT_FIELD)
    return Fields(
        image,
        label,
        tuple(name for name in kinds if name not in (image, label)),
        np.dtype([(name, KINDS[kind][1]) for name, kind in kinds.items()], align=True),
        sum(KINDS[kind][2] for kind in kinds.values()),
    )


def _refused(what: str) -> fmt.FormatError:
    return fmt.FormatError(f"{what}; {FIX}")


def _fault(kind: int, is_repeated: bool, arguments: np.ndarray) -> str:
    """Why a field cannot be in a file that is read; empty when it can."""
    if kind == CUSTOM:
        return " of a custom type, whose size is known only to the code that wrote it"
    if kind not in KINDS:
        return f" of the unknown type {kind}"
    if is_repeated:
        return " twice"
    if KINDS[kind][0] in ("array", "tensor") and not _is_array(arguments):
        return ", an array of a type that FFCV cannot read"
    return ""


def _choose(kinds: dict[str, int], wanted: str, kind: int) -> str:
    """The field of this name or, where there is none, the only one of this kind."""
    found = [name for name, one in kinds.items() if one == kind]
    if wanted in kinds:
        found = [wanted] if wanted in found else []
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"'{name}' ({KINDS[one][0]})" for name, one in kinds.items())
    rule = f"an {KINDS[kind][0]} must be named '{wanted}', or be the only one of its kind"
    raise _refused(f"has the fields {listed}: {rule}")


def _name(descriptor: np.void) -> str:
    text = descriptor["name"].tobytes().decode("latin-1")
    name = text.split("\0")[0]
    if not (text.isascii() and name.isprintable()):
        raise _refused("has a field whose name is not printable ASCII")
    return name


def _is_array(arguments: np.ndarray) -> bool:
    """Whether FFCV can read the description of an NDArrayField or TorchTensorField.

    Source: ffcv 1.0.2, ffcv/fields/ndarray.py: 32 side lengths, the length of a text, and the text.
    """
    *sides, length = np.array(arguments[: 33 * 8]).view("<u8").tolist()
    text = arguments[33 * 8 :][:length].tobytes()
    try:
        (described,) = json.loads(text)
        return any(sides) and np.dtype([tuple(described)])["f0"].itemsize > 0
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
