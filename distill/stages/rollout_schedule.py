"""How long rollouts get over a stage: short prefixes first, for that is where most of what a teacher teaches stands.

What a student has yet to learn it gets wrong early, and text that follows a mistake teaches little. Training on
prefixes costs a fraction of training on whole rollouts and reaches as far (arXiv 2602.15260, 2605.27028). What stands
at the end, stopping above all, is learned from the share of rollouts that run to their end whatever the step.

A prefix is what the whole rollout would have begun with, token by token, and its last position, which nothing follows,
is not trained.
"""

import dataclasses
import hashlib
from typing import Literal

from qwen3.errors import UserError
from qwen3.field_types import Count, Share, check_fields
from qwen3.generation.sampling import SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """The most new tokens of a rollout, batch by batch; each mode's own max_new_tokens holds as well."""

    first: Count = 1_024
    """Most new tokens at the stage's first batch of rollouts."""
    last: Count | None = None
    """At its last one; None: the larger max_new_tokens of both modes, the whole budget. As many as `first`: prefixes
    throughout."""
    growth: Literal["geometric", "linear"] = "geometric"
    """geometric: by an equal factor at every batch; from 1,024 to 30,720 tokens that is 8,700 on average. linear: by as
    many tokens."""
    grown_share: Share = 1.0
    """Share of the stage after which `last` is reached."""
    full_share: Share = 0.1
    """Share of the rollouts that may take their mode's whole max_new_tokens at any step, so that stopping and both
    modes stay trained; 0 trains no stopping before the limit has grown. Which ones, is drawn from seed, batch, prompt
    and sample number alone."""
    full_every_batches: Count = 1
    """Only every so many batches have rollouts in full, the first one among them, and they have so many times
    full_share of them. Others end with their prefixes: a batch takes as long as its longest rollout."""

    def __post_init__(self) -> None:
        check_fields(self, "rollout_tokens")
        if self.last is not None and self.last < self.first:
            raise UserError(
                f"rollout_tokens.last is {self.last}, below first {self.first}; rollouts grow, so give at least first"
            )
        if self.full_share == 1:
            raise UserError("rollout_tokens.full_share is 1: no rollout would be cut; leave rollout_tokens out")
        if self.full_share * self.full_every_batches > 1:
            raise UserError(
                f"rollout_tokens.full_share × full_every_batches is {self.full_share:g} × {self.full_every_batches}: a "
                "batch has no more rollouts than all; lower one of them"
            )

    def check(self, thinking: SamplingParams, non_thinking: SamplingParams, batches: int) -> None:
        """Refuses a schedule that these budgets, or so many batches of rollouts, do not fit. Raises UserError."""
        budget = max(thinking.max_new_tokens, non_thinking.max_new_tokens)
        if self.first >= budget:
            raise UserError(
                f"rollout_tokens.first is {self.first}, and no max_new_tokens is above it ({budget}): no rollout would "
                "be cut; lower it, or leave rollout_tokens out"
            )
        if self.last is not None and self.last > budget:
            raise UserError(
                f"rollout_tokens.last is {self.last}, above max_new_tokens {budget}; lower it, or give None for all"
            )
        if self.full_every_batches > batches:
            raise UserError(
                f"rollout_tokens.full_every_batches is {self.full_every_batches}, and the stage generates {batches} "
                "batches: far more than full_share would run in full; lower it"
            )
        if thinking.thinking_budget == 0:
            raise UserError(
                "thinking.thinking_budget is 0: a prefix may hold nothing but the text that ends thinking, of which "
                "nothing is learned; raise it, or leave rollout_tokens out"
            )

    def limit(self, batch: int, batches: int, budget: int) -> int:
        """The most new tokens of a batch's prefixes, of so many batches; `budget` is the larger max_new_tokens."""
        last = budget if self.last is None else self.last
        done = min(1.0, batch / max(1.0, self.grown_share * batches - 1))
        if self.growth == "geometric":
            return round(self.first * (last / self.first) ** done)
        return round(self.first + (last - self.first) * done)

    def share_in_full(self, batch: int) -> float:
        """Of a batch's rollouts."""
        return 0.0 if batch % self.full_every_batches else self.full_share * self.full_every_batches

    def runs_in_full(self, seed: int, batch: int, prompt_id: str, sample_index: int) -> bool:
        """Whether a rollout may take all of its mode's budget."""
        name = f"{seed} {batch} {sample_index} {prompt_id}".encode()
        drawn = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") / 2**64
        return drawn < self.share_in_full(batch)

    def cut(self, whole: SamplingParams, batch: int, batches: int, budget: int) -> SamplingParams:
        """How a prefix is sampled in the mode that is sampled as `whole`."""
        limit = self.limit(batch, batches, budget)
        return whole if limit >= whole.max_new_tokens else dataclasses.replace(whole, max_new_tokens=limit)
