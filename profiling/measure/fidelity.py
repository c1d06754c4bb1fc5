"""How far a policy's images and logits are from the full cache's.

KL and agreement are teacher-forced: the policy sees the codes the full cache sampled, and its guided logits are
compared before any cut. PSNR and SSIM compare free-running pictures drawn with the same random numbers.
Shapes: B images, P pictures, N tokens of a scale, V codes, T scales.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

from heatkv.errors import FormatError, HeatKVError
from heatkv.generation.images import to_pixels
from heatkv.generation.loop import Drawn, Generator
from heatkv.models.base import ImageModel
from heatkv.models.sampling import CommonRandomSampler, RecordedTokens, Settings
from heatkv.parallel.parts import load_arrays, save_arrays
from heatkv.profiling.measure.perceptual import fid, open_lpips, why_no_fid
from heatkv.profiling.measure.subjects import Subject
from heatkv.profiling.results.row import Fidelity, Spread

FloatArray = NDArray[np.float64]

ROUNDING_MSE = 1 / (12 * 255**2)
"""Mean squared error of rounding to 8 bits; pictures that differ by less count as this close, 58.9 dB."""


def kl_divergence(reference_BNV: Tensor, logits_BNV: Tensor) -> Tensor:
    """KL(reference || logits) of the two softmaxes, in nats per token, (B, N) float64."""
    reference, other = reference_BNV.double().log_softmax(-1), logits_BNV.double().log_softmax(-1)
    return (reference.exp() * (reference - other)).sum(-1)


def psnr(images_P3HW: Tensor, reference_P3HW: Tensor) -> FloatArray:
    """PSNR in dB of every 8-bit picture against its reference; equal pictures have 58.9 dB, that of rounding."""
    difference = (to_pixels(images_P3HW).double() - to_pixels(reference_P3HW).double()) / 255
    mse = (difference**2).flatten(1).mean(1).clamp(min=ROUNDING_MSE)
    return np.asarray(-10 * torch.log10(mse))


def ssim(images_P3HW: Tensor, reference_P3HW: Tensor) -> FloatArray | None:
    """SSIM (torchmetrics, Gaussian window of 11) of every picture; None when torchmetrics is not installed."""
    if importlib.util.find_spec("torchmetrics") is None:
        return None
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(
        images_P3HW.float().cpu(), reference_P3HW.float().cpu(), data_range=1.0, reduction="none"
    )
    assert isinstance(values, Tensor)
    return np.asarray(values.double()).reshape(-1)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of what one policy's figures are above another's on the same samples, with a percentile interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    ours: Sequence[float] | FloatArray,
    theirs: Sequence[float] | FloatArray,
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
    mean = float((one - other).mean())
    if len(one) == 1:  # every draw is the same
        return PairedDifference(mean, mean, mean)
    interval = bootstrap(
        (one - other,), np.mean, vectorized=True, method="percentile", n_resamples=draws, confidence_level=confidence,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return PairedDifference(mean, float(interval.low), float(interval.high))


def spread(values: FloatArray) -> Spread:
    """Standard deviation over samples (None for one alone) and the quartiles."""
    first, second, third = (float(x) for x in np.quantile(values, [0.25, 0.5, 0.75]))
    return Spread(sd=float(values.std(ddof=1)) if len(values) > 1 else None, quartiles=(first, second, third))


@dataclass(frozen=True)
class Compared:
    """What one plan gives over some images: KL and agreement summed over the tokens of every scale, and similarities of
    the pictures that were drawn freely; None is what was not measured. A token has `choices` values to agree on."""

    tokens: tuple[int, ...]
    choices: int
    kl_sums_BT: FloatArray
    agreements_BT: FloatArray
    psnr_db: FloatArray | None = None
    ssim: FloatArray | None = None
    lpips: FloatArray | None = None
    pictures_P3HW: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Compared]) -> Compared:
        """All batches as one, in their order."""

        def joined(name: str) -> Any:
            found = [value for part in parts if (value := getattr(part, name)) is not None]
            return None if not found else torch.cat(found) if name == PICTURES else np.concatenate(found)

        return cls(parts[0].tokens, parts[0].choices, **{name: joined(name) for name in ARRAYS})

    def kl_of_images(self) -> FloatArray:
        """Mean KL over all tokens of every image, in nats."""
        means: FloatArray = self.kl_sums_BT.sum(axis=1) / sum(self.tokens)
        return means

    def kl(self) -> float:
        """Mean over images and tokens, in nats."""
        return float(self.kl_of_images().mean())

    def kl_per_scale(self) -> FloatArray:
        means: FloatArray = self.kl_sums_BT.mean(axis=0) / np.array(self.tokens)
        return means

    def top1_of_images(self) -> FloatArray:
        """Of every image the share of choices (tokens, or bits of tokens) whose likeliest value is the full cache's."""
        shares: FloatArray = self.agreements_BT.sum(axis=1) / (sum(self.tokens) * self.choices)
        return shares

    def top1_agreement(self) -> float:
        return float(self.top1_of_images().mean())

    def top1_per_scale(self) -> FloatArray:
        shares: FloatArray = self.agreements_BT.mean(axis=0) / (np.array(self.tokens) * self.choices)
        return shares


PICTURES = "pictures_P3HW"
ARRAYS = ("kl_sums_BT", "agreements_BT", "psnr_db", "ssim", "lpips", PICTURES)
"""The fields of Compared that have an entry for every image."""


class FidelityBench:
    """Draws references with the full cache, and compares any number of plans with them.

    `images` samples are teacher-forced, the first `pictures` of them also drawn freely. A batch's reference is drawn
    when the batch is first compared, and kept with all others or, unless `hold`, until another is. `progress` is called
    with the number of images drawn.
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
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.model, self.settings, self.seed, self._hold, self._progress = model, settings, seed, hold, progress
        self.pictures = min(pictures, images)
        self.batches = image_batches(images, batch)
        self._lpips = open_lpips() if self.pictures else "no pictures were drawn"
        self._reference: dict[int, tuple[Drawn, list[Tensor]]] = {}
        self._last: tuple[object, Generator[Any]] | None = None

    def _labels(self, samples: range) -> list[Any]:
        return self.model.labels(len(samples), samples.start)

    def reference(self, index: int) -> tuple[Drawn, list[Tensor]]:
        """What the full cache draws in a batch, and its logits of every scale; drawn now where it is not there."""
        if index not in self._reference:
            if not self._hold:
                self._reference.clear()
            self._last = None  # two caches at once may be too many
            samples, logits = self.batches[index], list[Tensor]()
            full = Generator(self.model, self.model.full_plan(), len(samples), self.settings)
            drawn = full.draw(self._labels(samples), self.seed, samples, observe=lambda _, x: logits.append(x))
            self._reference[index] = drawn, logits
            self._progress(len(samples))
        return self._reference[index]

    def compare(self, make: Callable[[int], Generator[Any]]) -> Compared:
        """What the generators draw that `make` makes for so many images, compared with the full cache."""
        if self._hold:  # before there is another cache
            for index in range(len(self.batches)):
                self.reference(index)
        sizes = {len(samples) for samples in self.batches}
        by_size = {size: make(size) for size in sizes}  # equal batches share a generator, and so a cache
        return Compared.join([self.compare_batch(by_size[len(b)], index) for index, b in enumerate(self.batches)])

    def compare_plans(self, subject: Subject, index: int) -> list[Compared]:
        """What every plan of a subject gives over the images of a batch. The generator stays for the next batch."""
        self.reference(index)
        return [self.compare_batch(self._generator(subject, plan, index), index) for plan in range(len(subject.plans))]

    def _generator(self, subject: Subject, plan: int, index: int) -> Generator[Any]:
        size = len(self.batches[index])
        key = id(subject), plan, size
        if self._last is None or self._last[0] != key:
            self._last = None  # frees its cache first
            self._last = key, subject.generator(self.model, self.settings, plan, size)
        return self._last[1]

    def compare_batch(self, generator: Generator[Any], index: int) -> Compared:
        """The same over the images of one batch alone."""
        samples, (drawn, reference) = self.batches[index], self.reference(index)
        tokens = self.model.geometry.schedule.tokens
        kl: list[Tensor] = []
        agree: list[Tensor] = []

        def observe(scale: int, logits: Tensor) -> None:
            kl.append(kl_divergence(reference[scale], logits).sum(1))
            agree.append((reference[scale].argmax(-1) == logits.argmax(-1)).sum(1).double())

        generator.draw(self._labels(samples), sampler=RecordedTokens(drawn.tokens), observe=observe, decode=False)
        sums, agreements = (torch.stack(found, dim=1).cpu().numpy() for found in (kl, agree))
        self._progress(len(samples))
        if not np.isfinite(sums).all():
            raise FloatingPointError(f"the logits under policy {generator.plan.policy!r} are not finite")
        pictures = self._compare_pictures(generator, samples, drawn) if samples.start < self.pictures else {}
        return Compared(tokens, reference[0].shape[1] // tokens[0], sums, agreements, **pictures)

    def _compare_pictures(self, generator: Generator[Any], samples: range, drawn: Drawn) -> dict[str, Any]:
        """Pictures of a batch, drawn freely, and how similar they are to the full cache's."""
        wanted = min(len(samples), self.pictures - samples.start)
        free = generator.draw(self._labels(samples), sampler=CommonRandomSampler(self.seed, samples, self.settings))
        self._progress(len(samples))
        assert free.images is not None
        assert drawn.images is not None
        images, originals = free.images[:wanted], drawn.images[:wanted]
        return {
            "psnr_db": psnr(images, originals),
            "ssim": ssim(images, originals),
            "lpips": None if isinstance(self._lpips, str) else self._lpips(images, originals),
            PICTURES: images,
        }

    def measure(self, subject: Subject) -> Fidelity:
        """Figures of a subject, compared now."""
        makes = [partial(subject.generator, self.model, self.settings, plan) for plan in range(len(subject.plans))]
        return self.figures([self.compare(make) for make in makes])

    def fid(self, compared: Compared) -> float | str:
        """FID of all pictures against the full cache's, or why there is none."""
        reason = why_no_fid(self.pictures) if self.pictures else "no pictures"
        if reason is not None:
            return reason
        assert compared.pictures_P3HW is not None
        wanted = [index for index, samples in enumerate(self.batches) if samples.start < self.pictures]
        originals = [images for index in wanted if (images := self.reference(index)[0].images) is not None]
        return fid(compared.pictures_P3HW, torch.cat(originals)[: self.pictures])

    def figures(self, plans: Sequence[Compared]) -> Fidelity:
        """Figures of a subject, means over its plans.

        Those of single images and pictures are kept, so that any two rows of equal samples can be compared in pairs
        later.
        """
        kl = _over_plans([plan.kl_of_images() for plan in plans])
        top1 = _over_plans([plan.top1_of_images() for plan in plans])
        pictures = {name: _over_plans([getattr(plan, name) for plan in plans]) for name in ("psnr_db", "ssim", "lpips")}
        measured = {name: values for name, values in pictures.items() if values is not None}
        similarities: dict[str, Any] = {name: float(values.mean()) for name, values in measured.items()}
        for name, values in measured.items():
            similarities[f"{name.removesuffix('_db')}_of_pictures"] = tuple(values.tolist())
        distances = [self.fid(plan) for plan in plans]
        reasons = {}
        if "ssim" not in measured:
            reasons["ssim"] = "torchmetrics not installed" if self.pictures else "no pictures were drawn"
        if isinstance(self._lpips, str):
            reasons["lpips"] = self._lpips
        if isinstance(distances[0], str):
            reasons["fid"] = distances[0]
        assert kl is not None
        assert top1 is not None
        return Fidelity(
            images=len(kl),
            kl=float(np.mean([plan.kl() for plan in plans])),
            kl_per_scale=tuple(np.mean([plan.kl_per_scale() for plan in plans], axis=0).tolist()),
            kl_of_draws=tuple(plan.kl() for plan in plans),
            kl_of_images=tuple(kl.tolist()),
            top1_agreement=float(np.mean([plan.top1_agreement() for plan in plans])),
            top1_per_scale=tuple(np.mean([plan.top1_per_scale() for plan in plans], axis=0).tolist()),
            top1_of_images=tuple(top1.tolist()),
            pictures=self.pictures,
            fid=None if "fid" in reasons else float(np.mean([float(distance) for distance in distances])),
            spread={name: spread(values) for name, values in {"kl": kl, "top1_agreement": top1, **measured}.items()},
            not_measured=reasons,
            **similarities,
        )


def _over_plans(figures: Sequence[FloatArray | None]) -> FloatArray | None:
    """The mean of every sample."""
    present = [figure for figure in figures if figure is not None]
    return np.mean(present, axis=0) if present else None


# -------------------------------------------------------------------------------------------- batch by batch


def image_batches(images: int, batch: int = 16) -> list[range]:
    """The images that are compared at a time."""
    return [range(first, min(first + batch, images)) for first in range(0, images, batch)]


def drawings(samples: range, pictures: int) -> int:
    """Images drawn to compare one plan over a batch, as progress counts them."""
    return len(samples) * (2 if samples.start < pictures else 1)


def save_compared(path: Path, plans: Sequence[Compared], pictures: int) -> None:
    """Write what one batch of images gave under every plan of a subject. Raises FormatError.

    Pictures are kept in 8 bits, as they are shown, but in full where there are enough `pictures` for an FID.
    """
    arrays = {
        name: np.stack([getattr(plan, name) for plan in plans])
        for name in ARRAYS
        if name != PICTURES and getattr(plans[0], name) is not None
    }
    drawn = [plan.pictures_P3HW.float().cpu() for plan in plans if plan.pictures_P3HW is not None]
    if drawn:
        in_full = why_no_fid(pictures) is None
        arrays[PICTURES] = np.stack([(images if in_full else to_pixels(images)).numpy() for images in drawn])
    save_arrays(path, arrays, {"tokens": plans[0].tokens, "choices": plans[0].choices})


def load_compared(path: Path) -> list[Compared]:
    """What `save_compared` wrote. Raises FormatError for a damaged file."""
    header, arrays = load_arrays(path)
    try:
        plans = []
        for plan in range(len(arrays["kl_sums_BT"])):
            values: dict[str, Any] = {name: array[plan] for name, array in arrays.items()}
            if PICTURES in values:
                drawn = torch.from_numpy(values[PICTURES])
                values[PICTURES] = drawn.permute(0, 3, 1, 2).float() / 255 if drawn.dtype == torch.uint8 else drawn
            plans.append(Compared(tuple(header["tokens"]), header["choices"], **values))
    except (KeyError, TypeError, IndexError) as error:
        raise FormatError(f"{path} is no part of a comparison: {error}; delete it, and start again") from error
    return plans
