"""Drawing under a plan that follows: between images only, within the budget at every moment, the same every time."""

from __future__ import annotations

import dataclasses
import re
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_infinity
from torch import Tensor

from heatkv.calibration.level_costs import level_choices, measure_biases, measure_errors
from heatkv.calibration.run import calibrate
from heatkv.core.plan import Plan
from heatkv.core.statistics import Statistics
from heatkv.engine.store import Store
from heatkv.errors import BudgetError, ModelError, PolicyError, StatisticsError
from heatkv.generation.batches import generate
from heatkv.generation.loop import Drawn, Generator
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.online import following
from heatkv.online.following import FollowingGenerator
from heatkv.online.layerwise import held_bytes
from heatkv.policies.base import make_policy

LP = make_policy("heatkv-lp", value="error", sink_scales=1)
LEVELS = make_policy("heatkv-mr", sink_scales=1)


@pytest.fixture(scope="module")
def model() -> TextConditionalModel:
    return tiny_infinity()


@pytest.fixture(scope="module")
def measured(model: TextConditionalModel) -> Statistics:
    choices = level_choices(model.geometry.schedule, 1)
    bias = measure_biases(model, choices, range(2), seed=7)
    return calibrate(model, 3, seed=7).with_levels(measure_errors(model, choices, bias, range(2), seed=7))


@pytest.fixture(scope="module")
def misleading(measured: Statistics) -> Statistics:
    """As if every head did what the mirrored one does: the first plan is a bad one."""
    mirrored = {name: array[::-1, ::-1] for name, array in measured.sums().items() if array.ndim == 4}
    return dataclasses.replace(measured, **mirrored)


def follow(model: TextConditionalModel, statistics: Statistics, **options: Any) -> FollowingGenerator[Prompt]:
    usual: dict[str, Any] = {"every": 3, "half_life": 2.0, "threshold": 0.01, "batch": 4, "seed": 11}
    return FollowingGenerator(model, options.pop("policy", LP), "60%", statistics, **(usual | options))


@dataclasses.dataclass
class Batch:
    """What was drawn under which plan."""

    plan: Plan
    samples: list[int]
    labels: list[Prompt]
    images: Tensor


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Every batch that is drawn, with its plan, which does not change meanwhile."""
    seen: list[Batch] = []
    draw = Generator.draw

    def watched(self: Generator[Any], labels: Any, seed: int, samples: Any, **more: Any) -> Drawn:
        cache, plan = self.cache, self.plan
        drawn = draw(self, labels, seed, samples, **more)
        assert (self.cache, self.plan) == (cache, plan)
        seen.append(Batch(plan, list(samples), list(labels), drawn.images))
        return drawn

    monkeypatch.setattr(Generator, "draw", watched)
    return seen


@pytest.mark.parametrize("policy", [make_policy("heatkv", sink_scales=1), LEVELS])
def test_pictures_while_nothing_is_adopted(model: TextConditionalModel, measured: Statistics, policy: Any) -> None:
    """They are those of the static plan; labels are taken, and images measured, when an image is asked for."""
    generator = follow(model, measured, policy=policy, threshold=10.0, every=2)
    labels, plan, taken = model.labels(10), generator.plan, []
    images = generator.draw(taken.append(label) or label for label in labels)  # type: ignore[func-returns-value]
    first = [next(images) for _ in range(4)]
    assert (len(taken), generator.drawn, len(generator.events)) == (4, 4, 0)
    assert torch.equal(torch.stack([*first, *images]), generate(model, labels, plan, seed=11, batch=4))
    assert [(event.measured, event.image) for event in generator.events] == [(2, 4), (2, 8), (1, 10)]
    assert generator.plan is plan
    assert generator.summary()["measured"] == 5


def test_plans_change_between_images_only(
    model: TextConditionalModel, misleading: Statistics, batches: list[Batch]
) -> None:
    """Every batch is what the plan in force draws by itself, and the plan changes just where an event says so."""
    generator = follow(model, misleading)
    plans, pictures = [generator.plan], []
    for number, picture in enumerate(generator.draw(model.labels(12))):
        if number % 4 == 0 and number:
            plans.append(generator.plan)
        pictures.append(picture)
    drawn = list(batches)
    adopted = [event.image for event in generator.events if event.adopted]
    assert adopted
    assert [batch.samples for batch in drawn] == [list(range(first, first + 4)) for first in range(0, 12, 4)]
    for index, batch in enumerate(drawn):
        assert batch.plan is plans[index]
        assert (index > 0 and batch.plan is not drawn[index - 1].plan) == (4 * index in adopted)
        alone = generate(model, batch.labels, batch.plan, seed=11, first_sample=4 * index, batch=4)
        assert torch.equal(batch.images, alone)
    assert torch.equal(torch.stack(pictures), torch.cat([batch.images for batch in drawn]))


class Arenas:
    """The arenas that are alive, and the most bytes they had together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = self.made = 0
        init = Store.__init__

        def watched(store: Store, *arguments: Any, **named: Any) -> None:
            init(store, *arguments, **named)
            self.alive.append(weakref.ref(store.arena_2RPD))
            self.made += store.arena_2RPD.numel() > 0
            self.most = max(self.most, self.bytes)

        monkeypatch.setattr(Store, "__init__", watched)

    @property
    def bytes(self) -> int:
        tensors = [reference() for reference in self.alive]
        return sum(x.untyped_storage().nbytes() for x in tensors if x is not None)


@pytest.mark.parametrize("memory", [None, "8MiB"])
def test_bytes_within_the_budget(
    model: TextConditionalModel, misleading: Statistics, memory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arenas = Arenas(monkeypatch)
    batch = 40  # so that an image can be measured in the room of the cache
    generator = follow(model, misleading, batch=batch, memory=memory, every=20)
    budget = generator.plan.budget_bytes(batch * 2, "float32")
    measure, beside = following.measure_drawn, []

    def watched(*arguments: Any) -> Any:
        found = measure(*arguments)
        beside.append((arenas.bytes, found[1], len(arguments[1])))
        return found

    monkeypatch.setattr(following, "measure_drawn", watched)
    for _ in generator.draw(model.labels(2 * batch + 5)):  # the last ones need a cache of another size
        assert 0 < arenas.bytes <= budget
    assert any(event.adopted for event in generator.events)
    assert arenas.made >= 3
    assert arenas.most <= budget  # the old cache was gone before the new one came
    for cached, held, images in beside:
        assert held <= images * held_bytes(model, model.sampling)
        if memory is None:
            assert cached == 0
            assert held <= budget
        else:
            assert 0 < cached <= budget
            assert held <= 8 << 20
    assert sum(images for _, _, images in beside) == 4
    assert max(event.measuring_bytes for event in generator.events) == max(held for _, held, _ in beside)


def test_measured_images_whatever_the_batches(model: TextConditionalModel, measured: Statistics) -> None:
    names = []
    for batch, at_once in ((1, 1), (4, 1), (4, 9)):
        memory = f"{at_once * held_bytes(model, model.sampling)}B"
        generator = follow(model, measured, batch=batch, every=3, memory=memory, threshold=10.0)
        assert generator.measured_at_once == at_once
        for part in (model.labels(9)[:5], model.labels(9)[5:]):  # draws go on where the last one ended
            assert len(list(generator.draw(part))) == len(part)
        served = [name for name in generator.statistics.samples if name.endswith(":served")]
        names.append([name.split(":")[:2] for name in served])
    assert names == [[["11", "2"], ["11", "5"], ["11", "8"]]] * 3


def test_same_run_twice(model: TextConditionalModel, misleading: Statistics) -> None:
    """Level costs are followed under the same biases."""
    runs = []
    for _ in range(2):
        generator = follow(model, misleading, policy=LEVELS, every=2)
        pictures = torch.stack(list(generator.draw(model.labels(8))))
        events = [event.to_json() for event in generator.events]
        numbers = [{name: event[name] for name in event if not name.endswith("seconds")} for event in events]
        runs.append((pictures, numbers, generator.statistics))
    (pictures, events, statistics), (again, events_again, statistics_again) = runs
    assert torch.equal(pictures, again)
    assert events == events_again
    assert statistics == statistics_again
    assert len(events) == 2
    levels, initial = statistics.levels, misleading.levels
    assert np.array_equal(levels.log_bias, initial.log_bias)
    assert len(levels.samples) == 3 + 4
    assert not np.allclose(levels.joint[5], initial.joint[5])


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"batch": 1}, BudgetError, "at batch 1; draw 4"),
        ({"memory": "1000B"}, BudgetError, "memory allows 1000"),
        ({"memory": "10%"}, BudgetError, "'10%'"),
        ({"every": 0}, ModelError, "every is 0"),
        ({"policy": "snapkv"}, PolicyError, "snapkv"),
    ],
)
def test_refused_options(
    model: TextConditionalModel, measured: Statistics, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        follow(model, measured, **{"memory": None if "batch" in options else "64MiB", **options})


def test_ways_out_of_too_small_a_budget(model: TextConditionalModel, measured: Statistics) -> None:
    with pytest.raises(BudgetError) as refused:
        follow(model, measured, batch=1)
    batch, memory = re.search(r"draw (\d+) .*memory=(\S+)", str(refused.value)).groups()
    assert follow(model, measured, batch=int(batch)).measured_at_once == 1
    with pytest.raises(BudgetError):
        follow(model, measured, batch=int(batch) - 1)
    assert follow(model, measured, batch=1, memory=memory).measured_at_once >= 1


def test_statistics_of_something_else(model: TextConditionalModel, measured: Statistics) -> None:
    for changes, named in (({"fingerprint": "0" * 16}, "0" * 16), ({"cfg": 1.0}, "cfg 1")):
        other = dataclasses.replace(measured, provenance=dataclasses.replace(measured.provenance, **changes))
        with pytest.raises(StatisticsError, match=named):
            follow(model, other, memory="64MiB")
