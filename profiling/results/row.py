"""results.json: the types of all it holds, which write it and read it.

None is "not measured", never 0; unknown fields are ignored. Limits are those of what a figure means, or lie far beyond
all that can be measured: a figure outside of them is damaged, and must not win a comparison.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from heatkv.core.io import check_header, read_json, write_json
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import convert
from heatkv.errors import ScheduleError
from heatkv.profiling.results.ledgers import ByteCount, Ledgers

FORMAT, VERSION = "heatkv-results", 1

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0, le=10**12)]
Positive = Annotated[int, Meta(ge=1, le=10**12)]
# Rounding may take a figure a little beyond its range; SSIM and LPIPS are computed in float32.
Share = Annotated[float, Meta(ge=-1e-9, le=1 + 1e-9)]
Nats = Annotated[float, Meta(ge=-1e-9, le=1e6)]
SignedNats = Annotated[float, Meta(ge=-1e6, le=1e6)]
Decibel = Annotated[float, Meta(ge=-1e-9, le=100)]
Similarity = Annotated[float, Meta(ge=-1 - 1e-5, le=1 + 1e-5)]
Distance = Annotated[float, Meta(ge=-1e-5, le=1e6)]
Milliseconds = Annotated[float, Meta(ge=0, le=1e9)]  # of a part of a drawing, perhaps too short to be measured
WholeMilliseconds = Annotated[float, Meta(gt=0, le=1e9)]

IDLE_UTILISATION = 5
"""Per cent of the time with a kernel running, up to which a GPU counts as idle; drivers round up."""


class Load(Struct, frozen=True):
    """What else a machine did before a measurement. `load_average`: of the last minute, this process included.
    `gpu_utilisation`: per cent of the last second with a kernel of others running. `gpu_processes`: other processes."""

    load_average: float | None = None
    cores: Positive | None = None
    gpu_utilisation: float | None = None
    gpu_processes: int | None = None
    busy: bool = False

    @property
    def reasons(self) -> list[str]:
        """What speaks for the machine being busy."""
        found = []
        if self.load_average is not None and self.cores is not None and self.load_average > self.cores:
            found.append(f"a load average of {self.load_average:.1f} on {self.cores} cores")
        if self.gpu_utilisation is not None and self.gpu_utilisation > IDLE_UTILISATION:
            found.append(f"the GPU is used {self.gpu_utilisation}% of the time by others")
        if self.gpu_processes:
            found.append(f"{self.gpu_processes} other processes on the GPU")
        return found


class TimingMachine(Struct, frozen=True, kw_only=True):
    """What times are to be read with: the machine's load and speed as they were taken."""

    load: Load | None = None
    matrix_product_1024_fp32_one_thread_ms: float | None = None


class Environment(TimingMachine, frozen=True, kw_only=True):
    """The machine and the releases that results were measured with."""

    device: str | None = None
    device_name: str | None = None
    threads: int | None = None
    deterministic: bool | None = None
    system: str | None = None
    versions: dict[str, str] = {}


class Request(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was asked for. `seed` is that of a run with one only; `samples_digest` has one for every seed of several;
    `statistics` is the provenance of those that policies planned from."""

    seed: int | None = None
    seeds: tuple[int, ...] | None = None
    batches: tuple[Positive, ...] | None = None
    repeats: int | None = None
    images: Count | None = None
    pictures: Count | None = None
    draws: Positive | None = None
    samples_digest: str | dict[str, str] | None = None
    statistics: dict[str, Any] | None = None

    def samples_of(self, seed: int | None) -> str | None:
        """The digest of the samples that fidelity at this seed was measured on."""
        digest = self.samples_digest
        return digest.get(str(seed)) if isinstance(digest, dict) else digest


class Latency(Struct, frozen=True, kw_only=True):
    """Times in milliseconds of drawing, decoding included: of `runs` runs, `all` in the order they were made, with an
    interval of the median; and of every scale and phase, from further runs that were watched."""

    median: WholeMilliseconds
    iqr: Milliseconds | None = None
    runs: Positive | None = None
    interval: tuple[WholeMilliseconds, WholeMilliseconds] | None = None
    confidence: Share | None = None
    outliers: Count | None = None
    all: tuple[WholeMilliseconds, ...] = ()
    scales: tuple[Milliseconds, ...] | None = None
    phases: dict[str, Milliseconds] | None = None


class Spread(Struct, frozen=True, kw_only=True):
    """Over samples: the standard deviation, None of one alone, and the quartiles."""

    sd: float | None
    quartiles: tuple[float, float, float]


class Versus(Struct, frozen=True, kw_only=True):
    """Mean of what a row's KL is above another policy's on the same images, with a paired interval of Student."""

    policy: str
    difference: SignedNats
    interval: tuple[SignedNats, SignedNats]
    confidence: Share | None = None
    images: Positive | None = None


# ------------------------------------------------------------------------------------------- the parts of a row


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What was measured. `comparison` and `measurement` name all that fidelity, and memory and times, follow from;
    `rows` are cache rows, `storage` is the whole storage type; `plans` holds digests of files by their names."""

    model: str
    model_fingerprint: str
    policy: Text
    settings: dict[str, Any]
    budget: Text
    rows: Positive
    batch: Positive
    seed: int
    dtype: str
    storage: str
    attention: str
    schedule: tuple[tuple[int, int, int], ...]
    draws: Positive
    plans: dict[str, str] | None = None
    comparison: str
    measurement: str

    @property
    def name(self) -> str:
        """What a reader calls it."""
        return f"{self.policy} {self.budget}"


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What plans and their caches take, the most over the plans of a policy that draws at random. `timeline_bytes`:
    after every layer of every scale, [T][L], under the first plan."""

    budget_bytes: ByteCount
    planned_bytes: ByteCount
    allocated_bytes: ByteCount | None = None
    full_bytes: ByteCount
    current_bytes: ByteCount
    index_bytes: ByteCount
    workspace_bytes: ByteCount
    timeline_bytes: tuple[tuple[ByteCount, ...], ...]
    predicted_kl: SignedNats | None = None
    under_used: bool
    had_no_effect: bool


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Measured memory of drawing under the first plan, or why there is none."""

    memory: Ledgers | None = None
    device_peak_bytes: ByteCount | None = None
    nvml_bytes: ByteCount | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Times:
    """Times of drawing under the first plan. Rows of one moment `timed` were timed in turns."""

    latency_ms: Latency | None = None
    graph_latency_ms: Latency | None = None
    graph_pool_bytes: ByteCount | None = None
    timed: str | None = None
    timing_machine: TimingMachine | None = None


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How far pictures and guided logits are from the full cache's: means over plans, of `images` samples, `pictures`
    of which were drawn freely."""

    images: Count | None = None
    kl: Nats | None = None
    kl_per_scale: tuple[Nats, ...] | None = None
    kl_of_draws: tuple[Nats, ...] | None = None
    kl_of_images: tuple[Nats, ...] | None = None
    top1_agreement: Share | None = None
    top1_per_scale: tuple[Share, ...] | None = None
    top1_of_images: tuple[Share, ...] | None = None
    pictures: Count | None = None
    psnr_db: Decibel | None = None
    psnr_of_pictures: tuple[Decibel, ...] | None = None
    ssim: Similarity | None = None
    ssim_of_pictures: tuple[Similarity, ...] | None = None
    lpips: Distance | None = None
    lpips_of_pictures: tuple[Distance, ...] | None = None
    fid: float | None = None
    spread: dict[str, Spread] | None = None
    not_measured: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class ResultRow(Fidelity, Times, Memory, Bytes, Identity):
    """One policy at one budget, batch and seed."""

    versus: Versus | None = None

    def updated(self, *parts: Bytes | Memory | Times | Fidelity) -> ResultRow:
        """The row with measured parts in the place of its own."""
        return replace(self, **{name: value for part in parts for name, value in vars(part).items()})

    def __post_init__(self) -> None:
        try:
            ScaleSchedule(self.schedule)
        except ScheduleError as error:
            raise ValueError(f"its schedule: {error}") from error
        lengths = {"_of_images": self.images, "_of_pictures": self.pictures, "_per_scale": len(self.schedule)}
        for ending, length in lengths.items():
            for name, values in vars(self).items():
                if name.endswith(ending) and values is not None and len(values) != length:
                    raise ValueError(f"its {name} has {len(values)} entries, where there should be {length}")


# --------------------------------------------------------------------------------------------------- the file


class Results(Struct, frozen=True, kw_only=True):
    """All that a results.json holds; `sampling` are the settings that images are drawn with."""

    format: str = FORMAT
    version: int = VERSION
    environment: Environment = Environment()
    sampling: dict[str, Any] | None = None
    request: Request = Request()
    rows: tuple[ResultRow, ...]


def read_results(path: Path) -> Results:
    """A results.json. Raises FormatError for what is none, naming the field that cannot be."""
    data = check_header(read_json(path), path, FORMAT, VERSION)
    results = convert(data, Results, path)
    # msgspec leaves what a file lacks to the class, and out of the row
    return msgspec.structs.replace(results, rows=tuple(map(replace, results.rows)))


def write_results(path: Path, results: Results) -> None:
    """Write a results.json. Raises FormatError when that cannot be."""
    write_json(path, msgspec.to_builtins(results), indent=1)
