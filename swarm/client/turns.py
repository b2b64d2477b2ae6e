"""The text of a session over several calls of `generate`: what the servers know of it already."""

from __future__ import annotations

import torch
from torch import Tensor

from swarm.client.remote import InferenceSession, RemoteBlocks, active_sessions
from swarm.errors import UsageError


def session_for(blocks: RemoteBlocks, given: InferenceSession | None) -> InferenceSession | None:
    """The one given, or the innermost one of these blocks whose `with` block we are in.

    Raises UsageError if the one given is of other blocks.
    """
    if given is None:
        return next((each for each in reversed(active_sessions()) if each.is_of(blocks)), None)
    if not given.is_of(blocks):
        raise UsageError(
            "this session is another model's, or of some blocks only: open one with "
            "inference_session() of the model that is to generate"
        )
    return given


def resume(
    session: InferenceSession, inputs: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """Roll the session back to where `_whole_text` goes on from what it has seen."""
    text, mask, old = _whole_text(session, inputs, mask)
    sure = session.position if session.doubtful_from is None else session.doubtful_from
    session.rollback(min(session.position, sure, text.shape[1] - 1))
    # Until `finish`, nobody knows which tokens the servers hold behind those known before.
    session.doubtful_from = 0 if session.output_ids is None else session.output_ids.shape[1]
    session.reordered = False
    return text, mask, old


def finish(session: InferenceSession, text: Tensor, sequences: Tensor, mask: Tensor) -> None:
    """The servers hold all of it but the last token. Of beams they hold the last ones, whichever
    was chosen: what is sure is `text`, from which all of them went on."""
    session.doubtful_from = text.shape[1] if session.reordered else None
    session.output_ids = sequences
    copies = sequences.shape[0] // mask.shape[0]  # `num_return_sequences`
    mask = mask.repeat_interleave(copies, dim=0)
    session.attention_mask = _grown(mask, sequences.shape[1])


def _whole_text(
    session: InferenceSession, inputs: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """All ids, their mask, and how many of them the caller did not give."""
    known = session.output_ids
    if known is None or known.shape[1] == 0:
        if inputs is None:
            raise UsageError("the session is empty; give generate some input_ids to begin with")
        return inputs, _grown(mask, inputs.shape[1], inputs), 0
    if inputs is not None and inputs.shape[0] != known.shape[0]:
        raise UsageError(
            f"the session has {known.shape[0]} rows, the input {inputs.shape[0]}; "
            "open another session for another batch"
        )
    count = known.shape[1]
    known_mask = _grown(session.attention_mask, count, known)
    if inputs is None:
        return known, known_mask, count
    if inputs.shape[1] >= count and torch.equal(inputs[:, :count].to(known.device), known):
        return inputs, _grown(mask if mask is not None else known_mask, inputs.shape[1]), 0
    new_mask = _grown(mask, inputs.shape[1], inputs)
    if mask is not None and mask.shape[1] == count + inputs.shape[1]:
        return torch.cat([known, inputs], dim=1), mask, count
    return torch.cat([known, inputs], dim=1), torch.cat([known_mask, new_mask], dim=1), count


def _grown(mask: Tensor | None, length: int, like: Tensor | None = None) -> Tensor:
    """The mask with ones up to `length`."""
    if mask is None:
        assert like is not None
        return torch.ones((like.shape[0], length), dtype=torch.long, device=like.device)
    missing = length - mask.shape[1]
    return torch.nn.functional.pad(mask[:, :length], (0, max(0, missing)), value=1)
