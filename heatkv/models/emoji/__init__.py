"""The embedded model `emoji`: a small VAR that ships with the package, trained by this project."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from heatkv.models.checkpoint import build_var, build_vqvae, read_checkpoint
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import SamplingSettings
from heatkv.models.var import VARConfig
from heatkv.models.vqvae import VQVAEConfig

CLASSES: tuple[str, ...] = tuple(
    (
        "apple banana grapes watermelon strawberry cherries pineapple lemon carrot corn mushroom eggplant avocado "
        "pizza hamburger doughnut cupcake coffee beer wine_glass lollipop cat panda_face pig frog penguin "
        "tropical_fish ladybug turtle sunny crescent_moon star rainbow snowman_without_snow evergreen_tree "
        "palm_tree cactus tulip sunflower four_leaf_clover maple_leaf fire droplet earth_africa car umbrella "
        "balloon gift heart soccer basketball alarm_clock key lock bell crown tophat skull jack_o_lantern "
        "robot_face alien grinning sunglasses magnet"
    ).split()
)
"""The 64 class names, in label order (short names of the emoji data set)."""

_SIDES = (1, 2, 3, 4, 6, 8, 10, 12)

VQVAE_CONFIG = VQVAEConfig(
    patch_sides=_SIDES, vocab_size=512, z_channels=16, channels=32, channel_multipliers=(1, 2, 2)
)
VAR_CONFIG = VARConfig(
    patch_sides=_SIDES,
    depth=12,
    width=192,
    heads=6,
    num_classes=len(CLASSES),
    vocab_size=512,
    z_channels=16,
    shared_adaln=True,
    l2_norm=True,
)
SAMPLING = SamplingSettings(cfg=3.0, ramp=False, top_k=100)
WEIGHTS = Path(__file__).parent / "emoji.safetensors"
"""Both networks in fp16: keys `transformer.*` and `vqvae.*`."""


def load(path: Path = WEIGHTS) -> ClassConditionalModel:
    """The embedded model, in fp32 on the CPU."""
    tensors = read_checkpoint(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    transformer = build_var(part("transformer."), VAR_CONFIG)
    vqvae = build_vqvae(part("vqvae."), VQVAE_CONFIG.patch_sides)
    return ClassConditionalModel("emoji", transformer, vqvae, SAMPLING, CLASSES)
