"""What a policy generated, on the host: the one record that the engine returns, stores keep and trainers read."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32

Mode = Literal["thinking", "non_thinking"]
THINKING: Final = "thinking"
NON_THINKING: Final = "non_thinking"
MODES: Final[tuple[Mode, ...]] = (THINKING, NON_THINKING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Prompt and continuation of one sequence of T tokens, with who generated each token.

    Entry t of `loss_mask`, `sampler_logprobs` and `sampler_entropies` is about token t + 1, as everywhere in this
    project; the last entry of a sequence is therefore False and 0.
    """

    tokens: Int32[np.ndarray, "T"]
    prompt_length: int
    loss_mask: Bool[np.ndarray, "T"]
    """True where the policy itself chose the next token: not in the prompt, not for forced tokens."""
    sampler_logprobs: Float32[np.ndarray, "T"]
    """Log-probability of the next token under the policy at temperature 1 and without truncation; 0 where masked."""
    mode: Mode
    prompt_id: str
    sample_index: int
    policy_step: int
    """Optimiser step of the weights that generated this."""
    finished: bool
    """Whether a stop token ended it (otherwise the length limit did)."""
    sampler_entropies: Float32[np.ndarray, "T"] | None = None
    """Entropy in nats of the distribution that the next token was drawn from, at temperature 1 and without truncation;
    0 where masked. None where the engine did not record it."""
    teacher: str = ""
    """Which of several teachers judges it, by name; empty where there is one."""

    @property
    def response(self) -> Int32[np.ndarray, "R"]:
        """The continuation without the prompt, stop token included."""
        return self.tokens[self.prompt_length :]


def with_prompt(rollout: Rollout, prompt_ids: Sequence[int]) -> Rollout:
    """The same response after another prompt, with what is known of its tokens: prompts have no part in that."""
    first, last = rollout.prompt_length - 1, len(prompt_ids) - 1

    def moved(array: np.ndarray) -> np.ndarray:
        return np.concatenate((np.zeros(last, array.dtype), array[first:]))

    entropies = rollout.sampler_entropies
    return dataclasses.replace(
        rollout,
        tokens=np.concatenate((np.asarray(prompt_ids, np.int32), rollout.response)),
        prompt_length=len(prompt_ids),
        loss_mask=moved(rollout.loss_mask),
        sampler_logprobs=moved(rollout.sampler_logprobs),
        sampler_entropies=None if entropies is None else moved(entropies),
    )


_ARRAYS: Final = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "sampler_logprobs": np.float32,
    "sampler_entropies": np.float32,
}


def rollouts_to_json(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """JSON data from which `rollouts_from_json` makes the same rollouts, bit for bit; 12 bytes a token, 17 with
    entropies."""
    records = []
    for rollout in rollouts:
        fields = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(Rollout)}
        lengths = {"length": len(rollout.tokens)}
        records.append(lengths | {name: value for name, value in fields.items() if name not in _ARRAYS})
    arrays = {
        name: base64.b64encode(
            b"".join(np.asarray(getattr(rollout, name), dtype).tobytes() for rollout in rollouts)
        ).decode()
        for name, dtype in _ARRAYS.items()
        if all(getattr(rollout, name) is not None for rollout in rollouts)
    }
    return {"records": records, **arrays}


def rollouts_from_json(data: Mapping[str, Any]) -> list[Rollout]:
    """The inverse of `rollouts_to_json`."""
    arrays: dict[str, Any] = {
        name: np.frombuffer(base64.b64decode(data[name]), dtype) for name, dtype in _ARRAYS.items() if name in data
    }
    rollouts, start = [], 0
    for record in data["records"]:
        fields = dict(record)
        end = start + fields.pop("length")
        rollouts.append(Rollout(**fields, **{name: array[start:end] for name, array in arrays.items()}))
        start = end
    return rollouts


def first_fit_rows(lengths: Sequence[int], row_length: int) -> list[int]:
    """The row that each document goes to: the longest are placed first, each into the first row with room."""
    used: list[int] = []
    row_of = [0] * len(lengths)
    # Longest first leaves the short ones to fill gaps; sorted is stable, so equal lengths keep their order.
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, taken in enumerate(used) if taken + lengths[index] <= row_length), len(used))
        if row == len(used):
            used.append(0)
        used[row] += lengths[index]
        row_of[index] = row
    return row_of
