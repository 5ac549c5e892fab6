"""qwen3_235b_to_8b with an on-policy stage at a fraction of the cost: prefixes, two passes, a quarter of the tokens.

    python -m distill.plan experiments/qwen3_235b_to_8b_cheap.py --topology v5p:4x4x4
    python -m distill.run experiments/qwen3_235b_to_8b_cheap.py

What it is about, data, devices and how to get the checkpoints: experiments/qwen3_235b_to_8b.py. What differs is the
on-policy stage: as many updates, from rollouts that

- are prefixes which grow from 1,024 to all 30,720 new tokens by equal factors, but for a tenth of them, which come
  together in every tenth batch and run to their end (RolloutSchedule);
- are generated and scored once and learned from twice (passes);
- are learned from at a quarter of their tokens (token_share).

Hours by the plan, and of them those of the on-policy stage, plain and as it is here:
v5p:4x4x4 32 h, 2,054 chip-hours (22.8 → 4.3 h); v6e:8x8 54 h, 3,434 chip-hours (39.0 → 7.2 h);
h100:8x8 26 h, 1,659 chip-hours (18.7 → 3.5 h); h200:8x8 18 h, 1,172 chip-hours (13.1 → 2.5 h).
Nearly all of that is generating: passes halve it, and prefixes take a third of what is left. The other hours are the
teacher's in the off-policy stage.
"""

import dataclasses

from distill import Experiment, OnPolicy, RolloutSchedule
from experiments import qwen3_235b_to_8b


def config() -> Experiment:
    plain = qwen3_235b_to_8b.config()
    stage = plain.stages["on_policy"]
    assert isinstance(stage, OnPolicy)
    cheap = dataclasses.replace(
        stage,
        rollout_tokens=RolloutSchedule(first=1_024, full_share=0.1, full_every_batches=10),
        passes=2,
        token_share=0.25,
    )
    return dataclasses.replace(
        plain,
        name="qwen3_235b_to_8b_cheap",
        description="qwen3_235b_to_8b with prefixes, two passes and a quarter of the tokens in the on-policy stage.",
        stages={**plain.stages, "on_policy": cheap},
    )
