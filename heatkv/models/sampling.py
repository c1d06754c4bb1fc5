"""Choosing codes from logits: guidance, top-k and top-p, and random numbers that policies share.

Shapes: B images, R rows (2B with guidance, conditional first), N choices of a scale, V codes. A choice is a token of
VAR, or one bit of a token of Infinity, bits of a token in a row; then V is 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from heatkv.core.schema import number, whole
from heatkv.errors import ModelError


class Settings(ABC):
    """What samplers and models ask of the settings of either kind: guidance, and what is cut off before a draw.

    `top_k` and `top_p` of 0 cut nothing.
    """

    cfg: Any
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        for strength in _numbers(self.cfg):
            number(strength, "cfg", ModelError, 0, 100)
        whole(self.top_k, "top_k", ModelError, 0)
        number(self.top_p, "top_p", ModelError, 0, 1)

    @property
    @abstractmethod
    def guided(self) -> bool:
        """Whether unconditional rows run beside the conditional ones."""

    @property
    def rows_per_image(self) -> int:
        return 2 if self.guided else 1

    @abstractmethod
    def guide(self, logits_RNV: Tensor, scale: int, scales: int) -> Tensor:
        """Guided logits, (B, N, V), of one of `scales` scales."""

    def cut(self, logits_BNV: Tensor) -> Tensor:
        return cut_logits(logits_BNV, self.top_k, self.top_p)

    def to_json(self) -> dict[str, Any]:
        """Every setting by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """Guidance strength (0 = none), and whether it ramps up over the scales as VAR does."""

    cfg: float = 1.5
    ramp: bool = True
    top_k: int = 0
    top_p: float = 0.0

    @property
    def guided(self) -> bool:
        return self.cfg > 0

    def guide(self, logits_RNV: Tensor, scale: int, scales: int) -> Tensor:
        """(1 + g) cond - g uncond, with g = cfg, or cfg k/(K-1) at scale k when it ramps; (B, N, V)."""
        if not self.guided:
            return logits_RNV
        strength = self.cfg * scale / (scales - 1) if self.ramp else self.cfg
        conditional, unconditional = logits_RNV.chunk(2)
        return (1 + strength) * conditional - strength * unconditional


@dataclass(frozen=True)
class BitSamplingSettings(Settings):
    """How Infinity's bits are chosen: each is a draw of its own between two codes (V = 2).

    `cfg` is the share of the conditional logits (1 = no guidance) and `tau` the temperature, each one number or one
    per scale. `top_k=1` takes the likelier value (an exact tie stays random); larger counts, like 0, cut nothing.
    With `top_p` a bit is fixed when its likelier value has at least that probability; 0 cuts nothing.
    """

    cfg: float | tuple[float, ...] = 3.0
    tau: float | tuple[float, ...] = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < number(temperature, "tau", ModelError) <= 100 for temperature in _numbers(self.tau)):
            raise ModelError(f"tau is {self.tau}; a temperature is above 0 and at most 100")

    @property
    def guided(self) -> bool:
        return any(strength != 1 for strength in _numbers(self.cfg))

    def guide(self, logits_RNV: Tensor, scale: int, scales: int) -> Tensor:
        """g cond + (1 - g) uncond after division by tau, g and tau those of the scale; (B, N, V)."""
        strength, temperature = _at_scale(self.cfg, "cfg", scale, scales), _at_scale(self.tau, "tau", scale, scales)
        logits_RNV = logits_RNV / temperature
        if not self.guided:
            return logits_RNV
        conditional, unconditional = logits_RNV.chunk(2)
        # at 1 the unconditional half must not matter at all, not even when it overflowed
        return conditional if strength == 1 else strength * conditional + (1 - strength) * unconditional


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _at_scale(value: float | tuple[float, ...], name: str, scale: int, scales: int) -> float:
    if not isinstance(value, tuple):
        return value
    if len(value) != scales:
        raise ModelError(f"{name} has {len(value)} values for {scales} scales; give one, or one per scale")
    return value[scale]


def cut_logits(logits_BNV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside top-k, then top-p, at minus infinity; ties at the k-th value survive."""
    if 0 < top_k < logits_BNV.shape[-1]:
        least = logits_BNV.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits_BNV = logits_BNV.masked_fill(logits_BNV < least, -torch.inf)
    if top_p > 0:
        ascending, order = logits_BNV.sort(dim=-1)
        outside = _cumulative(ascending.softmax(dim=-1)) <= 1 - top_p
        outside[..., -1] = False
        logits_BNV = logits_BNV.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits_BNV


def _cumulative(shares: Tensor) -> Tensor:
    # on CUDA torch sums floating-point numbers up in an order that changes, and refuses to where none may
    if shares.is_cuda and torch.are_deterministic_algorithms_enabled():
        return cumulative_in_fixed_point(shares)
    return shares.cumsum(dim=-1)


def cumulative_in_fixed_point(shares: Tensor) -> Tensor:
    """Cumulative sums along the last dimension of numbers from 0 to 1, in steps of 2^-40, so that no order matters."""
    return shares.double().mul_(2.0**40).round_().long().cumsum(dim=-1).double().mul_(2.0**-40)


class Sampler(Protocol):
    """Chooses the codes of one scale, (B, N), from guided logits, (B, N, V)."""

    def choose(self, scale: int, logits_BNV: Tensor) -> Tensor: ...


@runtime_checkable
class NoiseSampler(Sampler, Protocol):
    """A sampler in two parts, so that its choice may be part of a CUDA graph: what is random, and what is not.

    `pick` must depend on its tensors and on `settings` alone, and not wait for the device.
    """

    @property
    def settings(self) -> Settings: ...

    def noise(self, scale: int, noise_BNV: Tensor, first: int = 0) -> None:
        """Fill the tensor with all that is random in the choice of a scale for the images from `first` on."""

    def pick(self, logits_BNV: Tensor, noise_BNV: Tensor) -> Tensor:
        """The choice, (B, N)."""


_MASK = (1 << 64) - 1


def noise_seed(seed: int, sample: int, scale: int) -> int:
    """A well-mixed 63-bit seed of (seed, sample, scale): two rounds of SplitMix64 per part."""
    state = 0
    for part in (seed, sample, scale):
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        for _ in range(2):
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
            state ^= state >> 31
    return state >> 1


@final
class CommonRandomSampler:
    """Gumbel-max draws whose noise depends on (seed, sample, scale) alone.

    The same sample gets the same noise under every policy, in every batch and on every device, so a change in the
    picture is a change in the logits.
    """

    def __init__(self, seed: int, samples: Sequence[int], settings: Settings) -> None:
        self._seed, self._samples, self.settings = seed, tuple(samples), settings

    def noise(self, scale: int, noise_BNV: Tensor, first: int = 0) -> None:
        """Gumbel noise, always made on the host."""
        samples = self._samples[first : first + len(noise_BNV)]
        if len(noise_BNV) != len(samples):
            raise ModelError(f"{first + len(noise_BNV)} images were drawn for {len(self._samples)} samples")
        host_BNV = noise_BNV
        if noise_BNV.device.type not in ("cpu", "meta"):
            # its copy does not make the host wait; the allocator uses this memory again only after the copy
            host_BNV = torch.empty(noise_BNV.shape, pin_memory=noise_BNV.is_cuda)
        for row, sample in zip(host_BNV, samples, strict=True):
            row.uniform_(generator=torch.Generator().manual_seed(noise_seed(self._seed, sample, scale)))
        host_BNV.clamp_(min=1e-20).log_().neg_().log_().neg_()
        if host_BNV is not noise_BNV:
            noise_BNV.copy_(host_BNV, non_blocking=noise_BNV.is_cuda)

    def pick(self, logits_BNV: Tensor, noise_BNV: Tensor) -> Tensor:
        return (self.settings.cut(logits_BNV) + noise_BNV).argmax(dim=-1)

    def choose(self, scale: int, logits_BNV: Tensor) -> Tensor:
        noise_BNV = torch.empty(logits_BNV.shape, device=logits_BNV.device)
        self.noise(scale, noise_BNV)
        return self.pick(logits_BNV, noise_BNV)


class RecordedTokens:
    """Plays back codes that were drawn before: teacher forcing."""

    def __init__(self, tokens: Sequence[Tensor]) -> None:
        self._tokens = tokens

    def choose(self, scale: int, logits_BNV: Tensor) -> Tensor:
        return self._tokens[scale]
