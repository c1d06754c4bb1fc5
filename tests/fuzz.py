"""Damaged files against every loader: a typed error of one line or a valid result, and no code in a file runs.

`make fuzz`, or `python tests/fuzz.py --count 12000 --seed 0`; a few of each are in the suite (test_fuzz.py).
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from strategies import statistics_of
from support.rows import row_data, write_file

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan, CoarseCells
from heatkv.core.plan_file import load_plan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import HeatKVError
from heatkv.generation.images import read_pixels
from heatkv.models.checkpoint import build_var, read_checkpoint
from heatkv.models.var import VAR, VARConfig
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.results.artefacts import read_scas, save_scas
from heatkv.profiling.results.row import read_results
from heatkv.testing.material import made_up_mass

Load = Callable[[Path], Any]
GEOMETRY = CacheGeometry(2, 3, 4, ScaleSchedule.of([(1, 1), (1, 2), (2, 2), (4, 4), (5, 4)]))
MOST_SECONDS = 20
"""Of processor time, after which a load is given up."""
ROOM = 6 << 30
"""Bytes of address space beyond what the process has: past that, allocations fail, and the machine is safe."""


# ------------------------------------------------------------------------------------------------- whole files


def same(first: Any, second: Any) -> bool:
    """Equal, and no boolean taken for a number."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)


def _use_plan(path: Path) -> None:
    """A plan that is accepted means what its file says."""
    plan, told = load_plan(path), json.loads(path.read_bytes())
    said = plan.to_json()
    coarse = [
        {**one, **{name: cells[name] for name in one if name in cells}}
        for one, cells in zip(said.get("coarse", []), told.get("coarse", []), strict=True)
    ]  # its bias has a default
    told["schedule"] = [scale if len(scale) == 3 else [1, *scale] for scale in told["schedule"]]
    assert same(said, {name: coarse if name == "coarse" else told[name] for name in said})
    assert all(told.get(name) is None for name in ("value", "value_bound", "gap", "weights") if name not in said)
    plan.bytes(2, "bfloat16")


def _use_statistics(path: Path) -> None:
    found = Statistics.load(path)
    assert np.isfinite([found.mass.sum(), found.spread.sum(), found.gini().sum()]).all()
    found.save(path)
    assert Statistics.load(path) == found
    HeadRankings.from_scores(found.scas)


def make_loaders(root: Path) -> dict[str, Load]:
    """What reads the whole files that it writes below `root`, by their names."""
    problem = PlanningProblem(GEOMETRY, Budget.parse("50%"), model="tiny")
    static = make_policy("streaming").plan(problem)
    coarse = CoarseCells.uncalibrated("mean", static.last_read, GEOMETRY.schedule)
    plans: dict[str, CachePlan] = {
        "plan": replace(static, coarse=(coarse,)),
        "dynamic": make_policy("snapkv").plan(problem),
    }
    for name, plan in plans.items():
        plan.save(root / f"{name}.json")
    orders = [[[h, l] for l in range(GEOMETRY.layers) for h in range(GEOMETRY.heads)]]
    (root / "orders.json").write_text(json.dumps(orders))
    statistics_of(GEOMETRY, made_up_mass(GEOMETRY, 2, 0)).save(root / "statistics.safetensors")
    torch.manual_seed(0)
    state = VAR(VARConfig((1, 2, 3), 2, 16, 2, num_classes=3, vocab_size=6, z_channels=4)).state_dict()
    state["lvl_1L"] = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 4, 9]))[None]
    torch.save({"epoch": 1, "trainer": {"var_wo_ddp": state}}, root / "var.pth")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, root / "var.safetensors")
    Image.new("RGB", (7, 5), "red").save(root / "picture.png")
    write_file(root, [row_data()])
    save_scas(root / "scas.json", Statistics.load(root / "statistics.safetensors"))

    def network(path: Path) -> Any:
        return build_var(read_checkpoint(path))

    return {
        "plan.json": _use_plan, "dynamic.json": _use_plan,
        "orders.json": lambda path: HeadRankings.load_orders(path, GEOMETRY).ranks,
        "statistics.safetensors": _use_statistics, "var.pth": network, "var.safetensors": network,
        "picture.png": read_pixels, "results.json": read_results, "scas.json": read_scas,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------- mutations


VALUES: tuple[Any, ...] = (
    None, True, [], {}, [[]], [{}], "", "x", "\0", "\x1b[31m", "../../x", "a" * 100_000, 0, 1, -1, 2, 0.5, 1e300,
    2**31, 2**63, 2**64, 10**400, [[1, 1] for _ in range(3_000)], [[65536] * 3 for _ in range(5)],
    [["x"] * 2_000 + ["y" * 500_000]],
)  # fmt: skip


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """What disks, networks and editors do to a file."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 8, 100)))
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return rng.choice((
        b"", data[:start], data[start:], data + data, b"\xef\xbb\xbf" + data, data[:start] + data[stop:],
        data[:start] + rng.randbytes(stop - start) + data[stop:], data[:stop] + data[start:], bytes(flipped),
        b"[" * 100_000 + data,
    ))  # fmt: skip


def damage_value(value: Any, rng: random.Random) -> Any:
    """The value with one to three members replaced, removed or doubled."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 3)):
        holder: Any = root
        while True:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            inner = holder[key]
            if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
                break
            holder = inner
        kind = rng.randrange(6)
        if kind == 0 and isinstance(holder, dict):
            holder["more"] = holder.pop(key)
        elif kind == 1 and holder is not root:
            del holder[key]
        elif kind == 2 and isinstance(holder, list) and holder is not root:
            holder.append(inner)
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        if not root[0]:
            break
    return root[0]


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or another JSON text in it."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header.get("__metadata__", {})
    if "heatkv" in metadata and rng.random() < 0.6:
        metadata["heatkv"] = json.dumps(damage_value(json.loads(metadata["heatkv"]), rng))
    else:
        header = damage_value(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def damaged(path: Path, rng: random.Random) -> bytes:
    """The content of a file after an accident."""
    data = path.read_bytes()
    if rng.random() < 0.7 and path.suffix == ".json":
        return json.dumps(damage_value(json.loads(data), rng)).encode()
    if rng.random() < 0.7 and path.suffix == ".safetensors":
        return damage_header(data, rng)
    return damage_bytes(data, rng)


# --------------------------------------------------------------------------------------------------------- runs


def outcome(load: Load, whole: Path, seed: int, folder: Path) -> str:
    """How the mutant of this seed ends in a folder of its own: "valid", "refused", or what it must not do."""
    path = folder / whole.name
    path.write_bytes(damaged(whole, random.Random(f"{whole.name} {seed}")))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(path)
    except HeatKVError as error:
        return "refused" if str(error).strip() and str(error).isprintable() else f"it said {str(error)!r:.200}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    return "valid"


def _stop(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it took {MOST_SECONDS} seconds of processor time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12_000, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0, help="others than those of seed 0")
    parser.add_argument("--only", help="name of one file")
    options = parser.parse_args()
    signal.signal(signal.SIGPROF, _stop)
    with tempfile.TemporaryDirectory() as temporary:
        loaders = make_loaders(Path(temporary))
        names = [name for name in loaders if options.only in (None, name)]
        (size,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + ROOM,) * 2)
        (place := Path(temporary) / "place").mkdir()
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for index in range(options.count):
            name, seed = names[index % len(names)], options.seed * 10**7 + index // len(names)
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            ended = outcome(loaders[name], Path(temporary) / name, seed, place)
            signal.setitimer(signal.ITIMER_PROF, 0)
            counts[name, ended if ended in ("valid", "refused") else "broken"] += 1
            if ended not in ("valid", "refused"):
                print(f"{name} {seed}: {ended}", flush=True)
    for name in names:
        print(f"{name:24}", *(f"{counts[name, kind]:6} {kind}" for kind in ("valid", "refused", "broken")))
    return int(any(kind == "broken" for _, kind in counts))


if __name__ == "__main__":
    sys.exit(main())
