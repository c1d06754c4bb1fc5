"""What a report compares: times within turns, fidelity over seeds, ties and fronts; and figures that cannot be."""

from __future__ import annotations

import copy
import itertools
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_measured_sections import results, saved
from test_report import Page, Told, page_of, refused

from heatkv.cli import run
from heatkv.cli.report import _tables
from heatkv.errors import FormatError
from heatkv.profiling.report.figures import columns, cut, shortened
from heatkv.profiling.report.old_fields import check_apart, checked_row
from heatkv.profiling.report.old_merging import EQUAL_BYTES, Source, leaders, pareto_front

POLICIES = ("heatkv", "streaming", "h2o")
SEEDS, BATCHES = (0, 1, 4), (1, 2)


def timed(seed: int, batch: int) -> str:
    return f"2026-01-0{1 + seed}T10:00:0{batch}.500+00:00"


def kl_of(policy: str, budget: str, seed: int) -> float:
    """Far from regular, so that a mean of wrong ones is another one."""
    return 0.1 * (1 + POLICIES.index(policy)) + (0.05 if budget == "10%" else 0.0) + 0.013 * seed**2


def sweep(seeds: tuple[int, ...] = SEEDS, batches: tuple[int, ...] = BATCHES) -> Told:
    """A sweep of one folder: KL by seed, the same at all batches; every point was timed in turns of its own, each on a
    machine slower than at the one before."""
    told = results()
    rows, told["rows"] = told["rows"], []
    for place, (seed, batch) in enumerate(itertools.product(seeds, batches)):
        for row in rows:
            made = copy.deepcopy(row)
            full = row["policy"] == "full"
            kl = 0.0 if full else kl_of(row["policy"], row["budget"], seed)
            made |= {
                "seed": seed, "batch": batch, "rows": 2 * batch, "timed": timed(seed, batch), "versus": None,
                "comparison": f"{row['comparison']} {seed}", "kl": kl,
            }  # fmt: skip
            for name in ("budget_bytes", "planned_bytes", "allocated_bytes"):
                made[name] *= batch
            of_row = (2.0 if full else 1.0 + POLICIES.index(row["policy"]) / 10) * (100 + 10 * place)
            made["latency_ms"] = {"median": of_row, "iqr": 1.0, "runs": 2}
            told["rows"].append(made)
    told["request"] = {"seeds": list(seeds), "samples_digest": {str(seed): f"digest {seed}" for seed in seeds}}
    return told


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Told, Path]:
    folder = tmp_path_factory.mktemp("swept")
    out = folder / "out"
    return *page_of(saved(sweep(), folder / "one"), out=out), out


def page_from(told: Told, tmp_path: Path) -> tuple[Page, Told]:
    return page_of(saved(told, tmp_path / "one"), out=tmp_path / "out")


def said(page: Page) -> str:
    return " ".join(" ".join(page.texts).split())


# -------------------------------------------------------------------------------------------------------- times


def test_times_are_ranked_within_their_turns(swept: tuple[Page, Told, Path]) -> None:
    """Every ranking is of one moment, and shares are of the full cache of that moment: 0.5, 0.55 and 0.6 everywhere."""
    page, data, _ = swept
    assert len(data["latency"]) == len(SEEDS) * len(BATCHES)
    for group, (seed, batch) in zip(data["latency"], itertools.product(SEEDS, BATCHES), strict=True):
        moment = timed(seed, batch)[:19].replace("T", " ")
        assert group["of"].endswith(f"rows {2 * batch}, seed {seed}, timed {moment} UTC")
        shares = {"heatkv": 0.5, "streaming": 0.55, "h2o": 0.6, "full": 1.0}
        assert [row["policy"] for row in group["ranking"]] == [policy for policy in shares for _ in range(2)][:7]
        for row in group["ranking"]:
            assert row["of_full"] == pytest.approx(shares[row["policy"]])
    tables = [table for table in page.in_section("latency") if table["rows"][0][0] == "rank"]
    assert len(tables) == 6
    for table in tables:
        # equally fast rows share a rank, and the policy alone names a row
        assert [row[0] for row in table["rows"][1:]] == ["1", "1", "3", "3", "5", "5", "7"]
        assert {row[1] for row in table["rows"][1:]} == {*POLICIES, "full"}
    shares = [table for table in page.in_section("latency") if "mean share" in table["rows"][0]]
    assert len(shares) == len(BATCHES)
    for table in shares:
        assert [row[2:] for row in table["rows"][1:] if row[0] == "h2o"] == [["0.60", "0.60", "0.60", "3"]] * 2


def test_added_rows_are_not_held_against_the_full_cache_of_another_time(tmp_path: Path) -> None:
    told = sweep((0,), (1,))
    for row in told["rows"]:
        if row["policy"] == "h2o":  # added by a later run, with no full cache timed beside it
            row["timed"] = "2026-02-02T00:00:00+00:00"
    page, data = page_from(told, tmp_path)
    assert [len(group["ranking"]) for group in data["latency"]] == [5, 2]
    assert [row["of_full"] for row in data["latency"][1]["ranking"]] == [None, None]
    table = page.in_section("latency")[-1]
    assert [row[5] for row in table["rows"][1:]] == ["not measured"] * 2


LOADS: dict[str, tuple[Any, str | None]] = {
    "busy": ({"load_average": 7.5, "cores": 2, "busy": True}, "a load average of 7.5 on 2 cores"),
    "gpu": ({"load_average": 0.5, "cores": 2, "gpu_utilisation": 80}, "the GPU is used 80% of the time by others"),
    "idle": ({"load_average": 1.5, "cores": 2, "busy": False}, None),
    "untold": (None, None),
    "damaged": ({"load_average": "7", "cores": [2]}, None),
    "says so": ({"busy": True}, "it says so itself"),
}


@pytest.mark.parametrize(("load", "reason"), LOADS.values(), ids=LOADS)
def test_a_busy_machine_is_told_beside_every_ranking(load: Any, reason: str | None, tmp_path: Path) -> None:
    told = sweep((0,), BATCHES)
    told["environment"]["load"] = load
    page, data = page_from(told, tmp_path)
    assert [group["busy"] for group in data["latency"]] == [[reason] if reason else []] * 2
    notes = [text for text in page.texts if text.startswith("The machine was busy")]
    assert len(notes) == (2 if reason else 0)  # in the ranking of each batch
    assert all(f"({reason})" in text for text in notes)
    assert notes == [] or "The machine was busy" in (tmp_path / "out" / "report.md").read_text()
    console = Console(width=300)
    with console.capture() as captured:
        console.print(*_tables(data))
    assert ("the machine was busy" in " ".join(captured.get().split())) == bool(reason)


# -------------------------------------------------------------------------------------------------- over seeds


def test_the_load_is_that_of_the_timing(tmp_path: Path) -> None:
    """Rows tell the machine of their own turns, which is another one than that of the last run of the folder."""
    told = sweep((0,), BATCHES)
    told["environment"] |= {"load": {"busy": False}, "matrix_product_1024_fp32_one_thread_ms": 20.0}
    for row in told["rows"]:
        busy = {"load_average": 9.0 if row["batch"] == 2 else 1.0, "cores": 4}
        row["timing_machine"] = {"load": busy, "matrix_product_1024_fp32_one_thread_ms": 20.0 + 5 * row["batch"]}
    page, data = page_from(told, tmp_path)
    assert [group["busy"] for group in data["latency"]] == [[], ["a load average of 9.0 on 4 cores"]]
    assert "A fixed matrix product took 25.0 to 30.0 ms in the rankings of one" in said(page)
    assert "further" not in [one["id"] for one in page.of("section")]


def test_fidelity_over_seeds_is_mean_deviation_and_range(swept: tuple[Page, Told, Path]) -> None:
    page, data, _ = swept
    (family,) = data["over_seeds"]
    assert family["seeds"] == list(SEEDS)
    (table,) = [table for table in page.in_section("fidelity") if "mean KL, nats" in table["rows"][0]]
    assert [row[0] for row in table["rows"][1:]] == [*POLICIES, *POLICIES]
    shown = {(texts[0], texts[1]): numbers for texts, numbers in zip(table["rows"], table["numbers"], strict=True)}
    for budget, policy in itertools.product(("30%", "10%"), POLICIES):
        kls = [kl_of(policy, budget, seed) for seed in SEEDS]
        (row,) = [row for row in family["budgets"][budget] if row["policy"] == policy]
        assert row["kl"] == pytest.approx(sum(kls) / 3)
        assert row["sd"] == pytest.approx(statistics.stdev(kls))
        assert row["range"] == [min(kls), max(kls)]
        assert [float(number) for number in shown[policy, budget][2:6]] == pytest.approx(
            [sum(kls) / 3, statistics.stdev(kls), min(kls), max(kls)]
        )
    assert f"{kl_of('heatkv', '10%', 0):.3f} to {kl_of('heatkv', '10%', 4):.3f} over 3 seeds" in said(page)
    # every seed follows, folded, and the same KL at another batch is not shown again
    assert [(group["of"], group["also"]) for group in data["fidelity"]] == [(f"seed {s}", ["batch 2"]) for s in SEEDS]
    charts = [told for told in page.of("svg") if str(told.get("aria-label")).startswith("KL against memory")]
    assert len(charts) == 1 + len(SEEDS)
    assert [table["heading"] for table in page.in_section("fidelity")] == [
        "Means over 3 seeds (0, 1 and 4)", "Means over 3 seeds (0, 1 and 4)", "seed 0", "seed 1", "seed 4",
    ]  # fmt: skip


def test_the_page_of_one_folder_says_what_it_holds(swept: tuple[Page, Told, Path]) -> None:
    page, _, _ = swept
    assert "These folders" not in said(page)
    assert "a cache of 2 and 4 rows in float32" in said(page)
    assert "The KLs of batch 2 are not shown again" in said(page)


def test_batches_of_other_figures_have_means_of_their_own(tmp_path: Path) -> None:
    told = sweep()
    for row in told["rows"]:
        if row["batch"] == 2 and row["policy"] != "full":
            row["kl"] += 1.0
    _, data = page_from(told, tmp_path)
    assert [family["of"] for family in data["over_seeds"]] == ["rows 2", "rows 4"]
    for place, family in enumerate(data["over_seeds"]):
        (row,) = [row for row in family["budgets"]["10%"] if row["policy"] == "h2o"]
        assert row["kl"] == pytest.approx(place + statistics.fmean(kl_of("h2o", "10%", seed) for seed in SEEDS))
    assert len(data["fidelity"]) == 6


def test_a_policy_that_lacks_a_seed_is_in_no_mean(tmp_path: Path) -> None:
    told = sweep()
    told["rows"] = [row for row in told["rows"] if (row["policy"], row["seed"]) != ("heatkv", 4)]
    page, data = page_from(told, tmp_path)
    (family,) = data["over_seeds"]
    assert [row["policy"] for row in family["budgets"]["10%"]] == ["streaming", "h2o"]
    assert "With 10% of the cache, streaming stays closest" in said(page)


def test_rows_of_the_command_can_be_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(sweep(), tmp_path / "one")
    capsys.readouterr()
    assert run(["report", str(folder), "--out", str(tmp_path / "out")]) == 0
    tables = re.split(r"┏", capsys.readouterr().out)[1:]
    assert len(tables) == 1 + len(SEEDS) + len(SEEDS) * len(BATCHES)
    seen: list[tuple[str, ...]] = []
    for table in tables[1:]:
        head, *lines = [line for line in table.splitlines() if line.startswith(("┃", "│"))]
        names = [name.strip() for name in head.strip("┃").split("┃")]
        assert names[:4] == ["policy", "budget", "batch", "seed"]
        seen += [(names[4], *(cell.strip() for cell in line.strip("│").split("│")[:4])) for line in lines]
    assert len(set(seen)) == len(seen) == 3 * 6 + 6 * 7


def test_labels_leave_out_what_a_chart_shares(swept: tuple[Page, Told, Path]) -> None:
    """In the charts of fidelity, scales and latency, all of one seed and batch, a label is the policy alone."""
    _, _, out = swept
    page = (out / "report.html").read_text()
    for section in ("fidelity", "scales", "latency", "phases"):
        if found := re.search(rf'<section id="{section}".*?</section>', page, re.DOTALL):
            charts = re.findall(r'<svg[^>]*class="chart".*?</svg>', found[0], re.DOTALL)
            assert not any(" · " in chart or "…" in chart for chart in charts), section


# ------------------------------------------------------------------------------------------- names, ties, fronts


@given(names=st.lists(st.text(st.sampled_from("abc·語 "), min_size=1, max_size=60), max_size=8, unique=True))
def test_shortened_names_stay_apart(names: list[str]) -> None:
    texts = shortened(names, 26)
    assert list(texts) == names
    assert len(set(texts.values())) == len(names)
    for name, text in texts.items():
        if columns(name) <= 26:
            assert text == name
        begin, _, end = text.partition("…")
        assert name.startswith(begin)
        assert text == name or name.endswith(end)


@given(text=st.text(st.sampled_from("ab語"), max_size=60), most=st.integers(1, 40))
def test_a_cut_name_is_no_wider_than_allowed(text: str, most: int) -> None:
    assert columns(cut(text, most)) <= most
    assert (cut(text, most) == text) == (columns(text) <= most)


@pytest.mark.filterwarnings("error")
def test_names_of_other_scripts_and_very_long_ones_are_drawn_without_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [saved(sweep((0,), (1,)), tmp_path / name) for name in ("結果一", "x" * 60 + "🎨")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(["report", *map(str, folders), "--out", str(tmp_path / "out")]) == 0
    assert "Warning" not in capsys.readouterr().err
    assert "結果一" in (tmp_path / "out" / "report.html").read_text()


def test_a_chart_of_many_policies_stays_small(tmp_path: Path) -> None:
    told = sweep((0,), (1,))
    full, *others = told["rows"]
    told["rows"] = [full] + [
        copy.deepcopy(row) | {"policy": f"{row['policy']}-{number}", "kl": row["kl"] + number / 500}
        for number in range(10) for row in others
    ]  # fmt: skip
    page, _ = page_from(told, tmp_path)
    heights = [float(str(told["viewbox"]).split()[3]) for told in page.of("svg") if told.get("class") == "chart"]
    assert max(heights) < 1500
    assert "Of 30 policies 24 are named" in said(page)
    (table,) = page.in_section("fidelity")
    assert len(table["rows"]) == 31


def test_ties_name_all_who_tie(tmp_path: Path) -> None:
    first = sweep((0,), (1,))
    page, _ = page_of(saved(first, tmp_path / "a"), saved(first, tmp_path / "b"), out=tmp_path / "out")
    assert "With 10% of the cache, heatkv of a and heatkv of b tie as closest to the full cache" in said(page)
    assert "2 tie" in said(page)
    markdown = (tmp_path / "out" / "report.md").read_text()
    for name in "ab":
        assert re.search(rf"\| heatkv · {name} \| \*\*0.1000\*\* \| \*\*0.1500\*\* \|", markdown)
        assert re.search(rf"\| streaming · {name} \| 0.2000 \| 0.2500 \|", markdown)


class Point:
    policy = "p"

    def __init__(self, x: float, y: float) -> None:
        self.x, self.y, self.source = x, y, Source("s", Path(), {}, {}, {}, ())


def front_of(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(p.x, p.y) for p in pareto_front([Point(*point) for point in points], lambda p: p.x, lambda p: p.y)]


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9)), max_size=12))
def test_a_front_is_what_nothing_on_it_beats(points: list[tuple[int, int]]) -> None:
    """By the definition: a point is on the front if, and only if, no point on it beats it."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        (a, b), (x, y) = one, other
        return (b < y and a <= x * (1 + EQUAL_BYTES)) or (b == y and a * (1 + EQUAL_BYTES) < x)

    front = front_of([(float(x), float(y)) for x, y in points])
    for x, y in points:
        assert ((x, y) in front) == (not any(beats(other, (x, y)) for other in front))
    assert front == sorted(front)


def test_bytes_of_a_cell_or_two_put_nobody_on_the_front(tmp_path: Path) -> None:
    assert front_of([(843776, 0.5), (847872, 0.29), (2539520, 0.19), (2535424, 0.12)]) == [
        (847872, 0.29), (2535424, 0.12)
    ]  # fmt: skip
    assert front_of([(100, 0.5), (110, 0.3)]) == [(100, 0.5), (110, 0.3)]
    page, _ = page_from(sweep((0,), (1,)), tmp_path)
    assert "bytes within 1% of each other count as equal" in said(page)


def test_leaders_are_equal_but_for_rounding() -> None:
    points = [Point(0, 0.1), Point(1, 0.1 * (1 + 1e-12)), Point(2, 0.1001)]
    assert [p.x for p in leaders(points, lambda p: p.y)] == [0, 1]


# --------------------------------------------------------------------------------------------- units and headings


def test_the_markdown_tells_units_and_ledgers(swept: tuple[Page, Told, Path]) -> None:
    _, _, out = swept
    markdown = (out / "report.md").read_text()
    for title in ("planned, MiB", "allocated, MiB", "median, ms", "KL, nats", "PSNR, dB"):
        assert f"| {title} |" in markdown
    assert "Ledgers: allowed is the budget; planned, the most that the plan holds" in markdown


def test_budgets_of_several_sizes_are_told_in_mib(tmp_path: Path) -> None:
    """Where rows of two batches are shown together, all budgets have their sizes, and no bare number of bytes."""
    page_from(sweep((0,), BATCHES), tmp_path)
    html = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"\d{6,} bytes\)", html)
    told = sweep((0,), (1,))
    for row in told["rows"]:
        if row["policy"] == "h2o" and row["budget"] == "10%":
            row["budget_bytes"] *= 2
    _, data = page_of(saved(told, tmp_path / "two"), out=tmp_path / "out2")
    assert list(data["fidelity"][0]["budgets"]) == ["30%", "10% (8.000 MiB)", "10% (4.000 MiB)"]


# ------------------------------------------------------------------------------------- figures that cannot be

IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "negative KL": ({"kl": -1e-8}, "'kl' is -1e-08; it must be at least 0 and at most 1e+06 nats"),
    "huge KL": ({"kl": 1e90}, "at most 1e+06 nats"),
    "KL of a scale": ({"kl_per_scale": [0.0, -1.0, 0.0]}, "at least 0 and at most 1e+06 nats"),
    "KL of a draw": ({"kl_of_draws": [0.1, -0.1]}, "at least 0 and at most 1e+06 nats"),
    "KL of an image": ({"kl_of_images": [1e7]}, "at least 0 and at most 1e+06 nats"),
    "top-1": ({"top1_agreement": 1.5}, "a share from 0 to 1"),
    "negative top-1": ({"top1_agreement": -0.5}, "a share from 0 to 1"),
    "top-1 of a scale": ({"top1_per_scale": [0, 1, 5]}, "a share from 0 to 1"),
    "SSIM": ({"ssim": -1.5}, "from -1 to 1"),
    "SSIM of a picture": ({"ssim_of_pictures": [0.5, 2]}, "from -1 to 1"),
    "PSNR": ({"psnr_db": 1e9}, "from 0 to 100 dB"),
    "bytes": ({"allocated_bytes": 1e30}, "a whole number from 0 to 2^60 bytes"),
    "bytes over time": ({"timeline_bytes": [[2**61]] * 3}, "bytes of every layer"),
    "bytes of a ledger": ({"memory": {"planned": {"cache_bytes": 2**61}}}, "an object of ledgers"),
    "rows": ({"rows": 0}, "a whole number from 1 to 1e12"),
    "half a row": ({"rows": 2.5}, "a whole number from 1 to 1e12"),
    "images": ({"images": -1}, "a whole number from 0 to 1e12"),
    "no time": ({"latency_ms": {"median": 0}}, "times above 0"),
    "negative time": ({"latency_ms": {"median": -3.0}}, "times above 0"),
    "a negative run": ({"latency_ms": {"median": 3.0, "all": [3, -3]}}, "times above 0"),
    "endless time": ({"graph_latency_ms": {"median": 1e12}}, "at most 1e+09 ms"),
    "negative IQR": ({"latency_ms": {"median": 3.0, "iqr": -1}}, "times above 0"),
    "turned interval": ({"latency_ms": {"median": 3.0, "interval": [4, 2]}}, "the interval from low to high"),
    "confidence": ({"latency_ms": {"median": 3.0, "confidence": 95}}, "confidence from 0 to 1"),
    "no runs": ({"latency_ms": {"median": 3.0, "runs": 0}}, "at least 1 run"),
    "turned difference": (
        {"versus": {"policy": "heatkv", "difference": 0.0, "interval": [1, -1]}}, "from low to high"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_figures_that_cannot_be_are_refused(change: dict[str, Any], reason: str) -> None:
    row = results()["rows"][1]
    with pytest.raises(FormatError, match=r"results\.json, row 1: ") as error:
        checked_row(row | change, "results.json, row 1")
    assert reason in str(error.value)


def test_figures_at_their_limits_are_taken() -> None:
    row = results()["rows"][1]
    edge = {
        "kl": -1e-12, "predicted_kl": -0.1, "top1_agreement": 1.0, "ssim": -1.0, "allocated_bytes": 2**60,
        "pictures": 0,
        "latency_ms": {"median": 0.001, "iqr": 0, "interval": [0.001, 0.001], "scales": [0, 0, 0.001]},
    }  # fmt: skip
    assert {name: checked_row(row | edge, "x")[name] for name in edge} == edge


def test_a_row_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = sweep()
    told["rows"].append(copy.deepcopy(told["rows"][9]) | {"kl": 0.001, "settings": {"other": 1}})
    with pytest.raises(FormatError, match="twice"):
        check_apart(told["rows"], "results.json")
    line = refused(capsys, saved(told, tmp_path / "one"))
    named = told["rows"][9]
    assert f"has {named['policy']} {named['budget']}, rows 4, batch 2, seed 0 twice, as rows 9 and 42" in line
    assert "keep one of them" in line
    check_apart(told["rows"][:-1], "results.json")  # batches and seeds tell rows apart


def test_bytes_that_break_a_promise_are_remarked(tmp_path: Path) -> None:
    told = sweep((0,), (1,))
    by_name = {(row["policy"], row["budget"]): row for row in told["rows"]}
    more = by_name["heatkv", "10%"]
    more["allocated_bytes"] = more["planned_bytes"] + 2**20
    over = more["allocated_bytes"] - more["budget_bytes"]
    by_name["h2o", "10%"]["allocated_bytes"] -= 8
    page, _ = page_from(told, tmp_path)
    (table,) = page.in_section("rows")
    remarks = {(row[0], row[1]): row[-1] for row in table["rows"][2:]}
    promise = (
        f"allocated and planned differ by 1,048,576 bytes (1.000 MiB); allocated is above the budget by {over:,} bytes "
        f"({over / 2**20:.3f} MiB)"
    )
    assert remarks["heatkv", "10%"] == promise
    assert remarks["h2o", "10%"] == "allocated and planned differ by 8 bytes"
    assert {remarks[name] for name in remarks if name[1] != "10%"} == {""}
    # a winner that broke it says so where it wins
    assert promise in said(page)


def test_all_figures_name_every_row(swept: tuple[Page, Told, Path]) -> None:
    page, data, _ = swept
    (table,) = page.in_section("rows")
    names = [(row[0], row[1]) for row in table["rows"][2:]]
    assert len(set(names)) == len(names) == len(data["rows"]) == 42
