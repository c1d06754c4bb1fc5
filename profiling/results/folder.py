"""The folder of a run: results.json and the pictures behind it, saved so that an interrupt loses little and no earlier
result is lost.

While a run lasts its rows are in `results.partial.json`, and what was compared of a row that is not finished, batch by
batch of images, in the folder `results.parts`. Files with other rows than a new run's are kept under a
number. What any of them holds of the very same plans, samples and settings, a comparison, memory or times, is taken
from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import PngImagePlugin
from torch import Tensor

from heatkv.calibration.measure import sample_names
from heatkv.core.io import (
    check_header,
    clear_temporaries,
    file_name,
    move,
    opened,
    read_json,
    replacing,
    versions,
    write_json,
)
from heatkv.core.statistics import Statistics
from heatkv.engine.watch import is_deterministic
from heatkv.errors import FormatError
from heatkv.generation.images import GAP, image_grid, picture_text, read_pixels
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.parallel.parts import Parts
from heatkv.profiling.measure.environment import device_name, environment
from heatkv.profiling.measure.runner import FIDELITY, Subject
from heatkv.profiling.results.reading import FORMAT, VERSION, read_results

SCAS_FORMAT, SCAS_VERSION = "heatkv-scas", 1

MEMORY = ("memory", "device_peak_bytes", "nvml_bytes", "error")
"""Fields of a row that measuring memory fills."""

TIMES = ("latency_ms", "graph_latency_ms", "graph_pool_bytes", "timed", "timing_machine")
"""Fields of a row that timing fills."""

PICTURES = "pictures"
"""The folder of pictures within one of results."""

_INTERVAL = {"interval", "confidence", "outliers"}
"""Fields of times that older files lack."""

UNMEASURED: dict[str, Any] = dict.fromkeys(("plans", *MEMORY, *TIMES, *FIDELITY, "versus"))

Rows = Sequence[dict[str, Any]]


def comparison_digest(
    model: ImageModel[Any], settings: Settings, subject: Subject, *, seed: int, images: int, pictures: int
) -> str:
    """Names all that the fidelity of a subject follows from: weights, plans, samples, and where it is computed."""
    told = _followed_from(model, settings, subject) | {
        "plans": [plan.to_json() for plan in subject.plans],
        "samples": sample_names(model, seed, model.labels(images), 0) if images else [],
        "seed": seed,
        "pictures": pictures,
    }
    return _digest(told)


def measurement_digest(model: ImageModel[Any], settings: Settings, subject: Subject, *, seed: int, batch: int) -> str:
    """Names all that memory and times of drawing `batch` images under the subject's first plan follow from, but for
    what else the machine does."""
    told = _followed_from(model, settings, subject) | {
        "plan": subject.plans[0].to_json(),
        "batch": batch,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    return _digest(told)


def _followed_from(model: ImageModel[Any], settings: Settings, subject: Subject) -> dict[str, Any]:
    told = {
        "fingerprint": model.fingerprint,
        "dtype": str(model.compute_dtype),
        "device": [model.device.type, device_name(model.device)],
        "torch": torch.__version__,
        "sampling": settings.to_json(),
        "storage": subject.storage,
        "attention": subject.attention,
    }
    return told | ({"deterministic": True} if is_deterministic() else {})


def _digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def part_name(comparison: str, images: range) -> str:
    """The part of a comparison over these images."""
    return f"{comparison}.{images.start:06}-{images.stop - 1:06}"


def subject_file_name(name: str) -> str:
    """What the files of a policy at a budget, or at one seed and batch of them, are called, without their ending."""
    return file_name(name.replace("%", "percent"))


def pictures_by_comparison(folder: Path) -> dict[str, Path]:
    """The files of pictures in a folder of results by the comparison that they are of, whatever they are called."""
    found: dict[str, Path] = {}
    for path in sorted((folder / PICTURES).glob("*.png")):
        with suppress(FormatError):  # what is no picture of ours is of no comparison
            found.setdefault(str(picture_text(path, "heatkv")), path)
    return found


def file_digest(path: Path) -> str:
    """Names the contents of a file. Raises FormatError for what is none."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()[:16]


def samples_digest(model: ImageModel[Any], seed: int, images: int) -> str:
    """Names the samples that fidelity is measured on, their labels or prompts included."""
    names = sample_names(model, seed, model.labels(images), 0)
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def save_scas(path: Path, statistics: Statistics) -> None:
    """S-CAS of every head by source scale, and what it was measured on."""
    told = {
        "format": SCAS_FORMAT,
        "version": SCAS_VERSION,
        "schedule": statistics.schedule.to_json(),
        "provenance": statistics.provenance.to_json(),
        "scas": statistics.scas[:, :, :-1].tolist(),
    }
    write_json(path, told)


class ResultsFolder:
    """Where a run writes. `request` holds what was asked for: seeds, counts, and where statistics came from.

    Raises FormatError when what is to be replaced at the end is not a results.json of ours.
    """

    def __init__(
        self, folder: Path, model: ImageModel[Any], settings: Settings, request: dict[str, Any], pictures: int = 0
    ) -> None:
        self.path, self.partial = folder / "results.json", folder / "results.partial.json"
        self.parts = Parts(folder / "results.parts")
        self._model, self._settings, self._request, self._pictures = model, settings, request, pictures
        self._environment: dict[str, Any] | None = None
        earlier = check_replaceable(folder)
        self._earlier = {row.get("comparison"): row for row in earlier if row.get("kl") is not None}
        self._measured: dict[str, list[dict[str, Any]]] = {}
        for row in earlier:
            self._measured.setdefault(row.get("measurement", ""), []).append(row)

    def memory(self, digest: str, own: bool) -> dict[str, Any] | None:
        """Memory of this very measurement, when an earlier run left it; with `own`, of a process of its own."""
        for row in self._measured.get(digest, ()):
            memory = row.get("memory")
            if isinstance(memory, dict) and not (own and memory.get("process") != "own"):
                return {name: row.get(name) for name in MEMORY}
        return None

    def times(self, digest: str, repeats: int) -> dict[str, Any] | None:
        """Times of this very measurement, of so many runs, when an earlier run left them."""
        for row in self._measured.get(digest, ()):
            latency, graphs = row.get("latency_ms"), row.get("graph_latency_ms")
            whole = all(told.keys() >= _INTERVAL for told in (latency, graphs) if told is not None)
            if latency is not None and whole and latency.get("runs") == repeats:
                return {name: row.get(name) for name in TIMES}
        return None

    def earlier(self, digest: str) -> tuple[dict[str, Any], Tensor] | None:
        """Fidelity figures of this very comparison and its pictures, when an earlier run left them whole."""
        row = self._earlier.get(digest)
        if row is None or not row.keys() >= set(FIDELITY):
            return None
        pictures = self._load_pictures(digest)
        return None if pictures is None else ({name: row[name] for name in FIDELITY}, pictures)

    def save_plans(self, subjects: Sequence[Subject], names: Sequence[str]) -> list[dict[str, str]]:
        """The plans of all subjects, in files of these names; for each the files and digests of what is in them.

        Subjects of one name must have equal plans; they share the files.
        """
        folder = self.path.parent / "plans"
        folder.mkdir(exist_ok=True)
        told: dict[str, dict[str, str]] = {}
        for subject, name in zip(subjects, names, strict=True):
            if name in told:
                continue
            stem, of_name = subject_file_name(name), {}
            for draw, plan in enumerate(subject.plans):
                path = folder / (f"{stem}.{draw}.json" if draw else f"{stem}.json")
                plan.save(path)
                of_name[path.name] = file_digest(path)
            told[name] = of_name
        return [told[name] for name in names]

    def _pictures_path(self, name: str) -> Path:
        return self.path.parent / PICTURES / f"{subject_file_name(name)}.png"

    def save_pictures(self, name: str, digest: str, pictures_B3HW: Tensor) -> None:
        """The pictures of what has this name in one row; the file tells which comparison they are of."""
        path = self._pictures_path(name)
        path.parent.mkdir(exist_ok=True)
        self._keep_pictures(path, digest)
        told = PngImagePlugin.PngInfo()
        told.add_text("heatkv", digest)
        with replacing(path) as temporary:
            image_grid(pictures_B3HW, len(pictures_B3HW)).save(temporary, format="PNG", pnginfo=told)

    def _keep_pictures(self, path: Path, digest: str) -> None:
        """Pictures of another comparison go aside, as its results do."""
        try:
            other = picture_text(path, "heatkv")
        except FormatError:  # none, or none of ours
            return
        if other is not None and other != digest and re.fullmatch("[0-9a-f]{16}", other):
            move(path, path.with_name(f"{path.stem}.{other}.png"))

    @cached_property
    def _earlier_pictures(self) -> dict[str, Path]:
        return pictures_by_comparison(self.path.parent)

    def _load_pictures(self, digest: str) -> Tensor | None:
        path = self._earlier_pictures.get(digest)
        if path is None:
            return None
        try:
            row = torch.from_numpy(read_pixels(path).copy())
        except FormatError:
            return None
        width, rest = divmod(row.shape[1] + GAP, self._pictures)
        if rest or width <= GAP:
            return None
        starts = range(0, row.shape[1], width)
        images = torch.stack([row[:, start : start + width - GAP] for start in starts])
        return images.permute(0, 3, 1, 2).float() / 255

    def check_stopped(self, rows: Rows) -> None:
        """Raise FormatError when the run that was stopped here, if there is one, had other rows than these."""
        if self.partial.exists() and not set(map(_key, read_results(self.partial).rows)) <= set(map(_key, rows)):
            raise FormatError(
                f"{self.partial} is of a run over other rows than this one's; give the same options, or leave --resume "
                "out to keep it aside"
            )

    def save(self, rows: Rows) -> None:
        """What is measured so far."""
        self._set_aside(self.partial, rows)
        write_json(self.partial, self._told(rows), indent=1)

    def finish(self, rows: Rows) -> Path | None:
        """Write results.json. An earlier one that holds anything else is kept: its new path, if there is one."""
        moved = self._set_aside(self.path, rows)
        write_json(self.path, self._told(rows), indent=1)
        self.partial.unlink(missing_ok=True)
        for row in rows:
            self.parts.remove(f"{row['comparison']}.")
        for folder in (self.path.parent, self.path.parent / "plans", self.path.parent / PICTURES):
            clear_temporaries(folder)
        return moved

    def _set_aside(self, path: Path, rows: Rows) -> Path | None:
        """Rename the file when it holds rows that are not among these; its new path, if so."""
        if not path.exists() or set(map(_key, read_results(path).rows)) <= set(map(_key, rows)):
            return None
        taken = (path.with_name(f"results.{number}.json") for number in itertools.count(1))
        free = next(candidate for candidate in taken if not candidate.exists())
        move(path, free)
        return free

    def _told(self, rows: Rows) -> dict[str, Any]:
        if self._environment is None:
            self._environment = environment(self._model.device)
        return {
            "format": FORMAT,
            "version": VERSION,
            "environment": self._environment,
            "sampling": self._settings.to_json(),
            "request": self._request,
            "rows": [UNMEASURED | row for row in rows],
        }


def _key(row: dict[str, Any]) -> tuple[Any, Any]:
    """What tells rows apart."""
    return row.get("comparison"), row.get("measurement")


def check_replaceable(folder: Path) -> list[dict[str, Any]]:
    """The rows of all results in a folder. Raises FormatError, naming the way out, for files that are none of ours."""
    rows: list[dict[str, Any]] = []
    scas = folder / "scas.json"
    try:
        for path in sorted(folder.glob("results*.json")):
            rows += read_results(path).rows
        if scas.exists():
            check_header(read_json(scas), scas, SCAS_FORMAT, SCAS_VERSION)
    except FormatError as error:
        raise FormatError(f"{error}; move it away or write to another folder (--out)") from error
    return rows
