"""The regression guard on files whose changes are known, and the committed baseline against itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heatkv.cli import run
from heatkv.errors import FormatError, HeatKVError
from heatkv.profiling.analysis.guard import Tolerances, check_results

BASELINE = Path(__file__).parents[1] / "benchmarks" / "baseline" / "results.json"
Edit = Callable[[dict[str, Any]], object]


def file(folder: Path, name: str, edit: Edit = lambda told: None) -> Path:
    """A results file with three rows, changed by `edit`."""
    row = {
        "model_fingerprint": "f", "policy": "heatkv", "settings": {"sink_scales": 3, "predicted_kl": 0.1},
        "budget": "10%", "rows": 2, "storage": "float32", "dtype": "float32", "schedule": [[1, 1, 1], [1, 2, 2]],
        "images": 8, "pictures": 4, "draws": 1, "budget_bytes": 1000, "planned_bytes": 900, "allocated_bytes": 900,
        "full_bytes": 9000, "current_bytes": 10, "index_bytes": 20, "workspace_bytes": 30,
        "device_peak_bytes": None, "kl": 0.2, "top1_agreement": 0.8, "psnr_db": 30.0, "ssim": 0.9,
        "latency_ms": {"median": 10.0}, "seed": 0, "batch": 1, "attention": "ragged", "error": None,
        "memory": {
            "process": "own", "weights_bytes": 5000,
            "planned": {"cache_bytes": 900, "budget_bytes": 1000},
            "arena": {"cache_bytes": 900, "index_bytes": 20, "workspace_bytes": 30},
            "tensors": {"peak_bytes": {"opened": 1000, "drawing": 2000, "decode": 1500}, "arena_bytes": 900},
            "host": {"source": "VmHWM", "most_bytes": 10**6},
            "allocator": None, "graphs": None, "driver": None,
        },
    }  # fmt: skip
    rows = [row, {**row, "policy": "streaming"}, {**row, "policy": "full", "budget": "100%", "kl": 0.0}]
    told: dict[str, Any] = {
        "format": "heatkv-results", "version": 1,
        "environment": {"device": "cpu", "device_name": "a", "versions": {"torch": "2.11"}},
        "sampling": {"cfg": 3.0}, "request": {"seed": 0, "images": 8, "pictures": 4, "samples_digest": "s"},
        "rows": json.loads(json.dumps(rows)),
    }  # fmt: skip
    edit(told)
    path = folder / name
    path.write_text(json.dumps(told))
    return path


def of_first(**values: Any) -> Edit:
    """Fields of the first row; the ledgers follow those that they repeat, as they do in a measurement."""

    def edit(told: dict[str, Any]) -> None:
        row = told["rows"][0]
        row.update(values)
        memory = row["memory"]
        if memory is not None and "memory" not in values:
            for part, name in (("planned", "cache"), ("arena", "cache"), ("arena", "index"), ("arena", "workspace")):
                of_row = {"planned": "planned", "arena": "allocated"}[part] if name == "cache" else name
                memory[part][f"{name}_bytes"] = row[f"{of_row}_bytes"]

    return edit


def at(value: Any, *path: str, row: int = 0) -> Edit:
    """One field within a row, by the path to it; nothing else follows."""

    def edit(told: dict[str, Any]) -> None:
        place = told["rows"][row]
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
    ("figure", "last_good", "first_bad"),
    [
        ("allocated_bytes", 900, 901),
        ("planned_bytes", 900, 901),
        ("index_bytes", 20, 21),
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
    of_memory = {
        "allocated_bytes": "memory.arena.cache_bytes", "planned_bytes": "memory.planned.cache_bytes",
        "index_bytes": "memory.arena.index_bytes",
    }.get(figure)  # fmt: skip
    failed = [figure] if of_memory is None else [figure, of_memory]
    assert failures(file(tmp_path, "bad.json", of_first(**{figure: first_bad})), before) == failed


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


OF_THE_FILE: list[tuple[Edit, str]] = [
    (lambda told: told["request"].update(samples_digest="t"), "has samples_digest 't'"),
    (lambda told: told["request"].pop("samples_digest"), "does not tell its samples_digest"),
    (lambda told: told["request"].update(samples_digest={"0": "t", "1": "s"}), "has samples_digest 't'"),
    (at("t", "samples_digest", row=2), "has samples_digest 't'"),
    (lambda told: told["request"].update(seed=1), "has seed 1"),
    (lambda told: told["request"].update(seeds=[1, 2]), "has seed [1, 2]"),
    (lambda told: told["request"].pop("seed"), "does not tell its seed"),
    (lambda told: told["request"].update(images=9), "has images 9"),
    (lambda told: told["request"].update(pictures=9), "has pictures 9"),
    (lambda told: told["request"].pop("pictures"), "does not tell its pictures"),
    (lambda told: told["sampling"].update(cfg=1.5), "has sampling {'cfg': 1.5}"),
    (lambda told: told["sampling"].update(top_k=5), "has sampling"),
    (lambda told: told.pop("sampling"), "does not tell its sampling"),
    (lambda told: told.update(version=2), "version 2"),
    (lambda told: told.update(format="heatkv-scas"), "has format 'heatkv-scas'"),
]


@pytest.mark.parametrize(("edit", "told"), OF_THE_FILE)
def test_another_measurement_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit, told: str
) -> None:
    before = file(tmp_path, "before.json")
    assert run(["check", str(file(tmp_path, "after.json", edit)), "--against", str(before)]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "other",
    [
        {"model_fingerprint": "g"}, {"policy": "snapkv"}, {"settings": {"sink_scales": 2}}, {"budget": "20%"},
        {"rows": 4}, {"batch": 2}, {"seed": 1}, {"storage": "int8/float32"}, {"dtype": "bfloat16"},
        {"schedule": [[1, 1, 1], [1, 4, 4]]}, {"attention": "triton"}, {"images": 9}, {"pictures": 9}, {"draws": 2},
        {"seed": None}, {"batch": None}, {"attention": None}, {"schedule": None}, {"dtype": None},
    ],
)  # fmt: skip
def test_a_row_that_was_measured_otherwise_is_another(tmp_path: Path, other: dict[str, Any]) -> None:
    """Every field that decides what a row's figures are of, changed and left out."""
    verdict = check_results(file(tmp_path, "after.json", of_first(**other)), file(tmp_path, "before.json"))
    assert [row.missing for row in verdict.rows] == [True, False, False]
    assert len(verdict.extra) == 1
    (name,) = other
    assert verdict.rows[0].nearest == (() if name in ("policy", "budget") else (name,))


def test_a_baseline_of_an_earlier_release_is_compared_as_far_as_it_tells(tmp_path: Path) -> None:
    def older(told: dict[str, Any]) -> None:
        del told["request"]["samples_digest"]
        for row in told["rows"]:
            for name in ("seed", "batch", "attention", "memory", "error"):
                del row[name]

    verdict = check_results(file(tmp_path, "after.json"), file(tmp_path, "before.json", older))
    assert not verdict.failed
    told = " ".join(verdict.notes)
    for name in ("seed", "batch", "attention", "samples_digest", "ledgers of memory"):
        assert f"not compared: {name}" in told


def test_more_seeds_than_the_baselines_are_compared_at_its_own(tmp_path: Path) -> None:
    def two_seeds(told: dict[str, Any]) -> None:
        del told["request"]["seed"]
        told["request"] |= {"seeds": [0, 1], "samples_digest": {"0": "s", "1": "t"}}
        told["rows"] += [row | {"seed": 1} for row in told["rows"]]

    verdict = check_results(file(tmp_path, "after.json", two_seeds), file(tmp_path, "before.json"))
    assert not verdict.failed
    assert len(verdict.extra) == 3


def test_other_statistics_and_plans_are_told(tmp_path: Path) -> None:
    def made(samples: list[str], plan: str) -> Edit:
        def edit(told: dict[str, Any]) -> None:
            told["request"]["statistics"] = {"samples": samples, "versions": {"torch": plan}}
            told["rows"][0]["plans"] = {f"{plan}.json": plan}

        return edit

    before = file(tmp_path, "before.json", made(["a", "b"], "p"))
    assert not check_results(before, before).notes
    notes = check_results(file(tmp_path, "after.json", made(["a", "c"], "q")), before).notes
    assert notes == (
        "statistics: others than the baseline's: 2 samples, in the baseline 2 samples",
        "other plans than the baseline's: heatkv 10%, 2 rows, float32",
    )


@pytest.mark.parametrize(
    ("edit", "failed"),
    [
        (at(None, "memory"), ["lost: memory"]),
        (at(None, "memory", "planned"), ["lost: memory.planned"]),
        (at(None, "memory", "arena"), ["lost: memory.arena"]),
        (at(None, "memory", "tensors"), ["lost: memory.tensors"]),
        (at(None, "memory", "host"), ["lost: memory.host"]),
        (at(None, "latency_ms"), ["lost: latency_ms"]),
        (at(None, "memory", "arena", "cache_bytes"), ["memory.arena.cache_bytes"]),
        (at(None, "memory", "tensors", "peak_bytes"),
         [f"memory.tensors.peak_bytes.{phase}" for phase in ("opened", "drawing", "decode")]),
        (at(10**9, "memory", "tensors", "peak_bytes", "drawing"), ["memory.tensors.peak_bytes.drawing"]),
        (at(2021, "memory", "tensors", "peak_bytes", "drawing"), ["memory.tensors.peak_bytes.drawing"]),
        (at(2020, "memory", "tensors", "peak_bytes", "drawing"), []),
        (at(1011, "memory", "tensors", "peak_bytes", "opened"), ["memory.tensors.peak_bytes.opened"]),
        (at(1516, "memory", "tensors", "peak_bytes", "decode"), ["memory.tensors.peak_bytes.decode"]),
        (at(910, "memory", "tensors", "arena_bytes"), ["memory.tensors.arena_bytes"]),
        (at(5051, "memory", "weights_bytes"), ["memory.weights_bytes"]),
        (at(10**9, "memory", "arena", "cache_bytes"),
         ["memory.arena.cache_bytes is 1,000,000,000, allocated_bytes 900", "memory.arena.cache_bytes"]),
        (at(899, "memory", "arena", "cache_bytes"), ["memory.arena.cache_bytes is 899, allocated_bytes 900"]),
        (at(901, "memory", "planned", "cache_bytes"),
         ["memory.planned.cache_bytes is 901, planned_bytes 900", "memory.planned.cache_bytes"]),
        (at(10**9, "memory", "host", "most_bytes"), []),  # what else the process did
        (at({"median": 99.0}, "latency_ms"), []),
    ],
)  # fmt: skip
def test_lost_and_grown_ledgers_fail(tmp_path: Path, edit: Edit, failed: list[str]) -> None:
    assert failures(file(tmp_path, "after.json", edit), file(tmp_path, "before.json")) == failed


def test_tolerances_of_ledgers(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json")
    drawing = file(tmp_path, "drawing.json", at(2200, "memory", "tensors", "peak_bytes", "drawing"))
    assert failures(drawing, before, Tolerances(bytes=1)) == ["memory.tensors.peak_bytes.drawing"]
    assert failures(drawing, before, Tolerances(tensors=0.1)) == []
    # however much bytes may grow, the arena is what the row says it is
    arena = file(tmp_path, "arena.json", at(950, "memory", "arena", "cache_bytes"))
    disagrees = "memory.arena.cache_bytes is 950, allocated_bytes 900"
    assert failures(arena, before, Tolerances(bytes=1)) == [disagrees]
    with pytest.raises(HeatKVError, match=f"arena.json: heatkv 10%.*{disagrees}; make a new baseline"):
        check_results(before, arena)
    # the ledgers are of the first plan of several, the fields of all
    several = file(tmp_path, "several.json", of_first(draws=3))
    assert failures(file(tmp_path, "less.json", lambda t: (of_first(draws=3)(t), at(899, "memory", "arena",
                         "cache_bytes")(t))), several) == []  # fmt: skip


def test_a_row_that_could_not_be_measured_fails(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json")
    died = of_first(error="out of memory", memory=None, latency_ms=None)
    after = file(tmp_path, "after.json", died)
    assert failures(after, before) == ["error: out of memory"]
    assert failures(file(tmp_path, "told.json", of_first(error="out of memory")), before) == ["error: out of memory"]
    assert failures(after, after) == []  # it never could be
    assert failures(before, after) == []


def test_the_ledger_of_tensors_is_compared_on_one_kind_of_device_and_torch(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json")

    def grown(**environment: Any) -> Edit:
        def edit(told: dict[str, Any]) -> None:
            at(10**9, "memory", "tensors", "peak_bytes", "drawing")(told)
            at(None, "memory", "host")(told)
            told["environment"].update(environment)

        return edit

    tensors, host = "memory.tensors.peak_bytes.drawing", "lost: memory.host"
    after = file(tmp_path, "after.json", grown(device_name="b"))
    assert failures(after, before) == [host, tensors]
    assert not any("not compared" in note for note in check_results(after, before).notes)
    for environment, failed in (
        ({"device": "cuda"}, []), ({"versions": {"torch": "2.13"}}, [host]), ({"device": None}, []),
        ({"versions": None}, [host]),
    ):  # fmt: skip
        after = file(tmp_path, "after.json", grown(**environment))
        assert failures(after, before) == failed
        assert any("not compared: the ledger of tensors" in note for note in check_results(after, before).notes)
    # what is lost is lost on every device
    gone = file(tmp_path, "gone.json", lambda t: (grown(device="cuda")(t), at(None, "memory", "tensors")(t)))
    assert failures(gone, before) == ["lost: memory.tensors"]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (at(-1, "kl"), "'kl' is -1; it must be at least 0"),
        (at(-2e-9, "kl"), "'kl' is"),
        (at([0.1, -1], "kl_per_scale"), "'kl_per_scale' is"),
        (at([0.1, -0.1], "kl_of_images"), "'kl_of_images' is"),
        (at(5.0, "top1_agreement"), "'top1_agreement' is 5.0; it must be a share from 0 to 1"),
        (at(-0.1, "top1_agreement"), "'top1_agreement' is"),
        (at([2.0], "top1_per_scale"), "'top1_per_scale' is"),
        (at(1.1, "ssim"), "'ssim' is 1.1; it must be from -1 to 1"),
        (at(-1.1, "ssim"), "'ssim' is"),
        (at([9], "ssim_of_pictures"), "'ssim_of_pictures' is"),
        (at(-3.0, "psnr_db"), "'psnr_db' is"),
        (at(1000, "psnr_db"), "'psnr_db' is"),
        (at(-1, "lpips"), "'lpips' is"),
        (at("low", "lpips"), "'lpips' is"),
        (at(2**61, "allocated_bytes"), "'allocated_bytes' is"),
        (at(900.5, "planned_bytes"), "'planned_bytes' is 900.5; it must be a whole number"),
        (at(-1, "planned_bytes"), "'planned_bytes' is"),
        (at(2**61, "memory", "arena", "cache_bytes"), "'memory' is"),
        (at(0.5, "memory", "tensors", "peak_bytes", "drawing"), "'memory' is"),
        (at(-1, "memory", "weights_bytes"), "it must be an object of ledgers"),
        (at([[0], [2**61]], "timeline_bytes"), "'timeline_bytes' is"),
        (at({"median": 0}, "latency_ms"), "'latency_ms' is"),
        (at({"median": -1.0}, "graph_latency_ms"), "'graph_latency_ms' is"),
        (at({"median": 1.0, "all": [1.0, 0]}, "latency_ms"), "'latency_ms' is"),
        (at({"median": 1.0, "iqr": -1}, "latency_ms"), "'latency_ms' is"),
        (at(10**400, "kl"), "'kl' is"),
        (at(0, "draws"), "'draws' is 0; it must be a whole number from 1"),
        (at(8.5, "images"), "'images' is"),
    ],
)
@pytest.mark.parametrize("of", ["results", "baseline"])
def test_figures_that_cannot_be_are_refused(tmp_path: Path, edit: Edit, told: str, of: str) -> None:
    good, bad = file(tmp_path, "good.json"), file(tmp_path, "bad.json", edit)
    with pytest.raises(FormatError) as raised:
        check_results(*((bad, good) if of == "results" else (good, bad)))
    assert "bad.json, row 0: " in str(raised.value)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("figure", "value"),
    [("kl", -1e-10), ("top1_agreement", 1), ("top1_agreement", 0), ("ssim", -1), ("ssim", 1), ("psnr_db", 58.92)],
)
def test_figures_at_their_bounds_are_read(tmp_path: Path, figure: str, value: float) -> None:
    edge = file(tmp_path, "edge.json", of_first(**{figure: value}))
    assert failures(edge, edge) == []


def test_figures_of_the_device_are_compared_where_both_have_them(tmp_path: Path) -> None:
    before = file(tmp_path, "before.json", of_first(device_peak_bytes=100))
    assert failures(file(tmp_path, "lost.json"), before) == ["device_peak_bytes"]
    other = file(tmp_path, "other.json", lambda told: told["environment"].update(device="cuda"))
    assert failures(other, before) == []
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
    # nothing is cut, however long it is
    after = file(tmp_path, "after.json", at(10**15, "memory", "arena", "cache_bytes"))
    assert run(["check", str(after), "--against", str(before)]) == 1
    out = capsys.readouterr().out
    told = "memory.arena.cache_bytes is 1,000,000,000,000,000, allocated_bytes 900"
    assert set(told.split()) <= set(out.split())
    assert out.count("FAILED") == 2
    after = file(tmp_path, "after.json", lambda told: told["environment"]["versions"].update(torch="2.13"))
    assert run(["check", str(after), "--against", str(before)]) == 0
    assert "note: versions: {'torch': '2.13'}, in the baseline {'torch': '2.11'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda told: told["sampling"].update(cfg=1.5), "has sampling {'cfg': 1.5}"),
        (lambda told: told["request"].update(seed=1), "has seed 1"),
        (lambda told: told["rows"].append(told["rows"][0]), "has heatkv 10%, 2 rows, float32 twice"),
        (lambda told: told["rows"][0].update(kl="low"), "row 0: 'kl' is 'low'; it must be a finite number"),
        (lambda told: told["rows"][0].pop("budget"), "'budget' is None"),
        (lambda told: told["rows"][0].pop("model_fingerprint"), "row 0 lacks model_fingerprint"),
        (lambda told: told.update(rows="none"), "its rows are 'none', no list of rows"),
        (lambda told: told.update(request=[]), "its request is [], no object"),
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
        ([before, "--against", before, "--tensors", "-1%"], "the tolerance of tensors is -0.01"),
        ([before, "--against", before, "--kl", "inf"], "--kl 'inf' is no number"),
        ([before, "--against", before, "--kl", "nan%"], "--kl 'nan%' is no number"),
        ([before, "--against", before, "--top1", "101%"], "the tolerance of top1 is 1.01; no run falls by more"),
        ([before, "--against", before, "--ssim", "20"], "the tolerance of ssim is 20; no run falls by more"),
        ([before, "--against", str(tmp_path / "none.json")], "cannot read"),
        ([before, "--against", empty], "has no rows"),
    ):
        assert run(["check", *arguments]) == 2
        assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", ["bytes", "tensors", "kl", "top1"])
@pytest.mark.parametrize(("text", "way_out"), [("20", "write 20%, or 2000%"), ("1", "write 1%, or 100%")])
def test_a_share_of_all_or_more_needs_its_sign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, text: str, way_out: str
) -> None:
    before = str(file(tmp_path, "before.json"))
    assert run(["check", before, "--against", before, f"--{option}", text]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"--{option} '{text}' without % is a share" in told
    assert way_out in told


def test_the_tolerances_that_were_understood_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = str(file(tmp_path, "before.json"))
    asked = ["check", before, "--against", before, "--kl", "2000%", "--bytes", "0.05", "--top1", "2%", "--psnr", "1"]
    assert run(asked) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "no figure changed; may be worse by: bytes 5%, tensors 1%, KL 2000% (at least 0.0001 nats), "
        "top-1 2% of all choices, PSNR 1 dB, SSIM 0.01"
    ) in told
    assert run([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tolerances"] == {
        "bytes": 0.05, "tensors": 0.01, "kl": 20, "kl_floor": 1e-4, "top1": 0.02, "psnr": 1, "ssim": 0.01,
    }  # fmt: skip


def test_the_committed_baseline_is_whole() -> None:
    verdict = check_results(BASELINE, BASELINE)
    assert not verdict.failed
    assert not verdict.notes
    names = {row.name.split(",")[0] for row in verdict.rows}
    assert names == {"full 100%"} | {f"{p} {b}" for p in ("heatkv", "streaming", "snapkv") for b in ("30%", "10%")}
    for row in verdict.rows:
        figures = {change.figure for change in row.changes}
        assert {"allocated_bytes", "kl", "top1_agreement", "psnr_db", "ssim"} <= figures
        assert {"memory.arena.cache_bytes", "memory.tensors.peak_bytes.drawing", "memory.weights_bytes"} <= figures
