import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.training.packing import (
    Batch,
    pack_rollouts,
    packed_batches,
    rollout_example,
    rows_needed,
)
from qwen3.errors import UserError
from qwen3.rollout import NON_THINKING, THINKING, Rollout
from teacher.scored_rollout import ScoredRollout, empty_targets
from teacher.store import TargetStore, TargetStoreWriter

ENTRIES = 3
LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=30)


def document(number: int, length: int) -> ScoredRollout:
    """A rollout whose every array tells, at each position, which document and position it belongs to."""
    tokens = (1000 * (number + 1) + np.arange(length)).astype(np.int32)
    return ScoredRollout(
        rollout=Rollout(
            tokens=tokens,
            prompt_length=1,
            loss_mask=tokens % 3 != 0,
            sampler_logprobs=np.zeros(length, np.float32),
            mode=THINKING if number % 2 else NON_THINKING,
            prompt_id=f"prompt-{number}",
            sample_index=0,
            policy_step=0,
            finished=True,
        ),
        ids=tokens[:, None] * 4 + np.arange(ENTRIES, dtype=np.int32),
        logprobs=-(tokens[:, None] / 7).astype(np.float32) - np.arange(ENTRIES, dtype=np.float32),
        log_tail=-(tokens / 5).astype(np.float32),
    )


def documents(lengths: Sequence[int]) -> list[ScoredRollout]:
    return [document(number, length) for number, length in enumerate(lengths)]


def read_back(batch: Batch) -> list[tuple[int, int]]:
    """(number, length) of the documents of a batch, after checking every place against what `document` wrote."""
    for name in ("tokens", "positions", "segment_ids", "target_ids"):
        assert batch[name].dtype == np.int32, name
    assert batch["loss_mask"].dtype == bool
    assert batch["mode"].dtype == np.uint8
    found = []
    for row in range(len(batch["tokens"])):
        segments = batch["segment_ids"][row]
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all()
        assert (np.diff(segments[:used]) >= 0).all()
        assert (np.unique(segments[:used]) == 1 + np.arange(segments.max())).all()
        for segment in range(1, segments.max() + 1):
            place = segments == segment
            number = int(batch["tokens"][row, place][0]) // 1000 - 1
            written = document(number, int(place.sum()))
            expected = {
                "tokens": written.rollout.tokens,
                "positions": np.arange(place.sum()),
                "loss_mask": written.rollout.loss_mask,
                "mode": np.full(place.sum(), number % 2),
                "target_ids": written.ids,
                "target_logprobs": written.logprobs,
                "target_log_tail": written.log_tail,
            }
            for name, array in expected.items():
                np.testing.assert_array_equal(batch[name][row, place], array, err_msg=name)
            found.append((number, int(place.sum())))
        for name in ("tokens", "positions", "loss_mask", "mode"):
            assert not batch[name][row, used:].any(), name
        for name, fill in empty_targets(ENTRIES)._asdict().items():
            assert (batch[f"target_{name}"][row, used:] == fill).all(), name
    return found


@settings(max_examples=30, deadline=None)
@given(
    lengths=LENGTHS, rows=st.integers(1, 4), pool=st.integers(1, 3), epochs=st.integers(1, 2), seed=st.integers(0, 9)
)
def test_every_token_keeps_its_target_and_none_is_lost(
    lengths: list[int], rows: int, pool: int, epochs: int, seed: int
) -> None:
    found = []
    for batch in packed_batches(documents(lengths), rows=rows, length=16, seed=seed, epochs=epochs, pool_batches=pool):
        assert {array.shape[:2] for array in batch.values()} == {(rows, 16)}
        in_batch = read_back(batch)
        assert np.sum(batch["segment_ids"] == 0) == rows * 16 - sum(length for _, length in in_batch)
        found += in_batch
    assert sorted(found) == sorted(list(enumerate(lengths)) * epochs)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, one_per_row=st.booleans())
def test_pack_rollouts_loses_nothing_either(lengths: list[int], one_per_row: bool) -> None:
    rows = len(lengths) if one_per_row else rows_needed(lengths, 16)
    batch = pack_rollouts(documents(lengths), rows=rows + 1, length=16, one_per_row=one_per_row)
    assert {array.shape[:2] for array in batch.values()} == {(rows + 1, 16)}
    found = read_back(batch)
    assert sorted(found) == list(enumerate(lengths))
    assert not batch["segment_ids"][rows:].any()
    if one_per_row:
        assert found == list(enumerate(lengths))
    else:
        assert (batch["segment_ids"][:rows] > 0).any(axis=1).all()
        assert rows <= 2 * -(-sum(lengths) // 16)  # first-fit leaves at most one row half empty


def test_both_doors_give_the_same_batch() -> None:
    source = documents([5])
    streamed = next(packed_batches(source, rows=1, length=8, seed=0))
    direct = pack_rollouts(source, rows=1, length=8)
    once = next(packed_batches(source, rows=1, length=8, seed=0, epochs=1))
    assert direct.keys() == streamed.keys() == once.keys()
    for name, array in direct.items():
        np.testing.assert_array_equal(once[name], array)
        assert once[name].dtype == streamed[name].dtype == array.dtype


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_restored_iterator_goes_on_with_the_same_batches(pool: int, prefetch: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 17, 40).tolist()

    def make():
        return packed_batches(
            documents(lengths), rows=3, length=16, seed=5, pool_batches=pool, prefetch_batches=prefetch
        )

    uninterrupted, states = [], []
    iterator = make()
    for _ in range(24):  # about four epochs
        states.append(json.loads(json.dumps(iterator.get_state())))
        uninterrupted.append(next(iterator))
    for start in (0, 1, 2, 7, 16, 23):
        resumed = make()
        resumed.set_state(states[start])
        for expected in uninterrupted[start:]:
            batch = next(resumed)
            for name, array in expected.items():
                np.testing.assert_array_equal(batch[name], array)
    # A state set in the middle of another position, as when an iterator is rewound.
    iterator.set_state(states[4])
    np.testing.assert_array_equal(next(iterator)["tokens"], uninterrupted[4]["tokens"])


def order(seed: int, epochs: int) -> list[int]:
    lengths = [8] * 12
    batches = packed_batches(documents(lengths), rows=1, length=8, seed=seed, epochs=epochs)
    return [number for batch in batches for number, _ in read_back(batch)]


def test_epochs_and_seeds_differ_in_order_and_nothing_else_does() -> None:
    two = order(seed=1, epochs=2)
    assert sorted(two[:12]) == sorted(two[12:]) == list(range(12))
    assert two[:12] != two[12:]
    assert order(seed=1, epochs=2) == two
    assert order(seed=2, epochs=2) != two


def test_by_default_no_thread_is_started() -> None:
    before = threading.active_count()
    iterator = packed_batches(documents([4] * 9), rows=2, length=8, seed=0)
    next(iterator)
    assert threading.active_count() == before


def test_a_target_store_is_a_source(tmp_path: Path) -> None:
    records = documents([4, 7, 9, 2])
    writer = TargetStoreWriter(tmp_path, {"k": ENTRIES})
    writer.write_shard(0, records[:3])
    writer.write_shard(1, records[3:])
    writer.finish()
    store = TargetStore.open(tmp_path)
    batches = list(packed_batches(store, rows=2, length=16, seed=0, epochs=1))
    # What is stored of these, which are no distributions, is none of packing's business.
    stored = [store[index] for index in range(len(store))]
    assert [one.rollout.prompt_id for one in stored] == [one.rollout.prompt_id for one in records]
    from_memory = list(packed_batches(stored, rows=2, length=16, seed=0, epochs=1))
    assert len(batches) == len(from_memory) == 1
    for name, array in from_memory[0].items():
        kept = from_memory[0]["loss_mask"] if name.startswith("target") else np.ones((2, 16), bool)
        np.testing.assert_array_equal(batches[0][name][kept], array[kept])


def test_rollouts_without_targets_and_with_further_arrays() -> None:
    rollouts = [record.rollout for record in documents([3, 5])]
    assert pack_rollouts(rollouts, rows=2, length=8).keys() == {
        "tokens", "positions", "segment_ids", "loss_mask", "mode",
    }  # fmt: skip
    batch = pack_rollouts(
        rollouts, rows=2, length=8, to_example=lambda r: rollout_example(r, reward=np.full(len(r.tokens), 0.5))
    )
    assert batch["reward"].sum() == 4
    with pytest.raises(ValueError, match="reward has length 2"):
        rollout_example(rollouts[0], reward=np.zeros(2))


@pytest.mark.parametrize(
    "pack",
    [
        lambda records: list(packed_batches(records, rows=2, length=8, seed=0, epochs=1)),
        lambda records: pack_rollouts(records, rows=2, length=8),
    ],
)
def test_a_document_longer_than_a_row_is_refused_by_name(pack: Callable) -> None:
    with pytest.raises(UserError, match=r"rollout 'prompt-1' has 9 tokens and does not fit a row of 8; raise"):
        pack(documents([8, 9]))
    with pytest.raises(UserError, match="prompt-1"):
        pack([record.rollout for record in documents([8, 9])])


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="source is empty"):
        packed_batches([], rows=1, length=8, seed=0)
    with pytest.raises(ValueError, match="rows is 0"):
        packed_batches(documents([1]), rows=0, length=8, seed=0)
    with pytest.raises(ValueError, match="rows is 1, but 2 records need 2 rows"):
        pack_rollouts(documents([8, 8]), rows=1, length=8, one_per_row=False)
    with pytest.raises(ValueError, match="no records"):
        pack_rollouts([], rows=1, length=8)
