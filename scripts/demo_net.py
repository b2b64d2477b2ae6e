"""Llama's architecture for training on a CPU core or two, and the optimizer (Muon and AdamW).

Written out here, not taken from transformers, so that one compiled block serves all depths and
the matrices of all blocks lie in one tensor: training starts shallow, where tokens are cheap, and
copies its blocks later; Muon (Jordan et al., 2024) treats each kind of matrix as one batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """The model's sizes, in the words of LlamaConfig."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 512
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    num_hidden_layers: int = 24
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class Rates:
    """Peak learning rates; the decay is per step, times Muon's rate."""

    muon: float = 0.02
    adam: float = 0.004
    weight_decay: float = 0.1


COPY_SHARE = 0.05


class Net(torch.nn.Module):
    """Llama with each kind of matrix of all blocks in one tensor [blocks, out, in]."""

    KINDS = ("q", "k", "v", "o", "gate", "up", "down")

    def __init__(self, shape: Shape, blocks: int) -> None:
        super().__init__()
        self.shape = shape
        h, m, kv = (
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_key_value_heads * shape.head_dim,
        )
        sizes = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}
        sizes |= {"gate": (m, h), "up": (m, h), "down": (h, m)}
        self.matrices = torch.nn.ParameterDict(
            {
                kind: torch.randn(blocks, out, inner)
                * (0.0 if kind in ("o", "down") else 0.5 * inner**-0.5)
                for kind, (out, inner) in sizes.items()
            }
        )
        self.norms = torch.nn.Parameter(torch.ones(blocks, 2, h))
        self.final_norm = torch.nn.Parameter(torch.ones(h))
        self.embedding = torch.nn.Parameter(torch.randn(shape.vocab_size, h) * 0.02)

    @property
    def blocks(self) -> int:
        return self.norms.shape[0]

    def grow(self, blocks: int) -> None:
        """Put copies after each block; each copy takes over a little of the block's output.

        Tried on six blocks made 24: the loss rises by 0.006 nats with 5 % for each copy, by 0.04
        with 10 %, by 0.9 with equal shares.
        """
        times = blocks // self.blocks
        for kind in self.KINDS:
            grown = self.matrices[kind].detach().repeat_interleave(times, 0)
            if kind in ("o", "down"):
                first = torch.arange(blocks)[:, None, None] % times == 0
                grown *= torch.where(first, 1 - COPY_SHARE * (times - 1), COPY_SHARE)
            self.matrices.update({kind: torch.nn.Parameter(grown)})
        self.norms = torch.nn.Parameter(self.norms.detach().repeat_interleave(times, 0))

    def tensors(self) -> dict[str, Tensor]:
        """The weights under the names that LlamaForCausalLM gives them."""
        places = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
        places |= {"o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
        places |= {"down": "mlp.down_proj"}
        named: dict[str, Tensor] = {"embed_tokens": self.embedding, "norm": self.final_norm}
        for i in range(self.blocks):
            named[f"layers.{i}.input_layernorm"] = self.norms[i, 0]
            named[f"layers.{i}.post_attention_layernorm"] = self.norms[i, 1]
            for kind, place in places.items():
                named[f"layers.{i}.{place}"] = self.matrices[kind][i]
        return {f"model.{name}.weight": t.detach().clone() for name, t in named.items()}

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets[B, T] after tokens[B, T]."""
        x = functional.embedding(tokens, self.embedding)
        cos, sin = rotary(tokens.shape[1], self.shape)
        columns = [self.matrices[kind].bfloat16().unbind(0) for kind in self.KINDS]
        for norms, *weights in zip(self.norms.unbind(0), *columns, strict=True):
            x = block(x, norms, weights, cos, sin)
        return loss(x, self.final_norm, self.embedding, targets)


def rotary(length: int, shape: Shape) -> tuple[Tensor, Tensor]:
    inverse = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = torch.outer(torch.arange(length), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight).bfloat16()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x[B, heads, T, dim] by its positions, the halves as Hugging Face lays them out."""
    a, b = x.float().chunk(2, -1)
    return (torch.cat((a, b), -1) * cos + torch.cat((-b, a), -1) * sin).bfloat16()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention; at short lengths plain products beat the CPU's flash kernel by 15 %."""
    length = query.shape[2]
    if length > 256:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    mask = torch.full((length, length), -1e30).triu(1)
    scores = (query @ key.mT).float() * query.shape[-1] ** -0.5 + mask
    return scores.softmax(-1).bfloat16() @ value


@torch.compile(dynamic=False)
def block(x: Tensor, norms: Tensor, weights: list[Tensor], cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v, o, gate, up, down = weights
    batch, length, hidden = x.shape
    dim = cos.shape[-1]
    y = norm(x, norms[0])
    heads = [
        functional.linear(y, w).view(batch, length, -1, dim).transpose(1, 2) for w in (q, k, v)
    ]
    query, key, value = turn(heads[0], cos, sin), turn(heads[1], cos, sin), heads[2]
    times = query.shape[1] // key.shape[1]
    y = attend(query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))
    x = x + functional.linear(y.transpose(1, 2).reshape(batch, length, hidden), o)
    y = norm(x, norms[1])
    return x + functional.linear(
        functional.silu(functional.linear(y, gate)) * functional.linear(y, up), down
    )


@torch.compile(dynamic=False)
def loss(x: Tensor, weight: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    logits = functional.linear(norm(x, weight), embedding.bfloat16())
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def orthogonalize(update: Tensor) -> Tensor:
    """Muon's Newton-Schulz iteration on update[blocks, out, in], in bfloat16."""
    x = update.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return (x if wide else x.mT).float()


class Optimizer:
    """Muon for the matrices, AdamW for embedding and norms; both rates times one factor."""

    def __init__(self, net: Net, rates: Rates) -> None:
        self.net, self.rates = net, rates
        self.momentum = {k: torch.zeros_like(m) for k, m in net.matrices.items()}
        rest = [net.embedding, net.final_norm, net.norms]
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, factor: float) -> None:
        self.adam.param_groups[0]["lr"] = self.rates.adam * factor
        self.adam.step()
        self.adam.zero_grad()
        rate = self.rates.muon * factor
        with torch.no_grad():
            for kind, matrix in self.net.matrices.items():
                assert matrix.grad is not None
                momentum = self.momentum[kind].lerp_(matrix.grad, 0.05)
                update = orthogonalize(matrix.grad.lerp(momentum, 0.95))
                scale = max(1.0, matrix.shape[1] / matrix.shape[2]) ** 0.5
                matrix.mul_(1 - rate * self.rates.weight_decay)
                matrix.add_(update, alpha=-rate * scale)
                matrix.grad = None

    def grow(self, blocks: int) -> None:
        """Grow the net; each copy starts with its original's momentum."""
        times = blocks // self.net.blocks
        old = self.adam.state.pop(self.net.norms)
        self.net.grow(blocks)
        self.momentum = {k: m.repeat_interleave(times, 0) for k, m in self.momentum.items()}
        state = {k: old[k].repeat_interleave(times, 0) for k in ("exp_avg", "exp_avg_sq")}
        self.adam.param_groups[0]["params"][2] = self.net.norms
        self.adam.state[self.net.norms] = state | {"step": old["step"]}
