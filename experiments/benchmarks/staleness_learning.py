"""What generating rollouts ahead of training does to what is learned: the quickstart's two stages, at a lag of choice.

    for seed in 0 1 2; do for lag in 0 1; do
        python -m distill.run experiments/benchmarks/staleness_learning.py --name lag-$lag-$seed --seed $seed \
            --stages.on_policy.max_staleness $lag
    done; done
    for lag in 0 1; do python -m distill.report runs/lag-$lag-{0,1,2}; done

prints a table for each lag. Runs of one seed have the same student before the on-policy stage, bit for bit, and the
same prompts in it.
"""

import dataclasses

from distill import Experiment
from experiments import quickstart


def config() -> Experiment:
    whole = quickstart.config()
    return dataclasses.replace(
        whole,
        name="staleness_learning",
        description="The quickstart without its comparisons, to be run with several values of max_staleness.",
        stages={name: whole.stages[name] for name in ("off_policy", "on_policy")},
    )
