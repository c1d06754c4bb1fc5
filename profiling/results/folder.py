"""The folder of a run: results.json and the pictures and plans behind it, saved as they are made.

While a run lasts its rows are in `results.partial.json`, and comparisons that are not finished in `results.parts`.
Files with other rows than a new run's are kept under a number. What any of them holds of the very same plans, samples
and settings is not measured again: a comparison, memory or times.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from msgspec import structs
from PIL import PngImagePlugin
from torch import Tensor

from heatkv.calibration.measure import sample_names
from heatkv.core.io import check_header, clear_temporaries, move, read_json, replacing, versions
from heatkv.engine.watch import is_deterministic
from heatkv.errors import FormatError
from heatkv.generation.images import from_pixels, image_grid, picture_text
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.parallel.parts import Parts
from heatkv.profiling.measure.environment import device_name, environment
from heatkv.profiling.measure.subjects import Subject
from heatkv.profiling.results import artefacts
from heatkv.profiling.results.artefacts import PICTURES, artefact_name, file_digest
from heatkv.profiling.results.row import (
    Fidelity,
    Memory,
    Request,
    ResultRow,
    Results,
    Times,
    read_results,
    write_results,
)

Part = TypeVar("Part", Memory, Times, Fidelity)


def comparison_digest(
    model: ImageModel[Any], settings: Settings, subject: Subject, *, seed: int, images: int, pictures: int
) -> str:
    """Names all that the fidelity of a subject follows from: weights, plans, samples, and where it is computed."""
    samples = sample_names(model, seed, model.labels(images), 0) if images else []
    plans = [plan.to_json() for plan in subject.plans]
    return _digest(_shared(model, settings, subject, seed) | {"plans": plans, "samples": samples, "pictures": pictures})


def measurement_digest(model: ImageModel[Any], settings: Settings, subject: Subject, *, seed: int, batch: int) -> str:
    """Names all that memory and times of drawing `batch` images under the subject's first plan follow from, but for
    what else the machine does."""
    threads, plan = torch.get_num_threads(), subject.plans[0].to_json()
    own = {"plan": plan, "batch": batch, "threads": threads, "versions": versions()}
    return _digest(_shared(model, settings, subject, seed) | own)


def samples_digest(model: ImageModel[Any], seed: int, images: int) -> str:
    """Names the samples that fidelity is measured on, their labels or prompts included."""
    return _digest(sample_names(model, seed, model.labels(images), 0))


def _shared(model: ImageModel[Any], settings: Settings, subject: Subject, seed: int) -> dict[str, Any]:
    shared = {
        "fingerprint": model.fingerprint, "dtype": str(model.compute_dtype),
        "device": [model.device.type, device_name(model.device)], "torch": torch.__version__, "seed": seed,
        "sampling": settings.to_json(), "storage": subject.storage, "attention": subject.attention,
        "heatkv": versions()["heatkv"],
    }  # fmt: skip
    return shared | ({"deterministic": True} if is_deterministic() else {})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def part_name(comparison: str, images: range) -> str:
    """The part of a comparison over these images."""
    return f"{comparison}.{images.start:06}-{images.stop - 1:06}"


class ResultsFolder:
    """Where a run writes. `request` holds what was asked for; `pictures` are drawn of every subject.

    Raises FormatError when what is to be replaced at the end is not a results.json of ours.
    """

    def __init__(
        self, folder: Path, model: ImageModel[Any], settings: Settings, request: Request, pictures: int = 0
    ) -> None:
        self.folder, self.path, self.partial = folder, folder / "results.json", folder / "results.partial.json"
        self.parts = Parts(folder / "results.parts")
        self._model, self._settings, self._request, self._pictures = model, settings, request, pictures
        self._earlier = check_replaceable(folder)

    @cached_property
    def _results(self) -> Results:
        machine, sampling = environment(self._model.device), self._settings.to_json()
        return Results(environment=machine, sampling=sampling, request=self._request, rows=())

    # -------------------------------------------------------------------------------- what earlier runs left

    def _part(self, kind: type[Part], fits: Callable[[ResultRow], object]) -> Part | None:
        """The fields of `kind` of the first row that fits."""
        row = next(filter(fits, self._earlier), None)
        return None if row is None else kind(**{name: getattr(row, name) for name in kind.__dataclass_fields__})

    def memory(self, measurement: str, own: bool) -> Memory | None:
        """Memory of this very measurement, when an earlier run left it; with `own`, of a process of its own."""
        processes = ("own",) if own else ("own", "shared")
        return self._part(
            Memory, lambda row: row.measurement == measurement and row.memory and row.memory.process in processes
        )

    def times(self, measurement: str, repeats: int) -> Times | None:
        """Times of this very measurement, of so many runs, when an earlier run left them."""
        return self._part(
            Times, lambda row: row.measurement == measurement and row.latency_ms and row.latency_ms.runs == repeats
        )

    def fidelity(self, comparison: str) -> tuple[Fidelity, Tensor] | None:
        """Figures of this very comparison and its pictures, (B, 3, H, W), when an earlier run left them whole."""
        figures = self._part(Fidelity, lambda row: row.comparison == comparison and row.kl is not None)
        with suppress(FormatError, KeyError):
            pixels = artefacts.read_pictures(self._earlier_pictures[comparison], self._pictures)
            return None if figures is None else (figures, from_pixels(pixels))
        return None

    @cached_property
    def _earlier_pictures(self) -> dict[str, Path]:
        return artefacts.pictures_by_comparison(self.folder)

    # --------------------------------------------------------------------------------------------- writing

    def save_plans(self, subjects: Sequence[Subject], names: Sequence[str]) -> list[dict[str, str]]:
        """Write the plans of all subjects, in files of these names; for each the digests of its files by their names.
        Subjects of one name have equal plans and share the files."""
        folder = self.folder / "plans"
        folder.mkdir(exist_ok=True)
        digests: dict[str, dict[str, str]] = {}
        for subject, name in zip(subjects, names, strict=True):
            for draw, plan in enumerate(subject.plans if name not in digests else ()):
                path = folder / f"{artefact_name(name)}{f'.{draw}' if draw else ''}.json"
                plan.save(path)
                digests.setdefault(name, {})[path.name] = file_digest(path)
        return [digests[name] for name in names]

    def save_pictures(self, name: str, comparison: str, pictures_B3HW: Tensor) -> None:
        """Write the pictures of a comparison, which the file names; those of another one go aside."""
        path = self.folder / PICTURES / f"{artefact_name(name)}.png"
        path.parent.mkdir(exist_ok=True)
        with suppress(FormatError):  # there is none, or none of ours
            other = picture_text(path, "heatkv")
            if other is not None and other != comparison and re.fullmatch("[0-9a-f]{16}", other):
                move(path, path.with_name(f"{path.stem}.{other}.png"))
        mark = PngImagePlugin.PngInfo()
        mark.add_text("heatkv", comparison)
        with replacing(path) as temporary:
            image_grid(pictures_B3HW, len(pictures_B3HW)).save(temporary, format="PNG", pnginfo=mark)

    def save(self, rows: Sequence[ResultRow]) -> None:
        """Write what is measured so far."""
        self._write(self.partial, rows)

    def finish(self, rows: Sequence[ResultRow]) -> Path | None:
        """Write results.json. An earlier one that holds anything else is kept: its new path, if there is one."""
        moved = self._write(self.path, rows)
        self.partial.unlink(missing_ok=True)
        for row in rows:
            self.parts.remove(f"{row.comparison}.")
        for folder in (self.folder, self.folder / "plans", self.folder / PICTURES):
            clear_temporaries(folder)
        return moved

    def with_rows(self, rows: Sequence[ResultRow]) -> Results:
        """What results.json holds with these records."""
        return structs.replace(self._results, rows=tuple(rows))

    def _write(self, path: Path, rows: Sequence[ResultRow]) -> Path | None:
        """Write the rows; the new path of a file that held rows that are not among these, if one did."""
        moved = None
        if path.exists() and not _keys(read_results(path).rows) <= _keys(rows):
            numbered = (path.with_name(f"results.{number}.json") for number in itertools.count(1))
            moved = next(free for free in numbered if not free.exists())
            move(path, moved)
        write_results(path, self.with_rows(rows))
        return moved


def _keys(rows: Sequence[ResultRow]) -> set[tuple[str, str]]:
    """What says that rows of two runs are the same."""
    return {(row.comparison, row.measurement) for row in rows}


def check_replaceable(folder: Path) -> list[ResultRow]:
    """The rows of all results in a folder. Raises FormatError, naming the way out, for files that are none of ours."""
    rows: list[ResultRow] = []
    scas = folder / "scas.json"
    try:
        for path in sorted(folder.glob("results*.json")):
            rows += read_results(path).rows
        if scas.exists():
            check_header(read_json(scas), scas, artefacts.SCAS_FORMAT, artefacts.SCAS_VERSION)
    except FormatError as error:
        raise FormatError(f"{error}; move it away or write to another folder") from error
    return rows
