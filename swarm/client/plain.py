"""Greedy decoding and sampling of single rows in a loop of our own: for `generate`, and asyncio."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from swarm.client.decoding import Decoder, Take
from swarm.client.remote import InferenceSession, RemoteBlocks, RemoteCache
from swarm.client.sampling import Text, Token
from swarm.client.streams import Journey, TokenStream
from swarm.client.turns import finish, resume, session_for
from swarm.errors import UsageError
from swarm.loop import BackgroundLoop, in_thread

reading: contextvars.ContextVar[list[Text] | None] = contextvars.ContextVar(
    "swarm_reading", default=None
)
"""Inside, `generate` only tells how it understands its arguments."""

_making = threading.Lock()


class PlainMixin:
    """Mixed in before the class whose `generate` and `_sample` are transformers' own."""

    remote_blocks: RemoteBlocks

    def stream(
        self,
        inputs: Tensor | None = None,
        *,
        session: InferenceSession | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        **kwargs: Any,
    ) -> TokenStream:
        """The new tokens of one text, for asyncio: `async for token in model.stream(ids)`.

        Works in any event loop. All streams of a process share one thread for the network, and the
        texts whose hidden states arrive together share one call of the head.

        inputs: ids `[1, T]`; with a session as in `generate`.
        seed: of sampling; gives what `torch.manual_seed(seed)` before `generate` gives.
        logprobs: how many of the likeliest tokens to tell with each (0: only its own logarithm).
        kwargs: as for `generate`, of greedy decoding and sampling.
        """
        session = session_for(self.remote_blocks, session)
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs

        def decode(
            journey: Journey, take: Callable[[Token], None]
        ) -> Coroutine[Any, Any, list[int]]:
            return self._decode(inputs, session, seed, kwargs, logprobs, take, journey)

        return TokenStream(self._loop, decode)

    async def generate_async(
        self,
        inputs: Tensor | None = None,
        *,
        session: InferenceSession | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """What `generate` returns, awaited in any event loop: `inputs` and the new tokens.

        Rows are decoded one by one, without their padding; row i samples with `seed + i`.
        Cancelling it frees the servers at once. For beams and for drafts of an assistant, use
        `asyncio.to_thread(model.generate, ...)`.
        """
        session = session_for(self.remote_blocks, session)
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        work = self._decode_rows(inputs, session, seed, kwargs)
        return await asyncio.wrap_future(self._loop.start(work))

    @property
    def _loop(self) -> BackgroundLoop:
        return self.remote_blocks.connection.loop

    async def _decode_rows(
        self,
        inputs: Tensor | None,
        session: InferenceSession | None,
        seed: int | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        copies = kwargs.pop("num_return_sequences", 1)
        if session is not None or inputs is None:
            new = await self._decode(inputs, session, seed, kwargs)
            given = torch.empty(1, 0, dtype=torch.long) if inputs is None else inputs
            return torch.cat([given, torch.tensor([new]).to(given)], dim=1)
        inputs = inputs.repeat_interleave(copies, dim=0)
        mask = kwargs.pop("attention_mask", None)
        decoding: list[asyncio.Task[list[int]]] = []
        for index, row in enumerate(inputs.split(1)):
            padding = {} if mask is None else {"attention_mask": mask[index // copies][None]}
            sampling = None if seed is None else seed + index
            decoding.append(
                asyncio.create_task(self._decode(row, None, sampling, kwargs | padding))
            )
        try:
            new = [torch.tensor(ids) for ids in await asyncio.gather(*decoding)]
        finally:
            for task in decoding:
                task.cancel()
            await asyncio.wait(decoding)
        padded = torch.nn.utils.rnn.pad_sequence(
            new, batch_first=True, padding_value=self._padding(kwargs)
        )
        return torch.cat([inputs, padded.to(inputs)], dim=1)

    async def _decode(
        self,
        inputs: Tensor | None,
        session: InferenceSession | None,
        seed: int | None,
        kwargs: dict[str, Any],
        logprobs: int | None = None,
        take: Callable[[Token], None] | None = None,
        journey: Journey | None = None,
    ) -> list[int]:
        """The new ids. For the background loop."""
        journey = journey or Journey()
        prompts = self.remote_blocks.prompts
        if session is not None:
            inputs, mask, _ = resume(session, inputs, kwargs.pop("attention_mask", None))
            kwargs = kwargs | {"attention_mask": mask}
            if not bool(mask.all()):
                raise UsageError("this session holds padding: only `generate` can go on with it")
        text, decoder = await in_thread(lambda: self._read(inputs, seed, logprobs, kwargs))
        given, length = len(text.ids), max(1, text.max_length - 1)
        if session is not None:
            session.max_length = max(session.max_length, length)
            journey.remote = session.remote(1)
            await decoder.decode(journey.remote, text, take, prompts)
            whole = text.row()
            finish(session, whole, whole, kwargs["attention_mask"])  # one row: no beams
        else:
            blocks = self.remote_blocks
            length += 0 if prompts is None else len(prompts)
            journey.remote = remote = blocks.connection.open(
                blocks.blocks, 1, length, blocks.bundles()
            )
            try:
                await decoder.decode(remote, text, take, prompts)
            finally:
                await remote.close()
        return text.ids[given:]

    def _read(
        self, inputs: Tensor | None, seed: int | None, logprobs: int | None, kwargs: dict[str, Any]
    ) -> tuple[Text, Decoder]:
        """The arguments of `generate` as transformers understands them."""
        if "streamer" in kwargs:
            raise UsageError("streams need no streamer: leave it out")
        texts: list[Text] = []
        token = reading.set(texts)
        try:
            super().generate(inputs, **kwargs)  # pyright: ignore
        finally:
            reading.reset(token)
        (text,) = texts
        text.logprobs = logprobs
        if seed is not None:
            text.generator = torch.Generator(text.device).manual_seed(seed)
        return text, self._decoder()

    def _padding(self, kwargs: Mapping[str, Any]) -> int:
        """What follows the end of a row while others go on, as in `generate`."""
        config = kwargs.get("generation_config") or cast(Any, self).generation_config
        for name in ("pad_token_id", "eos_token_id"):
            ids = kwargs.get(name, getattr(config, name))
            if ids is not None:
                return ids if isinstance(ids, int) else int(ids[0])
        return 0

    def _decoder(self) -> Decoder:
        with _making:
            decoder = vars(self).get("_swarm_decoder")
            if decoder is None:
                decoder = vars(self)["_swarm_decoder"] = Decoder(cast(Any, self), self._loop)
            return decoder

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' loop, or ours if nothing asks for more than tokens of one row."""
        asked, plain = reading.get(), not generation_config.return_dict_in_generate
        if asked is not None and not (plain and input_ids.shape[0] == 1):
            raise UsageError(
                "a stream is one row of tokens: leave num_return_sequences and "
                "return_dict_in_generate out; `logprobs` tells how likely tokens were"
            )
        if asked is not None and model_kwargs.get("inputs_embeds") is not None:
            raise UsageError("a stream begins with ids: leave inputs_embeds to `generate`")
        ids, mask = input_ids[0], model_kwargs.get("attention_mask")
        text = Text(
            ids=ids.tolist(),
            prompt=(ids if mask is None else ids[mask[0].bool()]).tolist(),
            processors=logits_processor,
            criteria=stopping_criteria,
            sample=generation_config.do_sample,
            device=input_ids.device,
        )
        if asked is not None:
            asked.append(text)
            return input_ids
        if plain and generation_config.prefill_chunk_size is None:
            cache = _plain_cache(input_ids, model_kwargs)
            theirs = all(map(_is_theirs, (*logits_processor, *stopping_criteria)))
            theirs = theirs and _prepares_inputs_itself(self)
            decoder = self._decoder() if cache is not None and theirs else None
            if cache is not None and decoder is not None and decoder.ends.as_made:
                remote = cache.session.remote(1)
                decode = partial(decoder.decode, prompts=self.remote_blocks.prompts)
                _follow(self._loop, partial(decode, remote, text), streamer)
                return text.row().to(input_ids.device)
        return super()._sample(  # pyright: ignore
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )


def _plain_cache(ids: Tensor, model_kwargs: Mapping[str, Any]) -> RemoteCache | None:
    """The session of one row without padding, whose positions count from 0."""
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    cache, positions = given.pop("past_key_values", None), given.pop("position_ids", None)
    given.pop("logits_to_keep", None)
    counted = positions is None or torch.equal(
        positions.cpu(), torch.arange(ids.shape[1] - positions.shape[-1], ids.shape[1])[None]
    )
    plain = ids.shape[0] == 1 and counted and given == {"use_cache": True}
    return cache if plain and isinstance(cache, RemoteCache) else None


def _is_theirs(part: object) -> bool:
    """Written by transformers, and neither calls back nor runs the model."""
    calls = (PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
    return type(part).__module__.startswith("transformers.") and not isinstance(part, calls)


def _prepares_inputs_itself(model: object) -> bool:
    """Nobody else does it for the model, as PEFT's prompt tuning would."""
    own = vars(model).get("prepare_inputs_for_generation")
    return own is None or getattr(own, "__self__", None) is model


def _follow(
    loop: BackgroundLoop,
    decode: Callable[[Take | None], Coroutine[Any, Any, None]],
    streamer: Any,
) -> None:
    """Wait until all is decoded. The streamer is called in the caller's thread, and as in
    transformers' loop the next token is not begun before it has returned."""
    if streamer is None:
        loop.call(decode(None))
        return
    tokens: queue.SimpleQueue[tuple[Token, asyncio.Future[None]] | None] = queue.SimpleQueue()

    def take(token: Token) -> asyncio.Future[None]:
        shown = asyncio.get_running_loop().create_future()
        tokens.put((token, shown))
        return shown

    running = loop.start(decode(take))
    running.add_done_callback(lambda _: tokens.put(None))
    try:
        while (item := tokens.get()) is not None:
            token, shown = item
            streamer.put(torch.tensor([token.id]))
            loop.call_soon(lambda shown=shown: shown.done() or shown.set_result(None))
        running.result()
        streamer.end()
    finally:
        running.cancel()
