"""A text-to-image model: an Infinity transformer with its bitwise VAE, and how it draws one scale after another.

Shapes: B images, R rows (B, or 2B with guidance, conditional first), N tokens of a scale, K bits per token, M text
positions, E text channels, Z bits per latent position, h and w a latent's height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import shown, whole
from heatkv.errors import ModelError
from heatkv.models.adapter import ModelAdapter
from heatkv.models.base import ImageModel
from heatkv.models.bsq import BitwiseVAE, code_values, resize
from heatkv.models.checkpoint import build_bsq, build_infinity, read_checkpoint
from heatkv.models.class_conditional import fingerprint, summed, tensor_fingerprint
from heatkv.models.infinity import Infinity, rotation_angles, rotation_table
from heatkv.models.sampling import BitSamplingSettings, Settings
from heatkv.models.text_encoder import T5TextEncoder
from heatkv.models.var import Attend

if TYPE_CHECKING:
    from heatkv.models.catalogue import ModelInfo

_TEXT_BLOCK = 64
"""Prompts whose tensors are used again are padded to a multiple of this."""

SAMPLING = BitSamplingSettings(cfg=3.0, tau=1.0, top_p=0.97)
"""What published comparisons of cache compression use with the public weights."""

_VAE_FILES = {32: "infinity_vae_d32reg.pth", 56: "infinity_vae_d56_f8_14_patchify.pth"}
"""The published VAE for the bits of a token."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Text features (M, E) of one image: the encoder's output at the text's own positions, end of sequence included.

    `negative_ME`, of any length, takes the place of the learnt unconditional features; `text` is only a name.
    """

    features_ME: Tensor
    negative_ME: Tensor | None = None
    text: str = ""


@dataclass(frozen=True)
class TextConditionalModel(ImageModel[Prompt]):
    """Transformer and VAE under one name, with the schedule to run and the sampling settings they are meant for.

    `text_encoder` is only needed to make prompts from text; `examples` are the prompts that measurements draw, in
    turn. Raises ModelError when the two do not belong together or
    the schedule is not for images.
    """

    name: str
    transformer: Infinity
    vae: BitwiseVAE
    schedule: ScaleSchedule
    sampling: BitSamplingSettings
    fingerprint: str
    text_encoder: T5TextEncoder | None = None
    examples: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        bits, z_channels = self.transformer.config.bits, self.vae.config.z_channels
        if bits not in (z_channels, 4 * z_channels):
            file = _VAE_FILES.get(bits)
            raise ModelError(
                f"the transformer draws {bits} bits a token and the VAE has {z_channels} bits a position; they fit "
                f"when these are equal, or four times as many with spatial patchify{f': take {file}' if file else ''}"
            )
        if len(self.schedule) > self.transformer.config.max_scales:
            raise ModelError(
                f"the schedule has {len(self.schedule)} scales, these weights have embeddings for "
                f"{self.transformer.config.max_scales}"
            )
        if self.schedule.tokens[0] != 1 or any(frames != 1 for frames, _, _ in self.schedule.scales):
            raise ModelError(f"the schedule {self.schedule} does not start at 1x1, or has more than one frame")

    @property
    def patch(self) -> int:
        """Latent positions per token and side: 2 with spatial patchify."""
        return 1 if self.transformer.config.bits == self.vae.config.z_channels else 2

    @property
    def geometry(self) -> CacheGeometry:
        config = self.transformer.config
        return CacheGeometry(config.depth, config.heads, config.head_dim, self.schedule)

    @property
    def device(self) -> torch.device:
        return self.transformer.pos_start.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.transformer.compute_dtype

    @property
    def choices(self) -> tuple[int, int]:
        """Every bit of a token by itself."""
        return self.transformer.config.bits, 2

    @property
    def adapter(self) -> ModelAdapter:
        return self.transformer.adapter()

    @property
    def key_angles(self) -> tuple[Tensor, ...]:
        head_dim, scales = self.transformer.config.head_dim, range(len(self.schedule))
        return tuple(rotation_angles(self.schedule, scale, head_dim) for scale in scales)

    def rotations(self) -> tuple[Tensor, ...]:
        """Cosines and sines of every scale, (2, N, P) fp32, on the model's device, where they are made only once."""
        made = self._rotations_of_devices
        if self.device not in made:
            head_dim, scales = self.transformer.config.head_dim, range(len(self.schedule))
            with torch.inference_mode(False):  # gradients may pass through them later
                made[self.device] = tuple(rotation_table(self.schedule, s, head_dim, self.device) for s in scales)
        return made[self.device]

    @cached_property
    def _rotations_of_devices(self) -> dict[torch.device, tuple[Tensor, ...]]:
        return {}

    def latent_size(self, scale: int) -> tuple[int, int]:
        """Height and width of a scale on the VAE's grid."""
        _, height, width = self.schedule.scales[scale]
        return height * self.patch, width * self.patch

    def prompts(self, texts: Sequence[str], negatives: Sequence[str] | None = None) -> list[Prompt]:
        """Encode texts, each with its negative when `negatives` are given.

        Raises ModelError without a text encoder, or for what is no list of texts.
        """
        for given_texts in (texts, () if negatives is None else negatives):
            check_texts(given_texts)
        if self.text_encoder is None:
            raise ModelError(
                f"{self.name} was loaded without a text encoder; name one (--text-encoder), or give features"
            )
        if negatives is not None and len(negatives) != len(texts):
            raise ModelError(f"{len(negatives)} negative prompts for {len(texts)} prompts; give one for each")
        features = self.text_encoder.encode([*texts, *(negatives or ())])
        given, against = features[: len(texts)], features[len(texts) :]
        return [Prompt(features_ME, against[i] if against else None, texts[i]) for i, features_ME in enumerate(given)]

    def label(self, given: Any) -> Prompt:
        """A prompt as it is, or one made of a text. Raises ModelError for anything else, or without a text encoder."""
        if isinstance(given, Prompt):
            return given
        if isinstance(given, str):
            return self.prompts([given])[0]
        raise ModelError(f"{self.name} cannot draw {shown(given)}; give a text, or a Prompt with its features")

    def labels(self, count: int, first: int = 0) -> list[Prompt]:
        """The `examples` in turn. Raises ModelError when there are none."""
        count, first = whole(count, "count", ModelError, 0), whole(first, "first", ModelError)
        if not self.examples:
            raise ModelError(f"measuring {self.name} needs prompts to draw; load it with some (--prompts FILE)")
        return [self.examples[(first + i) % len(self.examples)] for i in range(count)]

    def label_name(self, label: Prompt) -> str:
        """8 hex digits of the prompt's features, the same for the same text and encoder."""
        return tensor_fingerprint([("features", self.label(label).features_ME)])[:8]

    def begin(self, labels: Sequence[Prompt], settings: Settings, *, reusable: bool = False) -> Drawing:
        """Start drawing one image per prompt; `reusable` pads prompts to a multiple of 64 positions, for `restart`.

        Raises ModelError for features that do not fit.
        """
        return Drawing(self, labels, settings, reusable)


def check_texts(texts: Sequence[str]) -> None:
    """Raise ModelError for what is no list of texts; one text alone would be taken letter by letter."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ModelError(f"prompts is {shown(texts)}; give a list of texts, one per image")


class Drawing:
    """Images on their way: call `logits`, then `accept` the chosen bits, once per scale; then `image`."""

    def __init__(
        self, model: TextConditionalModel, prompts: Sequence[Prompt], settings: Settings, reusable: bool = False
    ) -> None:
        self._model, self._settings = model, settings
        features = self._features(prompts)
        positions = _TEXT_BLOCK * -(-max(map(len, features)) // _TEXT_BLOCK) if reusable else None
        self._condition = model.transformer.condition(features, positions)
        self._rotations = model.rotations()
        self._codes: Tensor | None = None
        self.scale = 0

    def restart(self, labels: Sequence[Prompt]) -> bool:
        """Start other images, as many, in the same tensors; false, and nothing changed, when a prompt is longer than
        they are, or they have no mask because this was not begun `reusable`. Raises ModelError for features that do
        not fit."""
        features, mask_R11M = self._features(labels), self._condition.mask_R11M
        if mask_R11M is None or max(map(len, features)) > mask_R11M.shape[-1]:
            return False
        self._model.transformer.condition_again(self._condition, features)
        self.scale = 0
        return True

    def _features(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Text features of every row, all conditional prompts first."""
        prompts = [self._model.label(prompt) for prompt in prompts]
        rows = [self._checked(prompt.features_ME) for prompt in prompts]
        if self._settings.guided:
            rows += [
                self._model.transformer.unconditional(len(prompt.features_ME))
                if prompt.negative_ME is None
                else self._checked(prompt.negative_ME)
                for prompt in prompts
            ]
        return rows

    def _checked(self, features_ME: Tensor) -> Tensor:
        channels = self._model.transformer.config.text_channels
        if not isinstance(features_ME, Tensor) or not features_ME.is_floating_point():
            raise ModelError(
                f"text features are {shown(features_ME)}; {self._model.name} reads a tensor (positions, {channels}) of "
                "floating-point numbers"
            )
        if features_ME.ndim != 2 or len(features_ME) < 1 or features_ME.shape[1] != channels:
            raise ModelError(
                f"text features of shape {tuple(features_ME.shape)} do not fit {self._model.name}: it reads "
                f"(positions, {channels})"
            )
        return features_ME.to(self._model.device)

    def input(self) -> Tensor:
        """What the transformer is shown at the running scale, (R, N, C)."""
        transformer = self._model.transformer
        if self.scale == 0:
            return transformer.first_input(self._condition)
        tokens = transformer.next_input(self.next_codes(), self.scale)
        return torch.cat([tokens, tokens]) if self._settings.guided else tokens

    def logits(self, cache: Attend) -> Tensor:
        """Guided logits of the running scale, (B, N*K, 2) in fp32, the bits of a token in a row."""
        model = self._model
        logits_RNV = model.transformer(self.input(), self._condition, self._rotations[self.scale], cache)
        return self._settings.guide(logits_RNV.unflatten(-1, (-1, 2)).flatten(1, 2), self.scale, len(model.schedule))

    def show(self, choices: Sequence[Tensor], cache: Attend) -> None:
        """Run the blocks over all scales at once, as training does, of images that have these bits."""
        rotations_2NP = torch.cat(self._rotations, dim=1)
        # no name for the inputs, which nobody holds beyond the first layer
        self._model.transformer.hidden(
            torch.cat(list(self._inputs(choices)), dim=1), self._condition, rotations_2NP, cache
        )

    def _inputs(self, choices: Sequence[Tensor]) -> Iterator[Tensor]:
        for choices_BN in choices:
            yield self.input()
            self.accept(choices_BN)

    def accept(self, choices_BN: Tensor) -> None:
        """Take the bits of the running scale, (B, N*K)."""
        model, last = self._model, len(self._model.schedule) - 1
        _, height, width = model.schedule.scales[self.scale]
        values_BZhw = code_values(self.on_latent_grid(choices_BN.view(len(choices_BN), height, width, -1)))
        added = resize(values_BZhw, model.latent_size(last))
        self._codes = summed(self._codes, added, first=self.scale == 0)
        self.scale += 1

    def on_latent_grid(self, bits_BhwK: Tensor) -> Tensor:
        """The bits of tokens on the VAE's grid, (B, h, w, Z)."""
        return F.pixel_shuffle(bits_BhwK.permute(0, 3, 1, 2), self._model.patch).permute(0, 2, 3, 1)

    def next_codes(self) -> Tensor:
        """What the transformer is shown at the running scale, (B, N, K): the resized sum of codes so far."""
        shown = resize(self.codes, self._model.latent_size(self.scale))
        return F.pixel_unshuffle(shown, self._model.patch).flatten(2).transpose(1, 2)

    @property
    def codes(self) -> Tensor:
        """Sum of codes so far, (B, Z, h, w) on the grid of the last scale; later scales are added to this very
        tensor."""
        if self._codes is None:
            raise ModelError("no scale was drawn yet")
        return self._codes

    def image(self) -> Tensor:
        """(B, 3, H, W), RGB in [0, 1]."""
        return (self._model.vae.decode(self.codes) + 1) / 2


def load_infinity(
    info: ModelInfo,
    weights: str | Path,
    vae: str | Path,
    *,
    text_encoder: T5TextEncoder | None = None,
    size: str | None = None,
    ratio: float | None = None,
    sampling: BitSamplingSettings = SAMPLING,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextConditionalModel:
    """A named Infinity from its public files, the blocks' matrices in `dtype`.

    `weights` is a file or a sharded folder. Raises FormatError for unreadable files, and ModelError for weights of
    another model, or a VAE that does not belong to it.
    """
    if Path(vae).name == "infinity_vae_d32.pth":  # same shapes, so nothing else could tell
        raise ModelError(f"{vae} was trained apart from the public transformers; take {_VAE_FILES[32]}")
    transformer = build_infinity(read_checkpoint(weights), dtype=None)
    config = transformer.config
    if (config.depth, config.heads, config.head_dim) != (info.layers, info.heads, info.head_dim):
        raise ModelError(
            f"{weights} has {config.depth} layers x {config.heads} heads of {config.head_dim}; {info.name} has "
            f"{info.layers} x {info.heads} of {info.head_dim}"
        )
    model = TextConditionalModel(
        info.name,
        transformer,
        build_bsq(read_checkpoint(vae)),
        info.schedule(size, ratio),
        sampling,
        fingerprint(transformer),
        text_encoder,
    )
    transformer.set_compute_dtype(dtype).to(device)
    model.vae.to(device)
    return model
