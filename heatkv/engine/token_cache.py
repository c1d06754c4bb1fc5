"""The cache of a dynamic policy: every head keeps the tokens that score highest, as many as its plan says.

Which tokens they are is each row's own affair; how many, and in which slots of the one arena, is fixed beforehand.
Shapes: R rows, H heads of a group, N tokens of the running scale, C candidates (held, then new), D head size, M tokens
that are kept, P arena slots, X carried numbers.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.storage_type import StorageType
from heatkv.engine.arena_cache import ArenaCache, KVCache
from heatkv.engine.attention.kernels import check_kernel
from heatkv.engine.attention.ragged import HeadGroup, head_indices, with_held
from heatkv.engine.layout import CapacityLayout
from heatkv.engine.spans import ATTENTION, CACHE_UPDATE, span
from heatkv.engine.store import CODES, Places, check_coding, known_device, rows_at
from heatkv.errors import PlanError, PolicyError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.registry import find_policy

_STORAGE = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class SelectingStep:
    """Heads of a layer that hold, and are to keep, equally many tokens: where they are, and where those go.

    Each keeps `kept` tokens; `places` are the places of all of them, or of the new ones where all stay and nothing is
    chosen. Carried numbers are read at `held_slots` and written to `kept_slots`, head after head.
    """

    group: HeadGroup
    heads: tuple[int, ...]
    kept: int
    everything: bool
    places: Places
    held_slots: Tensor
    kept_slots: Tensor


class SelectingCache(ArenaCache):
    """Keys and values of the tokens that a dynamic policy scores highest, for `rows` rows of images drawn together.

    `query_weight(layer)` gives W_q of every head, (H, D, W), for policies that want it. Raises PolicyError when the
    policy's scores are not of the candidates' shape; whether they were numbers, `check` tells when the images are done.
    """

    def __init__(
        self,
        plan: CapacityPlan,
        policy: DynamicPolicy,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        query_weight: Callable[[int], Tensor] | None = None,
        storage: str | None = None,
    ) -> None:
        check_policy_of(plan, policy)
        if dtype in _STORAGE:
            plan.check_bytes(rows, str(StorageType(_STORAGE[dtype], storage)))
        self.plan, self.policy = plan, policy
        self._query_weight = query_weight
        self.layout = CapacityLayout.of(plan)
        super().__init__(plan, self.layout.slots, 0, rows, dtype, device, storage)
        on = self.store.device
        self._carried_RPX = torch.empty((rows, self.layout.slots, plan.carried), device=on) if plan.carried else None
        heads = plan.geometry.heads if plan.shared else 0
        self._counts_LRH = torch.zeros((plan.geometry.layers, rows, heads), dtype=torch.int32, device=on)
        self._not_numbers_L = torch.zeros(plan.geometry.layers, dtype=torch.bool, device=on)
        self._steps = [] if plan.shared else self._prepare()
        self._places = self._prepare_shared() if plan.shared else []
        self.reset()

    @property
    def held(self) -> tuple[Tensor, ...]:
        beside = (self._counts_LRH,) if self._carried_RPX is None else (self._counts_LRH, self._carried_RPX)
        return *super().held, *beside

    @property
    def wants_input(self) -> bool:
        """Whether the model must call `see_input` before every `attend`."""
        return self.policy.wants_input and not self.plan.had_no_effect()

    def reset(self) -> None:
        super().reset()
        self._input_RNW: Tensor | None = None
        self._counts_LRH.zero_()
        self._not_numbers_L.zero_()

    def check(self, images: int | None = None) -> None:
        """As of every cache. Raises PolicyError when scores were not numbers, though all they were made of were."""
        super().check(images)
        broken = [layer for layer, found in enumerate(self._not_numbers_L.tolist()) if found]
        if broken:
            raise PolicyError(
                f"policy {self.policy.name!r} gave scores that are not numbers in layer{'s' * (len(broken) > 1)} "
                f"{', '.join(map(str, broken))}"
            )

    def see_input(self, layer: int, attention_input_RNW: Tensor) -> None:
        """What the next layer's queries, keys and values are made from."""
        del layer
        self._input_RNW = attention_input_RNW

    def _next_slots(self, target: int, layer: int) -> Sequence[np.ndarray]:
        """Where what is kept for the next target goes."""
        places = self.layout.places
        return (
            places[target + 1][layer] if target + 1 < len(places) else [np.zeros(0, dtype=np.int64)] * len(places[0][0])
        )

    def _prepare(self) -> list[list[tuple[SelectingStep, ...]]]:
        """The steps of every target and layer."""
        return [
            [self._steps_of_layer(target, layer, of_heads) for layer, of_heads in enumerate(of_layers)]
            for target, of_layers in enumerate(self.layout.places)
        ]

    def _steps_of_layer(self, target: int, layer: int, now: Sequence[np.ndarray]) -> tuple[SelectingStep, ...]:
        then, device = self._next_slots(target, layer), self.store.device
        new = self.geometry.schedule.tokens[target]
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for head, slots in enumerate(now):
            alike[len(slots), len(then[head])].append(head)
        steps = []
        for (held, kept), heads in alike.items():
            held_HM, kept_HM = (np.stack([of[head] for head in heads]) for of in (now, then))
            everything = kept == held + new
            steps.append(
                SelectingStep(
                    HeadGroup(
                        head_indices(tuple(heads), device),
                        len(heads),
                        held,
                        self.store.places(held_HM.ravel()) if held else None,
                    ),
                    tuple(heads),
                    kept,
                    everything,
                    # what is held stays where it is when all stay
                    self.store.places(kept_HM[:, held if everything else 0 :].ravel(), writing=True),
                    torch.from_numpy(held_HM.ravel()).to(device),
                    torch.from_numpy(kept_HM.ravel()).to(device),
                )
            )
        return tuple(steps)

    def _prepare_shared(self) -> list[list[Tensor]]:
        """The slots of every layer while every target runs, and after the last one."""
        layers = range(self.geometry.layers)
        targets = range(len(self.layout.places))
        held = [[self.layout.places[target][layer][0] for layer in layers] for target in targets]
        held.append([np.zeros(0, dtype=np.int64) for _ in layers])
        return [[torch.from_numpy(slots).to(self.store.device) for slots in of_layers] for of_layers in held]

    def _prepared(self) -> Any:
        return self._steps, self._places

    def _run(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        if self.plan.shared:
            return self._run_shared(layer, q_RHND, k_RHND, v_RHND)
        steps = self._steps[self._target][layer]
        out_RHND = torch.empty_like(q_RHND) if len(steps) > 1 else None
        writes = []
        for step in steps:
            with span(ATTENTION):
                q, k, v = with_held(step.group, q_RHND, k_RHND, v_RHND, self.store)
                out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
                if out_RHND is None:
                    out_RHND = out
                else:
                    step.group.put(out_RHND, out)
            if step.kept:
                with span(CACHE_UPDATE):
                    writes.append((step, *self._chosen(layer, step, q, k, v)))
        assert out_RHND is not None
        with span(CACHE_UPDATE):
            for step, k, v, carried in writes:  # after all are chosen: heads may take over each other's slots
                self.store.write(step.places, k.flatten(1, 2), v.flatten(1, 2))
                if carried is not None and self._carried_RPX is not None:
                    self._carried_RPX.index_copy_(1, step.kept_slots, carried.flatten(1, 2))
        return out_RHND

    def _chosen(
        self, layer: int, step: SelectingStep, q_RHND: Tensor, k_RHCD: Tensor, v_RHCD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values to write, (R, H, M, D), those of new tokens alone where all stay; carried numbers of all that
        stay, (R, H, M, X)."""
        held, kept, everything = step.group.held, step.kept, step.everything
        if everything and self._carried_RPX is None:
            return k_RHCD[:, :, held:], v_RHCD[:, :, held:], None
        seen = self._seen(layer, step.group, step.heads, kept, held, q_RHND, k_RHCD, v_RHCD, None, None)
        if self._carried_RPX is not None:
            past = self._carried_RPX.index_select(1, step.held_slots)
            padded = F.pad(past.unflatten(1, (len(step.heads), held)), (0, 0, 0, q_RHND.shape[2]))
            seen = dataclasses.replace(seen, carried_RHCX=padded)
            seen = dataclasses.replace(seen, carried_RHCX=self._carry(seen))
        if everything:
            return k_RHCD[:, :, held:], v_RHCD[:, :, held:], seen.carried_RHCX
        best_RHM = self._best(layer, self._scores(seen), kept)
        at = best_RHM.flatten(0, 1)
        parts = [k_RHCD, v_RHCD, *([] if seen.carried_RHCX is None else [seen.carried_RHCX])]
        k, v, *more = (rows_at(x.flatten(0, 1), at).unflatten(0, best_RHM.shape[:2]) for x in parts)
        return k, v, more[0] if more else None

    def _seen(
        self,
        layer: int,
        group: HeadGroup | None,
        heads: tuple[int, ...],
        capacity: int,
        held: int,
        q_RHND: Tensor,
        k_RHCD: Tensor,
        v_RHCD: Tensor,
        valid_RHC: Tensor | None,
        carried_RHCX: Tensor | None,
    ) -> Candidates:
        weight = None
        if self.policy.wants_input:
            if self._input_RNW is None:
                raise PlanError("the attention's input was not told; call see_input() before every attend()")
            assert self._query_weight is not None
            weight = self._query_weight(layer)
            if group is not None:
                weight = weight[group.heads]
        return Candidates(
            layer=layer, target=self._target, heads=heads, heads_of_layer=self.geometry.heads,
            schedule=self.geometry.schedule, capacity=capacity, held=held, q_RHND=q_RHND, k_RHCD=k_RHCD, v_RHCD=v_RHCD,
            valid_RHC=valid_RHC, carried_RHCX=carried_RHCX, attention_input_RNW=self._input_RNW,
            query_weight_HDW=weight,
        )  # fmt: skip

    def _scores(self, seen: Candidates) -> Tensor:
        scores = self._guarded("score", self.policy.score, seen)
        if scores.shape != seen.k_RHCD.shape[:3]:
            raise PolicyError(
                f"policy {self.policy.name!r} scored {tuple(scores.shape)}; (rows, heads, candidates) are "
                f"{tuple(seen.k_RHCD.shape[:3])}"
            )
        return self._of_valid(seen, scores)

    def _best(self, layer: int, scores: Tensor, count: int) -> Tensor:
        """Indices of the highest scores, ascending."""
        best = scores.topk(count, dim=-1, sorted=False)
        # what is not a number counts as the highest; looking at it now would wait for the device
        self._not_numbers_L[layer].logical_or_(best.values.isnan().any())
        return best.indices.sort(dim=-1).values

    @staticmethod
    def _of_valid(seen: Candidates, scores: Tensor) -> Tensor:
        if seen.valid_RHC is None:
            return scores
        # whatever a token scores, it is worth more than a place that holds nothing
        return scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~seen.valid_RHC, -torch.inf)

    def _carry(self, seen: Candidates) -> Tensor:
        carried = self._guarded("carry", self.policy.carry, seen)
        wanted = (*seen.k_RHCD.shape[:3], self.plan.carried)
        if carried.shape != wanted:
            raise PolicyError(f"policy {self.policy.name!r} carries {tuple(carried.shape)}; it must be {wanted}")
        return carried

    def _guarded(self, name: str, method: Callable[[Candidates], Tensor], seen: Candidates) -> Tensor:
        try:
            return method(seen)
        except Exception as error:  # a third party's policy may fail in any way
            raise PolicyError(
                f"{name} of policy {self.policy.name!r} failed in layer {seen.layer} of scale {seen.target}: "
                f"{type(error).__name__}: {error}"
            ) from error

    # ------------------------------------------------------------------ heads that share

    def _run_shared(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """As `_run`, where every row gives every head of the layer its own number of places.

        What is held lies head by head; it is read into places of equal length, whose first ones may hold nothing.
        """
        then_P = self._places[self._target + 1][layer]
        with span(ATTENTION):
            out_RHND, k, v, slots_RHM, valid_RHC = self._attention_shared(layer, q_RHND, k_RHND, v_RHND)
        if len(then_P):
            with span(CACHE_UPDATE):
                self._keep_shared(layer, then_P, slots_RHM, q_RHND, k, v, valid_RHC)
        return out_RHND

    def _attention_shared(
        self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What it gives, the keys and values it is over, the slots of those held, and which places hold a token."""
        places_P = self._places[self._target][layer]
        _, heads, tokens, _ = q_RHND.shape
        available = self.geometry.schedule.offsets[self._target]
        k, v, valid_RHC, mask = k_RHND, v_RHND, None, None
        if 0 < len(places_P) < heads * available:  # something was dropped: heads hold different numbers
            widest, counts_RH = min(available, len(places_P)), self._counts_LRH[layer].long()
            ends_RH1 = counts_RH.cumsum(dim=1)[..., None]
            at_RHM = ends_RH1 - widest + torch.arange(widest, device=q_RHND.device)
            held_RHM = at_RHM >= ends_RH1 - counts_RH[..., None]
            slots_RHM = places_P[at_RHM.clamp(min=0)]
            valid_RHC = F.pad(held_RHM, (0, tokens), value=True)
            # as numbers: truth values would be made into numbers for every query
            hidden = q_RHND.new_zeros(valid_RHC.shape).masked_fill_(~valid_RHC, -torch.inf)
            mask = hidden[:, :, None].expand(-1, -1, tokens, -1)
        else:
            slots_RHM = places_P.view(heads, -1)[None].expand(self.rows, -1, -1)
        if len(places_P):
            where_RM = slots_RHM.flatten(1)
            past_k, past_v = self.store.read_rows(where_RM).unflatten(2, (heads, -1))
            k, v = torch.cat([past_k.to(k.dtype), k], dim=2), torch.cat([past_v.to(v.dtype), v], dim=2)
        out_RHND = F.scaled_dot_product_attention(q_RHND, k, v, attn_mask=mask, scale=1.0)
        return out_RHND, k, v, slots_RHM, valid_RHC

    def _keep_shared(
        self,
        layer: int,
        then_P: Tensor,
        slots_RHM: Tensor,
        q_RHND: Tensor,
        k_RHCD: Tensor,
        v_RHCD: Tensor,
        valid_RHC: Tensor | None,
    ) -> None:
        rows, heads, count, _ = k_RHCD.shape
        parts = [k_RHCD, v_RHCD]
        seen = self._seen(
            layer,
            None,
            tuple(range(heads)),
            len(then_P) // heads,
            slots_RHM.shape[2],
            q_RHND,
            k_RHCD,
            v_RHCD,
            valid_RHC,
            None,
        )
        if self._carried_RPX is not None:
            past = rows_at(self._carried_RPX, slots_RHM.flatten(1)).unflatten(1, (heads, -1))
            seen = dataclasses.replace(seen, carried_RHCX=F.pad(past, (0, 0, 0, q_RHND.shape[2])))
            carried = self._carry(seen)
            seen = dataclasses.replace(seen, carried_RHCX=carried)
            parts.append(carried)
        if len(then_P) == heads * count:  # all stay
            chosen = [x.flatten(1, 2) for x in parts]
            if valid_RHC is not None:  # a single head, which holds as much in all rows
                self._counts_LRH[layer] += q_RHND.shape[2]
        else:
            best = self._best(layer, self._scores(seen).flatten(1), len(then_P))
            chosen = [rows_at(x.flatten(1, 2), best) for x in parts]
            kept = torch.zeros((rows, heads * count), dtype=torch.int32, device=best.device).scatter_(1, best, 1)
            self._counts_LRH[layer] = kept.view(rows, heads, count).sum(dim=-1)
        self.store.write(
            Places(len(then_P), None, then_P) if self.store.code else Places(len(then_P), then_P, None),
            chosen[0],
            chosen[1],
        )
        if self._carried_RPX is not None:
            self._carried_RPX.index_copy_(1, then_P, chosen[2])


def open_cache(
    plan: CachePlan,
    rows: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    key_angles: Sequence[Tensor] | None = None,
    query_weight: Callable[[int], Tensor] | None = None,
    storage: str | None = None,
    attention: str = "auto",
) -> KVCache | SelectingCache:
    """The cache that a plan describes. Raises PolicyError when the policy of a dynamic plan is not known here, and
    PlanError for a storage or an attention kernel that cannot be.

    Dynamic policies look at every candidate, which are gathered for them, so that attention is always the plain one.
    """
    if isinstance(plan, CapacityPlan):
        check_cache(plan, dtype, device, storage, attention)
        return SelectingCache(plan, policy_of(plan), rows, dtype, device, query_weight, storage)
    assert isinstance(plan, Plan)
    return KVCache(plan, rows, dtype, device, key_angles, storage, attention)


def check_cache(
    plan: CachePlan, dtype: torch.dtype, device: torch.device | str, storage: str | None, attention: str
) -> None:
    """Raise PlanError for a storage or a kernel that a cache of this plan cannot have here."""
    on = known_device(device)
    if storage is not None:
        check_coding(storage, on)
    code = None if storage is None else CODES[storage]
    check_kernel(attention, on, dtype, plan.geometry.head_dim, code, gathered=isinstance(plan, CapacityPlan))


def policy_of(plan: CapacityPlan) -> DynamicPolicy:
    """The policy that a dynamic plan was made by, with its settings. Raises PolicyError, and PlanError for settings or
    numbers that are not that policy's."""
    names = {field.name for field in dataclasses.fields(find_policy(plan.policy)) if field.init}
    told = plan.settings.keys() - {"budget", "seed"}
    if told != names:
        raise PlanError(
            f"the plan's settings are {', '.join(sorted(told)) or 'none'}; those of policy {plan.policy!r} are "
            f"{', '.join(sorted(names)) or 'none'}: solve a plan with it"
        )
    policy = make_policy(plan.policy, **{name: plan.settings[name] for name in names})
    if not isinstance(policy, DynamicPolicy):
        raise PolicyError(f"the plan has capacities, but policy {plan.policy!r} is no dynamic one")
    check_policy_of(plan, policy)
    share = Fraction(max(plan.budget_token_heads, 1), plan.geometry.full_token_heads)
    policy.check(PlanningProblem(plan.geometry, Budget("share", share)))
    return policy


def check_policy_of(plan: CapacityPlan, policy: DynamicPolicy) -> None:
    """Raise PlanError when what the plan shares and carries is not what the policy does."""
    if plan.had_no_effect():  # nothing need be carried or shared
        return
    if (plan.shared, plan.carried) != (policy.shared, policy.carried):
        raise PlanError(
            f"the plan was not made by policy {policy.name!r}: it has shared={plan.shared} and carried={plan.carried}, "
            f"the policy {policy.shared} and {policy.carried}; solve one with it"
        )
