"""Augment: every random change to training pictures, as plain values. Both backends take it."""

from dataclasses import dataclass

POLICIES = (
    "none",
    "rand_augment_lite",
    "rand_augment",
    "rand_augment_timm",
    "trivial_augment",
    "auto_augment",
    "three_augment",
)
MIX_ALPHAS = (0.001, 1000.0)  # from 1e-307 down and 1e308 up numpy's Beta draws are NaN or wrong


@dataclass(frozen=True)
class Augment:
    """What happens to a training picture, in this order; a stage at 0 or 'none' is left out.

    Attributes:
        crop_area: smallest and largest share of the picture that a crop covers, 0 < lo <= hi <= 1.
        flip: probability of a mirror image.
        policy: one of POLICIES; 'rand_augment_lite' composes into one look-up and one resample,
            'rand_augment' is torchvision's, 'rand_augment_timm' timm's increasing variant.
        policy_ops, policy_magnitude, policy_mstd: operations a picture, their strength (of 30;
            timm: of 10) and its standard deviation; for the three rand_augment policies.
        brightness, contrast, saturation, hue: torchvision's ColorJitter; hue up to 0.5.
        grayscale, solarize, blur: probabilities; threshold 128, blur radius 0.1 to 2 px.
        erasing: probability of random erasing, on the normalised picture.
        erasing_mode: 'const' (the mean colour), 'rand' (one normal number a channel) or 'pixel'.
        erasing_count: most boxes a picture.
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
