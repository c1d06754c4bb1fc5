"""The sections of a report, in their order. A new one is a function of the report that gives its blocks, or None where
it has nothing to say, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from heatkv.profiling.report.artefact_sections import pictures, plans, scas
from heatkv.profiling.report.blocks import Section
from heatkv.profiling.report.fidelity_sections import frontier, per_scale, summary
from heatkv.profiling.report.latency_section import memory_and_time
from heatkv.profiling.report.memory_section import memory
from heatkv.profiling.report.paired_section import paired
from heatkv.profiling.report.reporting import Report
from heatkv.profiling.report.row_sections import all_rows, environment, further
from heatkv.profiling.report.time_section import phases

SECTIONS: tuple[Callable[[Report], Section | None], ...] = (
    summary, frontier, paired, per_scale, memory_and_time, phases, memory, scas, plans, pictures,
    all_rows, further, environment,
)  # fmt: skip
