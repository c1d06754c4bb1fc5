"""How far a policy's images and logits are from the full cache's.

KL and agreement are teacher-forced: the policy sees the codes the full cache sampled, and its guided logits are
compared before any cut. PSNR and SSIM compare free-running pictures drawn with the same random numbers.
Shapes: B images, P pictures, N tokens of a scale, V codes, T scales.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

from heatkv.core.io import read_tensors, write_tensors
from heatkv.core.schema import FloatArray
from heatkv.errors import HeatKVError
from heatkv.generation.images import from_pixels, to_pixels
from heatkv.generation.loop import Drawn, Generator
from heatkv.models.base import ImageModel
from heatkv.models.sampling import CommonRandomSampler, RecordedTokens, Settings
from heatkv.profiling.measure.latency import CONFIDENCE
from heatkv.profiling.measure.perceptual import fid, open_lpips, why_no_fid
from heatkv.profiling.measure.subjects import Subject
from heatkv.profiling.results.row import Fidelity, Spread

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
    """SSIM (Gaussian window of 11) of every picture; None without torchmetrics and for less than half a window."""
    if importlib.util.find_spec("torchmetrics") is None or min(images_P3HW.shape[-2:]) < 6:
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


def paired_difference(ours: Sequence[float] | FloatArray, theirs: Sequence[float] | FloatArray) -> PairedDifference:
    """mean(ours - theirs) with Student's interval, where equal places are the same sample under two policies.

    What samples have in common cancels: far fewer are needed than for two separate intervals. Raises HeatKVError for
    two lists that are not of the same samples, and for fewer than two, which have no interval.
    """
    one, other = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape or len(one) < 2:
        raise HeatKVError(
            f"figures of shapes {one.shape} and {other.shape} are not of the same two samples or more; compare runs of "
            "equal images"
        )
    differences, count = one - other, len(one)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    mean = float(differences.mean())
    return PairedDifference(mean, mean - half, mean + half)


def spread(values: FloatArray) -> Spread:
    """Standard deviation over samples (None for one alone) and the quartiles."""
    first, second, third = (float(x) for x in np.quantile(values, [0.25, 0.5, 0.75]))
    return Spread(sd=float(values.std(ddof=1)) if len(values) > 1 else None, quartiles=(first, second, third))


PICTURES = "pictures_P3HW"
NO_PICTURES = "no pictures were drawn"
ARRAYS = ("kl_sums_BT", "agreements_BT", "psnr_db", "ssim", "lpips", PICTURES)
"""The fields of Compared that have an entry for every image."""


@dataclass(frozen=True)
class Compared:
    """What one plan gives over some images: KL and agreement summed over the tokens of every scale, and similarities of
    the pictures that were drawn freely; None is what was not measured. A token has `choices` values to agree on, one or
    its bits."""

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
        self._lpips = open_lpips() if self.pictures else NO_PICTURES
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

    def measure(self, subject: Subject) -> Fidelity:
        """Figures of a subject."""
        return self.figures(self.compare(subject))

    def compare(self, subject: Subject) -> list[Compared]:
        """What every plan of a subject gives over all images."""
        batches = [self.compare_plans(subject, index) for index in range(len(self.batches))]
        return [Compared.join(parts) for parts in zip(*batches, strict=True)]

    def compare_plans(self, subject: Subject, index: int) -> list[Compared]:
        """What every plan of a subject gives over the images of a batch. A generator stays for the next batch."""
        self.reference(index)
        return [self.compare_batch(self._generator(subject, plan, index), index) for plan in range(len(subject.plans))]

    def _generator(self, subject: Subject, plan: int, index: int) -> Generator[Any]:
        size = len(self.batches[index])
        key = subject, plan, size
        if self._last is None or self._last[0] != key:
            self._last = None  # frees its cache first
            self._last = key, subject.generator(self.model, self.settings, plan, size)
        return self._last[1]

    def compare_batch(self, generator: Generator[Any], index: int) -> Compared:
        """What one generator gives over the images of a batch."""
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
        free = generator.draw(self._labels(samples), sampler=CommonRandomSampler(self.seed, samples, self.settings))
        self._progress(len(samples))
        assert free.images is not None
        assert drawn.images is not None
        wanted = self.pictures - samples.start
        images, originals = free.images[:wanted], drawn.images[:wanted]
        return {
            "psnr_db": psnr(images, originals),
            "ssim": ssim(images, originals),
            "lpips": None if isinstance(self._lpips, str) else self._lpips(images, originals),
            PICTURES: images,
        }

    def _fid(self, compared: Compared) -> float:
        """FID of all pictures against the full cache's."""
        originals = []
        for index in range(len(image_batches(self.pictures, len(self.batches[0])))):
            images = self.reference(index)[0].images
            assert images is not None
            originals.append(images)
        assert compared.pictures_P3HW is not None
        return fid(compared.pictures_P3HW, torch.cat(originals)[: self.pictures])

    def figures(self, plans: Sequence[Compared]) -> Fidelity:
        """Figures of a subject, means over its plans.

        Those of single images and pictures are kept, so that any two rows of equal samples can be compared in pairs
        later.
        """
        tokens, choices = np.array(plans[0].tokens), plans[0].choices

        def mean(figures: Iterable[FloatArray]) -> FloatArray:
            means: FloatArray = np.mean(list(figures), axis=0)
            return means

        kl = [plan.kl_of_images() for plan in plans]
        top1 = [plan.agreements_BT.sum(axis=1) / (tokens.sum() * choices) for plan in plans]
        similarities = {
            name: mean(getattr(plan, name) for plan in plans)
            for name in ("psnr_db", "ssim", "lpips")
            if getattr(plans[0], name) is not None
        }
        samples = {"kl": mean(kl), "top1_agreement": mean(top1)} | similarities
        no_ssim = "torchmetrics not installed, or pictures below 6 x 6" if self.pictures else NO_PICTURES
        reasons = {
            "ssim": None if "ssim" in similarities else no_ssim,
            "lpips": self._lpips if isinstance(self._lpips, str) else None,
            "fid": why_no_fid(self.pictures),
        }
        measured: dict[str, Any] = {name: float(values.mean()) for name, values in similarities.items()}
        for name, values in similarities.items():
            measured[f"{name.removesuffix('_db')}_of_pictures"] = tuple(values.tolist())
        kl_of_draws = tuple(float(values.mean()) for values in kl)
        return Fidelity(
            images=len(kl[0]),
            kl=float(np.mean(kl_of_draws)),
            kl_per_scale=tuple(mean(plan.kl_sums_BT.mean(axis=0) / tokens for plan in plans).tolist()),
            kl_of_draws=kl_of_draws,
            kl_of_images=tuple(samples["kl"].tolist()),
            top1_agreement=float(np.mean([values.mean() for values in top1])),
            top1_per_scale=tuple(mean(plan.agreements_BT.mean(axis=0) / (tokens * choices) for plan in plans).tolist()),
            top1_of_images=tuple(samples["top1_agreement"].tolist()),
            pictures=self.pictures,
            fid=float(np.mean([self._fid(plan) for plan in plans])) if reasons["fid"] is None else None,
            spread={name: spread(values) for name, values in samples.items()},
            not_measured={name: reason for name, reason in reasons.items() if reason is not None},
            **measured,
        )


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
    in_full = why_no_fid(pictures) is None

    def array(plan: Compared, name: str) -> Any:
        value = getattr(plan, name)
        return value if name != PICTURES else value.float().cpu() if in_full else to_pixels(value)

    arrays = {
        name: np.stack([array(plan, name) for plan in plans]) for name in ARRAYS if getattr(plans[0], name) is not None
    }
    write_tensors(path, {"tokens": plans[0].tokens, "choices": plans[0].choices}, arrays)


def load_compared(path: Path) -> list[Compared]:
    """What `save_compared` wrote. Raises FormatError for a damaged file."""
    header, arrays = read_tensors(path, "part")
    plans = []
    for plan in range(len(arrays["kl_sums_BT"])):
        values: dict[str, Any] = {name: array[plan] for name, array in arrays.items()}
        if PICTURES in values:
            pixels = values[PICTURES]
            values[PICTURES] = from_pixels(pixels) if pixels.dtype == np.uint8 else torch.from_numpy(pixels)
        plans.append(Compared(tuple(header["tokens"]), header["choices"], **values))
    return plans
