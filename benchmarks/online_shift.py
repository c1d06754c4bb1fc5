"""What following is worth when the classes that are drawn change half-way: `python benchmarks/online_shift.py`.

The embedded model draws images of one group of classes, then of another, at 10 % of the full cache. Three plans of
the same policy: one calibrated on the first group and kept, one that follows, and one calibrated on the second group,
which nobody could have had beforehand. KL is to the full cache, teacher-forced, over images that no plan has seen;
intervals are bootstrapped over them, in pairs. Groups, fixed before anything was compared:
  category: food and drink, as Unicode groups them (classes 0 to 20), then all others;
  apart: the eight classes at either end of the first principal component of the classes' drop errors (two images
    each), which makes them as different as this model has them.
`--policies heatkv-lp --out benchmarks/results/online_shift.json` writes the published result, `--policies heatkv-mr
--out benchmarks/results/online_shift_levels.json` that of several resolutions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import to_builtins
from yardstick import matrix_product_ms

from heatkv.calibration.run import calibrate
from heatkv.core.budget import Budget
from heatkv.core.io import write_json
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.plan import Plan
from heatkv.core.statistics import Statistics
from heatkv.generation.loop import Generator
from heatkv.models.catalogue import load_model
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.online.adoption import OnlinePlanner
from heatkv.online.following import FollowingGenerator
from heatkv.online.layerwise import measure_drawn
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.measure.environment import environment
from heatkv.profiling.measure.fidelity import FidelityBench, paired_difference
from heatkv.profiling.measure.subjects import Subject

POLICIES = ("heatkv-lp", "heatkv-mr")
FOOD = tuple(range(21))
BUDGET, BATCH = "10%", 8
CALIBRATION, IMAGES = 24, 24
BEFORE, AFTER, EVERY, HALF_LIFE, THRESHOLD = 32, 96, 4, 8.0, 0.02
PER_CLASS, PER_END = 2, 8
TOLD = ("image", "measured", "effective_count", "loss", "possible", "gain", "adopted", "solved")


@dataclass(frozen=True)
class OfClasses(ClassConditionalModel):
    """The model, measured on some classes only."""

    classes: tuple[int, ...] = ()

    def labels(self, count: int, first: int = 0) -> list[int]:
        return [self.classes[(first + i) % len(self.classes)] for i in range(count)]


def of_classes(model: ClassConditionalModel, classes: Sequence[int]) -> OfClasses:
    given = {field.name: getattr(model, field.name) for field in fields(model)}
    return OfClasses(**given, classes=tuple(classes))


def ends_apart(model: ClassConditionalModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The classes at the two ends of the first principal component of their drop errors."""
    errors = [calibrate(of_classes(model, [c]), PER_CLASS, seed=7).drop_error.ravel() for c in range(model.num_classes)]
    centred = np.stack(errors) - np.mean(errors, axis=0)
    order = [int(c) for c in np.argsort(np.linalg.svd(centred, full_matrices=False)[0][:, 0])]
    return tuple(order[:PER_END]), tuple(order[-PER_END:])


def measured(model: ClassConditionalModel, seed: int) -> Statistics:
    return calibrate(model, CALIBRATION, seed=seed, levels="error", level_samples=CALIBRATION)


def run(model: ClassConditionalModel, groups: Sequence[Sequence[int]], policy: str, seed: int) -> dict[str, Any]:
    """One stream of images; KL of every plan on images of both groups."""
    first, second = (of_classes(model, group) for group in groups)
    known = measured(first, 10 * seed + 1)
    following = FollowingGenerator(
        model, make_policy(policy), BUDGET, known, every=EVERY, half_life=HALF_LIFE, threshold=THRESHOLD,
        batch=BATCH, seed=10 * seed + 3,
    )  # fmt: skip
    static = following.plan
    oracle = model.plan(policy, BUDGET, statistics=measured(second, 10 * seed + 2))
    assert isinstance(oracle, Plan)
    draws = np.random.default_rng(seed)
    at_shift = static
    for group, count in zip(groups, (BEFORE, AFTER), strict=True):
        at_shift = following.plan
        for _ in following.draw([int(c) for c in draws.choice(group, count)]):
            pass
    kl: dict[str, list[float]] = {}
    for name, of, plans in (
        ("before", first, {"static": static, "following": at_shift}),
        ("after", second, {"static": static, "following": following.plan, "oracle": oracle}),
    ):
        bench = FidelityBench(of, images=IMAGES, pictures=0, seed=10 * seed + 4, settings=model.sampling, batch=BATCH)
        for plan_name, plan in plans.items():
            (found,) = bench.compare(Subject(plan.policy, BUDGET, (plan,), "float32"))
            kl[f"{plan_name} {name}"] = [round(float(x), 6) for x in found.kl_of_images()]
    events = [{name: event.to_json()[name] for name in TOLD} for event in following.events]
    return {"seed": seed, "kl_of_images": kl, "events": events}


def processor_ms(call: Callable[[], object], repeats: int = 5) -> float:
    """Median processor time, after a first call."""
    call()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return statistics.median(times) * 1e3


def costs(model: ClassConditionalModel) -> dict[str, float]:
    """Processor time of drawing an image in a batch, of measuring one that is drawn, and of a decision."""
    known = measured(model, 0)
    labels = model.labels(BATCH)
    generator = Generator(model, model.plan("heatkv-lp", BUDGET, statistics=known), BATCH)
    tokens = [of_scale[:1] for of_scale in generator.draw(labels).tokens]

    def measure(levels: LevelStatistics | None) -> Statistics:
        return measure_drawn(model, labels[:1], tokens, ["0:0:served"], levels=levels)[0]

    found = {
        "draw_per_image_ms": processor_ms(lambda: generator.draw(labels)) / BATCH,
        "measure_cells_ms": processor_ms(lambda: measure(None)),
        "measure_cells_and_level_costs_ms": processor_ms(lambda: measure(known.levels)),
    }
    new = measure(known.levels)
    for policy in POLICIES:
        problem = PlanningProblem(model.geometry, Budget.parse(BUDGET), known)
        planner = OnlinePlanner(make_policy(policy), problem, threshold=0.0)  # it always solves
        found[f"decide_{policy}_ms"] = processor_ms(lambda planner=planner: planner.follow(new))  # type: ignore[misc]
    return found


def pooled(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean KL of every plan over the images of all seeds, and differences with intervals."""
    kl = {name: np.concatenate([run["kl_of_images"][name] for run in runs]) for name in runs[0]["kl_of_images"]}
    pairs = (
        ("following before", "static before"),
        ("following after", "static after"),
        ("oracle after", "static after"),
        ("following after", "oracle after"),
    )
    return {
        "kl": {name: float(values.mean()) for name, values in kl.items()},
        "differences": {f"{a} - {b}": vars(paired_difference(kl[a], kl[b])) for a, b in pairs},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--seeds", type=int, default=3, help="streams of images per case")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    told = {
        "environment": to_builtins(environment(torch.device("cpu"))),
        "matrix_product_1024_fp32_processor_ms": matrix_product_ms(),
        "budget": BUDGET, "batch": BATCH, "calibration_samples": CALIBRATION, "images_per_seed": IMAGES,
        "drawn_before": BEFORE, "drawn_after": AFTER, "every": EVERY, "half_life": HALF_LIFE, "threshold": THRESHOLD,
    }  # fmt: skip
    model = load_model("emoji")
    told["processor"] = costs(model)
    print(told["processor"], flush=True)
    rest = tuple(c for c in range(model.num_classes) if c not in FOOD)
    scenarios = {"category": (FOOD, rest), "apart": ends_apart(model)}
    cases: list[dict[str, Any]] = []
    for policy in given.policies:
        for scenario, groups in scenarios.items():
            names = [[model.class_names[c] for c in group] for group in groups]
            runs = [run(model, groups, policy, seed) for seed in range(given.seeds)]
            case = {"scenario": scenario, "policy": policy, "classes": names} | pooled(runs) | {"runs": runs}
            cases.append(case)
            print(f"{policy}, {scenario}")
            for name, value in case["kl"].items():
                print(f"  KL {name:18} {value:.4f}")
            for name, found in case["differences"].items():
                low, high = found["interval"]
                print(f"  {name:34} {found['difference']:+.4f}, {low:+.4f} to {high:+.4f}")
            print(f"  adopted {[sum(e['adopted'] for e in run['events']) for run in runs]}", flush=True)
            if given.out is not None:
                write_json(given.out, told | {"cases": cases}, indent=1)


if __name__ == "__main__":
    main()
