"""Policies: pure functions over what is known. They decide; only the engine moves anything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from argus.errors import ArgusError

UNKNOWN = -1
"""Stands for a token that is not known, or of which only the embedding is."""
RECENT = 32
"""Query tokens of a call that policies are told of, at most."""


class PolicyConfig(BaseModel):
    """Options of a policy. Subclass it to add your own; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class PageFacts:
    """What an aging policy knows of a page.

    Attributes
    ----------
    age : int
        Pages between it and the newest page, which has age 0.
    stage : int or None
        Its place in the ladder; None: the page has just left the window.
    salience : float
        How much the queries asked for it when it left the window: the log-sum-exp of its scores, averaged over all of them
        and over heads and batch rows. 0 where the policy does not ask for it, or no query was there.
    """

    age: int
    stage: int | None
    salience: float = 0.0


@dataclass(frozen=True)
class StageFacts:
    """What an aging policy knows of a stage: its name and how many pages it may hold (None: any number)."""

    name: str
    capacity: int | None


@dataclass(frozen=True)
class TextFacts:
    """What is known of the text and its tokenizer: the token ids that end a line."""

    line_ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class NewPages:
    """Pages that have just left the window, exact still.

    Batch rows may be those of several layers side by side, or several such blocks of pages, so each is chosen for by itself.

    Attributes
    ----------
    keys, values : Tensor
        ``[n, B, H, P, D]`` float32.
    positions : Tensor
        ``[n, B, P]`` int64 positions in tokens.
    padding : Tensor
        ``[B]`` int64, how many tokens of each row are padding on the left.
    tokens : Tensor or None
        ``[B, T]`` token ids from a row's first position on, ``T >= n * P``, :data:`UNKNOWN` where one is not known; None: none
        is.
    taken : Tensor
        ``[n, B, H, P]`` bool, tokens that another policy keeps exact already.
    queries : Tensor or None
        ``[B, H, R, D]`` float32, times the softmax scale: the newest queries of the call that wrote last, at most
        :data:`RECENT` tokens of them, by key-value head. None where no policy asks for them, or there were none.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    padding: Tensor
    tokens: Tensor | None
    taken: Tensor
    queries: Tensor | None = None


def scale(stages: Sequence[StageFacts], factor: float) -> list[StageFacts]:
    """Stages of `factor` times their capacity; where stages end is rounded, so that few pages move at once."""
    scaled, end = [], 0.0
    for stage in stages:
        if stage.capacity is not None:
            begin, end = end, end + stage.capacity * factor
            stage = replace(stage, capacity=round(end) - round(begin))
        scaled.append(stage)
    return scaled


class Aging(ABC):
    """Decides which stage each page belongs to."""

    Config: ClassVar[type[PolicyConfig]] = PolicyConfig
    needs_queries: ClassVar[bool] = False
    """Whether it asks for pages' salience."""

    def __init__(self, config: PolicyConfig) -> None:
        self.config: Any = config

    @abstractmethod
    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        """The stage of each page, oldest page first; never below the stage that it is in."""

    def scaled(self, stages: Sequence[StageFacts], factor: float) -> tuple[Aging, list[StageFacts]]:
        """The policy and stages with which all stages but the last hold `factor` times as many pages, to meet a byte budget.

        By default the stages' capacities are scaled, as fits every policy that fills stages to them; a policy that goes by
        something else scales that.
        """
        return self, scale(stages, factor)


class Anchors(ABC):
    """Chooses tokens that stay exact for good."""

    Config: ClassVar[type[PolicyConfig]] = PolicyConfig
    needs_tokens: ClassVar[bool] = False
    """Whether token ids must be known."""
    needs_queries: ClassVar[bool] = False
    """Whether it asks for the newest queries."""

    def __init__(self, config: PolicyConfig, text: TextFacts) -> None:
        self.config: Any = config
        self.text = text

    @abstractmethod
    def choose(self, pages: NewPages) -> Tensor:
        """Tokens to keep exact, bool, broadcastable to ``[n, B, H, P]``."""


class Outliers(ABC):
    """Chooses numbers that stay exact for good."""

    Config: ClassVar[type[PolicyConfig]] = PolicyConfig

    def __init__(self, config: PolicyConfig) -> None:
        self.config: Any = config

    @abstractmethod
    def choose(self, x: Tensor, role: str) -> Tensor | None:
        """Numbers of pages ``[n, B, H, P, D]`` to keep exact, bool of that shape; None: none, ever."""


def check_targets(stages: Sequence[int | None], targets: Any, count: int, first: int = 0) -> None:
    """Raise :class:`ArgusError` unless an aging policy's answer for pages `first` on has a stage for each, none further back.

    A stage is an ``int``, and the answer a list or tuple of them.
    """
    if not isinstance(targets, list | tuple):
        raise ArgusError(f"the aging policy answers with a {type(targets).__name__}; allowed: a list of one stage a page")
    if len(targets) != len(stages):
        raise ArgusError(f"the aging policy gives {len(targets)} stages for {len(stages)} pages; allowed: one a page")
    for page, (stage, target) in enumerate(zip(stages, targets, strict=True), first):
        if type(target) is not int or not (stage or 0) <= target < count:
            allowed = f"{stage or 0} to {count - 1}"
            raise ArgusError(f"the aging policy sends page {page} to stage {target!r}; allowed are stages {allowed}")


def check_chosen(chosen: Any, shape: Sequence[int], policy: object, broadcasts: bool = True) -> None:
    """Raise :class:`ArgusError` unless a policy's answer is a bool tensor of `shape`, or, if it may, broadcasts to it."""
    name, allowed = type(policy).__name__, f"a bool tensor {'that broadcasts to' if broadcasts else 'of'} {list(shape)}"
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool:
        said = f"a {chosen.dtype} tensor" if isinstance(chosen, Tensor) else f"a {type(chosen).__name__}"
        raise ArgusError(f"policy {name} answers with {said}; allowed: {allowed}")
    sizes = zip(reversed(chosen.shape), reversed(shape), strict=False)
    fits = chosen.dim() <= len(shape) and all(size in (1, whole) for size, whole in sizes)
    if not (fits if broadcasts else chosen.shape == tuple(shape)):
        raise ArgusError(f"policy {name} answers with a tensor of {list(chosen.shape)}; allowed: {allowed}")


def salience(keys: Tensor, queries: Tensor) -> list[float]:
    """How much `queries` ask for each page.

    Parameters
    ----------
    keys : Tensor
        ``[n, B, H, P, D]``.
    queries : Tensor
        ``[B, H, R, D]``, times the softmax scale.

    Returns
    -------
    list of float
        ``n`` numbers: the log-sum-exp of a page's scores, averaged over queries, heads and batch rows.
    """
    scores = queries.float() @ keys.float().transpose(-1, -2)
    found: list[float] = scores.logsumexp(-1).mean((1, 2, 3)).tolist()
    return found
