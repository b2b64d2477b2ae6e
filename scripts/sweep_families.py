#!/usr/bin/env python3
"""Runs the self-test on every causal LM that transformers knows, and writes docs/families.md.

python scripts/sweep_families.py            # about a minute
python scripts/sweep_families.py llama zaya # only these, printed
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from swarm.errors import UnsupportedModel
from swarm.models.selftest import prove_split

PAGE = Path(__file__).parent.parent / "docs" / "families.md"

# Where a default config is incomplete; real checkpoints fill these in.
COMPLETE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 64},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
SKIPPED = {
    "gemma4_assistant": "its default config does not pass transformers' own checks",
    "git": "its image tower does not shrink; its decoder is bert's",
    "phi4_multimodal": "its image and sound towers do not shrink; its decoder is phi3's",
}

HEAD = """\
# Which model families can be served

Made by `scripts/sweep_families.py` with transformers {version}: the self-test that every server
runs at start (`swarm/models/selftest.py`), on a tiny random model of each of the {count} types that
`AutoModelForCausalLM` knows, shrunk from the type's default config. "agree" means that the model,
cut after every single block, gives the logits that the whole one gives in the same passes, within
1e-4 in float32: prefill, prefill in pieces, one token at a time, with padding, and after going
back. What does not agree is refused at start with a sentence. {counts}.

* **shares passes**: tokens of several sessions go through one forward. Of others, single tokens may
  still be the rows of one batch (the self-test tries that, too); the rest run in turn.
* **rewinds**: caches can go back to any length. Others can only start over, so a client replays.
* **in pieces**: several tokens may be added to a cache at once. Where not (transformers' own Mamba
  layers forget their state there), a server feeds such tokens one by one.

Padding in the middle of a session uses up sliding windows, which count cache slots, exactly as in
transformers. Models whose frequencies follow the longest text of a forward (dynamic NTK, longrope)
never share passes, and agree with one machine when they see a text in the same pieces as there.

| type | result | shares passes | rewinds | in pieces | why not |
|---|---|---|---|---|---|
"""


def judge(kind: str) -> tuple[str, str]:
    """The verdict in one word, and the rest of the table's row."""
    if kind in SKIPPED:
        return "not tried", f"| | | | {SKIPPED[kind]} |"
    config = CONFIG_MAPPING[kind](**COMPLETE.get(kind, {}))
    if getattr(config, "is_encoder_decoder", False):
        return "not applicable", "| | | | half of an encoder-decoder |"
    try:
        proof = prove_split(config)
    except UnsupportedModel as error:
        if getattr(config, "is_decoder", None) is False:
            return "not applicable", "| | | | an encoder |"
        return "refused", f"| | | | {_short(error)} |"
    abilities = (proof.can_batch, proof.can_rewind, proof.can_resume)
    return "agree", f"| {' | '.join('yes' if able else '' for able in abilities)} | |"


def _short(error: Exception) -> str:
    """One line that does not break a table."""
    return " ".join(str(error).split()).replace("|", "/")[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="only these types, printed")
    kinds: list[str] = parser.parse_args().types
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows: list[str] = []
    verdicts: Counter[str] = Counter()
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        start = time.monotonic()
        verdict, rest = judge(kind)
        verdicts[verdict] += 1
        rows.append(f"| {kind} | {verdict} {rest}")
        print(f"{time.monotonic() - start:6.2f} s  {rows[-1]}", flush=True)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    print(counts)
    if not kinds:
        head = HEAD.format(version=transformers.__version__, count=len(rows), counts=counts)
        PAGE.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
