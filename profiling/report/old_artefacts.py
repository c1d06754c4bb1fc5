"""What a result folder holds beside its results.json: plans, pictures and S-CAS, each read only if it is of that run.

What is missing, or of another run, is told as Missing; what is there but cannot be read raises a typed error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.core.io import check_header, read_json
from heatkv.core.plan import CachePlan
from heatkv.core.plan_file import load_plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import regular_array, shown
from heatkv.core.statistics import Statistics
from heatkv.errors import FormatError, HeatKVError
from heatkv.generation.images import GAP, picture_text, read_pixels
from heatkv.profiling.report.old_merging import Row, Source
from heatkv.profiling.results.artefacts import (
    PICTURES,
    SCAS_FORMAT,
    SCAS_VERSION,
    artefact_name,
    file_digest,
    pictures_by_comparison,
)


@dataclass(frozen=True)
class Missing:
    """Why something is not in the report."""

    why: str


def plans_of(row: Row) -> tuple[CachePlan, ...] | Missing:
    """All plans that a row was measured with. Raises FormatError, PlanError or ScheduleError for damaged files."""
    files: dict[str, Any] = row.told.get("plans") or {}
    if not files:
        return Missing("this folder was made before plans were saved")
    plans = []
    for name, digest in files.items():
        path = row.source.folder / "plans" / name
        if Path(name).name != name or not path.exists():
            return Missing(f"plans/{name[:80]} is not there")
        plan = load_plan(path)
        if file_digest(path) != digest:
            return Missing(f"plans/{name[:80]} is not the plan that was measured")
        plans.append(plan)
    return tuple(plans)


def pictures_of(row: Row) -> NDArray[np.uint8] | Missing:
    """The pictures of a row, (B, H, W, 3). Raises FormatError for a damaged file."""
    count = row.number("pictures")
    if not count:
        return Missing("no pictures were drawn")
    path = pictures_by_comparison(row.source.folder).get(str(row.told.get("comparison")))
    if path is None:
        path = row.source.folder / PICTURES / f"{artefact_name(row.name)}.png"
    if not path.exists():
        return Missing(f"pictures/{path.name} is not there" if path.parent.is_dir() else "this folder has no pictures")
    told, pixels = picture_text(path, "heatkv"), read_pixels(path)
    width, rest = divmod(pixels.shape[1] + GAP, int(count))
    if told != row.told.get("comparison") or rest or width <= GAP:
        return Missing(f"pictures/{path.name} is of another run")
    return np.stack([pixels[:, i * width : (i + 1) * width - GAP] for i in range(int(count))])


@dataclass(frozen=True, eq=False)
class Scas:
    """S-CAS of every head by source scale, (L, H, T-1), and where it is from."""

    schedule: ScaleSchedule
    scas_LHS: NDArray[np.float64]
    samples: int


def scas_of(source: Source) -> Scas | Missing:
    """The S-CAS that the policies of a folder planned from. Raises FormatError for damaged files."""
    wanted = source.request.get("statistics")
    path, statistics = source.folder / "scas.json", source.folder / "statistics.safetensors"
    if path.exists():
        found, provenance = _read_scas(path)
    elif statistics.exists():
        measured = Statistics.load(statistics)
        found = Scas(measured.schedule, measured.scas[:, :, :-1], measured.count)
        provenance = measured.provenance.to_json()
    else:
        return Missing("this folder has no statistics: no policy in it planned from any, or they lie elsewhere")
    of_run = ("fingerprint", "cfg", "settings", "samples")
    if isinstance(wanted, dict) and any(wanted.get(name) != provenance.get(name) for name in of_run):
        return Missing("the statistics in this folder are not those of its results")
    return found


def _read_scas(path: Path) -> tuple[Scas, dict[str, Any]]:
    data = check_header(read_json(path), path, SCAS_FORMAT, SCAS_VERSION)
    try:
        schedule = ScaleSchedule.of(data["schedule"])
        scas, provenance = regular_array(data["scas"], 3, floats=True), dict(data["provenance"])
        samples = len(provenance["samples"])
    except KeyError as error:
        raise FormatError(f"{path} is not a whole {SCAS_FORMAT} file: it lacks {shown(error.args[0])}") from error
    except (TypeError, ValueError, HeatKVError) as error:
        raise FormatError(f"{path} is not a whole {SCAS_FORMAT} file: {error}") from error
    if (
        scas is None
        or scas.shape[2] != len(schedule) - 1
        or 0 in scas.shape
        or not ((scas >= 0) & (scas <= 1.01)).all()
    ):
        raise FormatError(
            f"{path} is not a whole {SCAS_FORMAT} file: its scas are not shares of attention, one for every layer, "
            f"head and cached scale of {len(schedule) - 1}"
        )
    return Scas(schedule, scas, samples), provenance
