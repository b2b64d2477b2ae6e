"""However a text is generated, deaths leave every token of it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.client.pairs import GREEDY, Killer, Pair, prompt
from tests.models.tiny import tiny_model


@pytest.fixture(scope="module")
def twice() -> Iterator[Pair]:
    """Two servers for each of three spans."""
    pair = Pair("llama", seed=1, replicas=2)
    with pair.swarm:
        yield pair
        pair.swarm.assert_quiet()


@pytest.fixture
def pair(twice: Pair) -> Pair:
    for server in twice.swarm.servers:
        twice.swarm.revive(server)
    return twice


def test_the_server_in_use_may_die_before_each_of_64_tokens(pair: Pair) -> None:
    with pair.model.inference_session(max_length=80) as session:
        killer = Killer(pair, session)
        pair.same(prompt(), max_new_tokens=64, killer=killer)
        assert session.recoveries == 63  # nothing is computed after the last token


@pytest.mark.parametrize("position", [0, 1, 2, 7, 15, 31, 47, 62])
def test_the_first_death_may_come_at_any_token(pair: Pair, position: int) -> None:
    """Then nobody has been replayed to yet, and every copy is one that was pushed."""
    with pair.model.inference_session(max_length=80) as session:
        killer = Killer(pair, session, every=position + 1, first_hop=position)
        pair.same(prompt(), max_new_tokens=position + 3, killer=killer)
        assert session.recoveries >= 1


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
    ],
    ids="-".join,
)
def test_every_way_to_decode(pair: Pair, options: dict[str, Any]) -> None:
    with pair.model.inference_session(max_length=64) as session:
        pair.same(prompt(), **options, max_new_tokens=20, killer=Killer(pair, session, every=3))
        assert session.recoveries >= 3


def test_assisted_generation(pair: Pair) -> None:
    assistant = tiny_model("llama", seed=1)  # agrees often: rollbacks of every length
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.05)
    with pair.model.inference_session(max_length=64) as session:
        killer = Killer(pair, session, every=3)
        pair.same(prompt(), assistant_model=assistant, max_new_tokens=24, killer=killer)
        assert session.recoveries >= 2


def test_a_second_turn_with_padding_in_the_middle(pair: Pair) -> None:
    """Each row goes on as if it were alone, also when a death falls into the second turn."""
    turn, mask = prompt(rows=2, tokens=6, seed=5), torch.ones(2, 6, dtype=torch.long)
    turn[1, :4], mask[1, :4] = 0, 0
    with pair.model.inference_session(max_length=64) as session:
        killer: Any = Killer(pair, session, every=5)
        options: dict[str, Any] = GREEDY | {"logits_processor": [killer]}
        text = pair.model.generate(prompt(rows=2), **options)
        both = pair.model.generate(turn, attention_mask=mask, session=session, **options)
        assert session.recoveries == 4
    for row, padded in enumerate([0, 4]):
        ids = torch.cat([text[row : row + 1], turn[row : row + 1, padded:]], dim=1)
        alone = pair.local.generate(ids, **GREEDY)
        assert both[row, 6:].tolist() == alone[0, ids.shape[1] :].tolist()
