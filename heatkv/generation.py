"""The next-scale loop: draw images under a plan.

Shapes: B images, N choices of a scale (a token, or one bit of a token), V codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.profiler import record_function

from heatkv.checks import of_kind, shown
from heatkv.compensation import Compensation, compensation_of
from heatkv.errors import ModelError, PlanError
from heatkv.models.base import ImageModel, checked_run
from heatkv.models.var import Attend
from heatkv.plan import CachePlan
from heatkv.sampling import CommonRandomSampler, Sampler, Settings
from heatkv.selecting_cache import SelectingCache, open_cache

Label = TypeVar("Label")
"""What one image is drawn from: a class, or a prompt."""

Observer = Callable[[int, Tensor], None]
"""Called with every scale and its guided logits (B, N, V), before anything is chosen."""


@dataclass(frozen=True)
class Drawn:
    """Codes of every scale, (B, N) each, and the pictures, (B, 3, H, W) in [0, 1], when they were asked for."""

    tokens: tuple[Tensor, ...]
    images: Tensor | None


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
        drawing = model.begin(labels, settings)
        tokens = []
        for scale in range(len(model.geometry.schedule)):
            with record_function(f"scale {scale}"):
                logits = drawing.logits(cache)
                if observe is not None:
                    observe(scale, logits)
                tokens.append(sampler.choose(scale, logits))
                drawing.accept(tokens[-1])
        with record_function("decode"):
            return Drawn(tuple(tokens), drawing.image() if decode else None)


class Generator(Generic[Label]):
    """Draws batches of one size under one plan, with one cache for all of them.

    `storage` is "int8" or "fp8" where the cache holds 8-bit codes, None where it holds the compute type; `attention`
    names the kernel, "auto" for the one that suits the device. Raises ModelError or PlanError for a model or plan that
    is none, or that do not fit each other.
    """

    def __init__(
        self,
        model: ImageModel[Label],
        plan: CachePlan,
        batch: int,
        settings: Settings | None = None,
        compensation: Compensation | None = None,
        *,
        storage: str | None = None,
        attention: str = "auto",
    ) -> None:
        _, _, self.batch, self.settings = checked_run(model, 0, 0, batch, settings, None)
        of_kind(plan, CachePlan, "plan", PlanError, "make one with model.plan, or load one with load_plan")
        plan.check_geometry(model.geometry)
        self.model, self.plan = model, plan
        rows = self.batch * self.settings.rows_per_image
        correct = None if compensation is None else compensation.apply
        self.cache = open_cache(
            plan, rows, model.compute_dtype, model.device, model.key_angles, correct, model.adapter.query_weight,
            storage, attention,
        )  # fmt: skip

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

        Raises ModelError for labels that the model does not have, or not as many as the batch.
        """
        if len(labels) != self.batch:
            raise ModelError(f"{len(labels)} labels for a generator of batch {self.batch}")
        if sampler is None:
            sampler = CommonRandomSampler(seed, range(self.batch) if samples is None else samples, self.settings)
        self.cache.reset()
        with ExitStack() as watched:
            if isinstance(self.cache, SelectingCache) and self.cache.wants_input:
                watched.enter_context(self.model.adapter.telling_inputs(self.cache.see_input))
            return run_scales(self.model, labels, self.cache, sampler, self.settings, observe, decode)


def generate(
    model: ImageModel[Label],
    labels: Iterable[Label | str] | Tensor,
    plan: CachePlan,
    *,
    seed: int = 0,
    first_sample: int = 0,
    batch: int = 16,
    settings: Settings | None = None,
    compensation: Compensation | None = None,
    progress: Callable[[int], None] | None = None,
    storage: str | None = None,
    attention: str = "auto",
) -> Tensor:
    """Images (B, 3, H, W), RGB in [0, 1], one per label, in batches; `progress` is told how many are done.

    Labels are what `model.label` reads: numbers (also of a numpy array or a tensor) or names of classes, prompts or
    texts. `first_sample` numbers the first one for the random numbers. The pictures do not depend on `batch` but for
    rounding. `compensation` are the plan's corrections, from `heatkv.compensation.fit_compensation`; where the plan
    asks for some and none are given, they are fitted first. `storage` and `attention` are those of Generator. Raises
    ModelError for labels that the model does not have, PlanError for a plan of another model.
    """
    seed, first_sample, batch, settings = checked_run(model, seed, first_sample, batch, settings, progress)
    if compensation is not None:
        of_kind(compensation, Compensation, "compensation", ModelError, "fit one with fit_compensation")
    try:
        chosen = None if isinstance(labels, str) else list(labels)
    except TypeError:
        chosen = None
    if chosen is None:
        raise ModelError(f"labels is {shown(labels)}; give a list, one label per image")
    if not chosen:
        raise ModelError("no label was given; give one per image")
    drawn_from = [model.label(label) for label in chosen]
    if compensation is None:
        compensation = compensation_of(model, plan, seed=seed, settings=settings)
    images, generator = [], None
    for first in range(0, len(drawn_from), batch):
        part = drawn_from[first : first + batch]
        if generator is None or generator.batch != len(part):
            generator = Generator(model, plan, len(part), settings, compensation, storage=storage, attention=attention)
        drawn = generator.draw(part, seed, range(first_sample + first, first_sample + first + len(part)))
        assert drawn.images is not None
        images.append(drawn.images)
        if progress is not None:
            progress(first + len(part))
    return torch.cat(images)
