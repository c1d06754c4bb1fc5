"""Names of weights: every byte of them counts, the type that they run in does not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from heatkv.core.io import read_json, versions, write_json
from heatkv.core.schema import convert
from heatkv.errors import FormatError

CACHED_FROM = 256 << 20
"""Bytes of a file from which on its fingerprint is kept in the user's cache: hashing takes a second for a gigabyte."""
_BLOCK = 1 << 24


def fingerprint(named: nn.Module | Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits over names, shapes and all values in fp32; of a module, over its parameters and buffers."""
    digest = hashlib.sha256()
    pairs = named.state_dict().items() if isinstance(named, nn.Module) else named
    for name, tensor in sorted(pairs, key=lambda pair: pair[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        for block in tensor.detach().reshape(-1).split(_BLOCK):
            digest.update(block.float().cpu().numpy().data)
    return digest.hexdigest()[:16]


def known_fingerprint(network: nn.Module) -> str:
    """The fingerprint that the network was loaded with, unless it is another one or was changed since."""
    known = vars(network).get("_known_fingerprint")
    if known is None or known[0] != _state(network):
        know_fingerprint(network, fingerprint(network))
    name: str = vars(network)["_known_fingerprint"][1]
    return name


def know_fingerprint(network: nn.Module, name: str) -> None:
    """Note the fingerprint of the network as it is now, for instance when its type was changed."""
    network._known_fingerprint = _state(network), name  # type: ignore[assignment]


def _state(network: nn.Module) -> list[tuple[int, int]]:
    return [(x.data_ptr(), x._version) for x in network.parameters()]


def fingerprint_of_file(network: nn.Module, path: Path) -> str:
    """The fingerprint of a network as it was read from a file or folder. That of a large one is looked up, by the
    file's path, size and time, and kept, where the user's cache can be written."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if sum(size for _, size, _ in stats) < CACHED_FROM:
        return fingerprint(network)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heatkv" / "fingerprints.json"
    # another release may name other tensors
    key, known = f"{versions()['heatkv']} {type(network).__name__} {stats}", dict[str, str]()
    with suppress(FormatError):
        known |= convert(read_json(cache), dict[str, str], cache)
    if key not in known:
        known[key] = fingerprint(network)
        with suppress(FormatError, OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(cache, known)
    return known[key]
