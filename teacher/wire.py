"""Targets on the wire: one request of many sequences, one answer, both safetensors, so that nothing read can run code.

A request holds `tokens` int32 [ΣT], `lengths` int32 [S] and `starts` int32 [S]; for at_ids also `ids` int32 [R, J],
for sampled also `seeds` uint32 [S]. Its metadata say what is asked: `targets`, and `k` (top_k; at_ids, if the teacher's
k likeliest are to be named as well) or `sampled_tokens`.
Of sequence s come the rows for positions starts[s] ≤ t < T, R rows in all, each about token t + 1 as everywhere in
this project. The answer holds, by what was asked:

    top_k    ids int32 [R, k], logprobs float32 [R, k], log_tail float32 [R], and of the token that follows, where one
             does, following_logprobs float32 [R] (-inf) and following_ranks int32 [R] (0)
    at_ids   ids int32 [R, J + k] (repetitions as -1), logprobs float32 [R, J + k] (-inf), log_tail float32 [R]
    sampled  ids int32 [R, N] (repetitions as -1), log_shares float32 [R, N] (-inf), entropy float32 [R]
    hidden   hidden [R, D] after the final norm, in the dtype that the teacher computes in

`log_tail` is the logarithm of the mass of all tokens that are not named. All are natural logarithms, at temperature 1.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Final, Literal, get_args

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Int32

from qwen3.field_types import shown
from teacher.limits import Limits

Kind = Literal["top_k", "at_ids", "sampled", "hidden"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
CONTENT_TYPE: Final = "application/x-safetensors"
TEACHER_HEADER: Final = "x-teacher"
"""The teacher's digest: in every answer, and in requests that want no other teacher's answer."""
_DTYPES: Final = {"I32": np.int32, "U32": np.uint32, "F32": np.float32, "BF16": ml_dtypes.bfloat16}
_HEADER_BYTES: Final = 8


class Refused(ValueError):
    """A request that is not served, for `reason` with its `field`; `status` is HTTP's."""

    def __init__(self, field: str, reason: str, status: int = 400):
        super().__init__(f"{field} {reason}")
        self.field, self.reason, self.status = field, reason, status


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetsRequest:
    """What is asked about some sequences."""

    targets: Kind
    sequences: Sequence[Int32[np.ndarray, "T"]]
    starts: Sequence[int]
    """Of each sequence the first position that is asked about."""
    entries: int = 0
    """k, J or N; 0 for hidden states."""
    ids: Sequence[Int32[np.ndarray, "R J"]] | None = None
    """For at_ids: of each sequence the ids at the positions from its start on, -1 for none."""
    top_k: int = 0
    """For at_ids: how many of the teacher's likeliest tokens are named after the ids."""
    seeds: Sequence[int] | None = None
    """For sampled: of each sequence, an unsigned 32-bit number. With the position it decides what is sampled."""

    @property
    def rows(self) -> list[int]:
        """Positions that are asked about, of each sequence."""
        return [len(tokens) - start for tokens, start in zip(self.sequences, self.starts, strict=True)]

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(map(len, self.sequences))


Answer = Mapping[str, np.ndarray]
"""Arrays by name, as the module's docstring lists them."""


def encode_request(request: TargetsRequest) -> bytes:
    """The inverse of `decode_request`."""
    arrays: dict[str, np.ndarray] = {
        "tokens": np.concatenate(request.sequences).astype(np.int32),
        "lengths": np.asarray([len(tokens) for tokens in request.sequences], np.int32),
        "starts": np.asarray(request.starts, np.int32),
    }
    metadata = {"targets": str(request.targets)}
    if request.targets == "top_k":
        metadata["k"] = str(request.entries)
    if request.ids is not None:
        arrays["ids"] = np.concatenate(request.ids).astype(np.int32)
        metadata |= {"k": str(request.top_k)} if request.top_k else {}
    if request.seeds is not None:
        arrays["seeds"] = np.asarray(request.seeds, np.uint32)
        metadata["sampled_tokens"] = str(request.entries)
    return encode(arrays, metadata)


def decode_request(body: bytes, limits: Limits, vocab_size: int) -> TargetsRequest:
    """The request in `body`. Raises Refused, naming a field, for all that a server of these limits does not answer."""
    try:
        arrays, metadata = decode(body)
    except ValueError as error:
        raise Refused("body", f"is no safetensors of the dtypes {', '.join(_DTYPES)}: {error}") from None
    targets = next((kind for kind in KINDS if kind == metadata.get("targets")), None)
    if targets is None:
        raise Refused("targets", f"is {shown(metadata.get('targets'))}; use one of {', '.join(KINDS)}")
    wanted = {"tokens", "lengths", "starts", *{"at_ids": ("ids",), "sampled": ("seeds",)}.get(targets, ())}
    known = {"targets", *{"top_k": ("k",), "at_ids": ("k",), "sampled": ("sampled_tokens",)}.get(targets, ())}
    for field in sorted(arrays.keys() - wanted | metadata.keys() - known):
        raise Refused(field, f"is not known for targets {targets}; leave it out")
    lengths = _vector(arrays, "lengths", np.int32)
    starts, tokens = _vector(arrays, "starts", np.int32), _vector(arrays, "tokens", np.int32)
    count = len(lengths)
    _at_most("lengths", "sequences", count, limits.max_request_sequences, "max_request_sequences")
    _at_most("tokens", "tokens", len(tokens), limits.max_request_tokens, "max_request_tokens")
    if count == 0:
        raise Refused("lengths", "is empty; send at least one sequence")
    if np.min(lengths) < 1:
        raise Refused("lengths", f"holds {np.min(lengths)}; a sequence has at least one token")
    _at_most("lengths", "tokens in a sequence", int(np.max(lengths)), limits.max_sequence_tokens, "max_sequence_tokens")
    if int(np.sum(lengths, dtype=np.int64)) != len(tokens):
        raise Refused("tokens", f"has {len(tokens)} entries, but lengths add up to {np.sum(lengths, dtype=np.int64)}")
    _in_vocabulary("tokens", tokens, 0, vocab_size)
    if len(starts) != count:
        raise Refused("starts", f"has {len(starts)} entries for {count} sequences; give one for each")
    if np.any((starts < 0) | (starts >= lengths)):
        raise Refused("starts", "holds a position that its sequence has not; use 0 to its length less 1")
    ends = np.cumsum(lengths)
    sequences = [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    rows = (lengths - starts).astype(np.int64)
    entries, ids, seeds, top_k = 0, None, None, 0
    if "k" in metadata or targets == "top_k":
        top_k = _number(metadata, "k", min(limits.max_top_k, vocab_size), "max_top_k")
    if targets == "top_k":
        entries, top_k = top_k, 0
    elif targets == "at_ids":
        asked = arrays.get("ids")
        if asked is None or asked.dtype != np.int32 or asked.ndim != 2 or len(asked) != np.sum(rows):
            raise Refused("ids", f"must be int32 [{np.sum(rows)}, J]: a row for every position from starts on")
        entries = asked.shape[1]
        _at_most("ids", "ids a position", entries, limits.max_ids, "max_ids")
        if entries < 1:
            raise Refused("ids", "has no columns; ask for at least one id a position")
        _in_vocabulary("ids", asked, -1, vocab_size)
        ids = np.split(asked, np.cumsum(rows)[:-1])
    elif targets == "sampled":
        entries = _number(metadata, "sampled_tokens", limits.max_sampled_tokens, "max_sampled_tokens")
        given = _vector(arrays, "seeds", np.uint32)
        if len(given) != count:
            raise Refused("seeds", f"has {len(given)} entries for {count} sequences; give one for each")
        seeds = given.tolist()
    return TargetsRequest(
        targets=targets,
        sequences=sequences,
        starts=starts.tolist(),
        entries=entries,
        ids=ids,
        top_k=top_k,
        seeds=seeds,
    )


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Arrays and texts as safetensors."""
    # safetensors writes the memory as it lies, whatever the strides are.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(contiguous, metadata=dict(metadata))


def decode(body: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The inverse of `encode`. Raises ValueError for other bytes or dtypes."""
    try:
        tensors = safetensors.deserialize(body)
    except safetensors.SafetensorError as error:
        raise ValueError(" ".join(str(error).split())) from None
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is {tensor['dtype']}")
        dtype = np.dtype(_DTYPES[tensor["dtype"]])
        arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    header_bytes = int.from_bytes(body[:_HEADER_BYTES], "little")
    metadata = json.loads(body[_HEADER_BYTES : _HEADER_BYTES + header_bytes]).get("__metadata__") or {}
    return arrays, metadata


def _vector(arrays: Mapping[str, np.ndarray], field: str, dtype: type[np.generic]) -> np.ndarray:
    found = arrays.get(field)
    if found is None or found.dtype != dtype or found.ndim != 1:
        what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
        raise Refused(field, f"{what}; it must be {np.dtype(dtype)} of one dimension")
    return found


def _number(metadata: Mapping[str, str], field: str, most: int, limit: str) -> int:
    text = metadata.get(field, "")
    # Bounded before it is read: Python refuses texts of thousands of digits in its own way.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9) or int(text) < 1:
        raise Refused(field, f"is {shown(text)}; it must be a whole number of at least 1")
    _at_most(field, "entries a position", int(text), most, limit)
    return int(text)


def _at_most(field: str, what: str, number: int, most: int, limit: str) -> None:
    if number > most:
        raise Refused(field, f"asks for {number} {what}; this server takes at most {most} ({limit})", status=413)


def _in_vocabulary(field: str, ids: np.ndarray, least: int, vocab_size: int) -> None:
    if len(ids) and (np.min(ids) < least or np.max(ids) >= vocab_size):
        bad = int(np.min(ids)) if np.min(ids) < least else int(np.max(ids))
        absent = " or -1 for none" if least < 0 else ""
        raise Refused(field, f"holds {bad}; token ids are 0 to {vocab_size - 1}{absent}")
