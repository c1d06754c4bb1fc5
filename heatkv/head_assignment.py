"""Which device gets which heads: equally many of every layer, so that none needs much more room than the others.

Arrays: L layers, H heads, T scales, R ranks; a split is heads[r, l], the H / R heads of layer l that rank r has.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from heatkv.core.plan import live_of_held
from heatkv.core.schema import as_whole, shown
from heatkv.errors import PlanError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MAX_SWEEPS = 20
"""How often all layers are gone through for swaps; most end after three or four."""

_TIGHTNESS = 4
"""Power of a checkpoint's fill by which it counts: where there is room to spare, nobody need be even."""


def check_ranks(heads: int, ranks: int) -> int:
    """`ranks` as a number. Raises PlanError unless so many devices can have equally many of `heads` heads."""
    number = as_whole(ranks)
    if number is None or number < 1 or heads % number:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise PlanError(f"{heads} heads cannot be split evenly over {shown(ranks)} ranks; take one of {divisors}")
    return number


def contiguous_heads(layers: int, heads: int, ranks: int) -> IntArray:
    """The first heads of every layer to the first rank, and so on (Megatron-LM), (R, L, H / R). Raises PlanError."""
    ranks = check_ranks(heads, ranks)
    of_layer = np.arange(heads).reshape(ranks, 1, -1)
    return np.ascontiguousarray(np.broadcast_to(of_layer, (ranks, layers, heads // ranks)))


def part_needed(held_LHT: IntArray, heads_RLH: IntArray) -> float:
    """Room that the rank with the largest part needs for what its heads hold, times the ranks, over what the whole
    cache needs: 1 where all are even, the number of ranks where one has all."""
    layers = np.arange(held_LHT.shape[0])[:, None]
    peaks = [int(live_of_held(held_LHT[layers, heads_LH].sum(axis=1)).max()) for heads_LH in heads_RLH]
    whole = int(live_of_held(held_LHT.sum(axis=1)).max())
    return max(peaks) * len(heads_RLH) / whole if whole else 1.0


def balanced_heads(held_LHT: IntArray, ranks: int) -> IntArray:
    """Heads spread so that every rank holds about as much at every checkpoint, the fullest ones above all.

    `held` are the tokens that every head holds for every target in a plan of the whole cache. Layer by layer, the
    heads that hold most go first, each to the rank that lacks most; then heads of a layer change places, two at a
    time, while that makes the checkpoints more even: the sum over ranks and checkpoints of the squared difference to
    an equal part. Returns (R, L, H / R), ascending within a layer. Raises PlanError.
    """
    layers, heads, _ = held_LHT.shape
    ranks = check_ranks(heads, ranks)
    rank_LH = _spread(held_LHT.astype(np.float64), ranks)
    for _ in range(MAX_SWEEPS):
        if not _swap(held_LHT.astype(np.float64), rank_LH, ranks):
            break
    # heads of a layer sorted by rank, and by number within one
    order_LH = np.argsort(rank_LH, axis=1, kind="stable")
    return np.ascontiguousarray(order_LH.reshape(layers, ranks, -1).transpose(1, 0, 2))


def _spread(held_LHT: FloatArray, ranks: int) -> IntArray:
    """The rank of every head, (L, H), with what earlier layers gave each rank in mind."""
    layers, heads, scales = held_LHT.shape
    rank_LH = np.zeros((layers, heads), dtype=np.int64)
    ahead_RT = np.zeros((ranks, scales))
    for layer, held_HT in enumerate(held_LHT):
        free_R = np.full(ranks, heads // ranks)
        for head in np.argsort(-held_HT.sum(axis=1), kind="stable"):
            rank = int(np.where(free_R > 0, ahead_RT @ held_HT[head], np.inf).argmin())
            rank_LH[layer, head] = rank
            free_R[rank] -= 1
            ahead_RT[rank] += held_HT[head]
        ahead_RT -= ahead_RT.mean(axis=0)
    return rank_LH


def _swap(held_LHT: FloatArray, rank_LH: IntArray, ranks: int) -> bool:
    """Change places in `rank_LH` while that helps, every layer once; false where nothing did."""
    layers, heads, _ = held_LHT.shape
    of_rank_RLT = np.stack([(held_LHT * (rank_LH == rank)[:, :, None]).sum(axis=1) for rank in range(ranks)])
    live_RTL = np.stack([_live(held_LT) for held_LT in of_rank_RLT])
    whole_TL = live_RTL.sum(axis=0)
    weight_TL = (whole_TL / max(whole_TL.max(), 1.0)) ** _TIGHTNESS
    off_RTL = live_RTL - whole_TL / ranks
    changed = False
    for layer, (held_HT, rank_H) in enumerate(zip(held_LHT, rank_LH, strict=True)):
        weight_T = _seen_by(weight_TL, layer)
        apart_HH = (((held_HT[:, None] - held_HT[None]) ** 2) * weight_T).sum(axis=2)
        for _ in range(heads * heads):
            pull_RT = np.stack([_seen_by(weight_TL * off_TL, layer) for off_TL in off_RTL])
            pull_HH = held_HT @ pull_RT[rank_H].T  # [i, j]: head i under the pull on the rank of head j
            own_H = pull_HH.diagonal()
            gain_HH = pull_HH + pull_HH.T - own_H[:, None] - own_H + apart_HH
            gain_HH[rank_H[:, None] == rank_H] = np.inf
            one, other = (int(i) for i in np.unravel_index(int(gain_HH.argmin()), gain_HH.shape))
            if gain_HH[one, other] >= -1e-9 * max(float(apart_HH.max()), 1.0):
                break
            change_T = held_HT[other] - held_HT[one]
            change_TL = np.repeat(change_T[:, None], layers, axis=1)
            change_TL[:, layer:] = np.append(change_T[1:], 0.0)[:, None]
            off_RTL[rank_H[one]] += change_TL
            off_RTL[rank_H[other]] -= change_TL
            rank_H[one], rank_H[other] = rank_H[other], rank_H[one]
            changed = True
    return changed


def _live(held_LT: FloatArray) -> FloatArray:
    """`live_of_held` of what is not whole."""
    next_LT = np.concatenate([held_LT[:, 1:], np.zeros_like(held_LT[:, :1])], axis=1)
    live: FloatArray = (next_LT.cumsum(axis=0) + held_LT.sum(axis=0) - held_LT.cumsum(axis=0)).T
    return live


def _seen_by(of_checkpoints_TL: FloatArray, layer: int) -> FloatArray:
    """Sums over the checkpoints at which what `layer` holds for a target counts, (T,): those after it while the target
    before runs, and those before it while the target itself does."""
    after_T = of_checkpoints_TL[:, layer:].sum(axis=1)
    total: FloatArray = np.append(0.0, after_T[:-1]) + of_checkpoints_TL[:, :layer].sum(axis=1)
    return total
