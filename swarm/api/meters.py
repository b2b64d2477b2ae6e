"""What the API counts of itself, for Prometheus: sums only, nothing of anybody."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from swarm.api.turns import Turns
from swarm.client import recoveries
from swarm.metrics import SECONDS, Family, Histogram, plain, render


@dataclass(slots=True)
class Meters:
    """Numbers of one process since its start."""

    answers: int = 0  # that were begun
    failures: int = 0  # of those
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refusals: Counter[int] = field(default_factory=Counter[int])  # by status
    first_token: Histogram = field(default_factory=lambda: Histogram(SECONDS))

    def began(self, prompt_tokens: int) -> None:
        self.answers += 1
        self.prompt_tokens += prompt_tokens

    def page(self, turns: Turns) -> bytes:
        """In Prometheus' format."""
        refused = [({"status": str(status)}, n) for status, n in sorted(self.refusals.items())]
        first = "Seconds from a request to its first token, waiting for its turn included"
        return render(
            [
                plain("swarm_api_answers_total", "counter", "Answers begun", self.answers),
                plain("swarm_api_failures_total", "counter", "Answers that broke", self.failures),
                Family("swarm_api_refusals_total", "counter", "Requests refused", refused),
                plain(
                    "swarm_api_prompt_tokens_total", "counter", "Tokens read", self.prompt_tokens
                ),
                plain(
                    "swarm_api_completion_tokens_total",
                    "counter",
                    "Tokens written",
                    self.completion_tokens,
                ),
                plain("swarm_api_streams", "gauge", "Texts being written", turns.taken),
                plain("swarm_api_waiting", "gauge", "Requests that wait", turns.waiting),
                Family(
                    "swarm_api_first_token_seconds", "histogram", first, [({}, self.first_token)]
                ),
                *recoveries.total.families(),
            ]
        )
