"""What fits in a given memory: weights, what every image takes, a step of the largest scale, and the cache.

Every figure follows from shapes. Weights are counted on models without storage, everything else is the most bytes of
tensors alive at once while a model of two layers draws, one image at a time in the largest scale, on tensors without
storage (docs/fit.md). Not counted: the driver's own memory, workspaces of libraries, an allocator's fragmentation, and
other programs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any

import torch
from torch import nn

from heatkv.core.budget import parse_bytes
from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.storage_type import StorageType, torch_dtype
from heatkv.engine.attention.grouped import GROUP_BYTES
from heatkv.errors import HeatKVError
from heatkv.generation.loop import Generator
from heatkv.models import emoji as emoji_model
from heatkv.models.bsq import BSQ_D32, BSQ_D56, BitwiseVAE
from heatkv.models.catalogue import VAR_SAMPLING, ModelInfo
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.infinity import INFINITY_2B, INFINITY_8B, Infinity
from heatkv.models.text_conditional import SAMPLING as INFINITY_SAMPLING
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.models.text_encoder import MAX_POSITIONS
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig
from heatkv.profiling.measure.ledger import FusedAttention, TensorLedger

PROMPT_TOKENS = 77
"""Positions of a prompt, where nothing else is said; the text encoder of Infinity takes up to 512."""

MOST_IMAGES = 1 << 16


def text_encoder_parameters() -> int:
    """Parameters of flan-t5-xl's encoder (Raffel et al. 2020, version 1.1: gated feed-forward, no biases)."""
    width, hidden, layers, vocabulary, buckets, heads = 2048, 5120, 24, 32128, 32, 32
    return (vocabulary + 1) * width + layers * (4 * width**2 + 3 * width * hidden + 2 * width) + buckets * heads


@dataclass(frozen=True)
class Footprint:
    """Bytes that drawing `images` at once takes beside the cache, and those of the full cache.

    `prompt` is what the classes or prompts decide once per image (AdaLN vectors, keys and values of cross attention)
    and `shared_prompt` what all images share of it; `codes` what is known of the pictures so far. `step` is the most
    that comes and goes while one image runs through the largest scale, `decoding` while one picture is decoded, when
    the cache was given back. `tables` say what is read and written where, for any number of images; `uncoded` is what
    the scales that are never coded take more than others would; `gathered` what the heads of a layer of one image read
    at most with the full cache, `gathered_head` the part of one head. The text encoder works before the transformer is
    read, or beside it where it is kept.
    """

    images: int
    rows: int
    transformer: int
    decoder: int
    text_encoder: int
    prompt: int
    codes: int
    step: int
    decoding: int
    full_cache: int
    shared_prompt: int = 0
    keeps_text_encoder: bool = False
    uncoded: int = 0
    tables: int = 0
    gathered: int = 0
    gathered_head: int = 0

    @property
    def attention(self) -> int:
        """What attention keeps beside the cache: tables, and room for the largest group of heads that it gathers."""
        return self.tables + max(min(GROUP_BYTES, self.gathered), self.gathered_head)

    @property
    def weights(self) -> int:
        return self.transformer + self.decoder + self.text_encoder * self.keeps_text_encoder

    @property
    def without_cache(self) -> int:
        """While images are drawn."""
        return self.weights + self.shared_prompt + self.prompt + self.codes + self.step + self.attention

    @property
    def otherwise(self) -> int:
        """The most while there is no cache: when texts are encoded, or pictures decoded."""
        return max(self.text_encoder, self.weights + self.codes + self.decoding)

    def times(self, count: int) -> Footprint:
        """That of `count` times the images, which share the weights and take turns in the largest scale."""
        grown = ("images", "rows", "prompt", "codes", "full_cache", "uncoded")
        return replace(self, **{name: getattr(self, name) * count for name in grown})


_Shapes = ClassConditionalModel | TextConditionalModel


@cache
def shapes(info: ModelInfo, schedule: ScaleSchedule, dtype: torch.dtype, layers: int) -> _Shapes:
    """The model with this many layers, on tensors without storage."""
    with torch.device("meta"):
        if info.family == "infinity":
            large = info.heads == INFINITY_8B.heads
            config, vae_config = (INFINITY_8B, BSQ_D56) if large else (INFINITY_2B, BSQ_D32)
            infinity = Infinity(replace(config, depth=layers)).set_compute_dtype(dtype)
            vae = BitwiseVAE(vae_config)
            model = TextConditionalModel(info.name, infinity, vae, schedule, INFINITY_SAMPLING)
            model.rotations()  # made once and kept like weights, so no part of drawing
            return model
        if info.bundled:
            var_config, vqvae_config = emoji_model.VAR_CONFIG, emoji_model.VQVAE_CONFIG
        else:
            sides = tuple(height for _, height, _ in schedule.scales)
            width, shared = info.heads * info.head_dim, info.layers == 36
            var_config = VARConfig(sides, info.layers, width, info.heads, shared_adaln=shared)
            vqvae_config = VQVAEConfig(sides)
        var = VAR(replace(var_config, depth=layers)).set_compute_dtype(dtype)
        sampling = emoji_model.SAMPLING if info.bundled else VAR_SAMPLING
        return ClassConditionalModel(info.name, var, VQVAE(vqvae_config), sampling)


def _labels(model: _Shapes, images: int, prompt_tokens: int) -> list[Any]:
    """What to draw: any classes, or prompts of so many tokens."""
    if isinstance(model, ClassConditionalModel):
        return [0] * images
    return [Prompt(torch.empty(prompt_tokens, model.transformer.config.text_channels)) for _ in range(images)]


def _settings(model: _Shapes, guided: bool) -> Any:
    unguided = 1.0 if isinstance(model, TextConditionalModel) else 0.0
    return model.sampling if guided else replace(model.sampling, cfg=unguided)


def prompt_bytes(model: _Shapes, images: int, guided: bool, prompt_tokens: int) -> int:
    """Bytes of what classes or prompts decide, which live from the first scale to the last."""
    with torch.inference_mode(), FusedAttention(), torch.device("meta"), TensorLedger() as ledger:
        kept = model.begin(_labels(model, images, prompt_tokens), _settings(model, guided))
        live: int = ledger.live
    return live - kept.f_hat.nbytes


def drawing_bytes(model: _Shapes, images: int, guided: bool, prompt_tokens: int) -> int:
    """Peak of all tensors but weights and cache, from the labels to the codes."""
    with torch.inference_mode(), FusedAttention(), torch.device("meta"):
        settings = _settings(model, guided)
        generator: Generator[Any] = Generator(model, model.full_plan(), images, settings, micro_batch=1)
        with TensorLedger() as ledger:
            generator.draw(_labels(model, images, prompt_tokens), decode=False)
    return int(ledger.peak)


def decoding_bytes(model: _Shapes) -> int:
    """Peak of all tensors that decoding one picture makes."""
    with torch.inference_mode(), FusedAttention(), torch.device("meta"):
        f_hat = model.begin(_labels(model, 1, 1), model.sampling).f_hat
        with TensorLedger() as ledger:
            model.decode(f_hat)
    return int(ledger.peak)


def table_bytes(geometry: CacheGeometry, coded: bool = False) -> int:
    """Bytes of the full cache's tables: the slots that every target reads, in 4 bytes, and those that are written, in
    8, with whose they are. Where sinks and codes are read together, 8 more say which comes where."""
    schedule = geometry.schedule
    read, written = sum(schedule.offsets[: len(schedule)]), schedule.cached_tokens + len(schedule) - 1
    return ((12 if coded else 4) * read + 8 * written) * geometry.layers * geometry.heads


@cache
def _one_image(
    info: ModelInfo, size: str | None, ratio: float | None, dtype: str, guided: bool, code: str | None,
    prompt_tokens: int,
) -> Footprint:  # fmt: skip
    geometry, rows, compute = info.geometry(size, ratio), 2 if guided else 1, torch_dtype(dtype)
    storage = str(StorageType(dtype, code))
    uncoded, coded = geometry.token_head_bytes(rows, storage)
    gathered = 2 * rows * geometry.schedule.total_tokens * geometry.head_dim * compute.itemsize
    # a layer's tensors are gone before the next one runs; from the second on, its input is not the transformer's
    whole, short = (shapes(info, geometry.schedule, compute, layers) for layers in (info.layers, 2))
    prompts, of_short = ([prompt_bytes(x, n, guided, prompt_tokens) for n in (1, 2)] for x in (whole, short))
    drawing = [drawing_bytes(short, n, guided, prompt_tokens) for n in (1, 2)]
    codes = drawing[1] - drawing[0] - (of_short[1] - of_short[0])
    watched = len(geometry.schedule) * geometry.layers * 3 * rows * geometry.heads * 4
    tables = whole.rotations() if isinstance(whole, TextConditionalModel) else ()
    decoder: nn.Module = whole.decoder
    return Footprint(
        images=1, rows=rows,
        transformer=sum(x.nbytes for x in (*whole.transformer.parameters(), *tables)),
        decoder=sum(x.nbytes for x in decoder.parameters()),
        text_encoder=text_encoder_parameters() * compute.itemsize if info.family == "infinity" else 0,
        prompt=prompts[1] - prompts[0],
        shared_prompt=2 * prompts[0] - prompts[1],
        codes=codes + watched,
        step=drawing[0] - of_short[0] - codes,
        decoding=decoding_bytes(whole),
        full_cache=geometry.full_bytes(rows, storage),
        uncoded=geometry.uncoded_token_heads() * (uncoded - coded),
        tables=table_bytes(geometry, code is not None),
        gathered=gathered * geometry.heads, gathered_head=gathered,
    )  # fmt: skip


def footprint(
    info: ModelInfo, images: int, *, size: str | None = None, ratio: float | None = None, dtype: str = "bfloat16",
    guided: bool = True, keep_text_encoder: bool = False, code: str | None = None, prompt_tokens: int = PROMPT_TOKENS,
) -> Footprint:  # fmt: skip
    """Bytes of drawing `images` at once, with matrices and cache in `dtype`, the cache coded as `code` where that is
    given, for prompts of `prompt_tokens` positions. Raises HeatKVError for a batch that is too large."""
    if not 1 <= images <= MOST_IMAGES:
        raise HeatKVError(f"a batch of {images}; it is from 1 to {MOST_IMAGES} images")
    if not 1 <= prompt_tokens <= MAX_POSITIONS:
        raise HeatKVError(f"prompts of {prompt_tokens} tokens; the text encoder takes 1 to {MAX_POSITIONS}")
    one = _one_image(info, size, ratio, dtype, guided, code, prompt_tokens)
    return replace(one, keeps_text_encoder=keep_text_encoder).times(images)


def parse_memory(text: str) -> int:
    """Bytes of a size like 24GiB. Raises HeatKVError for anything else."""
    size = parse_bytes(text)
    if not size:
        raise HeatKVError(f"memory {text!r} is no size above zero with its unit; write it as 24GiB or 24GB")
    return size


@dataclass(frozen=True)
class Fit:
    """A batch with the cache at `share`, in `memory` bytes."""

    taken: Footprint
    memory: int
    share: Fraction

    @property
    def cache(self) -> int:
        """At most, whichever cells are held."""
        return math.floor(self.taken.uncoded + self.share * (self.taken.full_cache - self.taken.uncoded))

    @property
    def total(self) -> int:
        return max(self.taken.without_cache + self.cache, self.taken.otherwise)

    @property
    def missing(self) -> int:
        return max(0, self.total - self.memory)

    @property
    def fits(self) -> bool:
        return self.missing == 0


def largest_share(taken: Footprint, memory: int, least: Fraction) -> Fit:
    """The largest share of the full cache that fits beside the rest, at most 1 and at least `least`, which may not."""
    left = Fraction(memory - taken.without_cache - taken.uncoded, taken.full_cache - taken.uncoded)
    return Fit(taken, memory, max(least, min(Fraction(1), left)))


def largest_batch(one: Footprint, memory: int, share: Fraction) -> Fit:
    """The most images at once, from the footprint of one, that fit with the cache at `share`: at least 1, which may
    not."""
    too_many = bisect_left(range(1, MOST_IMAGES + 1), True, key=lambda n: not Fit(one.times(n), memory, share).fits) + 1
    return Fit(one.times(max(1, too_many - 1)), memory, share)
