"""What a result folder holds beside its results.json: plans, pictures and S-CAS, each read only if it is of that run.

For what is missing, or of another run, they give the reason, a text; what is damaged raises a typed error.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from heatkv.core.io import check_header, file_name, opened, read_json, write_json
from heatkv.core.plan import CachePlan
from heatkv.core.plan_file import load_plan
from heatkv.core.schema import convert
from heatkv.core.statistics import Statistics
from heatkv.errors import FormatError
from heatkv.generation.images import GAP, picture_text, read_pixels
from heatkv.profiling.results.row import ResultRow

PICTURES = "pictures"
"""The folder of pictures within one of results."""
SCAS_FORMAT, SCAS_VERSION = "heatkv-scas", 1


def artefact_name(name: str) -> str:
    """What the files of a policy at a budget are called, without their ending."""
    return file_name(name.replace("%", "percent"))


def file_digest(path: Path) -> str:
    """Names the contents of a file. Raises FormatError for what is none."""
    with opened(path) as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


def plans_of(folder: Path, row: ResultRow) -> tuple[CachePlan, ...] | str:
    """All plans that a row was measured with. Raises FormatError or PlanError for damaged files."""
    plans = []
    for name, digest in (row.plans or {}).items():
        path = folder / "plans" / Path(name).name
        if not path.exists():
            return f"plans/{path.name} is not there"
        if file_digest(path) != digest:
            return f"plans/{path.name} is not the plan that was measured"
        plans.append(load_plan(path))
    return tuple(plans) or "its plans were not saved"


def pictures_by_comparison(folder: Path) -> dict[str, Path]:
    """The files of pictures in a folder of results by the comparison that they are of."""
    found: dict[str, Path] = {}
    for path in sorted((folder / PICTURES).glob("*.png")):
        with suppress(FormatError):  # another picture
            found.setdefault(str(picture_text(path, "heatkv")), path)
    return found


def read_pictures(path: Path, count: int) -> NDArray[np.uint8]:
    """The `count` pictures of a file, (B, H, W, 3). Raises FormatError where it cannot hold so many."""
    pixels = read_pixels(path)
    width, rest = divmod(pixels.shape[1] + GAP, count)
    if rest or width <= GAP:
        raise FormatError(f"{path} does not hold {count} pictures")
    return np.stack([pixels[:, i * width : (i + 1) * width - GAP] for i in range(count)])


def pictures_of(folder: Path, row: ResultRow) -> NDArray[np.uint8] | str:
    """The pictures of a row, (B, H, W, 3). Raises FormatError for a damaged file."""
    if not row.pictures:
        return "no pictures were drawn"
    path = pictures_by_comparison(folder).get(row.comparison)
    return "its pictures are not there" if path is None else read_pictures(path, row.pictures)


AttentionShare = Annotated[float, Meta(ge=0, le=1.01)]


@dataclass(frozen=True)
class Scas:
    """S-CAS of every head by source scale, [L][H][T-1], and what it was measured on. Raises ValueError."""

    schedule: tuple[tuple[int, int, int], ...]
    provenance: dict[str, Any]
    scas: tuple[tuple[tuple[AttentionShare, ...], ...], ...]

    def __post_init__(self) -> None:
        shape = np.shape(self.scas)
        if len(shape) != 3 or shape[2] != len(self.schedule) - 1:
            raise ValueError(f"its scas has the shape {shape}, no share for every layer, head and cached scale")


def save_scas(path: Path, statistics: Statistics) -> None:
    """Write the S-CAS that policies planned from."""
    scas = {
        "format": SCAS_FORMAT, "version": SCAS_VERSION, "schedule": statistics.schedule.to_json(),
        "provenance": statistics.provenance.to_json(), "scas": statistics.scas[:, :, :-1].tolist(),
    }  # fmt: skip
    write_json(path, scas)


def read_scas(path: Path) -> Scas:
    """Raises FormatError for what is no scas.json."""
    return convert(check_header(read_json(path), path, SCAS_FORMAT, SCAS_VERSION), Scas, path)


def scas_of(folder: Path, statistics: dict[str, Any] | None) -> Scas | str:
    """The S-CAS in a folder whose policies planned from `statistics`, of which this is the provenance. Raises
    FormatError for damaged files."""
    path = folder / "scas.json"
    if not path.exists():
        return "this folder has no S-CAS: no policy in it planned from any"
    scas = read_scas(path)
    of_run = ("fingerprint", "cfg", "settings", "samples")
    if statistics is not None and any(statistics.get(name) != scas.provenance.get(name) for name in of_run):
        return "the S-CAS in this folder is not that of its results"
    return scas
