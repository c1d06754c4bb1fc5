"""What there is: `heatkv doctor`, `heatkv models`, `heatkv policies`."""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group as RenderGroup
from rich.table import Table

from heatkv.cli.options import AsJson
from heatkv.cli.output import Fact, facts_json, facts_table, progress, show
from heatkv.models.catalogue import MODELS
from heatkv.policies.base import EvictionPolicy
from heatkv.policies.options import options_of
from heatkv.registry import broken_plugins, registered_policies

if TYPE_CHECKING:
    import torch

    from heatkv.profiling.analysis.doctor import Outcome


def doctor(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="also check in seconds that the package does here what it promises")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What this machine offers: torch, devices, Triton, NVML, optional extras, weights for LPIPS and FID, models with
    weights. Nothing is downloaded.

    Example: heatkv doctor --self-test
    """
    import importlib.util
    from importlib import metadata

    import torch

    from heatkv.engine.attention import triton_launch
    from heatkv.engine.store import available_codes
    from heatkv.profiling.measure.environment import environment
    from heatkv.profiling.measure.perceptual import fid_weights, lpips_weights

    def extra(package: str, distribution: str, why: str) -> str:
        if importlib.util.find_spec(package) is None:
            return f"not installed ({why})"
        return metadata.version(distribution)

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = environment(where)
    texts = {
        "heatkv": seen.versions["heatkv"],
        "python": seen.versions["python"],
        "torch": seen.versions["torch"],
        "device": f"{seen.device_name} ({seen.device})",
        "threads": str(seen.threads),
        "1024^3 fp32 product, one thread": f"{seen.matrix_product_1024_fp32_one_thread_ms} ms",
        "CUDA graphs": "yes" if torch.cuda.is_available() else "no CUDA device",
        "mps": "yes" if torch.backends.mps.is_available() else "no",
        "triton": extra("triton", "triton", "heatkv[triton]"),
        "fused attention kernel": triton_launch.missing(where, torch.bfloat16, 128) or "yes",
        "8-bit storage": ", ".join(available_codes(where)),
        "NVML": extra("pynvml", "nvidia-ml-py", "heatkv[nvml]"),
        "trace viewer": extra("torch_tb_profiler", "torch-tb-profiler", "heatkv[traces]; Perfetto needs nothing"),
        "torchmetrics": extra("torchmetrics", "torchmetrics", "heatkv[metrics]; SSIM, LPIPS and FID need it"),
        "LPIPS": _weights(lpips_weights()),
        "FID": _weights(fid_weights()),
        "models with weights": ", ".join(info.name for info in MODELS.values() if info.bundled),
    }
    facts = [Fact(name, text, name) for name, text in texts.items()]
    tables, outcomes = [facts_table("heatkv doctor", facts, ("what", "found"))], []
    if self_test:
        outcomes = _self_test(where)
        tables.append(_self_test_table(outcomes))
        facts.append(Fact("self_test", [{"check": o.name, "passed": o.passed, "detail": o.detail} for o in outcomes]))
    show(RenderGroup(*tables), as_json, facts_json(facts))
    if not all(outcome.passed for outcome in outcomes):
        raise typer.Exit(1)


def _self_test(device: torch.device) -> list[Outcome]:
    from heatkv.profiling.analysis.doctor import CHECKS, self_test

    outcomes = []
    with progress("self-test", len(CHECKS)) as advance:
        for outcome in self_test(device):
            outcomes.append(outcome)
            advance(1)
    return outcomes


def _self_test_table(outcomes: list[Outcome]) -> Table:
    table = Table("check", "result", "what was seen", title="self-test")
    for outcome in outcomes:
        table.add_row(outcome.name, "passed" if outcome.passed else "FAILED", outcome.detail)
    return table


def _weights(found: Path | str) -> str:
    """Where the weights are, or why there are none."""
    return f"no: {found}" if isinstance(found, str) else f"yes, with the weights at {found}"


def models(as_json: AsJson = False) -> None:
    """The models that can be named: geometry, sizes, full cache per image, where weights come from.

    Example: heatkv models
    """
    table = Table(
        "model", "layers", "heads", "head size", "size", "tokens N", "full MiB/image", "weights", title="models"
    )
    data = []
    for info in MODELS.values():
        sizes = []
        for size in info.sizes:
            geometry = info.geometry(size)
            tokens, full = geometry.schedule.cached_tokens, geometry.full_bytes(rows=2, storage="bfloat16")
            sizes.append(
                {"size": size, "schedule": str(geometry.schedule), "cached_tokens": tokens, "full_bytes": full}
            )
            first = len(sizes) == 1
            row = [info.name, str(info.layers), str(info.heads), str(info.head_dim)] if first else [""] * 4
            table.add_row(*row, size, str(tokens), f"{full / 2**20:.2f}", info.weights if first else "")
        data.append(
            {
                "model": info.name, "layers": info.layers, "heads": info.heads, "head_dim": info.head_dim,
                **sizes[0], "sizes": sizes,
                "weights": info.weights, "runs_here": info.bundled,
            }
        )  # fmt: skip
    table.caption = "full cache with guidance (2 rows) in bfloat16"
    show(table, as_json, data)


def policies(as_json: AsJson = False) -> None:
    """The policies that can be named: kind, what they plan from, one line, options with defaults, source, and the
    module or installed package each comes from; and plug-ins that could not be loaded.

    Example: heatkv policies
    """
    table = Table("policy", "kind", "needs", "what it does", "options", "source", "from", title="policies")
    data = []
    for name, known in registered_policies().items():
        policy, options = known.policy, options_of(known.policy).values()
        row = {
            "policy": name, "kind": policy.kind, "needs": _needs(policy), "summary": policy.summary(),
            "options": [
                {"name": o.name, "default": None if o.default is MISSING else o.default, "type": o.wanted}
                for o in options
            ],
            "source": policy.source, "from": known.source,
        }  # fmt: skip
        data.append(row)
        table.add_row(*(row | {"options": "\n".join(map(str, options))}).values())
    broken = [f"{name} ({reason})" for name, reason in broken_plugins().items()]
    if broken:
        table.caption = f"could not be loaded: {'; '.join(broken)}"
    show(table, as_json, data)


def _needs(policy: type[EvictionPolicy]) -> str:
    """What it plans from with its default options."""
    try:
        return ", ".join(sorted(policy().needs)) or "nothing"
    except TypeError:  # it has options without defaults
        return "depends on its options"
