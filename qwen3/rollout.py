"""What a policy wrote, on the host: the one record that the engine returns, stores keep and trainers read."""

import dataclasses
from typing import Final, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32

Mode = Literal["thinking", "non_thinking"]
THINKING: Final = "thinking"
NON_THINKING: Final = "non_thinking"
MODES: Final[tuple[Mode, ...]] = (THINKING, NON_THINKING)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Prompt and continuation of one sequence of T tokens, with who wrote each token.

    Entry t of `loss_mask` and `sampler_logprobs` is about token t + 1, as everywhere in this project; the last
    entry of a sequence is therefore False and 0.
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
    """Optimiser step of the weights that wrote this."""
    finished: bool
    """Whether a stop token ended it (otherwise the length limit did)."""

    @property
    def response(self) -> Int32[np.ndarray, "R"]:
        """The continuation without the prompt, stop token included."""
        return self.tokens[self.prompt_length :]
