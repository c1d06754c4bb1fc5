"""The finished parts of a run that was not finished yet: files in a folder beside what it will write.

A part is written whole or not at all, and is there until the run has written everything; so a run that was stopped at
any moment goes on from its last part, and the ranks of one run tell each other by their parts what they measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from heatkv.core.io import check_header, clear_temporaries, read_json, replacing, write_json
from heatkv.errors import FormatError
from heatkv.parallel.ranks import Ranks

FORMAT, VERSION = "heatkv-parts", 1
RUN = "run.json"
ENDING = ".safetensors"


class Parts:
    """Parts by their names in a folder, which is made with the first of them. `run`, in JSON's types, tells what was
    asked for; None where the names of the parts tell it all."""

    def __init__(self, folder: Path, run: dict[str, Any] | None = None) -> None:
        self.folder, self.run = folder, run

    def path(self, name: str) -> Path:
        """The file of a part."""
        return self.folder / f"{name}{ENDING}"

    def among(self, names: Iterable[str]) -> list[str]:
        """Those that are there."""
        return [name for name in names if self.path(name).exists()]

    def count(self) -> int:
        """How many there are, of this run or another."""
        return len(list(self.folder.glob(f"[!.]*{ENDING}")))

    def description(self) -> dict[str, Any] | None:
        """What the run was asked for that left parts here; None where none did. Raises FormatError."""
        if not self.count():
            return None
        path = self.folder / RUN
        try:
            run = check_header(read_json(path), path, FORMAT, VERSION).get("run")
        except FormatError as error:
            raise FormatError(f"{error}; delete the folder {self.folder} to discard what is in it") from error
        if not isinstance(run, dict):
            raise FormatError(f"{path} does not describe a run; delete the folder {self.folder} to discard it")
        return run

    def remove(self, beginning: str = "") -> None:
        """Remove all parts whose names begin so, and the folder when there are no others."""
        for path in self.folder.glob(f"{beginning or '[!.]'}*{ENDING}"):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not self.count():
            clear_temporaries(self.folder)
            (self.folder / RUN).unlink(missing_ok=True)
            try:
                self.folder.rmdir()
            except OSError:  # the user's own files are in it, or another rank removed it
                return

    def missing(self, names: Sequence[str], ranks: Ranks) -> list[str]:
        """Those that no rank has."""
        seen = ranks.gather(self.among(names))
        return [name for name in names if not any(name in found for found in seen)]

    def fill(
        self, names: Sequence[str], mine: Iterable[str], make: Callable[[str, Path], object], ranks: Ranks
    ) -> None:
        """Have all these parts at every rank: `mine` are those that this one makes, `make` writes one to its path.

        Ranks that do not see each other's files send them.
        """
        for name in mine:
            self._open()
            make(name, self.path(name))
        ranks.wait()
        seen = ranks.gather(self.among(names))
        for name in names:
            source = next((rank for rank, found in enumerate(seen) if name in found), None)
            if source is None:
                raise FormatError(f"{self.path(name)} is gone; let one run at a time write there, and start it again")
            if all(name in found for found in seen):
                continue
            payload = ranks.share(self.path(name).read_bytes() if ranks.rank == source else None, source)
            if name not in seen[ranks.rank]:
                self._open()
                with replacing(self.path(name)) as temporary:
                    temporary.write_bytes(payload)

    def _open(self) -> None:
        """Make the folder, where it is not there."""
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise FormatError(f"cannot create the folder {self.folder}: {error.strerror or error}") from error
        path = self.folder / RUN
        if self.run is not None and not path.exists():
            write_json(path, {"format": FORMAT, "version": VERSION, "run": self.run}, indent=1)
