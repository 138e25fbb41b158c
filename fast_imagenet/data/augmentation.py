"""Augment: every random change to training images, as plain values, and the table of its stages.

Both backends, the captions of tools/preview.py and the advice of tools/plan read STAGES and
POLICIES. A new augmentation is a file in ops/, a field of Augment with its row here, and a setting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

Triple = tuple[float, float, float]
IMAGENET: tuple[Triple, Triple] = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and std of pixels in 0..1
RESIZES = ("auto", "area", "bilinear", "bicubic")
MIX_ALPHAS = (0.001, 1000.0)  # from 1e-307 down and 1e308 up numpy's Beta draws are NaN or wrong


@dataclass(frozen=True)
class Augment:
    """What happens to a training image, in this order; a stage at 0 or 'none' is left out.

    Attributes:
        crop_area: smallest and largest fraction of the image that a crop covers, 0 < lo <= hi <= 1.
        resize: one of RESIZES, of crops to the resolution; auto is each backend's own: area with
            FFCV, bilinear with torchvision, which has no area.
        flip: probability of a mirror image.
        flip_mode: 'random', or 'alternating': an image is mirrored in every second epoch.
        repeats: how often an epoch has each image that it has (repeated augmentation), >= 1.
        policy: one of POLICIES; 'rand_augment_lite' composes into one look-up and one resample,
            'rand_augment' is torchvision's, 'rand_augment_timm' timm's increasing variant.
        policy_ops, policy_magnitude, policy_mstd: operations per image, their strength (of 30;
            timm: of 10) and its standard deviation; for the three rand_augment policies.
        brightness, contrast, saturation, hue: torchvision's ColorJitter; hue up to 0.5.
        grayscale, solarize, blur: probabilities; threshold 128, blur radius 0.1 to 2 px.
        erasing: probability of random erasing, on the normalized image.
        erasing_mode: 'const' (the mean color), 'rand' (one normal number per channel) or 'pixel'.
        erasing_count: largest number of boxes per image.
        mixup, cutmix: alpha of each, within MIX_ALPHAS; 0 = off.
        mix_by: 'step': the whole batch is mixed alike; 'pass': each forward pass has draws of its
            own, as each GPU has in timm and torchvision.
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    resize: str = "auto"
    flip: float = 0.5
    flip_mode: str = "random"
    repeats: int = 1
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
    mix_by: str = "step"


CROP_AND_FLIP = Augment()


# ==== Policies: one row per value of augment.policy ===============================================


class Policy(NamedTuple):
    """A policy of random operations.

    Attributes:
        title: as the preview shows it.
        operation: (ops, augment, seed) -> the FFCV operation, see Stage.
        transform: (twins, augment, where) -> its torchvision twin, see Stage.
        has_strength: whether policy_ops, policy_magnitude and policy_mstd count.
        is_light: whether it is cheap beside reading the image.
    """

    title: str
    operation: Callable[[Any, Augment, int], Any]
    transform: Callable[[Any, Augment, str], Any]
    has_strength: bool = False
    is_light: bool = False


def _rand_augment(mode: str, twin: str, title: str, is_light: bool = False) -> Policy:
    """A policy whose operation is RandAugment in one of its modes."""

    def strength(a: Augment) -> tuple[int, float]:
        return a.policy_ops, a.policy_magnitude

    return Policy(
        title,
        lambda ops, a, seed: ops.RandAugment(
            *strength(a), mode=mode, mstd=a.policy_mstd, seed=seed
        ),
        lambda twins, a, where: getattr(twins, twin)(*strength(a), a.policy_mstd, where),
        has_strength=True,
        is_light=is_light,
    )


POLICIES: dict[str, Policy | None] = {
    "none": None,
    "rand_augment_lite": _rand_augment("lite", "LiteRandAugment", "RandAugment lite", True),
    "rand_augment": _rand_augment("full", "RandAugment", "RandAugment"),
    "rand_augment_timm": _rand_augment("timm", "TimmRandAugment", "RandAugment timm"),
    "trivial_augment": Policy(
        "TrivialAugmentWide",
        lambda ops, a, seed: ops.TrivialAugmentWide(seed=seed),
        lambda twins, a, where: twins.v2.TrivialAugmentWide(),
    ),
    "trivial_augment_bilinear": Policy(
        "TrivialAugmentWide, bilinear",
        lambda ops, a, seed: ops.TrivialAugmentWide(bilinear=True, seed=seed),
        lambda twins, a, where: twins.trivial_augment_bilinear(),
    ),
    "auto_augment": Policy(
        "AutoAugment",
        lambda ops, a, seed: ops.AutoAugment(seed=seed),
        lambda twins, a, where: twins.v2.AutoAugment(),
    ),
    "three_augment": Policy(
        "3-Augment",
        lambda ops, a, seed: ops.ThreeAugment(seed=seed),
        lambda twins, a, where: twins.three_augment(),
        is_light=True,
    ),
}


def policy_of(augment: Augment) -> Policy:
    """The row of a policy other than 'none'.

    Raises:
        ValueError: `augment.policy` is not one of POLICIES.
    """
    policy = POLICIES.get(augment.policy)
    if policy is None:
        raise ValueError(
            f"augment.policy={augment.policy} is unknown; use one of {', '.join(POLICIES)}"
        )
    return policy


# ==== Stages: everything between the crop and the normalization ===================================


class Stage(NamedTuple):
    """A random change between the crop and the normalization.

    Attributes:
        name: as messages call it.
        wanted: augment -> true where the settings ask for it.
        operation: (ops, augment, seed) -> the FFCV operation; ops is fast_imagenet.ops.
        transform: (twins, augment, where) -> its torchvision twin, a callable from image to image;
            twins is data/torch_augmentation.py, where 'cpu' or 'gpu'. None: there is no twin, and
            data.backend=torchvision refuses the stage.
        caption: augment -> (title, detail), as the preview shows them.
        lighter: augment -> a setting that makes the stage cheaper, as plan recommends it; None
            where there is none.
    """

    name: str
    wanted: Callable[[Augment], Any]
    operation: Callable[[Any, Augment, int], Any]
    transform: Callable[[Any, Augment, str], Any] | None
    caption: Callable[[Augment], tuple[str, str]]
    lighter: Callable[[Augment], str | None] = lambda augment: None


def jitter(augment: Augment) -> dict[str, float]:
    """The four settings of the color jitter, named as both ColorJitters name them."""
    names = ("brightness", "contrast", "saturation", "hue")
    return {name: getattr(augment, name) for name in names}


def crop_caption(a: Augment) -> tuple[str, str]:
    """(title, detail) of the crop and flip, which every image has."""
    low, high = a.crop_area
    flip = f"{a.flip:.0%}" if a.flip_mode == "random" else a.flip_mode
    copies = f", {a.repeats} times per epoch" if a.repeats > 1 else ""
    return "Crop and flip", f"{low:.3g} to {high:.3g} of the area, flip {flip}{copies}"


def _policy_caption(a: Augment) -> tuple[str, str]:
    policy, noise = policy_of(a), f"±{a.policy_mstd:g}" if a.policy_mstd else ""
    strength = f"{a.policy_ops} operations, magnitude {a.policy_magnitude:g}{noise}"
    return policy.title, strength if policy.has_strength else ""


STAGES = (  # in this order
    Stage(
        "policy",
        wanted=lambda a: a.policy != "none",
        operation=lambda ops, a, seed: policy_of(a).operation(ops, a, seed),
        transform=lambda twins, a, where: policy_of(a).transform(twins, a, where),
        caption=_policy_caption,
        lighter=lambda a: None if policy_of(a).is_light else "augment.policy=rand_augment_lite",
    ),
    Stage(
        "color jitter",
        wanted=lambda a: any(jitter(a).values()),
        operation=lambda ops, a, seed: ops.ColorJitter(**jitter(a), seed=seed),
        transform=lambda twins, a, where: twins.v2.ColorJitter(**jitter(a)),
        caption=lambda a: (
            "Color jitter",
            ", ".join(f"{name} {value:g}" for name, value in jitter(a).items() if value),
        ),
    ),
    Stage(
        "grayscale",
        wanted=lambda a: a.grayscale,
        operation=lambda ops, a, seed: ops.RandomGrayscale(a.grayscale, seed=seed),
        transform=lambda twins, a, where: twins.v2.RandomGrayscale(a.grayscale),
        caption=lambda a: ("Grayscale", f"{a.grayscale:.0%} of images"),
    ),
    Stage(
        "solarize",
        wanted=lambda a: a.solarize,
        operation=lambda ops, a, seed: ops.RandomSolarize(128, a.solarize, seed=seed),
        transform=lambda twins, a, where: twins.v2.RandomSolarize(128, a.solarize),
        caption=lambda a: ("Solarize", f"{a.solarize:.0%} of images, threshold 128"),
    ),
    Stage(
        "blur",
        wanted=lambda a: a.blur,
        operation=lambda ops, a, seed: ops.GaussianBlur((0.1, 2.0), a.blur, seed=seed),
        transform=lambda twins, a, where: twins.v2.RandomApply([twins.blur()], a.blur),
        caption=lambda a: ("Blur", f"{a.blur:.0%} of images, radius 0.1 to 2 px"),
    ),
)


def stages_of(augment: Augment) -> list[Stage]:
    """The rows of STAGES that the settings ask for, in their order."""
    return [stage for stage in STAGES if stage.wanted(augment)]
