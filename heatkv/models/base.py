"""What drawing, planning and measuring need of an image model, whatever it draws from.

Shapes: B images, N choices of a scale (a token, or one bit of a token), V codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.schema import seed_of, shown, whole
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import StorageType
from heatkv.errors import ModelError
from heatkv.models.adapter import ModelAdapter
from heatkv.models.sampling import Settings
from heatkv.models.var import Attend
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.windows import Full

Label = TypeVar("Label")
LabelT = TypeVar("LabelT", contravariant=True)


class Drawing(Protocol[LabelT]):
    """Images on their way: call `logits`, then `accept` what was chosen, once per scale; then `image`.

    What it holds from one scale to the next, and from the labels, stays at the same addresses.
    """

    def logits(self, cache: Attend) -> Tensor:
        """Guided logits of the running scale, (B, N, V) in fp32."""

    def accept(self, choices_BN: Tensor) -> None:
        """Take the choices of the running scale and prepare the input of the next one."""

    def show(self, choices: Sequence[Tensor], cache: Attend) -> None:
        """Run the blocks once over all scales, as training does, of images that have these choices, (B, N) per scale.

        Every layer calls `attend` once, with the tokens of all scales one after another.
        """

    def image(self) -> Tensor:
        """(B, 3, H, W), RGB in [0, 1]."""

    def restart(self, labels: Sequence[LabelT]) -> bool:
        """Start other images, as many, in the same tensors; false, and nothing changed, when they do not fit in.

        Raises ModelError for what cannot be drawn.
        """


class ImageModel(ABC, Generic[Label]):
    """A transformer with the decoder of its codes, drawing one image per label.

    `sampling` are the settings it is meant for; `fingerprint` names the weights, whatever type they run in.
    """

    name: str
    fingerprint: str
    sampling: Settings

    @property
    @abstractmethod
    def geometry(self) -> CacheGeometry: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def compute_dtype(self) -> torch.dtype: ...

    @property
    @abstractmethod
    def choices(self) -> tuple[int, int]:
        """Choices per token, and values of each: a scale's logits are (B, tokens * choices, values)."""

    @property
    @abstractmethod
    def adapter(self) -> ModelAdapter:
        """The transformer's blocks, for what queries, keys and values do not tell."""

    @property
    def key_angles(self) -> tuple[Tensor, ...] | None:
        """The angles by which keys are rotated, (N, D/2) for every scale; None for a model that rotates none."""
        return None

    @abstractmethod
    def label(self, given: Any) -> Label:
        """What one image is drawn from, as a caller may write it. Raises ModelError for what it cannot be."""

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
        storage: str | None = None,
        **options: Any,
    ) -> CachePlan:
        """A plan of the named policy for this model; `options` are the policy's own, such as sink_scales.

        `rows` (default: those of one image) and `storage` ("int8" or "fp8" for a cache of 8-bit codes) only matter for
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
            storage=str(StorageType.for_dtype(self.compute_dtype, storage)),
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
    progress: Callable[[int], None] | None,
) -> tuple[int, int, int, Settings]:
    """`seed`, `first_sample`, `batch` and `settings` (default: the model's) of whatever draws images.

    Raises ModelError for what is of the wrong kind.
    """
    if progress is not None and not callable(progress):
        raise ModelError(f"progress is {shown(progress)}; give a function that is told how many are done")
    return (
        seed_of(seed, ModelError),
        whole(first_sample, "first_sample", ModelError),
        whole(batch, "batch", ModelError, 1),
        settings if settings is not None else model.sampling,
    )
