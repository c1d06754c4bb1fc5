"""Reading and writing files safely: whole or not at all, and never executing what is in them."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import platform
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from heatkv import __version__
from heatkv.core.schema import shown
from heatkv.errors import FormatError

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file that is read: a plan of a 100-layer, 100-head, 60-scale model takes a hundredth of it."""


MAX_DEPTH = 100
"""Lists and objects within each other in a JSON file: a plan has four."""


def as_path(value: str | os.PathLike[str]) -> Path:
    """The path that a caller gave. Raises FormatError for what can be none."""
    try:
        path = Path(value)
    except TypeError:
        raise FormatError(f"{shown(value)} is no path; give the name of a file or folder") from None
    if "\0" in str(path):
        raise FormatError(f"{shown(value)} is no path; a name cannot hold a zero character")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise FormatError(f"{shown(value)} is no path; it holds half a character") from None
    return path


def _mode(path: Path) -> int | None:
    """What lies at a path; None when nothing does. Raises FormatError when that cannot be told."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether anything lies at the path. Raises FormatError when that cannot be told: the name may be too long, links
    may lead round in a circle, a folder on the way may be closed."""
    return _mode(as_path(path)) is not None


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder lies at the path. Raises FormatError as `is_there` does."""
    mode = _mode(as_path(path))
    return mode is not None and stat.S_ISDIR(mode)


def whole_file(path: str | os.PathLike[str]) -> Path:
    """The path, when a file lies there: a folder cannot be read, a device need not end, a pipe need not begin.

    Raises FormatError.
    """
    path = as_path(path)
    mode = _mode(path)
    if mode is None:
        raise FormatError(f"cannot read {path}: {os.strerror(errno.ENOENT)}")
    if stat.S_ISDIR(mode):
        raise FormatError(f"cannot read {path}: {os.strerror(errno.EISDIR)}")
    if not stat.S_ISREG(mode):
        raise FormatError(f"cannot read {path}: it is a device or a pipe; save what it gives in a file")
    return path


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file, open for reading. Raises FormatError for what is none, or cannot be read."""
    path = whole_file(path)
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error


def read_bytes(path: str | os.PathLike[str], most: int, what: str) -> bytes:
    """All that a file holds, at most so many bytes; `what` says as what it is read. Raises FormatError."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FormatError(f"{path} has more than the {most} bytes that are read as {what}")
    return content


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path that links lead to. Raises FormatError when they lead round in a circle."""
    path = as_path(path)
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
        raise FormatError(f"cannot read {path}: {os.strerror(errno.ELOOP)}") from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; moved onto it, synced, when the block ends without an error.

    A link stays, and what it leads to is replaced. Raises FormatError for devices and the like, which are no files.
    """
    path = as_path(path)
    try:
        path = resolved(path)
        mode = _mode(path)
        if mode is not None and not stat.S_ISREG(mode):
            raise FormatError(f"cannot write {path}: it is a folder, a device or a pipe; name a file")
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise FormatError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FormatError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder last: a new name, too, is lost with the power until its folder is synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # a system that opens no folders, or one that may be written and not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all. Raises FormatError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def move(path: Path, to: Path) -> None:
    """Give a file another name in its folder, for good. Raises FormatError."""
    try:
        path.rename(to)
        _sync_folder(to.parent)
    except OSError as error:
        raise FormatError(f"cannot rename {path} to {to.name}: {error.strerror or error}") from error


def clear_temporaries(folder: Path, name: str | None = None) -> None:
    """Remove what writers that were killed left in this folder, of all files or of one; nobody may be writing them."""
    of_files = "*" if name is None else glob.escape(name)
    # as `replacing` names them, and torch's profiler what it writes beside that
    for left in [*folder.glob(f".{of_files}.????????.tmp"), *folder.glob(f".{of_files}.????????.tmp.tmp")]:
        left.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise FormatError when no file can be made in `folder`, before hours are spent on what is to go there."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FormatError(f"cannot write in the folder {folder}: {error.strerror or error}") from error


def check_new_file(path: str | os.PathLike[str], option: str) -> None:
    """Raise FormatError when no new file can be made at `path`, named by this option, before hours are spent on it."""
    path = as_path(path)
    if is_folder(path):
        raise FormatError(f"{option} {path} is a folder; name a file")
    if is_there(path):
        raise FormatError(f"{path} exists; name another file ({option})")
    check_place(path)


def check_place(path: Path) -> None:
    """Raise FormatError when the folder of a file is not there, or takes none."""
    if not is_folder(path.parent):
        raise FormatError(f"the folder {path.parent} does not exist")
    check_writable(path.parent)


def file_name(text: str) -> str:
    """The text with nothing in it that a file name cannot hold."""
    return "".join(c if c.isalnum() else "_" for c in text)


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write `value` as JSON, whole or not at all. Raises FormatError, also for NaN, infinity and what JSON lacks."""
    write_text(path, as_json(value, path, indent) + "\n")


def as_json(value: Any, path: str | Path, indent: int | None = None) -> str:
    """`value` as JSON text; `path` names the file in the FormatError for what JSON cannot hold."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(f"cannot write {path}: {error}; use text, finite numbers, lists and dictionaries") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file. Raises FormatError when it is missing, too large, not UTF-8, or not JSON."""
    path = as_path(path)
    return parse_json(read_bytes(path, MAX_JSON_BYTES, "JSON"), path)


def parse_json(text: str | bytes, source: str | Path) -> Any:
    """What JSON text says; `source` names it in the FormatError for what is no JSON, or is so only by Python's leave:
    NaN, numbers beyond every float, a name twice in one object. So is what is nested deeper than MAX_DEPTH."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_each_name_once)
    except RecursionError as error:
        raise FormatError(f"{source} is not JSON of ours: it is nested deeper than {MAX_DEPTH}") from error
    except ValueError as error:
        raise FormatError(f"{source} is not JSON: {error}") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for holder in level for inner in _members(holder) if isinstance(inner, list | dict)]
    if level:
        raise FormatError(f"{source} is not JSON of ours: it is nested deeper than {MAX_DEPTH}")
    return value


def _members(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {shown(next(name for name in members if names.count(name) > 1))} twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number JSON knows")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is beyond every float")
    return number


def check_header(value: Any, path: str | Path, format_name: str, version: int) -> dict[str, Any]:
    """The object `value`, when it says it is `format_name` in this `version`."""
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds no JSON object, so it is no {format_name} file")
    if value.get("format") != format_name:
        raise FormatError(f"{path} has format {shown(value.get('format'))}, not {format_name!r}")
    if type(value.get("version")) is not int or value["version"] != version:
        raise FormatError(
            f"{path} is {format_name} version {shown(value.get('version'))}; this release reads version {version} only"
        )
    return value


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    others = {name: metadata.version(name) for name in ("torch", "numpy", "scipy")}
    return {"python": platform.python_version(), "heatkv": __version__, **others}
