"""A class-conditional image model: a VAR transformer with its VQVAE, and how it draws one scale after another.

Shapes: B images, R rows (B, or 2B with guidance, conditional first), N tokens of a scale, V codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schema import as_whole, shown, whole
from heatkv.errors import ModelError
from heatkv.models.adapter import ModelAdapter
from heatkv.models.base import ImageModel
from heatkv.models.sampling import SamplingSettings, Settings
from heatkv.models.var import VAR, Attend, Condition
from heatkv.models.vqvae import VQVAE

_FINGERPRINT_SAMPLES = 4096


def fingerprint(module: torch.nn.Module) -> str:
    """The fingerprint of all parameters of a module."""
    return tensor_fingerprint(module.named_parameters())


def tensor_fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits over names, shapes and up to 4,096 evenly spaced values of every tensor, in fp32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda entry: entry[0]):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _FINGERPRINT_SAMPLES)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ClassConditionalModel(ImageModel[int]):
    """Transformer and VQVAE under one name, with the sampling settings they are meant for.

    `class_names` is empty when the classes have none. `fingerprint` names the weights, whatever type they run in.
    """

    name: str
    transformer: VAR
    vqvae: VQVAE
    sampling: SamplingSettings
    fingerprint: str
    class_names: tuple[str, ...] = ()

    @property
    def geometry(self) -> CacheGeometry:
        config = self.transformer.config
        return CacheGeometry(config.depth, config.heads, config.head_dim, config.schedule)

    @property
    def device(self) -> torch.device:
        return self.transformer.pos_1LC.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.transformer.compute_dtype

    @property
    def choices(self) -> tuple[int, int]:
        """One code per token."""
        return 1, self.transformer.config.vocab_size

    @property
    def adapter(self) -> ModelAdapter:
        return self.transformer.adapter()

    @property
    def num_classes(self) -> int:
        return self.transformer.config.num_classes

    def label(self, given: Any) -> int:
        """A class by its name or number: text, or an integer of Python, numpy or torch. Raises ModelError with what
        there is."""
        if isinstance(given, str):
            if given in self.class_names:
                return self.class_names.index(given)
            number = int(given) if given.isdecimal() and len(given) < 10 else None
        else:
            number = as_whole(given)
        if number is not None and 0 <= number < self.num_classes:
            return number
        known = f", or a name: {', '.join(self.class_names)}" if self.class_names else ""
        last = self.num_classes - 1
        raise ModelError(f"{self.name} has no class {shown(given)}; give a number from 0 to {last}{known}")

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


class Drawing:
    """Images on their way: call `logits`, then `accept` the chosen codes, once per scale; then `image`."""

    def __init__(self, model: ClassConditionalModel, labels: Sequence[int], settings: Settings) -> None:
        self._model, self._settings = model, settings
        self._condition = self._of_labels(labels)
        self._f_hat: Tensor | None = None
        self.scale = 0

    def restart(self, labels: Sequence[int]) -> bool:
        """Start other images, as many, in the same tensors. Raises ModelError for what is no class."""
        self._condition.copy_(self._of_labels(labels))
        self.scale = 0
        return True

    def _of_labels(self, labels: Sequence[int]) -> Condition:
        model = self._model
        classes = [model.label(label) for label in labels]
        classes += [model.num_classes] * len(classes) if self._settings.guided else []
        return model.transformer.condition(torch.tensor(classes, dtype=torch.long, device=model.device))

    def input(self) -> Tensor:
        """What the transformer is shown at the running scale, (R, N, C)."""
        transformer = self._model.transformer
        if self.scale == 0:
            return transformer.first_input(self._condition)
        tokens = transformer.next_input(self._model.vqvae.quantize.next_map(self.f_hat, self.scale), self.scale)
        return torch.cat([tokens, tokens]) if self._settings.guided else tokens

    def logits(self, cache: Attend) -> Tensor:
        """Guided logits of the running scale, (B, N, V) in fp32."""
        logits = self._model.transformer(self.input(), self._condition, cache)
        return self._settings.guide(logits, self.scale, len(self._model.transformer.schedule))

    def show(self, choices: Sequence[Tensor], cache: Attend) -> None:
        """Run the blocks over all scales at once, as training does, of images that have these codes."""
        self._model.transformer.hidden(torch.cat(list(self._inputs(choices)), dim=1), self._condition, cache)

    def _inputs(self, choices: Sequence[Tensor]) -> Iterator[Tensor]:
        for tokens_BN in choices:
            yield self.input()
            self.accept(tokens_BN)

    def accept(self, tokens_BN: Tensor) -> None:
        """Take the codes of the running scale."""
        last = len(self._model.transformer.schedule) - 1
        added = self._model.vqvae.quantize.code_features(tokens_BN, self.scale, enlarge=self.scale < last)
        self._f_hat = summed(self._f_hat, added, first=self.scale == 0)
        self.scale += 1

    @property
    def f_hat(self) -> Tensor:
        """Sum of code features so far, (B, Z, P, P); later scales are added to this very tensor."""
        if self._f_hat is None:
            raise ModelError("no scale was drawn yet")
        return self._f_hat

    def image(self) -> Tensor:
        """(B, 3, H, W) in [0, 1]."""
        return (self._model.vqvae.decode(self.f_hat) + 1) / 2


def summed(total: Tensor | None, added: Tensor, first: bool) -> Tensor:
    """The sum with what a scale adds, in the tensor of the total where there is one."""
    if total is None:
        return added
    return total.copy_(added) if first else total.add_(added)
