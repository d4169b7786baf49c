"""The training loop that the two digit classifiers share. Needs torch and scikit-learn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from qgraph.models import data, training

__all__ = ["train"]

BATCH = 64
THREADS = 1
TRAINING_IMAGES = 1197
WARMUP = 50
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.05
REPORT_EVERY = 100
REFERENCE_IMAGES = 4


def train(name: str, make: Callable[[], torch.nn.Module], steps: int, seed: int, peak_rate: float) -> None:
    """Read the command line (defaults given here), train what ``make`` returns and write its checkpoint."""
    arguments = training.parse_arguments(name, steps, seed, THREADS)
    generator = training.prepare(arguments.seed, arguments.threads)
    model = make()
    training.say(f"{sum(p.numel() for p in model.parameters())} parameters")
    _fit(model, arguments.steps, peak_rate, generator)
    held_out, _ = data.digits(slice(TRAINING_IMAGES, TRAINING_IMAGES + REFERENCE_IMAGES))
    training.save_rounded(arguments.output, model, torch.tensor(held_out))
    loss, accuracy = _held_out(model)
    training.say(f"stored in half precision: held out loss {loss:.4f}, accuracy {accuracy:.2%}")


def _fit(model: torch.nn.Module, steps: int, peak_rate: float, generator: torch.Generator) -> None:
    images, labels = (torch.tensor(part) for part in data.digits(slice(TRAINING_IMAGES)))
    optimizer = training.optimizer(model, WEIGHT_DECAY, (0.9, 0.999))
    rate = training.LearningRate(optimizer, peak_rate, WARMUP, steps)
    began = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        rate.set(step)
        chosen = torch.randint(TRAINING_IMAGES, (BATCH,), generator=generator)
        logits = model(_augment(images[chosen], generator))
        loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            held_out_loss, accuracy = _held_out(model)
            training.say(
                f"step {step + 1}/{steps}  train loss {sum(recent) / len(recent):.4f} (smoothed, augmented)  "
                f"held out loss {held_out_loss:.4f}, accuracy {accuracy:.2%}  {time.monotonic() - began:.0f} s"
            )
            recent.clear()


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn by up to 10 degrees, scale by up to 10 %, shift by up to a pixel and add noise to the ink."""
    count = len(images)

    def uniform(bound: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * bound

    angle, scale = uniform(math.radians(10)), 1 + uniform(0.1)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    # The grid spans -1..1 over 8 pixels, so one pixel is 0.25.
    rows = torch.stack((cosine, -sine, uniform(0.25), sine, cosine, uniform(0.25)), dim=1).view(count, 2, 3)
    grid = functional.affine_grid(rows, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return (moved + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _held_out(model: torch.nn.Module) -> tuple[float, float]:
    images, labels = (torch.tensor(part) for part in data.digits(slice(TRAINING_IMAGES, None)))
    model.eval()
    with torch.no_grad():
        logits = model(images)
    model.train()
    return float(functional.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())
