"""The pictures the embedded model learns from: 64 Noto emoji on coloured grounds in random poses.

The icons come from the npm package `emoji-datasource-google` (Noto Emoji artwork, see the model card for the
licence). Nothing here is needed to use the model, only to train it again or to judge its pictures.
"""

from __future__ import annotations

import colorsys
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.errors import ModelError
from heatkv.models.emoji import CLASSES

SIDE = 48
"""Pixels per side of a training image."""

_OVERSAMPLING = 2
_MAX_ROTATION = math.radians(12)
_SCALE_RANGE = (0.80, 0.98)


class EmojiImages:
    """Draws training images of the 64 classes; `folder` is the unpacked npm package."""

    def __init__(self, folder: str | Path) -> None:
        from PIL import Image

        folder = Path(folder)
        try:
            entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelError(
                f"{folder} is not the unpacked npm package emoji-datasource-google (no emoji.json there); "
                "get it with `npm install emoji-datasource-google`"
            ) from error
        files = {name: entry["image"] for entry in entries for name in entry["short_names"]}
        icons = []
        for name in CLASSES:
            with Image.open(folder / "img" / "google" / "64" / files[name]) as image:
                rgba = torch.from_numpy(np.asarray(image.convert("RGBA"), dtype=np.float32) / 255)
            alpha = rgba[..., 3:]
            icons.append(torch.cat([rgba[..., :3] * alpha, alpha], dim=-1).permute(2, 0, 1))
        self.icons_K4HW = torch.stack(icons)

    def draw(self, labels_B: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 3, 48, 48) in [-1, 1]: each icon turned, scaled and moved at random over a soft colour."""
        count = labels_B.shape[0]

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, generator=generator) * (high - low) + low

        angle, scale = uniform(-_MAX_ROTATION, _MAX_ROTATION), uniform(*_SCALE_RANGE)
        room = (1 - scale) * 0.9
        shift_x, shift_y = uniform(-1, 1) * room, uniform(-1, 1) * room
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack(
            [
                torch.stack([cos, sin, -cos * shift_x - sin * shift_y], dim=1),
                torch.stack([-sin, cos, sin * shift_x - cos * shift_y], dim=1),
            ],
            dim=1,
        )
        side = SIDE * _OVERSAMPLING
        grid = F.affine_grid(theta, [count, 4, side, side], align_corners=False)
        posed = F.grid_sample(self.icons_K4HW[labels_B], grid, mode="bilinear", align_corners=False)
        posed = F.avg_pool2d(posed, _OVERSAMPLING)
        hsv = zip(uniform(0, 1).tolist(), uniform(0.08, 0.5).tolist(), uniform(0.55, 1).tolist(), strict=True)
        ground = torch.tensor([colorsys.hsv_to_rgb(*color) for color in hsv])[:, :, None, None]
        image = posed[:, :3] + ground * (1 - posed[:, 3:])
        return image.clamp(0, 1) * 2 - 1
