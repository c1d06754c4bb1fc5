"""How far a policy's images and logits are from the full cache's.

KL and agreement are teacher-forced: the policy sees the codes the full cache sampled, and its guided logits are
compared before any cut. PSNR and SSIM compare free-running pictures drawn with the same random numbers.
Shapes: B images, N tokens of a scale, V codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.errors import FormatError, HeatKVError
from heatkv.generation.images import to_pixels
from heatkv.generation.loop import Drawn, Generator
from heatkv.models.base import ImageModel
from heatkv.models.sampling import CommonRandomSampler, RecordedTokens, Settings
from heatkv.parallel.parts import load_arrays, save_arrays
from heatkv.profiling.measure.perceptual import fid, open_lpips, why_no_fid

ROUNDING_MSE = 1 / (12 * 255**2)
"""Mean squared error of rounding to 8 bits; pictures that differ by less count as this close, 58.9 dB."""


def kl_divergence(reference_BNV: Tensor, logits_BNV: Tensor) -> Tensor:
    """KL(reference || logits) of the two softmaxes, in nats per token, (B, N) float64."""
    reference, other = reference_BNV.double().log_softmax(-1), logits_BNV.double().log_softmax(-1)
    return (reference.exp() * (reference - other)).sum(-1)


def psnr(images_B3HW: Tensor, reference_B3HW: Tensor) -> NDArray[np.float64]:
    """PSNR in dB of every 8-bit picture against its reference; equal pictures have 58.9 dB, that of rounding."""
    difference = (to_pixels(images_B3HW).double() - to_pixels(reference_B3HW).double()) / 255
    mse = (difference**2).flatten(1).mean(1).clamp(min=ROUNDING_MSE)
    return np.asarray(-10 * torch.log10(mse))


def ssim(images_B3HW: Tensor, reference_B3HW: Tensor) -> NDArray[np.float64] | None:
    """SSIM (torchmetrics, Gaussian window of 11) of every picture; None when torchmetrics is not installed."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        return None
    values = structural_similarity_index_measure(
        images_B3HW.float().cpu(), reference_B3HW.float().cpu(), data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return np.asarray(values.double()).reshape(-1)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of what one policy's figures are above another's on the same samples, with a percentile interval."""

    mean: float
    low: float
    high: float
    samples: int
    confidence: float

    def to_json(self) -> dict[str, Any]:
        return {
            "difference": self.mean, "interval": [self.low, self.high], "confidence": self.confidence,
            "images": self.samples,
        }  # fmt: skip


def paired_bootstrap(
    ours: Sequence[float] | NDArray[np.float64],
    theirs: Sequence[float] | NDArray[np.float64],
    *,
    confidence: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Bootstrap (percentiles) of mean(ours - theirs), where equal places are the same sample under two policies.

    What samples have in common cancels, so that far fewer are needed than for two separate intervals. Raises
    HeatKVError for two lists that are not of the same samples, or are empty.
    """
    one, other = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape or not len(one):
        raise HeatKVError(
            f"figures of shapes {one.shape} and {other.shape} are not of the same samples; compare runs of equal images"
        )
    differences = one - other
    resampled = np.random.default_rng(seed).integers(0, len(differences), (draws, len(differences)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences[resampled].mean(axis=1), [tail, 1 - tail])
    return PairedDifference(float(differences.mean()), float(low), float(high), len(differences), confidence)


def spread(values: NDArray[np.float64]) -> dict[str, Any]:
    """Standard deviation over samples (null for one alone) and the quartiles."""
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"sd": deviation, "quartiles": [float(x) for x in np.quantile(values, [0.25, 0.5, 0.75])]}


BY_BATCH = ("kl_sums", "agreements", "psnr_db", "ssim", "lpips", "pictures")
"""What a Fidelity lists by batch of images."""


@dataclass
class Fidelity:
    """Per-image figures of one policy: KL and agreement summed over tokens by scale, and picture similarities.

    `reasons` says of every measure that could not be had why.
    """

    tokens: tuple[int, ...]
    choices_per_token: int = 1
    kl_sums: list[NDArray[np.float64]] = field(default_factory=list)
    agreements: list[NDArray[np.float64]] = field(default_factory=list)
    psnr_db: list[NDArray[np.float64]] = field(default_factory=list)
    ssim: list[NDArray[np.float64]] = field(default_factory=list)
    lpips: list[NDArray[np.float64]] = field(default_factory=list)
    fid: float | None = None
    pictures: list[Tensor] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def kl_of_images(self) -> NDArray[np.float64]:
        """Mean KL over all tokens of every image."""
        means: NDArray[np.float64] = np.concatenate(self.kl_sums).sum(axis=1) / sum(self.tokens)
        return means

    def kl(self) -> float:
        """Mean over images and tokens, in nats."""
        return float(self.kl_of_images().mean())

    def kl_per_scale(self) -> list[float]:
        return [float(x) for x in np.concatenate(self.kl_sums).mean(axis=0) / np.array(self.tokens)]

    def top1_agreement(self) -> float:
        """Share of choices (tokens, or bits of tokens) whose most likely value is the full cache's."""
        return float(self.top1_of_images().mean())

    def top1_of_images(self) -> NDArray[np.float64]:
        """The share of every image."""
        choices = sum(self.tokens) * self.choices_per_token
        shares: NDArray[np.float64] = np.concatenate(self.agreements).sum(axis=1) / choices
        return shares

    def top1_per_scale(self) -> list[float]:
        choices = np.array(self.tokens) * self.choices_per_token
        return [float(x) for x in np.concatenate(self.agreements).mean(axis=0) / choices]

    def of_pictures(self, name: Literal["psnr_db", "ssim", "lpips"]) -> NDArray[np.float64] | None:
        """A figure of every freely drawn picture; None when it was not measured."""
        found: list[NDArray[np.float64]] = getattr(self, name)
        return np.concatenate(found) if found else None


class FidelityBench:
    """Draws the reference once, with the full cache, and compares any number of plans with it.

    `images` samples are teacher-forced, the first `pictures` of them also drawn freely. Without `hold` a batch's
    reference is drawn when that batch is compared, and kept until another is.
    """

    def __init__(
        self,
        model: ImageModel[Any],
        *,
        images: int,
        pictures: int,
        seed: int,
        settings: Settings,
        batch: int = 16,
        hold: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.settings, self._seed = model, settings, seed
        self._progress = progress if progress is not None else lambda _: None
        self.pictures = min(pictures, images)
        self._lpips = open_lpips() if self.pictures else "no pictures were drawn"
        self.batches = image_batches(images, batch)
        self._reference: dict[int, tuple[Drawn, list[Tensor]]] = {}
        if hold:
            make = self._by_size(lambda size: Generator(model, model.full_plan(), size, settings))
            for index, samples in enumerate(self.batches):
                self._reference[index] = self._draw(make[len(samples)], samples)

    def _labels(self, samples: range) -> list[Any]:
        return self.model.labels(len(samples), samples.start)

    def _by_size(self, make: Callable[[int], Generator[Any]]) -> dict[int, Generator[Any]]:
        """Generators of all batches; equal batches share one, and so one cache."""
        return {size: make(size) for size in {len(samples) for samples in self.batches}}

    def _draw(self, full: Generator[Any], samples: range) -> tuple[Drawn, list[Tensor]]:
        """What the full cache draws, and its logits of every scale."""
        logits: list[Tensor] = []
        drawn = full.draw(self._labels(samples), self._seed, samples, observe=lambda _, x: logits.append(x))
        self._progress(len(samples))
        return drawn, logits

    def has(self, index: int) -> bool:
        """Whether the reference of this batch is there."""
        return index in self._reference

    def reference(self, index: int) -> tuple[Drawn, list[Tensor]]:
        """What the full cache draws in a batch, and its logits of every scale; drawn now where it is not there."""
        if not self.has(index):
            self._reference.clear()
            samples = self.batches[index]
            full = Generator(self.model, self.model.full_plan(), len(samples), self.settings)
            self._reference[index] = self._draw(full, samples)
        return self._reference[index]

    def reference_pictures(self) -> Tensor:
        """What the full cache draws, (pictures, 3, H, W)."""
        wanted = [index for index, samples in enumerate(self.batches) if samples.start < self.pictures]
        images = [drawn.images for drawn, _ in map(self.reference, wanted) if drawn.images is not None]
        return torch.cat(images)[: self.pictures]

    def compare(self, make: Callable[[int], Generator[Any]]) -> Fidelity:
        """Fidelity of what the generators draw that `make` makes for so many images, to the full cache."""
        by_size = self._by_size(make)
        return self.joined([self.compare_batch(by_size[len(b)], index) for index, b in enumerate(self.batches)])

    def compare_batch(self, generator: Generator[Any], index: int) -> Fidelity:
        """The same over the images of one batch alone, without what is known only of all pictures."""
        samples, (drawn, reference) = self.batches[index], self.reference(index)
        tokens = self.model.geometry.schedule.tokens
        result = Fidelity(tokens, reference[0].shape[1] // tokens[0])
        kl: list[Tensor] = []
        agree: list[Tensor] = []

        def observe(scale: int, logits: Tensor) -> None:
            kl.append(kl_divergence(reference[scale], logits).sum(1))
            agree.append((reference[scale].argmax(-1) == logits.argmax(-1)).sum(1).double())

        labels = self._labels(samples)
        generator.draw(labels, sampler=RecordedTokens(drawn.tokens), observe=observe, decode=False)
        result.kl_sums.append(torch.stack(kl, dim=1).cpu().numpy())
        result.agreements.append(torch.stack(agree, dim=1).cpu().numpy())
        self._progress(len(samples))
        if not all(math.isfinite(x) for x in result.kl_of_images()):
            raise FloatingPointError(f"the logits under policy {generator.plan.policy!r} are not finite")
        if samples.start < self.pictures:
            wanted = min(len(samples), self.pictures - samples.start)
            sampler = CommonRandomSampler(self._seed, samples, self.settings)
            free = generator.draw(labels, sampler=sampler)
            assert free.images is not None
            assert drawn.images is not None
            images, originals = free.images[:wanted], drawn.images[:wanted]
            result.psnr_db.append(psnr(images, originals))
            similarity = ssim(images, originals)
            if similarity is not None:
                result.ssim.append(similarity)
            if not isinstance(self._lpips, str):
                result.lpips.append(self._lpips(images, originals))
            result.pictures.append(images)
            self._progress(len(samples))
        return result

    def joined(self, parts: Sequence[Fidelity]) -> Fidelity:
        """All batches as one, in their order; with what is known only of all pictures, and why measures are lacking."""
        result = Fidelity(parts[0].tokens, parts[0].choices_per_token)
        for name in BY_BATCH:
            setattr(result, name, [found for part in parts for found in getattr(part, name)])
        if not result.ssim:
            result.reasons["ssim"] = "torchmetrics not installed" if self.pictures else "no pictures were drawn"
        if isinstance(self._lpips, str):
            result.reasons["lpips"] = self._lpips
        reason = why_no_fid(self.pictures) if self.pictures else "no pictures"
        distance = fid(torch.cat(result.pictures), self.reference_pictures()) if reason is None else reason
        if isinstance(distance, str):
            result.reasons["fid"] = distance
        else:
            result.fid = distance
        return result


def image_batches(images: int, batch: int = 16) -> list[range]:
    """The images that are compared at a time."""
    return [range(first, min(first + batch, images)) for first in range(0, images, batch)]


def drawings(samples: range, pictures: int) -> int:
    """Images drawn to compare one plan over a batch, as progress counts them."""
    return len(samples) * (2 if samples.start < pictures else 1)


def save_compared(path: Path, plans: Sequence[Fidelity], pictures: int) -> None:
    """A file of what one batch of images gave under every plan of a subject. Raises FormatError.

    Pictures are kept in 8 bits, as they are shown, but in full where the FID of so many `pictures` is to be told.
    """
    arrays = {
        name: np.stack([getattr(plan, name)[0] for plan in plans])
        for name in BY_BATCH
        if name != "pictures" and getattr(plans[0], name)
    }
    if plans[0].pictures:
        drawn = torch.stack([plan.pictures[0].float().cpu() for plan in plans])
        whole = why_no_fid(pictures) is None
        arrays["pictures"] = drawn.numpy() if whole else np.stack([to_pixels(images).numpy() for images in drawn])
    save_arrays(path, arrays, {"tokens": plans[0].tokens, "choices_per_token": plans[0].choices_per_token})


def load_compared(path: Path) -> list[Fidelity]:
    """What `save_compared` wrote. Raises FormatError for a damaged file."""
    header, arrays = load_arrays(path)
    try:
        tokens, choices = tuple(header["tokens"]), header["choices_per_token"]
        found = [Fidelity(tokens, choices) for _ in arrays["kl_sums"]]
        for name in set(BY_BATCH) & set(arrays):
            for plan, result in enumerate(found):
                value: Any = arrays[name][plan]
                if name == "pictures":
                    value = torch.from_numpy(value)
                    value = value.permute(0, 3, 1, 2).float() / 255 if value.dtype == torch.uint8 else value
                setattr(result, name, [value])
    except (KeyError, TypeError, IndexError) as error:
        raise FormatError(f"{path} is no part of a comparison: {error}; delete it, and start again") from error
    return found
