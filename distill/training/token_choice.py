"""A share of the positions, chosen before either head: the outputs of all others are never multiplied out.

A position is chosen by the entropy of the distribution that the student drew its token from (the half of the positions
with the highest entropy teaches as much as all of them: arXiv 2604.14084). The engine records it while it generates, so
that choosing takes no pass of its own. Each response's positions are compared with one another alone: which are chosen
does not depend on how rollouts are packed, cut into microbatches or spread over devices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int32, Shaped

from qwen3.rollout import Rollout


def chosen(rollout: Rollout, share: float) -> Bool[np.ndarray, " T"]:
    """Of the positions at which the policy itself chose a token, the share with the highest entropy, rounded up; of
    equal ones those that come first. Raises ValueError where the engine has recorded no entropies."""
    if rollout.sampler_entropies is None:
        raise ValueError(f"rollout {rollout.prompt_id!r} has no sampler_entropies; let the engine record them")
    (eligible,) = np.nonzero(rollout.loss_mask)
    # Sorting is stable.
    order = np.argsort(-rollout.sampler_entropies[eligible], kind="stable")
    found = np.zeros_like(rollout.loss_mask)
    found[eligible[order[: math.ceil(share * len(eligible))]]] = True
    return found


def places_in_row(share: float, row_length: int, meshes: Sequence[Mesh]) -> int:
    """How many positions of a packed row are worked on: all that may be chosen in one, in parts for the devices of
    each mesh that share a row."""
    parts = math.lcm(*(mesh.shape["context"] for mesh in meshes))
    return min(row_length, math.ceil(math.ceil(share * row_length) / parts) * parts)


def room(length: int, chosen_positions: int, places: int, row_length: int) -> int:
    """Tokens that a document of `length` takes of a packed row so that what is chosen in the row fits its `places`:
    more than its own only where little of it is prompt."""
    return max(length, math.ceil(chosen_positions * row_length / places))


def places_of(mask: Bool[np.ndarray, "B T"], places: int) -> Int32[np.ndarray, "B K"]:
    """Where a packed batch's mask is True, in order, and T in the places that are left."""
    found = np.full((len(mask), places), mask.shape[1], np.int32)
    for row, marked in enumerate(mask):
        (where,) = np.nonzero(marked)
        found[row, : len(where)] = where
    return found


def at_places(arrays: Mapping[str, Any], places: Int32[np.ndarray, "B K"]) -> dict[str, Any]:
    """A packed batch whose arrays about what is trained stand at the chosen places alone."""
    taken = {name: taken_at(arrays[name], places) for name in ("mode", "teacher") if name in arrays}
    return {**arrays, **taken, "loss_mask": places < arrays["loss_mask"].shape[1], "places": places}


def taken_at(
    array: Shaped[np.ndarray, "B T *rest"], places: Int32[np.ndarray, "B K"]
) -> Shaped[np.ndarray, "B K *rest"]:
    """What stands at the places; in those that are left, what stands at the last position."""
    where = np.minimum(places, array.shape[1] - 1)
    return np.take_along_axis(array, where.reshape(*where.shape, *(1,) * (array.ndim - 2)), axis=1)
