"""Tensors to pictures: grids of images for people to look at."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

GAP = 2
"""Pixels between the images of a grid."""


def to_pixels(images_B3HW: Tensor) -> Tensor:
    """[0, 1] to uint8, rounded, (B, H, W, 3)."""
    return (images_B3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def image_grid(images_B3HW: Tensor, columns: int, enlarge: int = 1) -> Image.Image:
    """Images in rows of `columns`, on white, each pixel repeated `enlarge` times."""
    pixels = to_pixels(images_B3HW)
    pixels = pixels.repeat_interleave(enlarge, dim=1).repeat_interleave(enlarge, dim=2)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    sheet = torch.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet.numpy())
