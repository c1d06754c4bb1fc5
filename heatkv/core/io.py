"""Reading and writing files safely: whole or not at all, and never executing what is in them."""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save as safetensors_bytes

from heatkv import __version__
from heatkv.core.schema import shown
from heatkv.errors import FormatError, HeatKVError

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file that is read: a plan of a 100-layer, 100-head, 60-scale model takes a hundredth of it."""

_HEADER = "heatkv"
"""The key of a tensor file's metadata under which its JSON header stands."""


@contextmanager
def in_file(path: str | Path) -> Iterator[None]:
    """Errors inside the block begin with the file's name."""
    try:
        yield
    except HeatKVError as error:
        raise type(error)(f"{path}: {error}") from error


@contextmanager
def _os_errors(doing: str, path: str | Path) -> Iterator[None]:
    """The system's errors inside the block as a FormatError that says what could not be done with which file."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"cannot {doing} {path}: {error.strerror or error}") from error


# ------------------------------------------------------------------ reading


def whole_file(path: str | os.PathLike[str]) -> Path:
    """The path, when a file lies there: a device need not end, a pipe need not begin. Raises FormatError."""
    path = Path(path)
    with _os_errors("read", path):
        path.stat()
        if not path.is_file():
            raise FormatError(f"cannot read {path}: it is a folder, a device or a pipe; name a file")
    return path


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file, open for reading. Raises FormatError for what is none, or cannot be read."""
    path = whole_file(path)
    with _os_errors("read", path), path.open("rb") as file:
        yield file


def read_bytes(path: str | os.PathLike[str], most: int, what: str) -> bytes:
    """All that a file holds, at most so many bytes; `what` says as what it is read. Raises FormatError."""
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FormatError(f"{path} has more than the {most} bytes that are read as {what}")
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file. Raises FormatError when it is missing, too large, not UTF-8, or not JSON."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES, "JSON"), Path(path))


def parse_json(text: str | bytes, source: str | Path) -> Any:
    """What JSON text says; `source` names it in the FormatError for what is no JSON, or is nested too deeply."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise FormatError(f"{source} is not JSON: {error}") from error


def read_tensors(path: str | Path, what: str) -> tuple[Any, dict[str, NDArray[Any]]]:
    """The JSON header of a safetensors file and its arrays; `what` says what is read. Raises FormatError."""
    path = whole_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_HEADER, "null")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # whatever safetensors stumbles over: types that numpy lacks, shapes beyond it
        raise FormatError(f"{path} is not a whole {what} file: {error}") from error
    return parse_json(text, path), arrays


def check_header(value: Any, path: str | Path, format_name: str, version: int) -> dict[str, Any]:
    """The object `value`, when it says it is `format_name` in this `version`. Raises FormatError."""
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds no JSON object, so it is no {format_name} file")
    if value.get("format") != format_name:
        raise FormatError(f"{path} has format {shown(value.get('format'))}, not {format_name!r}")
    if type(value.get("version")) is not int or value["version"] != version:
        raise FormatError(
            f"{path} is {format_name} version {shown(value.get('version'))}; this release reads version {version} only"
        )
    return value


# ------------------------------------------------------------------ writing


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; moved onto it, synced, when the block ends without an error.

    A link stays, and what it leads to is replaced. Raises FormatError for devices and the like, which are no files.
    """
    temporary = None
    try:
        with _os_errors("write", path):
            path = Path(os.path.realpath(path))
            if path.exists() and not path.is_file():
                raise FormatError(f"cannot write {path}: it is a folder, a device or a pipe; name a file")
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
            os.close(descriptor)
            temporary = Path(name)
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        if temporary is not None:
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


def as_json(value: Any, path: str | Path, indent: int | None = None) -> str:
    """`value` as JSON text; `path` names the file in the FormatError for what JSON cannot hold, such as NaN."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(f"cannot write {path}: {error}; use text, finite numbers, lists and dictionaries") from error


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Write `value` as JSON, whole or not at all. Raises FormatError, also for NaN, infinity and what JSON lacks."""
    write_text(path, as_json(value, path, indent) + "\n")


def write_tensors(path: str | Path, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays with a JSON header as a safetensors file, whole or not at all. Raises FormatError."""
    text = as_json(header, path)
    with replacing(path) as temporary:
        temporary.write_bytes(
            safetensors_bytes({k: np.ascontiguousarray(v) for k, v in arrays.items()}, {_HEADER: text})
        )


def move(path: Path, to: Path) -> None:
    """Give a file another name in its folder, for good. Raises FormatError."""
    with _os_errors("rename", path):
        path.rename(to)
        _sync_folder(to.parent)


def clear_temporaries(folder: Path, name: str | None = None) -> None:
    """Remove what writers that were killed left in this folder, of all files or of one; nobody may be writing them."""
    names = "*" if name is None else glob.escape(name)
    # as `replacing` names them, and torch's profiler what it writes beside that
    for left in [*folder.glob(f".{names}.????????.tmp"), *folder.glob(f".{names}.????????.tmp.tmp")]:
        left.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise FormatError when no file can be made at the path, before hours are spent on what is to go there."""
    if not path.parent.is_dir():
        raise FormatError(f"the folder {path.parent} does not exist")
    with _os_errors("write in the folder", path.parent), tempfile.TemporaryFile(dir=path.parent):
        pass


def make_folder(path: str | Path) -> Path:
    """Create a folder and its parents. Raises FormatError where that cannot be, and where it takes no files."""
    path = Path(path)
    if path.suffix.lower() in (".png", ".json") and not path.is_dir():
        raise FormatError(f"{path} names a file, but takes a folder for several; write {path.parent}")
    with _os_errors("create the folder", path):
        path.mkdir(parents=True, exist_ok=True)
    check_place(path / "file")
    return path


def file_name(text: str) -> str:
    """The text with nothing in it that a file name cannot hold."""
    return "".join(c if c.isalnum() else "_" for c in text)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    others = {name: metadata.version(name) for name in ("torch", "numpy", "scipy")}
    return {"python": platform.python_version(), "heatkv": __version__, **others}
