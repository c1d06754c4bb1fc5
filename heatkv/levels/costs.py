"""What any plan with levels costs by level statistics. Arrays: L layers, H heads, T targets, S sources."""

from __future__ import annotations

import numpy as np

from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LEVELS, NONE, LevelChoices
from heatkv.core.plan import Plan
from heatkv.core.schema import IntArray
from heatkv.errors import PlanError


def levels_of_plan(plan: Plan) -> IntArray:
    """`level[l, h, t, s]` at which target t reads each cell under a plan, NONE where it does not."""
    geometry, scales = plan.geometry, len(plan.schedule)
    level = np.full((geometry.layers, geometry.heads, scales, scales), NONE)
    index_of_level = np.array([*(LEVELS.index(name) for name, _ in plan.levels), NONE])
    for target in range(1, scales):
        level[:, :, target, :target] = index_of_level[plan.level_read(target)]
    return level


def level_cost(statistics: LevelStatistics, level_LHTS: IntArray) -> float:
    """Cost of any plan `level[l, h, t, s]` that keeps the sinks whole.

    A level that a source has no cost for counts as one of as many tokens, with which it is the same. Raises PlanError
    where there is none.
    """
    choices = statistics.choices
    layer, head = np.indices(level_LHTS.shape[:2])
    cost = 0.0
    for target in range(choices.sink_scales + 1, len(choices.schedule)):
        combination = np.zeros_like(layer)
        for source in choices.joint_sources(target):
            known = choices.of_source(source)
            level_LH = _known_level(choices, known, target, source, level_LHTS[:, :, target, source])
            combination = combination * len(known) + np.searchsorted(known, level_LH)
        cost += float(statistics.joint[target][layer, head, combination].sum())
        for source in choices.other_sources(target):
            known = choices.of_other(source)
            level_LH = _known_level(choices, known, target, source, level_LHTS[:, :, target, source])
            cost += float(statistics.single[layer, head, target, source, level_LH].sum())
    return cost


def _known_level(
    choices: LevelChoices, known: tuple[int, ...], target: int, source: int, level_LH: IntArray
) -> IntArray:
    """The levels, each replaced by the known one of as many tokens where it is none."""
    tokens = choices.tokens(source)
    same = [next((other for other in known if tokens[other] == held), -1) for held in tokens]
    found = np.where(np.isin(level_LH, known), level_LH, np.array(same)[level_LH])
    if (found < 0).any():
        layer, head = (int(i) for i in np.argwhere(found < 0)[0])
        raise PlanError(
            f"layer {layer}, head {head} holds source {source} at level {LEVELS[level_LH[layer, head]]} for target "
            f"{target}, which the level costs do not price; known there: "
            f"{', '.join(LEVELS[level] for level in known if level != NONE)}"
        )
    return found
