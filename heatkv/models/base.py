"""What drawing, planning and measuring need of an image model, whatever it draws from.

Shapes: B images, R rows (B, or 2B with guidance, conditional first), N choices of a scale (a token, or one bit of a
token), C width, V codes, Z code channels, h and w the last scale's height and width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.schema import seed_of, shown, whole
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import StorageType
from heatkv.engine.arena_cache import Attend
from heatkv.engine.turns import Rows
from heatkv.errors import ModelError
from heatkv.models.adapter import ModelAdapter
from heatkv.models.fingerprint import known_fingerprint
from heatkv.models.sampling import Settings
from heatkv.models.var import Transformer
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.windows import Full

Label = TypeVar("Label")


class Drawing(ABC, Generic[Label]):
    """Images on their way: call `logits`, then `accept` what was chosen, once per scale; then `image`.

    What it holds from one scale to the next, and from the labels, stays at the same addresses: `f_hat`, the sum of code
    features so far, (B, Z, h, w), to which scales are added in place.
    """

    def __init__(self, model: ImageModel[Label], settings: Settings, images: int) -> None:
        self._settings, self._scales, self.scale = settings, len(model.geometry.schedule), 0
        self.f_hat = torch.zeros((images, *model.latent_shape), device=model.device)
        self.rows = Rows(settings.rows_per_image, 0, images)

    def part(self, scale: int, first: int, count: int) -> Self:
        """Some of these images at a scale: what it does is done to these."""
        part = copy.copy(self)
        part.scale, part.f_hat = scale, self.f_hat[first : first + count]
        part.rows = Rows(self.rows.parts, first, count)
        return part

    @abstractmethod
    def restart(self, labels: Sequence[Label]) -> bool:
        """Start other images, as many, in the same tensors; false, and nothing changed, when they do not fit in.

        Raises ModelError for what cannot be drawn.
        """

    @abstractmethod
    def input(self) -> Tensor:
        """What the transformer is shown at the running scale, (R, N, C)."""

    @abstractmethod
    def raw_logits(self, cache: Attend) -> Tensor:
        """Logits of the running scale, (R, N, V) in fp32."""

    def logits(self, cache: Attend) -> Tensor:
        """Guided logits of the running scale, (B, N, V) in fp32."""
        return self._settings.guide(self.raw_logits(cache), self.scale, self._scales)

    @abstractmethod
    def accept(self, choices_BN: Tensor) -> None:
        """Take the choices of the running scale and prepare the input of the next one."""

    @abstractmethod
    def show(self, choices: Sequence[Tensor], cache: Attend) -> None:
        """Run the blocks once over all scales, as training does, of images that have these choices, (B, N) per scale.

        Every layer calls `attend` once, with the tokens of all scales one after another.
        """

    def _add(self, features_BZhw: Tensor) -> None:
        """Add the running scale's code features, and go on to the next scale."""
        if self.scale:
            self.f_hat.add_(features_BZhw)
        else:
            self.f_hat.copy_(features_BZhw)
        self.scale += 1

    def _all_inputs(self, choices: Sequence[Tensor]) -> Tensor:
        """The inputs of all scales, one after another, of images that have these choices."""
        inputs = []
        for choices_BN in choices:
            inputs.append(self.input())
            self.accept(choices_BN)
        return torch.cat(inputs, dim=1)

    def _for_all_rows(self, input_BNC: Tensor) -> Tensor:
        """The same input for the unconditional rows, where there are any."""
        return torch.cat([input_BNC, input_BNC]) if self._settings.guided else input_BNC


class ImageModel(ABC, Generic[Label]):
    """A transformer with the decoder of its codes, drawing one image per label.

    `sampling` are the settings it is meant for.
    """

    name: str
    transformer: Transformer
    sampling: Settings

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """What makes pictures of codes."""

    @property
    def fingerprint(self) -> str:
        """Names the weights of transformer and decoder, whatever type they run in."""
        return "-".join(known_fingerprint(network) for network in (self.transformer, self.decoder))

    @torch.inference_mode()
    def decode(self, f_hat_BZhw: Tensor) -> Tensor:
        """Sums of code features to pictures, (B, 3, H, W), RGB in [0, 1]."""
        images_B3HW: Tensor = self.decoder.decode(f_hat_BZhw)
        return images_B3HW.add_(1).div_(2)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sum of code features."""

    @property
    def decoding_bytes(self) -> int:
        """About what decoding one picture takes at most."""
        _, height, width = self.latent_shape
        found: int = self.decoder.config.decoding_bytes(height, width)
        return found

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.transformer.compute_dtype

    @property
    def adapter(self) -> ModelAdapter:
        """The view of the transformer's blocks that calibration and policies work on."""
        return self.transformer.adapter()

    @property
    def key_angles(self) -> tuple[Tensor, ...] | None:
        """The angles by which keys are rotated, (N, D/2) per scale; None when they are not."""
        return None

    @property
    @abstractmethod
    def geometry(self) -> CacheGeometry: ...

    @property
    @abstractmethod
    def choices(self) -> tuple[int, int]:
        """Choices per token, and values of each: a scale's logits are (B, tokens * choices, values)."""

    @abstractmethod
    def label(self, value: Any) -> Label:
        """What one image is drawn from, as a caller may write it. Raises ModelError for what it cannot be."""

    def read_labels(self, values: Sequence[Any]) -> list[Label]:
        """`label` of each; equal texts are encoded once, all together. Raises ModelError."""
        return [self.label(value) for value in values]

    @abstractmethod
    def labels(self, count: int, first: int = 0) -> list[Label]:
        """What the samples first, first + 1, ... of a measurement are drawn from. Raises ModelError."""

    @abstractmethod
    def label_name(self, label: Label) -> str:
        """A short name of a label, for sample lists and files."""

    @abstractmethod
    def begin(self, labels: Sequence[Label], settings: Settings, *, reusable: bool = False) -> Drawing[Label]:
        """Start drawing one image per label; `reusable` leaves room for labels that take more, for `restart`.

        Raises ModelError for what it cannot draw.
        """

    def plan(
        self,
        policy: str = "full",
        budget: str | float | Budget = "100%",
        *,
        statistics: Statistics | None = None,
        rows: int | None = None,
        seed: int = 0,
        code: str | None = None,
        **options: Any,
    ) -> CachePlan:
        """A plan of the named policy for this model; `options` are the policy's own, such as sink_scales.

        `rows` (default: those of one image) and `code` ("int8" or "fp8" for a cache of 8-bit codes) only matter for
        a budget in bytes, and for policies that carry numbers of their own. Raises PolicyError for an unknown
        policy or option, BudgetError for a budget that cannot be read or kept, and StatisticsError for statistics of
        other weights.
        """
        if statistics is not None:
            statistics.check_fingerprint(self.fingerprint)
        problem = PlanningProblem(
            self.geometry,
            Budget.parse(budget),
            statistics,
            seed=seed,
            rows=self.sampling.rows_per_image if rows is None else rows,
            storage=str(StorageType.for_dtype(self.compute_dtype, code)),
            model=self.name,
        )
        return make_policy(policy, **options).plan(problem)

    def full_plan(self) -> Plan:
        """The plan that keeps everything."""
        return Full().plan(PlanningProblem(self.geometry, Budget.parse("100%"), model=self.name))


def checked_run(
    model: ImageModel[Any],
    seed: int,
    first_sample: int,
    batch: int,
    settings: Settings | None,
    progress: Callable[[int], object] | None,
) -> tuple[int, int, int, Settings]:
    """`seed`, `first_sample`, `batch` and `settings` (default: the model's) of whatever draws images.

    Raises ModelError for what is of the wrong kind.
    """
    settings = model.sampling if settings is None else settings
    if progress is not None and not callable(progress):
        raise ModelError(f"progress is {shown(progress)}; give a function of how many are done")
    sizes = whole(first_sample, "first_sample", ModelError), whole(batch, "batch", ModelError, 1)
    return seed_of(seed, ModelError), *sizes, settings
