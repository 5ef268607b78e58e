"""Routers from what a layer sees: spherical k-means (Dhillon & Modha, 2001)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

ITERATIONS = 25


def spherical_kmeans(directions: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Centres that most directions are close to, by cosine.

    A centre that nothing is nearest to moves to the direction that is served worst.

    Args:
        directions: float32 ``[samples, hidden]``, unit length.
        count: of centres, at most ``samples``.
        rng: chooses the first centres.

    Returns:
        float32 ``[count, hidden]``, unit length.
    """
    centres = directions[torch.randperm(len(directions), generator=rng)[:count]]
    for _ in range(ITERATIONS):
        cosine, nearest = (directions @ centres.T).max(dim=1)
        chosen = one_hot(nearest, count).float()  # a product sums faster than index_add_
        sums = chosen.T @ directions
        used = chosen.any(dim=0)
        empty = int((~used).sum())
        if empty:
            sums[~used] = directions[cosine.argsort()[:empty]]
        centres = normalize(sums, dim=1)
    return centres


def router_of(inputs: Tensor, experts: int, scale: float, rng: torch.Generator) -> Tensor:
    """The weights of a router that tells a layer's inputs apart.

    The mean of all inputs says nothing about a token, and a router has no bias to take it
    off: centres are those of inputs without it, and orthogonal to it.

    Args:
        inputs: float32 ``[samples, hidden]``, what the router will be given.
        experts: how many it chooses from.
        scale: logit of an expert whose centre an input of usual length points at.
        rng: see :func:`spherical_kmeans`.

    Returns:
        float32 ``[experts, hidden]``.
    """
    mean = normalize(inputs.mean(dim=0), dim=0)
    apart = inputs - (inputs @ mean)[:, None] * mean
    apart = apart - apart.mean(dim=0)
    lengths = apart.norm(dim=1)
    centres = spherical_kmeans(apart / lengths[:, None], experts, rng)
    centres = centres - (centres @ mean)[:, None] * mean
    return centres * (scale / float(lengths.median()))
