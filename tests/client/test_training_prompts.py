"""Soft prompts and heads learn through a swarm what they would have learnt on one machine."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

from swarm.client.training_prompts import SoftPrompts
from swarm.errors import CheckpointError, UsageError
from swarm.models.checkpoint import Checkpoint
from swarm.models.families import find_stack
from swarm.models.loading import load_shell
from tests.client.pairs import GREEDY, Killer, Pair, prompt, shell_of
from tests.client.test_training import FAMILIES, agree, texts
from tests.models.tiny import LAYERS, VOCAB, save_tiny

LENGTH = 3


def with_prompts(pair: Pair, mode: str = "deep_ptune") -> SoftPrompts:
    """Prompts that are large enough to show, for both models."""
    embeddings = pair.local.get_input_embeddings().weight
    pair.blocks.prompts = prompts = SoftPrompts(mode, LENGTH, LAYERS, embeddings)
    with torch.no_grad():
        for parameter in prompts.parameters():
            parameter.normal_(0, 0.3)
    pair.model.requires_grad_(False)
    pair.local.requires_grad_(False)
    return prompts.requires_grad_()


@contextmanager
def locally(pair: Pair, prompts: SoftPrompts) -> Generator[SoftPrompts]:
    """Inside, forward hooks put copies of the prompts into the local model's blocks."""
    stack, name = find_stack(pair.local)
    own = SoftPrompts("deep_ptune" if prompts.deep is not None else "ptune", LENGTH, LAYERS,
                      pair.local.get_input_embeddings().weight)  # fmt: skip
    own.load_state_dict(prompts.state_dict())
    with ExitStack() as hooks:
        for index, block in enumerate(getattr(stack, name)):

            def add(_: Any, args: Any, kwargs: Any, index: int = index) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                if index == 0:  # what bloom does to embeddings is not done to prompts
                    hidden = own.before(hidden[:, LENGTH:])
                if own.deep is not None:
                    rest = hidden.shape[1] - LENGTH
                    deep = torch.nn.functional.pad(own.deep[index], (0, 0, 0, rest))
                    hidden = hidden + deep
                return (
                    ((hidden, *args[1:]), kwargs)
                    if args
                    else (args, kwargs | {"hidden_states": hidden})
                )

            hooks.callback(block.register_forward_pre_hook(add, with_kwargs=True).remove)
        yield own


def whole(pair: Pair, own: SoftPrompts, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the texts behind prompts, by transformers alone."""
    embedded = own.before(pair.local.get_input_embeddings()(batch["input_ids"]))
    mask = own.padding(batch["attention_mask"])
    return pair.local(inputs_embeds=embedded, attention_mask=mask).logits[:, LENGTH:]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_prompts_are_those_of_one_machine(family: str) -> None:
    pair = Pair(family, seed=40 + FAMILIES.index(family))
    batch = texts(rows=3, tokens=12)
    labels = batch.pop("labels")

    def loss(logits: torch.Tensor) -> torch.Tensor:
        flat = logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten())

    with pair.swarm:
        prompts = with_prompts(pair)
        with locally(pair, prompts) as own:
            expected = loss(whole(pair, own, batch))
            expected.backward()
        got = loss(pair.model(**batch).logits)
        got.backward()
        assert agree(got.detach(), expected.detach())
        assert agree(prompts.first.grad, own.first.grad)
        assert prompts.deep is not None
        assert own.deep is not None
        assert agree(prompts.deep.grad, own.deep.grad)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom"])
def test_what_is_written_behind_prompts(family: str, mode: str) -> None:
    """With caches and without, in one piece and over two turns of a session, and as a stream."""
    pair = Pair(family, seed=50)
    ids = prompt(2, 7)
    with pair.swarm:
        prompts = with_prompts(pair, mode)
        text = ids
        with locally(pair, prompts) as own, torch.no_grad():
            for _ in range(6):
                batch = {"input_ids": text, "attention_mask": torch.ones_like(text)}
                text = torch.cat([text, whole(pair, own, batch)[:, -1:].argmax(-1)], dim=1)
        options = GREEDY | {"max_new_tokens": 6}
        assert torch.equal(pair.model.generate(ids, **options), text)
        assert torch.equal(pair.model.generate(ids, use_cache=False, **options), text)
        assert torch.equal(pair.model.generate(ids[:1], **options), text[:1])
        assert torch.equal(asyncio.run(pair.model.generate_async(ids, **options)), text)
        with pair.model.inference_session(max_length=32) as session:
            options["max_new_tokens"] = 3
            first = pair.model.generate(ids, **options)
            assert session.position == first.shape[1] - 1
            second = pair.model.generate(None, **options)
            assert torch.equal(torch.cat([first, second], dim=1), text)
        with pair.model.inference_session(max_length=32) as session:
            first = asyncio.run(pair.model.generate_async(ids[:1], **options))
            session.position = 2  # within the text, behind the prompts
            again = asyncio.run(pair.model.generate_async(first[:, 2:], **options))
            assert torch.equal(torch.cat([first[:, :2], again], dim=1), text[:1])
        pair.swarm.assert_quiet()


def test_deep_prompts_are_there_when_servers_die() -> None:
    """In the first steps, too, of which a part only is prompts; and rows that are beams."""
    pair = Pair("qwen3", seed=51, replicas=2)
    with pair.swarm:
        with_prompts(pair)
        ids = prompt(1, 6)
        options = GREEDY | {"max_new_tokens": 10, "num_beams": 3}
        expected = pair.model.generate(ids, use_cache=False, **options)
        with pair.model.inference_session(max_length=40) as session:
            killer = Killer(pair, session, every=2)
            got = pair.model.generate(ids, logits_processor=[killer], **options)
            assert torch.equal(got, expected)
            assert session.recoveries >= 2
        for server in pair.swarm.servers:
            pair.swarm.revive(server)
        hidden = torch.randn(2, LENGTH + 4, 48)
        assert pair.blocks.prompts is not None
        assert pair.blocks.prompts.deep is not None
        deep = pair.blocks.prompts.deep.detach()
        whole = pair.blocks._pass(hidden, None, None, deep).detach()
        with pair.blocks.inference_session(16) as session:
            parts = [session.step(hidden[:, :2])]  # within the prompts
            pair.swarm.cut(pair.swarm.serving(session, pair.cuts[1][0]))
            parts += [session.step(hidden[:, 2:5]), session.step(hidden[:, 5:])]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)
            session.close()
        pair.swarm.assert_quiet()


def test_a_classifier_learns_as_it_would_here(tmp_path: Path) -> None:
    """Its head and prompts; what was trained is saved alone, and read again."""
    pair = Pair("llama", seed=60)
    config = pair.local.config
    config.num_labels, config.pad_token_id = 3, 0
    local: Any = AutoModelForSequenceClassification.from_config(config).eval()
    local.model.load_state_dict(pair.local.model.state_dict())
    model = shell_of(local, pair.blocks)
    batch = texts(rows=4, tokens=10)
    batch["labels"] = torch.tensor([0, 1, 2, 1])
    with pair.swarm:
        for each in (local, model):
            each.requires_grad_(False)
            each.score.requires_grad_()
            loss = each(**batch).loss
            loss.backward()
        assert agree(model.score.weight.grad, local.score.weight.grad)

        embeddings = local.get_input_embeddings().weight
        pair.blocks.prompts = SoftPrompts("ptune", LENGTH, LAYERS, embeddings)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        losses: list[float] = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

        model.save_pretrained(tmp_path)
        with torch.no_grad():
            after = model(**batch).logits
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.zero_()
            assert not torch.equal(model(**batch).logits, after)
            model.load_trained(tmp_path)
            assert torch.equal(model(**batch).logits, after)
        size = (tmp_path / "model.safetensors").stat().st_size
        assert size < 4 * 48 * (3 + LENGTH) + 1000
        pair.blocks.prompts = None
        with pytest.raises(UsageError, match="same tuning_mode"):
            model.load_trained(tmp_path)
        with pytest.raises(UsageError, match="cannot read"):
            model.load_trained(tmp_path / "nowhere")
        with pytest.raises(UsageError, match="nothing here is trained"):
            model.requires_grad_(False).save_pretrained(tmp_path)


def test_a_head_that_the_checkpoint_lacks_is_new_and_anything_else_is_missed(
    tmp_path: Path,
) -> None:
    save_tiny("llama", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.config.num_labels = 5
    like: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    model: Any = load_shell(
        checkpoint, AutoModelForSequenceClassification, torch.nn.Identity(), **like
    )
    assert model.score.weight.shape == (5, 48)
    assert model.score.weight.isfinite().all()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["score.weight"]
    del checkpoint.tensor_files["model.embed_tokens.weight"]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="embed_tokens"):
        load_shell(checkpoint, AutoModelForSequenceClassification, torch.nn.Identity(), **like)


def test_peft_s_own_prompt_tuning_works() -> None:
    pair = Pair("llama", seed=70)
    batch = texts(rows=2, tokens=9)
    with pair.swarm:
        found: list[Any] = []
        written: list[torch.Tensor] = []
        for each in (pair.local, pair.model):
            torch.manual_seed(1)
            options: Any = {"task_type": TaskType.CAUSAL_LM, "num_virtual_tokens": 4}
            tuned: Any = get_peft_model(each, PromptTuningConfig(**options))
            loss = tuned(**batch).loss
            loss.backward()
            prompts = tuned.prompt_encoder.default.embedding.weight
            found.append(prompts.grad)
            prompts.data *= 20
            written += [tuned.generate(input_ids=prompt(), **GREEDY) for _ in range(2)]
        assert agree(found[1], found[0])
        plain = pair.local.generate(prompt(), **GREEDY)
        assert not torch.equal(written[0], plain)
        assert all(torch.equal(each, written[0]) for each in written)
        assert torch.equal(pair.model.generate(prompt(), **GREEDY), plain)


@pytest.mark.parametrize(
    ("mode", "length", "why"), [("lora", 3, "ptune"), ("ptune", 0, "at least")]
)
def test_what_prompts_cannot_be_is_said(mode: str, length: int, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        SoftPrompts(mode, length, LAYERS, torch.zeros(VOCAB, 48))
