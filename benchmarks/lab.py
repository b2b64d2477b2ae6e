"""What all suites share: models, swarms, clients, clocks, and the check that tokens are right."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from benchmarks.figures import NoFigure, Row, Target
from benchmarks.models import THIRDS, make_model
from swarm import AutoDistributedModelForCausalLM, LocalSwarm
from swarm.client.network import SwarmNetwork
from swarm.config import ClientConfig
from swarm.types import Codec

PROMPT_TOKENS = 16


class Stopwatch:
    """A streamer that notes when each token came; `then` runs once, after `at` tokens."""

    def __init__(self, at: int = 0, then: Callable[[], object] | None = None) -> None:
        self.begin = time.perf_counter()
        self.times: list[float] = []
        self._at, self._then = at, then
        self._seen_prompt = False

    def put(self, value: object) -> None:
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        self.times.append(time.perf_counter())
        if self._then is not None and len(self.times) == self._at:
            self._then()

    def end(self) -> None:
        """transformers calls it."""

    @property
    def first(self) -> float:
        """Seconds until the first token, if generate was called at once."""
        return self.times[0] - self.begin

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between tokens; the first is left out, as it is the prompt's."""
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass
class Lab:
    """One process in which all figures are measured, so that all see the same machine.

    Swarms are kept until `clear`, since several suites use the same one.
    """

    folder: Path  # for models; somebody else's to remove
    runs: int = 5
    tokens: int = 64
    seed: int = 0
    quick: bool = False
    suite: str = ""
    rows: list[Row] = field(default_factory=list[Row])
    ties: int = 0
    checked: int = 0
    _paths: dict[str, Path] = field(default_factory=dict[str, Path])
    _locals: dict[str, Any] = field(default_factory=dict[str, Any])
    _swarms: dict[str, LocalSwarm] = field(default_factory=dict[str, LocalSwarm])
    _remotes: dict[str, Any] = field(default_factory=dict[str, Any])
    _stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        disable_progress_bar()
        set_verbosity_error()
        self.generator = torch.Generator().manual_seed(self.seed)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def path(self, name: str) -> Path:
        """The folder of a model of `models.py`, made when first asked for."""
        if name not in self._paths:
            self._paths[name] = make_model(name, self.folder, self.seed)
        return self._paths[name]

    def local(self, name: str) -> Any:
        """The whole model in this process, by plain transformers in float32."""
        if name not in self._locals:
            model = AutoModelForCausalLM.from_pretrained(self.path(name), dtype="float32")
            self._locals[name] = model.eval()
        return self._locals[name]

    def swarm(self, name: str, spans: Sequence[str] = THIRDS) -> LocalSwarm:
        """One server process per span; kept until `clear`."""
        if name not in self._swarms:
            self.progress(f"starting {len(spans)} servers of {name}")
            swarm = LocalSwarm(self.path(name), spans=spans)
            self._swarms[name] = self._stack.enter_context(swarm)
        return self._swarms[name]

    def remote(self, name: str, spans: Sequence[str] = THIRDS) -> Any:
        """The same model with its blocks in `swarm(name)`, after a first generate."""
        if name not in self._remotes:
            model = connect(self.path(name), self.swarm(name, spans))
            generate(model, self.prompts(name, 1), 4)  # dials, and warms up
            self._remotes[name] = model
        return self._remotes[name]

    def clear(self) -> None:
        """End all servers and connections: what follows wants the machine for itself."""
        self._remotes.clear()
        self._swarms.clear()
        SwarmNetwork.leave_all()
        self._stack.close()

    def prompts(self, name: str, count: int, length: int = PROMPT_TOKENS) -> torch.Tensor:
        """Token ids [count, length], other ones each time."""
        return random_ids(self.local(name), count, length, self.generator)

    def check(self, name: str, sequences: torch.Tensor, prompt_tokens: int) -> None:
        """As `check_tokens`, against the local model of that name."""
        self.ties += check_tokens(self.local(name), sequences, prompt_tokens)
        self.checked += sequences[:, prompt_tokens:].numel()

    def note(
        self, name: str, unit: str, values: Sequence[float], target: Target | None = None
    ) -> None:
        self.rows.append(Row(self.suite, name, unit, tuple(values), target))

    def say(self, what: str, run: int, value: float) -> None:
        self.progress(f"{what}: {run + 1}/{self.runs}, {value:.2f}")

    def progress(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.suite}: {text}", file=sys.stderr, flush=True)


def connect(
    path: Path | None,
    swarm: LocalSwarm,
    codec: Codec = "none",
    standby_after: int | None = None,
) -> Any:
    """A client's model; None is the bundled one."""
    return AutoDistributedModelForCausalLM.from_pretrained(
        path,
        initial_peers=swarm.peers,
        config=ClientConfig(codec=codec, standby_after=standby_after),
    )


def random_ids(model: Any, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """[count, length] from the whole vocabulary, but for 0 and 1, which end and pad."""
    return torch.randint(2, model.config.vocab_size, (count, length), generator=generator)


def generate(
    model: Any, prompts: torch.Tensor, tokens: int, watch: Stopwatch | None = None, **more: Any
) -> torch.Tensor:
    """Greedily, exactly `tokens` more per row: [rows, length + tokens]."""
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=watch,
        **more,
    )


def timed(
    model: Any, prompts: torch.Tensor, tokens: int, **more: Any
) -> tuple[torch.Tensor, float]:
    """What `generate` gives, and the seconds it took."""
    begin = time.perf_counter()
    sequences = generate(model, prompts, tokens, **more)
    return sequences, time.perf_counter() - begin


def check_tokens(model: Any, sequences: torch.Tensor, prompt_tokens: int) -> int:
    """How often a token behind the prompt was the other one of a tie.

    Every token must have the best logit of `model` in float32, given those before it, or be as good
    to it: behind the best, in float64, by no more than rounding moves that position's logits.
    Raises NoFigure, as one for wrong tokens would be worth nothing.
    """
    logits = _logits(model, sequences, prompt_tokens)
    tokens = sequences[:, prompt_tokens:]
    best = logits.argmax(dim=-1)
    other = best != tokens
    if not bool(other.any()):
        return 0
    exact = _logits(copy.deepcopy(model).double(), sequences, prompt_tokens)
    rounding = (logits.double() - exact).nan_to_num().abs().amax(dim=-1)
    missing = exact.amax(dim=-1) - exact.gather(-1, tokens[..., None])[..., 0]
    wrong = other & (missing > rounding)
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise NoFigure(
            f"token {place} of row {row} is {int(tokens[row, place])}, but one machine writes "
            f"{int(best[row, place])}, whose logit is {float(missing[row, place]):.3g} more, where "
            f"float32 rounds by {float(rounding[row, place]):.3g}"
        )
    return int(other.sum())


@torch.inference_mode()
def _logits(model: Any, sequences: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
    """[rows, new tokens, vocabulary]: for every token behind the prompt, without forbidden ends."""
    logits: torch.Tensor = model(sequences, use_cache=False).logits[:, prompt_tokens - 1 : -1]
    end = model.generation_config.eos_token_id
    if end is not None:
        logits[..., end] = -torch.inf  # `min_new_tokens` forbids them
    return logits


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    names = [line.split(":", 1)[1].strip() for line in _cpu_info() if "model name" in line]
    commit = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")  # Linux only
    return path.read_text().splitlines() if path.exists() else []
