"""Who may speak for whom: identities, signatures, and what a swarm key opens."""

import contextlib
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import AuthenticationError, UsageError
from swarm.identity import (
    Access,
    Identity,
    SwarmKey,
    from_libp2p,
    opening_transcript,
    peer_id_of,
    to_libp2p,
    verify,
)

ALICE, BOB = Identity.ephemeral(), Identity.ephemeral()
KEY, OTHER_KEY = SwarmKey(b"k" * 32), SwarmKey(b"o" * 32)


def test_an_identity_stays_the_same_over_restarts(tmp_path: Path) -> None:
    first = Identity.load_or_create(tmp_path / "identity")
    second = Identity.load_or_create(str(tmp_path / "identity"))
    assert (first.peer_id, first.public_key) == (second.peer_id, second.public_key)
    assert stat.S_IMODE((tmp_path / "identity").stat().st_mode) == 0o400


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x00\x12\x83\x09" + b"x" * 1155])
def test_a_file_that_is_no_identity_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(UsageError, match="not an identity file"):
        Identity.load_or_create(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_bytes() == content


def test_an_identity_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="choose another"):
        Identity.load_or_create(tmp_path / "file" / "identity")


def test_only_the_owner_signs() -> None:
    signature = ALICE.sign(b"data")
    verify(ALICE.public_key, b"data", signature)
    for key, data, wrong in [
        (BOB.public_key, b"data", signature),
        (ALICE.public_key, b"date", signature),
        (ALICE.public_key, b"data", b""),
        (b"", b"data", signature),
        (b"\x00" * 256, b"data", signature),
    ]:
        with pytest.raises(AuthenticationError):
            verify(key, data, wrong)


def test_public_keys_survive_libp2p_form() -> None:
    assert from_libp2p(to_libp2p(ALICE.public_key)) == ALICE.public_key
    for broken in [b"", b"x" * 299, to_libp2p(ALICE.public_key) + b"x"]:
        with pytest.raises(AuthenticationError):
            from_libp2p(broken)


def test_swarm_keys_are_passed_on_as_text(tmp_path: Path) -> None:
    key = SwarmKey.generate()
    (tmp_path / "key").write_text(key.text() + "\n")
    for copy in (SwarmKey.parse(f"  {key.text()}\n"), SwarmKey.load(tmp_path / "key")):
        assert copy.unseal(key.seal(b"record")) == b"record"
    with pytest.raises(UsageError, match="swarm key new"):
        SwarmKey.load(tmp_path / "missing")
    assert key.text() not in repr(key)


@given(st.integers(12, 59), st.sampled_from("ABCxyz019-_é"))
def test_typing_errors_in_a_swarm_key_are_caught(place: int, letter: str) -> None:
    text = KEY.text()
    typo = text[:place] + letter + text[place + 1 :]
    if typo != text:
        with pytest.raises(UsageError, match="swarm key"):
            SwarmKey.parse(typo)


def test_another_swarm_key_opens_nothing() -> None:
    sealed = KEY.seal(b"record")
    for data in (sealed[:-1], sealed[:3], b"", sealed[:-1] + bytes([sealed[-1] ^ 1])):
        with pytest.raises(AuthenticationError):
            KEY.unseal(data)
    with pytest.raises(AuthenticationError):
        OTHER_KEY.unseal(sealed)
    assert KEY.hide("models") != OTHER_KEY.hide("models")


def _transcript(client: Identity, server: str = "server", session: bytes = b"s" * 16) -> bytes:
    return opening_transcript(server, b"d" * 32, session, client.public_key)


@pytest.mark.parametrize("key", [None, KEY])
def test_an_honest_opening_names_its_client(key: SwarmKey | None) -> None:
    credentials = Access(ALICE, key).sign_opening(_transcript(ALICE))
    assert Access(BOB, key).check_opening(_transcript(ALICE), credentials) == ALICE.peer_id


def test_openings_without_the_swarm_key_are_refused() -> None:
    for key in (None, OTHER_KEY):
        credentials = Access(ALICE, key).sign_opening(_transcript(ALICE))
        with pytest.raises(AuthenticationError, match="does not hold the swarm key"):
            Access(BOB, KEY).check_opening(_transcript(ALICE), credentials)


@pytest.mark.parametrize("key", [None, KEY])
def test_an_opening_is_good_for_one_server_session_and_client(key: SwarmKey | None) -> None:
    credentials = Access(ALICE, key).sign_opening(_transcript(ALICE))
    for elsewhere in (
        _transcript(ALICE, server="another"),
        _transcript(ALICE, session=b"t" * 16),
        _transcript(BOB),
    ):
        with pytest.raises(AuthenticationError):
            Access(BOB, key).check_opening(elsewhere, credentials)
    stolen = credentials.model_copy(update={"public_key": BOB.public_key})
    with pytest.raises(AuthenticationError):
        Access(BOB, key).check_opening(_transcript(BOB), stolen)


def test_transcripts_cannot_be_read_in_two_ways() -> None:
    assert opening_transcript("ab", b"c", b"", b"") != opening_transcript("a", b"bc", b"", b"")


@given(st.binary(max_size=300))
def test_public_keys_of_strangers_never_break_us(data: bytes) -> None:
    with contextlib.suppress(AuthenticationError):
        assert peer_id_of(data).startswith("Qm")
