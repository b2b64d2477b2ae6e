"""What a checkpoint consists of: which file holds which tensor, and a digest of every file.

The fingerprint of a model is the SHA-256 of its manifest, which is what this prints:
`sha256sum config.json *.safetensors model.safetensors.index.json | LC_ALL=C sort -k2`
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open

from swarm.errors import CheckpointError

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

MAX_CONFIG_BYTES = 8 << 20
MAX_INDEX_BYTES = 64 << 20  # 140,000 tensors (384 experts x 61 layers) take 15 MB
_CHUNK_BYTES = 4 << 20
_SILENT_BYTES = 256 << 20  # hashing less than this takes about a second: no progress bar
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system we may meet (FAT, old NFS)

_WEIGHT_NAME = re.compile(r"\w[\w.+-]{0,200}\.safetensors", re.ASCII)  # no folders, no ".."
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: object) -> bool:
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def note_path(kind: str, key: str) -> Path:
    """Where to keep what can be computed again: in `$SWARM_CACHE`, else in `~/.cache/swarm`."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "swarm"
    folder = Path(os.environ.get("SWARM_CACHE") or usual).expanduser()
    return folder / kind / hashlib.sha256(key.encode()).hexdigest()


def write_note(path: Path, data: bytes) -> None:
    """Write a whole file or nothing; a cache that cannot be written is no error."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as out:
            out.write(data)
        os.replace(out.name, path)


def fingerprint(digests: Mapping[str, str]) -> str:
    """64 hex digits for {file name: SHA-256 in hex}: the same wherever the files lie."""
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_files(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each file, remembered by path, size and times: a second start is instant."""
    known = {name: _remembered(path) for name, path in files.items()}
    todo = {name: files[name] for name, digest in known.items() if digest is None}
    total = sum(path.stat().st_size for path in todo.values())
    bar = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="checking weights",
        disable=total < _SILENT_BYTES,
    )
    with bar:
        computed = {name: _hash(path, bar) for name, path in todo.items()}
    return {name: digest or computed[name] for name, digest in known.items()}


def _hash(path: Path, bar: tqdm) -> str:
    note = _note(path)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    # A file written within one tick of the file system's clock could change again unseen.
    if note == _note(path) and time.time_ns() - path.stat().st_mtime_ns > _SETTLED_NS:
        write_note(note, digest.hexdigest().encode())
    return digest.hexdigest()


def _remembered(path: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        digest = _note(path).read_text()
        return digest if is_sha256(digest) else None
    return None


def _note(path: Path) -> Path:
    path = path.resolve()
    stat = path.stat()
    key = f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}\n{stat.st_ctime_ns}"
    return note_path("digests", key)


def read_object(path: Path, limit: int) -> dict[str, object]:
    """The JSON object in a stranger's file of at most `limit` bytes. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path} is {size} bytes long, more than the {limit} allowed")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check it") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: download or save the model again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: download or save the model again")
    return cast("dict[str, object]", data)


def read_index(path: Path) -> dict[str, str]:
    """{tensor name: weight file} from a safetensors index. Raises CheckpointError."""
    weight_map = read_object(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: download or save the model again")
    entries = cast("dict[str, object]", weight_map)
    for file in set(map(str, entries.values())):
        if _WEIGHT_NAME.fullmatch(file) is None:
            raise CheckpointError(
                f"{path} names {file[:80]!r}, which is no safetensors file beside it: "
                "do not use this checkpoint"
            )
    return {tensor: str(file) for tensor, file in entries.items()}


def read_tensor_names(path: Path) -> set[str]:
    """Names in the header of a safetensors file whose length is right. Raises CheckpointError."""
    try:
        with safe_open(path, framework="numpy") as weights:
            return set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({error}): download or save it again"
        ) from error
