"""The regression guard on files whose changes are known, and the committed baseline against itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import FILE, LEDGERS, row_data, write_file

from heatkv.cli import run
from heatkv.errors import HeatKVError
from heatkv.profiling.analysis.guard import Tolerances, check_results

BASELINE = Path(__file__).parents[1] / "benchmarks" / "baseline" / "results.json"
Edit = Callable[[dict[str, Any]], object]


def file(folder: Path, name: str, *edits: Edit) -> Path:
    """A results file with three rows, changed by the edits."""
    measured = {
        "images": 8, "pictures": 4, "kl": 0.2, "top1_agreement": 0.8, "psnr_db": 30.0, "ssim": 0.9,
        "latency_ms": {"median": 10.0}, "memory": LEDGERS,
    }  # fmt: skip
    others: list[dict[str, Any]] = [{}, {"policy": "streaming"}, {"policy": "full", "budget": "100%", "kl": 0.0}]
    data = copy.deepcopy(FILE) | {"rows": [row_data(**measured | other) for other in others]}
    for edit in edits:
        edit(data)
    return write_file(folder, name=name, **data)


def at(value: Any, *path: Any, row: int | None = 0) -> Edit:
    """Sets what lies at the path within a row, or with `row=None` within the file."""

    def edit(data: dict[str, Any]) -> None:
        place = data if row is None else data["rows"][row]
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return edit


def failures(results: Path, before: Path, tolerances: Tolerances | None = None) -> list[str]:
    """Faults and failed figures of the first row; the others must have none."""
    first, *others = check_results(results, before, tolerances).rows
    assert not any(row.failed for row in others)
    return [*first.faults, *(change.figure for change in first.changes if change.failed)]


@pytest.mark.parametrize(
    ("path", "last_good", "first_bad"),
    [
        ("allocated_bytes", 900, 901), ("planned_bytes", 900, 901), ("index_bytes", 20, 21), ("kl", 0.2199, 0.2201),
        ("top1_agreement", 0.7901, 0.7899), ("psnr_db", 29.51, 29.49), ("ssim", 0.8901, 0.8899), ("ssim", 1.0, None),
        ("memory", {}, None), ("latency_ms", {"median": 99.0}, None),
        ("memory.host", {"source": "VmHWM", "most_bytes": 10**9}, None), ("memory.arena.cache_bytes", 900, 901),
        ("memory.planned.cache_bytes", 1, 901), ("memory.tensors.peak_bytes.opened", 1010, 1011),
        ("memory.tensors.peak_bytes.drawing", 2020, 2021), ("memory.tensors.peak_bytes.decode", 1515, 1516),
        ("memory.tensors.arena_bytes", 909, 910), ("memory.weights_bytes", 5050, 5051),
    ],
)  # fmt: skip
def test_tolerance_of_each_figure(tmp_path: Path, path: str, last_good: Any, first_bad: Any) -> None:
    before, names = file(tmp_path, "before.json"), path.split(".")
    if last_good != {}:
        assert failures(file(tmp_path, "good.json", at(last_good, *names)), before) == []
    part = path in ("memory", "latency_ms", "memory.host")
    bad = file(tmp_path, "bad.json", at(first_bad, *names))
    assert failures(bad, before) == [f"lost: {path}" if part else path]


def test_wider_tolerances(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json")
    grown = file(tmp_path, "grown.json", at(945, "allocated_bytes"), at(0.29, "kl"))
    assert failures(grown, before, Tolerances(kl=0.5)) == ["allocated_bytes"]
    assert failures(grown, before, Tolerances(bytes=0.05)) == ["kl"]
    assert failures(grown, before, Tolerances(kl=0.5, bytes=0.05)) == []
    # the full cache's KL is 0, so only the floor allows anything
    noise = file(tmp_path, "noise.json", at(9e-5, "kl", row=2))
    assert not check_results(noise, before).failed
    assert check_results(noise, before, Tolerances(kl_floor=8e-5)).failed
    drawing = file(tmp_path, "drawing.json", at(2200, "memory", "tensors", "peak_bytes", "drawing"))
    assert failures(drawing, before, Tolerances(bytes=1)) == ["memory.tensors.peak_bytes.drawing"]
    assert failures(drawing, before, Tolerances(tensors=0.1)) == []


def test_better_figures_and_more_rows(tmp_path: Path) -> None:
    better = [at(1, "allocated_bytes"), at(0.0, "kl"), at(1.0, "ssim"), at(7, "settings", "predicted_kl")]
    fewer = file(tmp_path, "fewer.json", lambda data: data["rows"].pop(1))
    verdict = check_results(file(tmp_path, "after.json", *better), fewer)
    assert not verdict.failed
    assert verdict.extra == ("streaming 10%, 2 rows, float32",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "g"), ("policy", "snapkv"), ("settings", {"sink_scales": 2}), ("budget", "20%"),
        ("rows", 4), ("batch", 2), ("seed", 1), ("storage", "int8/float32"), ("dtype", "bfloat16"),
        ("schedule", [[1, 1, 1], [1, 4, 4]]), ("attention", "triton"), ("draws", 2),
    ],
)  # fmt: skip
def test_row_of_another_subject(tmp_path: Path, field: str, value: Any) -> None:
    """Every field that decides what a row's figures are of."""
    verdict = check_results(file(tmp_path, "after.json", at(value, field)), file(tmp_path, "before.json"))
    assert [row.missing for row in verdict.rows] == [True, False, False]
    assert len(verdict.extra) == 1
    assert verdict.rows[0].nearest == (() if field in ("policy", "budget") else (field,))


def test_more_seeds_than_the_baseline(tmp_path: Path) -> None:
    def two_seeds(data: dict[str, Any]) -> None:
        del data["request"]["seed"]
        data["request"] |= {"seeds": [0, 1], "samples_digest": {"0": "s", "1": "t"}}
        data["rows"] += [row | {"seed": 1} for row in data["rows"]]

    verdict = check_results(file(tmp_path, "after.json", two_seeds), file(tmp_path, "before.json"))
    assert not verdict.failed
    assert len(verdict.extra) == 3


def test_other_statistics_and_plans(tmp_path: Path) -> None:
    def planned(samples: list[str], plan: str) -> list[Edit]:
        statistics = {"samples": samples, "versions": {"torch": plan}}
        return [at(statistics, "request", "statistics", row=None), at({f"{plan}.json": plan}, "plans")]

    before = file(tmp_path, "before.json", *planned(["a", "b"], "p"))
    assert not check_results(before, before).notes
    notes = check_results(file(tmp_path, "after.json", *planned(["a", "c"], "q")), before).notes
    assert [note.partition(":")[0] for note in notes] == ["statistics", "other plans than the baseline's"]


def test_row_that_could_not_be_measured(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json")
    after = file(tmp_path, "after.json", at("out of memory", "error"), at(None, "memory"), at(None, "latency_ms"))
    assert failures(after, before) == ["error: out of memory"]
    assert failures(after, after) == []  # it never could be
    assert failures(before, after) == []


def test_ledgers_of_another_device_or_torch(tmp_path: Path) -> None:
    """The ledger of tensors compares on one type of device and release of torch; device ledgers on one type."""
    before = file(tmp_path, "before.json")
    tensors, host = "memory.tensors.peak_bytes.drawing", "lost: memory.host"
    grown = [at(10**9, "memory", "tensors", "peak_bytes", "drawing"), at(None, "memory", "host")]
    for field, value, failed in (
        ("device_name", "b", [host, tensors]), ("device", "cuda", []), ("device", None, []),
        ("versions", {"torch": "2.11"}, [host]),
    ):  # fmt: skip
        after = file(tmp_path, "after.json", *grown, at(value, "environment", field, row=None))
        assert failures(after, before) == failed
        notes = " ".join(check_results(after, before).notes)
        assert ("not compared: the ledger of tensors" in notes) == (tensors not in failed)


def test_device_bytes(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json", at(100, "device_peak_bytes"))
    assert failures(file(tmp_path, "lost.json"), before) == ["device_peak_bytes"]
    assert failures(file(tmp_path, "other.json", at("cuda", "environment", "device", row=None)), before) == []
    assert failures(file(tmp_path, "more.json", at(101, "device_peak_bytes")), before) == ["device_peak_bytes"]


@pytest.mark.parametrize(
    ("edit", "value"),
    [
        (at("t", "request", "samples_digest", row=None), "'t'"), (at(9, "images"), "images 9"),
        (at({"0": "t", "1": "s"}, "request", "samples_digest", row=None), "'t'"), (at(9, "pictures"), "pictures 9"),
        (at({"cfg": 1.5}, "sampling", row=None), "{'cfg': 1.5}"), (at(None, "sampling", row=None), "sampling None"),
        (lambda data: data["rows"].append(data["rows"][0]), "twice"), (at(9, "version", row=None), "version 9"),
        (at("heatkv-scas", "format", row=None), "'heatkv-scas'"), (at("low", "kl"), "rows[0].kl"),
    ],
)  # fmt: skip
def test_what_does_not_compare_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit, value: str
) -> None:
    assert run(["check", str(file(tmp_path, "after.json", edit)), "--against", str(file(tmp_path, "before.json"))]) == 2
    assert value in " ".join(capsys.readouterr().err.split())


def test_table_of_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = str(file(tmp_path, "before.json"))
    after = str(file(tmp_path, "after.json", at(0.25, "kl"), at(800, "allocated_bytes")))
    assert run(["check", after, "--against", before]) == 1
    out = capsys.readouterr().out
    for figure, cells in (
        ("kl", ("0.20000", "0.25000", "+0.05000 (+25.0%)", "0.22000", "FAILED")), ("allocated", ("800", "ok")),
    ):  # fmt: skip
        (line,) = [text for text in out.splitlines() if f" {figure}" in text]
        assert all(cell in line for cell in cells)
    options = [part for text in ("kl=2000%", "bytes=0.05", "top1=2%") for part in ("--tolerance", text)]
    assert run(["check", after, "--against", before, *options, "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert not verdict["failed"]
    assert {change["figure"]: change["now"] for change in verdict["rows"][0]["changes"]}["kl"] == 0.25
    tolerances = [verdict["tolerances"][name] for name in ("bytes", "tensors", "kl", "top1", "psnr", "ssim")]
    assert tolerances == [0.05, 0.01, 20, 0.02, 0.5, 0.01]


@pytest.mark.parametrize(
    ("tolerance", "value"),
    [
        ("kl=much", "'much'"), ("kl=inf", "'inf'"), ("kl=nan%", "nan"), ("kl=20", "'20'"), ("bytes=1", "'1'"),
        ("tensors=20", "'20'"), ("top1=101%", "1.01"), ("psnr=-1", "-1"),
    ],
)  # fmt: skip
def test_bad_tolerances(tmp_path: Path, capsys: pytest.CaptureFixture[str], tolerance: str, value: str) -> None:
    """A share from 1 on needs its sign, so that 20 is not taken for twenty times."""
    before = str(file(tmp_path, "before.json"))
    assert run(["check", before, "--against", before, "--tolerance", tolerance]) == 2
    assert value in " ".join(capsys.readouterr().err.split())


def test_baselines(tmp_path: Path) -> None:
    """The committed one has all figures; one without rows is refused."""
    verdict = check_results(BASELINE, BASELINE)
    assert not verdict.failed
    assert not verdict.notes
    names = {row.name.split(",")[0] for row in verdict.rows}
    assert names == {"full 100%"} | {f"{p} {b}" for p in ("heatkv", "streaming", "snapkv") for b in ("30%", "10%")}
    wanted = {"allocated_bytes", "kl", "top1_agreement", "psnr_db", "ssim", "memory.tensors.peak_bytes.drawing"}
    assert all(wanted <= {change.figure for change in row.changes} for row in verdict.rows)
    with pytest.raises(HeatKVError, match=r"empty.json has no rows"):
        check_results(BASELINE, file(tmp_path, "empty.json", at([], "rows", row=None)))
