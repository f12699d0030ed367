"""Outlier policies: none, beyond some sigma of the page, the largest few."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from argus.hookspecs import hookimpl
from argus.policies.base import Outliers, PolicyConfig


def deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from the mean of each page and head, and its standard deviation."""
    mean = x.mean((-2, -1), keepdim=True)
    distance = (x - mean).abs()
    return distance, distance.square().mean((-2, -1), keepdim=True).sqrt()


class NoOutliers(Outliers):
    """Nothing is kept apart."""

    def choose(self, x: Tensor, role: str) -> Tensor | None:
        return None


class SigmaConfig(PolicyConfig):
    """Options of sigma: how many standard deviations from the mean a number must lie."""

    threshold: PositiveFloat = 3.0


class Sigma(Outliers):
    """Numbers with ``|x - mean| > threshold * sigma`` of their page and head."""

    Config = SigmaConfig

    def choose(self, x: Tensor, role: str) -> Tensor | None:
        distance, sigma = deviation(x)
        return distance > self.config.threshold * sigma


class TopKConfig(PolicyConfig):
    """Options of topk: the share of each page and head that is kept."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.01


class TopK(Outliers):
    """The ``share`` of numbers furthest from the mean of their page and head."""

    Config = TopKConfig

    def choose(self, x: Tensor, role: str) -> Tensor | None:
        distance, _ = deviation(x)
        flat = distance.flatten(-2)
        count = max(1, round(self.config.share * flat.shape[-1]))
        chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(count).indices, True)
        return chosen.view(x.shape)


@hookimpl
def argus_outliers() -> dict[str, type[Outliers]]:
    return {"none": NoOutliers, "sigma": Sigma, "topk": TopK}
