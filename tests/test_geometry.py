"""Budgets and bytes: exact arithmetic, the published figures, and errors that say the way out."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import geometries, shares

from heatkv.core.budget import Budget, parse_bytes
from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.storage_type import CODES, DTYPES, STORAGE_BYTES, StorageType, torch_dtype
from heatkv.errors import BudgetError, PlanError

MIB = 2**20
PUBLIC_STORAGE = "float32-key-bfloat16-value"
INFINITY_2B = CacheGeometry(32, 16, 128, ScaleSchedule.infinity("1M", 1.0))
INFINITY_8B = CacheGeometry(40, 28, 128, ScaleSchedule.infinity("1M", 1.0))
NOTATIONS = "10%, 0.1, 600MiB, 2GB or 650tokens"


@pytest.mark.parametrize(("geometry", "mib"), [(INFINITY_2B, 4818.75), (INFINITY_8B, 10541.0)])
def test_published_sizes_of_the_full_cache(geometry: CacheGeometry, mib: float) -> None:
    six_bytes = geometry.full_bytes(rows=2, storage=PUBLIC_STORAGE)
    assert abs(six_bytes / MIB - mib) < 0.05  # the 8B figure is published to a tenth
    assert six_bytes == 6425 * geometry.layers * geometry.heads * 128 * 2 * 6
    assert geometry.full_bytes(rows=2, storage="bfloat16") * 6 == six_bytes * 4
    assert geometry.full_bytes(rows=1, storage="float32") * 2 * 6 == six_bytes * 8


# ScaleKV's published runs at 4, 10 and 20 %: mean tokens per head, and the tenth of the cache they are named after.
@pytest.mark.parametrize(("tokens", "mib"), [(265, 198.75), (650, 487.5), (1300, 975.0)])
def test_mean_tokens_of_scalekv(tokens: int, mib: float) -> None:
    budget = Budget.parse(f"{tokens}tokens")
    assert budget.token_heads(INFINITY_2B) == tokens * 32 * 16
    assert budget.share(INFINITY_2B) == Fraction(tokens, 6425)
    assert INFINITY_2B.bytes(budget.token_heads(INFINITY_2B), 2, PUBLIC_STORAGE) == mib * MIB
    # the same stated in bytes is the same budget only with the rows and storage that the bytes were counted with
    in_bytes = Budget.parse(f"{mib}MiB")
    assert in_bytes.share(INFINITY_2B, 2, PUBLIC_STORAGE) == Fraction(tokens, 6425)
    assert in_bytes.share(INFINITY_2B, 2, "bfloat16") == Fraction(tokens, 6425) * Fraction(3, 2)
    assert in_bytes.share(INFINITY_2B, 4, PUBLIC_STORAGE) == Fraction(tokens, 6425) / 2


def test_published_scalekv_table_averages_650_tokens() -> None:
    first_row = [920 if layer in (0, 23) else 632 for layer in range(32)]
    assert 16 * sum(first_row) == Budget.parse("650tokens").token_heads(INFINITY_2B)


def test_notations() -> None:
    for kind, notations in {
        "share": {
            "10%": "1/10", "0.1": "1/10", 0.1: "1/10", ".1": "1/10", "1e-1": "1/10", "33.3%": "333/1000", 0.3: "3/10",
            1e-05: "1/100000", 1: "1", "100%": "1", Fraction(1, 3): "1/3", " 12.5 % ": "1/8",
        },
        "tokens": {"650tokens": "650", "1 token": "1", "642.5 Tokens": "1285/2"},
        "bytes": {
            "7B": "7", "3kB": "3000", "600MB": "6e8", "2GB": "2e9", "1tb": "1e12", "3KiB": "3072", "1e3MB": "1e9",
            "600MiB": 600 * MIB, "0.1GiB": Fraction(2**30, 10), "1TiB": 2**40,
        },
    }.items():  # fmt: skip
        for text, amount in notations.items():
            budget = Budget.parse(text)
            assert (budget.kind, budget.amount) == (kind, Fraction(amount))
            assert Budget.parse(budget) is budget
            if kind == "bytes":
                assert parse_bytes(text) == math.floor(budget.amount)
            elif isinstance(text, str):
                assert Budget.parse(str(budget)) == budget
    for text in ("24", "10%", "650tokens", "GiB", "", "1" * 200 + "B"):
        assert parse_bytes(text) is None


def test_a_decimal_means_itself_in_every_notation() -> None:
    for thousandths in range(1, 1001, 3):
        share = Fraction(thousandths, 1000)
        for text in (thousandths / 1000, f"{thousandths / 1000}", f"{thousandths / 10}%", share):
            assert Budget.parse(text).amount == share
    # N*L*H is a multiple of ten here, and float(0.1) or float(0.7) lie beside the tenth: floor must not lose a unit
    geometry = CacheGeometry(1, 10, 4, ScaleSchedule.square((1, 2)))
    assert [Budget.parse(f"{tenths}0%").token_heads(geometry) for tenths in range(1, 11)] == list(range(1, 11))


def test_bytes_round_down_to_whole_token_heads() -> None:
    geometry = CacheGeometry(2, 2, 8, ScaleSchedule.square((1, 2, 3)))  # a token-head has 8 * 4 = 32 bytes
    assert [Budget.parse(f"{count}B").token_heads(geometry) for count in (31, 32, 63, 64)] == [0, 1, 1, 2]


@given(geometry=geometries(), share=shares(), rows=st.integers(1, 4), storage=st.sampled_from(sorted(STORAGE_BYTES)))
def test_token_heads_are_the_floor(geometry: CacheGeometry, share: Fraction, rows: int, storage: str) -> None:
    full = sum(geometry.schedule.tokens[:-1]) * geometry.layers * geometry.heads
    assert geometry.full_token_heads == full
    most = Budget.parse(share).token_heads(geometry, rows, storage)
    assert most <= share * full < most + 1
    # the same budget in tokens and in bytes
    assert Budget("tokens", share * geometry.schedule.cached_tokens).token_heads(geometry, rows, storage) == most
    bytes_of = {"float64": (8, 8), "float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2), PUBLIC_STORAGE: (4, 2)}
    key, value = bytes_of[storage]
    one = geometry.head_dim * rows * (key + value)
    assert Budget("bytes", share * full * one).token_heads(geometry, rows, storage) == most
    assert Budget("bytes", max(share * full * one - 1, Fraction(1, 2))).token_heads(geometry, rows, storage) <= most
    assert geometry.bytes(most, rows, storage) == most * one
    assert geometry.full_bytes(rows, storage) == full * one


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((text, "") for text in "10%% -5% +5% 5. 1,5 ten nan inf -inf 1e 1e100% 0x10 tokens % 1/3".split()),
        *((text, "") for text in ("", " ", None, True, "\u0661%", "1 0%")),
        ("10", "budget 10 is above 1.* did you mean 10%"), ("1e99", "above 1"), ("101%", "101%.* above 100 %"),
        ("1e99%", "above 100 %"), ("0", "0% is not above zero"), ("0tokens", "0tokens"), ("0MiB", "0B"),
        (Fraction(-1, 2), "-50% is not above zero"), ("5parsecs", "'5parsecs'.* 'parsecs'"),
    ],
)  # fmt: skip
def test_refused_budgets(text: Any, said: str) -> None:
    with pytest.raises(BudgetError, match=f"{said}.*{NOTATIONS}"):
        Budget.parse(text)


def test_the_full_cache_and_more() -> None:
    limits = {"tokens": "6425 tokens per head", "GiB": f"5052825600 bytes with 2 rows in {PUBLIC_STORAGE}"}
    for text in ("6426tokens", "5GiB", "1e99tokens", "1e99GiB"):
        limit = next(limit for unit, limit in limits.items() if text.endswith(unit))
        with pytest.raises(BudgetError, match=rf"above the full cache of {limit}.*use 100% to keep everything"):
            Budget.parse(text).token_heads(INFINITY_2B, 2, PUBLIC_STORAGE)
    for text in ("6425tokens", "4818.75MiB", "100%"):
        assert Budget.parse(text).token_heads(INFINITY_2B, 2, PUBLIC_STORAGE) == 6425 * 512


@given(text=st.text(alphabet="0123456789.eE+-%tokensMiBGx ", max_size=9))
@example(text="1e-999%")
def test_any_text_is_a_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = Budget.parse(text)
        most = budget.token_heads(INFINITY_2B, 2, PUBLIC_STORAGE)
    except BudgetError:
        return
    assert most == math.floor(budget.share(INFINITY_2B, 2, PUBLIC_STORAGE) * 6425 * 512) <= INFINITY_2B.full_token_heads
    assert str(budget)


@pytest.mark.parametrize("name", ["layers", "heads", "head_dim"])
def test_refused_geometries(name: str) -> None:
    schedule, largest = ScaleSchedule.square((1, 2)), ScaleSchedule(((65536, 65536, 65536),) * 2)
    for value in (0, -1, 1 << 17, True, 2.0, "2", None):
        with pytest.raises(PlanError, match=rf"{name} is {value!r}; it must be a whole number from 1 to 65536"):
            CacheGeometry(schedule=schedule, **{"layers": 2, "heads": 2, "head_dim": 4, name: value})
    assert CacheGeometry(1, 1, 64, largest).full_token_heads == 2**48
    with pytest.raises(PlanError, match="at most"):
        CacheGeometry(1, 65536, 64, largest)


def test_refused_rows_and_storage_types() -> None:
    for rows in (0, 1.5, True):
        with pytest.raises(BudgetError, match="rows is"):
            Budget.parse("1MiB").share(INFINITY_2B, rows=rows)
    for name in ("int4", "int4/bfloat16", "int8/", "int8", "bfloat16/int8", "int8/int8/float32", ""):
        with pytest.raises(BudgetError, match=rf"unknown storage type '{name}'; known: float32, bfloat16"):
            INFINITY_2B.full_bytes(storage=name)


def test_storage_types_by_name_and_by_type_of_torch() -> None:
    for name, dtype, code in (("bfloat16", torch.bfloat16, None), ("int8/float32", torch.float32, "int8")):
        assert StorageType.parse(name) == StorageType.for_dtype(dtype, code) == StorageType(name.split("/")[-1], code)
        assert str(StorageType.for_dtype(dtype, code)) == name
    names = (*DTYPES, "float64", *CODES)
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn]
    assert [torch_dtype(name) for name in names] == types
    assert [dtype.itemsize for dtype in types] == [*(STORAGE_BYTES[name][0] for name in names[:4]), 1, 1]
