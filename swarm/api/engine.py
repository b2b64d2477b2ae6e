"""One model that the API serves: prompts to ids, what was asked to what `generate` understands."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from swarm.api.asked import Asked, ChatMessage
from swarm.client.hop import Hop
from swarm.client.sampling import Token
from swarm.models.families import text_config
from swarm.web import HttpProblem

_CHARACTERS = 4  # per token, about: longer texts are looked at in parts first
_AT_A_CUT = 16  # tokens more than in the whole, at most, where a text is cut in two
_TOKENIZING = 2  # threads: of any number of requests, so many prompts are read at a time
_COLDEST = 1e-5  # temperature, below which the likeliest token is all there is: logits overflow


class Stream(Protocol):
    """What `model.stream` returns."""

    def __aiter__(self) -> AsyncIterator[Token]: ...
    def cancel(self) -> None: ...
    @property
    def hops(self) -> Sequence[Hop]: ...
    @property
    def recoveries(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """The beginning of a text: ids, and how many tokens may follow."""

    ids: list[int]
    most: int


class Engine:
    """A distributed model and its tokenizer, under the name that requests call it by.

    most_tokens: of one answer, whatever is asked for.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, most_tokens: int) -> None:
        self.name = name
        self.created = int(time.time())
        self._model, self._tokenizer = model, tokenizer
        config = text_config(model.config)
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 17)
        self.most_tokens = min(most_tokens, self.context)
        self.blocks = int(cast(Any, config).num_hidden_layers)
        self._size = int(model.get_input_embeddings().num_embeddings)
        ends = model.generation_config.eos_token_id
        self.ends = frozenset[int]([ends] if isinstance(ends, int) else ends or ())
        self._threads = ThreadPoolExecutor(_TOKENIZING, "swarm-tokenizer")

    @property
    def has_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def missing(self) -> list[str]:
        """Blocks that nobody serves, as far as we know."""
        view = self._model.remote_blocks.connection.router.view
        return [str(blocks) for blocks in view.missing_blocks()]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def token_text(self, token: int) -> str:
        """Of one token, special ones included."""
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)

    async def read_text(self, prompt: str | Sequence[int], asked: Asked, param: str) -> Prompt:
        """Raises HttpProblem if it is too long, or holds no such tokens."""
        if isinstance(prompt, str):

            def tokenize() -> list[int]:
                self._check_length(prompt, param)
                return self._tokenizer(prompt).input_ids

            ids = await self._in_thread(tokenize)
        else:
            ids = list(prompt)
            self._check_ids(ids, param)
        return self._fitting(ids, asked, param)

    async def read_chat(self, messages: Sequence[ChatMessage], asked: Asked) -> Prompt:
        """The model's own template, or without one all texts in a row. Raises HttpProblem."""

        def tokenize() -> list[int]:
            self._check_length("".join(message.text for message in messages), "messages")
            if not self.has_template:
                return self._tokenizer(plain_chat(messages)).input_ids
            turns = [{"role": message.role, "content": message.text} for message in messages]
            for turn in turns:
                turn["role"] = turn["role"].replace("developer", "system")
            try:
                return self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_dict=True
                )["input_ids"]
            except Exception as error:  # templates raise what they like
                why = f"the chat template of this model refuses these messages: {error}"
                raise HttpProblem(400, why[:500], param="messages") from error

        return self._fitting(await self._in_thread(tokenize), asked, "messages")

    def begin(self, prompt: Prompt, asked: Asked, choice: int) -> Stream:
        """The tokens of one choice: each has a seed of its own."""
        ids = torch.tensor([prompt.ids])
        return self._model.stream(
            ids,
            attention_mask=torch.ones_like(ids),  # whatever is in it, it is no padding
            max_new_tokens=prompt.most,
            seed=secrets.randbits(63) if asked.seed is None else (asked.seed + choice) % (1 << 63),
            logprobs=asked.alternatives,
            **self._sampling(asked, len(prompt.ids)),
        )

    def _sampling(self, asked: Asked, length: int) -> dict[str, Any]:
        """What was asked for, else what the model's makers recommend, else plain sampling."""
        config = self._model.generation_config
        options: dict[str, Any] = {}
        for name, plain in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0), ("min_p", None)):
            for value in (getattr(asked, name), getattr(config, name, None), plain):
                if value is not None:
                    options[name] = value
                    break
        options["do_sample"] = options["temperature"] >= _COLDEST
        if not options["do_sample"]:
            options = {"do_sample": False}
        if asked.repetition_penalty is not None:
            options["repetition_penalty"] = asked.repetition_penalty
        if bias := asked.bias:
            options["sequence_bias"] = [[[token], float(bias[token])] for token in bias]
        if asked.frequency_penalty or asked.presence_penalty:
            penalties = Penalties(
                length, asked.frequency_penalty or 0.0, asked.presence_penalty or 0.0
            )
            options["logits_processor"] = LogitsProcessorList([penalties])
        return options

    def _check_length(self, text: str, param: str) -> None:
        """Refuse what is far too long without reading all of it: a megabyte without a blank takes
        some tokenizers many seconds."""
        count, part = 0, _CHARACTERS * self.context
        if len(text) <= part:
            return
        for start in range(0, len(text), part):
            piece = self._tokenizer(text[start : start + part], add_special_tokens=False)
            count += len(piece.input_ids) - _AT_A_CUT
            if count > self.context:
                raise self._too_long(f"more than {self.context}", "an answer", param)

    def _too_long(self, tokens: str, more: str, param: str) -> HttpProblem:
        return HttpProblem(
            400,
            f"this model takes {self.context} tokens: these are {tokens}, and {more} to come; "
            "use a shorter prompt, or ask for less",
            param=param,
            code="context_length_exceeded",
        )

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        if any(not 0 <= token < self._size for token in ids):
            few = f"token ids of this model are from 0 to {self._size - 1}"
            raise HttpProblem(400, few, param=param)

    def _fitting(self, ids: list[int], asked: Asked, param: str) -> Prompt:
        self._check_ids(asked.bias, "logit_bias")
        if not ids:
            begin = self._tokenizer.bos_token_id
            if begin is None:
                raise HttpProblem(400, "the prompt is empty", param=param)
            ids = [begin]
        room, wanted = self.context - len(ids), asked.limit
        if wanted is not None and wanted > self.most_tokens:
            few = f"at most {self.most_tokens} tokens can be asked for here"
            raise HttpProblem(400, few, param="max_tokens")
        if room < (wanted or 1):
            raise self._too_long(str(len(ids)), str(wanted or "an answer"), param)
        return Prompt(ids, wanted or min(room, self.most_tokens))

    async def _in_thread(self, work: Any) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def plain_chat(messages: Sequence[ChatMessage]) -> str:
    """For models that were never taught to chat: all texts in a row, which they go on with.

    What somebody says begins a paragraph; what the model says goes on where the text stands.
    """
    text = ""
    for message in messages:
        between = "\n\n" if text and message.role != "assistant" else ""
        text = f"{text}{between}{message.text}"
    return text


class Penalties(LogitsProcessor):
    """OpenAI's: off the logit of each token of the answer so far, per occurrence and once."""

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self._prompt_length = prompt_length
        self._frequency, self._presence = frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore
        said = input_ids[0, self._prompt_length :]
        counts = torch.bincount(said, minlength=scores.shape[-1])[: scores.shape[-1]]
        return scores - self._frequency * counts - self._presence * (counts > 0)


def engine_of(name: str, model: object, folder: object, most_tokens: int) -> Engine:
    """With the tokenizer from the model's folder."""
    from transformers import AutoTokenizer

    return Engine(name, model, AutoTokenizer.from_pretrained(cast(Any, folder)), most_tokens)


Engines = Mapping[str, Engine]


def engine_for(engines: Engines, name: str) -> Engine:
    """Raises HttpProblem."""
    if name not in engines:
        names = ", ".join(engines)
        raise HttpProblem(
            404,
            f"there is no model '{name[:100]}' here, but: {names}",
            param="model",
            code="model_not_found",
        )
    return engines[name]
