"""Targets at the student's own likeliest tokens: a few numbers a position, exact where the student may go.

At a position the k likeliest tokens of the student, the one that was sampled and the teacher's k likeliest are named;
all others are one bucket. The loss is a divergence between distributions over these at most 2k + 2 buckets. It is never
negative, needs no clamp, and is never more than that over the whole vocabulary (data-processing inequality). Its
gradient is the exact one of this coarser divergence: each named token has its own, the others share one.

The ids come from a forward pass of the weights that generated the rollout, a quarter to a third of what training on it
costs. Where rollouts are stale, so are the ids. They only say which tokens have buckets of their own: all
log-probabilities are the teacher's and the present student's, so the divergence is a true one whatever they are.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int32

from qwen3.decoder.model import Qwen3
from qwen3.field_types import Count, check_fields
from qwen3.rollout import Rollout
from teacher.scoring import Scorer
from teacher.targets import AtIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentTopK:
    """The teacher's log-probabilities at the student's k likeliest tokens, the sampled one and its own k likeliest."""

    k: Count = 16
    """Likeliest tokens of the student, and as many of the teacher."""

    def __post_init__(self) -> None:
        check_fields(self, "targets")

    @property
    def asked(self) -> int:
        """Tokens that the teacher is asked for by name at a position."""
        return self.k + 1

    @property
    def entries(self) -> int:
        """Tokens that are named at a position, at most."""
        return self.asked + self.k

    def shapes(self, rows: int, length: int) -> AtIds:
        """Abstract targets of so many positions."""

        def array(dtype: DTypeLike, *last: int) -> Any:
            return jax.ShapeDtypeStruct((rows, length, *last), dtype)

        entries = self.entries
        return AtIds(ids=array(np.int32, entries), logprobs=array(np.float32, entries), log_tail=array(np.float32))

    def likeliest(
        self, model: Qwen3, rollouts: Sequence[Rollout], mesh: Mesh, *, rows: int, length: int, pad_id: int
    ) -> list[Int32[np.ndarray, "T k"]]:
        """The student's k likeliest tokens at every position of each rollout, on the host; rows and length as in
        `Scorer.score_rollouts`."""
        scored = Scorer(model, mesh).score_rollouts(list(rollouts), k=self.k, rows=rows, length=length, pad_id=pad_id)
        return [one.ids for one in scored]


def with_sampled(rollout: Rollout, likeliest: Int32[np.ndarray, "T k"]) -> Int32[np.ndarray, "T k+1"]:
    """What the teacher is asked for: the likeliest tokens, and the one that follows; none follows the last position."""
    following = np.append(rollout.tokens[1:], -1).astype(np.int32)
    return np.concatenate((likeliest, following[:, None]), axis=1)
