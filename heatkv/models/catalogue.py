"""The models that can be named: their geometry, which needs no weights, and how they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import as_number, shown, suggest
from heatkv.core.storage_type import DTYPES, torch_dtype
from heatkv.errors import ModelError, ScheduleError
from heatkv.models.base import fingerprint
from heatkv.models.checkpoint import SHARDED, build_bsq, build_infinity, build_var, build_vqvae, read_checkpoint
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.emoji import VAR_CONFIG
from heatkv.models.emoji import load as load_emoji
from heatkv.models.infinity import Infinity
from heatkv.models.sampling import SamplingSettings
from heatkv.models.text_conditional import SAMPLING as INFINITY_SAMPLING
from heatkv.models.text_conditional import TextConditionalModel, check_texts
from heatkv.models.text_encoder import T5TextEncoder
from heatkv.models.var import VAR

VAR_SAMPLING = SamplingSettings(cfg=4.0, top_k=900, top_p=0.95)
"""What VAR's published demonstration uses; its FID figures are at cfg 1.5, top-p 0.96."""

Model = TypeVar("Model", ClassConditionalModel, TextConditionalModel)


@dataclass(frozen=True)
class ModelInfo:
    """Geometry of a named model. `default_size` is the pixel size its weights were trained for; the public code runs
    them at `smaller_sizes` as well, largest first.

    `weights` says where weights come from, `files` and `vae_files` what they are called; `bundled` that they ship with
    this package.
    """

    name: str
    family: Literal["var", "infinity"]
    layers: int
    heads: int
    head_dim: int
    default_size: str
    weights: str
    files: tuple[str, ...] = ()
    vae_files: tuple[str, ...] = ()
    bundled: bool = False
    smaller_sizes: tuple[str, ...] = ()

    @property
    def sizes(self) -> tuple[str, ...]:
        return self.default_size, *self.smaller_sizes

    def schedule(self, size: str | None = None, ratio: float | None = None) -> ScaleSchedule:
        """The schedule for a size ("256", "1M", ...) and a height/width ratio; None takes the model's own.

        Raises ScheduleError for what the family or this model does not have.
        """
        wanted = self.default_size if size is None else size
        if self.family == "infinity":
            schedule = ScaleSchedule.infinity(wanted, 1.0 if ratio is None else ratio)
        elif ratio is not None and as_number(ratio) != 1:
            raise ScheduleError(f"{self.name} draws square images only; leave the ratio out")
        else:
            wanted = str(wanted).removesuffix("px")
            schedule = VAR_CONFIG.schedule if self.bundled else ScaleSchedule.var(wanted)
        if wanted not in self.sizes:
            others = [info for info in MODELS.values() if info.family == self.family and wanted in info.sizes]
            near = min(others, key=lambda info: abs(info.layers - self.layers), default=None)
            way_out = "leave the size out" if near is None or self.bundled else f"use {near.name} for {wanted}"
            raise ScheduleError(f"{self.name} is published for {' and '.join(self.sizes)}, not {wanted}; {way_out}")
        return schedule

    def geometry(self, size: str | None = None, ratio: float | None = None) -> CacheGeometry:
        return CacheGeometry(self.layers, self.heads, self.head_dim, self.schedule(size, ratio))


def _names(*stems: str) -> tuple[str, ...]:
    return tuple(f"{stem}{suffix}" for stem in stems for suffix in (".pth", ".safetensors"))


_VAR_VAE = _names("vae_ch160v4096z32")
_D32_VAE, _D56_VAE = _names("infinity_vae_d32reg"), _names("infinity_vae_d56_f8_14_patchify")


def _var(depth: int, size: str) -> ModelInfo:
    stem = f"var_d{depth}"
    where = f"FoundationVision/VAR {stem}.pth"
    return ModelInfo(f"var-d{depth}", "var", depth, depth, 64, size, where, _names(stem), _VAR_VAE)


def _infinity(name: str, layers: int, heads: int, size: str, stem: str, suffix: str, vae: tuple[str, ...]) -> ModelInfo:
    where = f"FoundationVision/Infinity {stem}{suffix}"
    return ModelInfo(name, "infinity", layers, heads, 128, size, where, (stem, *_names(stem)), vae)


_EMOJI = ModelInfo(
    "emoji", "var", VAR_CONFIG.depth, VAR_CONFIG.heads, VAR_CONFIG.head_dim, "48", "in this package", bundled=True
)
_SMALLER = ScaleSchedule.infinity_sizes()[-2::-1]
"""Smaller sizes than 1M."""

MODELS: dict[str, ModelInfo] = {
    info.name: info
    for info in (
        _EMOJI,
        *(_var(depth, "256") for depth in (16, 20, 24, 30)),
        _var(36, "512"),
        replace(_infinity("infinity-2b", 32, 16, "1M", "infinity_2b_reg", ".pth", _D32_VAE), smaller_sizes=_SMALLER),
        replace(_infinity("infinity-8b", 40, 28, "1M", "infinity_8b_weights", "/", _D56_VAE), smaller_sizes=_SMALLER),
        _infinity("infinity-8b-512", 40, 28, "0.25M", "infinity_8b_512x512_weights", "/", _D56_VAE),
    )
}


def model_info(name: str) -> ModelInfo:
    """The named model. Raises ModelError with a suggestion when there is none."""
    if name not in MODELS:
        raise ModelError(f"unknown model {shown(name)}{suggest(str(name), MODELS)}")
    return MODELS[name]


def load_model(
    name: str,
    weights: str | Path | None = None,
    *,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    prompts: Sequence[str] = (),
    size: str | None = None,
    ratio: float | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> ClassConditionalModel | TextConditionalModel:
    """A model ready to draw, its blocks' matrices in `dtype`: "float32", "bfloat16" or "float16".

    `emoji` needs nothing else. VAR and Infinity need `weights`: the public file (or sharded folder), or a folder that
    holds it; the `vae` is looked for beside it unless given. Infinity draws the published schedule of `size` and
    `ratio`, and turns text into features with `text_encoder`, a local folder or a hub name; `prompts` are what
    measurements draw. Nothing in a weights file is executed. Raises ModelError for an unknown name, type or device and
    for weights of another model, FormatError for an unreadable file, ScheduleError for an unknown size or ratio.
    """
    info = model_info(name)
    schedule = info.schedule(size, ratio)
    check_texts(prompts)
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {shown(dtype)}; known: {', '.join(DTYPES)}")
    compute, where = torch_dtype(dtype), _usable_device(device)
    if info.bundled and (weights is not None or vae is not None):
        raise ModelError(f"the weights of {name} are in this package; leave weights and vae out")
    if info.family == "var" and (text_encoder is not None or prompts):
        raise ModelError(f"{name} draws classes, not prompts; leave the text encoder and prompts out")
    if prompts and text_encoder is None:
        raise ModelError(f"turning prompts into features for {name} needs its text encoder; name it as text_encoder")
    if info.bundled:
        return _placed(load_emoji(), compute, where)
    if weights is None:
        raise ModelError(f"{name} needs its weights, {info.weights}: name the file or its folder as weights")
    path = find_weights(weights, info.files)
    if info.family == "var":
        return _placed(load_var(info, path, vae), compute, where)
    vae_path = find_beside(path, info.vae_files) if vae is None else Path(vae)
    encoder = None if text_encoder is None else T5TextEncoder(text_encoder, dtype=compute, device=where)
    model = _placed(load_infinity(info, path, vae_path, schedule, encoder), compute, where)
    return replace(model, examples=tuple(model.prompts(prompts))) if prompts else model


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(1, device=where).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ModelError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return where


def _placed(model: Model, dtype: torch.dtype, device: torch.device) -> Model:
    model.transformer.set_compute_dtype(dtype).to(device)
    (model.vae if isinstance(model, TextConditionalModel) else model.vqvae).to(device)
    return model


def find_weights(path: str | Path, names: Sequence[str]) -> Path:
    """`path` itself when it is a file or a sharded folder, else the first of `names` inside it."""
    path = Path(path)
    if not path.is_dir() or any((path / name).exists() for name in SHARDED):
        return path
    for name in names:
        if (path / name).exists():
            return path / name
    raise ModelError(f"{path} holds none of {', '.join(names)}; name the file itself")


def find_beside(weights: Path, names: Sequence[str]) -> Path:
    """The first of `names` in the folder of `weights`, or in the folder around it."""
    for folder in (weights if weights.is_dir() else weights.parent, weights.parent):
        for name in names:
            if (folder / name).exists():
                return folder / name
    raise ModelError(f"no {names[0]} lies beside {weights}; name it as vae")


def load_var(info: ModelInfo, weights: Path, vae: str | Path | None) -> ClassConditionalModel:
    """A named VAR from its public files, or from a trainer file, which holds both networks. In fp32 on the CPU."""
    content = read_checkpoint(weights)
    transformer = build_var(content)
    config = transformer.config
    _check_sizes(info, weights, transformer)
    if config.schedule != info.schedule():
        raise ModelError(f"{weights} runs the schedule {config.schedule}, {info.name} runs {info.schedule()}")
    if vae is not None or "trainer" not in content:
        content = read_checkpoint(find_beside(weights, info.vae_files) if vae is None else vae)
    vqvae = build_vqvae(content, config.patch_sides)
    if (vqvae.config.vocab_size, vqvae.config.z_channels) != (config.vocab_size, config.z_channels):
        raise ModelError(
            f"the VQVAE has {vqvae.config.vocab_size} codes of {vqvae.config.z_channels} channels, the transformer "
            f"draws {config.vocab_size} of {config.z_channels}; take {info.vae_files[0]}"
        )
    return ClassConditionalModel(info.name, transformer, vqvae, VAR_SAMPLING, fingerprint(transformer))


def load_infinity(
    info: ModelInfo,
    weights: str | Path,
    vae: str | Path,
    schedule: ScaleSchedule,
    text_encoder: T5TextEncoder | None = None,
) -> TextConditionalModel:
    """A named Infinity from its public files, on the CPU, every tensor in the type of its file.

    `weights` is a file or a sharded folder. Raises FormatError for unreadable files, and ModelError for weights of
    another model, or a VAE that does not belong to it.
    """
    if Path(vae).name == "infinity_vae_d32.pth":  # same shapes, so nothing else could tell
        raise ModelError(f"{vae} was trained apart from the public transformers; take {info.vae_files[0]}")
    transformer = build_infinity(read_checkpoint(weights), dtype=None)
    _check_sizes(info, weights, transformer)
    decoder = build_bsq(read_checkpoint(vae))
    return TextConditionalModel(
        info.name, transformer, decoder, schedule, INFINITY_SAMPLING, fingerprint(transformer), text_encoder
    )


def _check_sizes(info: ModelInfo, weights: str | Path, transformer: VAR | Infinity) -> None:
    config = transformer.config
    if (config.depth, config.heads, config.head_dim) != (info.layers, info.heads, info.head_dim):
        raise ModelError(
            f"{weights} has {config.depth} layers x {config.heads} heads of {config.head_dim}; {info.name} has "
            f"{info.layers} x {info.heads} of {info.head_dim}"
        )
