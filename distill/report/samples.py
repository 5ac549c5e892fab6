"""Responses for people: every model's to the same problem side by side, and rollouts that were trained on."""

from collections.abc import Sequence
from typing import Any

from distill.report.lineage import caption, exported, in_order
from distill.report.reading import ShownRollout
from distill.report.results import Report, mode_name

_MOST_ROLLOUTS_A_GROUP = 6


def side_by_side(rollouts: Sequence[ShownRollout], report: Report) -> list[dict[str, Any]]:
    """One entry a held-out problem and mode: the problem, and the response of each model that has one."""
    found: dict[tuple[str, str], dict[str, ShownRollout]] = {}
    for rollout in rollouts:
        if rollout.held_out:
            found.setdefault((rollout.mode, rollout.prompt_id), {})[rollout.stage] = rollout
    order = in_order(report)
    entries = []
    for (mode, _), responses in found.items():
        models = [model for model in order if model in responses]
        if not models:
            continue
        entries.append(
            {
                "mode_name": mode_name(mode),
                "prompt": responses[models[0]].prompt,
                "expected": responses[models[0]].expected,
                "responses": [
                    {
                        "caption": caption(model, report),
                        "is_exported": model == exported(report),
                        "verdict": _verdict(responses[model]),
                        "rollout": responses[model],
                    }
                    for model in models
                ],
            }
        )
    return entries


def training_groups(rollouts: Sequence[ShownRollout], stages: Sequence[str]) -> list[dict[str, Any]]:
    """The latest rollouts of each of these stages and mode that were trained on."""
    groups: dict[tuple[str, str], list[ShownRollout]] = {}
    for rollout in rollouts:
        if not rollout.held_out and rollout.stage in stages:
            groups.setdefault((rollout.stage, rollout.mode), []).append(rollout)
    return [
        {
            "stage": stage,
            "mode_name": mode_name(mode),
            "rollouts": [
                {"verdict": _verdict(member), "rollout": member} for member in members[-_MOST_ROLLOUTS_A_GROUP:]
            ],
        }
        for (stage, mode), members in groups.items()
    ]


def _verdict(rollout: ShownRollout) -> tuple[str, str]:
    """The class by which it is coloured, and the words."""
    if rollout.correct is None:
        return "open", "not graded"
    if not rollout.correct:
        return "wrong", "✗ wrong"
    return "right", "✓ right, wrong working" if rollout.working_correct is False else "✓ right"
