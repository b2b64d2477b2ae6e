"""Every family that must be exact is so through servers: cut anywhere, padded, and killed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swarm.client.remote import RemoteCache
from tests.client.pairs import Killer, Pair, prompt
from tests.models.tiny import FAMILIES

TOLERANCE = 1e-4


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    assert got.shape == expected.shape
    return bool((got - expected).abs().max() <= TOLERANCE)


def padded(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of one left-padded batch."""
    width = max(row.shape[1] for row in rows)
    pads = [(width - row.shape[1], 0) for row in rows]
    pad = torch.nn.functional.pad
    masks = [pad(torch.ones_like(row), ends) for row, ends in zip(rows, pads, strict=True)]
    return torch.cat([pad(r, e) for r, e in zip(rows, pads, strict=True)]), torch.cat(masks)


def logits(
    pair: Pair, model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any
) -> torch.Tensor:
    """Of the last positions, with the positions that `generate` would pass."""
    if pair.local.config.model_type != "bloom":  # which takes them from the mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        more["position_ids"] = positions[:, mask.shape[1] - ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_are_those_of_one_machine(family: str) -> None:
    """A left-padded batch and each prompt alone, rollbacks, and a death every few tokens."""
    pair = Pair(family, seed=FAMILIES.index(family), replicas=2)
    rows = prompt(tokens=14), prompt(tokens=9, seed=1)
    ids, mask = padded(*rows)
    with pair.swarm:
        with pair.model.inference_session(max_length=64) as session:
            killer = Killer(pair, session, every=3)
            together = pair.same(ids, attention_mask=mask, killer=killer)
            assert session.recoveries == 3
        for row, text in enumerate(rows):
            alone = pair.same(text, prompt_lookup_num_tokens=2)
            assert alone[0, text.shape[1] :].tolist() == together[row, ids.shape[1] :].tolist()
        whole = logits(pair, pair.local, ids, mask)
        assert close(logits(pair, pair.model, ids, mask)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_a_padded_batch_equal_each_text_alone(family: str) -> None:
    """Steps of any size, none included, over two turns that are padded and in which servers die.

    Windows count cache slots, in transformers as here, so that padding in the middle uses them
    up: there, the second turn is compared with the padded batch on one machine.
    """
    pair = Pair(family, seed=100 + FAMILIES.index(family), replicas=2)
    turns = [(prompt(tokens=4, seed=s), prompt(tokens=t, seed=s + 9)) for s, t in ((1, 9), (2, 6))]
    batches = [padded(*turn) for turn in turns]
    ids = torch.cat([batch[0] for batch in batches], dim=1)
    mask = torch.cat([batch[1] for batch in batches], dim=1)
    with pair.swarm, pair.model.inference_session(max_length=32) as session:
        cache, killer = RemoteCache(session), Killer(pair, session)
        got: list[torch.Tensor] = []
        for piece in ids.split([4, 4, 1, 1, 1, 1, 1, 1, 1], dim=1):
            known = mask[:, : session.position + piece.shape[1]]
            nothing = torch.empty(2, 0, pair.blocks.connection.terms.hidden_size)
            pair.blocks(nothing, attention_mask=known, past_key_values=cache)
            got.append(
                logits(pair, pair.model, piece, known, past_key_values=cache, use_cache=True)
            )
            if session.position in (4, 9, 11):  # within the prompt, before and in the second turn
                killer(piece, piece)
        assert session.recoveries == 3
        out = torch.cat(got, dim=1)
    first = batches[0][0].shape[1]
    if getattr(pair.local.config, "sliding_window", None):
        assert close(out[mask.bool()], logits(pair, pair.local, ids, mask)[mask.bool()])
        out, mask, turns = out[:, :first], mask[:, :first], turns[:1]
    for row in range(2):
        text = torch.cat([turn[row] for turn in turns], dim=1)
        alone = logits(pair, pair.local, text, torch.ones_like(text))[0]
        assert close(out[row][mask[row].bool()], alone)
