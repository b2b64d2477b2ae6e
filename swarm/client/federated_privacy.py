"""Steps of an optimizer that hide any single example, and how well: the only door to Opacus.

DP-SGD (Abadi et al., https://arxiv.org/abs/1607.00133): of each example the gradient is clipped,
Gaussian noise is added to their sum, and Opacus' accountant says what may be inferred after all.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swarm.errors import UsageError

if TYPE_CHECKING:
    from opacus.accountants import IAccountant

ACCOUNTANT = "prv"  # Gopi et al., https://arxiv.org/abs/2106.02848: tighter than "rdp"


@dataclass(frozen=True, slots=True)
class Privacy:
    """What is hidden. All that left a client until now, averages included, is (epsilon, delta)
    differentially private with respect to adding or removing one of its examples."""

    epsilon: float
    delta: float
    steps: int
    sample_rate: float
    noise: float  # standard deviation, in units of the norm that gradients are clipped to
    max_norm: float
    accountant: str = ACCOUNTANT

    def __str__(self) -> str:
        return (
            f"epsilon {self.epsilon:.2f} at delta {self.delta:g} after {self.steps} steps (sample "
            f"rate {self.sample_rate:g}, noise {self.noise:g}, gradients clipped to "
            f"{self.max_norm:g}, {self.accountant} accountant of Opacus)"
        )


class PrivateSteps:
    """Takes an optimizer's steps on `examples` examples of our own, of which each takes part with
    the probability `batch / examples` (Poisson sampling: what the accountant reckons with).

    Each example goes forward and backward by itself, as only so its gradient is known: through
    remote blocks that is a request for each. Nothing else may take steps, or compute with
    several examples at a time; initial parameters and settings must not come from them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        examples: int,
        batch: float,
        max_norm: float,
        noise: float,
        delta: float,
        seed: int | None = None,
    ) -> None:
        """`seed` is for tests: who knows it can take the noise away. Raises UsageError."""
        if not 0 < batch <= examples or not max_norm > 0 or not noise > 0 or not 0 < delta < 1:
            raise UsageError(
                "private steps need 0 < batch <= examples, max_norm and noise over 0, and a delta "
                "far below 1 / examples"
            )
        self._optimizer, self._examples, self._batch = optimizer, examples, batch
        self._max_norm, self._noise, self._delta = max_norm, noise, delta
        self._accountant = _accountant()
        self._generator = torch.Generator().manual_seed(
            secrets.randbits(63) if seed is None else seed
        )
        self._steps = 0

    @property
    def sample_rate(self) -> float:
        return self._batch / self._examples

    @property
    def parameters(self) -> list[Tensor]:
        groups = self._optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    def step(self, loss_of: Callable[[int], Tensor]) -> float:
        """One step on a sample of examples; `loss_of` gives the loss of one, by its number.

        Returns the mean of their losses (nan: nobody was drawn), which is not private.
        """
        drawn = torch.rand(self._examples, generator=self._generator) < self.sample_rate
        numbers: list[int] = drawn.nonzero().flatten().tolist()
        parameters = self.parameters
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        losses: list[float] = []
        for number in numbers:
            loss = loss_of(number)
            losses.append(float(loss.detach()))
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for sum_, part in zip(total, clipped(gradients, self._max_norm), strict=True):
                if part is not None:
                    sum_ += part
        deviation = self._noise * self._max_norm
        for parameter, sum_ in zip(parameters, total, strict=True):
            noise = torch.randn(sum_.shape, generator=self._generator).to(sum_.device)
            noisy = (sum_ + deviation * noise) / self._batch
            parameter.grad = noisy.to(parameter.dtype)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._accountant.step(noise_multiplier=self._noise, sample_rate=self.sample_rate)
        self._steps += 1
        return sum(losses) / len(losses) if losses else float("nan")

    def spent(self) -> Privacy:
        """What all steps until now have given away at most."""
        epsilon = self._accountant.get_epsilon(delta=self._delta) if self._steps else 0.0
        return Privacy(
            float(epsilon),
            self._delta,
            self._steps,
            self.sample_rate,
            self._noise,
            self._max_norm,
        )


def clipped(gradients: Sequence[Tensor | None], max_norm: float) -> list[Tensor | None]:
    """One example's, scaled down to a norm (L2, of all together) of at most `max_norm`; zeros, if
    it is not finite."""
    found = [gradient for gradient in gradients if gradient is not None]
    norm = float(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in found])))
    if not norm < float("inf"):
        return [None] * len(gradients)
    scale = min(1.0, max_norm / (norm + 1e-6))
    return [None if gradient is None else gradient.float() * scale for gradient in gradients]


def noise_for(epsilon: float, delta: float, *, sample_rate: float, steps: int) -> float:
    """The least noise with which so many steps keep to `epsilon`, by Opacus' own search."""
    _accountant()
    from opacus.accountants.utils import get_noise_multiplier

    return float(
        get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant=ACCOUNTANT,
        )
    )


def _accountant() -> IAccountant:
    try:
        from opacus.accountants import create_accountant
    except ImportError as error:
        raise UsageError(
            "Opacus is not installed: `pip install 'swarm-blocks[privacy]'`"
        ) from error
    accountant: Any = create_accountant(ACCOUNTANT)
    return accountant
