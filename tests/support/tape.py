"""CUDA graphs as a CPU can have them: operations are taken down once, and done again without the Python around them.

A tape is stricter than a graph. Recording leaves no trace, as capturing does; what a step made is destroyed after it,
so that nothing can be read but what lay there before; and what no graph may do is refused: numbers that the host looks
at, tensors made of the host's numbers, random numbers, and other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heatkv.generation.graphs import GraphRunner, Step, StepRunner

WAITS = {
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "bincount", "allclose", "repeat_interleave.Tensor", "_assert_async",
}  # fmt: skip
"""Operations that read numbers of the device on the host, or whose output is as large as they say."""


def each(given: Any, change: Callable[[Any], Any]) -> Any:
    """The arguments of an operation with every one of them changed, also in lists."""
    if isinstance(given, list | tuple):
        return type(given)([each(x, change) for x in given])
    if isinstance(given, dict):
        return {name: each(x, change) for name, x in given.items()}
    return change(given)


def leaves(given: Any) -> Iterator[Any]:
    if isinstance(given, list | tuple):
        for x in given:
            yield from leaves(x)
    elif isinstance(given, dict):
        yield from leaves(tuple(given.values()))
    else:
        yield given


def tensors_in(*parts: Any) -> list[Tensor]:
    return [x for x in leaves(parts) if isinstance(x, Tensor)]


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@cache
def is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@cache
def written_arguments(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(i, x.name) for i, x in arguments if x.alias_info is not None and x.alias_info.is_write]


class GraphSafe(TorchDispatchMode):
    """Raises AssertionError for what must not be in a step. `device` is the only one that may be touched."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_composite(func):
            with self:  # what it is made of tells more
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        name = func.name().removeprefix("aten::")
        assert not WAITS & {name, name.split(".")[0]}, f"{name} makes the host wait"
        # assigning a single number looks like this, too; elsewhere than on a CPU nothing is copied then
        assert "lift_fresh" not in name or args[0].ndim == 0, "a tensor is made of the host's numbers"
        assert torch.Tag.nondeterministic_seeded not in func.tags or not self._draws(name), f"{name} draws by itself"
        if name.startswith(("index.", "index_put", "_index_put")):
            kinds = {x.dtype for x in tensors_in(args[1])}
            assert not kinds & {torch.bool, torch.uint8}, f"{name} with a mask makes the host wait"
        out = self.do(func, args, kwargs)
        for x in tensors_in(args, kwargs, out):
            assert x.device.type == self.device, f"{name} touches a tensor on {x.device.type}"
        self.operations += 1
        return out

    @staticmethod
    def _draws(name: str) -> bool:
        return "scaled_dot_product" not in name  # which has dropout, of 0

    def do(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Slot:
    """The place of a tensor that a step makes."""

    number: int


class Tape(GraphSafe):
    """Takes down operations, and holds on to the tensors that lay there before."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[int]]] = []
        self._slots: dict[int, int] = {}
        self._made: list[Tensor] = []
        self._storages_made: set[int] = set()
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._given: dict[int, Tensor] = {}
        self._constants: set[int] = set()
        self._last_use: dict[int, list[int]] = {}

    @property
    def addresses(self) -> list[int]:
        """Of all that lay there before, in the order of first use."""
        return [x.untyped_storage().data_ptr() for x in self._given.values() if storage_of(x) not in self._constants]

    def _taken_down(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in self._slots:
            return Slot(self._slots[id(x)])
        assert storage_of(x) not in self._storages_made, "a tensor came from nowhere"
        self._given.setdefault(storage_of(x), x)
        return x

    def do(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if "lift_fresh" in func.name():  # of a single number, which is part of the operation
            self._constants.add(storage_of(args[0]))
        told_args, told_kwargs = each((tuple(args), dict(kwargs)), self._taken_down)
        for x in self._written(func, args, kwargs):
            storage = x.untyped_storage()
            if storage._cdata not in self._storages_made and storage._cdata not in self._saved:
                self._saved[storage._cdata] = storage, storage.clone()
        out = func(*args, **kwargs)
        outs = []
        for x in tensors_in(out):
            if storage_of(x) not in self._given:
                self._storages_made.add(storage_of(x))
            if id(x) not in self._slots:
                self._slots[id(x)] = len(self._made)
                self._made.append(x)  # alive while the tape runs, so that nothing takes its place
            outs.append(self._slots[id(x)])
        self._operations.append((func, told_args, told_kwargs, outs))
        return out

    @staticmethod
    def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        for i, name in written_arguments(func):
            yield from tensors_in(args[i] if i < len(args) else kwargs.get(name))

    def leave_no_trace(self) -> None:
        """Undo what was written to what lay there before, and destroy what was made."""
        for storage, before in self._saved.values():
            storage.copy_(before)
        self._saved.clear()
        for storage in {storage_of(x): x.untyped_storage() for x in self._made}.values():
            if storage._cdata in self._storages_made and storage.nbytes():
                storage.fill_(255)  # not a number, or -1
        self._made.clear()
        last = {slot: i for i, (_, *told) in enumerate(self._operations) for slot in self._slots_in(told)}
        for slot, i in last.items():
            self._last_use.setdefault(i, []).append(slot)

    @staticmethod
    def _slots_in(told: Any) -> set[int]:
        *given, outs = told
        return {x.number for x in leaves(given) if isinstance(x, Slot)} | set(outs)

    def play(self) -> None:
        now: dict[int, Tensor] = {}
        for i, (func, args, kwargs, outs) in enumerate(self._operations):
            given = each((args, kwargs), lambda x: now[x.number] if isinstance(x, Slot) else x)
            out = func(*given[0], **given[1])
            now.update(zip(outs, tensors_in(out), strict=True))
            for slot in self._last_use.get(i, ()):
                del now[slot]


class TapeRunner(GraphRunner):
    """A graph runner whose graphs are tapes."""

    def _warm_up(self, step: Step) -> None:
        step()

    def _record(self, step: Step) -> Step:
        tape = Tape()
        with tape:
            step()
        tape.leave_no_trace()
        return tape.play


class AddressRunner(StepRunner):
    """Calls every step, and notes, from the second time on, where what it is given lies."""

    replays = True

    def __init__(self) -> None:
        self.addresses: dict[Hashable, list[list[int]]] = {}

    def run(self, key: Hashable, step: Step) -> None:
        if key not in self.addresses:
            step()
            self.addresses[key] = []
            return
        with Tape() as tape:
            step()
        self.addresses[key].append(tape.addresses)

    def forget(self) -> None:
        pass


class WatchedRunner(StepRunner):
    """Calls every step, from the second time on under the watch that nothing but `device` is touched."""

    replays = True

    def __init__(self, device: str) -> None:
        self.device = device
        self.watched: dict[Hashable, int] = {}

    def run(self, key: Hashable, step: Step) -> None:
        if key not in self.watched:
            step()
            self.watched[key] = 0
            return
        with GraphSafe(self.device) as mode:
            step()
        self.watched[key] = mode.operations

    def forget(self) -> None:
        pass
