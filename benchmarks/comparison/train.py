"""Train one model of the comparison: ``python -m benchmarks.comparison.train --model transformer --minutes 4``.

Every sequence is new. Short sequences come first, then all lengths up to the longest. The step size reaches zero when the
tokens or the minutes are spent, whichever is first.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.comparison import data, models

WARM_UP, COOL_DOWN = 0.02, 0.5
"""Shares of the budget in which the step size rises from zero, and falls to zero."""
CURRICULUM = ((0.25, 64), (0.45, 256))
"""Until this share of the budget, no sequence is longer than this."""

SPACINGS = (4, 8, 16)
"""Tokens a pair in training; all pairs are asked for, so that dense sequences teach more."""


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(models.KINDS), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--tokens", type=float, default=4e7, help="tokens to train on, at most")
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest sequences")
    parser.add_argument("--rate", type=float, default=2e-3, help="largest step size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=models.WEIGHTS)
    return parser.parse_args(words)


def logits_of_answers(model: Any, batch: data.Batch) -> Tensor:
    """``[B, Q, V]``: what the model says after each question, the answers before it given."""
    hidden = model(batch.tokens[:, :-1], use_cache=False, logits_to_keep=batch.tokens.shape[1] - 1 - batch.context)
    return hidden.logits[:, ::2]


def loss_of(model: Any, batch: data.Batch) -> Tensor:
    """Mean negative log-likelihood of the answers, nats."""
    return cross_entropy(logits_of_answers(model, batch).float().flatten(0, 1), batch.answers.flatten())


@torch.no_grad()
def accuracy(model: Any, batch: data.Batch) -> float:
    """Share of answers that are the likeliest token."""
    return float((logits_of_answers(model, batch).argmax(-1) == batch.answers).float().mean())


def lengths_at(spent: float, longest: int) -> list[int]:
    """Lengths of sequences when this share of the budget is spent."""
    most = next((length for until, length in CURRICULUM if spent < until), longest)
    return [2**power for power in range(6, 12) if 2**power <= min(most, longest)]


def rate_at(spent: float) -> float:
    """Share of the largest step size: up from zero, then down to zero."""
    return min(1.0, spent / WARM_UP, (1.0 - spent) / COOL_DOWN)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, keep the weights that recall best on held-out sequences, write them, and return the facts."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model = models.KINDS[options.model](**({"use_mambapy": True} if options.model == "mamba" else {})).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    pick = random.Random(options.seed)
    held_out = [data.exam(n, 16, options.seed, options.device) for n in data.LENGTHS if n <= options.longest]
    best, kept = (-1.0, 0), copy.deepcopy(model.state_dict())
    start = told = time.perf_counter()
    tokens = steps = skipped = 0
    loss = float("nan")

    def check() -> None:
        nonlocal best, kept
        shares = [accuracy(model, batch) for batch in held_out]
        mean = sum(shares) / len(shares)
        if mean >= best[0]:
            best, kept = (mean, tokens), copy.deepcopy(model.state_dict())
        shown = " ".join(f"{share:.2f}" for share in shares)
        clock = time.perf_counter() - start
        print(f"{options.model} {clock:5.0f} s {steps:6d} steps {tokens:.3g} tokens loss {loss:.4f} recall {shown}", flush=True)

    model.train()  # Neither model has dropout, and transformers scans in parallel in this mode only.
    while (spent := max(tokens / options.tokens, (time.perf_counter() - start) / (60 * options.minutes))) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate_at(spent)
        length = pick.choice(lengths_at(spent, options.longest))
        pairs = min(data.most_pairs(length), length // pick.choice(SPACINGS))
        batch = data.draw(length, max(1, options.batch // length), generator, pairs, pairs)
        value = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        tokens, steps = tokens + batch.tokens.numel(), steps + 1
        if time.perf_counter() - told > 10:
            loss, told = float(value.detach()), time.perf_counter()
            check()
    loss = float(value.detach())
    check()
    model.load_state_dict(kept)
    facts = {
        "model": options.model,
        "command": shlex.join(["python", "-m", "benchmarks.comparison.train", *sys.argv[1:]]),
        "parameters": models.parameters(model),
        "tokens": tokens,
        "tokens_of_kept_weights": best[1],
        "steps": steps,
        "steps_skipped": skipped,
        "seconds": round(time.perf_counter() - start, 1),
        "last_loss_nats": round(loss, 5),
        "held_out_recall": round(best[0], 4),
        "longest": options.longest,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        "python": platform.python_version(),
    }
    models.save(model, options.model, facts, options.out)
    return facts


if __name__ == "__main__":
    train(options_of())
