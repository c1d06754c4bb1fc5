"""A few damaged files for every loader; `make fuzz` has thousands."""

from __future__ import annotations

from pathlib import Path

from fuzz import make_loaders, outcome

MUTANTS = {"plan.json": 400, "dynamic.json": 100, "statistics.safetensors": 200}
"""Of the files that people change by hand; 12 of the others."""


def test_damaged_files_are_refused_or_valid(tmp_path: Path) -> None:
    loaders = make_loaders(tmp_path)
    (tmp_path / "place").mkdir()
    for name, load in loaders.items():
        load(tmp_path / name)
        ended = [outcome(load, tmp_path / name, seed, tmp_path / "place") for seed in range(MUTANTS.get(name, 12))]
        assert set(ended) <= {"valid", "refused"}, (name, ended)
        assert "refused" in ended, name
