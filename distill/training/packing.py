"""Rollouts of any length become batches of one shape, so that nothing recompiles and little of a row is padding.

Two doors to the same dictionary of arrays: `packed_batches` reads a source over and over (off-policy, SFT) and can be
saved and restored between batches; `pack_rollouts` lays out the rollouts that the student has just generated.

A batch holds, for B rows of length T: `tokens`, `positions` (0, 1, … inside each document), `segment_ids` (1, 2, …
in each row; 0 is padding) int32, `loss_mask` bool, `mode` uint8 (1 thinking, 0 non-thinking), and whatever other
per-token arrays the examples carry, such as `target_ids` and `target_logprobs` [B, T, J] and `target_log_tail` [B, T].
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex, TypeVar

import grain
import numpy as np
from jaxtyping import Int32

from qwen3.errors import UserError
from qwen3.rollout import THINKING, Rollout, first_fit_rows
from teacher.scored_rollout import ScoredRollout, empty_targets

Example = dict[str, np.ndarray]
"""One document: arrays of one leading length T, among them tokens, loss_mask and mode."""
Batch = dict[str, np.ndarray]
"""Arrays [B, T, …] as the module's docstring lists them."""

Record_co = TypeVar("Record_co", covariant=True)


class RecordSource(Protocol[Record_co]):
    """Random access to records: a list, a `TargetStore`."""

    def __len__(self) -> int: ...

    def __getitem__(self, record_key: SupportsIndex, /) -> Record_co: ...


def rollout_example(rollout: Rollout, **per_token: np.ndarray) -> Example:
    """The rollout's arrays for packing, with further arrays [T, …] about the same positions."""
    length = len(rollout.tokens)
    for name, array in per_token.items():
        if len(array) != length:
            raise ValueError(f"{name} has length {len(array)}; rollout {rollout.prompt_id!r} has {length} tokens")
    return {
        "tokens": rollout.tokens,
        "loss_mask": rollout.loss_mask,
        "mode": np.full(length, rollout.mode == THINKING, np.uint8),
        **per_token,
    }


def scored_example(record: ScoredRollout) -> Example:
    """The arrays of a rollout and of its targets: target_ids, target_logprobs, target_log_tail.

    Of sampled tokens also target_entropy.
    """
    drawn = {} if record.entropy is None else {"target_entropy": record.entropy}
    return rollout_example(
        record.rollout,
        target_ids=record.ids,
        target_logprobs=record.logprobs,
        target_log_tail=record.log_tail,
        **drawn,
    )


def record_example(record: Rollout | ScoredRollout) -> Example:
    """`rollout_example` or `scored_example`, as the record is."""
    return scored_example(record) if isinstance(record, ScoredRollout) else rollout_example(record)


def packed_batches(
    source: RecordSource[Any],
    *,
    rows: int,
    length: int,
    seed: int,
    epochs: int | None = None,
    pool_batches: int = 1,
    prefetch_batches: int = 0,
    to_example: Callable[[Any], Example] = record_example,
) -> grain.DatasetIterator[Batch]:
    """Batches [rows, length] over `source`, shuffled anew each epoch, for ever or for `epochs`.

    Documents are laid first-fit into `pool_batches * rows` rows at a time, whole and in the shuffled order; when one
    fits nowhere, these rows are given out and it starts the next pool. A larger pool leaves less padding and holds
    `pool_batches` batches in memory. A pool may span the end of an epoch; within `epochs` nothing is lost or
    repeated, and the last batch is filled up with empty rows.

    The iterator works in the calling thread (or, to overlap the device's work, in one thread that stays
    `prefetch_batches` ahead) and depends on its arguments alone. `get_state()` is a small
    JSON-serialisable dictionary; `set_state` on an iterator made with the same arguments goes on at the next batch.

    Raises UserError for an empty source and, when it comes to it, for a document longer than `length`: a document
    that was cut would train on a target for text that is not there.
    """
    if len(source) == 0:
        raise UserError("no rollouts to train on: the source is empty; check the stage's prompts and filters")
    for name, value in (("rows", rows), ("length", length), ("pool_batches", pool_batches)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    padding = _padding(to_example(source[0]))

    def checked_example(record: Any) -> Example:
        example = to_example(record)
        _check_length(record, len(example["tokens"]), length)
        return example

    documents = (
        grain.MapDataset.source(source)
        .shuffle(seed=seed)
        .repeat(epochs)
        .map(checked_example)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )
    packed = grain.experimental.FirstFitPackIterDataset(
        documents,
        length_struct=dict.fromkeys(padding, length),
        padding_struct=padding,
        # Positions and segments are the same for all arrays; grain need tell only those of the tokens.
        meta_features=[name for name in padding if name != "tokens"],
        num_packing_bins=rows * pool_batches,
        # Early rows of a pool are the fullest; unshuffled, a pool's first batch would hold more tokens than its last.
        shuffle_bins=pool_batches > 1,
        seed=seed,
    )
    batches = packed.batch(rows, drop_remainder=False).map(functools.partial(_finish_batch, rows, padding))
    if prefetch_batches:
        batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch_batches)
    return iter(batches)


def pack_rollouts(
    records: Sequence[Any],
    *,
    rows: int,
    length: int,
    one_per_row: bool = True,
    to_example: Callable[[Any], Example] = record_example,
    rooms: Sequence[int] | None = None,
) -> Batch:
    """One batch [rows, length] of all `records`, in the same form as `packed_batches`.

    With `one_per_row` record i is row i, and rows beyond the records are empty. Otherwise the longest documents are
    placed first, each into the first row with room; `rows_needed` says how many rows that takes. `rooms` are what
    documents take of a row where that is more than their tokens.
    Raises UserError for a document longer than `length`, ValueError for no records or more than fit.
    """
    if not records:
        raise ValueError("no records to pack; give at least one")
    examples = [to_example(record) for record in records]
    lengths = [len(example["tokens"]) for example in examples]
    for record, document_length in zip(records, lengths, strict=True):
        _check_length(record, document_length, length)
    row_of = list(range(len(examples))) if one_per_row else first_fit_rows(rooms or lengths, length)
    if max(row_of) >= rows:
        raise ValueError(f"rows is {rows}, but {len(records)} records need {max(row_of) + 1} rows of length {length}")
    padding = _padding(examples[0])
    batch = {
        name: np.full((rows, length, *array.shape[1:]), padding[name], array.dtype)
        for name, array in examples[0].items()
    }
    batch["positions"] = np.zeros((rows, length), np.int32)
    batch["segment_ids"] = np.zeros((rows, length), np.int32)
    used, documents = np.zeros(rows, int), np.zeros(rows, int)
    for example, document_length, row in zip(examples, lengths, row_of, strict=True):
        place = slice(used[row], used[row] + document_length)
        for name, array in example.items():
            batch[name][row, place] = array
        documents[row] += 1
        used[row] += document_length
        batch["positions"][row, place] = np.arange(document_length)
        batch["segment_ids"][row, place] = documents[row]
    return batch


def read_at(rollout: Rollout, read: Rollout) -> Int32[np.ndarray, "T"]:
    """Of each position of a rollout, the position at which the same response stands after another prompt; that is read
    from the last token of the prompt on."""
    return np.maximum(np.arange(len(rollout.tokens)) + read.prompt_length - rollout.prompt_length, 0).astype(np.int32)


def places_read(packed: Mapping[str, np.ndarray], read: Mapping[str, np.ndarray]) -> Int32[np.ndarray, "B T"]:
    """Where in `read`, rows of the same documents after other prompts, each trained position of `packed` stands, which
    has `read_at`; T at all others."""
    rows, length = packed["tokens"].shape
    starts = np.zeros((rows, length + 1), np.int32)
    row, column = np.nonzero((read["positions"] == 0) & (read["segment_ids"] > 0))
    starts[row, read["segment_ids"][row, column]] = column
    found = np.take_along_axis(starts, packed["segment_ids"], axis=1) + packed["read_at"]
    return np.where(packed["loss_mask"], found, length).astype(np.int32)


def rows_needed(lengths: Sequence[int], length: int) -> int:
    """How many rows of `length` `pack_rollouts(one_per_row=False)` takes for documents of these lengths."""
    return max(first_fit_rows(lengths, length), default=-1) + 1


def _padding(example: Example) -> dict[str, Any]:
    """What fills the places without a token, per array: zeros, except that targets stay distributions."""
    padding: dict[str, Any] = dict.fromkeys(example, 0)
    if "target_ids" in example:
        filling = empty_targets(example["target_ids"].shape[1])
        padding |= {f"target_{name}": fill for name, fill in filling._asdict().items()}
    return padding


def _finish_batch(rows: int, padding: Mapping[str, Any], packed: Mapping[str, np.ndarray]) -> Batch:
    """Gives grain's arrays the names used here, and a short last batch its empty rows."""
    batch = {name: packed[name] for name in padding}
    batch["positions"] = packed["tokens_positions"]
    batch["segment_ids"] = packed["tokens_segment_ids"]
    absent = rows - len(batch["tokens"])
    if absent:
        for name, array in batch.items():
            empty = np.full((absent, *array.shape[1:]), padding.get(name, 0), array.dtype)
            batch[name] = np.concatenate([array, empty])
    return batch


def _check_length(record: Any, document_length: int, length: int) -> None:
    if document_length > length:
        rollout = record.rollout if isinstance(record, ScoredRollout) else record
        name = f"rollout {rollout.prompt_id!r}" if isinstance(rollout, Rollout) else "a document"
        raise UserError(
            f"{name} has {document_length} tokens and does not fit a row of {length}; raise the stage's row length, "
            "or lower its prompt or response limit"
        )
