"""Rollouts generated ahead: which weights write what, what a checkpoint keeps, and how the threads end."""

import dataclasses
import gc
import json
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill.stages import OnPolicy, ahead
from distill.stages.ahead import Outcome, Written, WrittenAhead
from distill.stages.loop import Training
from distill.tasks.samples import Verdict
from distill.training.losses import Loss
from qwen3.errors import UserError
from qwen3.rollout import THINKING, Rollout, rollouts_from_json, rollouts_to_json


class Weights(nnx.Module):
    def __init__(self, updates: int):
        self.value = nnx.Param(jnp.full(3, float(updates)))


def rollout(step: int, policy_step: int) -> Rollout:
    random = np.random.default_rng(step)
    return Rollout(
        tokens=random.integers(0, 1000, 5 + step).astype(np.int32),
        prompt_length=2,
        loss_mask=random.random(5 + step) < 0.5,
        sampler_logprobs=np.log(random.random(5 + step)).astype(np.float32),
        mode=THINKING,
        prompt_id=f"problem {step}",
        sample_index=0,
        policy_step=policy_step,
        finished=bool(step % 2),
    )


def write(step: int, policy_step: int, model: Weights) -> Written:
    time.sleep(0.01)
    # The weights that wrote a step stand in its first token.
    tokens = rollout(step, policy_step).tokens.copy()
    tokens[0] = int(model.value[...][0])
    fields = vars(rollout(step, policy_step)) | {"tokens": tokens}
    return Written(rollouts=[Rollout(**fields)], seconds=0.01)


def score(written: Written) -> list[str]:
    return [f"scores of {written.rollouts[0].prompt_id}"]


@contextmanager
def writing(staleness: int, steps: int, write=write, score=score, threads=True) -> Iterator[WrittenAhead]:
    writer = WrittenAhead(staleness, steps, write, score, threads=threads)
    try:
        yield writer
    finally:
        writer.close()
        assert not [thread for thread in threading.enumerate() if thread.name.endswith("rollouts_0")]


def trained(writer: WrittenAhead, steps: Sequence[int]) -> list[tuple[int, int]]:
    """(policy step, weights that wrote) of each step; the update after it destroys the weights that it was given."""
    seen = []
    for step in steps:
        model = Weights(step)
        rollouts = writer.rollouts(step, model).rollouts
        assert rollouts[0].prompt_id == f"problem {step}"
        assert writer.batches() == [f"scores of problem {step}"]
        model.value[...].delete()
        seen.append((rollouts[0].policy_step, int(rollouts[0].tokens[0])))
    return seen


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_every_step_is_written_by_the_weights_that_its_number_says(staleness: int, threads: bool) -> None:
    with writing(staleness, steps=4, threads=threads) as writer:
        lagging = [max(0, step - staleness) for step in range(4)]
        assert trained(writer, range(4)) == [(step, step) for step in lagging]


def test_no_more_copies_of_the_weights_than_steps_of_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = weakref.WeakSet()
    copy = ahead._copy

    def counted(model: Weights) -> Weights:
        gc.collect()
        # This one and those before it whose rollouts nobody has asked for yet.
        assert len(alive) < 2
        alive.add(copied := copy(model))
        return copied

    monkeypatch.setattr(ahead, "_copy", counted)
    with writing(2, steps=6) as writer:
        trained(writer, range(6))


@pytest.mark.parametrize("threads", [True, False])
def test_what_a_checkpoint_keeps_comes_back_bit_for_bit(threads: bool) -> None:
    with writing(2, steps=6, threads=threads) as writer:
        trained(writer, range(3))
        kept = json.loads(json.dumps(writer.state()))
        rest = trained(writer, range(3, 6))

    def only_later(step: int, policy_step: int, model: Weights) -> Written:
        assert step > 4, "written again, by weights that the first run no longer had"
        return write(step, policy_step, model)

    with writing(2, steps=6, write=only_later, threads=threads) as writer:
        writer.restore(kept)
        assert json.loads(json.dumps(writer.state())) == kept
        assert trained(writer, range(3, 6)) == rest == [(1, 1), (2, 2), (3, 3)]
    rollouts = [rollout(step, 7) for step in range(3)]
    for before, after in zip(rollouts, rollouts_from_json(rollouts_to_json(rollouts)), strict=True):
        assert vars(before).keys() == vars(after).keys()
        for name, value in vars(before).items():
            assert np.asarray(value).tobytes() == np.asarray(getattr(after, name)).tobytes(), name


def test_what_is_known_of_rollouts_alone_comes_back_as_well() -> None:
    outcome = Outcome(
        part=1, mode=THINKING, tokens=9, response_tokens=7, finished=True, correct=None, reward=0.1, failed=False,
        known=True,
    )  # fmt: skip
    rollouts = [
        dataclasses.replace(one, sampler_entropies=np.arange(len(one.tokens), dtype=np.float32) / 3)
        for one in (rollout(0, 0), rollout(1, 0))
    ]
    before = Written(
        rollouts=rollouts, seconds=1.5, rewards=[0.1, 1 / 3], failed=[False, True], replaced=[outcome, outcome],
        verdicts=[Verdict(True, None), Verdict(None, None)],
    )  # fmt: skip
    after = Written.from_json(json.loads(json.dumps(before.to_json())))
    for name in ("seconds", "rewards", "verdicts", "failed", "replaced", "tokens", "replaced_tokens"):
        assert getattr(after, name) == getattr(before, name), name
    for one, other in zip(before.rollouts, after.rollouts, strict=True):
        assert one.sampler_entropies is not None
        assert other.sampler_entropies is not None
        assert one.sampler_entropies.tobytes() == other.sampler_entropies.tobytes()


def test_what_fails_in_the_background_is_raised_as_what_it_is() -> None:
    def refuses_step_2(step: int, policy_step: int, model: Weights) -> Written:
        if step == 2:
            raise UserError("prompt 7 is too long")
        return write(step, policy_step, model)

    def no_scores(written: Written) -> list[str]:
        raise FloatingPointError(written.rollouts[0].prompt_id)

    with writing(2, steps=6, write=refuses_step_2) as writer:
        trained(writer, range(2))
        with pytest.raises(UserError, match="prompt 7 is too long"):
            writer.state()
        with pytest.raises(UserError, match="prompt 7 is too long"):
            writer.rollouts(2, Weights(2))
    with writing(1, steps=6, score=no_scores) as writer:
        writer.rollouts(0, Weights(0))
        with pytest.raises(FloatingPointError, match="problem 0"):
            writer.batches()


def test_closing_ends_a_step_that_is_being_written() -> None:
    begun = threading.Event()

    def endless(step: int, policy_step: int, model: Weights) -> Written:
        while step:
            begun.set()
            writer.require_open()
            time.sleep(0.01)
        return write(step, policy_step, model)

    with writing(3, steps=6, write=endless) as writer:
        writer.rollouts(0, Weights(0))
        assert begun.wait(timeout=10)


def test_a_lag_that_makes_no_sense_is_refused() -> None:
    training = Training(steps=2)
    with pytest.raises(UserError, match="max_staleness is -1; it must be at least 0"):
        OnPolicy(max_staleness=-1, training=training, loss=Loss(name="reverse_kl"))
