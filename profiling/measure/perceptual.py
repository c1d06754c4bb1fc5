"""LPIPS and FID through torchmetrics, where their networks' weights are on this machine; nothing is ever downloaded.

What is lacking is said in words: "not measured" without a reason looks like an oversight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FID_LEAST_PICTURES = 2048
"""FID compares covariances of 2,048 features: of fewer pictures they are singular, and the distance is mostly bias."""
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""What torch-fidelity calls the weights it is published with."""

Similarity = Callable[[Tensor, Tensor], NDArray[np.float64]]
"""Pictures (B, 3, H, W) in [0, 1] and their references to one number each, (B,)."""


def _checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _lacking(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed (pip install heatkv[metrics])" if absent else None


def lpips_weights() -> Path | str:
    """The file of AlexNet's weights, which LPIPS needs; or why LPIPS cannot be had."""
    lacking = _lacking("torchmetrics", "torchvision")
    if lacking is not None:
        return lacking
    from torchvision.models import AlexNet_Weights

    weights = _checkpoints() / Path(str(AlexNet_Weights.DEFAULT.url)).name
    return weights if weights.is_file() else f"AlexNet's weights are not at {weights}"


def fid_weights() -> Path | str:
    """The file of Inception's weights, which FID needs; or why no FID can be had, of however many pictures."""
    lacking = _lacking("torchmetrics", "torch_fidelity")
    if lacking is not None:
        return lacking
    weights = _checkpoints() / INCEPTION_FILE
    return weights if weights.is_file() else f"Inception's weights are not at {weights}"


def open_lpips() -> Similarity | str:
    """LPIPS with AlexNet, every picture by itself; or why it cannot be had."""
    found = lpips_weights()
    if isinstance(found, str):
        return found
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def of_pictures(images_B3HW: Tensor, reference_B3HW: Tensor) -> NDArray[np.float64]:
        pairs = zip(images_B3HW.float().cpu().split(1), reference_B3HW.float().cpu().split(1), strict=True)
        return np.array([float(metric(one.clamp(0, 1), other.clamp(0, 1))) for one, other in pairs])

    return of_pictures


def why_no_fid(pictures: int) -> str | None:
    """Why the FID of so many pictures cannot be had; None where it can."""
    if pictures < FID_LEAST_PICTURES:
        return f"{pictures} pictures are fewer than the {FID_LEAST_PICTURES} that FID needs"
    found = fid_weights()
    return found if isinstance(found, str) else None


def fid(images_B3HW: Tensor, reference_B3HW: Tensor, batch: int = 64) -> float | str:
    """Fréchet distance of Inception features between two sets of pictures; or why it cannot be had."""
    reason = why_no_fid(len(images_B3HW))
    if reason is not None:
        return reason
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(
        normalize=True, feature_extractor_weights_path=str(_checkpoints() / INCEPTION_FILE)
    )
    for pictures, real in ((reference_B3HW, True), (images_B3HW, False)):
        for part in pictures.float().cpu().clamp(0, 1).split(batch):
            metric.update(part, real=real)
    return float(metric.compute())
