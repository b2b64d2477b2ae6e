"""Decoding many texts at once: a coroutine for each, and the model's ends called for all together.

What arrives from the servers while the ends are at work is taken together in the next call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from swarm.client.ends import Ends
from swarm.client.sampling import Text, Token, choose
from swarm.client.session import RemoteSession
from swarm.client.training_prompts import SoftPrompts
from swarm.loop import BackgroundLoop

Take = Callable[[Token], Awaitable[None] | None]
"""What is done with every token; the next one waits for what it may return."""

_QUICK = 0.0003  # seconds; ends that take less are called on the loop: a thread would cost as much


@dataclass(slots=True)
class _Turn:
    """A text that waits for its next token, or for its prompt to be embedded."""

    text: Text
    hidden: Tensor | None  # [1, 1, H], behind the last block; None: the prompt comes first
    begin: int  # the first position to embed
    future: asyncio.Future[None]
    token: Token | None = None
    embedded: Tensor | None = None  # [1, T, H], to send next; None: the text has ended
    error: Exception | None = None


class Decoder:
    """Decodes texts over sessions of one model. `decode` is for the background loop."""

    def __init__(self, model: PreTrainedModel, loop: BackgroundLoop) -> None:
        self.ends = Ends(model)
        self._loop = loop
        self._waiting: list[_Turn] = []
        self._busy = False
        # Ends with us, and is waited for when the process ends: torch aborts if cut off.
        self._thread = ThreadPoolExecutor(1, "swarm-ends")

    async def decode(
        self,
        remote: RemoteSession,
        text: Text,
        take: Take | None = None,
        prompts: SoftPrompts | None = None,
    ) -> None:
        """Let `text` grow until it ends. The session must hold less than all of it, and holds all
        but the last token afterwards. `take` is called on the loop with each token. With `prompts`
        the session has them in front, and the text behind.

        Raises what a step of the session raises, and what processors raise.
        """
        prefix = 0 if prompts is None else len(prompts)
        turn = await self._turn(text, None, max(0, remote.position - prefix))
        while (embedded := turn.embedded) is not None:
            if prompts is not None and remote.position == 0:
                embedded = prompts.before(embedded).detach()
            output = await remote.step(embedded, keep=1)
            turn = await self._turn(text, output, remote.position - prefix)
            if take is not None and turn.token is not None:
                shown = take(turn.token)
                if shown is not None:
                    await shown

    async def _turn(self, text: Text, hidden: Tensor | None, begin: int) -> _Turn:
        loop = asyncio.get_running_loop()
        turn = _Turn(text, hidden, begin, loop.create_future())
        self._waiting.append(turn)
        if not self._busy:
            self._busy = True
            loop.call_soon(self._next_batch)  # with what else arrives in this round of the loop
        await turn.future
        return turn

    def _next_batch(self) -> None:
        batch, self._waiting = self._waiting, []
        self._busy = bool(batch)
        if not batch:
            return
        if self.ends.seconds < _QUICK and all(turn.text.row_wise for turn in batch):
            _advance(self.ends, batch)
            self._done(batch)
        else:
            self._thread.submit(self._advance_elsewhere, batch)

    def _advance_elsewhere(self, batch: list[_Turn]) -> None:
        _advance(self.ends, batch)
        self._loop.call_soon(lambda: self._done(batch))

    def _done(self, batch: list[_Turn]) -> None:
        for turn in batch:
            if turn.future.done():
                continue  # cancelled meanwhile
            if turn.error is not None:
                turn.future.set_exception(turn.error)
            else:
                turn.future.set_result(None)
        self._next_batch()


@torch.no_grad()
def _advance(ends: Ends, batch: Sequence[_Turn]) -> None:
    """Fill in tokens, and what to send next."""
    choosing: list[_Turn] = []
    for turn in batch:
        if turn.hidden is not None:
            choosing.append(turn)
        else:
            _embed(ends, [turn], torch.tensor([turn.text.prompt[turn.begin :]]))
    try:
        if choosing:
            _choose(ends, choosing)
    except Exception as error:  # noqa: BLE001  # whatever it is, those who wait must hear of it
        for turn in choosing:
            turn.error = turn.error or error


def _choose(ends: Ends, batch: Sequence[_Turn]) -> None:
    logits = ends.logits(torch.cat([turn.hidden for turn in batch if turn.hidden is not None]))
    chosen = choose([turn.text for turn in batch], logits[:, -1].float())
    going: list[_Turn] = []
    for turn, token in zip(batch, chosen, strict=True):
        if isinstance(token, Exception):
            turn.error = token
            continue
        turn.token = token
        try:
            if not turn.text.grow(token.id):
                going.append(turn)
        except Exception as error:  # noqa: BLE001  # one text's criterion must not stop others
            turn.error = error
    if going:
        _embed(ends, going, torch.tensor([[turn.text.ids[-1]] for turn in going]))


def _embed(ends: Ends, batch: Sequence[_Turn], ids: Tensor) -> None:
    """`ids` [len(batch), T] to what is sent next."""
    try:
        embedded = ends.embed(ids, [turn.begin for turn in batch])
    except Exception as error:  # noqa: BLE001  # one text's ids or length must not stop others
        if len(batch) == 1:
            batch[0].error = error
            return
        for turn, row in zip(batch, ids.split(1), strict=True):
            _embed(ends, [turn], row)
    else:
        for turn, row in zip(batch, embedded.split(1), strict=True):
            turn.embedded = row
