"""From the tensors of a checkpoint to a model: configuration from keys and shapes, strict loading, clear reports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from heatkv.errors import FormatError, ModelError
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig

State = Mapping[str, Tensor]

_REDUNDANT = re.compile(r"attn_bias_for_masking|lvl_1L|.*\.zero_k_bias|quantize\.ema_vocab_hit_SV")
"""Buffers of public files that say nothing beyond the configuration; they may be present or absent."""

_PUBLIC_SIDES = {(10, 680): (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (10, 2240): (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FormatError when it is missing, truncated or something else."""
    try:
        return load_file(path)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise FormatError(f"{path} is not a whole safetensors file: {error}") from error


def load_strictly(module: nn.Module, state: State, what: str) -> None:
    """Copy `state` into `module`; every tensor must be there, none left over, all of the right shape."""
    expected = module.state_dict()
    needed = {name for name in expected if not _REDUNDANT.fullmatch(name)}
    given = {name for name in state if not _REDUNDANT.fullmatch(name)}
    problems = [f"missing {name}" for name in sorted(needed - given)]
    problems += [f"unexpected {name}" for name in sorted(given - needed)]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(needed & given)
        if state[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ModelError(f"these weights are not the {what}'s: {shown}")
    module.load_state_dict({name: state[name] for name in needed}, strict=False)


def _tensor(state: State, name: str, what: str) -> Tensor:
    if name not in state:
        raise ModelError(f"these are no {what} weights: {name} is missing")
    return state[name]


def _count(state: State, pattern: str) -> int:
    """1 + the largest number that `pattern`'s group matches in the keys, 0 when there is none."""
    found = (re.match(pattern, name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def var_config(state: State) -> VARConfig:
    """The configuration of a VAR transformer, from its keys and shapes. Raises ModelError when it is none."""
    what = "VAR transformer"
    width, z_channels = _tensor(state, "word_embed.weight", what).shape
    levels, total = _tensor(state, "lvl_embed.weight", what).shape[0], _tensor(state, "pos_1LC", what).shape[1]
    scale = state.get("blocks.0.attn.scale_mul_1H11")
    if "lvl_1L" in state:
        counts = torch.bincount(state["lvl_1L"].flatten().long(), minlength=levels).tolist()
        sides: Sequence[int] = [math.isqrt(count) for count in counts]
        if [side * side for side in sides] != counts:
            raise ModelError(f"the scales of these weights have {counts} tokens, which are not all squares")
    else:
        sides = _PUBLIC_SIDES.get((levels, total), ())
        if not sides:
            raise ModelError(f"{levels} scales with {total} tokens are no published schedule, and lvl_1L is missing")
    return VARConfig(
        patch_sides=tuple(sides),
        depth=_count(state, r"blocks\.(\d+)\."),
        width=width,
        heads=width // 64 if scale is None else scale.shape[1],
        num_classes=_tensor(state, "class_emb.weight", what).shape[0] - 1,
        vocab_size=_tensor(state, "head.weight", what).shape[0],
        z_channels=z_channels,
        mlp_ratio=_tensor(state, "blocks.0.ffn.fc1.weight", what).shape[0] / width,
        shared_adaln="shared_ada_lin.1.weight" in state,
        l2_norm=scale is not None,
    )


def vqvae_config(state: State, patch_sides: Sequence[int]) -> VQVAEConfig:
    """The configuration of a VQVAE, from its keys and shapes. Raises ModelError when it is none."""
    what = "VQVAE"
    vocab_size, z_channels = _tensor(state, "quantize.embedding.weight", what).shape
    channels = _tensor(state, "decoder.conv_out.weight", what).shape[1]
    levels = _count(state, r"decoder\.up\.(\d+)\.")
    sizes = [_tensor(state, f"decoder.up.{i}.block.0.conv1.weight", what).shape[0] for i in range(levels)]
    return VQVAEConfig(
        patch_sides=tuple(patch_sides),
        vocab_size=vocab_size,
        z_channels=z_channels,
        channels=channels,
        channel_multipliers=tuple(size // channels for size in sizes),
        num_phi=_count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.") or 1,
    )


def build_var(state: State) -> VAR:
    """A VAR transformer with these weights, in evaluation mode and fp32."""
    model = VAR(var_config(state))
    load_strictly(model, state, "VAR transformer")
    return model.eval().requires_grad_(False)


def build_vqvae(state: State, patch_sides: Sequence[int]) -> VQVAE:
    """A VQVAE with these weights, with its encoder when they have one, in evaluation mode and fp32."""
    model = VQVAE(vqvae_config(state, patch_sides), encoder="encoder.conv_in.weight" in state)
    load_strictly(model, state, "VQVAE")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions run faster on CPUs
    return model.eval().requires_grad_(False)
