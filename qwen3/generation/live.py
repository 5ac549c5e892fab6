"""What a generation that goes on is given and tells, between one dispatch and the next."""

from collections.abc import Callable, Sequence
from typing import Protocol

from qwen3.generation.sampling import Plan
from qwen3.generation.slots import Request, Written
from qwen3.rollout import Rollout

OnProgress = Callable[[int, int], None]
"""Called with the rollouts that ended and the tokens in them since the last call."""


class Live(Protocol):
    """Follows a generation and adds to it. One thread calls it between dispatches: what takes long holds all up."""

    def joining(self) -> Sequence[Request]:
        """Requests that are to be generated too, numbered on from those before them; the engine has checked them."""

    def next_dispatch(self) -> tuple[Plan, int]:
        """What the sampler must be able to do for all that is under way, and the most tokens that a slot writes before
        the host looks again."""

    def wanted(self, index: int) -> bool:
        """Whether a request is to go on. One that is not ends where it is; one without a slot never begins."""

    def written(self, index: int, part: Written) -> None:
        """What the last dispatch has written for a request, arrays [n, …] without slots."""

    def ended(self, index: int, rollout: Rollout) -> None:
        """The whole of a request, after its last part."""


class Whole:
    """Requests that are all there from the beginning, and their rollouts: a `Live` that nothing joins or leaves."""

    def __init__(self, requests: Sequence[Request], plan: Plan, tokens: int, on_progress: OnProgress | None):
        self._coming, self._dispatch, self._on_progress = requests, (plan, tokens), on_progress
        self.rollouts: dict[int, Rollout] = {}
        self._untold: list[Rollout] = []

    def joining(self) -> Sequence[Request]:
        if self._untold and self._on_progress is not None:
            self._on_progress(len(self._untold), sum(len(rollout.response) for rollout in self._untold))
        self._untold = []
        coming, self._coming = self._coming, ()
        return coming

    def next_dispatch(self) -> tuple[Plan, int]:
        return self._dispatch

    def wanted(self, index: int) -> bool:
        return True

    def written(self, index: int, part: Written) -> None:
        pass

    def ended(self, index: int, rollout: Rollout) -> None:
        self.rollouts[index] = rollout
        self._untold.append(rollout)
