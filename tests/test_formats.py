"""docs/formats.md names every field there is, and its lines of Python read the files."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from strategies import PAIRS, statistics_of

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.plan_file import load_plan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.policies.base import PlanningProblem
from heatkv.policies.lp import HeatKVLP
from heatkv.policies.snapkv import SnapKV
from heatkv.profiling.measure.environment import timing_machine
from heatkv.profiling.measure.fidelity import FidelityBench
from heatkv.profiling.measure.runner import first_row, measure_latency, subject_memory
from heatkv.profiling.measure.subjects import plan_subjects
from heatkv.profiling.results.artefacts import save_scas
from heatkv.profiling.results.folder import ResultsFolder, comparison_digest, measurement_digest
from heatkv.profiling.results.ledgers import (
    AllocatorMemory,
    AllocatorPeaks,
    DriverMemory,
    GraphMemory,
    HostMemory,
    Phases,
    Step,
)
from heatkv.profiling.results.row import Request
from heatkv.testing.material import made_up_mass

TEXT = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
GEOMETRY = CacheGeometry(2, 3, 4, ScaleSchedule.of([(1, 1), (1, 2), (2, 2), (4, 4)]))


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
    return str(found)


def fields(title: str, head: str) -> set[str]:
    """The names in the first column of the table that starts with `head`."""
    (table,) = re.findall(rf"^\| {head} \|.*?(?=\n\n)", section(title), re.DOTALL | re.MULTILINE)
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def run_lines(title: str) -> dict[str, Any]:
    """What the section's lines of Python give, run where the files are."""
    (code,) = re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 3
    names: dict[str, Any] = {}
    exec(code, names)
    return names


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    whole = statistics_of(GEOMETRY, made_up_mass(GEOMETRY, 3, 0))
    of_targets = np.random.default_rng(2).random((GEOMETRY.layers, GEOMETRY.heads, len(GEOMETRY.schedule)))
    return dataclasses.replace(whole, concentration_sum=of_targets, similarity_sum=of_targets[:, 0] - 0.5)


@pytest.fixture(scope="module")
def plan(statistics: Statistics) -> Plan:
    """A plan with every optional field."""
    made = HeatKVLP(value="error").plan(PlanningProblem(GEOMETRY, Budget.parse("50%"), statistics, model="tiny"))
    bias = np.random.default_rng(1).normal(size=made.last_read.shape)
    return dataclasses.replace(made, coarse=(CoarseCells("mean", made.last_read, bias),))


def test_plans(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fields("plan.json", "field") == set(plan.to_json())
    monkeypatch.chdir(tmp_path)
    plan.save("plan.json")
    names = run_lines("plan.json")
    assert np.array_equal(names["last_read"], plan.last_read)
    for target in range(len(GEOMETRY.schedule)):
        assert np.array_equal(names["reads"](target), (plan.level_read(target) < len(plan.levels)))


def test_plans_of_dynamic_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = SnapKV().plan(PlanningProblem(GEOMETRY, Budget.parse("50%"), model="tiny"))
    documented = fields("plan.json", "field") | fields("plan.json", "field of a dynamic plan")
    assert documented - set(made.to_json()) == {
        "sink_scales", "value", "value_bound", "gap", "last_read", "coarse", "weights",
    }  # fmt: skip
    made.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made


def test_statistics(statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    statistics.save("statistics.safetensors")
    with safe_open("statistics.safetensors", framework="numpy") as file:
        arrays = {re.sub(r"sum\.\d+$", "sum.t", name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["heatkv"])
    assert fields("statistics.safetensors", "array") == set(arrays)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float64)}
    assert fields("statistics.safetensors", "header field") == set(header)
    text = section("statistics.safetensors")
    for name in (*header["provenance"], *header["levels"]):
        assert f"`{name}`" in text
    names = run_lines("statistics.safetensors")
    assert np.array_equal(names["mass"], statistics.mass)


def test_results(emoji: ClassConditionalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (full,) = plan_subjects(emoji, [], [], statistics=None, rows=2, storage="float32")
    digest = comparison_digest(emoji, emoji.sampling, full, seed=0, images=1, pictures=1)
    measurement = measurement_digest(emoji, emoji.sampling, full, seed=0, batch=1)
    row = first_row(emoji, full, batch=1, rows=2, seed=0, comparison=digest, measurement=measurement)
    machine, settings = timing_machine(emoji.device), emoji.sampling
    times, _ = measure_latency(emoji, [full], batch=1, settings=settings, repeats=1, machine=machine)
    bench = FidelityBench(emoji, images=1, pictures=1, seed=0, settings=settings)
    row = row.updated(subject_memory(emoji, full, 1, settings), times[full.name], bench.measure(full))
    monkeypatch.chdir(tmp_path)
    assert ResultsFolder(Path(), emoji, emoji.sampling, Request(seed=0)).finish([row]) is None
    told = json.loads(Path("results.json").read_text())
    assert fields("results.json", "field") == set(told)
    assert fields("results.json", "field of a record") == set(told["rows"][0])
    assert fields("results.json", "field of memory") == set(told["rows"][0]["memory"])
    text = section("results.json")
    for value in told["rows"][0]["memory"].values():
        for name in value if isinstance(value, dict) else ():
            assert f"`{name}`" in text
    for kind in (HostMemory, AllocatorMemory, AllocatorPeaks, GraphMemory, DriverMemory, Step, Phases):
        for name in kind.__struct_fields__:
            assert f"`{name}`" in text
    assert run_lines("results.json")["kl"] == {("full", "100%"): 0}


def test_scas(statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_scas(Path("scas.json"), statistics)
    assert fields("scas.json", "field") == set(json.loads(Path("scas.json").read_text()))
    assert np.array_equal(run_lines("scas.json")["scas"], statistics.scas[:, :, :-1])


def test_rankings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2b.json").write_text(json.dumps([PAIRS, PAIRS[::-1]]))
    names = run_lines("Published rankings of heads")
    six_scales = dataclasses.replace(GEOMETRY, schedule=ScaleSchedule.square(range(1, 7)))
    rankings = HeadRankings.load_orders("2b.json", six_scales)
    assert np.array_equal(names["layer"] * 3 + names["head"], rankings.order)
    assert rankings.first_scale == 3  # the last of two is of scale T-2 = 4
