"""What a distributed model adds to transformers' generate: sessions instead of caches."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils.generic import ModelOutput

from swarm.client.plain import PlainMixin, reading
from swarm.client.remote import (
    InferenceSession,
    RemoteBlocks,
    RemoteCache,
    kept_positions,
    watched_blocks,
)
from swarm.client.training_parts import load_trained, save_trained
from swarm.client.training_prompts import SoftPrompts
from swarm.client.turns import finish, resume, session_for
from swarm.errors import UsageError
from swarm.models.adapters_peft import ShellAdapters
from swarm.models.adapters_shell import blocks_of, furnish
from swarm.models.shell import stack_of


class DistributedMixin:
    """Mixed into the family's own class, in front of it."""

    remote_blocks: RemoteBlocks

    def inference_session(self, max_length: int = 2048) -> InferenceSession:
        """Caches that outlive one `generate`; see `InferenceSession`."""
        return self.remote_blocks.inference_session(max_length)

    @property
    def prompts(self) -> SoftPrompts | None:
        """What `tuning_mode` asked for."""
        return self.remote_blocks.prompts

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Only what is trained here (`requires_grad`), and the config; `load_trained` and the
        Trainer, when it resumes, read it. With adapters: just these, as PEFT saves them."""
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(save_directory, **kwargs)  # pyright: ignore
        return save_trained(cast(Any, self), Path(save_directory))

    def adaptable(self) -> Self:
        """This model, with a place for adapters in its remote blocks: `get_peft_model` and
        `PeftModel.from_pretrained` look for linear layers there. `add_adapter` and `load_adapter`
        do it themselves."""
        blocks = self.remote_blocks
        if blocks.announced is not None:
            raise UsageError(
                "this model has an adapter of its servers: load it without active_adapter, to give "
                "it adapters of your own"
            )
        if blocks.adapters is None:
            parameters, model = furnish(cast(Any, self)), cast(Any, self)
            blocks.adapters = ShellAdapters(model, blocks_of(model), parameters)
            connection = blocks.connection
            weakref.finalize(self, connection.loop.spawn, connection.loans.close).atexit = False
        return self

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers: a new PEFT adapter, also of layers that are on servers."""
        self.adaptable()
        super().add_adapter(*args, **kwargs)  # pyright: ignore

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers: a PEFT adapter from a folder or the Hub. Raises UsageError if servers
        cannot apply it, or only a part of it."""
        adapters = self.adaptable().remote_blocks.adapters
        assert adapters is not None
        before = set(getattr(self, "peft_config", ()))
        report = super().load_adapter(*args, **kwargs)  # pyright: ignore
        try:
            adapters.check(getattr(report, "unexpected_keys", ()))
        except UsageError:
            model = cast(Any, self)
            model.delete_adapter(list(set(model.peft_config) - before))
            raise
        return report

    def load_trained(self, folder: str | Path) -> None:
        """What `save_pretrained` wrote. Raises UsageError."""
        load_trained(cast(Any, self), Path(folder))


class GeneratingMixin(DistributedMixin, PlainMixin):
    """For classes with a `generate`."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        session: InferenceSession | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' own `generate`, over a session if one is given or active.

        With a session, `inputs` may be the whole text (only what the session has not seen is
        sent), a continuation of it, or None (go on from where it stands). What comes back is
        `inputs` and the new tokens.
        """
        inputs = inputs if inputs is not None else kwargs.pop("input_ids", None)
        session = session_for(self.remote_blocks, session)
        if session is None:
            return self._generate_once(inputs, args, kwargs)
        text, mask, old = resume(session, inputs, kwargs.pop("attention_mask", None))
        result = super().generate(  # pyright: ignore
            text,
            *args,
            attention_mask=mask,
            past_key_values=RemoteCache(session),
            **kwargs,
        )
        sequences = cast(Tensor, result["sequences"] if isinstance(result, ModelOutput) else result)
        finish(session, text, sequences, mask)
        if isinstance(result, ModelOutput):
            cast(Any, result).sequences = sequences[:, old:]
            return result
        return sequences[:, old:]

    def _generate_once(
        self, inputs: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Over a session of its own, which ends with the call unless the result hands it out."""
        if kwargs.get("use_cache") is False or kwargs.get("past_key_values") is not None:
            return super().generate(inputs, *args, **kwargs)  # pyright: ignore
        session = self.inference_session(max_length=1)
        result = None
        try:
            cache = RemoteCache(session)
            result = super().generate(inputs, *args, past_key_values=cache, **kwargs)  # pyright: ignore
            return result
        finally:
            if getattr(result, "past_key_values", None) is None:
                session.close()

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Called by transformers once it knows how long the text may become."""
        if reading.get() is not None:
            if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                raise UsageError(
                    "streams decode greedily or by sampling; for beams and assistants use "
                    "asyncio.to_thread(model.generate, ...)"
                )
            return None
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, RemoteCache):
            cache.session.max_length = max(cache.session.max_length, max_cache_length)
            generation_config.use_cache = True  # or every step would bring the whole text
            if generation_mode is GenerationMode.ASSISTED_GENERATION:
                cache.session.rollback(0)  # its first step does, whatever the cache holds
        return super()._prepare_cache_for_generation(  # pyright: ignore
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _with_hidden_states(
    model: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """As transformers gives them: what entered each block, and the last after the final norm."""
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise UsageError(
            "hidden states come from a forward without a cache: call the model on all ids with "
            "use_cache=False, or step a session of model.remote_blocks[a:b]"
        )
    last: dict[int, Tensor] = {}  # by thread, since others may use the model, too
    hook = stack_of(model).register_forward_hook(
        lambda _module, _args, output: last.update({threading.get_ident(): output[0]})
    )
    try:
        with watched_blocks() as states:
            result = forward(model, *args, **kwargs)
    finally:
        hook.remove()
    result.hidden_states = (*states, last[threading.get_ident()])
    return result


def _needed(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Of how many last positions the family's forward uses what the blocks give; None: of all."""
    keep, ids = kwargs.get("logits_to_keep"), args[0] if args else kwargs.get("input_ids")
    if not isinstance(keep, int) or keep < 1 or not isinstance(ids, Tensor) or ids.shape[1] <= keep:
        return None
    hooks = [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]
    # One is the stand-in's own; others may look at positions whose logits nobody wants.
    return keep if sum(map(len, hooks)) <= 1 and not model.config.output_hidden_states else None


def distributed_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`base` with sessions for caches; its name is the family's own, with Distributed before."""

    # wraps: generate looks at the signature to learn what the family's forward takes.
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The family's own forward. With `use_cache=True` and no `past_key_values`, the returned
        `past_key_values` hold a session, which is closed when they are forgotten."""
        if kwargs.get("output_attentions"):
            raise UsageError("attention weights stay on the servers: leave output_attentions out")
        past = kwargs.get("past_key_values")
        if past is not None and not isinstance(past, RemoteCache):
            raise UsageError(
                "this cache is not of the servers' blocks, and stays empty: begin with "
                "use_cache=True, and go on with the past_key_values that come back"
            )
        states = kwargs.pop("output_hidden_states", None)
        cached = past is not None or kwargs.get("use_cache")
        if states or (states is None and self.config.output_hidden_states and not cached):
            return _with_hidden_states(self, base.forward, args, kwargs)
        if kwargs.get("use_cache") and past is None:
            kwargs["past_key_values"] = RemoteCache(self.inference_session())
        with kept_positions(_needed(self, args, kwargs)):
            return base.forward(self, *args, **kwargs)

    mixin = GeneratingMixin if base.can_generate() else DistributedMixin
    body = {"__module__": base.__module__, "forward": forward}
    return type(f"Distributed{base.__name__}", (mixin, base), body)
