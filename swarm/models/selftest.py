"""Proves, before a server serves a model, that cutting it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.configuration_utils import PreTrainedConfig

from swarm.models.families import TUPLE_BLOCKS


@dataclass(frozen=True, slots=True)
class SplitProof:
    can_batch: bool
    can_rewind: bool


def prove_split(config: PreTrainedConfig) -> SplitProof:
    # TODO: build the tiny model and compare; until then only the obvious is answered
    return SplitProof(can_batch=config.model_type not in TUPLE_BLOCKS, can_rewind=True)
