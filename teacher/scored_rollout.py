"""A rollout together with what the teacher said about it, on the host, and its form as bytes.

This is what scoring hands to the store, what the store gives back, and what packing takes. The bytes are safetensors,
so nothing that is read can run code.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from jaxtyping import Float16, Float32, Int32, UInt8

from qwen3.errors import UserError
from qwen3.rollout import Rollout, with_prompt


class EmptyTargets(NamedTuple):
    """What stands at one position that has no target: a proper distribution, so that no loss meets log 0 there.

    A loss masks these positions, but a gradient through 0 · ∞ is NaN all the same; J distinct ids and the tail with
    1 / (J + 1) each keep every divergence finite before the mask.
    """

    ids: Int32[np.ndarray, "J"]
    logprobs: Float32[np.ndarray, "J"]
    log_tail: np.float32


def empty_targets(entries: int) -> EmptyTargets:
    """The filling for positions without a target, for `entries` = J teacher entries per token."""
    log_share = np.float32(-np.log(entries + 1.0))
    return EmptyTargets(np.arange(entries, dtype=np.int32), np.full(entries, log_share, np.float32), log_share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout of T tokens and the teacher's J top entries, or J tokens sampled from it, at each position, on the
    host.

    Row t is about token t + 1. Rows where the rollout's loss mask is False carry no information: the store does
    not keep them and gives `empty_targets` back.
    """

    rollout: Rollout
    ids: Int32[np.ndarray, "T J"]
    logprobs: Float32[np.ndarray, "T J"]
    """Log-probabilities over the whole vocabulary, never renormalised over the J entries."""
    log_tail: Float32[np.ndarray, "T"]
    """Logarithm of the mass on all other tokens."""
    entropy: Float32[np.ndarray, "T"] | None = None
    """The teacher's, given where the entries are sampled tokens: ids without duplicates (-1: absent), logprobs the
    logarithms of their shares, log_tail -inf. None: they are its top entries."""

    def __post_init__(self) -> None:
        length = len(self.rollout.tokens)
        expected = (length, self.ids.shape[-1])
        if self.ids.ndim != 2 or self.ids.shape != expected or self.logprobs.shape != expected:
            raise ValueError(
                f"ids {self.ids.shape} and logprobs {self.logprobs.shape} must both be [T, J] for the rollout's "
                f"T = {length} tokens"
            )
        if self.log_tail.shape != (length,):
            raise ValueError(f"log_tail {self.log_tail.shape} must be [T] for the rollout's T = {length} tokens")
        if self.entropy is not None and self.entropy.shape != (length,):
            raise ValueError(f"entropy {self.entropy.shape} must be [T] for the rollout's T = {length} tokens")
        said = [self.logprobs, self.log_tail] + ([] if self.entropy is None else [self.entropy])
        if any(np.isnan(array[self.rollout.loss_mask]).any() for array in said):
            raise UserError(
                f"rollout {self.rollout.prompt_id!r}: the teacher's log-probabilities are NaN; check its weights"
            )


_ID_BYTES = 3
"""Of an id: no vocabulary has 16 million tokens."""


def _planes(array: np.ndarray) -> UInt8[np.ndarray, "bytes R J"]:
    """The bytes of each entry, the first of all entries first."""
    return np.moveaxis(np.ascontiguousarray(array)[..., None].view(np.uint8), -1, 0)


def _from_planes(planes: UInt8[np.ndarray, "bytes R J"], dtype: str) -> np.ndarray:
    """The inverse of `_planes`."""
    return np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(dtype)[..., 0]


def after_prompt(record: ScoredRollout, prompt_ids: Sequence[int]) -> ScoredRollout:
    """What the teacher said of the response, for a student that reads another prompt before it."""
    rollout = with_prompt(record.rollout, prompt_ids)
    filling: dict[str, Any] = empty_targets(record.ids.shape[1])._asdict() | {"entropy": 0}
    first, last = record.rollout.prompt_length - 1, len(prompt_ids) - 1
    moved = {}
    for name, fill in filling.items():
        if (said := getattr(record, name)) is not None:
            moved[name] = np.empty((len(rollout.tokens), *said.shape[1:]), said.dtype)
            moved[name][:last], moved[name][last:] = fill, said[first:]
    return dataclasses.replace(record, rollout=rollout, **moved)


def encode(record: ScoredRollout) -> bytes:
    """The record's bytes; targets only where the loss mask is True.

    Log-probabilities of the top entries are rounded to float16, to one part in 2,048 of themselves: what is likely is
    hardly off, what is off is hardly likely; `decode` makes up for what their sum has lost. Ids and these are laid out
    byte by byte, all low bytes first, which compresses better. The tail, and all of sampled tokens, whose shares must
    add up to 1, stay float32.
    """
    rollout = record.rollout
    kept = rollout.loss_mask
    logprobs = record.logprobs[kept]
    arrays = {
        "tokens": rollout.tokens.astype(np.int32, copy=False),
        "loss_mask": kept,
        "sampler_logprobs": rollout.sampler_logprobs.astype(np.float32, copy=False),
        "ids": _planes(record.ids[kept].astype("<i4"))[:_ID_BYTES],
        "logprobs": _planes(logprobs.astype("<f2")) if record.entropy is None else logprobs.astype(np.float32),
        "log_tail": record.log_tail[kept].astype(np.float32, copy=False),
    }
    if record.entropy is not None:
        arrays["entropy"] = record.entropy[kept].astype(np.float32, copy=False)
    scalars = {
        field.name: getattr(rollout, field.name)
        for field in dataclasses.fields(Rollout)
        if field.name not in ("tokens", "loss_mask", "sampler_logprobs", "sampler_entropies")
    }
    # safetensors writes the memory as it lies, whatever the strides are.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(contiguous, metadata={"rollout": json.dumps(scalars)})


def _adding_up(rounded: Float16[np.ndarray, "R J"], log_tail: Float32[np.ndarray, "R"]) -> Float32[np.ndarray, "R J"]:
    """Rounded log-probabilities as the part of a distribution that they were: with the tail, which is exact, they add
    up to 1 again, so that a divergence stays one. A row's are all moved alike, by no more than they were rounded."""
    logprobs = rounded.astype(np.float64)
    moved = -np.expm1(log_tail.astype(np.float64)) / np.exp(logprobs).sum(-1) - 1
    most = np.abs(logprobs).max(-1) / 2**11
    return (logprobs + np.clip(moved, -most, most)[:, None]).astype(np.float32)


def decode(record: bytes) -> ScoredRollout:
    """The inverse of `encode`; bytes that are not a record raise SafetensorError, KeyError or ValueError."""
    arrays = safetensors.numpy.load(record)
    # Records of format 1 have these as they are.
    if arrays["ids"].dtype == np.uint8:
        low = arrays["ids"]
        # An id of -1 has no byte but 255.
        high = np.where(low[-1:] == 255, np.uint8(255), np.uint8(0))
        arrays["ids"] = _from_planes(np.concatenate((low, high)), "<i4").astype(np.int32)
    if arrays["logprobs"].dtype == np.uint8:
        arrays["logprobs"] = _adding_up(_from_planes(arrays["logprobs"], "<f2"), arrays["log_tail"])
    header_bytes = int.from_bytes(record[:8], "little")
    scalars = json.loads(json.loads(record[8 : 8 + header_bytes])["__metadata__"]["rollout"])
    kept = arrays["loss_mask"]
    filling: dict[str, Any] = empty_targets(arrays["ids"].shape[1])._asdict()
    if "entropy" in arrays:
        filling["entropy"] = 0
    expanded = {}
    for name, fill in filling.items():
        stored = arrays[name]
        full = np.empty((len(kept), *stored.shape[1:]), stored.dtype)
        full[:] = fill
        full[kept] = stored
        expanded[name] = full
    rollout = Rollout(tokens=arrays["tokens"], loss_mask=kept, sampler_logprobs=arrays["sampler_logprobs"], **scalars)
    return ScoredRollout(rollout=rollout, **expanded)
