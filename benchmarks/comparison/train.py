"""Train one model of the comparison: ``python -m benchmarks.comparison.train --model transformer --minutes 3``.

Every sequence is new. Sequences begin short, of few different pairs that are asked for again and again, and grow whenever the
model recalls them. The step size reaches zero when the tokens or the minutes are spent, whichever is first.
"""

from __future__ import annotations

import argparse
import copy
import platform
import random
import shlex
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.comparison import data, models

WARM_UP, COOL_DOWN = 0.01, 0.3
"""Shares of the budget in which the step size rises from zero, and falls to zero."""
PASS = 0.9
"""Recall of the latest training sequences that ends a stage."""
MEMORY = 0.95
"""Weight of what came before in that mean, a step."""
MOST_ASKED = 128
"""Questions a training sequence, at most."""


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes
    ----------
    length : int
        Tokens of the longest sequences.
    known : int
        Keys to draw from.
    spacings : tuple of int
        Tokens a pair.
    until : float
        Share of the budget at which the stage ends, however little is recalled.
    """

    length: int
    known: int
    spacings: tuple[int, ...]
    until: float


STAGES = (
    Stage(64, 32, (8, 16, 32), 0.5),
    Stage(64, data.KEYS, (4, 8, 16), 0.6),
    Stage(256, data.KEYS, (4, 8, 16), 0.7),
    Stage(2048, data.KEYS, (8, 16, 32), 1.0),
)


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(models.KINDS), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--tokens", type=float, default=1e9, help="tokens to train on, at most")
    parser.add_argument("--batch", type=int, default=16384, help="tokens a step")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest sequences")
    parser.add_argument("--rate", type=float, default=2e-3, help="largest step size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=models.WEIGHTS)
    return parser.parse_args(words)


def logits_of_answers(model: Any, batch: data.Batch) -> Tensor:
    """``[B, Q, V]``: what the model says after each question, the answers before it given."""
    hidden = model(batch.tokens[:, :-1], use_cache=False, logits_to_keep=batch.tokens.shape[1] - 1 - batch.context)
    return hidden.logits[:, ::2]


def loss_of(logits: Tensor, batch: data.Batch) -> Tensor:
    """Mean negative log-likelihood of the answers, nats, by logits ``[B, Q, V]``."""
    return cross_entropy(logits.flatten(0, 1), batch.answers.flatten())


def recall_of(logits: Tensor, batch: data.Batch) -> Tensor:
    """Share of answers that are the likeliest token, by logits ``[B, Q, V]``."""
    return (logits.argmax(-1) == batch.answers).float().mean()


@torch.no_grad()
def accuracy(model: Any, batch: data.Batch) -> float:
    """Share of answers that are the model's likeliest token."""
    return float(recall_of(logits_of_answers(model, batch), batch))


def lengths_of(stage: Stage, longest: int) -> list[int]:
    """Lengths of a stage's sequences: powers of two."""
    return [2**power for power in range(6, 12) if 2**power <= min(stage.length, longest)]


def lesson(stage: Stage, options: argparse.Namespace, pick: random.Random, generator: torch.Generator) -> data.Batch:
    """New sequences of a stage, all of one length: one question a pair, or as many as there is room for."""
    length = pick.choice(lengths_of(stage, options.longest))
    pairs = min(data.most_pairs(length), length // pick.choice(stage.spacings))
    room = data.most_asked(length, pairs)
    asked = min(MOST_ASKED, room if stage == STAGES[0] else pick.choice((pairs, room)))
    return data.draw(length, max(1, options.batch // length), generator, pairs, asked, stage.known)


def rate_at(spent: float) -> float:
    """Share of the largest step size: up from zero, then down to zero."""
    return min(1.0, spent / WARM_UP, (1.0 - spent) / COOL_DOWN)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, keep the weights that recall best on held-out sequences, write them, and return the facts."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model = models.KINDS[options.model]().to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    pick = random.Random(options.seed)
    held_out = {n: data.exam(n, 16, options.seed, options.device) for n in data.LENGTHS if n <= options.longest}
    best: dict[int, float] = {}
    kept, curve, passed = copy.deepcopy(model.state_dict()), [], []
    start = told = time.perf_counter()
    stage = tokens = steps = skipped = 0
    loss, recent = torch.tensor(float("nan")), torch.zeros((), device=options.device)

    def seconds() -> float:
        return round(time.perf_counter() - start, 1)

    def check() -> None:
        nonlocal best, kept
        shares = {length: round(accuracy(model, batch), 4) for length, batch in held_out.items()}
        if sum(shares.values()) >= sum(best.values()):
            best, kept = shares, copy.deepcopy(model.state_dict())
        curve.append({"seconds": seconds(), "steps": steps, "tokens": tokens, "stage": stage, "recall": list(shares.values())})
        shown = " ".join(f"{share:.2f}" for share in shares.values())
        clock = f"{options.model} {seconds():5.0f} s {steps:6d} steps {tokens / 1e6:7.2f} M tokens stage {stage}"
        print(f"{clock} loss {float(loss):.4f} recent {float(recent):.3f} recall {shown}", flush=True)

    while (spent := max(tokens / options.tokens, seconds() / (60 * options.minutes))) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate_at(spent)
        batch = lesson(STAGES[stage], options, pick, generator)
        logits = logits_of_answers(model, batch).float()
        value = loss_of(logits, batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        else:
            skipped += 1
        loss, tokens, steps = value.detach(), tokens + batch.tokens.numel(), steps + 1
        recent = MEMORY * recent + (1 - MEMORY) * recall_of(logits, batch)
        if stage + 1 < len(STAGES) and (spent > STAGES[stage].until or (steps % 20 == 0 and float(recent) > PASS)):
            reached = {"stage": stage, "recall": round(float(recent), 4)}
            passed.append({**reached, "steps": steps, "tokens": tokens, "seconds": seconds()})
            stage, recent = stage + 1, torch.zeros_like(recent)
        if time.perf_counter() - told > 10:
            check()
            told = time.perf_counter()
    check()
    model.load_state_dict(kept)
    facts = {
        "model": options.model,
        "command": shlex.join(["python", "-m", "benchmarks.comparison.train", *sys.argv[1:]]),
        "parameters": models.parameters(model),
        "tokens": tokens,
        "steps": steps,
        "steps_skipped": skipped,
        "seconds": seconds(),
        "last_loss_nats": round(float(loss), 5),
        "held_out_recall": {str(length): share for length, share in best.items()},
        "stages": passed,
        "curve": curve,
        "longest": options.longest,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        "python": platform.python_version(),
    }
    models.save(model, options.model, facts, options.out)
    return facts


if __name__ == "__main__":
    train(options_of())
