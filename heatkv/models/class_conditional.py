"""A class-conditional image model: a VAR transformer with its VQVAE, and how it draws one scale after another.

Shapes: B images, R rows (B, or 2B with guidance, conditional first), N tokens of a scale, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schema import as_whole, shown, whole
from heatkv.engine.arena_cache import Attend
from heatkv.errors import ModelError
from heatkv.models import base
from heatkv.models.sampling import SamplingSettings, Settings
from heatkv.models.var import VAR, Condition
from heatkv.models.vqvae import VQVAE


@dataclass(frozen=True)
class ClassConditionalModel(base.ImageModel[int]):
    """Transformer and VQVAE under one name, with the sampling settings they are meant for.

    `class_names` is empty when the classes have none.
    """

    name: str
    transformer: VAR
    vqvae: VQVAE
    sampling: SamplingSettings
    class_names: tuple[str, ...] = ()

    @property
    def decoder(self) -> VQVAE:
        return self.vqvae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.z_channels, config.patch_sides[-1], config.patch_sides[-1]

    @property
    def geometry(self) -> CacheGeometry:
        config = self.transformer.config
        return CacheGeometry(config.depth, config.heads, config.head_dim, config.schedule)

    @property
    def choices(self) -> tuple[int, int]:
        """One code per token."""
        return 1, self.transformer.config.vocab_size

    @property
    def num_classes(self) -> int:
        return self.transformer.config.num_classes

    def label(self, value: Any) -> int:
        """A class by its name or number: text, or an integer of Python, numpy or torch. Raises ModelError with what
        there is."""
        if isinstance(value, str):
            if value in self.class_names:
                return self.class_names.index(value)
            number = int(value) if value.isdecimal() and len(value) < 10 else None
        else:
            number = as_whole(value)
        if number is not None and 0 <= number < self.num_classes:
            return number
        known = f", or a name: {', '.join(self.class_names)}" if self.class_names else ""
        last = self.num_classes - 1
        raise ModelError(f"{self.name} has no class {shown(value)}; give a number from 0 to {last}{known}")

    def labels(self, count: int, first: int = 0) -> list[int]:
        """Labels of the samples first, first + 1, ...: every class in turn. Raises ModelError."""
        count, first = whole(count, "count", ModelError, 0), whole(first, "first", ModelError)
        return [(first + i) % self.num_classes for i in range(count)]

    def label_name(self, label: int) -> str:
        """The number of the class. Raises ModelError for what is no class."""
        return str(self.label(label))

    def begin(self, labels: Sequence[int], settings: Settings, *, reusable: bool = False) -> Drawing:
        """Start drawing one image per label. Raises ModelError for what is no class."""
        del reusable  # all labels take the same room
        return Drawing(self, labels, settings)


class Drawing(base.Drawing[int]):
    """Images of classes on their way."""

    def __init__(self, model: ClassConditionalModel, labels: Sequence[int], settings: Settings) -> None:
        super().__init__(model, settings, len(labels))
        self._model = model
        self._condition = self._condition_for(labels)

    def restart(self, labels: Sequence[int]) -> bool:
        self._condition.copy_(self._condition_for(labels))
        self.scale = 0
        return True

    def _condition_for(self, labels: Sequence[int]) -> Condition:
        model = self._model
        classes = [model.label(label) for label in labels]
        classes += [model.num_classes] * len(classes) if self._settings.guided else []
        return model.transformer.condition(torch.tensor(classes, dtype=torch.long, device=model.device))

    def input(self) -> Tensor:
        transformer = self._model.transformer
        if self.scale == 0:
            return transformer.first_input(replace(self._condition, rows=self.rows))
        next_map = self._model.vqvae.quantize.next_map(self.f_hat, self.scale)
        return self._for_all_rows(transformer.next_input(next_map, self.scale))

    def raw_logits(self, cache: Attend) -> Tensor:
        logits: Tensor = self._model.transformer(self.input(), replace(self._condition, rows=self.rows), cache)
        return logits

    def accept(self, choices_BN: Tensor) -> None:
        self._add(self._model.vqvae.quantize.code_features(choices_BN, self.scale))

    def show(self, choices: Sequence[Tensor], cache: Attend) -> None:
        self._model.transformer.hidden(self._all_inputs(choices), self._condition, cache)
