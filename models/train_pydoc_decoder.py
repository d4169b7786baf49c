"""Train ``pydoc_decoder`` on the Python help topics: ``python -m qgraph.models.train_pydoc_decoder``.

Needs torch. About a quarter of an hour on one free core. Prints the learning curve and writes the checkpoint.
"""

from __future__ import annotations

import math
import time

import torch
from torch import nn
from torch.nn import functional

from qgraph.models import corpus, training
from qgraph.models.pydoc_decoder import NAME, REFERENCE_PROMPT, SHAPE, WINDOW, Shape

SEED = 7
STEPS = 1200
BATCH = 4
EVALUATION_BATCH = 16
PEAK_RATE = 2e-3
THREADS = 1
WARMUP = 80
WEIGHT_DECAY = 0.1
REPORT_EVERY = 100


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._epsilon) * self.weight


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding, halves split as Llama checkpoints on Hugging Face have it."""
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        shape = self._shape
        q, k, v = (
            projection(x).view(batch, length, -1, shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        repeats = shape.heads // shape.kv_heads
        k = rotate(k, cosine, sine).repeat_interleave(repeats, dim=1)
        v = v.repeat_interleave(repeats, dim=1)
        mixed = functional.scaled_dot_product_attention(rotate(q, cosine, sine), k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.down_proj = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.epsilon)
        self.mlp = FeedForward(shape)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The torch counterpart of :func:`qgraph.models.pydoc_decoder.build`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.epsilon)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if residual else 0.02)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        half = self._shape.head_dim // 2
        frequency = self._shape.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.arange(input_ids.shape[1], dtype=torch.float32)[:, None] * frequency
        angle = torch.cat((angle, angle), dim=-1)
        cosine, sine = angle.cos(), angle.sin()
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return functional.linear(self.norm(x), self.embed_tokens.weight)


def held_out_bits(model: Decoder, count: int | None = None) -> float:
    """Return the mean bits per byte over ``count`` held-out windows, or all of them."""
    parts = corpus.next_byte_windows(corpus.held_out_text(), WINDOW, count)
    inputs, labels = (torch.from_numpy(part) for part in parts)
    model.eval()
    with torch.no_grad():
        losses = [
            functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
            for x, y in zip(inputs.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
        ]
    model.train()
    return float(torch.cat(losses).mean()) / math.log(2)


def train(model: Decoder, steps: int, generator: torch.Generator) -> None:
    """Train ``model`` in place on random windows of the training text."""
    data = torch.frombuffer(bytearray(corpus.training_text()), dtype=torch.uint8).long()
    optimizer = training.optimizer(model, WEIGHT_DECAY, (0.9, 0.98))
    rate = training.LearningRate(optimizer, PEAK_RATE, WARMUP, steps)
    began = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        rate.set(step)
        starts = torch.randint(len(data) - WINDOW, (BATCH, 1), generator=generator)
        tokens = data[starts + torch.arange(WINDOW + 1)]
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item() / math.log(2))
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            training.say(
                f"step {step + 1}/{steps}  train {sum(recent) / len(recent):.4f}  "
                f"held out {held_out_bits(model, 32):.4f} "
                f"bits per byte (32 windows)  {time.monotonic() - began:.0f} s"
            )
            recent.clear()


def main() -> None:
    """Train with the arguments of the command line and write the checkpoint."""
    arguments = training.parse_arguments(NAME, STEPS, SEED, THREADS)
    generator = training.prepare(arguments.seed, arguments.threads)
    model = Decoder(SHAPE)
    training.say(f"{sum(p.numel() for p in model.parameters())} parameters")
    train(model, arguments.steps, generator)
    prompt = torch.tensor([list(REFERENCE_PROMPT)])
    training.save_rounded(arguments.output, model, prompt)
    training.say(f"stored in half precision: held out {held_out_bits(model):.4f} bits per byte")


if __name__ == "__main__":
    main()
