"""The usual tools train a distributed model as they train any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from swarm.client.training_prompts import SoftPrompts
from tests.client.pairs import Pair, prompt
from tests.client.test_training_lora import learning, lora, take_back
from tests.inprocess import span_of
from tests.models.tiny import LAYERS


class Texts(Dataset[dict[str, torch.Tensor]]):
    """A few texts to be learnt by heart."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        (ids,) = prompt(1, 9, seed=index)
        return {"input_ids": ids, "labels": ids}


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = TrainingArguments(**defaults | options)
    return Trainer(model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts())


def losses(done: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in done.state.log_history if name in entry]


def test_the_trainer_trains_adapters_and_resumes(tmp_path: Path) -> None:
    """With gradient accumulation, clipping, a schedule, evaluation and checkpoints."""
    pair = Pair("llama", seed=30)
    curves: list[list[float]] = []
    with pair.swarm:
        tuned: Any = None
        for name, model in (("local", pair.local), ("remote", pair.model.adaptable())):
            tuned = get_peft_model(model, lora())
            learning(tuned, seed=4)
            done = trainer(tuned, tmp_path / name)
            done.train()
            curves.append([*losses(done), *losses(done, "eval_loss")])
        assert len(curves[0]) == 6 + 2
        assert curves[1] == pytest.approx(curves[0], abs=1e-3)
        assert curves[1][-1] < curves[1][-2]
        middle = tmp_path / "remote" / "checkpoint-3"
        assert (middle / "adapter_model.safetensors").exists()
        after = {name: p.detach().clone() for name, p in learning(tuned).items()}
        learning(tuned, seed=8)  # somebody else's, who comes back after a crash
        again = trainer(tuned, tmp_path / "remote")
        again.train(resume_from_checkpoint=str(middle))
        for name, parameter in learning(tuned).items():
            torch.testing.assert_close(parameter.detach(), after[name], atol=1e-4, rtol=0)
        take_back(pair)


def test_the_trainer_resumes_prompts_on_servers_that_were_all_started_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = Pair("llama", seed=31)
    with pair.swarm:
        pair.model.requires_grad_(False)
        embeddings = pair.local.get_input_embeddings().weight
        pair.blocks.prompts = prompts = SoftPrompts("deep_ptune", 2, LAYERS, embeddings)
        trainer(pair.model, tmp_path, disable_tqdm=False).train()
        assert "6/6" in capsys.readouterr().err  # the progress bar
        assert prompts.deep is not None
        after = prompts.deep.detach().clone()
        assert after.abs().max() > 0
        with torch.no_grad():
            prompts.deep.zero_()
        for server in list(pair.swarm.servers):
            pair.swarm.cut(server)
        for cut in pair.cuts:
            pair.swarm.add(span_of(pair.local, *cut))
        trainer(pair.model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        torch.testing.assert_close(prompts.deep.detach(), after, atol=1e-4, rtol=0)


def test_accelerate_and_half_precision_on_the_client() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the Trainer has set one up
    pair = Pair("llama", seed=32)
    with pair.swarm:
        model: Any = pair.model
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"]))
        accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(learning(model).values(), lr=2e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        found: list[float] = []
        ids = prompt(2, 10)
        for _ in range(12):
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        assert found[0] == pytest.approx(found[1], abs=1e-3)  # accumulated: no step in between
        assert found[-1] < 0.95 * found[0]
        take_back(pair)
    AcceleratorState._reset_state(reset_partial_state=True)
