"""An experiment is checked as a whole before anything runs."""

import dataclasses
from typing import Any

import pytest

from distill.evaluate import Evaluation
from distill.experiment import Experiment, differing_fields
from distill.stages import OffPolicy, OnPolicy, Sft
from distill.stages.loop import Training
from qwen3.errors import UserError
from tests.distill import miniature


@pytest.fixture
def experiment() -> Experiment:
    return miniature.experiment("somewhere")


def changed(experiment: Experiment, stage: str, **fields: Any) -> Experiment:
    stages = dict(experiment.stages)
    stages[stage] = dataclasses.replace(stages[stage], **fields)
    return dataclasses.replace(experiment, stages=stages)


def test_lineage_leaves_comparisons_out(experiment: Experiment) -> None:
    assert experiment.lineage() == ["pretraining", "off_policy", "on_policy"]
    assert dataclasses.replace(experiment, export_stage=None).lineage() == ["pretraining", "off_policy", "same_outputs"]
    assert experiment.start_of("same_outputs") == "off_policy"
    assert experiment.start_of("pretraining") is None


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("on_policy", {"start_from": "of_policy"}, "perhaps you meant 'off_policy'"),
        ("off_policy", {"start_from": "on_policy"}, "no earlier stage"),
        ("same_outputs", {"targets_of": "pretraining"}, "writes no targets of its own"),
        ("same_outputs", {"flops_of": "nothing"}, "stages.same_outputs.flops_of is 'nothing'"),
    ],
)
def test_references_to_stages(experiment: Experiment, stage: str, fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        changed(experiment, stage, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "../elsewhere"}, "names a folder"),
        ({"seed": -1}, "seed is -1"),
        ({"stages": {}}, "stages is empty"),
        ({"stages": {"teacher": Sft()}}, "stages has 'teacher'"),
        ({"stages": {"a b": Sft()}}, "stages has 'a b'"),
        ({"export_stage": "on_polcy"}, "perhaps you meant 'on_policy'"),
        ({"teacher": None}, "needs a teacher"),
        ({"export_adapter": True}, "export_adapter is True, but the student has no adapters"),
    ],
)
def test_fields_out_of_range(experiment: Experiment, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(experiment, **fields)


def test_stages_check_their_own_fields() -> None:
    with pytest.raises(UserError, match=r"either training\.steps or flops_of"):
        OffPolicy(flops_of="on_policy")
    with pytest.raises(UserError, match=r"either training\.steps or flops_of"):
        OffPolicy(training=Training(steps=None))
    with pytest.raises(UserError, match="row_length is 4096; raise it"):
        OnPolicy(training=Training(steps=1, row_length=4096))
    with pytest.raises(UserError, match=r"training\.row_length is 0"):
        Training(row_length=0)
    with pytest.raises(UserError, match="pass_at holds 16"):
        Evaluation(pass_at=(16,))
    with pytest.raises(UserError, match="'thinkin'"):
        Evaluation(modes=("thinkin",))  # type: ignore[arg-type]


def test_defaults_of_the_stages_fit_together() -> None:
    assert OnPolicy().training.row_length >= OnPolicy().max_prompt_tokens + OnPolicy().thinking.max_new_tokens
    assert OffPolicy().training.row_length >= OffPolicy().max_prompt_tokens + OffPolicy().thinking.max_new_tokens


def test_json_names_every_difference(experiment: Experiment) -> None:
    other = changed(dataclasses.replace(experiment, seed=4), "on_policy", prompts_per_step=9)
    assert differing_fields(experiment.to_json(), other.to_json()) == [
        "stages.on_policy.prompts_per_step: 8 → 9",
        "seed: 0 → 4",
    ]
    assert differing_fields(experiment.to_json(), experiment.to_json()) == []
    assert experiment.to_json()["stages"]["off_policy"]["kind"] == "OffPolicy"
