"""`heatkv.compare` and `heatkv.profile`: what they write, what they take from earlier runs, and what they refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import heatkv
from heatkv.calibration.run import calibrate_into
from heatkv.core.schema import FloatArray
from heatkv.errors import BudgetError, HeatKVError, StatisticsError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.parallel.reporter import Reporter
from heatkv.policies import PlanningProblem, ScoredCells
from heatkv.profiling import comparison, sweep
from heatkv.profiling.measure.fidelity import FidelityBench
from heatkv.profiling.results.row import Fidelity, Results, read_results

FEW: dict[str, Any] = {"samples": 2, "images": 2, "pictures": 1, "repeats": 1, "draws": 2}


@dataclass(frozen=True)
class LargestFirst(ScoredCells):
    """Keeps large scales; it is never registered."""

    name = "largest-first"

    def value(self, problem: PlanningProblem) -> FloatArray:
        tokens = np.asarray(problem.geometry.schedule.tokens, dtype=float)
        return np.broadcast_to(tokens, (problem.geometry.layers, problem.geometry.heads, len(tokens)))


class Listener(Reporter):
    """Keeps the lines, and how much of what was done."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: Counter[str] = Counter()

    def say(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], object]]:
        before = self.done[what]
        yield lambda count: self.done.update({what: count})
        assert self.done[what] - before in (0, total)


def fidelity(results: Results) -> dict[str, list[Any]]:
    return {row.name: [getattr(row, name) for name in vars(Fidelity())] for row in results.rows}


@pytest.fixture(scope="module")
def compared(emoji: ClassConditionalModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, Listener]:
    """A comparison with names, an object and a finished plan."""
    out, listener = tmp_path_factory.mktemp("compared") / "out", Listener()
    plans = {"mine.json": emoji.plan("streaming", "15%")}
    policies = ["heatkv", "random", LargestFirst()]
    results = heatkv.compare(emoji, policies, ["30%"], out=out, plans=plans, reporter=listener, **FEW)
    return out, results, listener


def test_records_of_a_comparison(compared: tuple[Path, Results, Listener]) -> None:
    out, results, listener = compared
    rows = {row.policy: row for row in results.rows}
    assert list(rows) == ["full", "heatkv", "random", "largest-first", "streaming (mine.json)"]
    assert rows["full"].kl == 0
    for row in results.rows:
        assert row.planned_bytes == row.allocated_bytes <= row.budget_bytes
        assert row.latency_ms is not None
        assert row.kl is not None
        assert row.policy == "full" or row.kl > 0
    assert len(rows["random"].kl_of_draws or ()) == 2 == rows["random"].draws
    assert read_results(out / "results.json") == results
    assert listener.done["measuring memory"] == listener.done["timing"] == len(rows)


def test_files_of_a_comparison(compared: tuple[Path, Results, Listener]) -> None:
    out, results, _ = compared
    assert {path.name for path in out.iterdir()} == {
        "results.json", "statistics.safetensors", "images_30percent.png", "images_15percent.png", "scas.png",
        "scas.json", "pictures", "plans", "report.html",
    }  # fmt: skip
    for name in ("images_30percent.png", "scas.png"):
        with Image.open(out / name) as picture:
            assert picture.size[0] > 100
    for row in results.rows:
        for name in row.plans or {}:
            assert heatkv.load_plan(out / "plans" / name).peak_token_heads * row.rows > 0


def test_comparisons_from_before(
    compared: tuple[Path, Results, Listener], emoji: ClassConditionalModel, tmp_path: Path
) -> None:
    out, first, _ = compared
    statistics = heatkv.Statistics.load(out / "statistics.safetensors")
    listener = Listener()
    # elsewhere, with the same statistics, the figures are the same; the second time none is measured again
    options: dict[str, Any] = {"out": tmp_path, "statistics": statistics, "reporter": listener, **FEW}
    again = heatkv.compare(emoji, ["heatkv"], ["30%"], **options)
    assert fidelity(again) == {name: fidelity(first)[name] for name in fidelity(again)}
    sheet, done = (tmp_path / "images_30percent.png").read_bytes(), listener.done.copy()
    assert heatkv.compare(emoji, ["heatkv"], ["30%"], **options).rows == again.rows
    assert {what: count for what, count in (listener.done - done).items() if count} == {}
    assert (tmp_path / "images_30percent.png").read_bytes() == sheet
    assert not list(tmp_path.glob("results.[0-9]*.json"))
    # other policies: the earlier records are kept aside, and serve
    other = heatkv.compare(emoji, [LargestFirst()], ["30%"], **options)
    assert any("1 of 2 comparisons were made before" in line for line in listener.lines)
    assert fidelity(other)["full 100%"] == fidelity(first)["full 100%"]
    assert fidelity(read_results(tmp_path / "results.1.json")) == fidelity(again)
    # a picture that is of another comparison is drawn again
    pictures = tmp_path / "pictures"
    (pictures / "largest_first_30percent.png").write_bytes((pictures / "full_100percent.png").read_bytes())
    before = listener.done["comparing"]
    assert fidelity(heatkv.compare(emoji, [LargestFirst()], ["30%"], **options)) == fidelity(other)
    assert listener.done["comparing"] > before


def test_a_comparison_that_is_stopped_goes_on(
    emoji: ClassConditionalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_batch, batches = FidelityBench.compare_batch, list[int]()

    def stopped(self: FidelityBench, *arguments: Any) -> Any:
        batches.append(1)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return compare_batch(self, *arguments)

    listener = Listener()
    options: dict[str, Any] = {"out": tmp_path, "batches": [1, 2], "reporter": listener, **FEW}
    with monkeypatch.context() as patch:
        patch.setattr(FidelityBench, "compare_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            heatkv.compare(emoji, ["streaming"], ["30%"], **options)
    partial = read_results(tmp_path / "results.partial.json")
    assert any(f"{tmp_path / 'results.partial.json'}; the same command goes on" in line for line in listener.lines)
    assert [row.kl is None for row in partial.rows] == [False, True, False, True]  # batches share comparisons
    assert not (tmp_path / "results.json").exists()
    measured = Counter(listener.done)
    results = heatkv.compare(emoji, ["streaming"], ["30%"], **options)
    assert [(row.batch, row.rows, row.policy) for row in results.rows] == [
        (batch, 2 * batch, policy) for batch in (1, 2) for policy in ("full", "streaming")
    ]
    for name in ("kl", "memory", "latency_ms"):
        kept, now = ([getattr(row, name) for row in rows] for rows in (partial.rows, results.rows))
        assert all(old in (None, new) and new is not None for old, new in zip(kept, now, strict=True))
    assert {"measuring memory", "timing"}.isdisjoint((listener.done - measured).keys())
    assert not (tmp_path / "results.partial.json").exists()


def test_seeds_that_are_compared(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    results = heatkv.compare(emoji, ["random"], ["50%"], out=tmp_path, seeds=[0, 2**62], **FEW)
    kl = [row.kl for row in results.rows if row.policy == "random"]
    assert [row.seed for row in results.rows] == [0, 0, 2**62, 2**62]
    assert len(set(kl)) == 2
    assert {path.name for path in tmp_path.glob("images*")} == {
        f"images_50percent_seed{seed}.png" for seed in (0, 2**62)
    }  # fmt: skip


def test_profile_measures_bytes_and_time(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    results = heatkv.profile(
        emoji, ["streaming"], ["20%"], out=tmp_path, in_process=True, trace=tmp_path / "traces", repeats=2
    )
    full, streaming = results.rows
    assert streaming.allocated_bytes <= 0.2 * full.allocated_bytes
    assert all(row.latency_ms is not None and row.latency_ms.runs == 2 and row.kl is None for row in results.rows)
    assert len(list((tmp_path / "traces").glob("*.pt.trace.json"))) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "plans", "traces"}


def test_a_fresh_process_that_fails_is_a_record(
    emoji: ClassConditionalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of what has a record is kept, what had none is measured again."""
    asked, options = list[str](), {"out": tmp_path, "repeats": 1, "loading": {"name": "emoji", "device": "cpu"}}
    memory = heatkv.profile(emoji, [], ["20%"], in_process=True, **options | {"out": tmp_path / "first"}).rows[0].memory
    assert memory is not None

    def measured(job: Any) -> Any:
        asked.append(job.plan["policy"])
        if asked == ["full", "streaming"]:
            return sweep.Memory(error="out of memory: 5 GiB")
        return sweep.Memory(memory=memory, device_peak_bytes=1)

    monkeypatch.setattr(sweep, "measure_in_new_process", measured)
    results = heatkv.profile(emoji, ["streaming", "random"], ["20%"], **options)
    assert [row.error for row in results.rows] == [None, "out of memory: 5 GiB", None]
    assert [row.latency_ms is None for row in results.rows] == [False, True, False]
    again = heatkv.profile(emoji, ["streaming", "random"], ["20%"], **options)
    assert [row.error for row in again.rows] == [None] * 3
    assert again.rows[0].latency_ms == results.rows[0].latency_ms


def test_memory_that_runs_out_is_a_record(
    emoji: ClassConditionalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from heatkv.profiling.measure import runner

    opened = runner.open_cache

    def too_many(plan: Any, rows: int, dtype: Any, device: Any, *more: Any, **options: Any) -> Any:
        if rows > 2 and str(device) != "meta":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
        return opened(plan, rows, dtype, device, *more, **options)

    monkeypatch.setattr(runner, "open_cache", too_many)
    results = heatkv.profile(
        emoji, ["streaming"], ["30%"], out=tmp_path, in_process=True, repeats=1, batches=[1, 2]
    )  # fmt: skip
    for row in results.rows:
        fits = row.batch == 1
        assert (row.error is None) == (row.allocated_bytes is not None) == (row.latency_ms is not None) == fits
        assert row.planned_bytes <= row.budget_bytes


@pytest.mark.parametrize(
    ("arguments", "error", "value"),
    [
        ({"policies": ["heatkv", "heatkv"]}, HeatKVError, "policy heatkv is named twice"),
        ({"policies": ["snapkv2"]}, HeatKVError, "'snapkv2'"),
        ({"budgets": ["10%", "0.1"]}, HeatKVError, "budget 10% is named twice"),
        ({"budgets": ["2%"]}, BudgetError, "0.02"),
        ({"budgets": ["auto"]}, BudgetError, "auto"),
        ({"images": 0}, HeatKVError, "images is 0"),
        ({"pictures": 3}, HeatKVError, "pictures is 3"),
        ({"seeds": [2**70]}, HeatKVError, str(2**70)),
        ({"batches": [1, 1]}, HeatKVError, "batch 1 is named twice"),
        ({"policies": [heatkv.make_policy("heatkv-mr", cost="fisher"), "heatkv-lp"]}, HeatKVError, "error and fisher"),
    ],
)
def test_what_cannot_be_compared_leaves_no_folder(
    arguments: dict[str, Any], error: type[HeatKVError], value: str, emoji: ClassConditionalModel, tmp_path: Path
) -> None:
    given = {"policies": ["heatkv-lp"], "budgets": ["30%"], **FEW, **arguments}
    with pytest.raises(error) as raised:
        heatkv.compare(emoji, out=tmp_path / "out", **given)
    assert value in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_run(
    compared: tuple[Path, Results, Listener], emoji: ClassConditionalModel, tmp_path: Path
) -> None:
    """Those in the folder are used as far as they fit, and never replaced."""
    path = tmp_path / "statistics.safetensors"
    path.write_bytes((compared[0] / path.name).read_bytes())
    statistics = heatkv.Statistics.load(path)
    other = heatkv.load_model("emoji").sampling
    for arguments, value in (
        ({"samples": 1}, "2 other samples"),
        ({"seeds": [1]}, "2 other samples"),
        ({"settings": type(other)(cfg=1.0)}, "cfg"),
        ({"statistics": statistics, "settings": type(other)(cfg=1.0)}, "cfg 3"),
    ):
        with pytest.raises(StatisticsError, match=value):
            heatkv.compare(emoji, ["heatkv"], ["30%"], out=tmp_path, **FEW | arguments)
    assert heatkv.Statistics.load(path) == statistics
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]


def test_statistics_that_grow(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    """Samples that are missing are added, and the halves agree as those of one file."""
    path = tmp_path / "statistics.safetensors"
    calibrate_into(path, emoji, 1, seed=0, settings=emoji.sampling)
    grown = comparison.statistics_of_folder(tmp_path, emoji, 2, seed=0, settings=emoji.sampling)
    assert grown.samples == ("0:0:0", "0:1:1")
    assert heatkv.Statistics.load(path) == grown
    whole = heatkv.calibrate(emoji, 2)
    np.testing.assert_allclose(grown.scas, whole.scas, rtol=1e-5)
