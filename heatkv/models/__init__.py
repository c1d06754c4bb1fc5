"""The models that can be named: their geometry, which needs no weights, and how they are loaded."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import torch

from heatkv.errors import ModelError, ScheduleError
from heatkv.geometry import CacheGeometry
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.emoji import VAR_CONFIG
from heatkv.models.emoji import load as load_emoji
from heatkv.schedule import ScaleSchedule

COMPUTE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelInfo:
    """Geometry of a named model. `default_size` is the pixel size its weights were trained for.

    `weights` says where weights come from; `bundled` that they ship with this package.
    """

    name: str
    family: Literal["var", "infinity"]
    layers: int
    heads: int
    head_dim: int
    default_size: str
    weights: str
    bundled: bool = False

    def schedule(self, size: str | None = None, ratio: float | None = None) -> ScaleSchedule:
        """The schedule for a size ("256", "1M", ...) and a height/width ratio; None takes the model's own.

        Raises ScheduleError for what the family does not have.
        """
        if self.family == "infinity":
            return ScaleSchedule.infinity(size or self.default_size, 1.0 if ratio is None else ratio)
        if ratio not in (None, 1.0):
            raise ScheduleError(f"{self.name} draws square images only; leave the ratio out")
        if self.bundled:
            if size not in (None, self.default_size):
                raise ScheduleError(f"{self.name} draws {self.default_size} px only; leave the size out")
            return VAR_CONFIG.schedule
        return ScaleSchedule.var(size or self.default_size)

    def geometry(self, size: str | None = None, ratio: float | None = None) -> CacheGeometry:
        return CacheGeometry(self.layers, self.heads, self.head_dim, self.schedule(size, ratio))


def _var(depth: int, size: str) -> ModelInfo:
    return ModelInfo(f"var-d{depth}", "var", depth, depth, 64, size, f"FoundationVision/VAR var_d{depth}.pth")


MODELS: dict[str, ModelInfo] = {
    info.name: info
    for info in (
        ModelInfo(
            "emoji",
            "var",
            VAR_CONFIG.depth,
            VAR_CONFIG.heads,
            VAR_CONFIG.head_dim,
            "48",
            "in this package",
            bundled=True,
        ),
        *(_var(depth, "256") for depth in (16, 20, 24, 30)),
        _var(36, "512"),
        ModelInfo("infinity-2b", "infinity", 32, 16, 128, "1M", "FoundationVision/Infinity infinity_2b_reg.pth"),
        ModelInfo("infinity-8b", "infinity", 40, 28, 128, "1M", "FoundationVision/Infinity infinity_8b_weights/"),
        ModelInfo(
            "infinity-8b-512",
            "infinity",
            40,
            28,
            128,
            "0.25M",
            "FoundationVision/Infinity infinity_8b_512x512_weights/",
        ),
    )
}


def model_info(name: str) -> ModelInfo:
    """The named model. Raises ModelError with a suggestion when there is none."""
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ModelError(f"unknown model {name!r}{hint} Known: {', '.join(MODELS)}")


def load_model(name: str, *, dtype: str = "float32", device: str | torch.device = "cpu") -> ClassConditionalModel:
    """A model ready to draw, its blocks' matrices in `dtype`. Raises ModelError when this release cannot run it."""
    info = model_info(name)
    if not info.bundled:
        raise ModelError(
            f"this release knows the geometry of {name} (heatkv solve) but cannot run it; it runs: "
            f"{', '.join(known.name for known in MODELS.values() if known.bundled)}"
        )
    if dtype not in COMPUTE_DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; known: {', '.join(COMPUTE_DTYPES)}")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    model = load_emoji()
    model.transformer.set_compute_dtype(COMPUTE_DTYPES[dtype]).to(where)
    model.vqvae.to(where)
    return model
