"""Finding numbers that are not finite where they arise, without waiting for the device; and the same bits every time.

What is watched is summed per row and head into a table that stays on the device; a sum is finite only where all of its
numbers are. The table is read once, when the images are done, and tells which was the first place.
Shapes: T scales, L layers, R rows, H heads, N tokens of the running scale, D head size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.engine.turns import Rows
from heatkv.errors import HeatKVError, NumericsError

_FEW_TOKENS = 16
"""More than these are summed first on a CPU, which takes half the time, in 16 bits a fifth."""

CUBLAS_WORKSPACE = ":4096:8"
"""The setting under which cuBLAS gives the same bits every time."""


def finite(x: Tensor) -> bool:
    """Whether all numbers are finite; a sum tells it fastest, and where it overflows a closer look decides."""
    if not x.is_floating_point():
        return True
    x = x.detach()
    x = x.float() if x.element_size() == 1 else x  # eight bits have no sum
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def way_out(dtype: torch.dtype) -> str:
    """What to do about numbers that overflowed in this type."""
    if dtype is torch.float16:
        return f"float16 holds nothing above {torch.finfo(dtype).max:.0f}: run in bfloat16 or float32"
    return "look at the weights, at the prompt's features, and at whatever else was changed in the model"


class Watch:
    """Queries, keys and values of every layer and scale, for `rows` rows; `see` is called before every attention.

    A sum counts as not finite also where its numbers are, but lead beyond 1e38 together.
    """

    def __init__(self, geometry: CacheGeometry, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._sums_TL3RH = torch.zeros(
            (len(geometry.schedule), geometry.layers, 3, rows, geometry.heads),
            dtype=torch.float64 if dtype is torch.float64 else torch.float32,  # sums of 16 bits would overflow
            device=device,
        )
        # views made once: making them for every layer would take as long as the sums
        self._whole = [list(of_scale.unbind()) for of_scale in Rows(1, 0, rows).of(self._sums_TL3RH, 3).unbind()]

    def clear(self) -> None:
        self._sums_TL3RH.zero_()

    def see(
        self, target: int, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, rows: Rows | None = None
    ) -> None:
        """Take the sums of these rows, of all by default; nothing waits for the device."""
        if rows is None or len(rows) == self._sums_TL3RH.shape[3]:
            into_3FBH = self._whole[target][layer]
        else:
            into_3FBH = rows.of(self._sums_TL3RH[target, layer], 1)
        for into_FBH, x_RHND in zip(into_3FBH, (q_RHND, k_RHND, v_RHND), strict=True):
            x_RHND = x_RHND.detach() if x_RHND.requires_grad else x_RHND
            if x_RHND.device.type == "cpu" and x_RHND.shape[2] > _FEW_TOKENS:
                x_RHND = x_RHND.sum(dim=2, dtype=torch.float32 if x_RHND.dtype is torch.float16 else None)
            x_FBHX = x_RHND.flatten(2).unflatten(0, into_FBH.shape[:2])
            torch.sum(x_FBHX, dim=3, dtype=into_FBH.dtype, out=into_FBH)

    def first(self, images: int | None = None) -> tuple[int, NumericsError] | None:
        """The first place with numbers that are not finite: its scale, and an error that names it; it waits for the
        device. With `images`, rows are named as those of images, the conditional ones first."""
        if bool(self._sums_TL3RH.isfinite().all()):
            return None
        broken_TL3RH = ~self._sums_TL3RH.isfinite().cpu()
        scale, layer = broken_TL3RH.flatten(2).any(-1).nonzero()[0].tolist()
        broken_3RH = broken_TL3RH[scale, layer]
        names = [name for name, broken_RH in zip("qkv", broken_3RH, strict=True) if broken_RH.any()]
        heads, rows = (broken_3RH.any(dim=0).any(dim=dim).nonzero().flatten().tolist() for dim in (0, 1))
        what = "row" if images is None else "image"
        whose = rows if images is None else sorted({row % images for row in rows})
        text = (
            f"{' and '.join(names)} of layer {layer}, {numbered('head', heads)}, scale {scale}, "
            f"{numbered(what, whose)}: not finite"
        )
        if len(names) == 3 and broken_3RH[:, rows].all():
            source = "the class or prompt that is drawn" if scale == 0 else f"the codes up to scale {scale - 1}"
            text += f", as was what enters the layer: {f'the output of layer {layer - 1}' if layer else source}"
        else:
            text += ", and nothing was before"
        return scale, NumericsError(f"{text}; {way_out(self._dtype)}", None if images is None else rows[0] % images)


def logits_error(scale: int, layers: int, broken: Sequence[int], dtype: torch.dtype) -> NumericsError:
    """What to raise when the logits of these images were not finite, and no queries, keys or values before them."""
    return NumericsError(
        f"the logits of scale {scale}, {numbered('image', broken)}: not finite, and no q, k or v was before; see the "
        f"output of the last layer, {layers - 1}, and the head; {way_out(dtype)}",
        broken[0],
    )


def numbered(what: str, numbers: Sequence[int]) -> str:
    """`head 3`, `heads 1, 2`, `heads 0, 1, 2, 3 and 28 more`."""
    shown = ", ".join(map(str, numbers[:4]))
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"{what}{'s' * (len(numbers) > 1)} {shown}{more}"


@contextmanager
def naming_samples(names: Sequence[str]) -> Iterator[None]:
    """Within, what is raised about an image names the sample, too."""
    try:
        yield
    except NumericsError as error:
        if error.image is None:
            raise
        raise NumericsError(f"sample {names[error.image]}: {error}", error.image) from error


def run_deterministically() -> None:
    """Make torch give the same bits every time on one machine, from now on; call it before CUDA is used.

    Operations that could not raise RuntimeError. Raises HeatKVError for a setting of cuBLAS that is not deterministic.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    if workspace not in (CUBLAS_WORKSPACE, ":16:8"):
        raise HeatKVError(
            f"CUBLAS_WORKSPACE_CONFIG is {workspace!r}, under which cuBLAS may give other bits every time; unset it, "
            f"or set it to {CUBLAS_WORKSPACE}"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def is_deterministic() -> bool:
    """Whether this process was asked for the same bits every time."""
    return torch.are_deterministic_algorithms_enabled()
