"""The next-scale loop: draws images under a plan, every scale one step that can be recorded as a CUDA graph.

Between steps only tensors at fixed addresses hold state: the class or prompt, the random numbers of the running step,
the chosen codes, their sum, and the cache. Random numbers are made outside the steps, so that a recorded step gets the
same ones as an eager step. Images do not see each other: a scale of many tokens runs for a few images at a time, in one
step each, so that only these take memory beside the cache.

Shapes: B images, N choices of a scale (a token, or one bit of a token), V codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from operator import mul
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from heatkv.core.plan import CachePlan
from heatkv.core.schema import are_other_weights, whole
from heatkv.core.storage_type import StorageType
from heatkv.engine.arena_cache import ArenaCache, Attend
from heatkv.engine.open_cache import open_cache
from heatkv.engine.spans import SAMPLING, scale_name, span
from heatkv.engine.watch import logits_error
from heatkv.errors import ModelError
from heatkv.generation.graphs import CUDAGraphRunner, EagerRunner, StepKey, StepRunner
from heatkv.generation.micro_batches import (
    choose_micro_batch,
    decode_in_slices,
    free_bytes,
    images_at_once,
    slices,
    step_bytes,
)
from heatkv.models.base import Drawing, ImageModel
from heatkv.models.sampling import CommonRandomSampler, NoiseSampler, Sampler, Settings

Label = TypeVar("Label")
"""What one image is drawn from: a class, or a prompt."""

Observer = Callable[[int, Tensor], None]
"""Called with every scale and a copy of its guided logits (B, N, V), before any cut."""


@dataclass(frozen=True)
class Drawn:
    """Codes of every scale, (B, N) each, the sum of their features, (B, Z, h, w), and the images, (B, 3, H, W) in
    [0, 1], when they were decoded."""

    tokens: tuple[Tensor, ...]
    f_hat_BZhw: Tensor
    images: Tensor | None


class _Buffers:
    """Tensors at fixed addresses that all batches of one size use; each is made when it is first needed.

    `at_once` says how many images run at once, at most, per scale.
    """

    def __init__(self, model: ImageModel[Label], batch: int, at_once: Sequence[int] | None = None) -> None:
        each, self._codes = model.choices
        self._batch, self._device = batch, model.device
        self._counts = [each * tokens for tokens in model.geometry.schedule.tokens]
        self.at_once = at_once or [batch] * len(self._counts)
        self.sums_TB = torch.zeros(len(self._counts), batch, device=self._device)
        """Sums of the logits of every scale and image, finite where these are."""
        self._largest: dict[str, Tensor] = {}

    @cached_property
    def tokens(self) -> list[Tensor]:
        """The chosen codes of every scale, (B, N) each."""
        return [torch.empty((self._batch, count), dtype=torch.long, device=self._device) for count in self._counts]

    def parts(self, scale: int) -> Iterator[tuple[int, int]]:
        """The first image and the number of images of everything that runs at once."""
        for first in range(0, self._batch, self.at_once[scale]):
            yield first, min(self.at_once[scale], self._batch - first)

    def noise(self, scale: int, images: int) -> Tensor:
        """(images, N, V) in fp32; scales use the same memory in turn."""
        return self._shared("noise", self.at_once, scale, images)

    def logits(self, scale: int) -> Tensor:
        """The same for all images."""
        return self._shared("logits", [self._batch] * len(self._counts), scale, self._batch)

    def _shared(self, name: str, at_once: Sequence[int], scale: int, images: int) -> Tensor:
        if name not in self._largest:
            largest = max(map(mul, at_once, self._counts)) * self._codes
            self._largest[name] = torch.empty(largest, device=self._device)
        shape = (images, self._counts[scale], self._codes)
        return self._largest[name][: prod(shape)].view(shape)


@dataclass(frozen=True)
class _Scales(Generic[Label]):
    """Draws images from their start to their end, scale by scale."""

    drawing: Drawing[Label]
    cache: Attend
    sampler: Sampler
    buffers: _Buffers
    runner: StepRunner
    observe: Observer | None

    def run(self, scales: int) -> tuple[Tensor, ...]:
        """The codes of every scale."""
        self.buffers.sums_TB.zero_()
        try:
            for scale in range(scales):
                with span(scale_name(scale)):
                    if isinstance(self.sampler, NoiseSampler):
                        self._in_one_step(scale, self.sampler)
                    else:
                        self._in_two_steps(scale)
        except BaseException as error:
            self.runner.forget()  # some steps of these images have run and others have not
            if isinstance(error, RuntimeError | ValueError):
                self.check()  # what failed, such as a sampler, may not know why
            raise
        return tuple(tokens_BN.clone() for tokens_BN in self.buffers.tokens)

    def _logits(self, scale: int, first: int, count: int) -> tuple[Drawing[Label], Tensor]:
        """Some of the images, and their guided logits, whose sums are kept, which are finite where they are."""
        drawing = self.drawing.part(scale, first, count)
        if isinstance(self.cache, ArenaCache):
            self.cache.serve(drawing.rows)
        logits_BNV = drawing.logits(self.cache)
        torch.sum(logits_BNV, dim=(1, 2), out=self.buffers.sums_TB[scale, first : first + count])
        return drawing, logits_BNV

    def check(self) -> None:
        """Raise NumericsError for the first place with numbers that are not finite, and what else the cache raises."""
        if not isinstance(self.cache, ArenaCache) or self.buffers.sums_TB.is_meta:  # tensors with shapes alone
            return
        images = self.buffers.sums_TB.shape[1]
        if broken := (~self.buffers.sums_TB.isfinite()).nonzero().tolist():
            scale, in_cache = broken[0][0], self.cache.watch.first(images)
            if in_cache is None or scale < in_cache[0]:
                layers, dtype = self.cache.geometry.layers, self.cache.store.dtype
                raise logits_error(scale, layers, [image for t, image in broken if t == scale], dtype)
        self.cache.check(images)

    def _in_one_step(self, scale: int, sampler: NoiseSampler) -> None:
        seen_BNV = None if self.observe is None else self.buffers.logits(scale)
        for first, count in self.buffers.parts(scale):
            tokens_BN = self.buffers.tokens[scale][first : first + count]
            noise_BNV = self.buffers.noise(scale, count)

            def step(first: int = first, tokens_BN: Tensor = tokens_BN, noise_BNV: Tensor = noise_BNV) -> None:
                drawing, logits_BNV = self._logits(scale, first, len(tokens_BN))
                if seen_BNV is not None:
                    seen_BNV[first : first + len(tokens_BN)] = logits_BNV
                with span(SAMPLING):
                    tokens_BN.copy_(sampler.pick(logits_BNV, noise_BNV))
                del logits_BNV
                drawing.accept(tokens_BN)

            with span(SAMPLING):
                sampler.noise(scale, noise_BNV, first)
            key = StepKey(scale, "all", seen_BNV is not None, type(sampler), sampler.settings, first)
            self.runner.run(key, step)
        if self.observe is not None and seen_BNV is not None:
            self.observe(scale, seen_BNV.clone())

    def _in_two_steps(self, scale: int) -> None:
        """The sampler chooses between the steps, in its own way."""
        tokens_BN, seen_BNV = self.buffers.tokens[scale], self.buffers.logits(scale)
        for first, count in self.buffers.parts(scale):

            def step(first: int = first, count: int = count) -> None:
                _, seen_BNV[first : first + count] = self._logits(scale, first, count)

            self.runner.run(StepKey(scale, "logits", observed=True, first=first), step)
        logits_BNV = seen_BNV.clone()
        if self.observe is not None:
            self.observe(scale, logits_BNV)
        with span(SAMPLING):
            chosen_BN = self.sampler.choose(scale, logits_BNV)
        if chosen_BN.shape != tokens_BN.shape:
            raise ModelError(
                f"the sampler chose {tuple(chosen_BN.shape)} codes at scale {scale}; (images, choices) are "
                f"{tuple(tokens_BN.shape)}"
            )
        tokens_BN.copy_(chosen_BN)
        everyone = self.drawing.part(scale, 0, len(tokens_BN))
        self.runner.run(StepKey(scale, "accept"), lambda: everyone.accept(tokens_BN))


def run_scales(
    model: ImageModel[Label],
    labels: Sequence[Label],
    cache: Attend,
    sampler: Sampler,
    settings: Settings,
    observe: Observer | None = None,
) -> Drawn:
    """The codes of one image per label, drawn through `cache`, which is at its start and has the rows for them."""
    with torch.inference_mode():
        drawing, buffers = model.begin(labels, settings), _Buffers(model, len(labels))
        scales = _Scales(drawing, cache, sampler, buffers, EagerRunner(), observe)
        tokens = scales.run(len(model.geometry.schedule))
        scales.check()
        return Drawn(tokens, drawing.f_hat, None)


class Generator(Generic[Label]):
    """Draws batches of one size under one plan, with one cache for all of them.

    `settings` (default: the model's) say how codes are chosen, `code` is "int8" or "fp8" for a cache of 8-bit codes
    and None for the compute type, `attention` names the kernel, "auto" for the one that suits the device. With
    `graphs` every scale is recorded as a CUDA graph while the second batch is drawn, and replayed for all later ones;
    the embedding of labels, random numbers and the decoder stay outside (docs/generation.md). `runner` runs the steps
    in another way; generators that take turns on one record anew at every turn. `micro_batch` is how many images run
    at once through the scale of most tokens, `decode_batch` how many are decoded at once (docs/memory.md). Raises
    ModelError for a bad batch, PlanError for a plan that does not fit the model or the device, GraphError for graphs
    without a CUDA device.
    """

    def __init__(
        self,
        model: ImageModel[Label],
        plan: CachePlan,
        batch: int,
        settings: Settings | None = None,
        *,
        code: str | None = None,
        attention: str = "auto",
        graphs: bool = False,
        runner: StepRunner | None = None,
        micro_batch: int | Literal["auto"] = "auto",
        decode_batch: int | Literal["auto"] = "auto",
    ) -> None:
        self.model, self.plan, self.batch = model, plan, whole(batch, "batch", ModelError, 1)
        self._decode_batch = 0 if decode_batch == "auto" else whole(decode_batch, "decode_batch", ModelError, 1)
        self.settings = model.sampling if settings is None else settings
        plan.check_geometry(model.geometry)
        if plan.weights and are_other_weights(plan.weights, model.fingerprint):
            weights = f"{plan.weights}, these are {model.fingerprint}"
            warnings.warn(f"the plan is of other weights ({weights}); calibrate these and solve again", stacklevel=2)
        if runner is None:
            runner = CUDAGraphRunner(model.device) if graphs else EagerRunner()
        self.runner: StepRunner = runner
        self._code, self._attention = code, attention
        if micro_batch == "auto":
            each = self.settings.rows_per_image
            self.micro_batch = choose_micro_batch(model, self.batch, each, self._planned_bytes)
        else:
            self.micro_batch = min(self.batch, whole(micro_batch, "micro_batch", ModelError, 1))
        self._buffers = _Buffers(
            model, self.batch, images_at_once(model.geometry.schedule, self.batch, self.micro_batch)
        )
        self._cache: ArenaCache | None = self._open()
        self._drawing: Drawing[Label] | None = None

    def _open(self) -> ArenaCache:
        model, each = self.model, self.settings.rows_per_image
        return open_cache(
            self.plan, self.batch * each, model.compute_dtype, model.device, model.key_angles,
            model.adapter.query_weight, self._code, self._attention, [each * n for n in self._buffers.at_once],
        )  # fmt: skip

    @property
    def cache(self) -> ArenaCache:
        """The cache, opened anew where it was given back."""
        if self._cache is None:
            self._cache = self._open()
        return self._cache

    def give_back(self) -> None:
        """Give back the arena, buffers and recordings; the next batch makes them anew."""
        self.runner.forget()
        self._cache = self._drawing = None
        self._buffers = _Buffers(self.model, self.batch, self._buffers.at_once)

    def make_room(self) -> None:
        """`give_back`, where there is no room beside the arena to decode a picture."""
        if free_bytes(self.model.device) < self.model.decoding_bytes:
            self.give_back()

    def draw(
        self,
        labels: Sequence[Label],
        seed: int = 0,
        samples: Sequence[int] | None = None,
        *,
        sampler: Sampler | None = None,
        observe: Observer | None = None,
        decode: bool = True,
    ) -> Drawn:
        """Draw one image per label; `samples` number them for the random numbers (default 0, 1, ...).

        With graphs a scale is one graph per micro-batch, or two with the choice between them where `sampler` is no
        NoiseSampler. `observe` is called after every scale; with it, and with such a sampler, the logits of all images
        are held. Raises ModelError for labels that the model does not have or that are not as many as the batch,
        PolicyError when a dynamic policy fails, GraphError when a step cannot be recorded, NumericsError when the
        images were made of numbers that are not finite.
        """
        samples = range(self.batch) if samples is None else samples
        for name, given in (("labels", labels), ("samples", samples)):
            if len(given) != self.batch:
                raise ModelError(f"{len(given)} {name} for a generator of batch {self.batch}")
        if sampler is None:
            sampler = CommonRandomSampler(seed, samples, self.settings)
        with torch.inference_mode():
            self.cache.reset()
            drawing = self._begin(labels)
            scales = _Scales(drawing, self.cache, sampler, self._buffers, self.runner, observe)
            tokens = scales.run(len(self.model.geometry.schedule))
            drawn = Drawn(tokens, drawing.f_hat.clone() if self.runner.replays else drawing.f_hat, None)
            scales.check()  # waits for the device
            del drawing, scales  # what prompts decided
            if decode:
                self.make_room()
                images = decode_in_slices(self.model.decode, drawn.f_hat_BZhw, self.decode_batch)
                drawn = replace(drawn, images=images)
        return drawn

    def pictures(self, drawn: Drawn) -> Iterator[Tensor]:
        """The pictures of codes that this generator drew, (n, 3, H, W) each, a slice after the other."""
        return slices(self.model.decode, drawn.f_hat_BZhw, self.decode_batch)

    @property
    def decode_batch(self) -> int:
        """Images that are decoded at once: as many as fit in what a step of the transformer takes, and in the arena
        where it was given back."""
        if self._decode_batch:
            return self._decode_batch
        each = self.settings.rows_per_image
        room = step_bytes(self.model, each * self.micro_batch)
        room += self._planned_bytes if self._cache is None else 0
        return max(1, room // self.model.decoding_bytes)

    @property
    def _planned_bytes(self) -> int:
        rows, dtype = self.batch * self.settings.rows_per_image, self.model.compute_dtype
        return self.plan.bytes(rows, str(StorageType.for_dtype(dtype, self._code)))

    def _begin(self, labels: Sequence[Label]) -> Drawing[Label]:
        """Images at their start; where steps are replayed, in the tensors of the images before."""
        if not self.runner.replays:
            return self.model.begin(labels, self.settings)
        self.runner.serve(self)
        if self._drawing is None or not self._drawing.restart(labels):
            self.runner.forget()
            self._drawing = None  # frees its tensors first
            self._drawing = self.model.begin(labels, self.settings, reusable=True)
        return self._drawing
