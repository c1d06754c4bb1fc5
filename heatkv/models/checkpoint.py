"""From the tensors of a checkpoint to a model: configuration from names and shapes, strict loading, clear reports.

Where each number of a configuration stands in the weights is written down in one table per network.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heatkv.core.io import opened, read_json
from heatkv.core.schema import shown
from heatkv.engine.watch import finite
from heatkv.errors import FormatError, ModelError, NumericsError
from heatkv.models.bsq import BitwiseVAE, BSQConfig
from heatkv.models.infinity import Infinity, InfinityConfig
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig

State = Mapping[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


# ------------------------------------------------------------------------------------------------- reading files

_WHOLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = (*(f"{name}.index.json" for name in _WHOLE), *_WHOLE)
"""What makes a folder one checkpoint: the names of the transformers convention."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a weights file holds: a .safetensors file, a torch file, or a folder of either, sharded or not.

    A torch file is read by torch with `weights_only=True`; its tensors are backed by the file. Raises FormatError for
    what is missing, broken, or holds more than torch reads so.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    for name in _WHOLE:
        if (index := path / f"{name}.index.json").exists():
            return _read_shards(index)
        if (path / name).exists():
            return _read_file(path / name)
    raise FormatError(f"{path} holds neither model.safetensors nor pytorch_model.bin, nor an index of either")


def _read_file(path: Path) -> dict[str, Any]:
    with opened(path) as file:
        zipped = file.read(4) == b"PK\3\4"  # files of torch before 1.6 are not, and cannot be mapped into memory
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} is no torch file of tensors and plain values only, and nothing else is loaded, as it could run "
            "code; where you trust it, load it elsewhere and save its state dict"
        ) from error
    except Exception as error:  # whatever torch and safetensors stumble over in damaged files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FormatError(f"{path} is not a whole weights file: {reason}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors that the index assigns to each file, from that file."""
    content = read_json(index)
    file_names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_names, dict) or not all(isinstance(file, str) for file in file_names.values()):
        raise FormatError(f"{index} has no weight_map of tensor names to file names")
    state: dict[str, Any] = {}
    for file in sorted(set(file_names.values())):
        if file == ".." or Path(file).name != file:  # the name of `.` and of nothing is empty
            raise FormatError(f"{index} names {shown(file)}, which is not a file of its folder")
        shard = _read_file(index.parent / file)
        names = [name for name, its_file in file_names.items() if its_file == file]
        if absent := [name for name in names if name not in shard]:
            raise FormatError(f"{index.parent / file} lacks {absent[0][:100]}, which {index.name} says it holds")
        state |= {name: shard[name] for name in names}
    return state


# ---------------------------------------------------------------------------- where files hold a network's tensors

_PREFIXES = ("module.", "_orig_mod.")
"""What wrappers put before every name."""
_CHUNKED = re.compile(r"block_chunks\.([0-9]+)\.module\.([0-9]+)\.(.*)")
_INNER_NAME = re.compile(r"\.(?:(conv\w*|nin_shortcut)\.conv|(norm\w*)\.norm)\.(weight|bias)$")
"""Layers of the bitwise VAE may hide their tensors one name deeper, `X.conv.weight` for `X.weight`."""


def _state(content: Mapping[str, Any], *names: str) -> dict[str, Tensor]:
    """The state dict of one of these names in a trainer file or a slim one, or the content itself, without the
    prefixes of wrappers."""
    trainer = content.get("trainer")
    places = [place for place in (trainer, content) if isinstance(place, Mapping)]
    inner = next((place[name] for place in places for name in names if isinstance(place.get(name), Mapping)), content)
    state = {name: x for name, x in inner.items() if isinstance(name, str) and isinstance(x, Tensor)}
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): x for name, x in state.items()}
    if not state:
        raise ModelError(f"these are no weights: they have the entries {', '.join(map(str, content)) or 'none'}"[:300])
    return state


def infinity_state(content: Mapping[str, Any]) -> State:
    """The transformer's tensors in a flat, sharded or trainer file, blocks counted through."""
    flat = _state(content, "gpt_fsdp", "gpt_wo_ddp")
    chunked = {name: match for name in flat if (match := _CHUNKED.fullmatch(name))}
    per_chunk = max((int(match[2]) + 1 for match in chunked.values()), default=0)
    state = {}
    for name, tensor in flat.items():
        if match := chunked.get(name):
            name = f"blocks.{int(match[1]) * per_chunk + int(match[2])}.{match[3]}"
        if name.endswith(".sa.scale_mul_1H11"):  # (1, 1, H, 1) in files made for another attention kernel
            tensor = tensor.reshape(1, -1, 1, 1)
        state[name] = tensor
    return state


def vqvae_state(content: Mapping[str, Any]) -> State:
    """The tensors of quantiser and decoder in a plain or trainer file of VAR; the encoder's are left out."""
    flat = _state(content, "vae_local")
    return {name: x for name, x in flat.items() if not name.startswith(("encoder.", "quant_conv."))}


def public_state(transformer: nn.Module) -> State:
    """The tensors of a VAR or Infinity of the public code, by the names that this package's own has."""
    state = infinity_state(transformer.state_dict())
    return {name: x for name, x in state.items() if not _REDUNDANT.fullmatch(name)}


def bsq_state(content: Mapping[str, Any]) -> State:
    """The decoder's tensors in a bitwise VAE file or a trainer file; everything else is left out."""
    flat = _state(content, "vae", "vae_local")
    return {
        _INNER_NAME.sub(lambda m: f".{m[1] or m[2]}.{m[3]}", name): tensor
        for name, tensor in flat.items()
        if name.startswith("decoder.")
    }


# ------------------------------------------------------------------------------- from tensors to a configuration

Table = Mapping[str, tuple[str, int]]
"""Fields of a configuration: the tensor that has the number in its shape, and along which axis."""

_VAR: Table = {
    "width": ("word_embed.weight", 0),
    "z_channels": ("word_embed.weight", 1),
    "vocab_size": ("head.weight", 0),
}
_VQVAE: Table = {
    "vocab_size": ("quantize.embedding.weight", 0),
    "z_channels": ("quantize.embedding.weight", 1),
    "channels": ("decoder.conv_out.weight", 1),
}
_INFINITY: Table = {
    "width": ("word_embed.weight", 0),
    "bits": ("word_embed.weight", 1),
    "heads": ("blocks.0.sa.scale_mul_1H11", 1),
    "mlp_hidden": ("blocks.0.ffn.fc1.weight", 0),
    "pool_heads": ("text_proj_for_sos.ca.mat_q", 1),
    "text_positions": ("cfg_uncond", 0),
    "text_channels": ("cfg_uncond", 1),
    "max_scales": ("lvl_embed.weight", 0),
}
_BSQ: Table = {"z_channels": ("decoder.conv_in.weight", 1), "channels": ("decoder.conv_out.weight", 1)}

_PUBLIC_SIDES = {(10, 680): (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (10, 2240): (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
"""The published schedules of VAR by the number of scales and of tokens."""


def var_config(state: State, heads: int | None = None) -> VARConfig:
    """The configuration of a VAR transformer, from its names and shapes; `heads` for attention that is not normalised,
    whose tensors do not tell. Raises ModelError without them."""
    sizes, scale = _sizes(_VAR, state), "blocks.0.attn.scale_mul_1H11"
    if scale not in state and heads is None:
        raise ModelError(
            "attention of these weights is not normalised, and nothing tells its heads; load them by a published name"
        )
    return VARConfig(
        **sizes,
        patch_sides=_patch_sides(state),
        depth=_count(state, "blocks."),
        heads=state[scale].shape[1] if scale in state else heads,  # type: ignore[arg-type]
        num_classes=state["class_emb.weight"].shape[0] - 1,
        mlp_ratio=state["blocks.0.ffn.fc1.weight"].shape[0] / sizes["width"],
        shared_adaln="shared_ada_lin.1.weight" in state,
        l2_norm=scale in state,
    )


def _patch_sides(state: State) -> tuple[int, ...]:
    """The sides of the scales, from `lvl_1L`, the scale of every token, or of a published schedule without it."""
    scales, total = state["lvl_embed.weight"].shape[0], state["pos_1LC"].shape[1]
    if "lvl_1L" not in state:
        if (scales, total) not in _PUBLIC_SIDES:
            raise ModelError(f"{scales} scales with {total} tokens are no published schedule, and lvl_1L is missing")
        return _PUBLIC_SIDES[scales, total]
    counts = torch.bincount(state["lvl_1L"].flatten().long(), minlength=scales).tolist()
    sides = tuple(math.isqrt(count) for count in counts)
    if [side * side for side in sides] != counts:
        raise ModelError(f"the scales of these weights have {counts} tokens, which are not all squares")
    return sides


def vqvae_config(state: State, patch_sides: Sequence[int]) -> VQVAEConfig:
    """The configuration of a VQVAE, from its names and shapes."""
    num_phi = _count(state, "quantize.quant_resi.qresi_ls.") or 1  # a single one has no number
    return VQVAEConfig(tuple(patch_sides), **_sizes(_VQVAE, state), num_phi=num_phi, **_multipliers(state))


def infinity_config(state: State) -> InfinityConfig:
    """The configuration of an Infinity transformer, from names, with blocks counted through, and shapes."""
    return InfinityConfig(depth=_count(state, "blocks."), **_sizes(_INFINITY, state))


def bsq_config(state: State) -> BSQConfig:
    """The configuration of a bitwise VAE, from names and shapes."""
    return BSQConfig(**_sizes(_BSQ, state), **_multipliers(state))


def _sizes(table: Table, state: State) -> dict[str, Any]:
    return {field: state[name].shape[axis] for field, (name, axis) in table.items()}


def _multipliers(state: State) -> dict[str, Any]:
    """The channels of a decoder's resolutions over those of the highest."""
    levels = range(_count(state, "decoder.up."))
    sizes = [state[f"decoder.up.{i}.block.0.conv1.weight"].shape[0] for i in levels]
    return {"channel_multipliers": tuple(size // state["decoder.conv_out.weight"].shape[1] for size in sizes)}


def _count(state: State, before: str) -> int:
    """1 + the largest number, of three digits at most, that follows `before` in the names, 0 when there is none."""
    pattern = re.compile(re.escape(before) + r"([0-9]{1,3})\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, state) if match), default=0)


# ------------------------------------------------------------------------------------------------ building networks

_REDUNDANT = re.compile(
    r"attn_bias_for_masking|lvl_1L|.*\.zero_k_bias|quantize\.ema_vocab_hit_SV|Infinity_(visible_kvlen|invisible_qlen)"
)
"""Buffers of public files that say nothing beyond the configuration; they may be present or absent."""


def build_var(content: Mapping[str, Any], config: VARConfig | None = None, heads: int | None = None) -> VAR:
    """A VAR transformer from a plain or trainer file of VAR, in evaluation mode and fp32.

    `config` is only needed for weights without `lvl_1L` of a schedule that is not published, `heads` for attention that
    is not normalised.
    """
    state = _state(content, "var_wo_ddp")
    return _build("VAR transformer", state, lambda: VAR(config or var_config(state, heads))).float()


def build_vqvae(content: Mapping[str, Any], patch_sides: Sequence[int]) -> VQVAE:
    """A VQVAE from a plain or trainer file of VAR, without the encoder, in evaluation mode and fp32."""
    state = vqvae_state(content)
    model = _build("VQVAE", state, lambda: VQVAE(vqvae_config(state, patch_sides))).float()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions run faster on CPUs
    return model


def build_infinity(content: Mapping[str, Any]) -> Infinity:
    """An Infinity transformer in evaluation mode, every tensor in the type of the file until `set_compute_dtype`."""
    state = infinity_state(content)
    return _build("Infinity transformer", state, lambda: Infinity(infinity_config(state)))


def build_bsq(content: Mapping[str, Any]) -> BitwiseVAE:
    """A bitwise VAE with these weights, without the encoder, in evaluation mode and fp32."""
    state = bsq_state(content)
    return _build("bitwise VAE", state, lambda: BitwiseVAE(bsq_config(state))).float()


def _build(name: str, state: State, make: Callable[[], Network]) -> Network:
    """The network that `make` makes, with the tensors of `state` as its own, in their type.

    It is made without storage: weights never lie in memory twice, and shapes that follow from a few of the tensors may
    be those of a network of any size. Raises ModelError for tensors that do not fit, NumericsError for NaN or infinity.
    """
    needed = {key: x for key, x in state.items() if not _REDUNDANT.fullmatch(key)}
    with _refused(name):
        with torch.device("meta"):
            network = make()
        network.load_state_dict(needed, assign=True)
        network.eval().requires_grad_(False)
    broken = [key for key, x in needed.items() if not finite(x)]
    if broken:
        raise NumericsError(
            f"the {name}'s weights are not all finite: {broken[0]} and {len(broken) - 1} more hold NaN or infinity; "
            "take the file anew from where it came, or one that was not stored in float16"
        )
    return network


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """What torch and Python raise for tensors of another network is a ModelError."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"these are no {name} weights: {error.args[0]} is missing") from error
    except (ArithmeticError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"these are no {name} weights: {' '.join(str(error).split())[:600]}") from error
