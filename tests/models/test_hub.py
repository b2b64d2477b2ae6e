"""Checkpoints on a hub: what is fetched, what is believed, what people read when it fails."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from swarm.errors import CheckpointError
from swarm.models.checkpoint import Checkpoint
from tests.hub import COMMIT, Hub, serve
from tests.models.checkpoints import refused, shard_of

REPO = "org/tiny"


@pytest.fixture
def hub(
    sharded: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    with serve({REPO: sharded, "org/single": single}) as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


# What is fetched


def test_a_peer_downloads_only_the_files_it_needs(hub: Hub, sharded: Path) -> None:
    checkpoint = Checkpoint.open(REPO)
    assert hub.fetched() == {
        "config.json", "model.safetensors.index.json", "generation_config.json"
    }  # fmt: skip
    shard = shard_of(checkpoint, 2)
    paths = checkpoint.fetch([shard])
    assert paths[shard].read_bytes() == (sharded / shard).read_bytes()
    weights = {name for name in hub.fetched() if name.endswith(".safetensors")}
    assert weights == {shard}
    assert hub.sent(shard) == (sharded / shard).stat().st_size
    assert sum(request.file == "" for request in hub.requests) == 1, "one API call"


def test_the_second_start_downloads_nothing(hub: Hub) -> None:
    first = Checkpoint.open(REPO)
    first.fetch([shard_of(first, 0)])
    hub.requests.clear()
    second = Checkpoint.open(REPO)
    second.fetch([shard_of(second, 0)])
    assert hub.fetched() == set()
    assert second.fingerprint == first.fingerprint


def test_an_interrupted_download_goes_on_where_it_stopped(
    hub: Hub, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(REPO)
    shard = shard_of(checkpoint, 1)
    size = (sharded / shard).stat().st_size
    hub.cut_after[shard] = size // 2

    def give_up(seconds: float) -> None:
        raise KeyboardInterrupt  # where the library would wait a second and try again itself

    monkeypatch.setattr(time, "sleep", give_up)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.fetch([shard])
    before = hub.sent(shard)
    assert size // 4 < before < size
    hub.cut_after.clear()
    checkpoint.fetch([shard])
    last = hub.requests[-2]  # after it, one HEAD links the file into the cache
    assert (last.file, last.sent) == (shard, size - int(str(last.range)[6:-1]))
    assert hub.sent(shard) - size < 2 * constants.DOWNLOAD_CHUNK_SIZE, "what was there is kept"


def test_a_cut_line_is_mended_within_one_call(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(REPO)
    shard = shard_of(checkpoint, 1)
    hub.cut_after[shard] = 5000
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    checkpoint.fetch([shard])
    assert sum(request.range is not None for request in hub.requests) > 2


def test_a_single_file_is_listed_by_its_header_alone(hub: Hub, single: Path) -> None:
    checkpoint = Checkpoint.open("org/single")
    assert "model.embed_tokens.weight" in checkpoint.tensor_files
    assert "model.safetensors" not in {r.file for r in hub.requests if r.range is None and r.sent}
    path = checkpoint.fetch(["model.safetensors"])["model.safetensors"]
    assert path.read_bytes() == (single / "model.safetensors").read_bytes()


def test_the_tokenizer_comes_on_demand(hub: Hub) -> None:
    checkpoint = Checkpoint.open(REPO)
    assert "tokenizer.json" not in hub.fetched()
    assert (checkpoint.fetch_tokenizer() / "tokenizer.json").read_text() == "{}"


def test_a_token_goes_with_every_request(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(REPO, token="hf_given")
    checkpoint.fetch([shard_of(checkpoint, 3)])
    assert {request.token for request in hub.requests} == {"hf_given"}
    assert "hf_given" not in repr(checkpoint)
    hub.requests.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    checkpoint = Checkpoint.open(REPO)
    checkpoint.fetch([shard_of(checkpoint, 0)])
    assert {request.token for request in hub.requests} == {"hf_env"}


def test_a_token_stays_with_the_hub_that_it_is_for(hub: Hub, sharded: Path) -> None:
    with serve({REPO: sharded}) as storage:
        hub.moved_to = storage
        checkpoint = Checkpoint.open(REPO, token="hf_secret")
        shard = shard_of(checkpoint, 0)
        checkpoint.fetch([shard])
        assert storage.fetched() == {shard}
        assert {request.token for request in storage.requests} == {None}


def test_peers_on_one_machine_download_a_file_once(hub: Hub, sharded: Path) -> None:
    checkpoint = Checkpoint.open(REPO)
    shard = shard_of(checkpoint, 1)
    with ThreadPoolExecutor(4) as peers:
        paths = list(peers.map(lambda _: checkpoint.fetch([shard])[shard], range(4)))
    assert len(set(paths)) == 1
    assert hub.sent(shard) == (sharded / shard).stat().st_size


def test_another_process_finds_the_hub_by_its_environment(hub: Hub, tmp_path: Path) -> None:
    code = f"from swarm.models.checkpoint import Checkpoint; c = Checkpoint.open({REPO!r});"
    code += "print(c.fingerprint, c.folder)"
    environment = os.environ | hub.environment(tmp_path / "theirs")
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    digest, folder = answer.stdout.split()
    assert digest == Checkpoint.open(REPO).fingerprint
    assert Path(folder).is_relative_to(tmp_path / "theirs")


# One fingerprint per model


def test_folder_and_hub_agree_on_the_fingerprint(hub: Hub, sharded: Path, single: Path) -> None:
    assert Checkpoint.open(REPO).fingerprint == Checkpoint.open(sharded).fingerprint
    assert Checkpoint.open("org/single").fingerprint == Checkpoint.open(single).fingerprint


def test_names(hub: Hub, copy: Path) -> None:
    assert Checkpoint.open(REPO).name == REPO
    assert Checkpoint.open(copy).name == "copy"
    assert Checkpoint.open(copy, name="mine").name == "mine"


# Without a network


@pytest.mark.parametrize("switch", ["dead", "HF_HUB_OFFLINE"])
def test_what_was_fetched_once_opens_without_a_network(
    hub: Hub, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = Checkpoint.open(REPO)
    online.fetch([shard_of(online, 0)])
    if switch == "dead":
        hub.down = True
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = Checkpoint.open(REPO)
    assert offline.fingerprint == online.fingerprint
    offline.fetch([shard_of(offline, 0)])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # five retries, a second apart
    with pytest.raises(CheckpointError, match=r"cannot be reached and .*not in the cache"):
        offline.fetch([shard_of(offline, 3)])


def test_a_cache_filled_by_another_program_opens_without_a_network(hub: Hub, sharded: Path) -> None:
    for path in sharded.iterdir():
        hf_hub_download(REPO, path.name, cache_dir=constants.HF_HUB_CACHE)
    hub.down = True
    checkpoint = Checkpoint.open(REPO)
    assert checkpoint.fingerprint == Checkpoint.open(sharded).fingerprint
    checkpoint.fetch([shard_of(checkpoint, 2)])


def test_nothing_cached_and_no_network(hub: Hub) -> None:
    hub.down = True
    assert hub.endpoint in refused("cannot be reached", REPO)


# What is not trusted


def test_forged_bytes_are_deleted_and_fetched_anew(hub: Hub, sharded: Path) -> None:
    checkpoint = Checkpoint.open(REPO)
    shard = shard_of(checkpoint, 1)
    true = (sharded / shard).read_bytes()
    hub.forged[shard] = true[:-1] + bytes([true[-1] ^ 1])
    with pytest.raises(CheckpointError, match="digest that the hub lists, and was deleted"):
        checkpoint.fetch([shard])
    hub.forged.clear()
    assert checkpoint.fetch([shard])[shard].read_bytes() == true


def test_a_damaged_cache_is_noticed(hub: Hub) -> None:
    checkpoint = Checkpoint.open(REPO)
    shard = shard_of(checkpoint, 1)
    blob = checkpoint.fetch([shard])[shard].resolve()
    blob.write_bytes(blob.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(CheckpointError, match="was deleted"):
        checkpoint.fetch([shard])
    checkpoint.fetch([shard])


@pytest.mark.parametrize(
    ("listing", "text"),
    [
        ({"sha": "../../../etc"}, "does not answer like a model hub"),
        ({"sha": None}, "does not answer like a model hub"),
        ({"siblings": [{"rfilename": "a", "lfs": {"size": 1, "sha256": "../x", "pointerSize": 1}}]},
         "does not answer like a model hub"),
        ({"siblings": [{"name": "a"}]}, "does not answer like a model hub"),
        ({"siblings": []}, "no config.json"),
        ({"siblings": None}, "no config.json"),
    ],
)  # fmt: skip
def test_a_hub_that_lies_about_its_files(hub: Hub, listing: dict[str, object], text: str) -> None:
    hub.listing = listing
    refused(text, REPO)


# What people read


def test_unknown_and_gated_repos(hub: Hub) -> None:
    assert "check the name, or set HF_TOKEN" in refused("no model 'org/nothing'", "org/nothing")
    hub.gated.add(REPO)
    message = refused("gated", REPO)
    assert f"accept its licence at {hub.endpoint}/{REPO} and set HF_TOKEN" in message
    assert Checkpoint.open(REPO, token="hf_member").name == REPO


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(REPO)

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("swarm.models.hub.http_get", full)
    with pytest.raises(CheckpointError, match=r"no space left in .*set HF_HOME to a larger disk"):
        checkpoint.fetch([shard_of(checkpoint, 0)])


def test_a_revision_is_one_commit(hub: Hub) -> None:
    checkpoint = Checkpoint.open(REPO, revision="v1.0")
    assert checkpoint.folder.name == COMMIT
    assert re.fullmatch(r"[0-9a-f]{64}", checkpoint.fingerprint)
