"""What generating rollouts ahead of training gains: the quickstart's on-policy stage at several lags.

    python -m experiments.benchmarks.staleness --lags 0 1 2 --steps 20

prints one line of JSON for each lag. Steps are timed by their records, so scoring, judging and logging are in them.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from distill.experiment import Experiment
from distill.monitor.progress import Progress
from distill.runner.execute import execute
from distill.stages import OnPolicy
from distill.stages.stopping import StopRequest
from distill.training.host_memory import keep_freed_memory
from experiments import quickstart
from experiments.benchmarks.machine import machine
from experiments.benchmarks.turns import peak_rss_mb


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure."""

    lags: tuple[int, ...] = (0, 1, 2)
    """Values of max_staleness, measured one after the other."""
    steps: int = 20
    """Steps of each."""
    warm: int = 4
    """Steps at the beginning that are not counted; the first one compiles."""


def main(arguments: Arguments) -> None:
    for lag in arguments.lags:
        with tempfile.TemporaryDirectory() as folder, Progress(Console(quiet=True, force_terminal=False)) as progress:
            execute(_experiment(lag, arguments.steps), Path(folder), progress, StopRequest())
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if record["stage"] == "on_policy"]
        ended = [record["unix_seconds"] for record in records][arguments.warm - 1 :]
        counted = [record["scalars"] for record in records][arguments.warm :]
        row = {
            "benchmark": "staleness",
            "max_staleness": lag,
            "step_seconds": round((ended[-1] - ended[0]) / len(counted), 4),
            "median_step_seconds": round(float(np.median(np.diff(ended))), 4),
            "rollout_wait_seconds": _mean(counted, "rollout_wait_seconds"),
            "train_tokens_per_second": _mean(counted, "tokens_per_second_per_device/training"),
            "sample_tokens_per_second": _mean(counted, "tokens_per_second_per_device/generation"),
            "steps": len(counted),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            **machine(),
        }
        print(json.dumps({name: value for name, value in row.items() if value is not None}), flush=True)


def _experiment(lag: int, steps: int) -> Experiment:
    whole = quickstart.config()
    stage = whole.stages["on_policy"]
    assert isinstance(stage, OnPolicy)
    training = dataclasses.replace(stage.training, steps=steps, checkpoint_every_steps=steps)
    return dataclasses.replace(
        whole,
        name=f"staleness-{lag}",
        stages={"on_policy": dataclasses.replace(stage, max_staleness=lag, training=training)},
        evaluation=dataclasses.replace(whole.evaluation, problems=8, samples_per_problem=1, pass_at=(1,), batch_size=8),
    )


def _mean(records: list[dict[str, float]], name: str) -> float | None:
    return round(float(np.mean([record[name] for record in records])), 3) if name in records[0] else None


if __name__ == "__main__":
    keep_freed_memory()
    main(tyro.cli(Arguments, description=__doc__))
