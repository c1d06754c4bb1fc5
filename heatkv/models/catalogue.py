"""The models that can be named: their geometry, which needs no weights, and how they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import torch

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import as_number, shown, suggest
from heatkv.core.storage_type import DTYPES, torch_dtype
from heatkv.errors import ModelError, ScheduleError
from heatkv.models.checkpoint import SHARDED, build_bsq, build_infinity, build_var, build_vqvae, read_checkpoint
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.emoji import VAR_CONFIG
from heatkv.models.emoji import WEIGHTS as EMOJI_WEIGHTS
from heatkv.models.emoji import load as load_emoji
from heatkv.models.fingerprint import fingerprint_of_file, know_fingerprint
from heatkv.models.infinity import Infinity
from heatkv.models.sampling import SamplingSettings
from heatkv.models.text_conditional import SAMPLING as INFINITY_SAMPLING
from heatkv.models.text_conditional import Prompt, TextConditionalModel, check_texts
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
            raise ScheduleError(f"{self.name} is published for {' and '.join(self.sizes)}, not {wanted}")
        return schedule

    def geometry(self, size: str | None = None, ratio: float | None = None) -> CacheGeometry:
        """Raises ModelError for a family, whose weights alone tell, and ScheduleError as `schedule` does."""
        if not self.layers:
            raise ModelError(f"the sizes of {self.name!r} are those of its weights; name one of {', '.join(MODELS)}")
        return CacheGeometry(self.layers, self.heads, self.head_dim, self.schedule(size, ratio))


def _names(*stems: str) -> tuple[str, ...]:
    return tuple(f"{stem}{suffix}" for stem in stems for suffix in (".pth", ".safetensors"))


def _var(depth: int, size: str) -> ModelInfo:
    stem = f"var_d{depth}"
    return ModelInfo(
        f"var-d{depth}", "var", depth, depth, 64, size, f"FoundationVision/VAR {stem}.pth", _names(stem),
        _names("vae_ch160v4096z32"),
    )  # fmt: skip


def _infinity(name: str, layers: int, heads: int, size: str, file: str, vae: str) -> ModelInfo:
    stem = file.removesuffix(".pth").removesuffix("/")
    return ModelInfo(
        name, "infinity", layers, heads, 128, size, f"FoundationVision/Infinity {file}", (stem, *_names(stem)),
        _names(vae), smaller_sizes=ScaleSchedule.infinity_sizes()[-2::-1] if size == "1M" else (),
    )  # fmt: skip


_D32, _D56 = "infinity_vae_d32reg", "infinity_vae_d56_f8_14_patchify"
_EMOJI = ModelInfo(
    "emoji", "var", VAR_CONFIG.depth, VAR_CONFIG.heads, VAR_CONFIG.head_dim, "48", "in this package", bundled=True
)
MODELS: dict[str, ModelInfo] = {
    info.name: info
    for info in (
        _EMOJI,
        *(_var(depth, "256") for depth in (16, 20, 24, 30)),
        _var(36, "512"),
        _infinity("infinity-2b", 32, 16, "1M", "infinity_2b_reg.pth", _D32),
        _infinity("infinity-8b", 40, 28, "1M", "infinity_8b_weights/", _D56),
        _infinity("infinity-8b-512", 40, 28, "0.25M", "infinity_8b_512x512_weights/", _D56),
    )
}


FAMILIES: dict[str, ModelInfo] = {
    info.name: replace(info, layers=0, heads=0, head_dim=0)
    for info in (replace(_var(16, "256"), name="var"), replace(MODELS["infinity-2b"], name="infinity"))
}
"""Models of any other size, which follows from their weights."""


def model_info(name: str) -> ModelInfo:
    """The named model or family. Raises ModelError with a suggestion when there is none."""
    known = MODELS | FAMILIES
    if name not in known:
        raise ModelError(f"unknown model {shown(name)}{suggest(str(name), known)}")
    return known[name]


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
    keep_text_encoder: bool = False,
) -> ClassConditionalModel | TextConditionalModel:
    """A model ready to draw, its blocks' matrices in `dtype`: "float32", "bfloat16" or "float16".

    `emoji` needs nothing else; `var` and `infinity` are those families in any size. VAR and Infinity need `weights`:
    the public file (or sharded folder), or a folder that holds it; the `vae` is looked for beside it unless given.
    Infinity draws the published schedule of `size` and `ratio`, and turns text into features with `text_encoder`, a
    local folder or a hub name; `prompts` are what measurements draw. The encoder's weights are in memory only while
    texts are encoded, those of `prompts` before the transformer is read, unless `keep_text_encoder`, which suits
    servers. Nothing in a weights file is executed. Raises ModelError for an unknown name, type or device and for
    weights of another model, FormatError for an unreadable file, ScheduleError for an unknown size or ratio.
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
        return _placed(load_emoji(), EMOJI_WEIGHTS, EMOJI_WEIGHTS, compute, where)
    if weights is None:
        raise ModelError(f"{name} needs its weights, {info.weights}: name the file or its folder as weights")
    path = find_weights(weights, info.files)
    if info.family == "var":
        return _placed(*_load_var(info, path, vae), compute, where)
    encoder, examples = None, tuple[Prompt, ...]()
    if text_encoder is not None:
        encoder = T5TextEncoder(text_encoder, dtype=compute, device=where, keep=keep_text_encoder)
        if prompts:
            examples = tuple(Prompt(x, text=text) for x, text in zip(encoder.encode(prompts), prompts, strict=True))
    return replace(_placed(*_load_infinity(info, path, vae, schedule, encoder), compute, where), examples=examples)


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(1, device=where).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ModelError(f"device {str(device)!r} cannot be used here: {reason}") from error
    return where


def _placed(model: Model, weights: Path, vae: Path, dtype: torch.dtype, device: torch.device) -> Model:
    """The model, as it was read from these files, in its type and on its device."""
    networks: tuple[torch.nn.Module, ...] = model.transformer, model.decoder
    names = [fingerprint_of_file(network, path) for network, path in zip(networks, (weights, vae), strict=True)]
    model.transformer.set_compute_dtype(dtype)
    for network, name in zip(networks, names, strict=True):
        know_fingerprint(network.to(device), name)
    return model


def find_weights(path: str | Path, names: Sequence[str]) -> Path:
    """`path` itself when it is a file or a sharded folder, else the first of `names` inside it."""
    path = Path(path)
    if not path.is_dir() or any((path / name).exists() for name in SHARDED):
        return path
    return _first(path, names) or _missing(f"{path} holds none of {', '.join(names)}; name the file itself")


def _vae_beside(weights: Path, info: ModelInfo) -> Path:
    """The VAE in the folder of the weights, or in the folder around it."""
    found = _first(weights, info.vae_files) or _first(weights.parent, info.vae_files)
    return found or _missing(f"no {info.vae_files[0]} lies beside {weights}; name it as vae")


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _missing(message: str) -> NoReturn:
    raise ModelError(message)


def _load_var(info: ModelInfo, weights: Path, vae: str | Path | None) -> tuple[ClassConditionalModel, Path, Path]:
    """A named VAR from its public files, or from a trainer file, which holds both networks, and the files. In fp32 on
    the CPU."""
    content = read_checkpoint(weights)
    transformer = build_var(content, heads=info.heads or None)
    config = transformer.config
    _check_sizes(info, weights, transformer)
    if info.layers and config.schedule != info.schedule():
        raise ModelError(f"{weights} runs the schedule {config.schedule}, {info.name} runs {info.schedule()}")
    beside = weights
    if vae is not None or "trainer" not in content:
        beside = Path(vae or _vae_beside(weights, info))
        content = read_checkpoint(beside)
    vqvae = build_vqvae(content, config.patch_sides)
    codes, drawn = ((x.vocab_size, x.z_channels) for x in (vqvae.config, config))
    if codes != drawn:
        raise ModelError(
            f"the VQVAE has {codes[0]} codes of {codes[1]} channels, the transformer draws {drawn[0]} of {drawn[1]}; "
            f"take {info.vae_files[0]}"
        )
    return ClassConditionalModel(info.name, transformer, vqvae, VAR_SAMPLING), weights, beside


def _load_infinity(
    info: ModelInfo, weights: Path, vae: str | Path | None, schedule: ScaleSchedule, text_encoder: T5TextEncoder | None
) -> tuple[TextConditionalModel, Path, Path]:
    """A named Infinity from its public files, and the files; on the CPU, every tensor in the type of its file."""
    vae = Path(vae or _vae_beside(weights, info))
    if vae.name == "infinity_vae_d32.pth":  # same shapes, so nothing else could tell
        raise ModelError(f"{vae} was trained apart from the public transformers; take {info.vae_files[0]}")
    transformer = build_infinity(read_checkpoint(weights))
    _check_sizes(info, weights, transformer)
    decoder = build_bsq(read_checkpoint(vae))
    model = TextConditionalModel(info.name, transformer, decoder, schedule, INFINITY_SAMPLING, text_encoder)
    return model, weights, vae


def _check_sizes(info: ModelInfo, weights: Path, transformer: VAR | Infinity) -> None:
    config = transformer.config
    if info.layers and (config.depth, config.heads, config.head_dim) != (info.layers, info.heads, info.head_dim):
        raise ModelError(
            f"{weights} has {config.depth} layers x {config.heads} heads of {config.head_dim}; {info.name} has "
            f"{info.layers} x {info.heads} of {info.head_dim}"
        )
