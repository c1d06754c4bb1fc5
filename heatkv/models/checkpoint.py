"""From the tensors of a checkpoint to a model: configuration from keys and shapes, strict loading, clear reports."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from heatkv.core.io import opened, read_json, whole_file
from heatkv.core.schema import shown
from heatkv.engine.watch import finite
from heatkv.errors import FormatError, ModelError, NumericsError
from heatkv.models.bsq import BitwiseVAE, BSQConfig
from heatkv.models.infinity import Infinity, InfinityConfig
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig

State = Mapping[str, Tensor]

_REDUNDANT = re.compile(
    r"attn_bias_for_masking|lvl_1L|.*\.zero_k_bias|quantize\.ema_vocab_hit_SV|Infinity_(visible_kvlen|invisible_qlen)"
)
"""Buffers of public files that say nothing beyond the configuration; they may be present or absent."""

_PUBLIC_SIDES = {(10, 680): (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (10, 2240): (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FormatError when it is missing, truncated or something else."""
    path = whole_file(path)
    try:
        return load_file(path)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # whatever safetensors and torch stumble over: types and shapes that one of them lacks
        raise FormatError(f"{path} is not a whole safetensors file: {error}") from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a weights file holds: a .safetensors file, a torch file, or a folder of either, sharded or not.

    A torch file is read by torch with `weights_only=True`. Raises FormatError for what is missing, broken, or holds
    more than torch reads so.
    """
    path = Path(path)
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path))
    content = _read_torch(path)
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}, not named tensors")
    return content


def _read_torch(path: Path) -> Any:
    """What a torch file holds: tensors on the CPU, backed by the file, and plain values."""
    with opened(path) as file:
        zipped = file.read(4) == b"PK\3\4"  # files of torch before 1.6 are none, and cannot be mapped into memory
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} is no torch file of tensors and plain values only, and nothing else is loaded, as it could run "
            "code; where you trust it, load it elsewhere and save its state dict"
        ) from error
    except Exception as error:  # whatever torch stumbles over in damaged files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FormatError(f"{path} is not a whole torch file: {reason}") from error


_WHOLE = ("model.safetensors", "pytorch_model.bin")
SHARDED = (*(f"{name}.index.json" for name in _WHOLE), *_WHOLE)
"""What makes a folder one checkpoint: the names of the transformers convention."""


def _read_folder(folder: Path) -> dict[str, Any]:
    for name in _WHOLE:
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_shards(index)
        if (folder / name).exists():
            return _read_file(folder / name)
    raise FormatError(f"{folder} holds neither model.safetensors nor pytorch_model.bin, nor an index of either")


def _read_shards(index: Path) -> dict[str, Any]:
    """The tensors that the index assigns to each file, from that file."""
    told = read_json(index)
    shard_of = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(file, str) for file in shard_of.values()):
        raise FormatError(f"{index} has no weight_map of tensor names to file names")
    names_in: dict[str, list[str]] = {}
    for name, file in shard_of.items():
        names_in.setdefault(file, []).append(name)
    state: dict[str, Any] = {}
    for file, names in sorted(names_in.items()):
        if file == ".." or Path(file).name != file:  # the name of `.` and of nothing is empty
            raise FormatError(f"{index} names {shown(file)}, which is not a file of its folder")
        shard = _read_file(index.parent / file)
        absent = [name for name in names if name not in shard]
        if absent:
            raise FormatError(f"{index.parent / file} lacks {absent[0][:100]}, which {index.name} says it holds")
        state |= {name: shard[name] for name in names}
    return state


def check_state(module: nn.Module, state: State, what: str) -> set[str]:
    """The names in `state` that `module` takes; every tensor must be there, none left over, all of the right shape.

    Raises ModelError, and NumericsError for NaN and infinity.
    """
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
    problems += [
        f"{name} is of {state[name].dtype}, not of floating-point numbers"
        for name in sorted(needed & given)
        if expected[name].is_floating_point() and not state[name].is_floating_point()
    ]
    if problems:
        some = "; ".join(problem[:200] for problem in problems[:6])
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ModelError(f"these weights are not the {what}'s: {some}{more}")
    broken = [name for name in sorted(needed) if not finite(state[name])]
    if broken:
        more = f" and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
        raise NumericsError(
            f"the {what}'s weights are not all finite: {broken[0]}{more} {'hold' if more else 'holds'} NaN or "
            "infinity; take the file anew from where it came, or one that was not stored in float16"
        )
    return needed


def load_strictly(module: nn.Module, state: State, what: str) -> None:
    """Copy `state` into `module`, when it fits without rest."""
    needed = check_state(module, state, what)
    with _shapes_of(what):
        module.load_state_dict({name: state[name] for name in needed}, strict=False)


@contextmanager
def _shapes_of(what: str) -> Iterator[None]:
    """Sizes that no such network can have, which torch refuses in its own way while one is made, are a ModelError."""
    try:
        yield
    except (ArithmeticError, IndexError, TypeError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"these are no {what} weights: no network has these shapes ({reason})") from error


def _check_fit(make: Callable[[], nn.Module], state: State, what: str) -> None:
    """Hold the tensors against the network that `make` makes before it takes memory: its shapes follow from a few of
    theirs, and may be those of a network of any size."""
    with _shapes_of(what), torch.device("meta"):
        skeleton = make()
    check_state(skeleton, state, what)


def _shape(state: State, name: str, what: str, axes: int) -> tuple[int, ...]:
    """The sizes of a tensor that must be there, none of them zero."""
    if name not in state:
        raise ModelError(f"these are no {what} weights: {name} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != axes or 0 in shape:
        raise ModelError(f"these are no {what} weights: {name} is of shape {shape}; it must have {axes} axes")
    return shape


_MOST_LAYERS = 256
"""Of a network, six times the largest public one's: so many are made before anything else about them is known."""


def _count(state: State, before: str) -> int:
    """1 + the largest number that follows `before` in the keys, 0 when there is none."""
    pattern = re.compile(re.escape(before) + r"([0-9]{1,6})\.")
    count = max((int(match[1]) + 1 for match in map(pattern.match, state) if match), default=0)
    if count > _MOST_LAYERS:
        raise ModelError(f"{before}{count - 1} makes {count} of them; at most {_MOST_LAYERS} can be loaded")
    return count


_PREFIXES = ("module.", "_orig_mod.")
"""What wrappers put before every name."""


def _stripped(state: State) -> State:
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return _stripped({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def var_state(content: Mapping[str, Any]) -> State:
    """The transformer's tensors in a plain or trainer file of VAR, without the prefixes of wrappers."""
    return _stripped(_tensors_of(content, [("trainer", "var_wo_ddp"), ("var_wo_ddp",)], "VAR transformer"))


def vqvae_state(content: Mapping[str, Any]) -> State:
    """The VQVAE's tensors in a plain or trainer file of VAR, without the prefixes of wrappers."""
    return _stripped(_tensors_of(content, [("trainer", "vae_local"), ("vae_local",)], "VQVAE"))


def var_config(state: State) -> VARConfig:
    """The configuration of a VAR transformer, from its keys and shapes. Raises ModelError when it is none."""
    what = "VAR transformer"
    width, z_channels = _shape(state, "word_embed.weight", what, 2)
    levels, total = _shape(state, "lvl_embed.weight", what, 2)[0], _shape(state, "pos_1LC", what, 3)[1]
    scale = "blocks.0.attn.scale_mul_1H11"
    if "lvl_1L" in state:
        of_tokens = state["lvl_1L"].flatten()
        if len(of_tokens) != total or of_tokens.is_complex() or not ((of_tokens >= 0) & (of_tokens < levels)).all():
            raise ModelError(
                f"these are no {what} weights: lvl_1L does not tell the scales, below {levels}, of {total} tokens"
            )
        counts = torch.bincount(of_tokens.long(), minlength=levels).tolist()
        sides: Sequence[int] = [math.isqrt(count) for count in counts]
        if [side * side for side in sides] != counts:
            raise ModelError(f"the scales of these weights have {counts} tokens, which are not all squares")
    else:
        sides = _PUBLIC_SIDES.get((levels, total), ())
        if not sides:
            raise ModelError(f"{levels} scales with {total} tokens are no published schedule, and lvl_1L is missing")
    return VARConfig(
        patch_sides=tuple(sides),
        depth=_count(state, "blocks."),
        width=width,
        heads=_shape(state, scale, what, 4)[1] if scale in state else width // 64,
        num_classes=_shape(state, "class_emb.weight", what, 2)[0] - 1,
        vocab_size=_shape(state, "head.weight", what, 2)[0],
        z_channels=z_channels,
        mlp_ratio=_shape(state, "blocks.0.ffn.fc1.weight", what, 2)[0] / width,
        shared_adaln="shared_ada_lin.1.weight" in state,
        l2_norm=scale in state,
    )


def vqvae_config(state: State, patch_sides: Sequence[int]) -> VQVAEConfig:
    """The configuration of a VQVAE, from its keys and shapes. Raises ModelError when it is none."""
    what = "VQVAE"
    vocab_size, z_channels = _shape(state, "quantize.embedding.weight", what, 2)
    channels = _shape(state, "decoder.conv_out.weight", what, 4)[1]
    levels = _count(state, "decoder.up.")
    sizes = [_shape(state, f"decoder.up.{i}.block.0.conv1.weight", what, 4)[0] for i in range(levels)]
    return VQVAEConfig(
        patch_sides=tuple(patch_sides),
        vocab_size=vocab_size,
        z_channels=z_channels,
        channels=channels,
        channel_multipliers=tuple(size // channels for size in sizes),
        num_phi=_count(state, "quantize.quant_resi.qresi_ls.") or 1,
    )


def build_var(state: State) -> VAR:
    """A VAR transformer with these weights, in evaluation mode and fp32."""
    config, what = var_config(state), "VAR transformer"
    _check_fit(lambda: VAR(config), state, what)
    model = VAR(config)
    load_strictly(model, state, what)
    return model.eval().requires_grad_(False)


def build_vqvae(state: State, patch_sides: Sequence[int]) -> VQVAE:
    """A VQVAE with these weights, with its encoder when they have one, in evaluation mode and fp32."""
    config, encoder = vqvae_config(state, patch_sides), "encoder.conv_in.weight" in state
    _check_fit(lambda: VQVAE(config, encoder), state, "VQVAE")
    model = VQVAE(config, encoder)
    load_strictly(model, state, "VQVAE")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # convolutions run faster on CPUs
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------- Infinity

_CHUNKED = re.compile(r"block_chunks\.([0-9]{1,6})\.module\.([0-9]{1,6})\.(.*)")
_TRAINED, _AVERAGED = ("gpt_fsdp", "gpt_wo_ddp"), ("gpt_ema_fsdp", "gpt_ema_for_vis")
_VARIANTS = {
    r"blocks\.\d+\.ca_gamma": "a gain on cross attention",
    r"blocks\.\d+\.ada_lin\..*": "AdaLN that blocks do not share",
    r"blocks\.\d+\.ffn\.fcg\..*": "SwiGLU",
    r"norm0_ve\..*": "a norm before the first block",
    r"class_emb\..*": "classes instead of text",
}
"""Tensors of variants that upstream can train and no public weights have."""


def _tensors_of(content: Mapping[str, Any], paths: Sequence[tuple[str, ...]], what: str) -> State:
    """The state dict at the first of `paths` that there is, or `content` itself when it is one."""
    for path in paths:
        inner: Any = content
        for step in path:
            inner = inner.get(step) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            content = inner
            break
    state = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    }
    if not state:
        entries = ", ".join(name if isinstance(name, str) else shown(name) for name in list(content)[:20])
        raise ModelError(f"these are no {what} weights: they have the entries {entries or 'none'}")
    return state


def infinity_state(content: Mapping[str, Any], *, average: bool = False) -> State:
    """The transformer's tensors in a flat, sharded or trainer file, blocks counted through.

    `average` takes the trainer's moving average in place of its last weights. Raises ModelError for what this project
    cannot run.
    """
    what = "Infinity transformer"
    names = _AVERAGED if average else _TRAINED
    flat = _tensors_of(content, [("trainer", name) for name in names] + [(name,) for name in names], what)
    chunked = [match for match in map(_CHUNKED.fullmatch, flat) if match]
    per_chunk = max((int(match[2]) + 1 for match in chunked), default=0)
    if chunked and any(name.startswith("blocks.") for name in flat):
        raise ModelError(f"these are no {what} weights: blocks are there both in chunks and without")
    state = {}
    for name, tensor in flat.items():
        match = _CHUNKED.fullmatch(name)
        if match:
            name = f"blocks.{int(match[1]) * per_chunk + int(match[2])}.{match[3]}"
        if name.endswith(".sa.scale_mul_1H11"):  # (1, 1, H, 1) in files made for another attention kernel
            tensor = tensor.reshape(1, tensor.numel(), 1, 1)
        if name in state:
            raise ModelError(f"these are no {what} weights: {name} is there twice")
        state[name] = tensor
    for pattern, variant in _VARIANTS.items():
        found = next((name for name in state if re.fullmatch(pattern, name)), None)
        if found is not None:
            raise ModelError(f"these weights are of a variant that this release cannot run: {variant} ({found})")
    return state


def infinity_config(content: Mapping[str, Any]) -> InfinityConfig:
    """The configuration of an Infinity transformer, from names and shapes. Raises ModelError when it is none."""
    state, what = infinity_state(content), "Infinity transformer"
    width, bits = _shape(state, "word_embed.weight", what, 2)
    positions, channels = _shape(state, "cfg_uncond", what, 2)
    return InfinityConfig(
        depth=_count(state, "blocks."),
        width=width,
        heads=_shape(state, "blocks.0.sa.scale_mul_1H11", what, 4)[1],
        bits=bits,
        mlp_hidden=_shape(state, "blocks.0.ffn.fc1.weight", what, 2)[0],
        pool_heads=_shape(state, "text_proj_for_sos.ca.mat_q", what, 3)[1],
        text_channels=channels,
        text_positions=positions,
        max_scales=_shape(state, "lvl_embed.weight", what, 2)[0],
    )


def _adopt(module: nn.Module, state: State, what: str) -> None:
    """Make the tensors of `state` those of a module made without storage, so that weights never lie in memory twice."""
    needed = check_state(module, state, what)
    with _shapes_of(what):
        module.load_state_dict({name: state[name] for name in needed}, strict=False, assign=True)
        module.eval().requires_grad_(False)


def build_infinity(
    content: Mapping[str, Any], dtype: torch.dtype | None = torch.float32, *, average: bool = False
) -> Infinity:
    """An Infinity transformer with these weights, in evaluation mode, the blocks' matrices in `dtype`.

    `dtype=None` leaves every tensor in the type of the file, for `set_compute_dtype` to settle before it runs.
    """
    state = infinity_state(content, average=average)
    config = infinity_config(state)
    with _shapes_of("Infinity transformer"), torch.device("meta"):
        model = Infinity(config)
    _adopt(model, state, "Infinity transformer")
    return model if dtype is None else model.set_compute_dtype(dtype)


_INNER_NAME = re.compile(r"\.(?:(conv\w*|nin_shortcut)\.conv|(norm\w*)\.norm)\.(weight|bias)$")
"""Layers of the bitwise VAE may hide their tensors one name deeper, `X.conv.weight` for `X.weight`."""


def bsq_state(content: Mapping[str, Any]) -> State:
    """The encoder's and decoder's tensors in a bitwise VAE file or a trainer file; everything else is left out."""
    flat = _tensors_of(content, [("vae",), ("trainer", "vae_local")], "bitwise VAE")
    if not any(name.startswith("decoder.") for name in flat):
        raise ModelError(f"these are no bitwise VAE weights: they have no decoder, but tensors like {next(iter(flat))}")
    return {
        _INNER_NAME.sub(lambda m: f".{m[1] or m[2]}.{m[3]}", name): tensor
        for name, tensor in flat.items()
        if name.startswith(("encoder.", "decoder."))
    }


def bsq_config(content: Mapping[str, Any]) -> BSQConfig:
    """The configuration of a bitwise VAE, from names and shapes. Raises ModelError when it is none."""
    state, what = bsq_state(content), "bitwise VAE"
    channels = _shape(state, "decoder.conv_out.weight", what, 4)[1]
    levels = _count(state, "decoder.up.")
    sizes = [_shape(state, f"decoder.up.{i}.block.0.conv1.weight", what, 4)[0] for i in range(levels)]
    return BSQConfig(
        z_channels=_shape(state, "decoder.conv_in.weight", what, 4)[1],
        channels=channels,
        channel_multipliers=tuple(size // channels for size in sizes),
    )


def build_bsq(content: Mapping[str, Any]) -> BitwiseVAE:
    """A bitwise VAE with these weights, with its encoder when they have one, in evaluation mode and fp32."""
    state = bsq_state(content)
    config = bsq_config(state)
    with _shapes_of("bitwise VAE"), torch.device("meta"):
        model = BitwiseVAE(config, encoder="encoder.conv_in.weight" in state)
    _adopt(model, state, "bitwise VAE")
    return model.float()
