"""What fits in a given memory: weights, text encoder, working memory, and the cache that is left room for.

Every figure follows from shapes. Weights are counted on models without storage; working memory is the most bytes of
tensors alive at once, measured by running the last scale and the decoder on tensors without storage. Not counted: the
driver's own memory, an allocator's fragmentation, and other programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import torch
from torch import nn

from heatkv.cache import KVCache
from heatkv.errors import BudgetError, HeatKVError
from heatkv.geometry import Budget, CacheGeometry
from heatkv.models import COMPUTE_DTYPES, ModelInfo
from heatkv.models.bsq import BSQ_D32, BSQ_D56, BitwiseVAE
from heatkv.models.emoji import VAR_CONFIG, VQVAE_CONFIG
from heatkv.models.infinity import INFINITY_2B, INFINITY_8B, Infinity, rotation_table
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig
from heatkv.plan import Plan
from heatkv.policies.base import PlanningProblem
from heatkv.policies.windows import Full
from heatkv.profiling.ledger import FusedAttention, TensorLedger
from heatkv.schedule import ScaleSchedule

TEXT_POSITIONS = 512
"""Longest prompt of Infinity's text encoder, the worst case for cross attention."""

_T5_XL = {"width": 2048, "hidden": 5120, "layers": 24, "vocabulary": 32128, "buckets": 32, "heads": 32}
MOST_IMAGES = 1 << 16


def text_encoder_parameters() -> int:
    """Parameters of flan-t5-xl's encoder (Raffel et al. 2020, version 1.1: gated feed-forward, no biases)."""
    width, hidden = _T5_XL["width"], _T5_XL["hidden"]
    layer = 4 * width * width + 3 * width * hidden + 2 * width
    return _T5_XL["vocabulary"] * width + _T5_XL["layers"] * layer + _T5_XL["buckets"] * _T5_XL["heads"] + width


@dataclass(frozen=True)
class Footprint:
    """Bytes that drawing `images` at once takes, apart from the cache.

    `prompt` is what the class or prompt decides once per image (AdaLN vectors, keys and values of cross attention);
    `working` the peak of temporary tensors, in the transformer's last scale or in the decoder.
    """

    images: int
    rows: int
    transformer: int
    decoder: int
    text_encoder: int
    prompt: int
    working: int
    full_cache: int

    @property
    def without_cache(self) -> int:
        return self.transformer + self.decoder + self.text_encoder + self.prompt + self.working


def _bytes(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in module.parameters())


def _last_scale_cache(geometry: CacheGeometry, rows: int, dtype: torch.dtype) -> KVCache:
    """A cache of one layer, without storage, that is due to run the last scale with everything held."""
    one_layer = replace(geometry, layers=1)
    plan: Plan = Full().plan(PlanningProblem(one_layer, Budget.parse("100%")))
    cache = KVCache(plan, rows, dtype, "meta")
    cache.skip_to_last_scale()
    return cache


def _config_of_var(info: ModelInfo, schedule: ScaleSchedule) -> tuple[VARConfig, VQVAEConfig]:
    if info.bundled:
        return VAR_CONFIG, VQVAE_CONFIG
    sides = tuple(height for _, height, _ in schedule.scales)
    width = info.heads * info.head_dim
    return VARConfig(sides, info.layers, width, info.heads, shared_adaln=info.layers == 36), VQVAEConfig(sides)


@cache
def footprint(
    info: ModelInfo,
    images: int,
    *,
    size: str | None = None,
    ratio: float | None = None,
    dtype: str = "bfloat16",
    guided: bool = True,
    text_encoder: bool = True,
) -> Footprint:
    """Bytes of drawing `images` at once with matrices and cache in `dtype`.

    `text_encoder=False` leaves Infinity's encoder out, for prompts that were encoded before or elsewhere.
    """
    if not 1 <= images <= MOST_IMAGES:
        raise HeatKVError(f"a batch of {images}; it is from 1 to {MOST_IMAGES} images")
    compute, rows = COMPUTE_DTYPES[dtype], images * (2 if guided else 1)
    geometry = info.geometry(size, ratio)
    schedule, width = geometry.schedule, info.heads * info.head_dim
    last = len(schedule) - 1
    caching = _last_scale_cache(geometry, rows, compute)
    with torch.inference_mode(), FusedAttention(), torch.device("meta"):
        x_RNC = torch.empty(rows, schedule.tokens[last], width)
        if info.family == "var":
            config, vqvae_config = _config_of_var(info, schedule)
            var, vqvae = VAR(config).set_compute_dtype(compute), VQVAE(vqvae_config, encoder=False)
            single = VAR(replace(config, depth=1)).set_compute_dtype(compute)
            classes = torch.zeros(rows, dtype=torch.long)
            prompt = _live(lambda: var.condition(classes))
            condition = single.condition(classes)
            working = _peak(lambda: single(x_RNC, condition, caching))
            latent = torch.empty(images, vqvae_config.z_channels, *schedule.scales[last][1:])
            decoding = _peak(lambda: vqvae.decode(latent))
            weights = _bytes(var), _bytes(vqvae)
        else:
            large = info.layers > 32
            infinity_config, vae_config = (INFINITY_8B, BSQ_D56) if large else (INFINITY_2B, BSQ_D32)
            infinity, vae = Infinity(infinity_config).set_compute_dtype(compute), BitwiseVAE(vae_config, encoder=False)
            one = Infinity(replace(infinity_config, depth=1)).set_compute_dtype(compute)
            features = [torch.empty(TEXT_POSITIONS, infinity_config.text_channels) for _ in range(rows)]
            prompt = _live(lambda: infinity.condition(features))
            text = one.condition(features)
            rotation = rotation_table(schedule, last, info.head_dim, "meta")
            working = _peak(lambda: one(x_RNC, text, rotation, caching))
            patch = 2 if large else 1
            _, height, columns = schedule.scales[last]
            latent = torch.empty(images, vae_config.z_channels, height * patch, columns * patch)
            decoding = _peak(lambda: vae.decode(latent))
            weights = _bytes(infinity), _bytes(vae)
    encoder = text_encoder_parameters() * compute.itemsize if text_encoder and info.family == "infinity" else 0
    return Footprint(
        images=images,
        rows=rows,
        transformer=weights[0],
        decoder=weights[1],
        text_encoder=encoder,
        prompt=prompt,
        working=max(working, decoding),
        full_cache=geometry.full_bytes(rows, dtype),
    )


def _peak(call: Callable[[], object]) -> int:
    with TensorLedger() as ledger:
        call()
    peak: int = ledger.peak
    return peak


def _live(call: Callable[[], object]) -> int:
    """Bytes of what `call` returns and keeps alive."""
    with TensorLedger() as ledger:
        kept = call()
        live: int = ledger.live
    del kept
    return live


def parse_memory(text: str) -> int:
    """Bytes of a size like 24GiB. Raises HeatKVError for anything else."""
    try:
        size = Budget.parse(text)
    except BudgetError:
        size = None
    if size is None or size.kind != "bytes":
        raise HeatKVError(f"memory {text!r} is no size above zero; write it as 24GiB or 24GB")
    return math.floor(size.amount)


def _ways_out(taken: Footprint) -> str:
    """What a user can do when `taken` is too much."""
    ways = ["lower the batch"] if taken.images > 1 else []
    ways += ["draw a smaller size", "take a 16-bit type"]
    if taken.text_encoder:
        ways.append("encode prompts elsewhere (--no-text-encoder)")
    return ", or ".join([", ".join(ways[:-1]), ways[-1]])


def largest_share(taken: Footprint, memory: int) -> Fraction:
    """The largest share of the full cache that fits beside the rest, at most 1. Raises HeatKVError when none does."""
    left = memory - taken.without_cache
    if left <= 0:
        raise HeatKVError(
            f"{memory / 2**30:.2f} GiB do not hold a batch of {taken.images}: without any cache it takes "
            f"{taken.without_cache / 2**30:.2f} GiB; {_ways_out(taken)}"
        )
    return min(Fraction(1), Fraction(left, taken.full_cache))


def largest_batch(measure: Callable[[int], Footprint], memory: int, share: Fraction) -> Footprint:
    """The footprint of the most images at once that fit with the cache at `share`.

    Raises HeatKVError when none does.
    """

    def fits(images: int) -> bool:
        taken = measure(images)
        return taken.without_cache + math.floor(share * taken.full_cache) <= memory

    if not fits(1):
        needed = measure(1)
        raise HeatKVError(
            f"{memory / 2**30:.2f} GiB do not hold one image: it takes "
            f"{(needed.without_cache + math.floor(share * needed.full_cache)) / 2**30:.2f} GiB with the cache at "
            f"{float(share):.1%}; {_ways_out(needed)}"
        )
    low, high = 1, 2
    while high <= MOST_IMAGES and fits(high):
        low, high = high, high * 2
    high = min(high, MOST_IMAGES + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return measure(low)
