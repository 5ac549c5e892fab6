"""Requests that join and leave a generation under way, and what is told of it: the rollouts are those of company-free
calls, and their parts add up to them."""

import threading

import numpy as np
import pytest

from qwen3.generation.engine import Engine
from qwen3.generation.sampling import Plan
from qwen3.generation.slots import Request, Written
from qwen3.rollout import Rollout
from tests.qwen3.generation.test_engine import VOCABULARY, make_engine, mixed_requests, models, whole_logprobs

__all__ = ["models"]
PLAN = Plan.of_all(32, VOCABULARY, named=3)


class Following:
    """One request joins with every dispatch, and `leaver` is given up once it has written `after` tokens."""

    def __init__(self, requests: list[Request], *, tokens: int, leaver: int | None = None, after: int = 0):
        self._coming, self._tokens, self._leaver, self._after = list(requests), tokens, leaver, after
        self.parts: dict[int, list[Written]] = {index: [] for index in range(len(requests))}
        self.rollouts: dict[int, Rollout] = {}

    def joining(self) -> list[Request]:
        return [self._coming.pop(0)] if self._coming else []

    def next_dispatch(self) -> tuple[Plan, int]:
        return PLAN, self._tokens

    def wanted(self, index: int) -> bool:
        return index != self._leaver or sum(len(part.tokens) for part in self.parts[index]) < self._after

    def written(self, index: int, part: Written) -> None:
        assert index not in self.rollouts
        assert len(part.tokens) <= self._tokens
        self.parts[index].append(part)

    def ended(self, index: int, rollout: Rollout) -> None:
        self.rollouts[index] = rollout


@pytest.mark.parametrize(("tokens", "batch_size"), [(3, 8), (100, 4)])
def test_who_joins_writes_what_it_writes_alone_and_is_told_of_all_of_it(models, tokens, batch_size):
    requests = mixed_requests()
    engine = make_engine(batch_size=batch_size)
    live = Following(requests, tokens=tokens)
    engine.follow(models["dense"], live, seed=0, policy_step=5)
    together = engine.generate(models["dense"], requests, seed=0, policy_step=5)
    for index, wanted in enumerate(together):
        rollout = live.rollouts[index]
        np.testing.assert_array_equal(rollout.tokens, wanted.tokens)
        np.testing.assert_array_equal(rollout.loss_mask, wanted.loss_mask)
        np.testing.assert_allclose(rollout.sampler_logprobs, wanted.sampler_logprobs, atol=1e-5)
        parts = live.parts[index]
        told, chosen, logprobs = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "chosen", "logprobs")
        )
        predicting = slice(rollout.prompt_length - 1, len(rollout.tokens) - 1)
        np.testing.assert_array_equal(told, rollout.response)
        np.testing.assert_array_equal(chosen, rollout.loss_mask[predicting])
        np.testing.assert_array_equal(logprobs, rollout.sampler_logprobs[predicting])


def test_the_likeliest_tokens_are_those_of_a_whole_pass(models):
    requests = mixed_requests()[:4]
    live = Following(requests, tokens=7)
    make_engine().follow(models["dense"], live, seed=0, policy_step=5)
    for index, rollout in live.rollouts.items():
        ids = np.concatenate([part.top_ids for part in live.parts[index]])
        logprobs = np.concatenate([part.top_logprobs for part in live.parts[index]])
        whole = np.asarray(whole_logprobs(models["dense"], rollout.tokens))[rollout.prompt_length - 1 : -1]
        assert ids.shape == (len(rollout.response), 3)
        np.testing.assert_allclose(logprobs, -np.sort(-whole, axis=-1)[:, :3], atol=1e-4)
        np.testing.assert_allclose(logprobs, np.take_along_axis(whole, ids, -1), atol=1e-4)


def test_who_leaves_ends_where_it_is_and_others_go_on_as_they_would(models):
    """One that has a slot, and one that never gets one."""
    requests = mixed_requests()
    engine = make_engine()
    wanted = engine.generate(models["dense"], requests, seed=0, policy_step=5)
    for leaver, after in ((2, 4), (9, 0)):
        live = Following(requests, tokens=4, leaver=leaver, after=after)
        engine.follow(models["dense"], live, seed=0, policy_step=5)
        assert live.rollouts.keys() == set(range(len(requests)))
        left = live.rollouts.pop(leaver)
        assert not left.finished
        np.testing.assert_array_equal(left.response, wanted[leaver].response[: len(left.response)])
        assert (len(left.response) > 0) == (after > 0)
        assert len(left.response) < len(wanted[leaver].response)
        for index, rollout in live.rollouts.items():
            np.testing.assert_array_equal(rollout.tokens, wanted[index].tokens)


def test_who_joins_a_group_under_way_waits_for_its_next_dispatch(models, monkeypatch):
    """Two groups of four slots: one has not yet begun its dispatch when the other's ends, and two more join."""
    monkeypatch.setattr("qwen3.generation.engine.usable_cores", lambda: 2)
    go_on, is_first = threading.Event(), threading.Lock()
    write = Engine._write

    def held_up(*arguments):
        assert not is_first.acquire(blocking=False) or go_on.wait(60)
        return write(*arguments)

    monkeypatch.setattr(Engine, "_write", held_up)
    engine, requests = make_engine(batch_size=8), mixed_requests()[:4]

    class Two(Following):
        def joining(self):
            coming, self._coming = self._coming[:2], self._coming[2:]
            return coming

        def next_dispatch(self):
            if not self._coming:
                go_on.set()
            # What is said for those who join is not what the dispatch under way was begun with.
            return PLAN, 2 if self._coming else 3

    live = Two(requests, tokens=3)
    engine.follow(models["dense"], live, seed=0, policy_step=5)
    assert [len(live.parts[index][0].tokens) for index in range(4)] == [2, 2, 3, 3]
    for index, wanted in enumerate(engine.generate(models["dense"], requests, seed=0, policy_step=5, plan=PLAN)):
        np.testing.assert_array_equal(live.rollouts[index].tokens, wanted.tokens)
