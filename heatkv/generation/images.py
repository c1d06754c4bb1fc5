"""Tensors to pixels, grids of images for people to look at, and PNG files of them read back."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from heatkv.core.io import whole_file
from heatkv.errors import FormatError

GAP = 2
"""Pixels between the images of a grid."""

MOST_PIXELS = 80_000_000
"""Pixels of a file that is read, at most: 16 images of 2048 x 2048 have fewer."""


def picture_text(path: Path, name: str) -> str | None:
    """The text that a PNG has under a name, read without its pixels; None where there is none. Raises FormatError."""
    with _opened(path) as file:
        text = file.info.get(name)
        return text if isinstance(text, str) else None


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """The pixels of an RGB PNG, (H, W, 3). Raises FormatError for other files, and those that unpack too large."""
    with _opened(path) as file:
        try:
            return np.asarray(file)
        except Exception as error:  # Pillow raises nearly everything for damaged files
            raise _not_whole(path, error) from error


def _opened(path: Path) -> Image.Image:
    path = whole_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is the limit here
            file = Image.open(path, formats=["PNG"])  # for some other formats Pillow starts programs
    except Exception as error:
        raise _not_whole(path, error) from error
    if file.mode != "RGB" or file.width * file.height > MOST_PIXELS:
        file.close()
        raise FormatError(
            f"{path} has {file.width} x {file.height} pixels of kind {file.mode}; it must be RGB, of at most "
            f"{MOST_PIXELS}"
        )
    return file


def _not_whole(path: Path, error: Exception) -> FormatError:
    return FormatError(f"{path} is no whole PNG: {error}; make the comparison again")


def to_pixels(images_B3HW: Tensor) -> Tensor:
    """[0, 1] to uint8, rounded, (B, H, W, 3)."""
    return (images_B3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def from_pixels(pixels_BHW3: NDArray[np.uint8]) -> Tensor:
    """The reverse, (B, 3, H, W)."""
    return torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).float() / 255


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
