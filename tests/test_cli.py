"""The command line: every command does its job; bad input gives one line and exit code 2."""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from msgspec import convert
from numpy.typing import NDArray
from PIL import Image

from heatkv.cli import run
from heatkv.cli.output import progress
from heatkv.core import io as files
from heatkv.core.plan_file import load_plan
from heatkv.core.schema import seed_after
from heatkv.core.statistics import Statistics
from heatkv.errors import PolicyError
from heatkv.policies.options import options_of
from heatkv.policies.windows import Streaming
from heatkv.profiling.results.ledgers import Ledgers
from heatkv.profiling.results.row import Fidelity, Memory

ORDERS = Path(__file__).parent / "golden" / "orders" / "2b.json"
GOLDEN = Path(__file__).parent / "golden" / "schedules"


@pytest.fixture(scope="module")
def statistics_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    assert run(["calibrate", "--samples", "2", "--out", str(path)]) == 0
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail: exit code 2, nothing on the output, one line on the error stream."""
    capsys.readouterr()
    assert run(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("heatkv: ")
    return lines[0]


# ------------------------------------------------------------------------------------------------ solve


@pytest.mark.parametrize("name", ["heatkv_2b_0.05", "heatkv_2b_0.1", "heatkv_2b_0.2"])
def test_solve_equals_the_golden_schedule(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    out = tmp_path / "plan.json"
    command = ["solve", "--model", "infinity-2b", "--policy", "heatkv", "--budget", str(golden["budget"])]
    assert run([*command, "--orders", str(ORDERS), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    written = json.loads(out.read_text())
    assert written["last_read"] == golden["last_read"]
    assert told["peak_token_heads"] == written["peak_token_heads"] == golden["peak_tokens"]
    assert told["planned_bytes"] == golden["peak_tokens"] * 128 * 2 * 2 * 2


INFINITY = ["solve", "--policy", "heatkv", "--budget", "20%"]


@pytest.mark.parametrize(
    ("model", "more", "scales"),
    [("8b-512", [], 10), ("8b", ["--size", "0.60M"], 12), ("2b", ["--size", "0.06M"], 7)],
)
@pytest.mark.parametrize("sinks", ["2", "3", "4"])
def test_orders_of_another_number_of_scales_are_refused(
    model: str, more: list[str], scales: int, sinks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = ORDERS.with_name(f"{model[:2]}.json")
    arguments = ["--model", f"infinity-{model}", "--orders", str(orders), "--sink-scales", sinks, *more]
    said = refused(capsys, *INFINITY, *arguments)
    if scales < 10:  # there are more rankings than cached scales
        assert "9 rankings; the schedule caches 6 scales" in said
    else:
        assert "9 rankings are those of a schedule of 13 scales" in said
        assert f"this one has {scales}: plan from statistics of it" in said


@pytest.mark.parametrize(("model", "more"), [("2b", ["--ratio", "3:2"]), ("2b", ["--ratio", "1:2"])])
def test_orders_of_another_schedule_are_taken_with_a_note(
    model: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--model", f"infinity-{model[:2]}", "--orders", str(ORDERS.with_name(f"{model[:2]}.json"))]
    for sinks in ("3", "4"):  # a scale more that is never dropped needs no other rankings
        assert run([*INFINITY, *own, "--sink-scales", sinks]) == 0
        assert capsys.readouterr().err == ""
    assert run([*INFINITY, "--model", f"infinity-{model}", *own[2:], *more]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "scale by scale from the last cached one backwards; heatkv calibrate measures this one" in line


def test_solve_knows_other_ratios_and_sinks(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    base = ["solve", "--model", "infinity-8b", "--policy", "streaming", "--budget", "650tokens", "--out", str(out)]
    assert run([*base, "--size", "0.60M", "--ratio", "3:2", "--sink-scales", "2"]) == 0
    plan = load_plan(out)
    assert plan.schedule.scales[-1] == (1, 63, 42)
    assert plan.sink_scales == 2
    assert plan.budget_token_heads == 650 * 40 * 28


def test_solve_says_what_is_certified_and_nothing_where_nothing_is(
    statistics_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    base = ["solve", "--budget", "20%", "--policy"]
    assert (
        run([*base, "heatkv-lp", "--set", "value=error", "--statistics", str(statistics_file), "--out", str(out)]) == 0
    )
    plan, table = load_plan(out), capsys.readouterr().out
    assert plan.value is not None
    assert plan.value_bound is not None
    for row in (f"value         │ {plan.value:.6g}", f"value at most │ {plan.value_bound:.6g}", "certified gap"):
        assert row in table
    assert run(["solve", "--plan", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["value"], told["value_bound"], told["gap"]) == (plan.value, plan.value_bound, plan.gap)
    assert run([*base, "streaming"]) == 0
    table = capsys.readouterr().out
    assert "value at most" not in table
    assert "gap" not in table


def test_a_budget_that_is_chosen_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = tmp_path / "fisher.safetensors"
    asked = ["--samples", "2", "--levels", "fisher", "--level-samples", "1", "--out", str(statistics)]
    assert run(["calibrate", *asked]) == 0
    out = tmp_path / "plan.json"
    solve = ["solve", "--policy", "heatkv-mr", "--set", "cost=fisher", "--statistics", str(statistics)]
    chosen = [*solve, "--set", "max_kl=0.05", "--budget", "auto", "--out", str(out)]
    capsys.readouterr()
    assert run([*chosen, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["budget_asked"] == "auto"
    assert 0 < told["predicted_kl"] <= 0.05
    for command in (chosen, ["solve", "--plan", str(out)]):
        assert run(command) == 0
        shown = capsys.readouterr().out
        assert f"{told['budget']:.1%}, in steps of 0.1% the smallest with a foretold KL of at most 0.05" in shown
        assert f"{told['predicted_kl']:.4g} nats per token" in shown
    assert run([*solve, "--budget", "20%"]) == 0
    shown = capsys.readouterr().out
    assert "foretold KL" in shown
    assert "the smallest" not in shown
    assert run(["solve", "--policy", "streaming", "--budget", "20%"]) == 0
    assert "foretold KL" not in capsys.readouterr().out


def test_options_of_policies_are_set(statistics_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    base = ["solve", "--budget", "20%", "--policy", "heatkv-lp", "--statistics", str(statistics_file)]
    chosen = ["--set", "value=mass", "--set", "layer-cap=25%", "--set", "sink_scales = 2"]
    assert run([*base, *chosen, "--out", str(out)]) == 0
    assert dict(load_plan(out).settings) == {
        "value": "mass", "layer_cap": "25%", "sink_scales": 2, "solver": "lp", "budget": "20%",
    }  # fmt: skip
    greedy = ["--set", "layer_cap=none", "--set", "value=error", "--set", "solver=greedy"]
    assert run([*base, *greedy, "--out", str(out)]) == 0
    assert load_plan(out).settings["layer_cap"] is None
    draw = ["generate", "--policy", "streaming", "--budget", "20%", "--label", "cat", "--out", str(tmp_path / "out")]
    assert run([*draw, "--set", "sink_scales=2"]) == 0
    assert "has no option 'value'" in refused(capsys, *draw, "--set", "value=mass")


def test_what_a_composed_policy_plans_from_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--samples", "1", "--images", "1", "--pictures", "1", "--repeats", "1"]
    base = ["--policies", "adakv", "--set", "base=hack-like", "--budgets", "20%"]
    assert run(["compare", *base, *sizes, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "statistics.safetensors").exists()
    assert "calibrating emoji: 1 of 1" in capsys.readouterr().err


def test_an_option_goes_to_the_policies_that_have_it(
    statistics_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [
        "profile",
        "--policies",
        "heatkv-lp,streaming",
        "--budgets",
        "20%",
        "--repeats",
        "1",
        "--in-process",
        "--json",
    ]
    base += ["--statistics", str(statistics_file), "--out", str(tmp_path)]
    capsys.readouterr()
    for sinks in (["--sink-scales", "2"], ["--set", "sink_scales=2"]):
        assert run([*base, *sinks, "--set", "value=mass"]) == 0
        told = {row["policy"]: row["settings"] for row in json.loads(capsys.readouterr().out)["rows"]}
        assert (told["heatkv-lp"]["sink_scales"], told["heatkv-lp"]["value"]) == (2, "mass")
        assert (told["streaming"]["sink_scales"], told["full"]["sink_scales"]) == (2, 0)
        assert "value" not in told["streaming"]
    said = refused(capsys, *base, "--set", "window=3")
    assert "none of these policies has an option 'window'" in said
    assert "heatkv-lp: sink_scales, layer_cap, value, solver; streaming: sink_scales" in said


@dataclass(frozen=True)
class Made(Streaming):
    """A policy with an option of every kind; it is never registered."""

    fast: bool = False
    share: float = 0.5
    level: Literal[1, 2, "most"] = "most"
    most: int | None = None
    either: str | int = "x"
    window: tuple[int, ...] = (1, 2)
    names: dict[str, int] | None = field(default_factory=dict)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("fast", "true", True), ("fast", "No", False), ("fast", "1", True), ("share", "1e-3", 0.001),
        ("share", "3", 3.0), ("level", "2", 2), ("level", "most", "most"), ("most", "7", 7), ("most", "none", None),
        ("either", "12", 12), ("either", "12%", "12%"), ("sink_scales", "-1", -1),
    ],
)  # fmt: skip
def test_values_are_read_by_the_type_of_the_option(name: str, text: str, value: object) -> None:
    read = options_of(Made)[name].parse(text, "made")
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("fast", "2", "fast of policy 'made' is true or false, not '2'"),
        ("share", "inf", "is a number, not 'inf'"),
        ("share", "half", "is a number, not 'half'"),
        ("level", "3", "is 1 or 2 or most, not '3'"),
        ("most", "few", "is a whole number or none, not 'few'"),
        ("window", "1,2", "option 'window' of policy 'made' can only be set in Python"),
        ("names", "{}", "option 'names' of policy 'made'"),
    ],
)
def test_values_of_another_type_are_refused(name: str, text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(said)):
        options_of(Made)[name].parse(text, "made")


def test_options_are_listed_as_they_are_set() -> None:
    assert [str(option) for option in options_of(Made).values()] == [
        "sink_scales=3", "fast=false", "share=0.5", "level=most (1 or 2 or most)", "most=none (a whole number or none)",
        "either=x", "window=(1, 2) (in Python only)", "names={} (in Python only)",
    ]  # fmt: skip


def test_a_ratio_that_no_template_has_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["solve", "--model", "infinity-2b", "--policy", "streaming", "--budget", "10%", "--json"]
    for ratio, said in (("1.4", "1.4; taking the nearest, 1.333"), ("4:3", ""), ("0.667", ""), ("7", "the nearest, 3")):
        assert run([*base, "--ratio", ratio]) == 0
        out, error = capsys.readouterr()
        assert json.loads(out)["schedule"]
        assert (said in error) if said else (error == "")


def test_a_plan_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert run(["solve", "--policy", "streaming", "--budget", "20%", "--out", str(path)]) == 0
    given = {
        "solve": [],
        "generate": ["--label", "cat", "--out", str(tmp_path / "out")],
        "profile": ["--out", str(tmp_path / "out")],
    }
    told = json.loads(path.read_text())
    for model, fits in (("var-d16", False), ("emoji", True), ("a third party's", True)):
        path.write_text(json.dumps(told | {"model": model}))
        for command, options in given.items():
            if fits:
                assert run(["solve", "--plan", str(path)]) == 0
            else:
                said = refused(capsys, command, "--plan", str(path), *options)
                assert f"{path} was made for var-d16, not for emoji" in said
    assert not (tmp_path / "out").exists()


def test_progress_in_a_log_is_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting", 25) as advance:
        for _ in range(5):
            advance(5)
    assert capsys.readouterr().err.splitlines() == [f"counting: {done} of 25" for done in (5, 10, 15, 20, 25)]
    with progress("counting", 100) as advance:
        for _ in range(100):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [f"counting: {done} of 100" for done in range(10, 101, 10)]


def test_progress_in_a_log_tells_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 130.0, 220.0, 229.0])
    monkeypatch.setattr("heatkv.cli.output.time.monotonic", lambda: next(clock))
    with progress("counting", 10) as advance:
        for count in (2, 7, 1):
            advance(count)
    # 30 s for two: 120 s for eight; 120 s for nine: 13 s for one
    assert capsys.readouterr().err.splitlines() == [
        "counting: 2 of 10, 2:00 left", "counting: 9 of 10, 0:13 left", "counting: 10 of 10",
    ]  # fmt: skip


def test_solve_describes_a_plan_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert run(["solve", "--policy", "streaming", "--budget", "20%", "--out", str(out)]) == 0
    capsys.readouterr()
    assert run(["solve", "--plan", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policy"] == "streaming"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "heatvk", "--budget", "10%"], "did you mean 'heatkv'?"),
        (["--model", "infinty-2b", "--budget", "10%"], "did you mean 'infinity-2b'?"),
        (["--policy", "heatkv", "--budget", "10%"], "needs statistics"),
        (["--policy", "streaming"], "needs --budget"),
        (["--policy", "streaming", "--budget", "1%"], "is below 14/230 = 6.09%, the 3 sink scales"),
        (["--policy", "streaming", "--budget", "150%"], "above 100 %"),
        (["--policy", "streaming", "--budget", "10"], "did you mean 10%?"),
        (["--policy", "streaming", "--budget", "150"], "budget 150 is above 1, the full cache; write it as 10%"),
        (["--policy", "streaming", "--budget", "5GiB"], "above the full cache"),
        (["--policy", "streaming", "--budget", "0"], "not above zero"),
        (["--policy", "streaming", "--budget", "-5%"], "cannot read the budget"),
        (["--policy", "streaming", "--budget", "ten"], "cannot read the budget"),
        (["--policy", "streaming", "--budget", "10parsec"], "unknown unit 'parsec'"),
        (["--policy", "full", "--budget", "10%"], "its budget is 100%"),
        (["--policy", "streaming", "--budget", "10%", "--sink-scales", "9"], "sink_scales=9"),
        (["--policy", "streaming", "--budget", "10%", "--ratio", "1.5"], "square images only"),
        (["--policy", "streaming", "--budget", "10%", "--ratio", "wide"], "cannot read the height/width ratio"),
        (["--policy", "streaming", "--budget", "10%", "--size", "1M"], "emoji is published for 48, not 1M; leave"),
        (
            ["--model", "var-d30", "--policy", "streaming", "--budget", "10%", "--size", "1M"],
            "VAR has no 1M px schedule",
        ),
        (
            ["--model", "var-d30", "--policy", "streaming", "--budget", "10%", "--size", "512"],
            "var-d30 is published for 256, not 512; use var-d36 for 512",
        ),
        (
            ["--model", "var-d36", "--policy", "streaming", "--budget", "10%", "--size", "1024"],
            "var-d36 is published for 512, not 1024; leave the size out",
        ),
        (
            ["--model", "infinity-8b-512", "--policy", "streaming", "--budget", "10%", "--size", "0.60M"],
            "published for 0.25M, not 0.60M; use infinity-8b for 0.60M",
        ),
        (["--policy", "streaming", "--budget", "10%", "--device", "gpu"], "unknown device 'gpu'; write cpu, cuda"),
        (["--policy", "streaming", "--budget", "1e-9"], "is below 14/230 = 6.09%, the 3 sink scales"),
        (["--policy", "streaming", "--budget", "1e999"], "above 1, the full cache"),
        (["--policy", "streaming", "--budget", "10%", "--dtype", "int3"], "unknown dtype"),
        (["--policy", "streaming", "--budget", "1MiB", "--rows", "0"], "rows is 0"),
        (
            ["--policy", "streaming", "--budget", "10%", "--out", "/nonexistent/plan.json"],
            "the folder /nonexistent does not exist",
        ),
        (["--plan", "absent.json"], "cannot read absent.json"),
        (["--policy", "heatkv", "--budget", "10%", "--orders", str(ORDERS)], "12 layers x 6 heads = 72"),
        (["--policy", "heatkv", "--budget", "10%", "--statistics", str(ORDERS)], "not a whole statistics file"),
        (["--policy", "heatkv", "--budget", "10%", "--statistics", "absent"], "cannot read absent"),
        (["--policy", "streaming", "--budget", "10%", "--cfg", "-1"], "cfg is -1"),
        (["--policy", "heatkv", "--budget", "10%", "--orders", "a", "--statistics", "b"], "give one of them"),
        (["--plan", "absent.json", "--sink-scales", "2"], "leave --sink-scales out"),
        (["--plan", "absent.json", "--set", "value=mass"], "leave --set out"),
        (["--policy", "streaming", "--budget", "10%", "--set", "value"], "write it as name=value"),
        (["--policy", "streaming", "--budget", "10%", "--set", "=2"], "write it as name=value"),
        (
            ["--policy", "streaming", "--budget", "10%", "--set", "vlaue=2"],
            "no option 'vlaue'. Options of streaming: sink_",
        ),
        (["--policy", "streaming", "--budget", "10%", "--set", "sinkscales=2"], "did you mean 'sink_scales'?"),
        (["--policy", "streaming", "--budget", "10%", "--set", "sink_scales=2.5"], "is a whole number, not '2.5'"),
        (["--policy", "streaming", "--budget", "10%", "--set", "sink_scales=9"], "sink_scales=9 does not fit"),
        (
            ["--policy", "heatkv-lp", "--budget", "10%", "--set", "value=worth"],
            "is joint or error or mass, not 'worth'",
        ),
        (["--policy", "heatkv-lp", "--budget", "10%", "--set", "layer_cap=10parsec"], "unknown unit 'parsec'"),
        (
            ["--policy", "heatkv-lp", "--budget", "10%", "--set", "value=mass", "--set", "value=error"],
            "'value' is set twice",
        ),
        (["--policy", "streaming", "--budget", "10%", "--sink-scales", "2", "--set", "sink-scales=1"], "is set twice"),
        (["--policy", "streaming", "--budget", "10%", "--ratio", "3:"], "cannot read the height/width ratio"),
        (["--bugdet", "10%"], "No such option"),
        (["--seed", "three"], "Invalid value for '--seed'"),
    ],
)
def test_solve_refuses(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, "solve", *arguments)


def test_files_of_another_kind_are_refused(
    tmp_path: Path, statistics_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content, said in (
        ("cut.json", '{"format": "heatkv-plan", "version"', "is not JSON"),
        ("list.json", "[1, 2]", "holds no JSON object"),
        ("other.json", '{"format": "heatkv-results", "version": 1}', "'heatkv-results', not 'heatkv-plan'"),
        ("later.json", '{"format": "heatkv-plan", "version": 99}', "version 99"),
        ("empty.json", "", "is not JSON"),
        ("bytes.json", "\udcff", "is not JSON"),
    ):
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        assert said in refused(capsys, "solve", "--plan", str(tmp_path / name))
    data = statistics_file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    plan = ["--policy", "heatkv", "--budget", "20%", "--statistics"]
    assert "not a whole statistics file" in refused(capsys, "solve", *plan, str(tmp_path / "cut.safetensors"))
    assert "the model has 16 x 16" in refused(capsys, "solve", "--model", "var-d16", *plan, str(statistics_file))
    out = ["--label", "cat", "--out", str(tmp_path / "out")]
    assert "cannot read" in refused(capsys, "generate", *plan[:4], "--statistics", str(tmp_path), *out)
    assert (
        run(["solve", "--model", "var-d16", "--policy", "streaming", "--budget", "20%", "--out", str(tmp_path / "p")])
        == 0
    )
    assert "the model has 12 x 6" in refused(capsys, "generate", "--plan", str(tmp_path / "p"), *out)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- calibrate, generate


def pixels(path: Path) -> NDArray[np.int64]:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.int64)


def test_calibrate_appends_new_samples(
    tmp_path: Path, statistics_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(statistics_file.read_bytes())
    assert run(["calibrate", "--samples", "2", "--append", "--out", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 4
    assert Statistics.load(path).provenance.samples == ("0:0:0", "0:1:1", "0:2:2", "0:3:3")
    before = path.read_bytes()
    assert "exists; add samples to it with --append" in refused(capsys, "calibrate", "--out", str(path))
    for other, said in (
        (["--cfg", "1"], "was measured at cfg 3, this run has 1"),
        (["--dtype", "bfloat16"], "was measured with dtype=float32, this run has dtype=bfloat16"),
    ):
        assert said in refused(capsys, "calibrate", "--samples", "1", *other, "--append", "--out", str(path))
    assert path.read_bytes() == before
    for arguments, said in (
        (["--samples", "0", "--out", str(tmp_path / "n")], "--samples is 0"),
        (["--append", "--out", str(tmp_path / "n")], "does not exist"),
        (["--out", str(tmp_path / "no" / "n")], "does not exist"),
        (["--model", "var-d16", "--out", str(tmp_path / "n")], "needs its weights"),
        (["--device", "cuda:77", "--out", str(tmp_path / "n")], "cannot be used here"),
        (["--out", "/proc/n"], "cannot write in the folder /proc"),
        (["--level-samples", "4", "--out", str(tmp_path / "n")], "say which to measure with --levels"),
        (["--levels", "error", "--level-samples", "0", "--out", str(tmp_path / "n")], "--level-samples is 0"),
        ([], "Missing option '--out'"),
    ):
        assert said in refused(capsys, "calibrate", *arguments)


def test_statistics_of_other_weights_are_refused(
    tmp_path: Path, statistics_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    statistics = Statistics.load(statistics_file)
    other = replace(statistics, provenance=replace(statistics.provenance, fingerprint="0" * 16))
    other.save(tmp_path / "other.safetensors")
    arguments = ["--policy", "heatkv", "--budget", "20%", "--statistics", str(tmp_path / "other.safetensors")]
    assert "measured on other weights" in refused(capsys, "solve", *arguments)


def test_statistics_of_other_guidance_are_refused(
    tmp_path: Path, statistics_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--policy", "heatkv", "--budget", "20%", "--statistics", str(statistics_file), "--cfg", "1"]
    out = ["--label", "cat", "--out", str(tmp_path / "out")]
    assert "was measured at cfg 3, this run has 1" in refused(capsys, "generate", *arguments, *out)


def test_a_negative_seed_is_a_seed(tmp_path: Path) -> None:
    for seed in (-5, 5, 7):
        out = ["--seed", str(seed), "--out", str(tmp_path / f"{seed}.json")]
        assert run(["solve", "--policy", "random", "--budget", "20%", *out]) == 0
    plans = [load_plan(tmp_path / f"{seed}.json").last_read for seed in (-5, 5, 7)]
    assert not np.array_equal(plans[0], plans[1])
    assert not np.array_equal(plans[0], plans[2])


def test_generate_under_a_plan_that_follows(
    tmp_path: Path, statistics_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saved = tmp_path / "out", tmp_path / "followed.safetensors"
    draw = [
        "generate", "--policy", "heatkv", "--budget", "20%", "--statistics", str(statistics_file), "--rows", "8",
        "--label", "cat", "--label", "star", "--count", "2", "--out", str(out), "--follow-every", "2",
    ]  # fmt: skip
    capsys.readouterr()
    assert run([*draw, "--half-life", "4", "--adopt-above", "1%", "--save-statistics", str(saved), "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)["following"]
    assert "followed: 2 images measured, 1 plans solved, " in printed.err
    assert (told["images"], told["measured"], told["solved"]) == (4, 2, 1)
    assert [event["image"] for event in told["events"]] == [4]
    assert told["events"][0]["adopted"] == (told["events"][0]["gain"] > 0.01)
    assert [path.name for path in sorted(out.iterdir())] == [
        f"000{i}_{c}.png" for i, c in enumerate(["cat"] * 2 + ["star"] * 2)
    ]
    statistics = Statistics.load(saved)
    assert statistics.provenance.samples[-2:] == ("0:1:21:served", "0:3:31:served")
    # they can be planned from
    assert run(["solve", "--policy", "heatkv", "--budget", "20%", "--statistics", str(saved)]) == 0
    for arguments, said in (
        (draw[:5] + draw[7:], "begins with --statistics"),
        (draw[:3] + draw[5:], "a plan that follows needs --budget"),
        ([*draw[:2], "streaming", *draw[3:5], *draw[7:]], "plans from nothing measured"),
        ([*draw, "--save-statistics", str(saved)], f"{saved} exists; name another file (--save-statistics)"),
        ([*draw, "--save-statistics", str(tmp_path)], f"--save-statistics {tmp_path} is a folder; name a file"),
        ([*draw, "--save-statistics", str(out / "absent" / "s")], f"the folder {out / 'absent'} does not exist"),
        ([*draw, "--graphs"], "no --plan or --graphs"),
        ([*draw, "--adopt-above", "3MiB"], "is no share"),
        ([*draw, "--half-life", "0"], "--half-life is 0"),
        ([*draw, "--follow-every", "0"], "every is 0"),
        ([*draw, "--rows", "2"], "draw 4 at a time (in commands --rows 8)"),
        ([*draw[:-2], "--half-life", "3"], "--half-life is for a plan that follows; add --follow-every"),
        ([*draw[:-2], "--save-statistics", "x"], "--save-statistics is for a plan that follows"),
    ):
        assert said in refused(capsys, *arguments)
    plan = tmp_path / "plan.json"
    assert run(["solve", "--policy", "streaming", "--budget", "20%", "--out", str(plan)]) == 0
    arguments = ["generate", "--plan", str(plan), "--label", "cat", "--out", str(out), "--follow-every", "2"]
    assert "--follow-every makes plans as it goes" in refused(capsys, *arguments)


def test_what_was_followed_is_kept_when_drawing_is_stopped(
    tmp_path: Path, statistics_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, saved = tmp_path / "out", tmp_path / "followed.safetensors"
    written = files.replacing

    @contextmanager
    def stopped_at_the_third(path: Path) -> Iterator[Path]:
        if path.name.startswith("0002"):
            raise KeyboardInterrupt
        with written(path) as temporary:
            yield temporary

    monkeypatch.setattr("heatkv.cli.generate.replacing", stopped_at_the_third)
    draw = ["generate", "--policy", "heatkv", "--budget", "20%", "--statistics", str(statistics_file), "--rows", "4"]
    draw += ["--follow-every", "2", "--measuring-memory", "64MiB", "--label", "cat", "--count", "4"]
    assert run([*draw, "--out", str(out), "--save-statistics", str(saved)]) == 130
    said = capsys.readouterr().err
    assert f"written before it ended: 2 of 4 images in {out}" in said
    assert f"written: {saved}, statistics with 1 images more" in said
    assert sorted(path.name for path in out.iterdir()) == ["0000_cat.png", "0001_cat.png"]
    assert Statistics.load(saved).provenance.samples[-1].endswith(":served")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "--out", ""], "--out is empty"),
        (["compare", "--out="], "--out is empty"),
        (["solve", "--budget", "", "--policy", "streaming"], "--budget is empty"),
        (["explain", ""], "an argument is empty"),
        (["check", "results.json", "--against", ""], "--against is empty"),
    ],
)
def test_what_is_empty_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


def test_the_largest_seed_has_other_samples_to_compare(tmp_path: Path) -> None:
    largest = 2**62
    assert seed_after(largest) == -largest
    assert seed_after(5, 3) == 8
    arguments = ["compare", "--policies", "random", "--budgets", "50%", "--seed", str(largest), "--draws", "2"]
    few = ["--images", "1", "--pictures", "1", "--repeats", "1"]
    assert run([*arguments, *few, "--out", str(tmp_path / "compared")]) == 0


def test_generate_writes_a_picture_per_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "--policy",
        "streaming",
        "--budget",
        "20%",
        "--label",
        "pizza",
        "--label",
        "3",
        "--count",
        "2",
    ]
    assert run([*arguments, "--out", str(tmp_path / "new" / "folder")]) == 0
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["0000_pizza.png", "0001_pizza.png", "0002_watermelon.png", "0003_watermelon.png"]
    pictures = [pixels(tmp_path / "new" / "folder" / name) for name in files]
    assert all(picture.shape == (48, 48, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    assert "in place of" not in capsys.readouterr().err
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / files[0]).write_bytes(b"")
    assert run([*arguments, "--rows", "2", "--no-graphs", "--out", str(tmp_path / "again")]) == 0
    assert "again (1 in place of older ones)" in capsys.readouterr().err
    assert np.abs(pixels(tmp_path / "again" / files[3]) - pictures[3]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--label", "dragon"], "no class 'dragon'"),
        (["--label", "cat", "--policy", "streaming"], "needs --budget"),
        (["--label", "cat", "--policy", "snapvk"], "did you mean 'snapkv'?"),
        (["--label", "cat", "--count", "0"], "--count is 0"),
        (["--label", "cat", "--orders", "a", "--statistics", "b"], "give one of them"),
        (["--label", "cat", "--cfg", "-1"], "cfg is -1"),
        (["--label", "cat", "--prompt", "a cat"], "draws classes, not prompts"),
        (["--label", "cat", "--device", "meta"], "cannot be used here"),
        (["--label", "cat", "--rows", "3"], "rows=3"),
        (["--label", "cat", "--graphs"], "CUDA graphs need a CUDA device; the model is on cpu"),
        ([], "is to draw with --label"),
    ],
)
def test_generate_refuses(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, "generate", *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert "is a file; name another" in refused(capsys, "generate", "--label", "cat", "--out", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


# ---------------------------------------------------------------------------------------- profile, compare


def test_profile_measures_bytes_and_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["profile", "--policies", "streaming", "--budgets", "20%", "--repeats", "2", "--json"]
    arguments += ["--trace", str(tmp_path / "traces"), "--in-process"]
    assert run([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["policy"] for row in rows] == ["full", "streaming"]
    assert rows[1]["allocated_bytes"] <= 0.2 * rows[0]["allocated_bytes"]
    assert all(row["latency_ms"]["runs"] == 2 and row["latency_ms"]["median"] > 0 for row in rows)
    unmeasured = ("kl", "graph_latency_ms", "graph_pool_bytes")
    assert all(row[name] is None for row in rows for name in unmeasured)
    assert len(list((tmp_path / "traces").glob("*.pt.trace.json"))) == 2


SMALL = ["--samples", "2", "--images", "2", "--pictures", "1", "--repeats", "1", "--draws", "2"]


def test_compare_does_the_main_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "mine.json"
    assert run(["solve", "--policy", "streaming", "--budget", "15%", "--dtype", "float32", "--out", str(plan)]) == 0
    out = tmp_path / "out"
    arguments = ["compare", *SMALL, "--policies", "heatkv,random", "--budgets", "30%", "--plan", str(plan)]
    assert run([*arguments, "--out", str(out)]) == 0
    table = capsys.readouterr().out
    told = json.loads((out / "results.json").read_text())
    rows = {row["policy"]: row for row in told["rows"]}
    assert list(rows) == ["full", "heatkv", "random", "streaming (mine.json)"]
    assert all(name.split()[0] in table for name in rows)
    assert rows["full"]["kl"] == 0
    for name, row in rows.items():
        assert row["planned_bytes"] == row["allocated_bytes"] <= row["budget_bytes"]
        assert name == "full" or row["kl"] > 0
    assert len(rows["random"]["kl_of_draws"]) == 2 == rows["random"]["draws"]
    assert {path.name for path in out.iterdir()} == {
        "results.json", "statistics.safetensors", "images_30percent.png", "images_15percent.png", "scas.png",
        "scas.json", "pictures", "plans", "report.html",
    }  # fmt: skip
    for name in ("images_30percent.png", "scas.png"):
        with Image.open(out / name) as picture:
            assert picture.size[0] > 100

    # elsewhere, with the same statistics, it gives the same figures
    again = [*arguments, "--out", str(tmp_path / "again")]
    assert run([*again, "--statistics", str(out / "statistics.safetensors")]) == 0
    for row in rows_of(tmp_path / "again"):
        assert {name: row[name] for name in vars(Fidelity())} == {
            name: rows[row["policy"]][name] for name in vars(Fidelity())
        }


def rows_of(folder: Path, name: str = "results.json") -> list[dict[str, Any]]:
    rows = json.loads((folder / name).read_text())["rows"]
    assert isinstance(rows, list)
    return rows


def test_a_used_folder_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["compare", *SMALL, "--budgets", "30%", "--out", str(out)]
    assert run([*arguments, "--policies", "heatkv,random"]) == 0
    first, measured = rows_of(out), (out / "statistics.safetensors").read_bytes()
    sheet = (out / "images_30percent.png").read_bytes()
    capsys.readouterr()

    # the same again takes all comparisons from there; the sheet shows the pictures of the earlier run
    assert run([*arguments, "--policies", "heatkv,random"]) == 0
    assert "3 of 3 comparisons were made before" in capsys.readouterr().err
    assert [{name: row[name] for name in vars(Fidelity())} for row in rows_of(out)] == [
        {name: row[name] for name in vars(Fidelity())} for row in first
    ]
    assert (out / "statistics.safetensors").read_bytes() == measured
    assert (out / "images_30percent.png").read_bytes() == sheet
    assert not list(out.glob("results.[0-9]*.json"))

    # other policies: the earlier rows are kept, and serve
    assert run([*arguments, "--policies", "heatkv,streaming"]) == 0
    said = capsys.readouterr().err
    assert "2 of 3 comparisons were made before" in said
    assert f"they are in {out / 'results.1.json'} now" in said.replace("\n", " ")
    assert {row["policy"]: row["kl"] for row in rows_of(out, "results.1.json")} == {
        row["policy"]: row["kl"] for row in first
    }
    # times alone lose none of it, and other seeds, counts or precision are other comparisons
    assert run(["profile", "--policies", "heatkv", "--statistics", str(out / "statistics.safetensors"), *arguments[-2:],
                "--budgets", "30%", "--repeats", "1", "--in-process"]) == 0  # fmt: skip
    assert rows_of(out)[1]["kl"] is None
    assert {row["policy"] for row in rows_of(out, "results.2.json")} == {"full", "heatkv", "streaming"}
    capsys.readouterr()
    assert run([*arguments, "--policies", "random", "--images", "3"]) == 0
    assert "were made before" not in capsys.readouterr().err

    # a picture that is missing, damaged or of another run is drawn again
    pictures = out / "pictures"
    for aside in pictures.glob("*.*.png"):  # of earlier runs
        aside.unlink()
    (pictures / "heatkv_30percent.png").write_bytes((pictures / "random_30percent.png").read_bytes())
    (pictures / "full_100percent.png").write_bytes(b"none")
    assert run([*arguments, "--policies", "heatkv,random"]) == 0
    assert "were made before" not in capsys.readouterr().err
    assert (out / "images_30percent.png").read_bytes() == sheet


@pytest.mark.parametrize("name", ["results.json", "results.partial.json", "scas.json", "statistics.safetensors"])
@pytest.mark.parametrize("content", ['{"format": "mine"}', '{"format": "heatkv-results", "version": 1}', "{"])
def test_compare_replaces_no_foreign_file(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    said = refused(capsys, "compare", *SMALL, "--policies", "heatkv", "--budgets", "30%", "--out", str(tmp_path))
    assert str(tmp_path / name) in said
    assert "write to another folder (--out)" in said
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "1"], "holds 2 other samples than the 1 of this run; plan from it with --statistics"),
        (["--seed", "1"], "holds 2 other samples than the 2 of this run; plan from it with --statistics"),
        (["--cfg", "1"], "was measured at cfg 3, this run has 1"),
        (["--dtype", "bfloat16"], "was measured with dtype=float32, this run has dtype=bfloat16"),
    ],
)
def test_compare_replaces_no_other_statistics(
    arguments: list[str], said: str, statistics_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(statistics_file.read_bytes())
    given = ["--samples", "2", "--policies", "heatkv", "--budgets", "30%", *arguments, "--out", str(tmp_path)]
    told = refused(capsys, "compare", *given)
    assert said in told
    assert "write to another folder (--out)" in told
    assert path.read_bytes() == statistics_file.read_bytes()


def test_a_killed_comparison_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed while the third subject is compared: the first two are kept, and a new run takes them."""
    arguments = ["compare", *SMALL, "--policies", "heatkv,streaming", "--budgets", "30%", "--out", str(tmp_path)]
    command = [sys.executable, "-c", KILLED, *arguments]
    process = subprocess.run(command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    assert process.returncode == -signal.SIGKILL, process.stderr
    kept = rows_of(tmp_path, "results.partial.json")
    assert [row["kl"] is None for row in kept] == [False, False, True]
    assert all(row["latency_ms"] is not None for row in kept)
    assert not (tmp_path / "results.json").exists()
    # another run in between loses nothing of it
    assert run(["profile", "--policies", "streaming", *arguments[-4:], "--repeats", "1", "--in-process"]) == 0
    capsys.readouterr()
    assert run(arguments) == 0
    assert "2 of 3 comparisons were made before" in capsys.readouterr().err
    assert [row["kl"] for row in rows_of(tmp_path)[:2]] == [row["kl"] for row in kept[:2]]
    assert rows_of(tmp_path)[2]["kl"] > 0
    assert not (tmp_path / "results.partial.json").exists()


@pytest.mark.parametrize(
    ("seeds", "kills"), [([0], (4,)), pytest.param([0, 1], (1, 6, 6, 5), marks=pytest.mark.slow)], ids=["one", "two"]
)
def test_a_sweep_over_batches_and_seeds(
    seeds: list[int],
    kills: tuple[int, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while it measures, it goes on: what is finished stays as it is and is not measured again."""
    arguments = ["compare", *SMALL[2:], "--policies", "random", "--budgets", "30%", "--batches", "1,2"]
    arguments += ["--seeds", ",".join(map(str, seeds)), "--out", str(tmp_path)]
    finished: dict[tuple[Any, ...], Any] = {}
    # one save before anything is measured, then one after every figure of memory, time and fidelity
    for saves in kills:
        command = [sys.executable, "-c", KILLED_AFTER, str(saves), *arguments]
        process = subprocess.run(
            command, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        now = figures(rows_of(tmp_path, "results.partial.json"))
        assert finished.items() <= now.items()
        assert len(now) >= len(finished) + saves - 1
        finished = now
    measured: list[str] = []
    for name in ("runner.subject_memory", "runner.measure_latency", "fidelity.FidelityBench.figures"):
        monkeypatch.setattr(f"heatkv.profiling.measure.{name}", counting(name, measured))
    assert run(arguments) == 0
    rows = rows_of(tmp_path)
    assert [(row["seed"], row["batch"], row["rows"], row["policy"]) for row in rows] == [
        (seed, batch, 2 * batch, policy) for seed in seeds for batch in (1, 2) for policy in ("full", "random")
    ]
    every, points = figures(rows), 2 * len(seeds)
    assert finished.items() <= every.items()
    assert len(every) == 2 * points * 3
    # batches share comparisons, and a point is timed at once
    assert measured.count("fidelity.FidelityBench.figures") == points - len(
        {key[1] for key in finished if key[0] == "kl"}
    )
    assert measured.count("runner.measure_latency") == points - len(
        {key[2:4] for key in finished if key[0] == "latency_ms"}
    )
    assert measured.count("runner.subject_memory") == 2 * points - len([key for key in finished if key[0] == "memory"])
    assert not (tmp_path / "results.partial.json").exists()
    assert not list(tmp_path.glob("results.[0-9]*.json"))
    endings = [f"_seed{seed}" for seed in seeds] if len(seeds) > 1 else [""]
    assert {path.name for path in tmp_path.glob("images*")} == {f"images_30percent{ending}.png" for ending in endings}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"{name}{ending}.png" for name in ("full_100percent", "random_30percent") for ending in endings
    }
    kl = {(row["policy"], row["batch"], row["seed"]): row["kl"] for row in rows}
    assert len({kl["random", batch, seed] for batch in (1, 2) for seed in seeds}) == len(seeds)
    # and all of it again measures nothing
    measured.clear()
    capsys.readouterr()
    assert run(arguments) == 0
    assert measured == []
    said = capsys.readouterr().err
    for what in ("the memory of {0} of {0}", "the time of {0} of {0}", "{0} of {0} comparisons"):
        assert what.format(2 * points) in said
    assert figures(rows_of(tmp_path)) == every


def figures(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], str]:
    """What is measured: (what, comparison, batch, seed, policy) -> figure."""
    return {
        (name, row["comparison"], row["batch"], row["seed"], row["policy"]): json.dumps(row[name])
        for row in rows
        for name in ("memory", "latency_ms", "kl")
        if row[name] is not None
    }


def counting(name: str, calls: list[str]) -> Any:
    """The function of this name of the measuring modules, which notes its calls."""
    original = pkgutil.resolve_name(f"heatkv.profiling.measure.{name}")

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return original(*arguments, **options)

    return called


KILLED_AFTER = """
import os, signal, sys
from heatkv.profiling.results.folder import ResultsFolder
from heatkv.__main__ import main
save, saved, most = ResultsFolder.save, [], int(sys.argv.pop(1))
def killed(self, rows):
    save(self, rows)
    saved.append(1)
    if len(saved) == most:
        os.kill(os.getpid(), signal.SIGKILL)
ResultsFolder.save = killed
main()
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batches", "1,1"], "batch '1' is named twice"),
        (["--batches", "1,01"], "batch 1 is named twice"),
        (["--batches", "0"], "--batches is 0; it must be at least 1"),
        (["--batches", "few"], "cannot read the batch list 'few'; write whole numbers as 1,4"),
        (["--batches", "2", "--rows", "4"], "--batches and --rows both say how much"),
        (["--seeds", "1.5"], "cannot read the seed list '1.5'"),
        (["--seeds", "1", "--seed", "2"], "--seeds and --seed both name seeds"),
        (["--snapshot"], "a snapshot is one of the CUDA allocator, and the model is on cpu"),
    ],
)
def test_sweeps_that_are_none_are_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "profile", *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_sweep_goes_on_after_what_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three runs out of memory: its row says so and has no figures; once more it is tried again."""
    asked: list[int] = []

    def apart(job: Any) -> Memory:
        asked.append(job.batch)
        return Memory(error="out of memory: 5 GiB") if len(asked) == 2 else Memory(memory=told)

    arguments = ["profile", "--policies", "streaming", "--budgets", "20%,10%", "--repeats", "1", "--out", str(tmp_path)]
    assert run([*arguments[:4], "20%", *arguments[5:7], "--in-process", "--out", str(tmp_path / "first")]) == 0
    told = convert(rows_of(tmp_path / "first")[0]["memory"] | {"process": "own"}, Ledgers)
    monkeypatch.setattr("heatkv.profiling.measure.worker.measure_in_new_process", apart)
    capsys.readouterr()
    assert run(arguments) == 0
    out, said = capsys.readouterr()
    assert "streaming 20% was not measured: out of memory: 5 GiB" in said
    assert "out of memory: 5 GiB" in out
    rows = rows_of(tmp_path)
    assert [row["error"] for row in rows] == [None, "out of memory: 5 GiB", None]
    for name in ("memory", "latency_ms"):
        assert [row[name] is None for row in rows] == [False, True, False]
    assert run(arguments) == 0
    assert len(asked) == 4
    assert [row["error"] for row in rows_of(tmp_path)] == [None] * 3
    assert [row["latency_ms"] for row in rows_of(tmp_path)][::2] == [row["latency_ms"] for row in rows][::2]


KILLED = """
import os, signal
from heatkv.profiling.measure.fidelity import FidelityBench
from heatkv.__main__ import main
compare, compared = FidelityBench.compare_batch, []
def killed(self, *arguments):
    compared.append(1)
    if len(compared) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return compare(self, *arguments)
FidelityBench.compare_batch = killed
main()
"""


def test_an_interrupted_comparison_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heatkv.profiling.measure.runner.measure_latency", interrupted)
    arguments = ["compare", *SMALL, "--policies", "streaming", "--budgets", "30%", "--out", str(tmp_path)]
    assert run(arguments) == 130
    assert f"{tmp_path / 'results.partial.json'}; the same command goes on from there" in capsys.readouterr().err
    assert [row["allocated_bytes"] > 0 for row in rows_of(tmp_path, "results.partial.json")] == [True, True]


def test_a_refused_comparison_leaves_no_folder(
    statistics_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--policies", "heatkv-mr", "--statistics", str(statistics_file), "--out", str(tmp_path / "out")]
    assert "level costs" in refused(capsys, "compare", *given)
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("arguments", [["policies"], ["policies", "--json"], ["--help"], ["models", "--help"]])
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policies", "heatkv,heatkv"], "'heatkv' is named twice"),
        (["--policies", ","], "no policy was named"),
        (["--policies", "snapkv2"], "unknown policy"),
        (["--budgets", "10%,nope"], "cannot read the budget 'nope'"),
        (["--budgets", "2%"], "is below 14/230"),
        (["--budgets", "10%,0.1"], "is named twice"),
        (["--images", "0"], "--images is 0"),
        (["--rows", "5"], "rows=5"),
        (["--plan", "absent.json"], "cannot read absent.json"),
        (["--orders", str(ORDERS)], "12 layers x 6 heads = 72"),
        (["--orders", "a", "--statistics", "b"], "give one of them"),
        (["--set", "window=2"], "none of these policies has an option 'window'"),
        (["--policies", "heatkv-lp", "--set", "layer_cap=0.1%"], "layer_cap=0.1% is below 5/230 = 2.18%, the 2 sink"),
    ],
)
def test_compare_refuses_before_it_measures(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "compare", *arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C while samples are measured: exit code 130, and the finished batches are kept for --resume."""
    out = tmp_path / "s.safetensors"
    command = [sys.executable, "-c", INTERRUPTED, "calibrate", "--samples", "64", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert error.splitlines()[-2:] == [
        f"{out}.parts: 1 finished parts; the same command with --resume goes on", "heatkv: stopped"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors.parts"]
    part = tmp_path / "s.safetensors.parts" / "samples.seed0.000000-000015.safetensors"
    assert Statistics.load(part).count == 16


INTERRUPTED = """
import os, signal
import heatkv.calibration.measure
from heatkv.__main__ import main
measure, batches = heatkv.calibration.measure.calibrate, []
def interrupted(*arguments, **options):
    batches.append(1)
    if len(batches) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return measure(*arguments, **options)
heatkv.calibration.measure.calibrate = interrupted
main()
"""


# ------------------------------------------------------------------------------------------- what there is


def test_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json"]) == 0
    models = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    # 6,425 tokens x 32 x 16 heads x 128 channels x 2 rows x 4 bytes
    assert models["infinity-2b"]["full_bytes"] == 6425 * 32 * 16 * 128 * 2 * 4
    assert models["infinity-2b"]["schedule"] == "1,2,4,6,8,12,16,20,24,32,40,48,64"
    sizes = {name: [entry["size"] for entry in row["sizes"]] for name, row in models.items()}
    assert sizes["infinity-8b"] == ["1M", "0.60M", "0.25M", "0.06M"]
    assert (sizes["infinity-8b-512"], sizes["var-d16"], sizes["var-d36"]) == (["0.25M"], ["256"], ["512"])
    assert [entry["cached_tokens"] for entry in models["infinity-2b"]["sizes"]] == [6425, 4121, 1497, 265]
    assert run(["policies", "--json"]) == 0
    policies = {row["policy"]: row["options"] for row in json.loads(capsys.readouterr().out)}
    assert {"name": "value", "default": "joint", "type": "joint or error or mass"} in policies["heatkv-lp"]
    assert policies["streaming"] == [{"name": "sink_scales", "default": 3, "type": "a whole number"}]
    assert set(policies) >= {"full", "heatkv", "heatkv-lp", "heatkv-mr", "random", "sliding-window", "streaming"}
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models with weights"] == "emoji"
    for command in ("doctor", "models", "policies"):
        assert run([command]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize(
    "command",
    [
        "doctor",
        "models",
        "policies",
        "calibrate",
        "solve",
        "generate",
        "profile",
        "compare",
        "report",
        "explain",
        "fit",
    ],
)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"Example: heatkv {command}" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr() == ("heatkv 0.1.0\n", "")


def test_unknown_commands_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command 'sovle'" in refused(capsys, "sovle")
    run([])
    assert "compare" in "".join(capsys.readouterr())


FEW = ["--policies", "streaming", "--budgets", "30%", "--repeats", "1", "--samples", "2"]


def test_what_does_not_fit_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from heatkv.profiling.measure import runner

    opened = runner.open_cache

    def too_many(plan: Any, rows: int, dtype: Any, device: Any, *more: Any, **options: Any) -> Any:
        if rows > 2 and str(device) != "meta":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
        return opened(plan, rows, dtype, device, *more, **options)

    monkeypatch.setattr(runner, "open_cache", too_many)
    asked = ["profile", "--policies", "streaming", "--budgets", "30%", "--repeats", "1", "--in-process"]
    assert run([*asked, "--batches", "1,2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "streaming 30% batch2 was not measured: out of memory: " in " ".join(said.err.split())
    for row in rows_of(tmp_path):
        fits = row["batch"] == 1
        assert (row["error"] is None) == (row["allocated_bytes"] is not None) == (row["latency_ms"] is not None) == fits
        assert row["planned_bytes"] <= row["budget_bytes"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_runs_out_is_told_in_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr("heatkv.generation.loop.Generator.draw", full)
    said = refused(capsys, "generate", "--label", "pizza", "--out", str(tmp_path))
    assert "out of memory: " in said
    assert "draw fewer images at once" in said


def test_no_more_pictures_than_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "compare", *FEW, "--images", "2", "--pictures", "5", "--out", str(tmp_path / "out"))
    assert "--pictures 5 is more than the 2 images" in said
    assert not (tmp_path / "out").exists()


def test_options_that_alternate_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, machines = [], []
    for images in ("2", "3", "2"):
        assert run(["compare", *FEW, "--images", images, "--out", str(tmp_path)]) == 0
        said = capsys.readouterr().err
        kept.append([{name: row[name] for name in ("kl", "psnr_db", "timed")} for row in rows_of(tmp_path)])
        machines.append([row["timing_machine"] for row in rows_of(tmp_path)])
    assert "comparing" not in said  # not even a line of progress: all is there
    assert kept[0] == kept[2] != kept[1]
    assert machines[0] == machines[1] == machines[2]  # the machine as it was when the times were taken
    assert machines[0][0].keys() == {"load", "matrix_product_1024_fp32_one_thread_ms"}
    assert len(list((tmp_path / "pictures").glob("streaming_30percent*.png"))) == 2


def test_results_are_written_before_they_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*given: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("heatkv.cli.measurement.show", gone)
    monkeypatch.setattr("heatkv.cli._discard_output", lambda: None)
    asked = ["profile", "--policies", "streaming", "--budgets", "30%", "--repeats", "1", "--in-process"]
    assert run([*asked, "--out", str(tmp_path)]) == 0
    assert len(rows_of(tmp_path)) == 2


@pytest.mark.parametrize("seed", ["18446744073709551616", "-99999999999999999999"])
def test_seeds_that_would_be_the_same_as_others_are_refused(
    seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ["generate", "--label", "pizza", f"--seed={seed}"],
        ["calibrate", "--samples", "2", f"--seed={seed}"],
        ["compare", "--policies", "streaming", "--budgets", "30%", f"--seeds=0,{seed}"],
    ):
        said = refused(capsys, *command, "--out", str(tmp_path / "out"))
        assert "seed is " in said
        assert "from -4611686018427387904 to 4611686018427387904" in said
    assert not (tmp_path / "out").exists()


def test_a_plan_for_other_heads_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert run(["solve", "--policy", "streaming", "--budget", "30%", "--out", str(path)]) == 0
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"head_dim": 2 * told["head_dim"]}))
    said = refused(capsys, "generate", "--plan", str(path), "--label", "pizza", "--out", str(tmp_path / "out"))
    assert f"{path}: the plan is for heads of size" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--follow-every", "0"], "--follow-every is 0"),
        (["--follow-every", "4", "--half-life", "nan"], "--half-life is nan"),
        (["--follow-every", "4", "--adopt-above", "nan"], "--adopt-above 'nan' is no share; write 5% or 0.05"),
        (["--follow-every", "4", "--measuring-memory", "10%"], "memory for measuring is '10%', no number of bytes"),
    ],
)
def test_options_of_following_are_named_as_they_are_written(
    options: list[str], said: str, statistics_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--policy", "heatkv", "--budget", "30%", "--statistics", str(statistics_file), "--label", "pizza"]
    assert said in refused(capsys, "generate", *given, *options, "--out", str(tmp_path / "out"))
