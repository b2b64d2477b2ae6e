"""A model's config, tensors and fingerprint, from a folder or a hub; weights only when needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from swarm.errors import CheckpointError
from swarm.models.demo import DEMO_MODEL, DEMO_NAME
from swarm.models.hub import HubRepo
from swarm.models.manifest import (
    CONFIG_FILE,
    INDEX_FILE,
    MAX_CONFIG_BYTES,
    SINGLE_FILE,
    digest_files,
    fingerprint,
    read_index,
    read_object,
    read_tensor_names,
)

_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    "chat_template.jinja",
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class _Folder:
    """A local folder, with what `HubRepo` offers; digests are computed from what lies in it."""

    folder: Path
    files: frozenset[str]

    def path(self, name: str) -> Path:
        return self.folder / name

    def digests(self, names: Collection[str]) -> dict[str, str]:
        try:
            return digest_files({name: self.folder / name for name in names})
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or self.folder} cannot be read ({error.strerror}): check it"
            ) from error

    def tensor_names(self, name: str) -> set[str]:
        return read_tensor_names(self.folder / name)


Source = _Folder | HubRepo


@dataclass(frozen=True)
class Checkpoint:
    """A model whose weights are read only when `fetch` is asked for them.

    `tensor_files` maps each tensor to the weight file that holds it. `folder` holds config.json,
    and the tokenizer once `fetch_tokenizer` was called. `fingerprint` (64 hex digits) covers
    config.json and every weight file, read here or not.
    """

    name: str
    fingerprint: str
    config: PreTrainedConfig = field(repr=False)
    folder: Path
    tensor_files: Mapping[str, str] = field(repr=False)
    _digests: Mapping[str, str] = field(repr=False)
    _source: Source = field(repr=False)

    @classmethod
    def open(
        cls,
        name_or_path: str | Path | None,
        *,
        name: str | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Checkpoint:
        """A folder, a repo id (OWNER/NAME), or None for the bundled model. Raises CheckpointError.

        `name` is the public name, by default the repo id or the folder's name; `revision` (branch,
        tag or commit) and `token` are for repos.
        """
        public, source = locate(name_or_path, revision, token)
        tensor_files = _tensor_files(public, source)
        manifest = {CONFIG_FILE, *tensor_files.values()}
        if SINGLE_FILE not in manifest:
            manifest.add(INDEX_FILE)
        digests = source.digests(manifest)
        if _GENERATION_FILE in source.files:
            source.path(_GENERATION_FILE)
        path = source.path(CONFIG_FILE)
        config = _read_config(path)
        return cls(
            name or public, fingerprint(digests), config, path.parent, tensor_files, digests, source
        )

    @property
    def address(self) -> str:
        """By which transformers itself would find it."""
        return self._source.repo if isinstance(self._source, HubRepo) else str(self.folder)

    def fetch(self, files: Collection[str]) -> Mapping[str, Path]:
        """{weight file: where it lies} for these files alone, each checked against the manifest.

        Downloads show progress and go on where an earlier one was cut. Raises CheckpointError.
        """
        paths: dict[str, Path] = {}
        for name in sorted(set(files)):
            path = paths[name] = self._source.path(name)
            if digest_files({name: path})[name] != self._digests[name]:
                raise self._distrust(path)
            promised = {t for t, file in self.tensor_files.items() if file == name}
            if absent := promised - read_tensor_names(path):
                raise CheckpointError(
                    f"{path} lacks {min(absent)}, which the index of '{self.name}' promises: "
                    "download or save the model again"
                )
        return paths

    def fetch_tokenizer(self) -> Path:
        """The folder with the tokenizer's files, for AutoTokenizer. Raises CheckpointError."""
        for name in _TOKENIZER_FILES:
            if name in self._source.files:
                self._source.path(name)
        return self.folder

    def _distrust(self, path: Path) -> CheckpointError:
        if not isinstance(self._source, HubRepo):
            return CheckpointError(f"{path} changed after '{self.name}' was opened: start again")
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return CheckpointError(
            f"{path.name} of '{self.name}' does not have the digest that the hub lists, and was "
            "deleted: run it again to fetch it anew"
        )


def open_config(
    name_or_path: str | Path | None, *, revision: str | None = None, token: str | None = None
) -> tuple[str, PreTrainedConfig]:
    """A model's public name and config, without a look at its weights. Raises CheckpointError."""
    name, source = locate(name_or_path, revision, token)
    if CONFIG_FILE not in source.files:
        raise CheckpointError(
            f"'{name}' has no config.json, so it is no transformers model: choose another"
        )
    return name, _read_config(source.path(CONFIG_FILE))


def locate(
    name_or_path: str | Path | None, revision: str | None, token: str | None
) -> tuple[str, Source]:
    """The public name, and where its files are. Raises CheckpointError."""
    if name_or_path is None or str(name_or_path) == DEMO_NAME:
        return DEMO_NAME, _open_folder(DEMO_MODEL)
    text = str(name_or_path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder.resolve().name or "model", _open_folder(folder)
    if folder.exists():
        raise CheckpointError(f"{text} is a file: give the folder that it lies in")
    if isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise CheckpointError(f"there is no folder {text}: check the path, or give OWNER/NAME")
    return text, HubRepo.open(text, revision, token)


def _open_folder(folder: Path) -> _Folder:
    try:
        files = frozenset(entry.name for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}): check it") from error
    return _Folder(folder, files)


def _tensor_files(name: str, source: Source) -> dict[str, str]:
    """{tensor: weight file}; a single file goes before an index, as in transformers."""
    if CONFIG_FILE not in source.files:
        raise CheckpointError(
            f"'{name}' has no config.json, so it is no transformers model: choose another"
        )
    if SINGLE_FILE in source.files:
        return dict.fromkeys(source.tensor_names(SINGLE_FILE), SINGLE_FILE)
    if INDEX_FILE in source.files:
        tensor_files = read_index(source.path(INDEX_FILE))
        if absent := set(tensor_files.values()).difference(source.files):
            raise CheckpointError(
                f"the index of '{name}' names {len(absent)} files that are not there "
                f"({min(absent)}): download or save the model again"
            )
        return tensor_files
    if any(file.endswith(_PICKLES) for file in source.files):
        raise CheckpointError(
            f"'{name}' has pickled weights only, which can run code when they are read: choose a "
            "copy in safetensors format, or save one with save_pretrained"
        )
    raise CheckpointError(
        f"'{name}' has neither {SINGLE_FILE} nor {INDEX_FILE}: choose a model that has"
    )


def _read_config(path: Path) -> PreTrainedConfig:
    data = read_object(path, MAX_CONFIG_BYTES)
    if data.get("transformers_weights"):  # would make transformers read what we did not check
        raise CheckpointError(f"{path} names its own weight files: choose another model")
    try:
        return AutoConfig.from_pretrained(
            path.parent, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # config classes validate a stranger's values with anything
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{path} is no config that transformers reads without running the model's own code "
            f"({reason}): choose another model"
        ) from error
