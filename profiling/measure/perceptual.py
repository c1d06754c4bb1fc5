"""LPIPS and FID through torchmetrics, where their networks' weights are on this machine; nothing is ever downloaded."""

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
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
"""What torchvision calls its weights."""
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""What torch-fidelity calls the weights it is published with."""

Similarity = Callable[[Tensor, Tensor], NDArray[np.float64]]
"""Pictures (B, 3, H, W) in [0, 1] and their references to one number each, (B,)."""


def lpips_weights() -> Path | str:
    """The file of AlexNet's weights, which LPIPS needs; or why LPIPS cannot be had."""
    return _weights("AlexNet", ALEXNET_FILE, "torchvision")


def fid_weights() -> Path | str:
    """The file of Inception's weights, which FID needs; or why no FID can be had, of however many pictures."""
    return _weights("Inception", INCEPTION_FILE, "torch_fidelity")


def _weights(network: str, file: str, package: str) -> Path | str:
    absent = [name for name in ("torchmetrics", package) if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed (pip install heatkv[metrics])"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / file
    return weights if weights.is_file() else f"{network}'s weights are not at {weights}"


def open_lpips() -> Similarity | str:
    """LPIPS with AlexNet, every picture by itself; or why it cannot be had."""
    weights = lpips_weights()
    if isinstance(weights, str):
        return weights
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def lpips(images_B3HW: Tensor, reference_B3HW: Tensor) -> NDArray[np.float64]:
        pairs = zip(images_B3HW.float().cpu().split(1), reference_B3HW.float().cpu().split(1), strict=True)
        return np.array([float(metric(image.clamp(0, 1), reference.clamp(0, 1))) for image, reference in pairs])

    return lpips


def why_no_fid(pictures: int) -> str | None:
    """Why the FID of so many pictures cannot be had; None where it can."""
    if pictures < FID_LEAST_PICTURES:
        return f"{pictures} pictures are fewer than the {FID_LEAST_PICTURES} that FID needs"
    weights = fid_weights()
    return weights if isinstance(weights, str) else None


def fid(images_B3HW: Tensor, reference_B3HW: Tensor, batch: int = 64) -> float:
    """Fréchet distance of Inception features between two sets of pictures, where `why_no_fid` gives no reason."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=str(fid_weights()))
    for pictures, real in ((reference_B3HW, True), (images_B3HW, False)):
        for part in pictures.float().cpu().clamp(0, 1).split(batch):
            metric.update(part, real=real)
    return float(metric.compute())
