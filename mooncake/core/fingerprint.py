"""Names for weights by their content: equal on any host that has equal files, wherever they lie.

Names, paths and times are no help: a folder is overwritten, `main` moves on, two hosts copy at two times.
Up to WHOLE_BYTES_MAX the files are read whole, 0.7 s per GiB; of larger models the headers and 4 KiB of
every 4 MiB are: retraining changes nearly every tensor, so it cannot pass, but a few weights edited by
hand can. Who does that adds any key to config.json, which is read whole. Nothing is cached: a stale
answer would be the one way to serve KV of other weights, and there are no seconds to be saved.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from mooncake.core.errors import ConfigError

log = structlog.get_logger(__name__)

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
ABOUT_WEIGHTS = ("config.json", "params.json", "*quant*.json", "*.index.json", "*.py")
"""What says how weights are read. Not the tokenizer's files: keys are made of tokens."""
ADAPTER_WEIGHTS = ("adapter_model.*", "new_embeddings.*")
ADAPTER_CONFIG = "adapter_config.json"
WHOLE_BYTES_MAX = 512 << 20
"""A start-up can spare 0.4 s (sha256: 1.4 GiB/s on a core of 2020)."""
ADAPTER_BYTES_MAX = 2 << 30
"""An adapter is always read whole: tenants bring them, and a sample can be forged."""
SAMPLE_BYTES = 4096
SAMPLE_STEP_BYTES = 4 << 20
"""2,500 reads in 10 GB, 35,000 in 140 GB: 0.2 s when cold on NVMe, and the engine has just read them."""
HEADER_BYTES_MAX = 100 << 20
"""safetensors' own limit."""
READ_BYTES = 1 << 20
ADAPTERS_MAX = 4096
"""Adapters one process remembers; vLLM counts ids up at every load."""

_Stamp = tuple[tuple[str, int, int, int, int], ...]


def model_fingerprint(path: Path) -> str:
    """Return the name of the weights in the folder (or the single file) `path`.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    folder = path.parent if path.is_file() else path
    weights = [path] if path.is_file() else _matching(folder, WEIGHTS)
    if not weights:
        raise ConfigError(f"model {str(path)!r}: no weights ({', '.join(WEIGHTS)}) in that folder")
    about = _matching(folder, ABOUT_WEIGHTS) if path.is_dir() else []
    try:
        whole = sum(file.stat().st_size for file in weights) <= WHOLE_BYTES_MAX
        return _digest("model", about, weights, whole)
    except OSError as error:
        raise ConfigError(f"model {str(path)!r}: {error}") from error


def adapter_fingerprint(folder: Path) -> str:
    """Return the name of a LoRA adapter's weights.

    Raises:
        ConfigError: that is no folder with an adapter, or it is too large to be read whole.
    """
    weights = _matching(folder, ADAPTER_WEIGHTS)
    config = folder / ADAPTER_CONFIG
    try:
        if not weights or not config.is_file():
            raise ConfigError(f"adapter {str(folder)!r}: no folder with {ADAPTER_CONFIG} and adapter_model.*")
        if sum(file.stat().st_size for file in weights) > ADAPTER_BYTES_MAX:
            raise ConfigError(f"adapter {str(folder)!r}: more than {ADAPTER_BYTES_MAX} bytes")
        return _digest("adapter", [config], weights, whole=True)
    except OSError as error:
        raise ConfigError(f"adapter {str(folder)!r}: {error}") from error


class AdapterNames:
    """Names adapters by content, for one process that serves them.

    An engine keeps in memory what it once loaded under an id. So the first look at an id holds: when its
    files have changed since, or another gateway means another adapter by it, nobody knows which weights
    compute, and its requests are kept out of the pool. Asked for every request: two `stat`s when all is well.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: dict[int, tuple[str, _Stamp, str | None]] = {}

    def name_of(self, lora: Any) -> str | None:
        """Return the name of vLLM's LoRARequest `lora`; None = use no pool for it."""
        path, number = str(lora.lora_path), int(lora.lora_int_id)
        if lora.load_inplace:
            return None  # other weights under the same id, any time
        stamp = _stamp(Path(path))
        known = self._known.get(number)
        if known is None and len(self._known) < ADAPTERS_MAX:
            known = self._known[number] = (path, stamp, _name(path))
        elif known is not None and known[:2] != (path, stamp) and known[2] is not None:
            same = known[0] == path and _name(path) == known[2]
            if not same:
                log.warning("adapter.changed", adapter=lora.lora_name, path=path, pool="not used any more")
            known = self._known[number] = (path, stamp, known[2] if same else None)
        if known is None or known[2] is None:
            return None
        return f"{known[2]},3d={bool(lora.is_3d_lora_weight)}"


def _stamp(folder: Path) -> _Stamp:
    """Return what changes whenever a file of the adapter does: ctime cannot be set back."""
    found = []
    try:
        for file in [folder / ADAPTER_CONFIG, *_matching(folder, ADAPTER_WEIGHTS)]:
            info = file.stat()
            found.append((file.name, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino))
    except OSError:
        return ()
    return tuple(found)


def _name(path: str) -> str | None:
    try:
        return adapter_fingerprint(Path(path))
    except ConfigError as error:
        log.warning("adapter.unnamed", error=str(error), pool="not used")
        return None


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _digest(kind: str, about: list[Path], weights: list[Path], whole: bool) -> str:
    """Return sha256 over names, sizes and contents, each with its length: none runs into the next."""
    digest = hashlib.sha256(f"mooncake-{kind}-{'whole' if whole else 'sampled'}-1".encode())
    for file in about:
        _add(digest, file.name.encode(), _canonical(file))
    for file in weights:
        size_bytes = file.stat().st_size
        _add(digest, file.name.encode(), size_bytes.to_bytes(8, "little"))
        content = hashlib.sha256()
        for piece in _pieces(file) if whole else _samples(file, size_bytes):
            content.update(piece)
        _add(digest, content.digest())
    return f"sha256:{digest.hexdigest()}"


def _add(digest: Any, *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _canonical(file: Path) -> bytes:
    """Return a file's content; of JSON what it means, however it is spelled."""
    data = file.read_bytes()
    if file.suffix != ".json":
        return data
    try:
        return json.dumps(json.loads(data), sort_keys=True).encode()
    except ValueError:
        return data


def _pieces(file: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(READ_BYTES))
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            yield buffer[:count]


def _samples(file: Path, size_bytes: int) -> Iterator[bytes]:
    """Yield the safetensors header (shapes, offsets), then pieces at even distances, then the end."""
    with file.open("rb", buffering=0) as source:
        header_bytes = 0
        if file.suffix == ".safetensors":
            header_bytes = min(int.from_bytes(source.read(8), "little"), HEADER_BYTES_MAX, size_bytes)
            yield source.read(header_bytes)
        for start in range(0, size_bytes, SAMPLE_STEP_BYTES):
            source.seek(start)
            yield source.read(SAMPLE_BYTES)
        source.seek(max(size_bytes - SAMPLE_BYTES, 0))
        yield source.read(SAMPLE_BYTES)
