"""A text-to-image model: an Infinity transformer with its bitwise VAE, and how it draws one scale after another.

Shapes: B images, R rows (B, or 2B with guidance, conditional first), N tokens of a scale, K bits per token, M text
positions, E text channels, Z bits per latent position, h and w a latent's height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import shown, whole
from heatkv.engine.arena_cache import Attend
from heatkv.errors import ModelError
from heatkv.models import base
from heatkv.models.bsq import BitwiseVAE, code_values, resize
from heatkv.models.fingerprint import fingerprint
from heatkv.models.infinity import Infinity, RowText, rotation_angles, rotation_table
from heatkv.models.sampling import BitSamplingSettings, Settings
from heatkv.models.text_encoder import T5TextEncoder

SAMPLING = BitSamplingSettings(cfg=3.0, tau=1.0, top_p=0.97)
"""What published comparisons of cache compression use with the public weights."""

_TEXT_BLOCK = 64
"""Prompts whose tensors are used again are padded to a multiple of this."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Text features (M, E) of one image: the encoder's output at the text's own positions, end of sequence included.

    `negative_ME`, of any length, takes the place of the learnt unconditional features; `text` is only a name.
    """

    features_ME: Tensor
    negative_ME: Tensor | None = None
    text: str = ""


@dataclass(frozen=True)
class TextConditionalModel(base.ImageModel[Prompt]):
    """Transformer and VAE under one name, with the schedule to run and the sampling settings they are meant for.

    `text_encoder` is only needed to make prompts from text; `examples` are the prompts that measurements draw, in
    turn. Raises ModelError when the two do not belong together or the schedule is not for images.
    """

    name: str
    transformer: Infinity
    vae: BitwiseVAE
    schedule: ScaleSchedule
    sampling: BitSamplingSettings
    text_encoder: T5TextEncoder | None = None
    examples: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        bits, z_channels = self.transformer.config.bits, self.vae.config.z_channels
        if bits not in (z_channels, 4 * z_channels):
            raise ModelError(
                f"the transformer draws {bits} bits a token, the VAE has {z_channels} a position; take one with "
                f"{bits} or {bits // 4}"
            )
        if len(self.schedule) > self.transformer.config.max_scales:
            raise ModelError(
                f"the schedule has {len(self.schedule)} scales, these weights have embeddings for "
                f"{self.transformer.config.max_scales}"
            )
        if self.schedule.tokens[0] != 1 or any(frames != 1 for frames, _, _ in self.schedule.scales):
            raise ModelError(f"the schedule {self.schedule} does not start at 1x1, or has more than one frame")

    @property
    def decoder(self) -> BitwiseVAE:
        return self.vae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.vae.config.z_channels, *self.latent_size(-1)

    @property
    def patch(self) -> int:
        """Latent positions per token and side: 2 with spatial patchify."""
        return 1 if self.transformer.config.bits == self.vae.config.z_channels else 2

    @property
    def geometry(self) -> CacheGeometry:
        config = self.transformer.config
        return CacheGeometry(config.depth, config.heads, config.head_dim, self.schedule)

    @property
    def choices(self) -> tuple[int, int]:
        """Every bit of a token by itself."""
        return self.transformer.config.bits, 2

    @property
    def key_angles(self) -> tuple[Tensor, ...]:
        head_dim, scales = self.transformer.config.head_dim, range(len(self.schedule))
        return tuple(rotation_angles(self.schedule, scale, head_dim) for scale in scales)

    def rotations(self) -> tuple[Tensor, ...]:
        """Cosines and sines of every scale, (2, N, P) fp32, on the model's device, where they are made only once."""
        if self.device not in self._rotations:
            head_dim, scales = self.transformer.config.head_dim, range(len(self.schedule))
            with torch.inference_mode(False):  # gradients may pass through them later
                tables = tuple(rotation_table(self.schedule, scale, head_dim, self.device) for scale in scales)
            self._rotations[self.device] = tables
        return self._rotations[self.device]

    @cached_property
    def _rotations(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    def latent_size(self, scale: int) -> tuple[int, int]:
        """Height and width of a scale on the VAE's grid."""
        _, height, width = self.schedule.scales[scale]
        return height * self.patch, width * self.patch

    def prompts(self, texts: Sequence[str], negatives: Sequence[str] | None = None) -> list[Prompt]:
        """Encode texts, each with its negative when `negatives` are given.

        Raises ModelError without a text encoder, or for what is no list of texts.
        """
        check_texts(texts)
        check_texts(negatives or ())
        if self.text_encoder is None:
            raise ModelError(f"{self.name} was loaded without a text encoder; load it with one, or give features")
        if negatives is not None and len(negatives) != len(texts):
            raise ModelError(f"{len(negatives)} negative prompts for {len(texts)} prompts; give one for each")
        features = self.text_encoder.encode([*texts, *(negatives or ())])
        against: Sequence[Tensor | None] = features[len(texts) :] or [None] * len(texts)
        return [Prompt(*parts) for parts in zip(features[: len(texts)], against, texts, strict=True)]

    def label(self, value: Any) -> Prompt:
        """A prompt as it is, or one made of a text. Raises ModelError for anything else, or without a text encoder."""
        if isinstance(value, Prompt):
            return value
        if isinstance(value, str):
            return self.prompts([value])[0]
        raise ModelError(f"{self.name} cannot draw {shown(value)}; give a text, or a Prompt with its features")

    def read_labels(self, values: Sequence[Any]) -> list[Prompt]:
        texts = list(dict.fromkeys(value for value in values if isinstance(value, str)))
        known = dict(zip(texts, self.prompts(texts) if texts else (), strict=True))
        return [known[value] if isinstance(value, str) else self.label(value) for value in values]

    def labels(self, count: int, first: int = 0) -> list[Prompt]:
        """The `examples` in turn. Raises ModelError when there are none."""
        count, first = whole(count, "count", ModelError, 0), whole(first, "first", ModelError)
        if not self.examples:
            raise ModelError(f"measuring {self.name} needs prompts to draw; load it with some")
        return [self.examples[(first + i) % len(self.examples)] for i in range(count)]

    def label_name(self, label: Prompt) -> str:
        """8 hex digits of the prompt's features and negative ones, the same for the same texts and encoder."""
        label = self.label(label)
        negative = [] if label.negative_ME is None else [("negative", label.negative_ME)]
        return fingerprint([("features", label.features_ME), *negative])[:8]

    def begin(self, labels: Sequence[Prompt], settings: Settings, *, reusable: bool = False) -> Drawing:
        """Start drawing one image per prompt; `reusable` pads prompts to a multiple of 64 positions, for `restart`.

        Raises ModelError for features that do not fit.
        """
        return Drawing(self, labels, settings, reusable)


def check_texts(texts: Sequence[str]) -> None:
    """Raise ModelError for what is no list of texts; one text alone would be taken letter by letter."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ModelError(f"prompts is {shown(texts)}; give a list of texts, one per image")


class Drawing(base.Drawing[Prompt]):
    """Images of prompts on their way."""

    def __init__(
        self, model: TextConditionalModel, prompts: Sequence[Prompt], settings: Settings, reusable: bool = False
    ) -> None:
        super().__init__(model, settings, len(prompts))
        self._model = model
        texts = self._texts(prompts)
        longest = max(length for _, length in texts)
        positions = _TEXT_BLOCK * -(-longest // _TEXT_BLOCK) if reusable else None
        self._condition = model.transformer.condition(texts, positions)
        self._rotations = model.rotations()

    def restart(self, labels: Sequence[Prompt]) -> bool:
        """As in the base class; false when a prompt is longer than the tensors, or this was not begun `reusable`."""
        self.scale = 0
        return self._model.transformer.condition_again(self._condition, self._texts(labels))

    def _texts(self, prompts: Sequence[Prompt]) -> list[RowText]:
        """Text features of every row, all conditional prompts first."""
        prompts = [self._model.label(prompt) for prompt in prompts]
        given = [(prompt.features_ME, prompt.negative_ME) for prompt in prompts]
        moved = {id(x): self._checked(x) for pair in given for x in pair if x is not None}
        rows = [(moved[id(features_ME)], len(features_ME)) for features_ME, _ in given]
        if self._settings.guided:
            rows += [
                self._model.transformer.unconditional(len(features_ME))
                if negative_ME is None
                else (moved[id(negative_ME)], len(negative_ME))
                for features_ME, negative_ME in given
            ]
        return rows

    def _checked(self, features_ME: Tensor) -> Tensor:
        channels = self._model.transformer.config.text_channels
        if (
            not isinstance(features_ME, Tensor)
            or not features_ME.is_floating_point()
            or features_ME.shape != (max(len(features_ME), 1), channels)
        ):
            raise ModelError(
                f"text features are {shown(features_ME)}; {self._model.name} reads a tensor of floating-point numbers, "
                f"(positions, {channels})"
            )
        return features_ME.to(self._model.device)

    def input(self) -> Tensor:
        transformer = self._model.transformer
        if self.scale == 0:
            return transformer.first_input(replace(self._condition, rows=self.rows))
        return self._for_all_rows(transformer.next_input(self.next_codes(), self.scale))

    def raw_logits(self, cache: Attend) -> Tensor:
        """(R, N*K, 2) in fp32, the bits of a token in a row."""
        rotation_2NP = self._rotations[self.scale]
        logits = self._model.transformer(self.input(), replace(self._condition, rows=self.rows), rotation_2NP, cache)
        bits: Tensor = logits.unflatten(-1, (-1, 2)).flatten(1, 2)
        return bits

    def show(self, choices: Sequence[Tensor], cache: Attend) -> None:
        rotations_2NP = torch.cat(self._rotations, dim=1)
        # no name for the inputs, which nobody holds beyond the first layer
        self._model.transformer.hidden(self._all_inputs(choices), self._condition, rotations_2NP, cache)

    def accept(self, choices_BN: Tensor) -> None:
        model = self._model
        _, height, width = model.schedule.scales[self.scale]
        values_BZhw = code_values(self.on_latent_grid(choices_BN.view(len(choices_BN), height, width, -1)))
        self._add(resize(values_BZhw, model.latent_size(self._scales - 1)))

    def on_latent_grid(self, bits_BhwK: Tensor) -> Tensor:
        """The bits of tokens on the VAE's grid, (B, h, w, Z)."""
        return F.pixel_shuffle(bits_BhwK.permute(0, 3, 1, 2), self._model.patch).permute(0, 2, 3, 1)

    def next_codes(self) -> Tensor:
        """What the transformer is shown at the running scale, (B, N, K): the resized sum of codes so far."""
        small_BZhw = resize(self.f_hat, self._model.latent_size(self.scale))
        return F.pixel_unshuffle(small_BZhw, self._model.patch).flatten(2).transpose(1, 2)
