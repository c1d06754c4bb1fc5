"""Reading and writing files safely: whole or not at all, and never executing what is in them."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heatkv.checks import shown
from heatkv.errors import FormatError

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file that is read: a plan of a 100-layer, 100-head, 60-scale model takes a hundredth of it."""


def as_path(value: str | os.PathLike[str]) -> Path:
    """The path that a caller gave. Raises FormatError for what can be none."""
    try:
        path = Path(value)
    except TypeError:
        raise FormatError(f"{shown(value)} is no path; give the name of a file or folder") from None
    if "\0" in str(path):
        raise FormatError(f"{shown(value)} is no path; a name cannot hold a zero character")
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; moved onto it, synced, when the block ends without an error.

    A link stays, and what it leads to is replaced. Raises FormatError for devices and the like, which are no files.
    """
    path = as_path(path)
    try:
        path = path.resolve()
        if path.exists() and not path.is_file():
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


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises FormatError when it is missing, too large, not UTF-8, or not JSON."""
    path = as_path(path)
    try:
        with path.open("rb") as file:  # a device tells no size
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise FormatError(f"{path} has more than the {MAX_JSON_BYTES} bytes that are read as JSON")
        return json.loads(text.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {str(error) or 'nested too deeply'}") from error


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
        raise FormatError(f"{path} has format {value.get('format')!r}, not {format_name!r}")
    if type(value.get("version")) is not int or value["version"] != version:
        raise FormatError(
            f"{path} is {format_name} version {value.get('version')!r}; this release reads version {version} only"
        )
    return value
