"""results.json: what is read and refused, which rows compare, rankings and fronts, and the folder of a run."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.rows import FILE, LEDGERS, row, row_data, write_file

from heatkv.core.statistics import Statistics
from heatkv.errors import FormatError, HeatKVError
from heatkv.models.catalogue import load_model
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.profiling.measure.subjects import Subject
from heatkv.profiling.results import folder
from heatkv.profiling.results.artefacts import pictures_of, plans_of, read_scas, save_scas, scas_of
from heatkv.profiling.results.comparable import check_distinct, match
from heatkv.profiling.results.folder import ResultsFolder, check_replaceable, comparison_digest, measurement_digest
from heatkv.profiling.results.merging import EQUAL_BYTES, budgets_of, leaders, merge, pareto_front, ranked
from heatkv.profiling.results.row import Request, read_results, write_results

BASELINE = Path(__file__).parents[1] / "benchmarks" / "baseline" / "results.json"

# ------------------------------------------------------------------------------------------------- the file


def same_content(read: Any, written: Any) -> bool:
    """Whether all that was read is written again; what is new is null."""
    if isinstance(read, dict):
        return all(same_content(value, written[name]) for name, value in read.items()) and all(
            written[name] is None or written[name] in ([], False, {}) for name in written.keys() - read.keys()
        )
    if isinstance(read, list):
        return len(read) == len(written) and all(map(same_content, read, written))
    return bool(read == written)


def test_a_file_is_written_as_it_was_read(tmp_path: Path) -> None:
    gone = {"compensation_bytes", "corrections_bytes"}
    told = json.loads(BASELINE.read_text(), object_hook=lambda o: {k: v for k, v in o.items() if k not in gone})
    write_results(tmp_path / "results.json", read_results(BASELINE))
    assert same_content(told, json.loads((tmp_path / "results.json").read_text()))


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "negative KL": ({"kl": -1e-8}, "kl"),
    "huge KL": ({"kl": 1e90}, "kl"),
    "text": ({"kl": "low"}, "kl"),
    "KL of an image": ({"kl_of_images": [1e7], "images": 1}, "kl_of_images"),
    "too few images": ({"kl_of_images": [0.1], "images": 2}, "kl_of_images"),
    "too many scales": ({"kl_per_scale": [0.0, 1.0, 2.0]}, "kl_per_scale"),
    "too few pictures": ({"psnr_of_pictures": [1.0], "pictures": 2}, "psnr_of_pictures"),
    "SSIM": ({"ssim": -1.5}, "ssim"),
    "no bytes": ({"planned_bytes": None}, "planned_bytes"),
    "bytes of a ledger": ({"memory": LEDGERS | {"weights_bytes": -1}}, "memory.weights_bytes"),
    "half a ledger": ({"memory": LEDGERS | {"arena": {}}}, "memory.arena"),
    "no weights": ({"model_fingerprint": None}, "model_fingerprint"),
    "schedule": ({"schedule": [[1, 1, 1]]}, "schedule"),
    "no time": ({"latency_ms": {"median": 0}}, "latency_ms.median"),
}


@pytest.mark.parametrize(("change", "field"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_figures_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    path = write_file(tmp_path, [row_data(), row_data(policy="h2o") | change])
    with pytest.raises(FormatError) as error:
        read_results(path)
    assert f"{path}: rows[1]" in str(error.value)
    assert field in str(error.value)


@pytest.mark.parametrize("change", [{"format": "heatkv-plan"}, {"version": 2}, {"request": []}, {"environment": 1}])
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        read_results(write_file(tmp_path, [], **change))


def test_figures_at_their_limits_are_taken() -> None:
    edge = row(kl=-1e-12, ssim=-1.0, allocated_bytes=2**60, pictures=0, latency_ms={"median": 0.001, "scales": [0, 0]})
    assert (edge.kl, edge.ssim, edge.allocated_bytes) == (-1e-12, -1.0, 2**60)


# ------------------------------------------------------------------------------------------------ what compares


def measured(**changes: Any) -> dict[str, Any]:
    return row_data(images=2, pictures=1, kl=0.2, **changes)


def test_a_subject_that_is_there_twice_is_refused() -> None:
    rows = [row(), row(seed=1), row(batch=2, rows=4), row(policy="h2o")]
    check_distinct(rows, "results.json")
    with pytest.raises(FormatError, match=r"heatkv 10%, storage float32, rows 2, batch 1, seed 1 twice, .* 1 and 4"):
        check_distinct([*rows, row(seed=1, settings={}, kl=0.1)], "results.json")


@pytest.mark.parametrize(
    "other",
    [
        {"model_fingerprint": "g"}, {"policy": "snapkv"}, {"settings": {"sink_scales": 2}}, {"budget": "20%"},
        {"rows": 4}, {"batch": 2}, {"seed": 1}, {"storage": "int8/float32"}, {"dtype": "bfloat16"},
        {"schedule": [[1, 1, 1], [1, 4, 4]]}, {"attention": "triton"}, {"draws": 2},
    ],
)  # fmt: skip
def test_a_row_that_was_measured_otherwise_is_another(tmp_path: Path, other: dict[str, Any]) -> None:
    now = read_results(write_file(tmp_path, [measured(**other)], "now.json"))
    found = match(now, read_results(write_file(tmp_path, [measured()], "before.json")))
    ((_, paired, nearest),) = found.pairs
    assert (paired, found.extra) == (None, now.rows)
    (name,) = other
    assert nearest == (() if name in ("policy", "budget") else (name,))


@pytest.mark.parametrize(
    ("changes", "of_row", "named"),
    [
        ({"request": {"samples_digest": "t"}}, {}, "samples 't'"),
        ({"request": {"samples_digest": {"0": "t", "1": "s"}}}, {}, "samples 't'"),
        ({"request": {}}, {}, "samples None"),
        ({"sampling": {"cfg": 1.5}}, {}, "sampling {'cfg': 1.5}"),
        ({"sampling": None}, {}, "sampling None"),
        ({}, {"images": 3}, "images 3"),
        ({}, {"pictures": 2}, "pictures 2"),
    ],
)
def test_other_conditions_are_refused(
    tmp_path: Path, changes: dict[str, Any], of_row: dict[str, Any], named: str
) -> None:
    before = read_results(write_file(tmp_path, [measured()], "before.json"))
    now = read_results(write_file(tmp_path, [measured() | of_row], "now.json", **changes))
    with pytest.raises(HeatKVError, match="heatkv 10% was measured with") as error:
        match(now, before)
    assert named in str(error.value)


def test_what_may_explain_a_change_is_a_note(tmp_path: Path) -> None:
    before = read_results(write_file(tmp_path, [measured(plans={"a": "p"}, settings={"predicted_kl": 1})], "before"))
    assert match(before, before).notes == ()
    statistics = {"samples": ["a", "b"], "versions": {"torch": "1"}}
    changes = {
        "environment": FILE["environment"] | {"threads": 2},
        "request": {"samples_digest": "s", "statistics": statistics},
    }
    rows = [measured(plans={"a": "q"}, settings={"predicted_kl": 2}), measured(seed=1)]
    now = read_results(write_file(tmp_path, rows, "now", **changes))
    found = match(now, before)
    assert found.pairs[0][1] is now.rows[0]
    assert found.notes == (
        "threads: 2, in the baseline 1",
        "statistics: others than the baseline's: 2 samples, in the baseline 0",
        "other plans than the baseline's: heatkv 10%",
    )


# ------------------------------------------------------------------------------------- folders, rankings, fronts


def test_folders_group_what_was_measured_alike(tmp_path: Path) -> None:
    """Batches share a comparison; seeds and guidance set groups apart, and moments and machines those of times."""
    time = {"median": 5.0}
    rows = [
        measured(policy=policy, seed=seed, batch=batch, rows=2 * batch, latency_ms=time, timed=f"{seed} {batch}",
                 comparison=f"{policy} {seed}")
        for seed in (0, 1) for batch in (1, 2) for policy in ("full", "h2o")
    ]  # fmt: skip
    write_file(tmp_path / "one" / "x", rows, request={"samples_digest": {"0": "s", "1": "t"}})
    write_file(tmp_path / "two" / "x", rows[:1], sampling={"cfg": 1.0})
    write_file(tmp_path / "three" / "x", rows[:1], environment=FILE["environment"] | {"threads": 9})
    merged = merge([tmp_path / name / "x" for name in ("two", "one", "three")])
    assert [source.label for source in merged.sources] == ["one/x", "three/x", "two/x"]
    assert [[merged.label(row) for row in group.rows] for group in merged.fidelity_groups] == [
        ["full · batch 1 · seed 0 · one/x", "h2o · batch 1 · seed 0 · one/x", "full · three/x"],
        ["full · batch 1 · seed 1 · one/x", "h2o · batch 1 · seed 1 · one/x"],
        ["full · two/x"],
    ]
    assert [group.title for group in merged.fidelity_groups] == [
        "sampling cfg 3.0, seed 0", "sampling cfg 3.0, seed 1", "sampling cfg 1.0, seed 0",
    ]  # fmt: skip
    assert [len(group.rows) for group in merged.timing_groups] == [2, 2, 2, 2, 1, 1]
    assert len(merged.machines) == 2


def test_what_is_no_folder_of_results_is_refused(tmp_path: Path) -> None:
    one = write_file(tmp_path / "one", [row_data()]).parent
    other = write_file(tmp_path / "other", [row_data(model="m")]).parent
    empty = write_file(tmp_path / "empty", []).parent
    twice = write_file(tmp_path / "twice", [row_data(), row_data()]).parent
    for folders, said in (
        ([one, one], "is named twice"), ([one, other], "of the model m"), ([tmp_path], "has no results.json"),
        ([empty], "has no rows"), ([twice], "twice, as rows 0 and 1"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=said):
            merge(folders)


def test_budgets_of_several_sizes_are_told_in_mib(tmp_path: Path) -> None:
    mib = 1 << 20
    rows = [row_data(policy=p, budget_bytes=size * mib, seed=size) for p in ("full", "h2o") for size in (4, 8)]
    (source,) = merge([write_file(tmp_path / "one", [*rows, row_data(budget="5%", budget_bytes=1)]).parent]).sources
    assert {name: len(rows) for name, rows in budgets_of(source.rows).items()} == {
        "10% (8.000 MiB)": 1, "10% (4.000 MiB)": 1, "5%": 1,
    }  # fmt: skip


Point = tuple[float, float]


def front_of(points: list[Point]) -> list[Point]:
    return pareto_front(points, lambda point: point[0], lambda point: point[1])


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9)), max_size=12))
def test_a_front_is_what_nothing_on_it_beats(points: list[Point]) -> None:
    """By the definition: a point is on the front if, and only if, no point on it beats it."""

    def beats(one: Point, other: Point) -> bool:
        (a, b), (x, y) = one, other
        return (b < y and a <= x * (1 + EQUAL_BYTES)) or (b == y and a * (1 + EQUAL_BYTES) < x)

    front = front_of(points)
    for point in points:
        assert (point in front) == (not any(beats(other, point) for other in front))
    assert front == sorted(front)


def test_rankings_leave_out_what_was_not_measured() -> None:
    figures: list[float | None] = [0.3, None, 0.1, 0.1 * (1 + 1e-12), 0.1001]
    assert ranked(figures, lambda value: value) == [0.1, 0.1 * (1 + 1e-12), 0.1001, 0.3]
    assert leaders(figures, lambda value: value) == [0.1, 0.1 * (1 + 1e-12)]
    assert leaders([], lambda value: value) == []


# ------------------------------------------------------------------------------------------- the folder of a run


def folder_of(path: Path, model: ClassConditionalModel) -> ResultsFolder:
    return ResultsFolder(path, model, model.sampling, Request(seed=3), pictures=2)


def test_a_run_keeps_what_earlier_ones_left(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    pictures = torch.rand(2, 3, 6, 6).mul(255).round() / 255
    times = {"latency_ms": {"median": 5.0, "runs": 2}, "timed": "t"}
    first = row(memory=LEDGERS, **times, kl=0.1, images=2)
    run = folder_of(tmp_path, emoji)
    run.save([first])
    run.save_pictures("heatkv 10%", "c", pictures)
    assert run.finish([first]) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "results.json"]
    again = folder_of(tmp_path, emoji)
    memory, time, found = again.memory("m", own=True), again.times("m", 2), again.fidelity("c")
    assert memory and time and found  # noqa: PT018
    assert row().updated(memory, time, found[0]) == first
    assert torch.equal(found[1], pictures)
    assert (again.times("m", 3), again.memory("other", own=False), again.fidelity("other")) == (None, None, None)
    # other results go under a number, and what they hold is still known
    assert again.finish([row(comparison="d", measurement="n")]) == tmp_path / "results.1.json"
    assert folder_of(tmp_path, emoji).fidelity("c") is not None
    shared = write_file(tmp_path / "shared", [row_data(memory=LEDGERS | {"process": "shared"})]).parent
    assert folder_of(shared, emoji).memory("m", own=True) is None
    assert folder_of(shared, emoji).memory("m", own=False) is not None


@pytest.mark.parametrize("name", ["results.json", "results.partial.json", "scas.json"])
@pytest.mark.parametrize("content", ['{"format": "mine"}', "{"])
def test_foreign_files_are_not_replaced(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FormatError, match="move it away or write to another folder"):
        check_replaceable(tmp_path)


def test_pictures_of_another_comparison_go_aside(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    run, first = folder_of(tmp_path, emoji), "0" * 16
    for comparison in (first, "c", "c"):
        run.save_pictures("heatkv 10%", comparison, torch.rand(2, 3, 6, 6))
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        f"heatkv_10percent.{first}.png", "heatkv_10percent.png",
    ]  # fmt: skip
    for comparison in (first, "c"):
        assert np.shape(pictures_of(tmp_path, row(comparison=comparison, pictures=2))) == (2, 6, 6, 3)
    assert pictures_of(tmp_path, row(pictures=2, comparison="other")) == "its pictures are not there"
    with pytest.raises(FormatError, match="does not hold 5 pictures"):
        pictures_of(tmp_path, row(pictures=5))


def test_plans_are_those_that_were_measured(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    plans = tuple(emoji.plan("random", budget) for budget in ("20%", "10%"))
    subject = Subject("random", "20%", plans, "float32")
    digests, same = folder_of(tmp_path, emoji).save_plans([subject, subject], ["random 20%"] * 2)
    assert list(digests) == ["random_20percent.json", "random_20percent.1.json"]
    assert digests is same
    assert plans_of(tmp_path, row(plans=digests)) == plans
    plans[1].save(tmp_path / "plans" / "random_20percent.json")
    assert plans_of(tmp_path, row(plans=digests)) == "plans/random_20percent.json is not the plan that was measured"
    assert plans_of(tmp_path, row(plans={"../results.json": "0"})) == "plans/results.json is not there"
    assert plans_of(tmp_path, row()) == "its plans were not saved"


def test_digests_follow_all_that_figures_follow_from(
    emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (Subject("p", "b", (emoji.plan("streaming", budget),), "float32") for budget in ("20%", "10%"))
    coded = Subject("p", "b", one.plans, "int8/float32")
    kernel = Subject("p", "b", one.plans, "float32", "padded")

    drawing = {"model": emoji, "settings": emoji.sampling}

    def comparison(subject: Subject, seed: int = 0, images: int = 2, pictures: int = 1) -> str:
        return comparison_digest(**drawing, subject=subject, seed=seed, images=images, pictures=pictures)

    def measurement(subject: Subject, seed: int = 0, batch: int = 1) -> str:
        return measurement_digest(**drawing, subject=subject, seed=seed, batch=batch)

    renamed = Subject("q", "c", one.plans, "float32")
    assert (comparison(one), measurement(one)) == (comparison(renamed), measurement(renamed))
    found = [comparison(one), *map(comparison, (other, coded, kernel)), comparison(one, 1), comparison(one, 0, 3),
             comparison(one, 0, 2, 2), measurement(one), *map(measurement, (other, coded, kernel)),
             measurement(one, 1), measurement(one, 0, 2)]  # fmt: skip
    transformer, vqvae = copy.deepcopy(emoji.transformer), copy.deepcopy(emoji.vqvae)
    with torch.no_grad():
        transformer.head.weight[7, 3] += 1e-3
        vqvae.decoder.conv_out.bias[0] += 1e-3
    drawn_otherwise = (
        {"settings": replace(emoji.sampling, top_k=7)},
        {"model": load_model("emoji", dtype="float16")},
        {"model": replace(emoji, transformer=transformer)},
        {"model": replace(emoji, vqvae=vqvae)},
    )
    for change in drawn_otherwise:
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setitem(drawing, name, value)
            found += [comparison(one), measurement(one)]
    for name, value in (
        ("is_deterministic", lambda: True),
        ("versions", lambda: {"heatkv": "9"}),
        ("device_name", lambda device: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(folder, name, value)
            found += [comparison(one), measurement(one)]
    assert len(set(found)) == len(found)


def test_s_cas_is_that_of_the_run(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    from heatkv.calibration.run import calibrate

    statistics: Statistics = calibrate(emoji, 1)
    provenance = json.loads(json.dumps(statistics.provenance.to_json()))
    assert "this folder has no S-CAS" in str(scas_of(tmp_path, provenance))
    path = tmp_path / "scas.json"
    save_scas(path, statistics)
    found = scas_of(tmp_path, provenance)
    assert not isinstance(found, str)
    np.testing.assert_array_equal(np.array(found.scas), statistics.scas[:, :, :-1])
    assert "is not that of its results" in str(scas_of(tmp_path, provenance | {"samples": ["other"]}))
    told = json.loads(path.read_text())
    for scas in ([], [[[0.5]]], [[[2.0] * 7]], "x"):
        path.write_text(json.dumps(told | {"scas": scas}))
        with pytest.raises(FormatError, match="scas"):
            read_scas(path)


def test_results_say_where_they_come_from(emoji: ClassConditionalModel, tmp_path: Path) -> None:
    folder_of(tmp_path, emoji).finish([row(kl=0.0)])
    told = json.loads((tmp_path / "results.json").read_text())
    assert (told["format"], told["version"], told["request"]) == ("heatkv-results", 1, {"seed": 3})
    assert (told["rows"][0]["kl"], told["rows"][0]["latency_ms"], told["rows"][0]["nvml_bytes"]) == (0, None, None)
    assert (told["environment"]["device"], told["environment"]["versions"]["torch"]) == ("cpu", torch.__version__)
    assert told["environment"]["matrix_product_1024_fp32_one_thread_ms"] > 0
