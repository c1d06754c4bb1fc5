"""The report of result folders: what the page is made of, what compares between folders, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from heatkv.calibration.measure import calibrate
from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.profiling.measure.runner import first_row
from heatkv.profiling.measure.subjects import plan_subjects
from heatkv.profiling.report.figures import spread_out
from heatkv.profiling.report.old_merging import merge
from heatkv.profiling.report.page import report_data, write_report
from heatkv.profiling.results.artefacts import artefact_name, save_scas
from heatkv.profiling.results.folder import ResultsFolder
from heatkv.profiling.results.row import Latency, Request

ROOT = Path(__file__).resolve().parents[1]
ALL_POLICIES = ROOT / "benchmarks" / "results" / "compare_all.json"

# one worker of a parallel run compares, not each
pytestmark = pytest.mark.xdist_group("report")

Told = dict[str, Any]


class Page(HTMLParser):
    """A parsed page: its elements in order, its tables as rows of cells, and that all is closed that must be."""

    EMPTY = frozenset({"meta", "link", "img", "br", "path", "use", "rect", "col"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[Told] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self._section = ""
        self._heading = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.elements.append((tag, told))
        if tag not in self.EMPTY:
            self._open.append(tag)
        if tag == "section":
            self._section = str(told["id"])
            self._heading = ""
        if tag in ("h3", "summary"):
            self._heading = ""
        if tag == "table":
            self.tables.append({"section": self._section, "heading": self._heading, "rows": [], "numbers": []})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
            self.tables[-1]["numbers"].append([])
        if tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("")
            self.tables[-1]["numbers"][-1].append(told.get("data-v"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._open and self._open[-1] in ("h3", "summary"):
            self._heading += data
        if {"td", "th"} & set(self._open):
            self.tables[-1]["rows"][-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [told for name, told in self.elements if name == tag]

    def in_section(self, section: str) -> list[Told]:
        return [table for table in self.tables if table["section"] == section]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, emoji: ClassConditionalModel) -> Path:
    """A folder as `heatkv compare` leaves it, of static and dynamic policies, with shared room and carried numbers.

    Plans and bytes are real, other figures made up: the worse, the smaller the budget and the later the policy.
    """
    folder = tmp_path_factory.mktemp("compared") / "laptop"
    folder.mkdir()
    statistics = calibrate(emoji, 1)
    budgets = [Budget.parse("30%"), Budget.parse("20%")]
    policies = ["heatkv", "random", "adakv", "ams-kv-like"]
    subjects = plan_subjects(
        emoji, policies, budgets, statistics=statistics, rows=2, storage="float32", draws=2
    )  # fmt: skip
    request = Request(
        seed=0, images=2, pictures=2, samples_digest="0", repeats=2, statistics=statistics.provenance.to_json()
    )
    results = ResultsFolder(folder, emoji, emoji.sampling, request, pictures=2)
    rows = []
    files = results.save_plans(subjects, [subject.name for subject in subjects])
    for place, (subject, plans) in enumerate(zip(subjects, files, strict=True)):
        kls = [0.01 * place + 0.001 * draw for draw in range(len(subject.plans))]
        digest = f"comparison {place}"
        rows.append(replace(
            first_row(emoji, subject, batch=1, rows=2, seed=0, comparison=digest), plans=plans, images=2,
            kl=sum(kls) / len(kls), kl_of_draws=tuple(kls),
            kl_per_scale=(*[0.0] * 5, kls[0] / 4, kls[0], kls[0] * 2), top1_agreement=1 - 0.02 * place,
            pictures=2, psnr_db=40.125 - place, ssim=0.99 - place / 128,
            latency_ms=Latency(median=120.5 - place, iqr=1.5, runs=2),
        ))  # fmt: skip
        generator = torch.Generator().manual_seed(place)
        results.save_pictures(subject.name, digest, torch.rand(2, 3, 24, 24, generator=generator))
    save_scas(folder / "scas.json", statistics)
    statistics.save(folder / "statistics.safetensors")
    results.finish(rows)
    write_report([folder], folder)
    return folder


@pytest.fixture
def folder(compared: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(compared, tmp_path / "laptop"))


def edit(folder: Path, change: Callable[[Told], object]) -> Path:
    told = json.loads((folder / "results.json").read_text())
    change(told)
    (folder / "results.json").write_text(json.dumps(told))
    return folder


def another(folder: Path, name: str, change: Callable[[Told], object]) -> Path:
    return edit(Path(shutil.copytree(folder, folder.parent / name)), change)


def page_of(*folders: Path, out: Path) -> tuple[Page, Told]:
    out.mkdir(exist_ok=True)
    data = write_report(folders, out).data
    return Page((out / "report.html").read_text(encoding="utf-8")), data


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Exit code 2, nothing on the output, one line on the error stream."""
    capsys.readouterr()
    assert run(["report", *map(str, arguments)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    (line,) = error.strip().splitlines()
    assert line.startswith("heatkv: ")
    return line


# --------------------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_else(compared: Path) -> None:
    text = (compared / "report.html").read_text()
    page = Page(text)
    for tag, told in page.elements:
        for name, value in told.items():
            if name in ("src", "href", "xlink:href", "srcset", "poster", "action", "data"):
                assert str(value).startswith(("#", "data:")), (tag, name, value)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]{0,1})", text)) <= {"#"}
    assert not {"iframe", "object", "embed", "form"} & {tag for tag, _ in page.elements}
    assert len(text) < 2_000_000


def test_the_page_can_be_read_by_all(compared: Path) -> None:
    page = Page((compared / "report.html").read_text())
    ids = [told["id"] for _, told in page.elements if "id" in told]
    assert len(ids) == len(set(ids))
    links = [str(told["href"]) for told in page.of("a")]
    assert links
    references = [*links, *(str(told["href"]) for told in page.of("use"))]
    references += [f"#{told['aria-labelledby']}" for _, told in page.elements if "aria-labelledby" in told]
    assert {reference.removeprefix("#") for reference in references} <= set(ids)
    assert len(page.of("h1")) == len(page.of("main")) == 1
    assert page.of("html")[0]["lang"] == "en"
    named = {told.get("name"): told.get("content") for told in page.of("meta")}
    assert named["viewport"] == "width=device-width, initial-scale=1"
    assert named["color-scheme"] == "light dark"
    assert page.of("img")
    assert all(told.get("alt") for told in page.of("img"))
    charts = [told for told in page.of("svg") if told.get("class") == "chart"]
    assert len(charts) == 4 + 4 * 2  # fidelity, scales, latency, all of the cache over time; a timeline for every plan
    assert all(told["role"] == "img" and told["aria-label"] for told in charts)
    assert all(told.get("aria-hidden") == "true" for told in page.of("svg") if told not in charts)
    assert {told.get("scope") for told in page.of("th")} == {"col", "row", "colgroup"}
    scrolled = [told for told in page.of("div") if "scroll" in (told.get("class") or "")]
    assert all(told["tabindex"] == "0" and told["role"] == "region" and told["aria-label"] for told in scrolled)
    assert len(scrolled) >= len(page.tables)


SECTIONS = ["summary", "fidelity", "scales", "latency", "memory", "scas", "plans", "pictures", "rows", "environment"]


def test_the_page_has_all_sections_and_says_the_result_first(compared: Path) -> None:
    page = Page((compared / "report.html").read_text())
    assert [told["id"] for told in page.of("section")] == SECTIONS
    rows = json.loads((compared / "results.json").read_text())["rows"]
    best = min((row for row in rows if row["budget"] == "20%"), key=lambda row: row["kl"])
    assert f"With 20% of the cache, {best['policy']} stays closest" in "".join(page.texts).replace("\n", " ")


FIGURES = {
    "allowed, MiB": "budget_bytes", "planned, MiB": "planned_bytes", "allocated, MiB": "allocated_bytes",
    "tables, MiB": "index_bytes", "workspace, MiB": "workspace_bytes",
    "running layer, MiB": "current_bytes", "device peak, MiB": "device_peak_bytes", "driver, MiB": "nvml_bytes",
    "full cache, MiB": "full_bytes", "KL, nats": "kl", "foretold KL, nats": "predicted_kl", "top-1": "top1_agreement",
    "PSNR, dB": "psnr_db", "SSIM": "ssim", "images": "images", "pictures": "pictures",
}  # fmt: skip


def test_all_figures_are_in_the_table_and_null_is_not_measured(folder: Path, tmp_path: Path) -> None:
    def lose(told: Told) -> None:
        told["rows"][1]["ssim"] = None
        told["rows"][2]["latency_ms"] = None
        del told["rows"][3]["top1_agreement"]
        told["rows"][4]["index_bytes"] = 0

    page, _ = page_of(edit(folder, lose), out=tmp_path / "out")
    rows = json.loads((folder / "results.json").read_text())["rows"]
    (table,) = page.in_section("rows")
    columns = table["rows"][1]
    assert len(table["rows"]) == 2 + len(rows) == 11
    for row, texts, numbers in zip(rows, table["rows"][2:], table["numbers"][2:], strict=True):
        found, shown = dict(zip(columns, numbers, strict=True)), dict(zip(columns, texts, strict=True))
        assert (texts[0], texts[1]) == (row["policy"], row["budget"])
        for title, name in FIGURES.items():
            if row.get(name) is None:
                assert (shown[title], found[title]) == ("not measured", None), title
            else:
                assert float(found[title]) == row[name], title
                unit = 2**20 if name.endswith("_bytes") else 0.01 if title == "top-1" else 1
                digits = len(shown[title].rstrip("%").partition(".")[2])
                assert float(shown[title].rstrip("%")) == pytest.approx(row[name] / unit, abs=0.51 * 10**-digits), title
        times = row["latency_ms"] or {}
        for title, name in (("median, ms", "median"), ("IQR, ms", "iqr"), ("runs", "runs")):
            assert (shown[title] == "not measured") == (name not in times)
            assert name not in times or float(found[title]) == times[name]
        assert shown["CUDA graphs, ms"] == "not measured"
        assert [float(kl) for kl in shown["of its plans, nats"].split()] == pytest.approx(row["kl_of_draws"], abs=5e-5)
    assert float(table["rows"][2 + 4][columns.index("tables, MiB")]) == 0
    (scales,) = page.in_section("scales")
    of_rows = {(row["policy"], row["budget"]): row["kl_per_scale"] for row in rows}
    for texts, numbers in zip(scales["rows"][1:], scales["numbers"][1:], strict=True):
        assert [float(number) for number in numbers[2:]] == of_rows[texts[0], texts[1]]


def test_all_comes_from_the_folder(folder: Path, tmp_path: Path) -> None:
    """A figure that is changed in results.json changes what is told, and who is ahead."""
    before, ranked_before = page_of(folder, out=tmp_path / "before")
    last = ranked_before["fidelity"][0]["budgets"]["20%"][-1]["policy"]

    def change(told: Told) -> None:
        for row in told["rows"]:
            if (row["policy"], row["budget"]) == (last, "20%"):
                row["kl"], row["latency_ms"]["median"], row["psnr_db"] = 0.00123, 0.987, 41.43
                row["kl_per_scale"][-1] = 0.4321
        told["environment"]["device_name"] = "An abacus"
        told["request"]["repeats"] = 77

    after, ranked = page_of(edit(folder, change), out=tmp_path / "after")
    assert ranked["fidelity"][0]["budgets"]["20%"][0] == {
        "source": "laptop", "policy": last, "budget": "20%", "kl": 0.00123,
    }  # fmt: skip
    assert ranked["latency"][0]["ranking"][0]["policy"] == last
    texts, old = "".join(after.texts), "".join(before.texts)
    for told in ("0.0012", "41.43", "41.4 dB", "0.4321", "An abacus", "77", f"{last} stays closest"):
        assert told in texts, told
        assert told == "77" or told not in old, told
    markdown = (tmp_path / "after" / "report.md").read_text()
    assert "**0.0012**" in markdown
    assert "An abacus" in markdown


def test_unknown_figures_are_told_as_they_are(folder: Path, tmp_path: Path) -> None:
    def more(told: Told) -> None:
        for index, row in enumerate(told["rows"]):
            row["phase_ms"] = {"attention": 1.25 * index, "decode": None}
            row["kl_interval"] = [0.25, 0.5]

    page, _ = page_of(edit(folder, more), out=tmp_path / "out")
    (table,) = page.in_section("further")
    names = table["rows"][0]
    assert names[:2] == ["policy", "budget"]
    added = [names.index(name) for name in ("phase_ms attention", "phase_ms decode", "kl_interval")]
    assert [[row[at] for at in added] for row in table["rows"][1:4]] == [
        ["0", "not measured", "0.25, 0.5"], ["1.25", "not measured", "0.25, 0.5"], ["2.5", "not measured", "0.25, 0.5"],
    ]  # fmt: skip


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><b>", "a\x1b[31mred\u202egnirts\n|x|",
    "{{ 7 * 7 }}", "</title><h5>", "`*_[](javascript:x)&amp;", "half \ud800 of a pair",
]  # fmt: skip


def test_hostile_texts_are_told_and_do_nothing(folder: Path, tmp_path: Path) -> None:
    def poison(told: Told) -> None:
        for row, text in zip(told["rows"], itertools.cycle(HOSTILE), strict=False):
            row["model"] = row["model_fingerprint"] = "".join(HOSTILE)
            row["policy"] = row["policy"] if row["policy"] == "full" else f"{row['policy']} {text}"
            row["budget"] = f"{row['budget']}{text}"
            row["settings"][text] = text
            row[text] = {text: text}
        told["environment"]["device_name"] = told["environment"]["".join(HOSTILE)] = "".join(HOSTILE)
        told["sampling"]["".join(HOSTILE)] = HOSTILE

    page, _ = page_of(edit(folder, poison), out=tmp_path / "out")
    tags = [tag for tag, _ in page.elements]
    assert (tags.count("script"), tags.count("style"), tags.count("h5")) == (1, 1, 0)
    assert all(str(told["src"]).startswith("data:image/png;base64,") for told in page.of("img"))
    assert not [name for _, told in page.elements for name in told if name.startswith("on")]
    for text in HOSTILE:
        shown = "".join(c if c.isprintable() else "\ufffd" for c in text)
        assert any(shown in told for told in page.texts), text
    html = (tmp_path / "out" / "report.html").read_text()
    assert not {c for c in html if not c.isprintable() and c != "\n"}
    markdown = (tmp_path / "out" / "report.md").read_text()
    for mark in ("<script", "<img", "](javascript", "&amp;"):
        assert mark not in re.sub(r"\\.", "", markdown)
    # every line of a table has as many cells as its head
    for is_table, lines in itertools.groupby(markdown.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


# ------------------------------------------------------------------------------------------ plans and what they take


def token_heads(plan: Told) -> list[int]:
    """Token-heads held at every checkpoint, straight from a plan.json: the sum of the design, term by term."""
    sizes = [t * h * w for t, h, w in plan["schedule"]]
    layers, scales = range(plan["layers"]), len(sizes)
    if "capacity" in plan:
        of_target = [[sum(head[t] for head in heads) for t in range(scales)] + [0] for heads in plan["capacity"]]
    else:
        of_target = [
            [sum(sizes[s] for head in heads for s in range(min(t, scales)) if head[s] >= t) for t in range(scales + 1)]
            for heads in plan["last_read"]
        ]
    return [
        sum(of_target[layer][t + 1 if layer <= done else t] for layer in layers)
        for t in range(scales) for done in layers
    ]  # fmt: skip


def test_the_peak_over_time_is_what_is_planned(compared: Path) -> None:
    page = Page((compared / "report.html").read_text())
    rows = json.loads((compared / "results.json").read_text())["rows"]
    (table,) = page.in_section("plans")
    held = {(row[0], row[1]): numbers for row, numbers in zip(table["rows"], table["numbers"], strict=True)}
    assert len(held) == 1 + len(rows)
    timelines = [str(told["aria-label"]) for told in page.of("svg") if "over time" in str(told.get("aria-label"))]
    kinds = set()
    for row in rows:
        most = 0
        for name in row["plans"]:
            plan = json.loads((compared / "plans" / name).read_text())
            peak = max(token_heads(plan))
            extra = 4 * plan.get("carried", 0) * peak + (4 * 12 * 6 if plan.get("shared") else 0)
            most = max(most, row["rows"] * (peak * 32 * 2 * 4 + extra))
            kinds.add((plan.get("carried", 0) > 0, plan.get("shared", False)))
        assert most == row["planned_bytes"]
        numbers = held[row["policy"], row["budget"]]
        assert (int(numbers[2]), int(numbers[3])) == (most, most)
        if row["policy"] != "full":
            label = f"Memory of {row['policy']} at {row['budget']} over time: at most {most / 2**20:.3f} MiB"
            assert [told for told in timelines if told.startswith(label)]
    assert len(json.loads((compared / "results.json").read_text())["rows"][2]["plans"]) == 2  # random, drawn twice
    assert kinds >= {(False, False), (True, False), (False, True)}


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    """Results of before plans, S-CAS and pictures were kept for a report, of all policies."""
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(ALL_POLICIES, old / "results.json")
    page, data = page_of(old, out=old)
    assert [told["id"] for told in page.of("section")] == [id for id in SECTIONS if id != "memory"]
    notes = [text for text in page.texts if text.startswith(("No plan", "No pictures", "No S-CAS"))]
    assert len(notes) == 3
    assert "made before plans were saved" in notes[1]
    assert len(data["rows"]) == 73
    assert len({row["policy"] for row in data["fidelity"][0]["budgets"]["10%"]}) == 18
    charts = [told for told in page.of("svg") if told.get("class") == "chart"]
    assert len(charts) == 3


def test_files_of_another_run_are_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    plan, picture = folder / "plans" / "heatkv_20percent.json", folder / "pictures" / "heatkv_20percent.png"
    plan.write_bytes((folder / "plans" / "heatkv_30percent.json").read_bytes())
    picture.write_bytes((folder / "pictures" / "heatkv_30percent.png").read_bytes())
    (folder / "pictures" / "random_20percent.png").unlink()
    (folder / "plans" / "adakv_20percent.json").unlink()
    scas = json.loads((folder / "scas.json").read_text())
    scas["provenance"]["fingerprint"] = "another"
    (folder / "scas.json").write_text(json.dumps(scas))
    page, _ = page_of(folder, out=tmp_path / "out")
    notes = "\n".join(text for text in page.texts if text.startswith("No "))
    assert "No plan of heatkv 20%: plans/heatkv_20percent.json is not the plan that was measured." in notes
    assert "No plan of adakv 20%: plans/adakv_20percent.json is not there." in notes
    assert "No pictures of heatkv 20%: pictures/heatkv_20percent.png is of another run." in notes
    assert "No pictures of random 20%: pictures/random_20percent.png is not there." in notes
    assert "No S-CAS: the statistics in this folder are not those of its results." in notes


def test_scas_of_older_folders_is_that_of_their_statistics(folder: Path, tmp_path: Path) -> None:
    (folder / "scas.json").unlink()
    page_of(folder, out=tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_pictures_and_differences_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """A pixel that becomes the full cache's is seen in the strip, and in its difference map."""

    def strips() -> list[str]:
        page, _ = page_of(folder, out=tmp_path / "out")
        return [str(told["src"]) for told in page.of("img") if "samples under heatkv at 20%" in str(told["alt"])]

    def differences() -> list[str]:
        page = Page((tmp_path / "out" / "report.html").read_text())
        return [str(told["src"]) for told in page.of("img") if told.get("class") == "difference"]

    before, maps = strips(), differences()
    path = folder / "pictures" / "heatkv_20percent.png"
    with Image.open(path) as file:
        told, image = PngImagePlugin.PngInfo(), file.copy()
        told.add_text("heatkv", file.info["heatkv"])
    with Image.open(folder / "pictures" / "full_100percent.png") as full:
        image.putpixel((5, 5), full.getpixel((5, 5)))
    image.save(path, pnginfo=told)
    assert len(before) == 1
    assert strips() != before
    changed = [a != b for a, b in zip(maps, differences(), strict=True)]
    assert sum(changed) == 1


def test_large_pictures_make_no_large_page(folder: Path, tmp_path: Path) -> None:
    """Pictures of 384 x 384 pixels of noise for every row."""
    generator = np.random.default_rng(0)
    told = json.loads((folder / "results.json").read_text())
    for row in told["rows"]:
        row["pictures"], row["comparison"] = 8, "large"
        pixels = generator.integers(0, 256, (384, 8 * 386 - 2, 3), dtype=np.uint8)
        info = PngImagePlugin.PngInfo()
        info.add_text("heatkv", "large")
        path = folder / "pictures" / f"{row['policy']}_{row['budget']}.png".replace("%", "percent").replace("-", "_")
        Image.fromarray(pixels).save(path, pnginfo=info, compress_level=1)
    (folder / "results.json").write_text(json.dumps(told))
    page, _ = page_of(folder, out=tmp_path / "out")
    assert len([told for told in page.of("img") if "pictures drawn" in str(told["alt"])]) == 2
    assert (tmp_path / "out" / "report.html").stat().st_size < 6_000_000


# ---------------------------------------------------------------------------------------------------- merging


def machine(**changes: Any) -> Callable[[Told], None]:
    def change(told: Told) -> None:
        told["environment"] |= changes
        for row in told["rows"]:
            row["latency_ms"]["median"] /= 50

    return change


MACHINES: dict[str, dict[str, Any]] = {
    "name": {"device_name": "NVIDIA H100", "device": "cuda"},
    "threads": {"threads": 99},
    "versions": {"versions": {"torch": "9.9"}},
    "system": {"system": "TempleOS"},
    "untold": {"device_name": None},
}


@pytest.mark.parametrize("changes", MACHINES.values(), ids=MACHINES)
def test_times_of_two_machines_are_in_no_common_ranking(changes: Told, folder: Path) -> None:
    data = report_data(merge([folder, another(folder, "server", machine(**changes))]))
    # fidelity and bytes are compared across machines
    (fidelity,) = data["fidelity"]
    assert fidelity["sources"] == ["laptop", "server"]
    assert {row["source"] for row in fidelity["budgets"]["20%"]} == {"laptop", "server"}
    # times are not
    assert [ranking["sources"] for ranking in data["latency"]] == [["laptop"], ["server"]]
    for ranking in data["latency"]:
        assert len({row["source"] for row in ranking["ranking"]}) == 1
        assert len({row["source"] for row in ranking["front"]}) == 1
        medians = [row["median_ms"] for row in ranking["ranking"]]
        assert medians == sorted(medians)
        assert len(medians) == 9


def test_nor_are_they_on_the_page(folder: Path, tmp_path: Path) -> None:
    server = another(folder, "server", machine(threads=99))
    other = another(folder, "other", lambda told: told["request"].update(seed=5))
    page, _ = page_of(folder, server, other, out=tmp_path / "out")
    shares, *tables = page.in_section("latency")
    assert set(column(shares, 0)) == {"laptop", "other"}
    for table, letter, name in zip(tables, "AAB", ("laptop", "other", "server"), strict=True):
        assert table["heading"].startswith(f"machine {letter}: ")
        assert table["heading"].endswith(f"({name})")
        assert [row[1] for row in table["rows"][1:]].count("heatkv") == 2
    assert [len(set(column(table, 0, 2))) for table in page.in_section("rows")] == [1, 1, 1]
    # what was measured on other samples has a ranking of its own, too
    tables = page.in_section("fidelity")
    assert set(column(tables[0], 0)) == {"laptop", "server"}
    assert {row[0] for row in tables[1]["rows"][1:]} == {"heatkv", "random", "adakv", "ams-kv-like"}
    assert [table["heading"] for table in tables] == ["seed 0 (laptop, server)", "seed 5 (other)"]


def column(table: Told, index: int, heads: int = 1) -> list[str]:
    """The folders that the policies of a table are of."""
    return [row[index].rpartition(" · ")[2] for row in table["rows"][heads:]]


def test_times_of_one_machine_at_two_times_are_ranked_apart(folder: Path, tmp_path: Path) -> None:
    again = another(folder, "again", machine(matrix_product_1024_fp32_one_thread_ms=1e6))
    page, data = page_of(folder, again, out=tmp_path / "out")
    assert [ranking["sources"] for ranking in data["latency"]] == [["again"], ["laptop"]]
    assert [len(ranking["ranking"]) for ranking in data["latency"]] == [9, 9]
    assert any("A fixed matrix product took" in text and "1000000.0 ms" in text for text in page.texts)


def of_rows(**changes: Any) -> Callable[[Told], None]:
    return lambda told: [row.update(changes) for row in told["rows"]] and None


APART: dict[str, tuple[Callable[[Told], object], str]] = {
    "seed": (lambda told: told["request"].update(seed=5), "seed 5"),
    "samples": (lambda told: told["request"].update(samples_digest="5"), "samples 5"),
    "images": (of_rows(images=5), "images 5"),
    "pictures": (of_rows(pictures=5), "pictures 5"),
    "weights": (of_rows(model_fingerprint="5"), "weights 5"),
    "type": (of_rows(dtype="bfloat16"), "type bfloat16"),
    "rows": (of_rows(rows=4), "rows 4"),
    "sampling": (lambda told: told["sampling"].update(cfg=5), "cfg 5"),
    "no seed": (lambda told: told.pop("request"), "seed not told by other"),
}


@pytest.mark.parametrize(("change", "title"), APART.values(), ids=APART)
def test_other_measurements_are_told_apart(change: Callable[[Told], object], title: str, folder: Path) -> None:
    data = report_data(merge([folder, another(folder, "other", change)]))
    assert [group["sources"] for group in data["fidelity"]] == [["laptop"], ["other"]]
    assert title in data["fidelity"][1]["of"]


def test_two_folders_without_seeds_are_not_ranked_together(folder: Path) -> None:
    def forget(told: Told) -> None:
        del told["request"]["seed"]

    other = another(edit(folder, forget), "other", lambda told: None)
    data = report_data(merge([folder, other]))
    assert [group["sources"] for group in data["fidelity"]] == [["laptop"], ["other"]]


def test_rows_of_a_sweep_are_told_apart(folder: Path, tmp_path: Path) -> None:
    """Two seeds and two batch sizes: pictures and fidelity of each seed, times of each batch, a label for every row."""

    def sweep(told: Told) -> None:
        told["request"] |= {"seeds": [0, 1], "samples_digest": {"0": "a", "1": "b"}}
        del told["request"]["seed"]
        rows, told["rows"] = told["rows"], []
        for seed, batch in itertools.product((0, 1), (1, 2)):
            for place, row in enumerate(rows):
                comparison = row["comparison"] if seed == 0 else f"{row['comparison']} of seed 1"
                more = {"seed": seed, "batch": batch, "rows": 2 * batch, "comparison": comparison}
                told["rows"].append(copy.deepcopy(row) | more | {"kl": row["kl"] + 0.25 * seed * (place > 0)})
        for row in rows:  # of the second seed, found by what it is of
            stem = artefact_name(f"{row['policy']} {row['budget']}")
            info = PngImagePlugin.PngInfo()
            info.add_text("heatkv", f"{row['comparison']} of seed 1")
            with Image.open(folder / "pictures" / f"{stem}.png") as drawn:
                flipped = drawn.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            flipped.save(folder / "pictures" / f"{stem}_seed1.png", pnginfo=info)

    page, data = page_of(edit(folder, sweep), out=tmp_path / "out")
    assert [(group["of"], group["also"]) for group in data["fidelity"]] == [
        ("seed 0", ["batch 2"]), ("seed 1", ["batch 2"])
    ]  # fmt: skip
    for group in data["fidelity"]:
        assert [len(rows) for rows in group["budgets"].values()] == [4, 4]
    assert len(data["latency"]) == 4
    for group in data["latency"]:
        assert len({(row["batch"], row["seed"]) for row in group["ranking"]}) == 1
        places = [(row["policy"], row["budget"]) for row in group["ranking"]]
        assert len(set(places)) == len(places) == 9
    (table, *_) = page.in_section("rows")
    labels = {(row[0], row[1]) for row in table["rows"][2:]}
    assert len(labels) == 36
    assert {f"heatkv · batch {batch} · seed {seed}" for batch in (1, 2) for seed in (0, 1)} <= {
        one for one, _ in labels
    }
    drawn = [told for told in page.of("img") if "samples under" in str(told["alt"])]
    assert len(drawn) == len({told["src"] for told in drawn}) == 2 * 8
    plans = [text.partition(", ")[0::2] for text in page.texts if text.startswith("Plans at")]
    assert [budget for budget, _ in plans] == ["Plans at 20%", "Plans at 30%"] * 4
    assert [re.sub(r"^\d\.\d{3} MiB, ", "", size) for _, size in plans] == [
        f"batch {batch}, seed {seed}" for seed, batch in itertools.product((0, 1), (1, 2)) for _ in range(2)
    ]
    titles = [text for text in page.texts if text.startswith("Cache of 20%")]
    assert titles == ["Cache of 20%, seed 0", "Cache of 20%, seed 1"]


def test_quantised_rows_stay_in_the_ranking_of_their_folder(folder: Path, tmp_path: Path) -> None:
    def quantise(told: Told) -> None:
        row = copy.deepcopy(told["rows"][1])
        row |= {"storage": "int8/float32", "kl": 0.5, "allocated_bytes": row["allocated_bytes"] // 4, "plans": None}
        told["rows"].append(row)

    page, data = page_of(edit(folder, quantise), out=tmp_path / "out")
    (fidelity,) = data["fidelity"]
    assert len([row for row in fidelity["budgets"]["30%"] if row["policy"] == "heatkv"]) == 2
    labels = {row[0] for row in page.in_section("fidelity")[0]["rows"]}
    assert {"heatkv · float32", "heatkv · int8/float32"} <= labels


def test_merging_does_not_depend_on_the_order(folder: Path, tmp_path: Path) -> None:
    server = another(folder, "server", machine(threads=99))
    nested = another(folder, "nested", lambda told: None)
    same_name = nested / "laptop"  # told apart from the first by the folder it is in
    shutil.copytree(server, same_name)
    written = []
    for place, order in enumerate(itertools.permutations([folder, server, same_name])):
        if place in (0, 5):
            _, data = page_of(*order, out=tmp_path / str(place))
            written.append([(tmp_path / str(place) / f"report.{end}").read_bytes() for end in ("html", "md", "json")])
    assert written[0] == written[1]
    labels = [source["label"] for source in data["sources"]]
    assert labels == [f"{tmp_path.name}/laptop", f"{tmp_path.name}/server", "nested/laptop"] or labels == [
        "nested/laptop", f"{tmp_path.name}/laptop", f"{tmp_path.name}/server",
    ]  # fmt: skip


def test_memory_alone_has_a_report_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile"
    arguments = ["profile", "--policies", "streaming", "--budgets", "20%", "--repeats", "1", "--out", str(out)]
    assert run(arguments) == 0
    capsys.readouterr()
    assert run(["report", str(out), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((out / "report.json").read_text())
    assert data["fidelity"] == []
    assert [row["policy"] for row in data["rows"]] == ["full", "streaming"]
    assert len(data["latency"][0]["ranking"]) == 2
    page = Page((out / "report.html").read_text())
    assert "Fidelity was not measured: there is no KL in these results." in page.texts
    assert [told["id"] for told in page.of("section")] == [
        "summary", "latency", "phases", "memory", *SECTIONS[SECTIONS.index("scas") :],
    ]  # fmt: skip
    _, device, _ = page.in_section("memory")
    peaks = [row["memory"]["tensors"]["peak_bytes"]["drawing"] for row in data["rows"]]
    place = device["rows"][0].index("tensors: drawing, MiB")
    assert [row[place] for row in device["numbers"][1:]] == [str(peak) for peak in peaks]


def test_the_command_merges(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = another(folder, "server", machine(threads=99))
    out = tmp_path / "a" / "both"
    capsys.readouterr()
    assert run(["report", str(folder), str(server), "--out", str(out)]) == 0
    told = json.loads((out / "report.json").read_text())
    assert (told["format"], told["version"], told["model"]) == ("heatkv-report", 1, "emoji")
    assert [row["source"] for row in told["rows"]] == ["laptop"] * 9 + ["server"] * 9
    originals = json.loads((folder / "results.json").read_text())["rows"]
    assert told["rows"][:9] == [{"source": "laptop", **row} for row in originals]
    table = capsys.readouterr().out
    assert "machine A" in table
    assert "machine B" in table
    assert "server" in table


# ----------------------------------------------------------------------------------------------------- bad input


def test_no_results_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no results.json; name one that `heatkv compare`" in refused(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "results.partial.json").write_text("{}")
    assert "its run was not finished; the same command goes on" in refused(capsys, tmp_path / "empty")
    assert "is no folder" in refused(capsys, tmp_path / "absent")
    assert "is no folder" in refused(capsys, folder / "results.json")
    assert "say where to write it with --out" in refused(capsys, folder, folder)
    out = tmp_path / "out"
    assert "is named twice" in refused(capsys, folder, folder / ".", "--out", out)
    assert "has no results.json" in refused(capsys, folder, tmp_path / "empty", "--out", out)
    assert not out.exists()


def test_results_of_another_model_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = another(folder, "other", of_rows(model="var-d16"))
    said = refused(capsys, folder, other, "--out", tmp_path / "out")
    assert "is of the model emoji" in said
    assert "of var-d16; a report compares results of one model" in said
    assert not (tmp_path / "out").exists()


DAMAGED: list[tuple[Callable[[Told], object], str]] = [
    (lambda told: told.update(format="mine"), "has format 'mine', not 'heatkv-results'"),
    (lambda told: told.update(version=2), "this release reads version 1 only"),
    (lambda told: told.update(rows={}), "its rows are {}, no list of rows"),
    (lambda told: told.update(rows=[]), "its rows are [], no list of rows"),
    (lambda told: told.update(rows=[3]), "row 0 is 3, no object"),
    (lambda told: told.update(environment=[]), "its environment is [], no object"),
    (lambda told: told["rows"][1].pop("policy"), "row 1: 'policy' is None; it must be a text"),
    (lambda told: told["rows"][1].update(budget=""), "row 1: 'budget' is ''; it must be a text"),
    (lambda told: told["rows"][1].update(kl="0.1"), "row 1: 'kl' is '0.1'; it must be a finite number"),
    (lambda told: told["rows"][1].update(kl=True), "row 1: 'kl' is True; it must be a finite number"),
    (lambda told: told["rows"][1].update(kl=10**400), "it must be a finite number"),
    (
        lambda told: told["rows"][1].update(planned_bytes=-1),
        "row 1: 'planned_bytes' is -1; it must be a whole number from 0 to",
    ),
    (lambda told: told["rows"][1].update(kl_per_scale=[1]), "'kl_per_scale' is [1]; it must be one number for every"),
    (lambda told: told["rows"][1].update(kl_per_scale=[None] * 8), "it must be a list of finite numbers"),
    (lambda told: told["rows"][1].update(latency_ms=3), "'latency_ms' is 3; it must be an object with the median"),
    (lambda told: told["rows"][1].update(latency_ms={}), "'latency_ms' is {}; it must be an object with the median"),
    (lambda told: told["rows"][1].update(schedule=[[1]]), "row 1: scale 0 is (1,); it must be (t, h, w)"),
    (lambda told: told["rows"][1].update(schedule=[[1, 1]]), "row 1: a schedule needs at least 2 scales"),
    (lambda told: told["rows"][1].update(under_used=1), "'under_used' is 1; it must be true or false"),
    (lambda told: told["rows"][1].update(plans=[]), "'plans' is []; it must be an object"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGED)
def test_damaged_results_are_refused(
    change: Callable[[Told], object], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(capsys, edit(folder, change))
    assert said in told
    assert str(folder / "results.json") in told


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"rows": NaN}'])
def test_foreign_results_are_refused(content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "results.json").write_bytes(content)
    assert str(folder / "results.json") in refused(capsys, folder)


@pytest.mark.parametrize("name", ["plans/heatkv_20percent.json", "pictures/heatkv_20percent.png", "scas.json"])
@pytest.mark.parametrize("content", [b"", b'{"format": "mine"}', b"\x89PNG\r\n\x1a\nnone"])
def test_damaged_files_are_refused(name: str, content: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_bytes(content)
    assert str(folder / name) in refused(capsys, folder)


def test_a_plan_outside_the_folder_is_never_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text("{")
    change = of_rows(plans={"../../outside.json": "0"})
    page, _ = page_of(edit(folder, change), out=tmp_path / "out")
    assert any("outside.json is not there" in text for text in page.texts)


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json"])
def test_foreign_files_are_not_replaced(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_text("mine")
    assert "move it away or write to another folder (--out)" in refused(capsys, folder)
    assert (folder / name).read_text() == "mine"
    capsys.readouterr()
    assert run(["compare", "--policies", "streaming", "--budgets", "30%", "--out", str(folder)]) == 2
    assert "move it away or write to another folder (--out)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ looks

CSS = (ROOT / "profiling" / "report" / "templates" / "report.css").read_text()


def luminance(colour: str) -> float:
    """Of sRGB, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_stand_out(scheme: str) -> None:
    light, dark = CSS.split("@media (prefers-color-scheme: dark)", 1)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light if scheme == "light" else dark.split("*,")[0]))
    grounds = [colours[name] for name in ("paper", "surface", "sunken")]
    for name in ("ink", "soft", "muted", "accent"):
        assert min(contrast(colours[name], ground) for ground in grounds) >= 4.5, name
    for name in ("limit", *(f"series-{index}" for index in range(8))):
        assert contrast(colours[name], colours["surface"]) >= 3, name


@given(
    wanted=st.lists(st.floats(0, 100), min_size=1, max_size=30), least=st.floats(0.1, 20), high=st.floats(50, 200)
)  # fmt: skip
def test_labels_keep_their_order_and_distance(wanted: list[float], least: float, high: float) -> None:
    places = spread_out(wanted, least, 0, high)
    assert all(-1e-6 <= place <= high + 1e-6 for place in places)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(least, high / max(1, len(wanted) - 1))
    for one, other in itertools.pairwise(order):
        assert places[other] - places[one] >= gap * (1 - 1e-6) - 1e-9
    if all(b - a >= least for a, b in itertools.pairwise(sorted(wanted))) and max(wanted) <= high:
        assert places == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_the_page_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """No error in its console, no request, and nothing wider than the window, on a phone and a desk, light and dark."""
    server = another(folder, "server", machine(threads=99))
    long = another(folder, "with-quite-a-long-name-as-folders-have", of_rows(model_fingerprint="x" * 70))
    page_of(folder, out=tmp_path / "one")
    page_of(folder, server, long, out=tmp_path / "three")
    many = tmp_path / "many"
    many.mkdir()
    shutil.copy(ALL_POLICIES, many / "results.json")
    page_of(many, out=many)
    with browser(tmp_path / "profile") as page:
        for name, (width, height), dark in itertools.product(
            ("one", "three", "many"), ((360, 740), (768, 1024), (1280, 900)), (False, True)
        ):
            path = tmp_path / name / "report.html"
            page.requests.clear()
            page.open(path, width, height, dark=dark)
            page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
            assert page.errors == []
            assert [url for url in page.requests if not url.startswith(("data:", path.resolve().as_uri()))] == []
            assert page.evaluate("innerWidth") == width
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(19, 21, 24)" if dark else "rgb(251, 250, 247)")
            # no name of a line is over another, and all lie within the drawing
            assert page.evaluate(OVERLAPS) == []
        # a table is sorted by its heading, down and up
        assert page.evaluate(SORTED) == [True, True]


OVERLAPS = """
[...document.querySelectorAll(':is(section, section > details) > .plot svg.chart')].flatMap(chart => {
  const around = chart.getBoundingClientRect();
  const boxes = [...chart.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  const wrong = boxes.filter(([, box]) => box.right > around.right + 2 || box.left < around.left - 2
    || box.bottom > around.bottom + 2 || box.top < around.top - 2).map(([name]) => 'outside: ' + name);
  boxes.forEach(([name, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    const [wide, high] = [Math.min(a.right, b.right) - Math.max(a.left, b.left),
                          Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)];
    if (wide > 1 && high > 0.3 * Math.min(a.height, b.height)) wrong.push(name + ' over ' + other);
  }));
  return wrong;
})
"""

SORTED = """
(() => {
  const table = document.querySelector('#fidelity table');
  const button = table.tHead.querySelectorAll('button')[1];
  const values = () => [...table.tBodies[0].rows].map(row => Number(row.cells[1].dataset.v));
  const inOrder = sign => values().every((value, i, all) => i === 0 || sign * (value - all[i - 1]) >= 0);
  button.click();
  const up = inOrder(1);
  button.click();
  return [up, inOrder(-1)];
})()
"""
