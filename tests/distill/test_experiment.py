"""An experiment is checked as a whole before anything runs."""

import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import typing
from typing import Any

import numpy as np
import pytest

from distill.evaluation.evaluate import Evaluation
from distill.experiment import Experiment, differing_fields
from distill.runner.experiment_file import _configuration_classes
from distill.stages import OffPolicy, OnPolicy, Sft
from distill.stages.loop import Training
from distill.training.losses import Loss
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
    assert dataclasses.replace(experiment, export_stage=None).lineage() == ["pretraining", "off_policy", "ahead"]
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
    with pytest.raises(UserError, match=r"may have 32768 tokens, training\.row_length is 4096; raise it"):
        OffPolicy(training=Training(steps=1, row_length=4096))
    with pytest.raises(UserError, match="sampled_tokens is 0"):
        OffPolicy(sampled_tokens=0)
    with pytest.raises(UserError, match="loss reverse_kl cannot be had from sampled tokens"):
        OffPolicy(sampled_tokens=12, loss=Loss(name="reverse_kl"))
    with pytest.raises(UserError, match=r"training\.row_length is 0"):
        Training(row_length=0)
    with pytest.raises(UserError, match="pass_at holds 16"):
        Evaluation(pass_at=(16,))
    with pytest.raises(UserError, match="'thinkin'"):
        Evaluation(modes=("thinkin",))  # type: ignore[arg-type]


@pytest.mark.parametrize("owner", [OnPolicy(), OffPolicy(), Evaluation()])
def test_defaults_fill_the_context_of_qwen3s_base_models(owner: OnPolicy | OffPolicy | Evaluation) -> None:
    assert owner.max_prompt_tokens + owner.thinking.max_new_tokens == 32_768


def test_drawn_words_of_another_stage_give_only_the_forward_kl(experiment: Experiment) -> None:
    drawn = changed(experiment, "off_policy", sampled_tokens=12)
    with pytest.raises(UserError, match=r"same_outputs\.loss is reverse_kl, but off_policy keeps sampled tokens"):
        changed(drawn, "same_outputs", loss=Loss(name="reverse_kl"))


def test_rows_hold_what_another_stage_writes(experiment: Experiment) -> None:
    training = dataclasses.replace(experiment.stages["same_outputs"].training, row_length=96)
    with pytest.raises(
        UserError, match="row_length is 96, but what off_policy generates may have 116 tokens; raise it"
    ):
        changed(experiment, "same_outputs", training=training)


def test_json_names_every_difference(experiment: Experiment) -> None:
    other = changed(dataclasses.replace(experiment, seed=4), "on_policy", prompts_per_step=9)
    assert differing_fields(experiment.to_json(), other.to_json()) == [
        "stages.on_policy.prompts_per_step: 8 → 9",
        "seed: 0 → 4",
    ]
    assert differing_fields(experiment.to_json(), experiment.to_json()) == []
    assert experiment.to_json()["stages"]["off_policy"]["kind"] == "OffPolicy"


def test_every_field_is_described() -> None:
    """What --help and an editor show; a field that is a dataclass speaks for itself."""
    undescribed = []
    for kind in _configuration_classes():
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in itertools.pairwise(definition.body):
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and not described:
                assert isinstance(statement.target, ast.Name)
                hint = typing.get_type_hints(kind)[statement.target.id]
                plain = not dataclasses.is_dataclass(hint) and typing.get_origin(hint) is not typing.ClassVar
                undescribed += [f"{kind.__name__}.{statement.target.id}"] if plain else []
    assert undescribed == []


def test_what_is_wrong_with_an_experiment_is_said_at_once(experiment: Experiment) -> None:
    stages = {"a": Sft(start_from="b"), "b": Sft(start_from="c"), "c d": Sft()}
    with pytest.raises(UserError) as caught:
        dataclasses.replace(experiment, stages=stages, tasks={"": miniature.task()}, export_stage="z")
    for part in (
        "tasks has ''",
        "stages.a.start_from is 'b'",
        "stages.b.start_from is 'c'",
        "'c d'",
        "export_stage is 'z'",
    ):
        assert part in str(caught.value)


def test_numpys_numbers_are_written_as_json(experiment: Experiment) -> None:
    other = dataclasses.replace(experiment, seed=np.int64(4))
    assert json.loads(json.dumps(other.to_json())) == dataclasses.replace(experiment, seed=4).to_json()


def test_students_are_compared_where_there_is_a_teacher_and_an_evaluation() -> None:
    whole = miniature.experiment("teacher")
    assert whole.compares
    off = dataclasses.replace(whole, evaluation=dataclasses.replace(whole.evaluation, problems=0))
    supervised = dataclasses.replace(
        whole, teacher=None, stages={"pretraining": whole.stages["pretraining"]}, export_stage=None
    )
    assert not off.compares
    assert not supervised.compares
    # The cross-entropy names one token, whether it is trained or measured.
    assert supervised.tokens_per_target == 1
    with pytest.raises(UserError, match=r"evaluation\.problems is -1; it must be at least 0"):
        Evaluation(problems=-1)
