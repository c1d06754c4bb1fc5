"""The command line: options become calls of the library, results become tables and JSON; bad input gives one line."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.command_line import refused

from heatkv.cli import COMMANDS, run
from heatkv.cli.output import progress
from heatkv.core import io as files
from heatkv.core.plan_file import load_plan
from heatkv.core.statistics import Statistics
from heatkv.parallel.ranks import current
from heatkv.parallel.reporter import shared_progress

ORDERS = Path(__file__).parent / "golden" / "orders" / "2b.json"
GOLDEN = Path(__file__).parent / "golden" / "schedules"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def statistics_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    assert run(["calibrate", "--samples", "2", "--out", str(path)]) == 0
    return path


def facts_of(capsys: Capture, *arguments: str) -> Any:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pixels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.int64)


# --------------------------------------------------------------------------------------- options of library calls


class CalledError(Exception):
    """The library was called with these."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__()
        self.arguments, self.options = arguments, options


def call_of(monkeypatch: pytest.MonkeyPatch, function: str, *command: str) -> CalledError:
    """How a command calls a function of the library."""

    def called(*arguments: Any, **options: Any) -> Any:
        raise CalledError(*arguments, **options)

    monkeypatch.setattr(function, called)
    with pytest.raises(CalledError) as seen:
        run(command)
    return seen.value


@pytest.mark.parametrize("command", ["compare", "profile"])
def test_options_of_measurements(
    command: str, tmp_path: Path, statistics_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [tmp_path / folder / "plan.json" for folder in ("a", "b")]
    for plan in plans:
        plan.parent.mkdir()
        assert run(["solve", "--policy", "streaming", "--budget", "20%", "--out", str(plan)]) == 0
    given = [
        "--policies", "heatkv-lp,streaming", "--set", "value=mass", "--set", "sink-scales=2", "--budgets", "30%,1MiB",
        "--rows", "2,4", "--seed", "3,-1", "--dtype", "int8/float32", "--cfg", "3", "--repeats", "7",
        "--plan", str(plans[0]), "--plan", str(plans[1]), "--statistics", str(statistics_file), "--out", str(tmp_path),
    ]  # fmt: skip
    call = call_of(
        monkeypatch, f"heatkv.profiling.comparison.{command}", "--attention", "ragged", command, *given
    )  # fmt: skip
    model, policies, budgets = call.arguments
    assert model.name == "emoji"
    assert [(p.name, p.sink_scales, getattr(p, "value", None)) for p in policies] == [
        ("heatkv-lp", 2, "mass"), ("streaming", 2, None)
    ]  # fmt: skip
    assert [str(budget) for budget in budgets] == ["30%", "1048576B"]
    options = call.options
    assert list(options["plans"]) == [str(plan) for plan in plans]
    assert options["statistics"] == Statistics.load(statistics_file)
    assert (options["batches"], options["seeds"], options["repeats"]) == ([1, 2], [3, -1], 7)
    assert (options["code"], options["attention"], options["settings"].cfg) == ("int8", "ragged", 3.0)
    assert options["loading"] == {
        "name": "emoji", "prompts": [], "size": None, "ratio": None, "dtype": "float32", "device": "cpu"
    }  # fmt: skip
    assert options["out"] == tmp_path


def test_options_of_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, out = "heatkv.cli.calibrate.calibrate_into", tmp_path / "s"
    given = ["calibrate", "--samples", "20", "--seed", "4", "--append", "--out", str(out)]
    call = call_of(monkeypatch, target, *given, "--levels", "fisher,samples=8,sink-scales=1", "--report", "20%,10%")
    assert call.arguments[0] == out
    assert call.arguments[2] == 20
    options = {name: call.options[name] for name in ("seed", "append", "levels", "level_samples", "sink_scales")}
    assert options == {"seed": 4, "append": True, "levels": "fisher", "level_samples": 8, "sink_scales": 1}
    assert sum(call.options["batch_sizes"]) == 20
    assert (
        call_of(monkeypatch, target, "calibrate", "--out", str(out), "--levels", "error").options["levels"] == "error"
    )


def test_weights_of_a_model_and_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n a red dog \n")
    weights = ["--weights", "folder=1/w.pth", "--weights", "vae=v.pth", "--weights", "text=google/t5"]
    given = ["--model", "infinity-2b", *weights, "--prompts", str(prompts), "--size", "0.25M,3:2"]
    call = call_of(monkeypatch, "heatkv.cli.opening.load_model", "compare", *given, "--out", str(tmp_path / "out"))
    assert call.options == {
        "name": "infinity-2b", "weights": "folder=1/w.pth", "vae": "v.pth", "text_encoder": "google/t5",
        "prompts": ["a cat", "a red dog"], "size": "0.25M", "ratio": 1.5, "dtype": "float32", "device": "cpu",
    }  # fmt: skip


def test_results_are_written_before_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("heatkv.cli.measure.show", gone)
    monkeypatch.setattr("heatkv.cli._discard_output", lambda: None)
    asked = ["profile", "--policies", "streaming", "--budgets", "30%", "--repeats", "1", "--in-process"]
    assert run([*asked, "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 2


def test_compare_prints_a_table_or_its_results(tmp_path: Path, capsys: Capture) -> None:
    few = ["--images", "1", "--pictures", "1", "--repeats", "1", "--samples", "1"]
    given = ["compare", *few, "--policies", "adakv", "--set", "base=hack-like", "--budgets", "20%"]
    assert run([*given, "--out", str(tmp_path)]) == 0
    out, error = capsys.readouterr()
    assert "cache of 2 rows in float32 on cpu, KL and top-1 over 1 images, PSNR and SSIM over 1" in out
    assert "adakv" in out
    assert "calibrating emoji: 1 of 1" in error  # what a composed policy plans from is measured
    assert facts_of(capsys, *given, "--out", str(tmp_path)) == json.loads((tmp_path / "results.json").read_text())


# ---------------------------------------------------------------------------------------------------- solve


@pytest.mark.parametrize("name", ["heatkv_2b_0.05", "heatkv_2b_0.1", "heatkv_2b_0.2"])
def test_solve_equals_the_golden_schedule(tmp_path: Path, name: str, capsys: Capture) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    out = tmp_path / "plan.json"
    command = ["solve", "--model", "infinity-2b", "--policy", "heatkv", "--budget", str(golden["budget"])]
    facts = facts_of(capsys, *command, "--orders", str(ORDERS), "--out", str(out))
    written = json.loads(out.read_text())
    assert written["last_read"] == golden["last_read"]
    assert facts["peak_token_heads"] == written["peak_token_heads"] == golden["peak_tokens"]
    assert facts["planned_bytes"] == golden["peak_tokens"] * 128 * 2 * 2 * 2


def test_orders_of_another_schedule(capsys: Capture) -> None:
    """Taken with a note where the schedule has as many scales, else refused."""
    own = ["solve", "--policy", "heatkv", "--budget", "20%", "--model", "infinity-2b", "--orders", str(ORDERS)]
    for sinks in ("3", "4"):  # a scale more that is never dropped needs no other rankings
        assert run([*own, "--sink-scales", sinks]) == 0
        assert capsys.readouterr().err == ""
    assert run([*own, "--size", "3:2"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "scale by scale from the last cached one backwards" in line
    assert "6 scales" in refused(capsys, *own, "--size", "0.06M")


def test_orders_of_other_sinks(tmp_path: Path, capsys: Capture) -> None:
    """Their number follows from that of the rankings, when it is asked for."""
    golden = json.loads((ORDERS.parents[1] / "schedules" / "rule_var-d16__0.1.json").read_text())
    (tmp_path / "orders.json").write_text(json.dumps(golden["orders"]))
    own = ["solve", "--policy", "heatkv", "--model", "var-d16", "--budget", str(golden["budget"]), "--orders"]
    own += [str(tmp_path / "orders.json"), "--out", str(tmp_path / "plan.json")]
    assert "7 rankings" in refused(capsys, *own)
    assert run([*own, "--sink-scales", "2"]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["last_read"] == golden["last_read"]


def test_solve_knows_other_ratios_and_sinks(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "plan.json"
    base = ["solve", "--model", "infinity-8b", "--policy", "streaming", "--budget", "650tokens", "--out", str(out)]
    assert run([*base, "--size", "0.60M,3:2", "--sink-scales", "2"]) == 0
    plan = load_plan(out)
    assert plan.schedule.scales[-1] == (1, 63, 42)
    assert plan.settings["sink_scales"] == 2
    assert plan.budget_token_heads == 650 * 40 * 28
    for ratio, said in (("1.4", "1.4; taking the nearest, 1.333"), ("4:3", ""), ("0.667", ""), ("7", "the nearest, 3")):
        capsys.readouterr()
        assert run([*base, "--size", ratio]) == 0
        error = capsys.readouterr().err
        assert (said in error) if said else (error == "")


def test_what_solve_certifies(statistics_file: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "plan.json"
    base = ["solve", "--budget", "20%", "--policy"]
    chosen = ["--set", "value=error", "--set", "layer-cap=25%", "--statistics", str(statistics_file)]
    assert run([*base, "heatkv-lp", *chosen, "--out", str(out)]) == 0
    plan, table = load_plan(out), capsys.readouterr().out
    assert dict(plan.settings) == {
        "value": "error", "layer_cap": "25%", "sink_scales": 2, "solve_seconds": 10, "solver": "lp", "budget": "20%",
    }  # fmt: skip
    facts = facts_of(capsys, "solve", "--plan", str(out))
    for name, label, form in (("value", "value", ".6g"), ("value_bound", "value at most", ".6g"),
                              ("gap", "certified gap", ".3%")):  # fmt: skip
        value = getattr(plan, name)
        assert facts[name] == value
        assert re.search(rf"{label} +│ {re.escape(format(value, form))}", table)
    assert run([*base, "streaming"]) == 0
    table = capsys.readouterr().out
    assert "value at most" not in table
    assert "gap" not in table


def test_a_budget_that_is_chosen(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatkv.calibration.run.BIAS_SAMPLES", 1)
    statistics, out = tmp_path / "fisher.safetensors", tmp_path / "plan.json"
    assert run(["calibrate", "--samples", "2", "--levels", "fisher,samples=1", "--out", str(statistics)]) == 0
    solve = ["solve", "--policy", "heatkv-mr", "--set", "cost=fisher", "--statistics", str(statistics)]
    chosen = [*solve, "--set", "max_kl=0.05", "--budget", "auto", "--out", str(out)]
    facts = facts_of(capsys, *chosen)
    assert facts["budget_asked"] == "auto"
    assert 0 < facts["predicted_kl"] <= 0.05
    assert run(["solve", "--plan", str(out)]) == 0
    table = capsys.readouterr().out
    assert f"{facts['budget']:.1%}, the smallest in steps of 0.1% with a predicted KL of at most 0.05" in table
    assert f"{facts['predicted_kl']:.4g} nats per token" in table


def test_a_negative_seed_is_a_seed(tmp_path: Path) -> None:
    for seed in (-5, 5, 7):
        out = ["--seed", str(seed), "--out", str(tmp_path / f"{seed}.json")]
        assert run(["solve", "--policy", "random", "--budget", "20%", *out]) == 0
    plans = [load_plan(tmp_path / f"{seed}.json").to_json()["last_read"] for seed in (-5, 5, 7)]
    assert plans[0] != plans[1]
    assert plans[0] != plans[2]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"model": "var-d16"}, "var-d16"),
        ({"head_dim": 128}, "128"),
        ({"model": "emoji"}, None),
        ({"model": "a third party's"}, None),
    ],
)
def test_plans_of_another_model(change: dict[str, Any], value: str | None, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "plan.json"
    assert run(["solve", "--policy", "streaming", "--budget", "20%", "--out", str(path)]) == 0
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    commands = (["solve"], ["generate", "--label", "cat", "--out", str(tmp_path / "out")],
                ["profile", "--out", str(tmp_path / "out")])  # fmt: skip
    for command in commands if value is not None else ():
        line = refused(capsys, *command, "--plan", str(path))
        assert str(path) in line
        assert value in line
    if value is None:
        assert run(["solve", "--plan", str(path)]) == 0
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- bad input

STREAMING = ["--policy", "streaming", "--budget", "10%"]
HEATKV = ["--policy", "heatkv", "--budget", "10%"]
REFUSED = {
    "solve": [
        (["--policy", "heatvk", "--budget", "10%"], "did you mean 'heatkv'?"),
        (["--model", "infinty-2b", "--budget", "10%"], "did you mean 'infinity-2b'?"),
        (HEATKV, "needs statistics"),
        (["--policy", "streaming"], "needs --budget"),
        (["--policy", "streaming", "--budget", "1%"], "14/230 = 6.09%"),
        (["--policy", "streaming", "--budget", "150%"], "150%"),
        (["--policy", "streaming", "--budget", "10"], "did you mean 10%?"),
        (["--policy", "streaming", "--budget", "5GiB"], "above the full cache"),
        (["--policy", "streaming", "--budget", "ten"], "'ten'"),
        (["--policy", "streaming", "--budget", "10parsec"], "'parsec'"),
        (["--policy", "full", "--budget", "10%"], "100%"),
        ([*STREAMING, "--sink-scales", "9"], "sink_scales=9"),
        ([*STREAMING, "--sink-scales", "2", "--set", "sink-scales=1"], "'sink_scales' is set twice"),
        ([*STREAMING, "--size", "1.5"], "square images only"),
        ([*STREAMING, "--size", "3:"], "'3:'"),
        ([*STREAMING, "--size", "1M"], "1M"),
        ([*STREAMING, "--size", "1M,"], "''"),
        ([*STREAMING, "--dtype", "int3"], "'int3'"),
        ([*STREAMING, "--dtype", "int3/bfloat16"], "'int3'"),
        ([*STREAMING, "--dtype", "int8"], "'int8'"),
        ([*STREAMING, "--rows", "0"], "rows is 0"),
        ([*STREAMING, "--out", "/nonexistent/plan.json"], "/nonexistent"),
        ([*STREAMING, "--out", str(ORDERS)], f"{ORDERS} exists"),
        ([*STREAMING, "--budget", ""], "--budget is empty"),
        ([*STREAMING, "--seed", "three"], "--seed"),
        (["--bugdet", "10%"], "--bugdet"),
        (["--plan", "absent.json"], "absent.json"),
        (["--plan", "absent.json", "--set", "value=mass"], "leave --set out"),
        ([*HEATKV, "--orders", str(ORDERS)], "2b.json"),
        ([*HEATKV, "--statistics", str(ORDERS)], "2b.json"),
        ([*HEATKV, "--statistics", "absent"], "absent"),
        ([*HEATKV, "--orders", "a", "--statistics", "b"], "give one of them"),
        ([*STREAMING, "--set", "value"], "'value'"),
        ([*STREAMING, "--set", "=2"], "'=2'"),
        ([*STREAMING, "--set", "sinkscales=2"], "did you mean 'sink_scales'?"),
        ([*STREAMING, "--set", "sink_scales=2.5"], "'2.5'"),
        (["--policy", "heatkv-lp", "--budget", "10%", "--set", "layer_cap=10parsec"], "'parsec'"),
    ],
    "calibrate": [
        (["--samples", "0"], "samples is 0"),
        (["--append"], "does not exist"),
        (["--out", "absent/s"], "absent"),
        (["--out", "/proc/n"], "/proc"),
        (["--out="], "--out is empty"),
        (["--model", "var-d16"], "var-d16"),
        (["--model", "infinity-2b"], "--prompts"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--levels", "worth"], "'worth'"),
        (["--levels", "error,samples=0"], "0"),
        (["--levels", "error,smaples=1"], "did you mean 'samples'?"),
        (["--levels", "error,sink-scales=8"], "8"),
        (["--report", "1%"], "14/230"),
        (["--report", "20%", "--samples", "1"], "--samples is 1"),
        (["--seed", str(2**64)], str(2**64)),
    ],
    "generate": [
        (["--label", "dragon"], "'dragon'"),
        ([], "--label"),
        (["--label", "cat", "--policy", "streaming"], "needs --budget"),
        (["--label", "cat", "--policy", "snapvk"], "did you mean 'snapkv'?"),
        (["--label", "cat", "--count", "0"], "count is 0"),
        (["--label", "cat", "--cfg", "-1"], "cfg is -1"),
        (["--label", "cat", "--prompt", "a cat"], "draws classes"),
        (["--label", "cat", "--device", "meta"], "meta"),
        (["--label", "cat", "--rows", "3"], "rows=3"),
        (["--label", "cat", "--graphs"], "cpu"),
        (["--label", "cat", "--weights", "a", "--weights", "b"], "'b'"),
        (["--label", "cat", f"--seed={2**64}"], str(2**64)),
        (["--label", "cat", "--follow", "every=2"], "--statistics"),
        (["--label", "cat", "--follow", "half-life=2"], "half-life=2"),
        (["--label", "cat", "--follow", "evry=2"], "did you mean 'every'?"),
        (["--label", "cat", "--follow", "every=few"], "'few'"),
        (["--label", "cat", "--follow", "every=2,adopt-above=3MiB"], "'3MiB'"),
        (["--label", "cat", "--follow", "every=2,adopt-above=5"], "'5'"),
    ],
    "compare": [
        (["--policies", "heatkv,heatkv"], "'heatkv' is named twice"),
        (["--policies", ","], "no policy"),
        (["--policies", "snapkv2"], "'snapkv2'"),
        (["--budgets", "10%,nope"], "'nope'"),
        (["--budgets", "2%"], "14/230"),
        (["--images", "0"], "images is 0"),
        (["--images", "2", "--pictures", "5"], "pictures is 5"),
        (["--rows", "5"], "rows=5"),
        (["--rows", "few"], "'few'"),
        (["--rows", "2,02"], "batch 1 is named twice"),
        (["--seed", "1.5"], "'1.5'"),
        (["--seed", f"0,{2**64}"], str(2**64)),
        (["--plan", "absent.json"], "absent.json"),
        (["--orders", str(ORDERS)], "2b.json"),
        (["--set", "window=2"], "'window'"),
        (["--out", ""], "--out is empty"),
    ],
    "check": [
        (["a", "--against", ""], "--against is empty"),
        (["a", "--against", "b", "--tolerance", "kl"], "'kl'"),
        (["a", "--against", "b", "--tolerance", "lk=5%"], "did you mean 'kl'?"),
        (["a", "--against", "b", "--tolerance", "kl=5"], "'5'"),
        (["a", "--against", "b", "--tolerance", "psnr=much"], "'much'"),
        (["a", "--against", "b", "--tolerance", "ssim=2"], "ssim"),
    ],
    "explain": [([""], "an argument is empty"), (["absent.json"], "absent.json")],
    "sovle": [([], "'sovle'")],
}


@pytest.mark.parametrize(
    ("command", "arguments", "value"),
    [(command, *case) for command, cases in REFUSED.items() for case in cases],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_input(command: str, arguments: list[str], value: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    needed = command in ("calibrate", "generate", "compare") and not any(text.startswith("--out") for text in arguments)
    assert value in refused(capsys, command, *(["--out", str(out)] if needed else []), *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    "content",
    [
        '{"format": "heatkv-plan", "version"', "[1, 2]", '{"format": "heatkv-results", "version": 1}',
        '{"format": "heatkv-plan", "version": 99}', "", "\udcff",
    ],
)  # fmt: skip
def test_files_that_are_no_plans(content: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(path) in refused(capsys, "solve", "--plan", str(path))


def test_statistics_of_something_else(tmp_path: Path, statistics_file: Path, capsys: Capture) -> None:
    statistics = Statistics.load(statistics_file)
    weights, cut = tmp_path / "weights.safetensors", tmp_path / "cut.safetensors"
    replace(statistics, provenance=replace(statistics.provenance, fingerprint="0" * 16)).save(weights)
    cut.write_bytes(statistics_file.read_bytes()[:1000])
    plan = ["--policy", "heatkv", "--budget", "20%", "--statistics"]
    draw = ["generate", "--label", "cat", "--out", str(tmp_path / "out")]
    for command, value in (
        (["solve", *plan, str(weights)], "other weights"),
        (["solve", *plan, str(cut)], str(cut)),
        (["solve", "--model", "var-d16", *plan, str(statistics_file)], "16 x 16"),
        ([*draw, *plan, str(tmp_path)], str(tmp_path)),
        ([*draw, *plan, str(statistics_file), "--cfg", "1"], "cfg 3"),
        (["calibrate", "--append", "--cfg", "1", "--out", str(statistics_file)], "cfg=3"),
        (["calibrate", "--append", "--dtype", "bfloat16", "--out", str(statistics_file)], "dtype=float32"),
        (["calibrate", "--samples", "3", "--out", str(statistics_file)], "append"),
    ):
        assert value in refused(capsys, *command)
    assert Statistics.load(statistics_file) == statistics
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in refused(capsys, "generate", "--label", "cat", "--out", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


# ---------------------------------------------------------------------------------------- calibrate, generate


def test_calibrate_appends_new_samples(tmp_path: Path, statistics_file: Path, capsys: Capture) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(statistics_file.read_bytes())
    given = ["calibrate", "--samples", "2", "--out", str(path)]
    assert run(given) == 0
    assert f"{path} was finished before: nothing is measured" in capsys.readouterr().err
    facts = facts_of(capsys, *given, "--append", "--report", "20%")
    assert facts["samples"] == 4
    assert len(facts["rank_agreement_of_halves"]) == 7
    assert [half["samples_per_half"] for half in facts["report"]["halves"]] == [1]
    assert Statistics.load(path).provenance.samples == ("0:0:0", "0:1:1", "0:2:2", "0:3:3")


def test_generate_writes_a_picture_per_label(tmp_path: Path, capsys: Capture) -> None:
    given = ["generate", *STREAMING[:2], "--budget", "20%", "--label", "pizza", "--label", "3", "--count", "2"]
    out, again = tmp_path / "new" / "folder", tmp_path / "again"
    assert run([*given, "--out", str(out)]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0000_pizza.png", "0001_pizza.png", "0002_watermelon.png", "0003_watermelon.png"]
    pictures = [pixels(out / name) for name in names]
    assert all(picture.shape == (48, 48, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    assert "in place of" not in capsys.readouterr().err
    again.mkdir()
    (again / names[0]).write_bytes(b"")
    assert run([*given, "--rows", "2", "--out", str(again)]) == 0
    assert "again (1 in place of older ones)" in capsys.readouterr().err
    assert np.abs(pixels(again / names[3]) - pictures[3]).max() <= 1


def test_generate_under_a_plan_that_follows(tmp_path: Path, statistics_file: Path, capsys: Capture) -> None:
    out, saved = tmp_path / "out", tmp_path / "followed.safetensors"
    draw = [
        "generate", "--policy", "heatkv", "--budget", "20%", "--statistics", str(statistics_file), "--rows", "8",
        "--label", "cat", "--label", "star", "--count", "2", "--out", str(out), "--follow",
    ]  # fmt: skip
    following = facts_of(capsys, *draw, f"every=2,half-life=4,adopt-above=1%,save={saved}")["following"]
    assert (following["images"], following["measured"], following["solved"]) == (4, 2, 1)
    assert [event["image"] for event in following["events"]] == [4]
    assert following["events"][0]["adopted"] == (following["events"][0]["gain"] > 0.01)
    assert len(list(out.iterdir())) == 4
    assert Statistics.load(saved).provenance.samples[-2:] == ("0:1:21:served", "0:3:31:served")
    for text, value in (
        (f"every=2,save={saved}", f"{saved} exists"),
        (f"every=2,save={out / 'absent' / 's'}", str(out / "absent")),
        ("every=0", "every is 0"),
        ("every=2,half-life=nan", "half_life is nan"),
        ("every=2,memory=10%", "'10%'"),
    ):
        assert value in refused(capsys, *draw, text)
    assert "--graphs" in refused(capsys, *draw, "every=2", "--graphs")


def test_what_was_followed_is_kept_when_drawing_is_stopped(
    tmp_path: Path, statistics_file: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, saved, written = tmp_path / "out", tmp_path / "followed.safetensors", files.replacing

    @contextmanager
    def stopped_at_the_third(path: Path) -> Iterator[Path]:
        if path.name.startswith("0002"):
            raise KeyboardInterrupt
        with written(path) as temporary:
            yield temporary

    monkeypatch.setattr("heatkv.cli.generate.replacing", stopped_at_the_third)
    draw = ["generate", "--policy", "heatkv", "--budget", "20%", "--statistics", str(statistics_file), "--rows", "4"]
    draw += ["--follow", f"every=2,memory=64MiB,save={saved}", "--label", "cat", "--count", "4", "--out", str(out)]
    assert run(draw) == 130
    said = capsys.readouterr().err
    assert f"written before it ended: 2 of 4 images in {out}" in said
    assert f"written: {saved}, statistics with 1 images more" in said
    assert sorted(path.name for path in out.iterdir()) == ["0000_cat.png", "0001_cat.png"]
    assert Statistics.load(saved).provenance.samples[-1].endswith(":served")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_runs_out(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("heatkv.generation.loop.Generator.draw", full)
    assert "out of memory: " in refused(capsys, "generate", "--label", "pizza", "--out", str(tmp_path))


# ------------------------------------------------------------------------------- output, interrupts, what there is


def test_progress_in_a_log(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every tenth, with the time left."""
    with progress("counting", 25) as advance:
        for _ in range(5):
            advance(5)
    assert capsys.readouterr().err.splitlines() == [f"counting: {done} of 25" for done in (5, 10, 15, 20, 25)]
    clock = iter([100.0, 130.0, 220.0, 229.0])
    monkeypatch.setattr("heatkv.cli.output.time.monotonic", lambda: next(clock))
    with progress("counting", 10) as advance:
        for count in (2, 7, 1):
            advance(count)
    # 30 s for two: 120 s for eight; 120 s for nine: 13 s for one
    assert capsys.readouterr().err.splitlines() == [
        "counting: 2 of 10, 2:00 left", "counting: 9 of 10, 0:13 left", "counting: 10 of 10",
    ]  # fmt: skip


def test_progress_of_several_ranks(capsys: Capture) -> None:
    from heatkv.cli.output import SCREEN

    with shared_progress(SCREEN, "counting", 4) as advance:
        current().counter()(0)  # another number that ranks share is counted apart
        for _ in range(2):
            advance(2)
    assert capsys.readouterr().err.splitlines() == ["counting: 2 of 4", "counting: 4 of 4"]


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["calibrate", "--samples", "1"], "result.parts/samples.seed0.000000-000000.safetensors"),
        (["solve", "--policy", "streaming", "--budget", "9%"], "result"),
    ],
)
def test_a_full_disk_is_said_and_leaves_nothing(command: list[str], file: str, tmp_path: Path) -> None:
    """The largest file that may be written is smaller than the result."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
        "from heatkv.__main__ import main; main()"
    )
    given = [sys.executable, "-c", code, *command, "--out", str(tmp_path / "result")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(given, capture_output=True, text=True, env=environment, timeout=600)
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert process.stderr.splitlines()[-1] == f"heatkv: cannot write {tmp_path / file}: File too large"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["policies", "--json"], ["models", "--help"]])
def test_an_output_that_takes_no_more(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "heatkv", *arguments]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
    assert process.returncode == 2
    assert process.stderr == "heatkv: cannot go on: [Errno 28] No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` leaves it
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, "")


INTERRUPTED = """
import os, signal
import heatkv.calibration.run
from heatkv.__main__ import main
measure, batches = heatkv.calibration.run.measure_samples, []
def interrupted(*arguments, **options):
    batches.append(1)
    if len(batches) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return measure(*arguments, **options)
heatkv.calibration.run.measure_samples = interrupted
main()
"""


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    """Ctrl-C while samples are measured: exit code 130, and the finished batches are kept."""
    out = tmp_path / "s.safetensors"
    command = [sys.executable, "-c", INTERRUPTED, "calibrate", "--samples", "4", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, timeout=600)
    assert process.returncode == 130, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-2:] == [
        f"{out}.parts: 1 finished parts are kept, and the same run goes on", "heatkv: stopped"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors.parts"]
    assert Statistics.load(tmp_path / "s.safetensors.parts" / "samples.seed0.000000-000001.safetensors").count == 2


def test_what_there_is(capsys: Capture) -> None:
    models = {row["model"]: row for row in facts_of(capsys, "models")}
    # 6,425 tokens x 32 x 16 heads x 128 channels x 2 rows x 4 bytes
    assert models["infinity-2b"]["full_bytes"] == 6425 * 32 * 16 * 128 * 2 * 4
    assert models["infinity-2b"]["schedule"] == "1,2,4,6,8,12,16,20,24,32,40,48,64"
    assert [entry["cached_tokens"] for entry in models["infinity-2b"]["sizes"]] == [6425, 4121, 1497, 265]
    policies = {row["policy"]: row["options"] for row in facts_of(capsys, "policies")}
    assert {"name": "value", "default": "joint", "type": "joint or error or mass"} in policies["heatkv-lp"]
    assert set(policies) >= {"full", "heatkv", "heatkv-lp", "heatkv-mr", "random", "sliding-window", "streaming"}
    assert facts_of(capsys, "doctor")["models with weights"] == "emoji"
    for command in ("doctor", "models", "policies"):
        assert run([command]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: Capture) -> None:
    assert run([command, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Example: heatkv {command}" in out
    # the names that the documentation links to
    assert pkgutil.resolve_name(f"heatkv.cli.{COMMANDS[command]}:{command.replace('-', '_')}").__doc__


def test_program_options(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr() == ("heatkv 0.1.0\n", "")
    run([])
    assert "compare" in "".join(capsys.readouterr())
    asked = list[bool]()
    monkeypatch.setattr("heatkv.engine.watch.run_deterministically", lambda: asked.append(True))
    given = ["--attention", "rage", "generate", "--label", "cat", "--out", str(tmp_path / "out")]
    assert "rage" in refused(capsys, "--deterministic", *given)
    assert asked == [True]


def test_a_command_of_one_process_is_refused_to_ranks(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatkv.parallel.ranks.Ranks.size", 2)
    assert "solve runs in one process" in refused(capsys, "solve", *STREAMING)
    assert "without torchrun" in refused(capsys, "generate", "--label", "cat", "--out", "out", "--follow", "every=2")


def test_signals_are_told_apart() -> None:
    code = "import os, signal; from heatkv.cli import run; import heatkv.cli as c\n"
    code += "c.join = lambda: os.kill(os.getpid(), signal.SIGTERM); raise SystemExit(run(['models']))"
    process = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=600)
    assert process.returncode == 128 + signal.SIGTERM
    assert process.stderr == "heatkv: stopped\n"
