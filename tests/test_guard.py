"""The regression guard on files whose changes are known, and the committed baseline against itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heatkv.cli import run
from heatkv.errors import HeatKVError
from heatkv.profiling.guard import Tolerances, check_results

BASELINE = Path(__file__).parents[1] / "benchmarks" / "baseline" / "results.json"
Edit = Callable[[dict[str, Any]], object]


def file(folder: Path, name: str, edit: Edit = lambda told: None) -> Path:
    """A results file with three rows, changed by `edit`."""
    row = {
        "model_fingerprint": "f", "policy": "heatkv", "settings": {"sink_scales": 3, "predicted_kl": 0.1},
        "budget": "10%", "rows": 2, "storage": "float32", "dtype": "float32", "schedule": [[1, 1, 1], [1, 2, 2]],
        "images": 8, "pictures": 4, "draws": 1, "budget_bytes": 1000, "planned_bytes": 900, "allocated_bytes": 900,
        "full_bytes": 9000, "current_bytes": 10, "index_bytes": 20, "workspace_bytes": 30, "compensation_bytes": 0,
        "device_peak_bytes": None, "kl": 0.2, "top1_agreement": 0.8, "psnr_db": 30.0, "ssim": 0.9,
        "latency_ms": {"median": 10.0},
    }  # fmt: skip
    rows = [row, {**row, "policy": "streaming"}, {**row, "policy": "full", "budget": "100%", "kl": 0.0}]
    told: dict[str, Any] = {
        "format": "heatkv-results", "version": 1, "environment": {"device_name": "a", "versions": {"torch": "2.11"}},
        "sampling": {"cfg": 3.0}, "request": {"seed": 0, "images": 8, "pictures": 4},
        "rows": json.loads(json.dumps(rows)),
    }  # fmt: skip
    edit(told)
    path = folder / name
    path.write_text(json.dumps(told))
    return path


def of_first(**values: Any) -> Edit:
    return lambda told: told["rows"][0].update(values)


@pytest.mark.parametrize(
    ("figure", "last_good", "first_bad"),
    [
        ("allocated_bytes", 900, 901),
        ("planned_bytes", 900, 901),
        ("index_bytes", 20, 21),
        ("compensation_bytes", 0, 1),
        ("kl", 0.2199, 0.2201),
        ("top1_agreement", 0.7901, 0.7899),
        ("psnr_db", 29.51, 29.49),
        ("ssim", 0.8901, 0.8899),
        ("ssim", 1.0, None),  # torchmetrics is gone
    ],
)
def test_each_figure_fails_just_beyond_its_tolerance(
    tmp_path: Path, figure: str, last_good: float, first_bad: float | None
) -> None:
    before = file(tmp_path, "before.json")
    assert not check_results(file(tmp_path, "good.json", of_first(**{figure: last_good})), before).failed
    verdict = check_results(file(tmp_path, "bad.json", of_first(**{figure: first_bad})), before)
    assert verdict.failed
    assert [[c.figure for c in row.changes if c.failed] for row in verdict.rows] == [[figure], [], []]


def test_tolerances_are_what_was_asked_for(tmp_path: Path) -> None:
    before, grown = file(tmp_path, "before.json"), file(tmp_path, "after.json", of_first(allocated_bytes=945, kl=0.29))
    assert check_results(grown, before, Tolerances(kl=0.5)).failed
    assert check_results(grown, before, Tolerances(bytes=0.05)).failed
    assert not check_results(grown, before, Tolerances(kl=0.5, bytes=0.05)).failed
    # the full cache's KL is 0, so only the floor allows anything
    noise = file(tmp_path, "noise.json", lambda told: told["rows"][2].update(kl=9e-5))
    assert not check_results(noise, before).failed
    assert check_results(noise, before, Tolerances(kl_floor=8e-5)).failed
    with pytest.raises(HeatKVError, match=r"the tolerance of kl is -1.* from 0 on"):
        Tolerances(kl=-1)
    with pytest.raises(HeatKVError, match="the tolerance of ssim is nan"):
        Tolerances(ssim=float("nan"))


def test_getting_better_slower_or_foretelling_otherwise_is_no_failure(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json")
    better = of_first(
        allocated_bytes=1, kl=0.0, ssim=1.0, latency_ms={"median": 99.0}, settings={"sink_scales": 3, "predicted_kl": 7}
    )
    verdict = check_results(file(tmp_path, "after.json", better), before)
    assert not verdict.failed
    assert not verdict.extra


@pytest.mark.parametrize(
    "other", [{"storage": "int8/float32"}, {"rows": 4}, {"settings": {"sink_scales": 2}}, {"model_fingerprint": "g"}]
)
def test_a_missing_row_fails_and_an_extra_row_is_told(tmp_path: Path, other: dict[str, Any]) -> None:
    before = file(tmp_path, "before.json")
    verdict = check_results(file(tmp_path, "after.json", of_first(**other)), before)
    assert [row.missing for row in verdict.rows] == [True, False, False]
    assert len(verdict.extra) == 1
    assert verdict.failed
    # the other way about: more rows than before are no failure
    fewer = file(tmp_path, "fewer.json", lambda told: told["rows"].pop(0))
    more = check_results(before, fewer)
    assert not more.failed
    assert more.extra == ("heatkv 10%, 2 rows, float32",)


def test_figures_of_the_device_are_compared_where_both_have_them(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json", of_first(device_peak_bytes=100))
    assert not check_results(file(tmp_path, "cpu.json"), before).failed
    assert check_results(file(tmp_path, "more.json", of_first(device_peak_bytes=101)), before).failed


def test_the_command_tells_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file(tmp_path, "before.json")
    after = file(tmp_path, "after.json", of_first(kl=0.25, allocated_bytes=800))
    assert run(["check", str(after), "--against", str(before)]) == 1
    out = capsys.readouterr().out
    assert "1 of 3 rows are worse" in out
    for line, cells in (
        ("kl", ("0.20000", "0.25000", "+0.05000 (+25.0%)", "0.22000", "FAILED")),
        ("allocated", ("800", "ok")),
    ):
        (found,) = [text for text in out.splitlines() if f" {line}" in text]
        assert all(cell in found for cell in cells)
    assert run(["check", str(after), "--against", str(before), "--kl", "30%", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not told["failed"]
    assert {c["figure"]: c["now"] for c in told["rows"][0]["changes"]}["kl"] == 0.25
    after = file(tmp_path, "after.json", lambda told: told["environment"]["versions"].update(torch="2.13"))
    assert run(["check", str(after), "--against", str(before)]) == 0
    assert "note: versions: {'torch': '2.13'}, in the baseline {'torch': '2.11'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda told: told["sampling"].update(cfg=1.5), "has sampling {'cfg': 1.5}"),
        (lambda told: told["request"].update(seed=1), "has seed 1"),
        (lambda told: told["rows"].append(told["rows"][0]), "has heatkv 10%, 2 rows, float32 twice"),
        (lambda told: told["rows"][0].update(kl="low"), "'kl' is 'low'; it must be a finite number"),
        (lambda told: told["rows"][0].pop("budget"), "'budget' is None; it must be a text"),
        (lambda told: told.update(version=9), "version 9"),
    ],
)
def test_what_does_not_compare_is_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit, told: str
) -> None:
    assert run(["check", str(file(tmp_path, "after.json", edit)), "--against", str(file(tmp_path, "before.json"))]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = str(file(tmp_path, "before.json"))
    empty = str(file(tmp_path, "empty.json", lambda told: told.update(rows=[])))
    for arguments, told in (
        ([before, "--against", before, "--kl", "much"], "--kl 'much' is no number; write 5% or 0.05"),
        ([before, "--against", before, "--psnr", "-1"], "the tolerance of psnr is -1.0"),
        ([before, "--against", str(tmp_path / "none.json")], "cannot read"),
        ([before, "--against", empty], "has no rows"),
    ):
        assert run(["check", *arguments]) == 2
        assert told in " ".join(capsys.readouterr().err.split())


def test_the_committed_baseline_is_whole() -> None:
    verdict = check_results(BASELINE, BASELINE)
    assert not verdict.failed
    names = {row.name.split(",")[0] for row in verdict.rows}
    assert names == {"full 100%"} | {f"{p} {b}" for p in ("heatkv", "streaming", "snapkv") for b in ("30%", "10%")}
    for row in verdict.rows:
        assert {"allocated_bytes", "kl", "top1_agreement", "psnr_db", "ssim"} <= {c.figure for c in row.changes}
