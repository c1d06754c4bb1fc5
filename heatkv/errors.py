"""The typed errors of HeatKV. Every message names the value, the limit and the way out."""

from __future__ import annotations

LONGEST_MESSAGE = 2000
"""Characters of a message: what is quoted from a file may be as long as the file."""


class HeatKVError(Exception):
    """Base of everything HeatKV raises on purpose; the command line prints it in one line and exits with 2.

    Its message is one line that can be printed, whatever was quoted in it.
    """

    def __str__(self) -> str:
        line = " ".join(super().__str__()[: 2 * LONGEST_MESSAGE].splitlines())
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 3]}..."


class ScheduleError(HeatKVError):
    """A scale schedule that is malformed or unknown."""


class BudgetError(HeatKVError):
    """A budget that cannot be read or cannot be kept."""


class PlanError(HeatKVError):
    """A plan that is malformed or does not belong to the model it is used with."""


class StatisticsError(HeatKVError):
    """Calibration statistics that are malformed, missing, or measured on something else."""


class PolicyError(HeatKVError):
    """A policy that is unknown, misconfigured, or could not produce a plan."""


class ModelError(HeatKVError):
    """A model that is unknown, or weights that do not fit it."""


class GraphError(HeatKVError):
    """CUDA graphs where there are none, or a step that cannot be recorded as one."""


class NumericsError(HeatKVError):
    """Numbers that are not finite, or too large for their type; `image` is the first one's index, where it is known."""

    def __init__(self, message: str, image: int | None = None) -> None:
        super().__init__(message)
        self.image = image


class FormatError(HeatKVError):
    """A file that is unreadable, truncated, or of another format or version."""


class RanksError(HeatKVError):
    """Processes that were launched together and cannot work together, or one of which has ended."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the machine; torch has no error of its own for the latter."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
