"""Tasks of lm-eval (the Language Model Evaluation Harness of EleutherAI) with every cache: for users who are online.

The harness is a package of its own, ``lm-eval``, and brings its data from the hub. Its model interface runs a model without
a cache that outlives a call; here every request has a fresh cache of the kind that is measured:

- ``generate_until``: the prompt but its last token is fed to the cache, and the rest decoded over what was kept of it.
- ``loglikelihood``: so is the context but its last token, and that token and the continuation are then read in one piece.
- ``loglikelihood_rolling`` reads a whole text in one piece, in which no cache takes part: such tasks are refused.

A prompt shorter than window and page is not compressed: few-shot prompts (``task.fewshot``) make it long enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from argus.errors import ConfigError
from argus.hookspecs import hookimpl
from argus.tasks.base import CacheKind, Row, Run, Task, TaskConfig
from argus.tasks.steps import feed, forward, ids_of, memory

PACKAGE = "lm_eval"
ACCURACIES = ("exact_match", "acc", "acc_norm", "em", "contains")
"""Metrics that are shares of right answers; the first that a task has is the row's accuracy."""


class HarnessConfig(TaskConfig):
    """Options of harness.

    ``tasks``: by the names that lm-eval gives them. ``fewshot``: examples before each question; null: the task's own number.
    ``limit``: questions of each task; null: all. ``include``: a folder with task files of one's own, or null.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("gsm8k",)
    fewshot: NonNegativeInt | None = None
    limit: PositiveInt | None = 50
    include: str | None = None


def language_model(run: Run, kind: CacheKind) -> Any:
    """The run's model as lm-eval takes it, with a fresh cache of `kind` for every request.

    Its attributes ``context`` and ``size`` are the tokens of the longest sequence so far and the memory of its cache.
    """
    from lm_eval.models.huggingface import HFLM

    class CachedModel(HFLM):  # type: ignore[misc]
        context = 0
        size: Row = {}  # noqa: RUF012

        @torch.inference_mode()
        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
            held = kind.make(run)
            if context.shape[1] > 1:
                forward(run, held, context[:, :-1])
            if held.get_seq_length() != context.shape[1] - 1:
                # Generation would go on at the tokens left, and read others twice.
                raise ConfigError("task=harness generates with caches that hold every token read; this one evicts some")
            out: Tensor = super()._model_generate(context, max_length, stop, past_key_values=held, **options)
            self._weigh(held)
            return out

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return [self._likelihood(context, continuation) for _, context, continuation in requests]

        def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
            """Log-likelihood of a continuation, and whether it is the greedy one."""
            held = kind.make(run)
            context = context[-(self.max_length - len(continuation) + 1) :]
            if len(context) > 1:
                forward(run, held, ids_of(run, context[:-1]))
            scores = feed(run, held, ids_of(run, [context[-1], *continuation[:-1]]), last=False).float().log_softmax(-1)
            self._weigh(held)
            targets = torch.tensor(continuation, device=scores.device)
            return float(scores.gather(1, targets[:, None]).sum()), bool((scores.argmax(-1) == targets).all())

        def _weigh(self, held: Any) -> None:
            if held.get_seq_length() > self.context:
                self.context, self.size = held.get_seq_length(), memory(kind.ledger(held))

        def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> list[float]:
            raise ConfigError("task.tasks: a task that scores whole texts asks nothing of a cache; use task=perplexity instead")

    return CachedModel(pretrained=run.model, tokenizer=run.tokenizer, batch_size=1)


def known_tasks(config: HarnessConfig) -> Any:
    """lm-eval's list of tasks, with those of the user.

    Raises
    ------
    ConfigError
        If lm-eval is not installed or does not know a task.
    """
    if find_spec(PACKAGE) is None:
        raise ConfigError("task=harness needs lm-eval, which is not installed; pip install lm-eval")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.include)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            raise ConfigError(f"task.tasks: lm-eval has no task '{name}'; allowed: what 'lm-eval ls tasks' lists")
    return manager


def accuracy(metrics: Mapping[str, float]) -> float | None:
    """The share of right answers among lm-eval's ``metric,filter`` names; None where it counts something else."""
    named = [(name.split(",")[0], value) for name, value in metrics.items()]
    return next((value for wanted in ACCURACIES for name, value in named if name == wanted), None)


class Harness(Task):
    """One row a cache and task of lm-eval; its memory is that of the longest sequence."""

    Config = HarnessConfig

    def run(self, run: Run) -> Iterator[Row]:
        config: HarnessConfig = self.config
        manager = known_tasks(config)
        from lm_eval import simple_evaluate

        for name, kind in run.caches.items():
            for task in config.tasks:
                run.tell(f"harness: {task}, {name}")
                model = language_model(run, kind)
                try:
                    found = simple_evaluate(
                        model,
                        tasks=[task],
                        num_fewshot=config.fewshot,
                        limit=config.limit,
                        task_manager=manager,
                        log_samples=False,
                    )
                except OSError as error:
                    raise ConfigError(f"lm-eval cannot load task '{task}': {str(error).strip().splitlines()[0]}") from error
                for part, figures in found["results"].items():
                    metrics = {key: value for key, value in figures.items() if isinstance(value, int | float)}
                    samples = found["n-samples"].get(part, {}).get("effective")
                    yield {
                        "task": "harness",
                        "kind": part,
                        "cache": name,
                        "context": model.context,
                        "accuracy": accuracy(metrics) if samples else None,
                        "samples": samples,
                        "metrics": metrics,
                        **model.size,
                    }


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"harness": Harness}
