"""Files are written whole or not at all, and read only where a file of bounded size lies."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from heatkv.core.io import (
    check_header,
    check_place,
    clear_temporaries,
    in_file,
    read_json,
    read_tensors,
    replacing,
    write_json,
    write_tensors,
)
from heatkv.errors import FormatError, PlanError


def test_writing_replaces_a_file_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old" * 10_000)
    write_json(path, {"a": [1, 0.5, "ä"]})
    assert read_json(path) == {"a": [1, 0.5, "ä"]}
    with suppress(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": [1, 0.5, "ä"]}
    with pytest.raises(FormatError, match=r"cannot write .*a\.json"):
        write_json(path, float("nan"))
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(FormatError, match=r"cannot write .*no-folder"):
        write_json(tmp_path / "no-folder" / "a.json", 1)


def test_leftovers_of_writers_that_were_killed_are_cleared(tmp_path: Path) -> None:
    for name in (".a.json.12345678.tmp", ".b.json.12345678.tmp", "a.json", ".hidden"):
        (tmp_path / name).touch()
    clear_temporaries(tmp_path, "a.json")
    assert {path.name for path in tmp_path.iterdir()} == {".b.json.12345678.tmp", "a.json", ".hidden"}
    clear_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", ".hidden"}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert read_json(tmp_path / "real.json") == [1]


def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "folder"):
        with pytest.raises(FormatError, match=f"cannot write .*{name}"):
            write_json(tmp_path / name, [1])
    for name in ("pipe", "folder", "loop", "absent"):
        with pytest.raises(FormatError, match=f"cannot read .*{name}"):
            read_json(tmp_path / name)
    with pytest.raises(FormatError, match="cannot read"):
        read_json("/dev/zero")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"NaN", b"-Infinity", b"[1e999]", b"9" * 5_000, b"{} x"]
)
def test_what_is_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"a\.json is not JSON"):
        read_json(tmp_path / "a.json")


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatkv.core.io.MAX_JSON_BYTES", 1000)
    (tmp_path / "a.json").write_text("[" + "1," * 1000 + "1]")
    with pytest.raises(FormatError, match="more than the 1000 bytes"):
        read_json(tmp_path / "a.json")


def test_headers() -> None:
    whole = {"format": "f", "version": 1}
    assert check_header(whole, "a.json", "f", 1) is whole
    for wrong in (
        [],
        {},
        {"format": "g", "version": 1},
        *({"format": "f", "version": v} for v in (2, True, "1", None)),
    ):
        with pytest.raises(FormatError, match=r"a\.json"):
            check_header(wrong, "a.json", "f", 1)


def test_tensors_come_back_with_their_header(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.ones((0, 2), dtype=np.int64)}
    write_tensors(tmp_path / "t.safetensors", {"n": [1]}, arrays)
    header, found = read_tensors(tmp_path / "t.safetensors", "test")
    assert header == {"n": [1]}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    whole = (tmp_path / "t.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "t.safetensors").write_bytes(whole[:length])
        with pytest.raises(FormatError, match="not a whole test file"):
            read_tensors(tmp_path / "t.safetensors", "test")


def test_errors_name_their_file_and_keep_their_type() -> None:
    with pytest.raises(PlanError, match=r"^a\.json: too much$"), in_file("a.json"):
        raise PlanError("too much")


def test_places_are_checked_before_hours_are_spent(tmp_path: Path) -> None:
    check_place(tmp_path / "a.json")
    with pytest.raises(FormatError, match=r"the folder .*absent does not exist"):
        check_place(tmp_path / "absent" / "a.json")
    assert list(tmp_path.iterdir()) == []
