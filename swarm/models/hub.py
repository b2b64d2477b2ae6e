"""The door to huggingface_hub: list a repo, fetch single files, tell failures in one sentence.

Endpoint, cache and token are huggingface_hub's own (HF_ENDPOINT, HF_HOME, HF_TOKEN), and files
land in its cache, where other programs find them.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # that of whichever httpx it uses
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from swarm.errors import CheckpointError
from swarm.models.manifest import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    digest_files,
    is_sha256,
    note_path,
    read_tensor_names,
    write_note,
)

_COMMIT = re.compile(r"[0-9a-f]{40}")


class _Unreachable(CheckpointError):
    """The hub does not answer; what is on disk may do."""

    def __init__(self, repo: str, what: str) -> None:
        super().__init__(
            f"{constants.ENDPOINT} cannot be reached and {what} of '{repo}' is not in the cache: "
            "check the network (or HF_ENDPOINT, HF_HUB_OFFLINE), or give a local folder"
        )


class RemoteFile(NamedTuple):
    """One file of a repo; `sha256` is known without reading it when git LFS stores it."""

    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """One commit of a model repo, whose files are fetched one by one when asked for."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile] = field(repr=False)
    token: str | None = field(repr=False)

    @classmethod
    def open(cls, repo: str, revision: str | None, token: str | None) -> HubRepo:
        """One API call; without a network, what an earlier call or the cache says instead."""
        revision = revision or constants.DEFAULT_REVISION
        key = f"{constants.ENDPOINT}\n{repo}\n{revision}"
        note = note_path("listings", key)
        try:
            found = _ask(repo, revision, token)
            write_note(note, json.dumps(found).encode())
        except _Unreachable:
            found = _remembered(note) or _cached(repo, revision)
            if found is None:
                raise
        return cls(repo, *found, token)

    def path(self, name: str) -> Path:
        """The file in the cache; fetched first where it is not there. Raises CheckpointError."""
        if cached := _in_cache(self.repo, name, self.commit):
            return cached
        with _explained(self.repo, name):
            self._fetch_resumably(name)
            # Links what is already in the cache, and fetches itself what git LFS does not store.
            return Path(
                hf_hub_download(
                    self.repo,
                    name,
                    revision=self.commit,
                    cache_dir=constants.HF_HUB_CACHE,
                    token=self.token,
                )
            )

    def digests(self, names: Collection[str]) -> dict[str, str]:
        """SHA-256 of each file; only what git LFS does not store is fetched for it."""
        listed = {name: self.files[name].sha256 for name in names}
        small = {name: self.path(name) for name, digest in listed.items() if digest is None}
        return {name: digest for name, digest in listed.items() if digest} | digest_files(small)

    def tensor_names(self, name: str) -> set[str]:
        """Names in a safetensors header, for which only the header is fetched."""
        if cached := _in_cache(self.repo, name, self.commit):
            return read_tensor_names(cached)
        with _explained(self.repo, name):
            try:
                header = HfApi(token=self.token).parse_safetensors_file_metadata(
                    self.repo, name, revision=self.commit
                )
            except SafetensorsParsingError as error:
                raise CheckpointError(
                    f"{name} of '{self.repo}' is no safetensors file: choose another model"
                ) from error
            return set(header.tensors)

    def _fetch_resumably(self, name: str) -> None:
        """Fill the cache's blob, going on where a download was cut, also by a crash.

        `hf_hub_download` throws a partial file away (2.4), hence this. The layout of the cache
        (blobs/SHA256, .incomplete, .locks) is huggingface_hub's documented one.
        """
        file = self.files.get(name, RemoteFile())
        if file.sha256 is None or (file.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:
            return  # beyond that size the hub wants its own protocol, which hf_hub_download speaks
        cache = Path(constants.HF_HUB_CACHE)
        folder = repo_folder_name(repo_id=self.repo, repo_type="model")
        blob = cache / folder / "blobs" / file.sha256
        lock = cache / ".locks" / folder / f"{file.sha256}.lock"
        for parent in (blob.parent, lock.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            partial = blob.with_suffix(".incomplete")
            with partial.open("ab") as out:
                if file.size is not None and out.tell() > file.size:
                    out.truncate(0)
                http_get(
                    hf_hub_url(self.repo, name, revision=self.commit, endpoint=constants.ENDPOINT),
                    out,
                    resume_size=out.tell(),
                    headers=build_hf_headers(token=self.token),
                    expected_size=file.size,
                    displayed_filename=name,
                )
            partial.replace(blob)


def _ask(repo: str, revision: str, token: str | None) -> tuple[str, dict[str, RemoteFile]]:
    with _explained(repo, f"revision '{revision}'"):
        try:
            info = HfApi(token=token).model_info(
                repo,
                revision=revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
            files = {
                item.rfilename: (item.size, item.lfs.sha256 if item.lfs else None)
                for item in info.siblings or ()
            }
            return _listing([info.sha, files])
        except HFValidationError as error:
            raise CheckpointError(
                f"'{repo}' is neither a folder nor a model's name: write a path, or OWNER/NAME"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, HTTPError):
                raise
            raise CheckpointError(
                f"{constants.ENDPOINT} does not answer like a model hub: check HF_ENDPOINT"
            ) from error


def _listing(data: object) -> tuple[str, dict[str, RemoteFile]]:
    """Commits and digests become file names here, so they are looked at. Raises ValueError."""
    commit, files = cast("tuple[object, dict[str, tuple[object, object]]]", data)
    if not isinstance(commit, str) or _COMMIT.fullmatch(commit) is None:
        raise ValueError("not a commit")
    listing: dict[str, RemoteFile] = {}
    for name, (size, sha256) in files.items():
        if sha256 is not None and not is_sha256(sha256):
            raise ValueError("not a digest")
        known = size if isinstance(size, int) and size >= 0 else None
        listing[name] = RemoteFile(known, cast("str | None", sha256))
    return commit, listing


def _remembered(note: Path) -> tuple[str, dict[str, RemoteFile]] | None:
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return _listing(json.loads(note.read_bytes()))
    return None


def _cached(repo: str, revision: str) -> tuple[str, dict[str, RemoteFile]] | None:
    """What another program left in the cache; a blob of git LFS is named by its SHA-256."""
    configs = (_in_cache(repo, name, revision) for name in (CONFIG_FILE, ADAPTER_CONFIG_FILE))
    config = next(filter(None, configs), None)
    if config is None:
        return None
    blobs = {path.name: path.resolve().name for path in config.parent.iterdir()}
    return config.parent.name, {
        name: RemoteFile(None, blob if is_sha256(blob) else None) for name, blob in blobs.items()
    }


def _in_cache(repo: str, name: str, revision: str) -> Path | None:
    path = try_to_load_from_cache(repo, name, constants.HF_HUB_CACHE, revision)
    return Path(path) if isinstance(path, str) else None


@contextmanager
def _explained(repo: str, what: str) -> Generator[None]:
    """Translates the library's exceptions; the order matters, for they inherit from each other."""
    hub = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{repo}' is gated: accept its licence at {hub}/{repo} and set HF_TOKEN to a token "
            "of the account that did"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub} has no model '{repo}' that you may see: check the name, or set HF_TOKEN if it "
            "is private"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _Unreachable(repo, what) from error
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise CheckpointError(f"'{repo}' has no {what}: choose one that {hub} lists") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500:
            raise _Unreachable(repo, what) from error
        raise CheckpointError(
            f"{hub} answered {status} for {what} of '{repo}': check HF_TOKEN, or try again later"
        ) from error
    except (HTTPError, ConnectionError) as error:
        raise _Unreachable(repo, what) from error
    except OSError as error:
        if error.errno is None:  # http_get's complaint about a size
            raise CheckpointError(
                f"{what} of '{repo}' does not have the size that {hub} lists: run it again"
            ) from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space left in {constants.HF_HUB_CACHE} for {what} of '{repo}': free some or "
                "set HF_HOME to a larger disk, and the download goes on where it stopped"
            ) from error
        raise CheckpointError(
            f"{what} of '{repo}' cannot be kept in {constants.HF_HUB_CACHE} "
            f"({error.strerror}): check that folder, or set HF_HOME to another"
        ) from error
