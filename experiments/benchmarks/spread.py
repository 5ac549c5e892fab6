"""Mean and spread over runs of one experiment that differ in their seed, as a Markdown table.

for seed in 0 1 2; do python -m distill.run experiments/quickstart.py --seed $seed --name quickstart-$seed; done
python -m experiments.benchmarks.spread runs/quickstart-0 runs/quickstart-1 runs/quickstart-2
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.report.results import mode_name, model_name


def main(directories: Sequence[str]) -> None:
    reports = [json.loads((Path(directory) / "report.json").read_text()) for directory in directories]
    print(f"{len(reports)} seeds, mean ± standard deviation, pass@1 in %\n")
    print("| model | mode | pass@1 | by seed | working right | tokens |")
    print("|---|---|---|---|---|---|")
    for row in reports[0]["rows"]:
        same = [_row(report, row["model"], row["mode"]) for report in reports]
        shares = [100 * one["pass_at_1"] for one in same]
        working = [100 * one["working_correct"] for one in same if "working_correct" in one]
        tokens = statistics.mean(one["mean_response_tokens"] for one in same)
        print(
            f"| {model_name(row['model'])} | {mode_name(row['mode'])} | {_spread(shares)} | "
            f"{', '.join(f'{share:.1f}' for share in shares)} | {_spread(working) if working else ''} | {tokens:.1f} |"
        )
    print(
        "\n| stage | steps | GFLOP | seconds | of which teacher generates | teacher scores |\n|---|---|---|---|---|---|"
    )
    for stage in reports[0]["stages"]:
        same = [next(one for one in report["stages"] if one["name"] == stage["name"]) for report in reports]
        flops = [
            sum(one[field] for field in ("student_train_flops", "student_sample_flops", "teacher_flops")) / 1e9
            for one in same
        ]
        print(
            f"| {stage['name']} | {_mean(same, 'steps'):.0f} | {statistics.mean(flops):,.0f} | "
            f"{_mean(same, 'device_seconds'):.0f} | {_mean(same, 'teacher_generate_seconds'):.1f} | "
            f"{_mean(same, 'teacher_score_seconds'):.1f} |"
        )
    minutes = ", ".join(f"{report['wall_seconds'] / 60:.1f}" for report in reports)
    print(f"\nMinutes from command to report: {minutes}")


def _row(report: dict[str, Any], model: str, mode: str) -> dict[str, Any]:
    return next(row for row in report["rows"] if (row["model"], row["mode"]) == (model, mode))


def _mean(stages: Sequence[dict[str, Any]], field: str) -> float:
    return statistics.mean(stage.get(field, 0.0) for stage in stages)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


if __name__ == "__main__":
    main(sys.argv[1:])
