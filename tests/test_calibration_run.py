"""Calibrations in memory and into files: stopped, resumed, appended to, and taken over by a folder of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import tiny_var

from heatkv.calibration import run as calibration
from heatkv.calibration.run import batches_of, calibrate, calibrate_into, check_statistics, statistics_of_folder
from heatkv.core.statistics import Statistics
from heatkv.errors import FormatError, HeatKVError, RanksError, StatisticsError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import SamplingSettings
from heatkv.parallel.reporter import Reporter

LEVELS: dict[str, Any] = {"levels": "fisher", "level_samples": 5, "sink_scales": 1}
"""Two batches of level costs, after one of biases."""


class Stop(Exception):
    """What ends a run."""


class Told(Reporter):
    """Keeps what is said and done, and ends the run after so many batches, or when a text is said."""

    def __init__(self, batches: int | None = None, text: str | None = None) -> None:
        self.lines: list[str] = []
        self.done: list[tuple[str, int]] = []
        self._batches, self._text = batches, text

    def say(self, text: str) -> None:
        self.lines.append(text)
        if self._text is not None and self._text in text:
            raise Stop

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], object]]:
        def advance(count: int) -> None:
            if count:
                self.done.append((what.split()[0], count))
            if len(self.done) == self._batches:
                raise Stop

        yield advance


@pytest.fixture(scope="module")
def model() -> ClassConditionalModel:
    return tiny_var()


@pytest.fixture(autouse=True)
def one_bias_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BIAS_SAMPLES", 1)


@pytest.fixture(scope="module")
def undisturbed(model: ClassConditionalModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The file of a run with level costs, and after more was appended to it."""
    out, contents = tmp_path_factory.mktemp("undisturbed") / "s.safetensors", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "BIAS_SAMPLES", 1)
        for append in (False, True):
            calibrate(model, 5, out=out, seed=3, append=append, **LEVELS)
            contents.append(out.read_bytes())
    return contents[0], contents[1]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_batches_in_memory_and_in_a_file(
    model: ClassConditionalModel, undisturbed: tuple[bytes, bytes], tmp_path: Path
) -> None:
    (out := tmp_path / "s.safetensors").write_bytes(undisturbed[0])
    reporter = Told()
    measured = calibrate(model, 5, seed=3, reporter=reporter, **LEVELS)
    assert measured == Statistics.load(out)
    assert reporter.done == [("calibrating", 3), ("calibrating", 2), ("level", 1), ("level", 4), ("level", 1)]
    assert measured.samples == ("3:0:0", "3:1:1", "3:2:2", "3:3:3", "3:4:4")
    assert measured.levels is not None
    assert (measured.levels.samples, measured.levels.bias_samples) == (measured.samples, ("3:0:0",))
    assert measured.levels.choices.sink_scales == 1


def test_samples_after_the_first(model: ClassConditionalModel) -> None:
    """One image at a time, in an order of sums that is the same."""
    parts = [calibrate(model, 2, seed=3), calibrate(model, 1, seed=3, first_sample=2)]
    assert parts[0].merge(parts[1]) == calibrate(model, 3, seed=3, batch=1)


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5])
def test_resuming_after_any_batch(
    model: ClassConditionalModel, undisturbed: tuple[bytes, bytes], append: bool, batches: int, tmp_path: Path
) -> None:
    """The same bits as without a stop, and no batch is measured twice."""
    total = 4 if append else 5  # biases are the file's own
    if batches > total:
        return
    out = tmp_path / "s.safetensors"
    if append:
        out.write_bytes(undisturbed[0])
    options: dict[str, Any] = {"out": out, "seed": 3, "append": append, **LEVELS}
    with pytest.raises(Stop):
        calibrate(model, 5, reporter=(stopped := Told(batches)), **options)
    assert f"{batches} finished parts are kept" in stopped.lines[-1]
    assert out.exists() == append
    with pytest.raises(FormatError, match=f"holds {batches} finished parts of a run that was stopped; resume it"):
        calibrate(model, 5, **options)
    for changed, named in (({"seed": 4}, "samples="), ({"level_samples": 6}, "level_samples=")):
        with pytest.raises(FormatError, match=f"parts of a run with .*{named}"):
            calibrate(model, 5, resume=True, **(options | changed))
    reporter = Told()
    resumed = calibrate(model, 5, resume=True, reporter=reporter, **options)
    assert len(stopped.done) + len(reporter.done) == total
    assert resumed == Statistics.load(out)
    assert out.read_bytes() == undisturbed[append]
    assert names_in(tmp_path) == ["s.safetensors"]


def test_stop_before_any_batch(model: ClassConditionalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Statistics:
        raise Stop

    monkeypatch.setattr(calibration, "measure_samples", fail)
    with pytest.raises(Stop):
        calibrate(model, 5, out=tmp_path / "s.safetensors")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("append", [False, True])
def test_stop_after_the_file_is_written(
    model: ClassConditionalModel, undisturbed: tuple[bytes, bytes], append: bool, tmp_path: Path
) -> None:
    """The file is whole and its parts are still there: nothing is measured again, nor appended twice."""
    out = tmp_path / "s.safetensors"
    if append:
        out.write_bytes(undisturbed[0])
    with pytest.raises(Stop):
        calibrate(model, 5, out=out, seed=3, append=append, reporter=Told(text="samples, level costs"), **LEVELS)
    assert names_in(tmp_path) == ["s.safetensors", "s.safetensors.parts"]
    calibrated = calibrate_into(
        out, model, 5, seed=3, settings=model.sampling, append=append, resume=True, reporter=(told := Told()), **LEVELS
    )
    assert (told.lines, told.done) == ([f"{out} was finished before: nothing is measured"], [])
    assert out.read_bytes() == undisturbed[append]
    assert names_in(tmp_path) == ["s.safetensors"]
    agreement = calibrated.agreement_of_halves()
    assert [part.count for part in calibrated.batches] == [3, 2]
    assert agreement is not None
    assert len(agreement) == len(model.geometry.schedule) - 1
    # without parts, a finished run is known by its file; to append is to ask for more
    if not append:
        again = calibrate_into(out, model, 5, seed=3, settings=model.sampling, resume=True, **LEVELS)
        assert (again.statistics, again.batches) == (calibrated.statistics, ())


def test_damaged_part(model: ClassConditionalModel, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    with pytest.raises(Stop):
        calibrate(model, 2, out=out, reporter=Told(1))
    (part,) = (tmp_path / "s.safetensors.parts").glob("*.safetensors")
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(FormatError, match="delete that file, and the run measures it again"):
        calibrate(model, 2, out=out, resume=True)
    part.unlink()
    assert calibrate(model, 2, out=out, resume=True) == calibrate(model, 2)


def test_ranks_with_other_tasks(model: ClassConditionalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(type(calibration.current())):  # type: ignore[misc]
        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "versions": {"torch": "0"}} if isinstance(value, dict) else value]

    monkeypatch.setattr(calibration, "current", Two)
    with pytest.raises(RanksError, match="different tasks"):
        calibrate(model, 2, out=tmp_path / "s.safetensors")


# ---------------------------------------------------------------------- a folder of results


def of_folder(folder: Path, model: ClassConditionalModel, samples: int, **options: Any) -> tuple[Statistics, Told]:
    told = Told()
    options = {"seed": 0, "settings": model.sampling} | options
    return statistics_of_folder(folder, model, samples, reporter=told, **options), told


def test_statistics_of_a_folder(model: ClassConditionalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "LEVEL_SAMPLES", 2)
    path = tmp_path / "statistics.safetensors"
    first, told = of_folder(tmp_path, model, 3)
    assert first == calibrate(model, 3) == Statistics.load(path)
    assert "head rankings of two halves agree by" in told.lines[0]
    again, told = of_folder(tmp_path, model, 3)
    assert (again, told.lines, told.done) == (first, [f"using {path} (3 samples)"], [])
    more, told = of_folder(tmp_path, model, 5)
    assert told.done == [("calibrating", 1), ("calibrating", 1)]
    assert more.samples == calibrate(model, 5).samples
    costs, told = of_folder(tmp_path, model, 5, levels="error", sink_scales=3)
    assert costs.levels is not None
    assert costs.levels.choices.sink_scales == 2  # which holds for plans of more
    assert told.done == [("level", 1), ("level", 2)]
    monkeypatch.setattr(calibration, "LEVEL_SAMPLES", 3)
    more_costs, told = of_folder(tmp_path, model, 5, levels="error")
    assert more_costs.levels is not None
    assert more_costs.levels.samples == costs.samples[:3]
    assert np.array_equal(more_costs.levels.log_bias, costs.levels.log_bias)
    before = path.read_bytes()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"samples": 4}, "holds 5 other samples than the 4"),
        ({"seed": 1}, "holds 5 other samples"),
        ({"levels": "fisher"}, "kind 'error' with sink_scales=2, not 'fisher'"),
        ({"levels": "error", "sink_scales": 1}, "sink_scales=2, not 'error' with 1"),
        ({"settings": SamplingSettings(cfg=4.0)}, "cfg=2.0.*this run has .*cfg=4.0"),
    ]
    for options, named in refused:
        with pytest.raises(StatisticsError, match=named):
            of_folder(tmp_path, model, **({"samples": 6} | options))
    assert path.read_bytes() == before


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"samples": 0}, StatisticsError, "samples is 0"),
        ({"batch": 0}, StatisticsError, "batch is 0"),
        ({"seed": 1.5}, StatisticsError, "seed is 1.5"),
        ({"first_sample": -1}, StatisticsError, "first_sample is -1"),
        ({"levels": "fischer"}, StatisticsError, "'fischer'; did you mean 'fisher'"),
        ({"levels": "error", "level_samples": 0}, StatisticsError, "level_samples is 0"),
        ({"levels": "error", "sink_scales": 9}, StatisticsError, "sink_scales is 9"),
        ({"out": None, "resume": True}, FormatError, "append and resume need a file"),
        ({"out": "there"}, FormatError, "there exists"),
        ({"out": "there", "resume": True}, FormatError, "there exists, and no run that writes it was stopped"),
        ({"out": "new", "append": True}, FormatError, "new does not exist"),
        ({"out": "no/new"}, HeatKVError, "no"),
        ({"out": "there", "append": True, "settings": SamplingSettings(cfg=4.0)}, StatisticsError, "cfg=4.0"),
        ({"out": "there", "append": True, "levels": "fisher"}, StatisticsError, "not 'fisher'"),
        ({"out": "there", "append": True, "levels": "error", "sink_scales": 2}, StatisticsError, "with 2"),
    ],
)
def test_refused_calibrations(
    model: ClassConditionalModel, options: dict[str, Any], error: type[HeatKVError], named: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before anything is measured."""
    monkeypatch.chdir(tmp_path)
    calibrate(model, 1, levels="error", level_samples=1, sink_scales=1).save("there")
    monkeypatch.setattr(calibration, "measure_samples", None)
    with pytest.raises(error, match=named):
        calibrate(model, **({"samples": 2, "out": "new"} | options))
    assert names_in(tmp_path) == ["there"]


def test_statistics_of_other_runs(model: ClassConditionalModel) -> None:
    measured = calibrate(model, 1)
    check_statistics(measured, model, model.sampling)
    with pytest.raises(StatisticsError, match=r"cfg 2, this run has 4\.0"):
        check_statistics(measured, model, SamplingSettings(cfg=4.0))


@pytest.mark.parametrize(("samples", "sizes"), [(1, [1]), (3, [2, 1]), (32, [16, 16]), (33, [16, 16, 1])])
def test_sizes_of_batches(samples: int, sizes: list[int]) -> None:
    assert batches_of(samples) == sizes
