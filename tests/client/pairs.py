"""A local model, and the same model through a swarm in this process: both must say the same."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from transformers import LogitsProcessor

from swarm.client.generation import distributed_class
from swarm.client.remote import InferenceSession, RemoteBlocks
from swarm.models.shell import make_shell
from tests.client.twins import WHOLE
from tests.inprocess import InProcessSwarm, Server, span_of
from tests.models.tiny import LAYERS, VOCAB, tiny_model

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


def prompt(rows: int = 1, tokens: int = 9, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, tokens), generator=generator)


def shell_of(local: Any, blocks: RemoteBlocks) -> Any:
    """The model with its blocks in a swarm; `local` itself is left alone."""
    model = copy.deepcopy(local)
    make_shell(model, blocks)
    model.__class__ = distributed_class(type(model))
    model.remote_blocks = blocks
    return model


class Pair:
    """Three spans with random cuts, each of them on `replicas` servers."""

    def __init__(self, family: str, seed: int, *, replicas: int = 1, **rope: Any) -> None:
        self.local: Any = tiny_model(family, seed)
        if rope:
            weights = self.local.state_dict()
            self.local.config.rope_parameters |= rope
            self.local.config.max_position_embeddings = 16
            self.local = type(self.local)(self.local.config).eval()
            self.local.load_state_dict(weights)
        self.local.generation_config.eos_token_id = None
        self.swarm = InProcessSwarm()
        one, two = sorted(random.Random(seed).sample(range(1, LAYERS), 2))
        self.cuts = [(0, one), (one, two), (two, LAYERS)]
        spans = [span_of(self.local, *ends) for ends in self.cuts * replicas]
        for span in spans:
            self.swarm.add(span)
        self.blocks = self.swarm.blocks(spans[0], WHOLE, chunk_bytes=4096)
        self.model = shell_of(self.local, self.blocks)

    def same(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """Both generate; the tokens must be identical. Returns them."""
        killer = options.pop("killer", None)
        torch.manual_seed(3)
        expected = self.local.generate(ids, **GREEDY | options)
        torch.manual_seed(3)
        if killer is not None:
            options["logits_processor"] = [killer]
        got = self.model.generate(ids, **GREEDY | options)
        assert got.tolist() == expected.tolist()
        return got


class Killer(LogitsProcessor):
    """Before every `every`-th choice of tokens the server in use dies, each hop in turn.

    Who died before comes back: with two replicas there is always one more.
    """

    def __init__(
        self, pair: Pair, session: InferenceSession, every: int = 1, first_hop: int = 0
    ) -> None:
        self.pair = pair
        self.session = session
        self.every = every
        self.first_hop = first_hop
        self.calls = 0
        self.kills = 0
        self.dead: Server | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        noticed = self.session.recoveries >= self.kills  # several choices may follow one step
        if self.calls % self.every == 0 and noticed:
            if self.dead is not None:
                self.pair.swarm.revive(self.dead)
            start = self.pair.cuts[(self.first_hop + self.kills) % 3][0]
            self.dead = self.pair.swarm.serving(self.session, start)
            self.pair.swarm.cut(self.dead)
            self.kills += 1
        return scores
