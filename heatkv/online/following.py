"""Drawing under a plan that follows the images it draws.

Every n-th image is measured once it is drawn, by showing its codes to the model again layer by layer. Plans change
between images only, and the old cache is gone before the new one is made. Measuring takes the cache's place: the cache
is given back first, and what is held meanwhile is no more than the budget allows it; or it takes other memory, as much
as the caller grants.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from heatkv.core.budget import Budget, parse_bytes
from heatkv.core.plan import Plan
from heatkv.core.schema import shown, whole
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import StorageType
from heatkv.errors import BudgetError, ModelError, StatisticsError
from heatkv.generation.loop import Drawn, Generator
from heatkv.models.base import ImageModel, checked_run
from heatkv.models.sampling import Settings
from heatkv.online.adoption import Decision, OnlinePlanner
from heatkv.online.layerwise import held_bytes, measure_drawn
from heatkv.policies.base import EvictionPolicy, PlanningProblem, make_policy

Label = TypeVar("Label")


@dataclass(frozen=True)
class Event(Decision):
    """The decision after `image` images, when `measured` of a batch were measured, holding `measuring_bytes` at most;
    the seconds were spent on measuring and on planning."""

    image: int
    measured: int
    effective_count: float
    measuring_bytes: int
    measuring_seconds: float
    planning_seconds: float

    def to_json(self) -> dict[str, Any]:
        """All of it by name."""
        return asdict(self) | {"solved": self.solved}


class FollowingGenerator(Generic[Label]):
    """Draws image after image, `batch` at a time, under a plan of `policy` within `budget` that follows them.

    It begins with `statistics`, as `calibrate` measures them, with level costs where the policy needs those. Every
    `every`-th image is measured, and half forgotten when `half_life` more have been; a new plan is adopted when it
    gains more than `threshold` of what the old one loses to the full cache. `memory`, as "64MiB", is what measuring
    may take beside the cache; by default it may take as much as the budget allows the cache, which is given back
    meanwhile. As many images are measured at once as fit in. `code` and `attention` are those of Generator.

    Raises BudgetError when not even one image fits in, PolicyError for a policy that cannot follow, StatisticsError for
    statistics of other weights or guidance, and what Generator raises.
    """

    def __init__(
        self,
        model: ImageModel[Label],
        policy: str | EvictionPolicy,
        budget: str | float | Budget,
        statistics: Statistics,
        *,
        every: int = 8,
        half_life: float = 32.0,
        threshold: float = 0.05,
        batch: int = 1,
        seed: int = 0,
        settings: Settings | None = None,
        memory: str | None = None,
        code: str | None = None,
        attention: str = "auto",
    ) -> None:
        self.seed, _, self.batch, self.settings = checked_run(model, seed, 0, batch, settings, None)
        self.every = whole(every, "every", ModelError, 1)
        statistics.check_fingerprint(model.fingerprint)
        measured_at, drawn_at = statistics.provenance.cfg, self.settings.to_json()["cfg"]
        if measured_at is not None and measured_at != drawn_at:
            raise StatisticsError(
                f"the statistics were measured at cfg {measured_at:g}, this run has {drawn_at}; calibrate at that"
            )
        self.model = model
        self._code, self._attention = code, attention
        storage = str(StorageType.for_dtype(model.compute_dtype, code))
        rows = self.batch * self.settings.rows_per_image
        problem = PlanningProblem(
            model.geometry, Budget.parse(budget), statistics, seed=self.seed, rows=rows, storage=storage,
            model=model.name,
        )  # fmt: skip
        chosen = make_policy(policy) if isinstance(policy, str) else policy
        self.planner = OnlinePlanner(chosen, problem, half_life=half_life, threshold=threshold)
        self._beside = memory is not None
        self.measured_at_once = self._measured_at_once(memory, self.plan.budget_bytes(rows, storage))
        self.drawn = 0
        self.events: list[Event] = []
        self.drawing_seconds = self.switching_seconds = 0.0
        self._generator: Generator[Label] | None = None

    def _measured_at_once(self, memory: str | None, budget_bytes: int) -> int:
        """Images whose measuring fits in. Raises BudgetError when not even one does."""
        allowed = budget_bytes if memory is None else parse_bytes(memory)
        if allowed is None:
            raise BudgetError(f"memory for measuring is {shown(memory)}, no number of bytes; write 64MiB or 2GB")
        needed = held_bytes(self.model, self.settings)
        if needed > allowed:
            limit, way_out = f"memory allows {allowed}", "allow"
            if memory is None:
                limit = f"the budget allows {allowed} at batch {self.batch}"
                way_out = f"draw {math.ceil(needed / allowed * self.batch)} at a time, or allow beside the cache"
            raise BudgetError(
                f"measuring one image holds {needed} bytes, {limit}; {way_out} memory={-(-needed >> 20)}MiB"
            )
        return allowed // needed

    @property
    def plan(self) -> Plan:
        """What the next batch is drawn under."""
        return self.planner.plan

    @property
    def statistics(self) -> Statistics:
        """What the plan follows now; they can be saved and planned from."""
        return self.planner.statistics

    def draw(self, labels: Iterable[Label | str]) -> Iterator[Tensor]:
        """One image (3, H, W), RGB in [0, 1], per label, of which only a batch is taken at a time, so that they may
        come as they are asked for.

        Random numbers are those of `generate`: image i since the beginning is sample i of the seed. Measuring and
        planning come when the next image is asked for. Raises ModelError for labels that the model does not have.
        """
        coming = iter(labels)
        while part := self.model.read_labels(list(islice(coming, self.batch))):
            first = self.drawn
            drawn = self._draw(part)
            assert drawn.images is not None
            yield from drawn.images
            tokens = drawn.tokens
            del drawn  # the images
            due = [at for at in range(len(part)) if (first + at + 1) % self.every == 0]
            if due:
                self._follow(part, tokens, due, first)

    def summary(self) -> dict[str, Any]:
        """How many images were drawn and measured, plans solved and adopted, seconds, and what following took as a
        share of drawing."""
        events = self.events
        measuring, planning = (sum(getattr(e, f"{part}_seconds") for e in events) for part in ("measuring", "planning"))
        extra = measuring + planning + self.switching_seconds
        return {
            "images": self.drawn,
            "measured": sum(event.measured for event in events),
            "solved": sum(event.solved for event in events),
            "adopted": sum(event.adopted for event in events),
            "drawing_seconds": self.drawing_seconds,
            "measuring_seconds": measuring,
            "planning_seconds": planning,
            "switching_seconds": self.switching_seconds,
            "share_of_drawing": extra / self.drawing_seconds if self.drawing_seconds else 0.0,
            "measuring_bytes": max((event.measuring_bytes for event in events), default=0),
        }

    def _draw(self, labels: Sequence[Label]) -> Drawn:
        began = self._now()
        if self._generator is None or self._generator.batch != len(labels):
            self._generator = None  # the old cache goes before the new one comes
            self._generator = Generator(
                self.model, self.plan, len(labels), self.settings, code=self._code, attention=self._attention
            )
        opened = self._now()
        drawn = self._generator.draw(labels, self.seed, range(self.drawn, self.drawn + len(labels)))
        self.drawing_seconds += self._now() - opened
        if self.drawn:  # the first cache is there without following, too
            self.switching_seconds += opened - began
        self.drawn += len(labels)
        return drawn

    def _follow(self, labels: Sequence[Label], tokens: Sequence[Tensor], due: Sequence[int], first: int) -> None:
        """Measure these images of a batch, as many at once as fit in, and let the plan follow."""
        if not self._beside:
            self._generator = None
        began, results = self._now(), []
        for start in range(0, len(due), self.measured_at_once):
            images = due[start : start + self.measured_at_once]
            names = [f"{self.seed}:{first + at}:{self.model.label_name(labels[at])}:served" for at in images]
            part, codes = [labels[at] for at in images], [tokens_BN[images] for tokens_BN in tokens]
            results.append(measure_drawn(self.model, part, codes, names, self.settings, self.planner.levels))
        measured, held = zip(*results, strict=True)
        merged = reduce(Statistics.merge, measured)
        before, done = self.plan, self._now()
        decision = self.planner.follow(merged)
        if self.plan is not before:
            self._generator = None
        self.events.append(
            Event(
                **asdict(decision), image=self.drawn, measured=len(due),
                effective_count=self.planner.fading.effective_count, measuring_bytes=max(held),
                measuring_seconds=done - began, planning_seconds=self._now() - done,
            )
        )  # fmt: skip

    def _now(self) -> float:
        """Seconds on the clock when the device is done with all that it was asked for."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
