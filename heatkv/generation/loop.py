"""The next-scale loop: draws images under a plan, every scale one step that can be recorded as a CUDA graph.

Between steps only tensors at fixed addresses hold state: the class or prompt, the random numbers of the running scale,
the chosen codes, their sum, and the cache. Random numbers are made outside the steps, so that a recorded step gets the
same ones as an eager step.

Shapes: B images, N choices of a scale (a token, or one bit of a token), V codes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Literal, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor

from heatkv.core.plan import CachePlan
from heatkv.core.schema import are_other_weights, shown, whole
from heatkv.core.storage_type import StorageType
from heatkv.engine.arena_cache import ArenaCache, Attend
from heatkv.engine.open_cache import open_cache
from heatkv.engine.spans import DECODE, SAMPLING, scale_name, span
from heatkv.engine.watch import logits_error
from heatkv.errors import ModelError
from heatkv.generation.graphs import CUDAGraphRunner, EagerRunner, StepRunner
from heatkv.models.base import Drawing, ImageModel, checked_run
from heatkv.models.sampling import CommonRandomSampler, NoiseSampler, Sampler, Settings

Label = TypeVar("Label")
"""What one image is drawn from: a class, or a prompt."""

Observer = Callable[[int, Tensor], None]
"""Called with every scale and a copy of its guided logits (B, N, V), before any cut."""


@dataclass(frozen=True)
class Drawn:
    """Codes of every scale, (B, N) each, and the images, (B, 3, H, W) in [0, 1], when they were decoded."""

    tokens: tuple[Tensor, ...]
    images: Tensor | None


@dataclass(frozen=True)
class StepKey:
    """Names a step: all of a scale, or what comes before or after a choice that is made between two steps.

    `observed` says whether the logits are kept, `sampler` and `settings` how a whole step chooses.
    """

    scale: int
    part: Literal["all", "logits", "accept"]
    observed: bool = False
    sampler: type | None = None
    settings: Settings | None = None

    def __str__(self) -> str:
        return f"scale {self.scale}" if self.part == "all" else f"scale {self.scale} ({self.part})"


class _Buffers:
    """Tensors at fixed addresses that all batches of one size use; each is made when it is first needed."""

    def __init__(self, model: ImageModel[Label], batch: int) -> None:
        each, self._codes = model.choices
        self._batch, self._device = batch, model.device
        self._counts = [each * tokens for tokens in model.geometry.schedule.tokens]
        self.sums_TB = torch.zeros(len(self._counts), batch, device=self._device)
        """Sums of the logits of every scale and image, finite where these are."""
        self._largest: dict[str, Tensor] = {}

    @cached_property
    def tokens(self) -> list[Tensor]:
        """The chosen codes of every scale, (B, N) each."""
        return [torch.empty((self._batch, count), dtype=torch.long, device=self._device) for count in self._counts]

    def for_scale(self, name: Literal["noise", "logits"], scale: int) -> Tensor:
        """(B, N, V) in fp32; scales use the same memory in turn."""
        if name not in self._largest:
            largest = self._batch * max(self._counts) * self._codes
            self._largest[name] = torch.empty(largest, device=self._device)
        shape = (self._batch, self._counts[scale], self._codes)
        return self._largest[name][: shape[0] * shape[1] * shape[2]].view(shape)


@dataclass(frozen=True)
class _Scales(Generic[Label]):
    """Draws images from their start to their end, scale by scale."""

    drawing: Drawing[Label]
    cache: Attend
    sampler: Sampler
    buffers: _Buffers
    runner: StepRunner
    observe: Observer | None

    def run(self, scales: int, decode: bool, before_decode: Callable[[], None] | None = None) -> Drawn:
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
                self._check()  # what failed, such as a sampler, may not know why
            raise
        tokens = tuple(tokens_BN.clone() for tokens_BN in self.buffers.tokens)
        if before_decode is not None:
            before_decode()
        with span(DECODE):
            drawn = Drawn(tokens, self.drawing.image() if decode else None)
        self._check()  # waits for the device, so it comes last
        return drawn

    def _logits(self, scale: int) -> Tensor:
        """Guided logits; their sums are kept, which are finite where they are."""
        logits_BNV = self.drawing.logits(self.cache)
        torch.sum(logits_BNV, dim=(1, 2), out=self.buffers.sums_TB[scale])
        return logits_BNV

    def _check(self) -> None:
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
        tokens_BN, noise_BNV = self.buffers.tokens[scale], self.buffers.for_scale("noise", scale)
        seen_BNV = None if self.observe is None else self.buffers.for_scale("logits", scale)

        def step() -> None:
            logits_BNV = self._logits(scale)
            if seen_BNV is not None:
                seen_BNV.copy_(logits_BNV)
            with span(SAMPLING):
                tokens_BN.copy_(sampler.pick(logits_BNV, noise_BNV))
            self.drawing.accept(tokens_BN)

        with span(SAMPLING):
            sampler.noise(scale, noise_BNV)
        self.runner.run(StepKey(scale, "all", seen_BNV is not None, type(sampler), sampler.settings), step)
        if self.observe is not None and seen_BNV is not None:
            self.observe(scale, seen_BNV.clone())

    def _in_two_steps(self, scale: int) -> None:
        """The sampler chooses between the steps, in its own way."""
        tokens_BN, seen_BNV = self.buffers.tokens[scale], self.buffers.for_scale("logits", scale)

        def step() -> None:
            seen_BNV.copy_(self._logits(scale))

        self.runner.run(StepKey(scale, "logits", observed=True), step)
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
        self.runner.run(StepKey(scale, "accept"), lambda: self.drawing.accept(tokens_BN))


def run_scales(
    model: ImageModel[Label],
    labels: Sequence[Label],
    cache: Attend,
    sampler: Sampler,
    settings: Settings,
    observe: Observer | None = None,
    decode: bool = True,
) -> Drawn:
    """Draw one image per label through `cache`, which must be at its start and have the rows for them."""
    with torch.inference_mode():
        drawing, buffers = model.begin(labels, settings), _Buffers(model, len(labels))
        scales = _Scales(drawing, cache, sampler, buffers, EagerRunner(), observe)
        return scales.run(len(model.geometry.schedule), decode)


AT_ONCE = 16
"""Images drawn at once, at most, where nothing else is asked for."""


class GeneratorOptions(TypedDict, total=False):
    """The options of Generator that the functions which make one take too."""

    settings: Settings | None
    code: str | None
    attention: str
    graphs: bool


class Generator(Generic[Label]):
    """Draws batches of one size under one plan, with one cache for all of them.

    `settings` (default: the model's) say how codes are chosen, `code` is "int8" or "fp8" for a cache of 8-bit codes
    and None for the compute type, `attention` names the kernel, "auto" for the one that suits the device. With
    `graphs` every scale is recorded as a CUDA graph while the second batch is drawn, and replayed for all later ones;
    the embedding of labels, random numbers and the decoder stay outside (docs/generation.md). `runner` runs the steps
    in another way; generators that take turns on one record anew at every turn. Raises ModelError for a bad batch,
    PlanError for a plan that does not fit the model or the device, GraphError for graphs without a CUDA device.
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
    ) -> None:
        self.model, self.plan, self.batch = model, plan, whole(batch, "batch", ModelError, 1)
        self.settings = model.sampling if settings is None else settings
        plan.check_geometry(model.geometry)
        if plan.weights and are_other_weights(plan.weights, model.fingerprint):
            weights = f"{plan.weights}, these are {model.fingerprint}"
            warnings.warn(f"the plan is of other weights ({weights}); calibrate these and solve again", stacklevel=2)
        if runner is None:
            runner = CUDAGraphRunner(model.device) if graphs else EagerRunner()
        self.runner: StepRunner = runner
        rows, query_weight = self.batch * self.settings.rows_per_image, model.adapter.query_weight
        self.cache = open_cache(
            plan, rows, model.compute_dtype, model.device, model.key_angles, query_weight, code, attention
        )
        self._buffers = _Buffers(model, self.batch)
        self._drawing: Drawing[Label] | None = None

    def draw(
        self,
        labels: Sequence[Label],
        seed: int = 0,
        samples: Sequence[int] | None = None,
        *,
        sampler: Sampler | None = None,
        observe: Observer | None = None,
        decode: bool = True,
        before_decode: Callable[[], None] | None = None,
    ) -> Drawn:
        """Draw one image per label; `samples` number them for the random numbers (default 0, 1, ...).

        With graphs a scale is one graph, or two with the choice between them where `sampler` is no NoiseSampler.
        `observe` is called after every scale, `before_decode` after the last. Raises ModelError for labels that the
        model does not have or that are not as many as the batch, PolicyError when a dynamic policy fails, GraphError
        when a step cannot be recorded, NumericsError when the images were made of numbers that are not finite.
        """
        if len(labels) != self.batch:
            raise ModelError(f"{len(labels)} labels for a generator of batch {self.batch}")
        if sampler is None:
            sampler = CommonRandomSampler(seed, range(self.batch) if samples is None else samples, self.settings)
        with torch.inference_mode():
            self.cache.reset()
            scales = _Scales(self._begin(labels), self.cache, sampler, self._buffers, self.runner, observe)
            return scales.run(len(self.model.geometry.schedule), decode, before_decode)

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


def draw_batches(
    model: ImageModel[Label],
    labels: Iterable[Label | str] | Tensor,
    plan: CachePlan,
    *,
    seed: int = 0,
    first_sample: int = 0,
    batch: int | None = None,
    **options: Unpack[GeneratorOptions],
) -> Iterator[Tensor]:
    """The images of `generate`, (at most `batch`, 3, H, W) at a time; raises its errors when the first is asked for."""
    if batch is None:
        settings = options.get("settings") or model.sampling
        rows = plan.most_rows(str(StorageType.for_dtype(model.compute_dtype, options.get("code"))))
        batch = AT_ONCE if rows is None else min(AT_ONCE, max(1, rows // settings.rows_per_image))
    seed, first_sample, batch, _ = checked_run(model, seed, first_sample, batch, None, None)
    if isinstance(labels, str) or not (values := list(labels)):
        raise ModelError(f"labels is {shown(labels)}; give a list with one label per image")
    ids = [model.label(value) for value in values]
    generator = None
    for first in range(0, len(ids), batch):
        part = ids[first : first + batch]
        if generator is None or generator.batch != len(part):
            generator = Generator(model, plan, len(part), **options)
        drawn = generator.draw(part, seed, range(first_sample + first, first_sample + first + len(part)))
        assert drawn.images is not None
        yield drawn.images


def generate(
    model: ImageModel[Label],
    labels: Iterable[Label | str] | Tensor,
    plan: CachePlan,
    *,
    seed: int = 0,
    first_sample: int = 0,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Unpack[GeneratorOptions],
) -> Tensor:
    """Images (B, 3, H, W), RGB in [0, 1], one per label, drawn `batch` at a time: by default AT_ONCE, or as many as the
    plan's budget has room for where that is one in bytes.

    Labels are what `model.label` reads: numbers or names of classes, prompts or texts. `first_sample` numbers the first
    image for the random numbers; images do not depend on `batch` except for rounding. `progress` is called with how
    many are done. `options` are `settings`, `code`, `attention` and `graphs` of Generator; with graphs, batches from
    the third on replay them. Raises ModelError for labels that the model does not have, and what Generator raises.
    """
    images: list[Tensor] = []
    for drawn in draw_batches(model, labels, plan, seed=seed, first_sample=first_sample, batch=batch, **options):
        images.append(drawn)
        if progress is not None:
            progress(sum(map(len, images)))
    return torch.cat(images)
