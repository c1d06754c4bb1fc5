"""The table of `make bench`, from a file as pytest-benchmark writes it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TABLE = runpy.run_path(str(ROOT / "benchmarks" / "suite_table.py"))["table"]


def entry(name: str, median: float) -> dict[str, Any]:
    return {"fullname": f"benchmarks/{name}", "stats": {"median": median, "iqr": median / 10, "rounds": 3}}


def test_times_stand_beside_the_product() -> None:
    told = {
        "benchmarks": [
            entry("bench_planning.py::bench_yardstick", 0.02),
            entry("bench_cache.py::bench_attend[random 10%]", 0.5),
            entry("bench_levels.py::bench_levels[5%-drop]", 8.0),
        ],
        "machine_info": {"cpu": {"brand_raw": "A Processor"}, "python_version": "3.12.1"},
    }
    assert list(TABLE(told))[2:] == [
        "| cache: attend, random 10% | 500.00 | 50.00 | 3 | 25.00 |",
        "| levels: 5%-drop | 8,000.00 | 800.00 | 3 | 400.00 |",
        "| planning: yardstick | 20.00 | 2.00 | 3 | 1.00 |",
        "",
        "The product (1024 cubed, fp32, one thread) took 20.0 ms, on A Processor, Python 3.12.1.",
    ]
    with pytest.raises(KeyError, match="bench_yardstick was not run"):
        list(TABLE({"benchmarks": told["benchmarks"][1:]}))


def test_the_page_names_every_script_and_no_other() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    helpers = {"random_models.py", "yardstick.py"}
    scripts = {
        path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
    }
    listed = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `") and ".py`" in line}
    assert listed == scripts - helpers - {"suite_table.py"}
