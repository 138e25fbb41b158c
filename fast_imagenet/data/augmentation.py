"""Augment: every random change to training images, as plain values, and the table of its stages.

Both backends take their stages from STAGES; a new augmentation is a row there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

POLICIES = {  # name: class in fast_imagenet.ops, and its mode where it has modes
    "none": None,
    "rand_augment_lite": ("RandAugment", "lite"),
    "rand_augment": ("RandAugment", "full"),
    "rand_augment_timm": ("RandAugment", "timm"),
    "trivial_augment": ("TrivialAugmentWide", None),
    "auto_augment": ("AutoAugment", None),
    "three_augment": ("ThreeAugment", None),
}
MIX_ALPHAS = (0.001, 1000.0)  # from 1e-307 down and 1e308 up numpy's Beta draws are NaN or wrong


@dataclass(frozen=True)
class Augment:
    """What happens to a training image, in this order; a stage at 0 or 'none' is left out.

    Attributes:
        crop_area: smallest and largest share of the image that a crop covers, 0 < lo <= hi <= 1.
        flip: probability of a mirror image.
        policy: one of POLICIES; 'rand_augment_lite' composes into one look-up and one resample,
            'rand_augment' is torchvision's, 'rand_augment_timm' timm's increasing variant.
        policy_ops, policy_magnitude, policy_mstd: operations an image, their strength (of 30;
            timm: of 10) and its standard deviation; for the three rand_augment policies.
        brightness, contrast, saturation, hue: torchvision's ColorJitter; hue up to 0.5.
        grayscale, solarize, blur: probabilities; threshold 128, blur radius 0.1 to 2 px.
        erasing: probability of random erasing, on the normalised image.
        erasing_mode: 'const' (the mean colour), 'rand' (one normal number a channel) or 'pixel'.
        erasing_count: most boxes an image.
        mixup, cutmix: alpha of each, within MIX_ALPHAS; 0 = off.
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    policy: str = "none"
    policy_ops: int = 2
    policy_magnitude: float = 9.0
    policy_mstd: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    solarize: float = 0.0
    blur: float = 0.0
    erasing: float = 0.0
    erasing_mode: str = "const"
    erasing_count: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0


CROP_AND_FLIP = Augment()


def check_policy(policy: str) -> None:
    """Raises: ValueError: `policy` is none of POLICIES."""
    if policy not in POLICIES:
        raise ValueError(f"augment.policy={policy} is unknown; use one of {', '.join(POLICIES)}")


def policy_operation(ops, augment: Augment, seed: int):
    """The FFCV operation of the settings' policy; it is not 'none'."""
    a = augment
    check_policy(a.policy)
    kind, mode = POLICIES[a.policy]
    if mode is None:
        return getattr(ops, kind)(seed=seed)
    strength = (a.policy_ops, a.policy_magnitude)
    return getattr(ops, kind)(*strength, mode=mode, mstd=a.policy_mstd, seed=seed)


def jitter(augment: Augment) -> tuple[float, float, float, float]:
    """Brightness, contrast, saturation and hue, as both ColorJitters take them."""
    return augment.brightness, augment.contrast, augment.saturation, augment.hue


class Stage(NamedTuple):
    """A random change between the crop and the normalisation.

    Attributes:
        name: as messages call it.
        wanted: augment -> true where the settings ask for it.
        operation: (ops, augment, seed) -> the FFCV operation; ops is fast_imagenet.ops.
        transform: (twins, augment, where) -> its torchvision twin, a callable from image to image;
            twins is data/torch_augmentation.py, where 'cpu' or 'gpu'. None: there is no twin, and
            data.backend=torchvision refuses the stage.
    """

    name: str
    wanted: Callable[[Augment], Any]
    operation: Callable
    transform: Callable | None


STAGES = (  # in this order
    Stage(
        "policy",
        lambda a: a.policy != "none",
        policy_operation,
        lambda twins, a, where: twins.policy_transform(a, where),
    ),
    Stage(
        "color jitter",
        lambda a: any(jitter(a)),
        lambda ops, a, seed: ops.ColorJitter(*jitter(a), seed=seed),
        lambda twins, a, where: twins.v2.ColorJitter(*jitter(a)),
    ),
    Stage(
        "grayscale",
        lambda a: a.grayscale,
        lambda ops, a, seed: ops.RandomGrayscale(a.grayscale, seed=seed),
        lambda twins, a, where: twins.v2.RandomGrayscale(a.grayscale),
    ),
    Stage(
        "solarize",
        lambda a: a.solarize,
        lambda ops, a, seed: ops.RandomSolarize(128, a.solarize, seed=seed),
        lambda twins, a, where: twins.v2.RandomSolarize(128, a.solarize),
    ),
    Stage(
        "blur",
        lambda a: a.blur,
        lambda ops, a, seed: ops.GaussianBlur((0.1, 2.0), a.blur, seed=seed),
        lambda twins, a, where: twins.v2.RandomApply([twins.blur()], a.blur),
    ),
)
