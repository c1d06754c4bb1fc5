"""What is measured: policies at budgets, planned for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from heatkv.core.budget import Budget
from heatkv.core.plan import CachePlan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schema import seed_after
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import StorageType
from heatkv.errors import HeatKVError
from heatkv.generation.loop import Generator
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.policies.base import EvictionPolicy, PlanningProblem, make_policy


@dataclass(frozen=True)
class Subject:
    """One line of a comparison: a policy at a budget, with several plans when the policy draws at random.

    `storage` is the whole storage type of its cache, see StorageType; `attention` names the kernel.
    """

    policy: str
    budget: str
    plans: tuple[CachePlan, ...]
    storage: str
    attention: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.policy} {self.budget}"

    def generator(
        self, model: ImageModel[Any], settings: Settings, plan: int, batch: int, graphs: bool = False
    ) -> Generator[Any]:
        """What draws `batch` images under one of the plans."""
        code = StorageType.parse(self.storage).code
        return Generator(model, self.plans[plan], batch, settings, code=code, attention=self.attention, graphs=graphs)


def plan_subjects(
    model: ImageModel[Any],
    policies: Sequence[EvictionPolicy],
    budgets: Sequence[Budget],
    *,
    statistics: Statistics | None,
    rankings: HeadRankings | None = None,
    rows: int,
    storage: str,
    seed: int = 0,
    draws: int = 1,
    attention: str = "auto",
) -> list[Subject]:
    """A subject for every budget and policy; `full`, whatever the budgets, comes once and first.

    A policy that draws at random has `draws` plans.
    """

    def subject(policy: EvictionPolicy, budget: Budget) -> Subject:
        problems = (
            PlanningProblem(
                model.geometry, budget, statistics, rankings, seed_after(seed, draw), rows, storage, model.name
            )
            for draw in range(draws if policy.random else 1)
        )
        return Subject(policy.name, str(budget), tuple(map(policy.plan, problems)), storage, attention)

    chosen = [policy for policy in policies if policy.name != "full"]
    full = subject(make_policy("full"), Budget.parse("100%"))
    return [full, *(subject(policy, budget) for budget in budgets for policy in chosen)]


def images_of_rows(rows: int, settings: Settings) -> int:
    """How many images have so many cache rows. Raises HeatKVError when guidance needs an even number."""
    images, rest = divmod(rows, settings.rows_per_image)
    if rest or images < 1:
        raise HeatKVError(f"rows={rows} is no positive multiple of {settings.rows_per_image}, the rows of one image")
    return images
