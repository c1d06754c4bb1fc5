"""The measurements: fidelity against oracles, bytes against storage, times and files."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from heatkv.calibration.measure import calibrate
from heatkv.cli.output import show
from heatkv.core.budget import Budget
from heatkv.core.statistics import Statistics
from heatkv.errors import HeatKVError, PolicyError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import SamplingSettings
from heatkv.policies.base import make_policy
from heatkv.profiling.measure import latency
from heatkv.profiling.measure.environment import environment
from heatkv.profiling.measure.fidelity import FidelityBench, kl_divergence, psnr, ssim
from heatkv.profiling.measure.latency import Latency, measure_interleaved
from heatkv.profiling.measure.runner import Subject, bytes_row, fidelity_row, images_of_rows, plan_subjects
from heatkv.profiling.report.tables import results_table
from heatkv.profiling.report.wide_table import WideTable
from heatkv.profiling.results.folder import ResultsFolder

CPU = torch.device("cpu")


def test_kl_equals_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 7, generator=generator) * 4, torch.randn(2, 3, 7, generator=generator) * 4
    expected = stats.entropy(p.double().softmax(-1).numpy(), q.double().softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(kl_divergence(p, q).numpy(), expected, rtol=1e-6)
    assert (kl_divergence(p, p) == 0).all()
    assert not np.allclose(kl_divergence(q, p).numpy(), expected)


def test_psnr_of_known_errors() -> None:
    black = torch.zeros(3, 3, 8, 8)
    off = black.clone()
    off[1] += 51 / 255  # a fifth of the range everywhere: -10 log10(0.04) dB
    off[2, :, 0, 0] = 1.0  # one pixel of 64 wrong by the whole range: 10 log10(64) dB
    got = psnr(off, black)
    assert got == pytest.approx([58.92, 13.979, 18.062], abs=1e-2)


def test_ssim_is_one_for_equal_pictures_only() -> None:
    picture = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert ssim(picture, picture) == pytest.approx([1, 1])
    values = ssim(picture.flip(3), picture)
    assert values is not None
    assert (values < 0.5).all()


def test_the_full_cache_is_the_full_cache(emoji: ClassConditionalModel) -> None:
    bench = FidelityBench(emoji, images=3, pictures=2, seed=0, settings=emoji.sampling, batch=2)
    full, window = (
        plan_subjects(
            emoji, ["sliding-window"], [Budget.parse("10%")], statistics=None, rows=2, storage="float32"
        )
    )  # fmt: skip
    figures, details = fidelity_row(bench, full)
    assert figures["kl"] == 0
    assert figures["top1_agreement"] == 1
    assert figures["ssim"] == pytest.approx(1)
    assert figures["images"] == 3
    assert len(torch.cat(details.pictures)) == 2 == len(bench.reference_pictures())
    assert torch.equal(torch.cat(details.pictures), bench.reference_pictures())
    worse, _ = fidelity_row(bench, window)
    assert worse["kl"] > 0.001
    assert 0 < worse["top1_agreement"] < 1
    assert worse["psnr_db"] < figures["psnr_db"]
    # the first scale sees no cache, so nothing can differ there
    assert worse["kl_per_scale"][0] == 0
    sizes = emoji.geometry.schedule.tokens
    assert worse["kl"] == pytest.approx(np.dot(worse["kl_per_scale"], sizes) / sum(sizes))


def test_bytes_are_read_from_the_storage(emoji: ClassConditionalModel) -> None:
    subjects = plan_subjects(
        emoji, ["streaming", "random"], [Budget.parse("30%"), Budget.parse("2MiB")], statistics=None, rows=4,
        storage="float32", draws=2,
    )  # fmt: skip
    assert [(s.policy, s.budget, len(s.plans)) for s in subjects] == [
        ("full", "100%", 1), ("streaming", "30%", 1), ("random", "30%", 2),
        ("streaming", "2097152B", 1), ("random", "2097152B", 2),
    ]  # fmt: skip
    for subject in subjects:
        row = bytes_row(emoji, subject, 4)
        peak = max(plan.peak_token_heads for plan in subject.plans)
        assert row["allocated_bytes"] == row["planned_bytes"] == peak * 4 * 2 * 4 * 32
        assert row["allocated_bytes"] <= row["budget_bytes"] <= row["full_bytes"]
    assert bytes_row(emoji, subjects[-1], 4)["allocated_bytes"] <= 2 << 20
    assert subjects[2].plans[0] != subjects[2].plans[1]


def test_a_budget_that_cannot_be_used_is_flagged(emoji: ClassConditionalModel) -> None:
    # whole scales only, in every layer alike
    coarse = emoji.plan("ams-kv-like", "58%", statistics=emoji_statistics(emoji))
    full = Subject("ams-kv-like", "58%", (coarse,), "float32")
    row = bytes_row(emoji, full, 2)
    assert row["under_used"] == (row["planned_bytes"] < 0.95 * row["budget_bytes"])
    assert row["under_used"]
    table = results_table([row], "t")
    assert "†" in str(table.columns[0]._cells[0])
    assert table.caption == "† used less than 95% of its budget"
    fine = bytes_row(emoji, Subject("snapkv", "58%", (emoji.plan("snapkv", "58%"),), "float32"), 2)
    assert not fine["under_used"]


def shown_lines(table: Table, width: int) -> list[str]:
    """What a terminal of this width shows."""
    console = Console(width=width, markup=False, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 100, 132, 400])
def test_a_table_of_a_sweep_loses_no_figure_on_a_narrow_terminal(width: int) -> None:
    """Both axes, graphs and a long name: every cell is whole somewhere, beside the name of its row."""
    difference = {
        "policy": "heatkv",
        "difference": 0.2063,
        "interval": [0.1795, 0.2346],
        "confidence": 0.95,
        "images": 4,
    }
    rows = [
        {
            "policy": policy, "budget": "12.5%", "batch": batch, "seed": seed, "draws": 1, "had_no_effect": False,
            "budget_bytes": 101 << 20, "planned_bytes": 102 << 20, "allocated_bytes": 103 << 20,
            "full_bytes": 999 << 20,
            "latency_ms": {"median": 1234.5}, "graph_latency_ms": {"median": 678.9},
            "kl": 0.1234, "predicted_kl": 0.4321, "top1_agreement": 0.8765, "psnr_db": 23.45, "ssim": 0.654,
            "versus": difference,
        }
        for policy in ("heatkv", "sliding-window-tokens") for batch in (1, 2) for seed in (0, 1)
    ]  # fmt: skip
    lines = shown_lines(results_table(rows, "a title"), width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    wanted = [
        "101.000", "102.000", "103.000", "10.3%", "1234.5", "678.9", "0.1234", "+0.2063 [+0.1795, +0.2346]",
        "0.4321", "87.6%", "23.45", "0.654",
    ]  # fmt: skip
    for policy, batch, seed in itertools.product(("heatkv", "sliding-window-tokens"), "12", "01"):
        figures = []
        for line in lines:
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[:4] == [policy, "12.5%", batch, seed]:
                figures += cells[4:]
        assert figures == wanted
    assert sum("a title" in line for line in lines) == 1
    parts = sum(line.startswith("┏") for line in lines)
    assert (parts == 1) == (width == 400)


def test_a_pipe_gets_the_table_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    table = WideTable(heads=1, title="t")
    for index in range(40):
        table.add_column(f"column {index}", no_wrap=True)
    table.add_row(*(f"figure {index}" for index in range(40)))
    show(table, False, None)
    out = capsys.readouterr().out
    assert out.count("┏") == 1
    assert all(f"figure {index} " in out for index in range(40))


def emoji_statistics(emoji: ClassConditionalModel) -> Statistics:
    return calibrate(emoji, 1)


def test_a_plan_without_effect_is_flagged(emoji: ClassConditionalModel) -> None:
    full, all_of_it = plan_subjects(
        emoji, ["streaming"], [Budget.parse("100%")], statistics=None, rows=2, storage="float32"
    )
    assert bytes_row(emoji, all_of_it, 2)["had_no_effect"]
    assert not bytes_row(emoji, full, 2)["had_no_effect"]


def test_latency_takes_turns_and_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        calls.append(name)

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    times = measure_interleaved({"a": lambda: call("a", 0.001), "b": lambda: call("b", 0.003)}, CPU, repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ba"  # one warm-up, then turns that change
    assert times["a"].runs_ms == pytest.approx((1, 1, 1))
    assert times["b"].runs_ms == pytest.approx((3, 3, 3))
    assert Latency((1, 2, 3, 4, 100)).to_json() == {
        "median": 3, "iqr": 2, "runs": 5, "interval": [1, 100], "confidence": 0.9375, "outliers": 1,
        "all": [1, 2, 3, 4, 100],
    }  # fmt: skip


def test_results_say_where_they_come_from(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    results = ResultsFolder(tmp_path, emoji, emoji.sampling, {"seed": 3})
    results.finish([{"comparison": "1", "policy": "full", "kl": 0.0}])
    told = json.loads((tmp_path / "results.json").read_text())
    assert (told["format"], told["version"]) == ("heatkv-results", 1)
    assert told["rows"][0]["kl"] == 0
    assert told["request"] == {"seed": 3}
    assert told["rows"][0]["latency_ms"] is None
    assert told["rows"][0]["nvml_bytes"] is None
    assert told["environment"]["device"] == "cpu"
    assert told["environment"]["versions"]["torch"] == torch.__version__
    assert environment(CPU)["matrix_product_1024_fp32_one_thread_ms"] > 0


def test_bad_requests_are_refused() -> None:
    with pytest.raises(PolicyError, match="'streaming' has no option 'sinks'; its options are sink_scales"):
        make_policy("streaming", sinks=3)
    with pytest.raises(HeatKVError, match="rows=3 is no positive multiple of 2"):
        images_of_rows(3, SamplingSettings(cfg=1))
    assert images_of_rows(3, SamplingSettings(cfg=0)) == 3
