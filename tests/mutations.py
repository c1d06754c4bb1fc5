"""Damaged and hostile files, made from whole ones: every mutator takes bytes and a random generator, and says in a few
words what it did, so that a failure can be read without the file."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutator = Callable[[bytes, random.Random], tuple[str, bytes]]


# -------------------------------------------------------------------------------------------------------- bytes


def damage_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """What disks, networks and editors do to a file."""
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + rng.choice((1, 8, 100)))
    match rng.randrange(12):
        case 0:
            return "empty", b""
        case 1:
            return "cut", data[:at]
        case 2:
            return "without its start", data[at:]
        case 3:
            return "twice", data + data
        case 4:
            return "a BOM in front", b"\xef\xbb\xbf" + data
        case 5:
            return "UTF-16", b"\xff\xfe" + data.decode("latin-1").encode("utf-16-le")
        case 6:
            return "CRLF", data.replace(b"\n", b"\r\n")
        case 7:
            return "NUL bytes", data[:at] + bytes(to - at) + data[to:]
        case 8:
            return "random bytes", data[:at] + rng.randbytes(to - at) + data[to:]
        case 9:
            return "a part left out", data[:at] + data[to:]
        case 10:
            return "a part twice", data[:to] + data[at:]
        case _:
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 1, 3, 20))):
                if damaged:
                    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            return "flipped bits", bytes(damaged)


# --------------------------------------------------------------------------------------------------------- JSON


class Raw(str):
    """JSON text that no value has."""


class Pairs(list[tuple[str, Any]]):
    """The members of an object, names more than once included."""


def dumped(value: Any) -> str:
    """As `json.dumps`, with Raw and Pairs."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict | Pairs):
        members = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{json.dumps(name)}: {dumped(inner)}" for name, inner in members) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumped, value)) + "]"
    return json.dumps(value)


def _nested(rng: random.Random) -> Raw:
    depth = rng.choice((3, 40, 200, 480, 900, 5_000, 200_000))
    left, right = rng.choice((("[", "]"), ('{"a": ', "}"), ('[{"a": ', "}]")))
    return Raw(left * depth + "1" + right * depth)


NUMBERS = (
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e308", "-1e308", "1e-320", "-0.0", "1E+2")),
    Raw("9" * 400), Raw("9" * 4_000), Raw("9" * 5_000), Raw("-" + "9" * 5_000),
    0, 1, -1, 2, 3, 7, 1000, 10**9, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 65536, 0.5, 1.5, -2.5, 1e-9, 1e300,
)  # fmt: skip
TEXTS = (
    "", "x", "1", "NaN", "None", "full", "\ud800", "\0", "a\nb", "\u202e", "\x1b[31m", "e\u0301" * 20, "\U0001f355",
    "../../x", "/etc/passwd", "..", ".", "~", "a/b", "..\\x", "C:\\x", "con", "%s%n", "{0}", "{{7*7}}",
    "<script>1</script>",
    "[/red]", "a" * 300, "a" * 100_000, "Scale 99999999999", "Block -1",
)  # fmt: skip
_WIDE = ["x"] * 2_000 + ["y" * 500_000]
"""As an array of numpy, 4 GB: every entry would be as wide as the widest."""
OTHERS = (
    None, True, False, [], {}, [[]], [[[]]], [{}], {"": None}, [1], [1, 2], [[1, 1]] * 2, [[[0, 1], [1]]],
    _WIDE, [_WIDE], [[_WIDE]], [[10**9, 10**9]] * 3, [[65536, 65536, 65536]] * 5, [[1, 1]] * 3_000,
    [[1, 1, 1]] * 40_000,
    [[65537, 1]] * 2, Pairs([("a", 1), ("a", 2)]), {"__class__": "os.system", "py/object": "os.system"},
)  # fmt: skip


def hostile_value(rng: random.Random) -> Any:
    match rng.randrange(8):
        case 0:
            return _nested(rng)
        case 1 | 2:
            return rng.choice(TEXTS)
        case 3 | 4:
            return copy.deepcopy(rng.choice(OTHERS))  # it may be changed in turn
        case _:
            return rng.choice(NUMBERS)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside; of long lists only some."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        members = holder.items() if isinstance(holder, dict) else enumerate(holder) if type(holder) is list else ()
        for key, inner in list(members)[:60]:
            found.append((holder, key))
            waiting.append(inner)
    return found


def _change_json(root: list[Any], rng: random.Random) -> str:
    """One change somewhere inside the only element of `root`, or to it."""
    places = _places(root)
    if rng.random() < 0.5:  # near the top, where fields have names
        places = places[: max(1, len(places) // 8)]
    holder, key = rng.choice(places)
    inner = holder[key]
    told = f"{key!r:.40}"
    match rng.randrange(10):
        case 0 if holder is not root:
            del holder[key]
            return f"without {told}"
        case 1 if type(holder) is list and holder is not root:
            holder.insert(key, inner)
            return f"{told} twice"
        case 2 if isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
            return f"{told} renamed"
        case 3 if isinstance(inner, dict):
            inner[rng.choice((*TEXTS, "more"))] = hostile_value(rng)
            return f"more in {told}"
        case 4 if isinstance(inner, dict) and inner:
            pairs = list(inner.items())
            name = rng.choice(pairs)[0]
            holder[key] = Pairs([*pairs, (name, hostile_value(rng))])
            return f"{name!r:.40} twice in {told}"
        case 5 if type(inner) is list and inner and len(dumped(inner)) < 20_000:
            holder[key] = inner * rng.choice((2, 2, 50))
            return f"{told} repeated"
        case 6 if type(inner) is list and inner:
            holder[key] = [[inner], inner[:-1], inner[::-1], [*inner, hostile_value(rng)]][rng.randrange(4)]
            return f"{told} of another shape"
        case 7 if isinstance(inner, int | float) and not isinstance(inner, bool):
            holder[key] = rng.choice((-inner, inner + 1, inner * 10**9, str(inner), bool(inner), float(inner), [inner]))
            return f"{told} changed to {holder[key]!r:.40}"
        case _:
            holder[key] = hostile_value(rng)
            shown = dumped(holder[key])
            return f"{told} = {shown:.40} ({len(shown)} characters)"


def change_json(value: Any, rng: random.Random) -> tuple[str, str]:
    """A JSON value with one to three changes, as text."""
    root = [json.loads(json.dumps(value))]
    told = [_change_json(root, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    return "; ".join(told), dumped(root[0])


def damage_json(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A JSON file with other values in it, or damaged as any file."""
    if rng.random() < 0.15:
        return damage_bytes(data, rng)
    told, text = change_json(json.loads(data), rng)
    return told, text.encode("utf-8", "surrogatepass")


def damage_lines(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A text file with other lines in it, or damaged as any file."""
    if rng.random() < 0.4:
        return damage_bytes(data, rng)
    lines = data.splitlines()
    new = rng.choice((*TEXTS, "\u2028", "\x0c", "\x85", " ", "a " * 50_000)).encode("utf-8", "surrogatepass")
    lines.insert(rng.randrange(len(lines) + 1), new)
    return f"with the line {new[:40]!r}", rng.choice((b"\n", b"\r", b"\r\n", b"\0", b"")).join(lines)


# -------------------------------------------------------------------------------------------------- safetensors

_DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64",
    "F6_E2M3", "", "f64", 3, None, ["F64"],
)  # fmt: skip
_HEADER_LENGTHS = (0, 1, 2, 7, 8, 99_999_999, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined_safetensors(header: str, body: bytes) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + body


def damage_safetensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Header lengths, types, shapes, offsets, names, numbers and, where there is one, the JSON in the metadata."""
    header, body = split_safetensors(data)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    start, end = entry["data_offsets"]
    match rng.randrange(13):
        case 0:
            return damage_bytes(data, rng)
        case 1:
            length = rng.choice((*_HEADER_LENGTHS, len(data) - 8, len(data)))
            return f"header length {length}", length.to_bytes(8, "little") + data[8:]
        case 2:
            entry["dtype"] = rng.choice(_DTYPES)
            told = f"type {entry['dtype']!r}"
        case 3:
            count, rest = end - start, rng.choice(([], [1], [0], [2**62], [2**32, 2**32], [0, 2**63 - 1], [-1]))
            entry["shape"] = rng.choice(([*entry["shape"], *rest], entry["shape"][:-1], [count], [-1], [2**64], [1.5]))
            told = f"shape {entry['shape']}"
        case 4:
            entry["data_offsets"] = rng.choice(
                (
                    [0, end - start],
                    [start, end + 8],
                    [end, start],
                    [0, 2**63],
                    [-8, end],
                    [start],
                    [2**64, 2**64],
                    [0, 0],
                )
            )
            told = f"offsets {entry['data_offsets']}"
        case 5:
            name = rng.choice(names)
            new = rng.choice((*TEXTS, rng.choice(names) + "x", "blocks.999999999.attn.proj.weight", "blocks.0x.weight"))
            header[new] = header.pop(name)
            told = f"{name} is called {new[:40]!r}"
        case 6:
            name = rng.choice(names)
            del header[name]
            told = f"no {name}"
        case 7 if "heatkv" in header.get("__metadata__", ()):
            told, header["__metadata__"]["heatkv"] = change_json(json.loads(header["__metadata__"]["heatkv"]), rng)
        case 8 if "__metadata__" in header:
            header["__metadata__"] = rng.choice(
                ({}, None, [], {"heatkv": ""}, {"heatkv": "[]"}, {"heatkv": 1}, {"a": "b"})
            )
            told = f"metadata {header['__metadata__']!r}"
        case 9:
            told, text = change_json(header, rng)
            return told, joined_safetensors(text, body)
        case 10:  # a tensor of no bytes and any shape
            header["empty"] = {
                "dtype": "F32",
                "shape": [0, rng.choice((1, 2**40, 2**62))],
                "data_offsets": [len(body)] * 2,
            }
            told = "an empty tensor"
        case 11 if entry["shape"] and entry["dtype"] in ("F32", "F64"):
            more = {
                "dtype": entry["dtype"],
                "shape": rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [end - start])),
            }
            entry |= more if rng.random() < 0.6 else {}
            told = f"shape {entry['shape']}"
        case _:
            changed = bytearray(body)
            kind = "<d" if entry["dtype"] == "F64" else "<f"
            numbers = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e38, -1e-30]
            numbers += [1e308, 1e200, 5e-324] if kind == "<d" else []
            number = rng.choice(numbers)
            size = struct.calcsize(kind)
            for _ in range(rng.choice((1, 1, 5))):
                if end - start >= size:
                    struct.pack_into(kind, changed, start + size * rng.randrange((end - start) // size), number)
            return f"{number} among the numbers", joined_safetensors(json.dumps(header), bytes(changed))
    return told, joined_safetensors(dumped(header), body)


# -------------------------------------------------------------------------------------------------- torch files

CANARY = "HEATKV_CANARY"
"""In what a hostile pickle would make if it ran; the name of a folder, so that making it is easy to see."""


def _opcodes(text: str) -> bytes:
    return text.encode("latin-1")


def _called(module: str, name: str, arguments: bytes) -> bytes:
    """A pickle that calls module.name with what `arguments` push."""
    return b"\x80\x02c" + _opcodes(f"{module}\n{name}\n") + b"(" + arguments + b"tR."


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that would run code, that are damaged, and a few that are fine."""
    made = str(canary)
    return {
        "os.mkdir": _called("os", "mkdir", _text(made)),
        "posix.mkdir": _called("posix", "mkdir", _text(made)),
        "builtins.exec": _called("builtins", "exec", _text(f"import os; os.mkdir({made!r})")),
        "builtins.eval": _called("builtins", "eval", _text(f"__import__('os').mkdir({made!r})")),
        "builtins.getattr": _called("builtins", "getattr", b"cos\npath\n" + _text("join")),
        "subprocess.call": _called("subprocess", "call", b"](" + _text("mkdir") + _text(made) + b"e"),
        "stack global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + _text(made) + b"\x85R.",
        "INST": b"(" + b"S" + _opcodes(repr(made)) + b"\nios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\nS" + _opcodes(repr(made)) + b"\no.",
        "BUILD": b"\x80\x02ctorch._utils\n_rebuild_parameter\n}" + _text("__setstate__") + b"cos\nsystem\nsb.",
        "torch.load": _called("torch.serialization", "load", _text(made)),
        "torch.hub": _called("torch.hub", "load", _text(made) + _text("x")),
        "no STOP": b"\x80\x02}",
        "STOP on an empty stack": b"\x80\x02.",
        "POP of nothing": b"\x80\x020.",
        "an unknown protocol": b"\x80\xff}.",
        "a text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
        "a long of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "names that are no text": pickle.dumps({1: 2, (3, 4): 5, None: [6]}, protocol=2),
        "plain values": pickle.dumps({"a": 1, "b": [1.5, "x", None, True]}, protocol=2),
        "no dictionary": pickle.dumps([1, 2, 3], protocol=2),
        "a bare number": pickle.dumps(1, protocol=2),
    }  # fmt: skip


def zip_members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def torch_damager(canary: Path) -> Mutator:
    """Mutates torch files: their bytes, their members, and the pickle among these."""
    pickles = hostile_pickles(canary)

    def damage(data: bytes, rng: random.Random) -> tuple[str, bytes]:
        members = zip_members(data)
        of_pickle = next(name for name in members if name.endswith("/data.pkl"))
        name, kind = rng.choice(list(members)), rng.choice(list(pickles))
        match rng.randrange(5):
            case 0:
                return damage_bytes(data, rng)
            case 1:
                return kind, zipped(members | {of_pickle: pickles[kind]})
            case 2:
                return f"{kind}, not zipped", pickles[kind]
            case 3:
                magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2)
                system = pickle.dumps({"protocol_version": 1001, "little_endian": True}, protocol=2)
                return f"{kind}, in the legacy format", magic + system + pickles[kind] + pickle.dumps([], protocol=2)
            case _:
                return f"without {name}", zipped({key: x for key, x in members.items() if key != name})

    return damage


# ------------------------------------------------------------------------------------------- what lies in a place


def misplaced(path: Path, rng: random.Random) -> str:
    """Put in the place of a file what is none, or is another."""
    whole = path.read_bytes()
    path.unlink()
    match rng.randrange(8):
        case 0:
            path.mkdir()
            return "a folder"
        case 1:
            os.mkfifo(path)
            return "a pipe that nobody writes to"
        case 2:
            path.symlink_to(path.name)
            return "a link to itself"
        case 3:
            other = path.with_name("other.link")
            other.symlink_to(path)
            path.symlink_to(other)
            return "two links to each other"
        case 4:
            path.symlink_to("nowhere")
            return "a link to nothing"
        case 5:
            real = path.with_name("real.file")
            real.write_bytes(whole)
            path.symlink_to(real)
            return "a link to the file"
        case 6:
            path.symlink_to("/dev/zero")
            return "a link to a device"
        case _:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's name must be short
            try:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)
            finally:
                os.chdir(here)
            return "a socket"
