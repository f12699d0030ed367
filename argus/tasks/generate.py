"""Generation: a prompt, its continuation as it streams, and how much it repeats itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import PositiveInt

from argus.errors import ConfigError
from argus.hookspecs import hookimpl
from argus.tasks.base import Row, Run, Task, TaskConfig
from argus.tasks.steps import Clock, feed, ids_of, memory

CUT = "\ufffd"
"""How a tokenizer tells a letter of which only some bytes are there: other tokens bring the rest."""


class GenerateConfig(TaskConfig):
    """Options of generate: the prompt, tokens to decode, and the orders of the n-grams counted."""

    prompt: str = "Write a short story about a lighthouse keeper who finds a message in a bottle."
    tokens: PositiveInt = 128
    orders: tuple[PositiveInt, ...] = (1, 2, 3)


def distinct(tokens: Sequence[int], order: int) -> float:
    """Distinct n-grams over all n-grams (Li et al. 2016, arXiv:1510.03055); 1 where there are none."""
    grams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def prompt_ids(run: Run, prompt: str) -> list[int]:
    """Token ids of a prompt, as a turn of a conversation where the tokenizer has a template for it.

    Raises
    ------
    ConfigError
        If there are none.
    """
    if getattr(run.tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = run.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = list(run.tokenizer(text, add_special_tokens=False).input_ids)
    else:
        ids = list(run.tokenizer(prompt).input_ids)
    if not ids:
        raise ConfigError(f"prompt {prompt!r} has no token; allowed: one that has")
    return ids


def stop_ids(run: Run) -> list[int]:
    """Tokens that end a text of the model."""
    stops = run.model.generation_config.eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or ())


class Generate(Task):
    """Greedy continuation with every cache."""

    Config = GenerateConfig

    def run(self, run: Run) -> Iterator[Row]:
        ids, stops = prompt_ids(run, self.config.prompt), stop_ids(run)
        for name, kind in run.caches.items():
            held, clock = kind.make(run), Clock(run.device)
            run.tell(f"generate: {name}")
            out: list[int] = []
            shown = ""
            logits = feed(run, held, ids_of(run, ids))
            while len(out) < self.config.tokens:
                out.append(int(logits.argmax()))
                if out[-1] in stops:
                    break
                text = run.tokenizer.decode(out)
                if not text.endswith(CUT):
                    run.show(text[len(shown) :])
                    shown = text
                with clock.timed():
                    logits = feed(run, held, ids_of(run, out[-1:]))
            run.show("\n")
            yield {
                "task": "generate",
                "cache": name,
                "context": len(ids) + len(out) - (out[-1] in stops),
                "text": run.tokenizer.decode(out),
                **{f"distinct_{order}": distinct(out, order) for order in self.config.orders},
                **memory(kind.ledger(held)),
                "decode_tokens_per_s": 1 / clock.median if clock.seconds else None,
            }


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"generate": Generate}
