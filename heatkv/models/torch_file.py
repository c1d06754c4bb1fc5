"""Torch files, read without executing anything in them, and without taking more memory or time than their size allows.

Such a file is a zip archive of a pickle, which says what the file holds, and of the tensors' numbers. Torch's own
restricted unpickler runs no code, but it does trust sizes: that of a packed member, of a tuple within tuples, of a
tensor that repeats its numbers. These are looked at before and after it.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from heatkv.core.io import opened
from heatkv.core.schema import shown
from heatkv.errors import FormatError

_MOST_PICKLE_BYTES = 8 << 20
"""That of Infinity-8B's 781 tensors has 84 kB."""

_MOST_TIMES_FILE = 16
"""Bytes of all tensors in terms of the file's: several may share their numbers, as a trainer's average may."""

_MOST_DEPTH, _MOST_SHARED = 100, 1 << 20
"""Tuples within each other, and entries of those that are used again: hashing walks all of them, each time."""

_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_CALLED = frozenset(
    {
        "collections OrderedDict", "collections Counter", "__builtin__ set", "builtins set", "__builtin__ complex",
        "builtins complex", "_codecs encode", "torch Size", "torch device",
        *(f"torch._utils {name}" for name in _REBUILD),
    }
)  # fmt: skip
"""What pickles of tensors and plain values call. Torch allows more: byte arrays and tensors of any size, of nothing."""

_NAMED = _CALLED | {
    "torch.storage UntypedStorage",
    *(f"torch {str(dtype).removeprefix('torch.')}" for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    *(f"torch {name}" for name in dir(torch) if name.endswith("Storage")),
}
"""And what they name: types of tensors too."""

_ONE = {
    "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT", "BININT1",
    "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSUMED = {"APPEND": 1, "SETITEM": 2, "BUILD": 1, "REDUCE": 1, "BINPERSID": 0}
"""Entries that these take from the stack, beyond the one below that stays."""


class _Refused(Exception):
    """Why a file is not loaded."""


class _Entry(NamedTuple):
    """Something on a pickle's stack."""

    entries: int = 1
    depth: int = 0
    name: str = ""


def load_torch_file(path: str | Path) -> Any:
    """What a torch file holds: tensors on the CPU, backed by the file, and plain values.

    Raises FormatError for what is missing, broken, holds anything else, or would take far more memory than the file.
    """
    path = Path(path)
    try:
        with opened(path) as file:
            size = _check_archive(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it will refuse or can read
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_tensors(content, size)
        return content
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except (_Refused, pickle.UnpicklingError) as error:
        raise FormatError(
            f"{path} is no torch file of tensors and plain values only, and nothing else is loaded, as it could run "
            f"code{_reason(error)}; where you trust it, load it elsewhere and save its state dict"
        ) from error
    except Exception as error:  # whatever torch and zipfile stumble over in damaged files
        raise FormatError(f"{path} is not a whole torch file: {_first_line(error)}") from error


def _reason(error: Exception) -> str:
    return f" (it {error})" if isinstance(error, _Refused) else ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_archive(file: IO[bytes]) -> int:
    """The size of the file, when its archive is as torch writes it, and its pickle harmless."""
    size = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        if archive.start_dir != _told_start(file, size):  # two readers could see two archives
            raise ValueError("the archive does not begin or end with the file")
        entries = archive.infolist()
        names = [entry.filename.lower() for entry in entries]
        if len(set(names)) != len(names):
            raise ValueError("the archive holds a name twice")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("the archive tells more bytes than the file has")
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise ValueError("the archive is packed or encrypted, which torch.save does not do")
        pickles = [entry for entry in entries if entry.filename.lower().rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or any(name.rpartition("/")[2] == "constants.pkl" for name in names):
            raise ValueError("the archive holds no data.pkl, or a program")
        if pickles[0].file_size > _MOST_PICKLE_BYTES:
            raise ValueError(f"its pickle has more than {_MOST_PICKLE_BYTES} bytes")
        check_pickle(archive.read(pickles[0]))
    return size


def _told_start(file: IO[bytes], size: int) -> int:
    """Where the archive says that its directory begins, read from the very end of the file, as torch does."""
    file.seek(max(0, size - 98))
    end = file.read(98)
    if len(end) < 22 or end[-22:-18] != b"PK\5\6" or end[-2:] != b"\0\0":
        return -1
    if len(end) == 98 and end[-42:-38] == b"PK\6\7":  # a long one, beside it
        if end[:4] != b"PK\6\6" or struct.unpack_from("<Q", end, 56 + 8)[0] != size - 98:
            return -1
        return int(struct.unpack_from("<Q", end, 48)[0])
    return int(struct.unpack_from("<I", end, len(end) - 6)[0])


def check_pickle(data: bytes) -> None:
    """Follow the pickle's stack without making anything. Raises _Refused for what it must not do, ValueError or
    IndexError for what is damaged.

    On the stack are the entries and the depth of tuples, whose hash walks all they hold, and names.
    """
    stack: list[_Entry] = []
    marks: list[int] = []
    memo: dict[int, _Entry] = {}
    shared = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name == "GLOBAL":
            if argument not in _NAMED:
                raise _Refused(f"names {shown(argument)}")
            stack.append(_Entry(name=argument))
        elif name in _ONE:
            stack.append(_Entry())
        elif name in _TUPLES or name == "TUPLE":
            start = marks.pop() if name == "TUPLE" else len(stack) - _TUPLES[name]
            if start < 0:
                raise IndexError("its pickle takes more than there is")
            inner = stack[start:]
            del stack[start:]
            count, depth = sum(entry.entries for entry in inner), max((entry.depth for entry in inner), default=0)
            stack.append(_Entry(1 + count, 1 + depth))
            if depth >= _MOST_DEPTH:
                raise _Refused(f"nests tuples deeper than {_MOST_DEPTH}")
        elif name in ("APPENDS", "SETITEMS"):
            del stack[marks.pop() :]
        elif name in _CONSUMED:
            if len(stack) <= _CONSUMED[name]:
                raise IndexError("its pickle takes more than there is")
            del stack[len(stack) - _CONSUMED[name] :]
            if name == "REDUCE" and stack[-1].name not in _CALLED:
                raise _Refused("calls what is neither a tensor nor a plain value")
            if name in ("REDUCE", "BINPERSID"):  # what is made takes the place of what it was made with
                stack[-1] = _Entry()
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
            shared += stack[-1].entries
            if shared > _MOST_SHARED + len(data):
                raise _Refused("repeats tuples within tuples")
        elif name not in ("PROTO", "STOP"):
            raise _Refused(f"has the opcode {name}, which torch.save does not write")


def _check_tensors(content: Any, file_bytes: int) -> None:
    """Refuse tensors that are no plain ones, or would take far more memory than the file if they were copied."""
    taken, seen, waiting = 0, set(), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise ValueError(f"it holds a tensor of layout {value.layout} on {value.device}")
            taken += value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, OrderedDict | Counter):
                vars(value).clear()  # a pickle may put anything there, in the place of its methods too
            waiting += dict.values(value) if isinstance(value, dict) else value
    if taken > _MOST_TIMES_FILE * file_bytes:
        raise ValueError(f"its tensors would take {taken} bytes, the file has {file_bytes}")
