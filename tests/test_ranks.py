"""Commands shared by several processes give what one gives, byte by byte, and survive the death of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.stopping import Ended, Moment, run_apart

from heatkv.cli import run
from heatkv.errors import RanksError
from heatkv.parallel.parts import Parts
from heatkv.parallel.ranks import Ranks, _Launched, current, join
from heatkv.profiling.results.row import Fidelity, Memory, Times

CALIBRATE = ["calibrate", "--samples", "3"]  # batches of 2 and 1
LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAST = 12 * 8  # attention of the embedded model's last layer and scale
COMPARE = ["compare", "--samples", "2", "--images", "18", "--pictures", "17", "--repeats", "1", "--policies"]
COMPARE += ["streaming,random", "--budgets", "30%"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics that one process measured."""
    path = tmp_path_factory.mktemp("alone") / "s.safetensors"
    assert run([*CALIBRATE, "--out", str(path)]) == 0
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def codes(ended: list[Ended]) -> list[int]:
    return [end.code for end in ended]


def test_statistics_of_two_ranks(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    ended = run_apart([*CALIBRATE, "--out", str(out)], tmp_path, ranks=2)
    assert codes(ended) == [0, 0], ended
    assert out.read_bytes() == alone.read_bytes()
    assert names_in(tmp_path) == {"s.safetensors"}
    # progress and all else is said once
    assert ended[1].error == ""
    assert [line for line in ended[0].error.splitlines() if "calibrating" in line][-1] == "calibrating emoji: 3 of 3"


def test_ranks_draw_the_pictures_of_one_process(tmp_path: Path) -> None:
    """Three batches of 2, 2 and 1 images; the first rank speaks."""
    arguments = ["generate", "--policy", "streaming", "--budget", "30%", "--label", "cat", "--count", "5"]
    one, shared = tmp_path / "one", tmp_path / "shared"
    assert run([*arguments, "--rows", "4", "--out", str(one)]) == 0
    ended = run_apart([*arguments, "--rows", "4", "--out", str(shared)], tmp_path / "log", ranks=2)
    assert codes(ended) == [0, 0], ended
    assert ended[1].error == ""
    assert "written: 5 images in" in ended[0].error
    assert names_in(shared) == names_in(one) == {f"000{index}_cat.png" for index in range(5)}
    for path in one.iterdir():
        assert path.read_bytes() == (shared / path.name).read_bytes()


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_rank(killed: int, alone: Path, tmp_path: Path) -> None:
    """At the end of its first batch: the other rank does what is left and notices, and the next run does the rest."""
    out = tmp_path / "s.safetensors"
    arguments = [*CALIBRATE, "--out", str(out)]
    ended = run_apart(arguments, tmp_path, Moment("attention", LAST, signal.SIGKILL), ranks=2, stopped_rank=killed)
    assert ended[killed].code == -signal.SIGKILL
    assert ended[1 - killed].code == 2
    lines = ended[1 - killed].error.splitlines()
    assert "Traceback" not in ended[1 - killed].error
    assert "has ended; what was finished is kept" in lines[-1]
    assert [line for line in lines if line.startswith("heatkv: ")] == [lines[-1]]
    assert not out.exists()
    assert list((tmp_path / "s.safetensors.parts").glob("samples.*.safetensors"))
    assert run(arguments) == 0
    assert out.read_bytes() == alone.read_bytes()
    assert names_in(tmp_path) == {"s.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_torchrun(ranks: int, tmp_path: Path) -> None:
    """Level costs, appended samples and comparisons, through torch's own launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "heatkv"]
    commands = {"one": [sys.executable, "-m", "heatkv"], "ranks": launcher}

    def done(name: str, *arguments: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*commands[name], *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    for more, samples in ((["--levels", "fisher,samples=6", "--report", "20%"], 5), (["--append"], 10)):
        for name in commands:
            path = str(tmp_path / f"{name}.safetensors")
            assert json.loads(done(name, "calibrate", "--samples", "5", *more, "--out", path, "--json"))["samples"] == (
                samples
            )
        assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "ranks.safetensors").read_bytes()
    for name in commands:
        assert done(name, *COMPARE, "--out", str(tmp_path / name)).count("KL and top-1 over 18 images") == 1
    check_alike(tmp_path / "one", tmp_path / "ranks")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert isinstance(rows, list)
    return rows


def check_alike(one: Path, other: Path) -> None:
    """Two folders hold the same but for times and memory."""
    timed = (*vars(Memory()), *vars(Times()))
    for mine, theirs in zip(rows_of(one), rows_of(other), strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {k: v for k, v in theirs.items() if k not in timed}
        assert all(
            mine[name] is not None for name in vars(Fidelity()) if name not in ("lpips", "lpips_of_pictures", "fid")
        )
    assert {p.relative_to(one) for p in one.rglob("*")} == {p.relative_to(other) for p in other.rglob("*")}
    for path in [*one.glob("*.png"), *one.glob("*/*"), *one.glob("*.safetensors"), *one.glob("scas.json")]:
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


@pytest.mark.slow
def test_killed_rank_of_a_comparison(tmp_path: Path) -> None:
    """What the others compared is kept, also for one process that goes on."""
    assert run([*COMPARE, "--out", str(tmp_path / "one")]) == 0
    arguments = [*COMPARE, "--out", str(tmp_path / "ranks")]
    # 12 layers, 8 scales: while it calibrates on one image, 96; then the reference of its batch, and the first subject
    ended = run_apart(arguments, tmp_path / "ranks", Moment("attention", 600, signal.SIGKILL), ranks=3, stopped_rank=2)
    assert codes(ended) == [2, 2, -signal.SIGKILL], ended
    told = [end.error.count("heatkv: ") for end in ended[:2]]
    assert told in ([1, 0], [0, 1], [1, 1])  # once, unless the first rank, whom they ask, is gone before the second
    kept = list((tmp_path / "ranks" / "results.parts").iterdir())
    assert len(kept) >= 2
    assert run(arguments) == 0
    check_alike(tmp_path / "one", tmp_path / "ranks")


def test_parts_without_a_common_folder(tmp_path: Path) -> None:
    """Two ranks, played in turn: what one lacks is asked of the one that has it."""

    class Second(Ranks):
        rank, size = 1, 2
        asked: list[tuple[bool, int]] = []  # noqa: RUF012 - of this class alone

        def gather(self, value: Any) -> list[Any]:
            return [["a"], value]

        def share(self, payload: bytes | None, source: int) -> bytes:
            self.asked.append((payload is not None, source))
            return payload if payload is not None else b"of the first"

    parts, second = Parts(tmp_path / "parts", {"asked": 1}), Second()
    assert parts.missing(["a", "b"], second) == ["b"]
    parts.fill(["a", "b"], ["b"], lambda name, path: path.write_bytes(b"of the second"), second)
    assert second.asked == [(False, 0), (True, 1)]
    assert parts.path("a").read_bytes() == b"of the first"
    assert parts.path("b").read_bytes() == b"of the second"
    assert parts.description() == {"asked": 1}
    parts.remove()
    assert not parts.folder.exists()


def test_dealt_items() -> None:
    ranks = Ranks()
    assert list(ranks.deal("abc")) == list("abc")
    assert list(ranks.deal("abc")) == list("abc")  # a new deal
    for size in (1, 2, 3, 7):
        ranks.size = size
        dealt = [item for rank in range(size) for item in ranks.share_of("abcde", rank)]
        assert dealt == list("abcde")


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {**LAUNCHED, "MASTER_PORT": "no"}])
def test_refused_variables(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError, match=f"of {variables['WORLD_SIZE']} cannot join"):
        join()
    assert run(["policies"]) == 2
    assert current().size == 1


def test_one_gpu_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:

    ranks = object.__new__(_Launched)
    ranks.rank, ranks.size, ranks.local_rank = 5, 8, 1
    assert ranks.device("cpu") == "cpu"
    assert ranks.device("cuda") == "cuda:1"
    with pytest.raises(RanksError, match="cuda:0 is one GPU, and 8 ranks"):
        ranks.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RanksError, match="number 1 on its host, which has 1 GPUs; start no more processes"):
        ranks.device("cuda")


@pytest.mark.parametrize("call", ["wait", "gather"])
def test_a_rank_that_ended_between_steps(call: str) -> None:
    def closed(*given: Any, **named: Any) -> None:
        raise RuntimeError("Connection closed by peer\nmore")

    team = object.__new__(_Launched)
    team._dist = SimpleNamespace(barrier=closed, all_gather_object=closed)
    with pytest.raises(RanksError, match=r"^another rank has ended"):
        getattr(team, call)(*[1] * (call == "gather"))


def test_imports_of_one_process() -> None:
    code = "import sys, heatkv.parallel.ranks; heatkv.parallel.ranks.join(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]
