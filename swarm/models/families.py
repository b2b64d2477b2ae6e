"""The short table of where a model family differs, and how to find a model's stack of blocks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from swarm.errors import ErrorCode, RemoteProtocolError, UnsupportedModel

# Families whose blocks return a tuple where the others return the hidden states alone.
TUPLE_BLOCKS = frozenset(
    {"bamba", "bloom", "codegen", "falcon", "falcon_h1", "glm_moe_dsa", "gpt_neo", "gptj", "hy_v4"}
    | {"gpt_neox_japanese", "mpt", "trocr"}
)

# Families whose blocks look positions up in a table of `max_position_embeddings`. A GPU that is
# asked for what is behind its end computes nothing any more, for nobody, until the process ends.
_TABLES = frozenset({"codegen", "gptj"})


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The family's own class with a language-modelling head. Raises UnsupportedModel."""
    try:
        found: Any = AutoModelForCausalLM._model_mapping[type(config)]  # pyright: ignore
    except KeyError:
        raise UnsupportedModel(
            f"transformers has no causal language model for '{config.model_type}'"
        ) from None
    return found[0] if isinstance(found, tuple) else found


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's part of a config: the config itself unless the model also sees or hears."""
    return config.get_text_config(decoder=True)


def find_stack(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The module whose forward runs the blocks, and the name of the list that holds them.

    Raises UnsupportedModel when there is no list of `num_hidden_layers` modules.
    """
    count = text_config(model.config).num_hidden_layers
    for root in (model.get_decoder(), model):  # a vision tower may have as many blocks
        for owner in root.modules():
            for name, child in owner.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return owner, name
    raise UnsupportedModel(
        f"'{model.config.model_type}' does not keep its {count} blocks in one list, "
        "so it cannot be cut into spans"
    )


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a stack's forward calls its cache (Mamba: `cache_params`)."""
    names = inspect.signature(forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def sliced_config(config: PreTrainedConfig, start: int, end: int) -> PreTrainedConfig:
    """A copy whose per-block lists hold only blocks `[start, end)`; for the stack's forward alone.

    Written past the config's validation, which rightly compares such lists with each other.
    """
    count = config.num_hidden_layers
    computed = {
        name: getattr(config, name)[start:end]
        for name in ("layer_types", "layers_block_type")
        if isinstance(getattr(type(config), name, None), property)
    }
    view = copy.copy(config)
    if computed:
        view.__class__ = type(type(config).__name__, (type(config),), computed)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == count:
            vars(view)[name] = value[start:end]
    count_name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    vars(view)[count_name] = end - start
    return view


def depends_on_pass(config: PreTrainedConfig) -> bool:
    """Whether frequencies follow the longest position of a forward (dynamic NTK, longrope).

    Such models must see a text in the same pieces as the reference, and never share a pass.
    """
    rope: Any = getattr(text_config(config), "rope_parameters", None)
    if not isinstance(rope, dict):
        return False
    schemes = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    kinds = [str(scheme.get("rope_type", scheme.get("type"))) for scheme in schemes]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def most_positions(config: PreTrainedConfig) -> int | None:
    """How many positions blocks know; None: they compute whatever they are asked for."""
    text: Any = text_config(config)
    return text.max_position_embeddings if text.model_type in _TABLES else None


def check_places(most: int | None, positions: Tensor | None, end: int) -> None:
    """Raises RemoteProtocolError TOO_LONG for `positions` (None: those before `end`) that blocks
    with `most_positions` do not know."""
    if most is None or (positions is not None and not positions.numel()):
        return
    last = end - 1 if positions is None else int(positions.max())
    if last >= most:
        raise RemoteProtocolError(
            ErrorCode.TOO_LONG, f"position {last}: this model's blocks know those below {most} only"
        )


def caches_latents(config: PreTrainedConfig) -> bool:
    """Whether attention caches a compressed form and expands it on every use (DeepSeek's MLA)."""
    return getattr(config, "kv_lora_rank", None) is not None


def reset_ropes(stack: nn.Module) -> None:
    """Undo what dynamic NTK kept from earlier passes, which may have been somebody else's."""
    for module in stack.modules():
        if not hasattr(module, "original_max_seq_len"):
            continue
        for name, value in list(vars(module).items()) + list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_", ""), value.clone())
            elif name.endswith("max_seq_len_cached"):
                setattr(module, name, cast(Any, module).original_max_seq_len)
