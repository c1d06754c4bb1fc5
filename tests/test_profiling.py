"""Tables on narrow terminals and in pipes."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console
from rich.table import Table

from heatkv.cli.output import show
from heatkv.profiling.report.tables import results_table
from heatkv.profiling.report.wide_table import WideTable


def shown_lines(table: Table, width: int) -> list[str]:
    """What a terminal of this width shows."""
    console = Console(width=width, markup=False, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 100, 132, 400])
def test_a_table_of_a_sweep_loses_no_figure_on_a_narrow_terminal(width: int) -> None:
    """Both axes, graphs and a long name: every cell is whole somewhere, beside the name of its row."""
    difference = {
        "policy": "heatkv",
        "difference": 0.2063,
        "interval": [0.1795, 0.2346],
        "confidence": 0.95,
        "images": 4,
    }
    rows = [
        {
            "policy": policy, "budget": "12.5%", "batch": batch, "seed": seed, "draws": 1, "had_no_effect": False,
            "budget_bytes": 101 << 20, "planned_bytes": 102 << 20, "allocated_bytes": 103 << 20,
            "full_bytes": 999 << 20,
            "latency_ms": {"median": 1234.5}, "graph_latency_ms": {"median": 678.9},
            "kl": 0.1234, "predicted_kl": 0.4321, "top1_agreement": 0.8765, "psnr_db": 23.45, "ssim": 0.654,
            "versus": difference,
        }
        for policy in ("heatkv", "sliding-window-tokens") for batch in (1, 2) for seed in (0, 1)
    ]  # fmt: skip
    lines = shown_lines(results_table(rows, "a title"), width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    wanted = [
        "101.000", "102.000", "103.000", "10.3%", "1234.5", "678.9", "0.1234", "+0.2063 [+0.1795, +0.2346]",
        "0.4321", "87.6%", "23.45", "0.654",
    ]  # fmt: skip
    for policy, batch, seed in itertools.product(("heatkv", "sliding-window-tokens"), "12", "01"):
        figures = []
        for line in lines:
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[:4] == [policy, "12.5%", batch, seed]:
                figures += cells[4:]
        assert figures == wanted
    assert sum("a title" in line for line in lines) == 1
    parts = sum(line.startswith("┏") for line in lines)
    assert (parts == 1) == (width == 400)


def test_a_pipe_gets_the_table_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    table = WideTable(heads=1, title="t")
    for index in range(40):
        table.add_column(f"column {index}", no_wrap=True)
    table.add_row(*(f"figure {index}" for index in range(40)))
    show(table, False, None)
    out = capsys.readouterr().out
    assert out.count("┏") == 1
    assert all(f"figure {index} " in out for index in range(40))
