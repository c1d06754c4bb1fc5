"""The times of `make bench` as a Markdown table: `python benchmarks/suite_table.py results/bench.json`.

Reads what pytest-benchmark wrote with --benchmark-json. Every median also stands as a multiple of the fixed matrix
product of the same run, by which machines compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from heatkv.core.io import read_json

YARDSTICK = "bench_yardstick"


def table(told: Mapping[str, Any]) -> Iterator[str]:
    """Its lines. Raises KeyError for a run without the fixed matrix product."""
    rows = {entry["fullname"].rpartition("/")[2]: entry["stats"] for entry in told["benchmarks"]}
    products = [stats["median"] for name, stats in rows.items() if name.endswith(YARDSTICK)]
    if len(products) != 1:
        raise KeyError(f"{YARDSTICK} was not run; run all of benchmarks/")
    yield "| benchmark | median ms | quartiles apart, ms | runs | products |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, stats in sorted(rows.items()):
        file, _, case = name.partition("::")
        median, spread, share = stats["median"] * 1e3, stats["iqr"] * 1e3, stats["median"] / products[0]
        yield f"| {_shown(file, case)} | {median:,.2f} | {spread:,.2f} | {stats['rounds']} | {share:,.2f} |"
    yield ""
    yield f"The product (1024 cubed, fp32, one thread) took {products[0] * 1e3:.1f} ms, on {_machine(told)}."


def _shown(file: str, case: str) -> str:
    """`bench_cache.py`, `bench_attend[full]` as "cache: attend, full"; a file with one benchmark names it once."""
    part = file.removeprefix("bench_").removesuffix(".py")
    name, _, given = case.removeprefix("bench_").removesuffix("]").partition("[")
    return f"{part}: " + ", ".join(word for word in ("" if name == part else name, given) if word)


def _machine(told: Mapping[str, Any]) -> str:
    machine = told["machine_info"]
    return f"{machine.get('cpu', {}).get('brand_raw', machine.get('machine'))}, Python {machine['python_version']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what --benchmark-json wrote")
    print("\n".join(table(read_json(parser.parse_args().file))))


if __name__ == "__main__":
    main()
