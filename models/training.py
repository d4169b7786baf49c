"""What the training scripts share. Imports torch: neither the builders nor the tests need it."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from qgraph.models import checkpoint

__all__ = ["LearningRate", "optimizer", "parse_arguments", "prepare", "save_rounded", "say"]


class LearningRate:
    """Linear warm-up, then half a cosine down to zero, in one call per step."""

    def __init__(self, optimizer: torch.optim.Optimizer, peak: float, warmup: int, steps: int) -> None:
        self._optimizer = optimizer
        self._peak = peak
        self._warmup = warmup
        self._steps = steps

    def set(self, step: int) -> None:
        """Set the rate of ``step`` (counted from 0) in the optimizer."""
        if step < self._warmup:
            factor = (step + 1) / self._warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - self._warmup) / (self._steps - self._warmup)))
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak * factor


def parse_arguments(name: str, steps: int, seed: int, threads: int) -> argparse.Namespace:
    """Read ``-o FILE``, ``--steps``, ``--seed`` and ``--threads`` from the command line."""
    parser = argparse.ArgumentParser(description=f"Train the reference model {name} and write its checkpoint.")
    parser.add_argument("-o", "--output", type=Path, default=checkpoint.path(name), help="checkpoint to write")
    parser.add_argument("--steps", type=int, default=steps, help="batches to train on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=seed, help="default %(default)s")
    parser.add_argument("--threads", type=int, default=threads, help="part of the result (default %(default)s)")
    return parser.parse_args()


def prepare(seed: int, threads: int) -> torch.Generator:
    """Make this process repeatable and return the generator that draws the data."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(mode=True)
    return torch.Generator().manual_seed(seed + 1)


def optimizer(model: torch.nn.Module, weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter, 2019) that decays matrices and kernels, but no gains and biases."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=betas)


def save_rounded(file: Path, model: torch.nn.Module, reference_input: torch.Tensor) -> None:
    """Round the parameters of ``model`` to half precision in place and save them with its answer to one input.

    The statistics of batch norm are rounded as well. What ``model`` measures afterwards is what the checkpoint holds.
    """
    parameters = {}
    for key, tensor in model.state_dict().items():  # these share memory with the model, without gradients
        if tensor.is_floating_point():
            half = tensor.half()
            tensor.copy_(half)
            parameters[key] = half.numpy()
    model.eval()
    with torch.no_grad():
        logits = model(reference_input)
    checkpoint.save(file, parameters, reference_input.numpy(), logits.numpy())


def say(line: str) -> None:
    """Write one line of progress at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
