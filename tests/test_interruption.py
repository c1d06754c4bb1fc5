"""Commands that are stopped at random moments: nothing cut off, nothing lost, and in the end the same as without.

Moments are drawn with a seed among all file operations and all attentions of a command, see support/stopping.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image
from support.stopping import Kind, Moment, count_events, run_apart
from support.tiny_models import save_tiny_var

from heatkv.cli import run
from heatkv.core.io import clear_temporaries, move, read_tensors, replacing, write_json
from heatkv.core.plan_file import load_plan
from heatkv.errors import FormatError
from heatkv.profiling.results.row import Memory, Times

Command = Literal["calibrate", "compare", "profile"]

ARGUMENTS: dict[Command, list[str]] = {
    "calibrate": ["calibrate", "--samples", "3", "--levels", "fisher,samples=6"],
    "compare": ["compare", "--samples", "3", "--images", "17", "--pictures", "2", "--repeats", "1", "--policies",
                "heatkv,random", "--budgets", "30%"],
    "profile": ["profile", "--policies", "streaming,random", "--budgets", "20%", "--repeats", "2", "--in-process",
                "--rows", "2,4"],
}  # fmt: skip
# How often each thing is measured: batches of 2 and 1 samples; biases and two batches of level costs; memory of every
# row; every comparison in batches of at most 16 images.
WORK = {
    "calibrate": {"samples": 2, "levels": 3},
    "compare": {"samples": 2, "memory": 3, "comparisons": 6},
    "profile": {"memory": 6},
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


class Stopped:
    """A command, what it gives when nothing stops it, and how many moments it has."""

    def __init__(self, command: Command, model: list[str], folder: Path) -> None:
        self.command, self.arguments, self.work = command, [*ARGUMENTS[command], *model], Counter(WORK[command])
        self.folder = folder / "whole"
        self.folder.mkdir()
        self.events: Counter[Kind] = count_events(self.given(self.folder), self.folder)

    def given(self, folder: Path) -> list[str]:
        """Its arguments, when it is to write in this folder."""
        out = folder / "s.safetensors" if self.command == "calibrate" else folder
        return [*self.arguments, "--out", str(out)]

    def moment(self, draw: random.Random, number: signal.Signals) -> Moment:
        kind: Kind = draw.choice(("file", "attention"))
        return Moment(kind, draw.randint(1, self.events[kind]), number)

    def check(self, folder: Path, moment: Moment) -> None:
        """Stop it at the moment, look at what is there, and finish it."""
        folder.mkdir()
        (ended,) = run_apart(self.given(folder), folder, moment)
        assert ended.code == CODES[moment.number], (moment, ended)
        assert "Traceback" not in ended.error, ended.error
        check_whole(folder)
        finished, kept = figures(folder), kept_work(folder)
        measured = Counter[str]()
        with pytest.MonkeyPatch.context() as patch:
            count_measured(patch, measured)
            assert run(self.given(folder)) == 0, moment
        # what was finished is not measured again, and no other one now
        assert measured == self.work - kept, (moment, kept)
        assert finished.items() <= figures(folder).items()
        self.check_same(folder)

    def check_same(self, folder: Path) -> None:
        """All is as without a stop, but for times and memory."""
        assert {p.relative_to(folder) for p in folder.rglob("*")} == {
            p.relative_to(self.folder) for p in self.folder.rglob("*")
        }
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name not in ("results.json", "report.html"):
                assert path.read_bytes() == (folder / path.relative_to(self.folder)).read_bytes(), path
        if self.command != "calibrate":
            mine, theirs = (rows_without_times(at) for at in (folder, self.folder))
            assert mine == theirs


def rows_without_times(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [
        {name: value for name, value in row.items() if name not in (*vars(Memory()), *vars(Times()))} for row in rows
    ]


def figures(folder: Path) -> dict[tuple[str, str], str]:
    """What is measured in a folder of results: (what, comparison and measurement) -> figure."""
    found = {}
    for path in folder.glob("results*.json"):
        for row in json.loads(path.read_text())["rows"]:
            for name in ("memory", "latency_ms", "kl"):
                if row[name] is not None:
                    found[name, f"{row['comparison']} {row['measurement']}"] = json.dumps(row[name])
    return found


def kept_work(folder: Path) -> Counter[str]:
    """What need not be measured again: parts, and what is made of parts; a comparison has two batches."""
    kept = Counter[str]()
    for path in folder.rglob("*.parts/*.safetensors"):
        if not path.name.startswith("."):
            kind = path.name.split(".")[0]
            kept[{"samples": "samples", "biases": "levels", "fisher": "levels"}.get(kind, "comparisons")] += 1
    if (folder / "s.safetensors").exists() or (folder / "statistics.safetensors").exists():
        kept |= Counter({"samples": 2, "levels": 3})
    found = figures(folder)
    kept["memory"] = sum(name == "memory" for name, _ in found)
    compared = {key.split()[0] for name, key in found if name == "kl"}
    left = [path for path in folder.glob("results.parts/*.safetensors") if path.name.split(".")[0] in compared]
    kept["comparisons"] += 2 * len(compared) - len(left)
    return kept


def count_measured(patch: pytest.MonkeyPatch, measured: Counter[str]) -> None:
    """Count what is measured: batches of samples, of level costs and of comparisons, biases, and memory."""
    import heatkv.calibration.run
    import heatkv.profiling.comparison
    import heatkv.profiling.sweep

    def counting(module: Any, name: str, what: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def called(*given: Any, **named: Any) -> Any:
            measured[what] += 1
            return original(*given, **named)

        patch.setattr(module, name, called)

    counting(heatkv.calibration.run, "measure_samples", "samples")
    counting(heatkv.calibration.run, "write_tensors", "levels")
    counting(heatkv.profiling.comparison, "save_compared", "comparisons")
    counting(heatkv.profiling.sweep, "subject_memory", "memory")


def check_whole(folder: Path) -> None:
    """Every file under a final name can be read to its end."""
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith("."):
            continue
        if path.suffix == ".safetensors":
            read_tensors(path, "part")
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        else:
            assert path.name == "report.html"
            assert path.read_text().rstrip().endswith("</html>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_tiny_var(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["calibrate", "profile", pytest.param("compare", marks=pytest.mark.slow)])
def stopped(request: pytest.FixtureRequest, model: list[str], tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    command: Command = request.param
    return Stopped(command, model, tmp_path_factory.mktemp(command))


@pytest.mark.parametrize("index", [0, *(pytest.param(index, marks=pytest.mark.slow) for index in range(1, 9))])
def test_a_command_stopped_at_a_random_moment(index: int, stopped: Stopped, tmp_path: Path) -> None:
    """Nine moments for each command, three for each signal."""
    first = list(ARGUMENTS).index(stopped.command)  # where each command begins with another signal
    moment = stopped.moment(random.Random(f"{stopped.command} {index}"), SIGNALS[(first + index) % 3])
    stopped.check(tmp_path / "stopped", moment)


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_ends(stopped: Stopped, tmp_path: Path) -> None:
    """Always the same share of what is left: every run goes on from where the one before was."""
    folder = tmp_path / "again"
    folder.mkdir()
    most = stopped.events["attention"] // 2
    for _ in range(20):
        (ended,) = run_apart(stopped.given(folder), folder, Moment("attention", most, signal.SIGKILL))
        check_whole(folder)
        if ended.code == 0:
            break
        assert ended.code == -9
    assert ended.code == 0
    stopped.check_same(folder)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert run(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("heatkv: ")]) == 1
    return lines[-1]


def test_only_the_same_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts of a calibration are finished by the same options, or the folder is deleted."""
    out = tmp_path / "s.safetensors"
    arguments = ["calibrate", "--samples", "2", "--out", str(out)]
    # stopped at its second batch, which begins with the 97th attention: 12 layers, 8 scales
    (ended,) = run_apart(arguments, tmp_path, Moment("attention", 100, signal.SIGINT))
    assert ended.code == 130
    assert ended.error.splitlines()[-2].startswith(f"{out}.parts: 1 finished parts are kept")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    for other, told in {
        "--samples 3": "es=[[0, 2], [2, 3]], samples=['0:0:0', '0:1:1', '0:2:2']", "--cfg 1": "'cfg': 1.0",
        "--seed 1": "this one has samples=['1:0:0', '1:1:1']", "--dtype bfloat16": "'dtype': 'bfloat16'",
    }.items():  # fmt: skip
        said = refused(capsys, [*arguments, *other.split()])
        assert f"{out}.parts holds parts of a run with" in said
        assert told in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
    part = next(path for path in before if path.name.startswith("samples"))
    part.write_bytes(part.read_bytes()[:-9])
    assert f"{part}" in refused(capsys, arguments)
    part.unlink()
    assert run(arguments) == 0
    # once more there is nothing to do, and no other file is taken for this one's
    capsys.readouterr()
    assert run(arguments) == 0
    assert f"{out} was finished before: nothing is measured" in capsys.readouterr().err
    for other in (["--samples", "3"], ["--levels", "error"]):
        assert f"{out} exists" in refused(capsys, [*arguments, *other])


def test_a_run_stopped_while_it_ends_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is written and some parts are removed: no samples are added twice, and what is known is told."""
    out = tmp_path / "s.safetensors"
    assert run(["calibrate", "--samples", "1", "--out", str(out)]) == 0
    more = ["calibrate", "--samples", "2", "--append", "--out", str(out)]
    (ended,) = run_apart(more, tmp_path, Moment("attention", 100, signal.SIGKILL))
    assert ended.code == -9
    stopped = {path: path.read_bytes() for path in (tmp_path / "s.safetensors.parts").iterdir()}
    assert run(more) == 0
    whole = out.read_bytes()
    for left in (stopped, {path: text for path, text in stopped.items() if "samples" not in path.name}):
        (tmp_path / "s.safetensors.parts").mkdir()
        for path, text in left.items():
            path.write_bytes(text)
        if left is not stopped:  # only the last of them is left
            (tmp_path / "s.safetensors.parts" / "samples.seed0.000002-000002.safetensors").write_bytes(b"")
        capsys.readouterr()
        assert run([*more, "--json"]) == 0
        told = capsys.readouterr()
        assert "was finished before: nothing is measured" in told.err
        assert json.loads(told.out)["rank_agreement_of_halves"] is None
        assert out.read_bytes() == whole
        assert {path.name for path in tmp_path.iterdir()} == {"s.safetensors"}


def test_rows_of_another_run_are_kept_aside(tmp_path: Path) -> None:
    profile = ["profile", "--budgets", "20%", "--repeats", "1", "--in-process", "--out", str(tmp_path), "--policies"]
    (ended,) = run_apart([*profile, "streaming"], tmp_path, Moment("attention", 1, signal.SIGTERM))
    assert ended.code == 143
    partial = json.loads((tmp_path / "results.partial.json").read_text())
    assert run([*profile, "random"]) == 0
    assert json.loads((tmp_path / "results.1.json").read_text())["rows"] == partial["rows"]
    assert not (tmp_path / "results.partial.json").exists()


# ------------------------------------------------------------------------------------------------- writing


def test_a_file_and_its_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First what is in it, then its name: in this order neither an empty nor a lost file is left by a power cut."""
    done: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("folder" if is_folder(fd) else "file"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))

    def is_folder(descriptor: int) -> bool:
        return os.path.isdir(f"/proc/self/fd/{descriptor}")

    write_json(tmp_path / "a.json", [1])
    assert done == ["file", "rename", "folder"]
    done.clear()
    move(tmp_path / "a.json", tmp_path / "b.json")
    assert done == ["folder"]
    with pytest.raises(FormatError, match=r"cannot rename .*a\.json: No such file"):
        move(tmp_path / "a.json", tmp_path / "b.json")


def test_a_file_system_that_syncs_no_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    fsync = os.fsync

    def sync(descriptor: int, failing: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(failing, os.strerror(failing))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", lambda descriptor: sync(descriptor, errno.EINVAL))
    write_json(tmp_path / "a.json", [1])
    monkeypatch.setattr(os, "fsync", lambda descriptor: sync(descriptor, errno.EIO))
    with pytest.raises(FormatError, match="Input/output error"):
        write_json(tmp_path / "a.json", [2])


def test_only_what_writers_left_is_cleared(tmp_path: Path) -> None:
    names = (".s.json.abcd1234.tmp", ".t.json.abcd1234.tmp", ".hidden", "s.json", ".s.json.tmp", "[s].tmp")
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(KeyError), replacing(tmp_path / "s.json"):
        raise KeyError
    clear_temporaries(tmp_path, "s.json")
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
    clear_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])


@pytest.mark.parametrize("command", ["calibrate", "compare", "profile"])
@pytest.mark.parametrize("fault", ["ENOSPC", "EROFS"])
def test_a_full_or_read_only_disk_gives_one_line(
    command: Command,
    fault: str,
    model: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No file can be made in the folder, or none can be finished."""
    import errno
    import tempfile

    number = int(getattr(errno, fault))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    out = tmp_path / "out"
    out.mkdir()
    given = out / "s.safetensors" if command == "calibrate" else out
    if fault == "EROFS":
        monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    said = refused(capsys, [*ARGUMENTS[command], *model, "--out", str(given)])
    assert os.strerror(number) in said
    assert str(out) in said
    assert not [path for path in out.rglob("*") if path.is_file()]


def test_a_trace_on_a_full_disk(model: list[str], tmp_path: Path) -> None:
    """The profiler's library writes it, and does not say when it cannot."""
    code = (
        "import resource; import heatkv.cli, heatkv.profiling.comparison as t; save = t.save_trace\n"
        "def small(*given):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "    return save(*given)\n"
        "t.save_trace = small\n"
        "from heatkv.__main__ import main; main()"
    )
    arguments = [*ARGUMENTS["profile"], *model, "--out", str(tmp_path), "--trace", str(tmp_path / "traces")]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr
    assert "the profiler could not finish it; is there room on the disk?" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "traces").iterdir()) == []


def test_a_plan_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old file stays as it was."""
    import errno

    from heatkv.models.catalogue import load_model

    path, plan = tmp_path / "plan.json", load_model("emoji").plan("streaming", "20%")
    plan.save(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FormatError, match=r"cannot write .*plan\.json: No space left on device"):
        load_model("emoji").plan("streaming", "10%").save(path)
    assert load_plan(path) == plan
    assert list(tmp_path.iterdir()) == [path]
