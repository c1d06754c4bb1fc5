"""The cache of a dynamic policy: every head keeps the tokens that score highest, as many as its plan says.

Which tokens they are is each row's own affair; how many, and in which slots of the one arena, is fixed beforehand.
Heads choose for themselves, or all heads of a layer share one number and choose among all their tokens: a pool is what
chooses together. Where heads share, each row gives every head its own number of tokens.
Shapes: R rows, H heads of a step, N tokens of the running scale, C candidates (M held, then N new), D head size,
G pools, K tokens that a pool keeps, P arena slots, X carried numbers.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.core.capacity_plan import CapacityPlan
from heatkv.engine.arena_cache import ArenaCache
from heatkv.engine.attention.grouped import HeadGroup, head_indices, with_held
from heatkv.engine.capacity_layout import CapacityLayout
from heatkv.engine.spans import ATTENTION, CACHE_UPDATE, span
from heatkv.engine.store import Places, rows_at
from heatkv.errors import PlanError, PolicyError
from heatkv.policies.dynamic import Candidates, DynamicPolicy


@dataclass(frozen=True)
class TokenStep:
    """Heads of a layer that go through attention together, in pools that hold, and are to keep, equally many tokens.

    Each pool keeps `kept` of its candidates, `everything` when those are all. `written` is where keys and values go,
    pool after pool, those of new tokens alone where the others stay in their slots; `carried` where carried numbers go.
    With `uneven`, every row has another number of the held tokens in each head: their slots follow each other head by
    head, and a head is read as `group.held` places, of which the first may hold nothing.
    """

    group: HeadGroup
    heads: tuple[int, ...]
    pools: int
    kept: int
    everything: bool
    uneven: bool
    written: Places
    carried: Tensor


class SelectingCache(ArenaCache):
    """Keys and values of the tokens that a dynamic policy scores highest, for `rows` rows of images drawn together.

    `query_weight(layer)` returns W_q of every head, (H, D, W), for policies that want it. `attend` raises PolicyError
    when the policy fails or its scores are not of the candidates' shape, `check` when scores were not numbers.
    """

    def __init__(
        self,
        plan: CapacityPlan,
        policy: DynamicPolicy,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        query_weight: Callable[[int], Tensor] | None = None,
        code: str | None = None,
        rows_at_once: Sequence[int] | None = None,
    ) -> None:
        self.plan, self.policy, self._query_weight = plan, policy, query_weight
        self.layout = CapacityLayout.for_plan(plan)
        super().__init__(plan, self.layout.slots, 0, rows, dtype, device, code, "ragged", rows_at_once)
        self.wants_input = policy.wants_input and not plan.had_no_effect()
        layers, heads, on = plan.geometry.layers, plan.geometry.heads if plan.shared else 0, self.store.device
        self._carried_RPX = torch.empty((rows, self.layout.slots, plan.carried), device=on)
        self._counts_LRH = torch.zeros((layers, rows, heads), dtype=torch.int32, device=on)
        self._not_numbers_L = torch.zeros(layers, dtype=torch.bool, device=on)
        targets = range(len(plan.schedule))
        self._steps = [[self._layer_steps(target, layer) for layer in range(layers)] for target in targets]
        self.reset()

    @property
    def held(self) -> tuple[Tensor, ...]:
        return *super().held, self._counts_LRH, self._carried_RPX

    def reset(self) -> None:
        super().reset()
        self._input_RNW: Tensor | None = None
        self._counts_LRH.zero_()
        self._not_numbers_L.zero_()

    def see_input(self, layer: int, attention_input_RNW: Tensor) -> None:
        if self.wants_input:
            self._input_RNW = attention_input_RNW

    def check(self, images: int | None = None) -> None:
        """As of every cache. Raises PolicyError when scores were not numbers, though all they were made of were."""
        super().check(images)
        broken = [str(layer) for layer, broken in enumerate(self._not_numbers_L.tolist()) if broken]
        if broken:
            raise PolicyError(
                f"policy {self.policy.name!r} gave scores that are not numbers in layer{'s' * (len(broken) > 1)} "
                f"{', '.join(broken)}"
            )

    def _layer_steps(self, target: int, layer: int) -> tuple[TokenStep, ...]:
        """The steps of one layer at one target: pools that hold and keep equally many tokens go together."""
        now, then = self.layout.places[target][layer], self.layout.places[target + 1][layer]
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for pool, slots in enumerate(now):
            alike[len(slots), len(then[pool])].append(pool)
        return tuple(
            self._step(target, pools, np.stack([now[pool] for pool in pools]), np.stack([then[pool] for pool in pools]))
            for pools in alike.values()
        )

    def _step(self, target: int, pools: list[int], held_GM: np.ndarray, kept_GK: np.ndarray) -> TokenStep:
        store, schedule = self.store, self.geometry.schedule
        heads = tuple(range(self.geometry.heads)) if self.plan.shared else tuple(pools)
        each, held, kept = len(heads) // len(pools), held_GM.shape[1], kept_GK.shape[1]
        uneven = each > 1 and 0 < held < each * schedule.offsets[target]  # heads that share dropped something
        widest = min(held, schedule.offsets[target]) if uneven else held // each
        everything = kept == each * (widest + schedule.tokens[target])
        # a head on its own that keeps everything leaves what it holds in place
        written_GK = kept_GK[:, held:] if everything and each == 1 else kept_GK
        carried_GK = kept_GK if self.plan.carried else kept_GK[:, :0]
        places = store.places(held_GM.ravel()) if held else None
        return TokenStep(
            HeadGroup(head_indices(heads, store.device), len(heads), widest, places),
            heads,
            len(pools),
            kept,
            everything,
            uneven,
            store.places(written_GK.ravel(), writing=True),
            torch.from_numpy(carried_GK.ravel()).to(store.device),
        )

    def _run(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        steps = self._steps[self.turn.target][layer]
        out_RHND = torch.empty_like(q_RHND) if len(steps) > 1 else q_RHND
        writes = []
        for step in steps:
            with span(ATTENTION):
                seen = self._candidates(layer, step, q_RHND, k_RHND, v_RHND)
                mask = None
                if seen.valid_RHC is not None:
                    # as numbers: truth values would be made into numbers for every query
                    hidden = seen.q_RHND.new_zeros(seen.valid_RHC.shape).masked_fill_(~seen.valid_RHC, -torch.inf)
                    mask = hidden[:, :, None].expand(-1, -1, seen.new, -1)
                out = F.scaled_dot_product_attention(seen.q_RHND, seen.k_RHCD, seen.v_RHCD, attn_mask=mask, scale=1.0)
                if len(steps) > 1:
                    step.group.put(out_RHND, out)
                else:
                    out_RHND = out
            if step.kept:
                with span(CACHE_UPDATE):
                    writes.append((step, *self._choose(step, seen)))
        with span(CACHE_UPDATE):
            for step, k, v, carried in writes:  # after all are chosen: heads may take over each other's slots
                self.store.write(step.written, k, v)
                if self.plan.carried:
                    into_FBPX = self.store.rows.of(self._carried_RPX, 0)
                    into_FBPX.index_copy_(2, step.carried, carried.unflatten(0, into_FBPX.shape[:2]))
        return out_RHND

    def _candidates(self, layer: int, step: TokenStep, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Candidates:
        """What the heads of a step attend to, held tokens first, with what was carried with those."""
        group, valid_RHC = step.group, None
        if step.uneven:
            slots_RHM, valid_RHC = self._held_by_row(layer, step, q_RHND.shape[2])
            past_k, past_v = self.store.read_rows(slots_RHM.flatten(1)).unflatten(2, slots_RHM.shape[1:])
            q, k = q_RHND, torch.cat([past_k.to(k_RHND.dtype), k_RHND], dim=2)
            v = torch.cat([past_v.to(v_RHND.dtype), v_RHND], dim=2)
            carried = rows_at(self._carried_RPX, slots_RHM.flatten(1), self.store.row_numbers())
        else:
            q, k, v = with_held(group, q_RHND, k_RHND, v_RHND, self.store)
            carried = self.store.rows.of(self._carried_RPX, 0)
            carried = carried[:, :, :0] if group.places is None else carried.index_select(2, group.places.slots)
            carried = carried.flatten(0, 1)
        carried_RHMX = carried.unflatten(1, (group.size, group.held))
        inputs: dict[str, Tensor] = {}
        if self.wants_input and step.kept and (self.plan.carried or not step.everything):
            if self._input_RNW is None or self._query_weight is None:
                raise PlanError("the attention's input is unknown; call see_input() before every attend()")
            weight_HDW = self._query_weight(layer)[group.heads]
            inputs = {"attention_input_RNW": self._input_RNW, "query_weight_HDW": weight_HDW}
        return Candidates(
            layer=layer,
            target=self.turn.target,
            heads=step.heads,
            heads_of_layer=self.geometry.heads,
            schedule=self.geometry.schedule,
            capacity=step.kept * step.pools // group.size,
            held=group.held,
            q_RHND=q,
            k_RHCD=k,
            v_RHCD=v,
            valid_RHC=valid_RHC,
            carried_RHCX=F.pad(carried_RHMX, (0, 0, 0, q.shape[2])),
            **inputs,
        )

    def _held_by_row(self, layer: int, step: TokenStep, new: int) -> tuple[Tensor, Tensor]:
        """The slots of an uneven step's held tokens, (R, H, M), right-aligned, and which candidates there are."""
        assert step.group.places is not None
        counts_RH, widest = self.store.rows.of(self._counts_LRH[layer], 0).flatten(0, 1).long(), step.group.held
        ends_RH1 = counts_RH.cumsum(dim=1)[..., None]
        at_RHM = ends_RH1 - widest + torch.arange(widest, device=counts_RH.device)
        valid_RHM = at_RHM >= ends_RH1 - counts_RH[..., None]
        return step.group.places.slots[at_RHM.clamp(min=0)], F.pad(valid_RHM, (0, new), value=True)

    def _choose(self, step: TokenStep, seen: Candidates) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and carried numbers to write, pool after pool, (R, G * K, D) and (R, G * K, X)."""
        if self.plan.carried:
            carried_RHCX = self._guarded("carry", self.policy.carry, seen)
            self._check_shape("carried", carried_RHCX, (*seen.k_RHCD.shape[:3], self.plan.carried))
            seen = dataclasses.replace(seen, carried_RHCX=carried_RHCX)
        parts = seen.k_RHCD, seen.v_RHCD, seen.carried_RHCX
        if step.everything:
            first = seen.held if len(step.heads) == step.pools else 0
            return parts[0][:, :, first:].flatten(1, 2), parts[1][:, :, first:].flatten(1, 2), parts[2].flatten(1, 2)
        scores_RHC = self._guarded("score", self.policy.score, seen)
        self._check_shape("scored", scores_RHC, seen.k_RHCD.shape[:3])
        if seen.valid_RHC is not None:
            # whatever a token scores, it is worth more than a place that holds nothing
            least = torch.finfo(scores_RHC.dtype).min
            scores_RHC = scores_RHC.clamp(min=least).masked_fill(~seen.valid_RHC, -torch.inf)
        rows, heads, count = scores_RHC.shape
        pools = step.pools
        best = scores_RHC.reshape(rows * pools, -1).topk(step.kept, dim=-1, sorted=False)
        # what is not a number counts as the highest; looking at it now would wait for the device
        self._not_numbers_L[seen.layer].logical_or_(best.values.isnan().any())
        best_BK = best.indices.sort(dim=-1).values
        if self.plan.shared:
            kept = torch.zeros((rows, heads * count), dtype=torch.int32, device=best_BK.device).scatter_(1, best_BK, 1)
            into_FBH = self.store.rows.of(self._counts_LRH[seen.layer], 0)
            into_FBH.copy_(kept.view(*into_FBH.shape, count).sum(dim=-1))
        k, v, carried = (
            rows_at(x.reshape(rows * pools, heads // pools * count, x.shape[3]), best_BK).unflatten(0, (rows, pools))
            for x in parts
        )
        return k.flatten(1, 2), v.flatten(1, 2), carried.flatten(1, 2)

    def _guarded(self, name: str, method: Callable[[Candidates], Tensor], seen: Candidates) -> Tensor:
        """What a method of the policy returns. Raises PolicyError: a third party's policy may fail in any way."""
        try:
            return method(seen)
        except Exception as error:
            raise PolicyError(
                f"{name} of policy {self.policy.name!r} failed in layer {seen.layer} of scale {seen.target}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _check_shape(self, what: str, x: Tensor, expected: tuple[int, ...]) -> None:
        if x.shape != expected:
            raise PolicyError(f"policy {self.policy.name!r} {what} {tuple(x.shape)}; it must be {tuple(expected)}")
