"""Drawing any number of images, a batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from torch import Tensor

from heatkv.core.plan import CachePlan
from heatkv.core.schema import shown
from heatkv.core.storage_type import StorageType
from heatkv.errors import ModelError
from heatkv.generation.loop import Generator
from heatkv.generation.micro_batches import images_that_fit, joined
from heatkv.models.base import ImageModel, checked_run
from heatkv.models.sampling import Settings

Label = TypeVar("Label")

AT_ONCE = 16
"""Images drawn at once, at most, where nothing else is asked for."""


class GeneratorOptions(TypedDict, total=False):
    """The options of Generator that the functions which make one take too."""

    settings: Settings | None
    code: str | None
    attention: str
    graphs: bool
    micro_batch: int | Literal["auto"]
    decode_batch: int | Literal["auto"]


def images_under(model: ImageModel[Any], plan: CachePlan, rows_per_image: int, storage: str) -> int:
    """Images at once where nothing else is asked for: AT_ONCE, or fewer where memory, or a budget in bytes, has no
    room for them."""
    rows = plan.most_rows(storage)
    most = AT_ONCE if rows is None else min(AT_ONCE, max(1, rows // rows_per_image))
    return images_that_fit(model, rows_per_image, most, plan.bytes(rows_per_image, storage))


def draw_batches(
    model: ImageModel[Label],
    labels: Iterable[Label | str] | Tensor,
    plan: CachePlan,
    *,
    seed: int = 0,
    first_sample: int = 0,
    batch: int | None = None,
    **options: Unpack[GeneratorOptions],
) -> Iterator[Tensor]:
    """The images of `generate`, (n, 3, H, W) at a time as they are decoded; raises its errors when the first is asked
    for. The last batch is decoded without a cache; those before it keep it for the next where there is room."""
    if batch is None:
        settings = options.get("settings") or model.sampling
        storage = str(StorageType.for_dtype(model.compute_dtype, options.get("code")))
        batch = images_under(model, plan, settings.rows_per_image, storage)
    seed, first_sample, batch, _ = checked_run(model, seed, first_sample, batch, None, None)
    if isinstance(labels, str) or not (values := list(labels)):
        raise ModelError(f"labels is {shown(labels)}; give a list with one label per image")
    ids = model.read_labels(values)
    generator = None
    for first in range(0, len(ids), batch):
        part = ids[first : first + batch]
        if generator is None or generator.batch != len(part):
            generator = None  # its cache goes before the smaller one comes
            generator = Generator(model, plan, len(part), **options)
        samples = range(first_sample + first, first_sample + first + len(part))
        drawn = generator.draw(part, seed, samples, decode=False)
        if first + batch >= len(ids):
            generator.give_back()
        generator.make_room()
        yield from generator.pictures(drawn)


def generate(
    model: ImageModel[Label],
    labels: Iterable[Label | str] | Tensor,
    plan: CachePlan,
    *,
    seed: int = 0,
    first_sample: int = 0,
    batch: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Unpack[GeneratorOptions],
) -> Tensor:
    """Images (B, 3, H, W), RGB in [0, 1], one per label, drawn `batch` at a time: by default AT_ONCE, or as many as
    memory, or a budget in bytes, has room for.

    Labels are what `model.label` reads: numbers or names of classes, prompts or texts. `first_sample` numbers the first
    image for the random numbers; images do not depend on `batch` except for rounding. `progress` is called with how
    many are done. `options` are those of Generator; with graphs, batches from the third on replay them. Raises
    ModelError for labels that the model does not have, and what Generator raises.
    """
    values = labels if isinstance(labels, str) else list(labels)
    drawn = draw_batches(model, values, plan, seed=seed, first_sample=first_sample, batch=batch, **options)
    return joined(drawn, len(values), progress)
