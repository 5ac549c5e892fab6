import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.monitor import metrics
from distill.monitor.records import read_records
from qwen3.errors import UserError

SAMPLE = metrics.RolloutSample(
    mode="thinking",
    prompt="2 + 3 = ?",
    thinking="2 + 3 is ```5```.",
    answer="<b>5</b>",
    expected="5",
    correct=True,
    working_correct=False,
    response_tokens=12,
    finished=False,
    prompt_id="sums-7",
)


def tensorboard(run_dir, stage):
    events = EventAccumulator(str(run_dir / "tensorboard" / stage), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def scalar_points(run_dir, stage, name):
    return [(event.step, event.value) for event in tensorboard(run_dir, stage).Scalars(name)]


def test_scalars_reach_both_sinks(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": np.float32(0.5), "kl/thinking": 2}, stage="off_policy")
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["stage"] == "off_policy"
    assert record["step"] == 1
    assert record["scalars"] == {"loss": 0.5, "kl/thinking": 2.0}
    assert scalar_points(tmp_path, "off_policy", "loss") == [(1, 0.5)]
    assert scalar_points(tmp_path, "off_policy", "kl/thinking") == [(1, 2.0)]


def test_everything_is_on_disk_before_close(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.scalars(1, {"loss": 0.5}, stage="off_policy")
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1
    assert scalar_points(tmp_path, "off_policy", "loss") == [(1, 0.5)]
    writer.close()


def test_value_that_is_not_finite_is_null_in_json_and_nan_in_tensorboard(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": float("nan"), "tail": float("-inf")}, stage="s")
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["scalars"] == {"loss": None, "tail": None}
    assert math.isnan(scalar_points(tmp_path, "s", "loss")[0][1])


def test_resumed_run_draws_one_line(tmp_path):
    """Killed at step 5 of the second stage, restored at 3: both sinks hold every step once, other stages untouched."""
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in range(1, 7):
            writer.scalars(step, {"loss": step}, stage="off_policy")
        for step in range(1, 6):
            writer.scalars(step, {"loss": step}, stage="on_policy")
            writer.samples(step, [SAMPLE], stage="on_policy")
    with open(tmp_path / "metrics.jsonl", "a") as torn:
        torn.write('{"stage": "on_pol')

    with metrics.MetricsWriter(tmp_path) as writer:
        writer.resume_at("on_policy", 3)
        for step in range(4, 8):
            writer.scalars(step, {"loss": 10 * step}, stage="on_policy")

    expected = [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]
    recorded = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["scalars"]["loss"]) for r in recorded if r["stage"] == "on_policy"] == expected
    assert [r["step"] for r in recorded if r["stage"] == "off_policy"] == [1, 2, 3, 4, 5, 6]
    assert scalar_points(tmp_path, "on_policy", "loss") == expected
    assert [step for step, _ in scalar_points(tmp_path, "off_policy", "loss")] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in read_records(tmp_path / "rollouts.jsonl")] == [1, 2, 3]
    texts = tensorboard(tmp_path, "on_policy").Tensors("rollouts/thinking/text_summary")
    assert [text.step for text in texts] == [1, 2, 3]


def test_resume_within_one_writer(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.scalars(step, {"loss": step}, stage="s")
        writer.resume_at("s", 1)
        writer.scalars(2, {"loss": 20}, stage="s")
    assert scalar_points(tmp_path, "s", "loss") == [(1, 1), (2, 20)]


def test_steps_that_run_backwards_are_refused(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.scalars(5, {"loss": 1}, stage="s")
        writer.scalars(5, {"pass_at_1": 1}, stage="s")
    with metrics.MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"step=4 .* recorded step 5"):
        writer.scalars(4, {"loss": 1}, stage="s")


def test_config_is_shown_once_after_two_starts(tmp_path):
    for learning_rate in (1e-3, 2e-3):
        with metrics.MetricsWriter(tmp_path) as writer:
            writer.config({"learning_rate": learning_rate})
    (text,) = tensorboard(tmp_path, "").Tensors("config/text_summary")
    assert "0.002" in text.tensor_proto.string_val[0].decode()


def test_sample_is_readable_and_its_markup_inert(tmp_path):
    markdown = SAMPLE.to_markdown()
    assert "right answer, wrong working" in markdown
    assert "cut off by the length limit" in markdown
    # The fence must be longer than the run of backticks inside.
    assert "````\n2 + 3 is ```5```.\n````" in markdown
    assert "```\n<b>5</b>\n```" in markdown
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.samples(2, [SAMPLE, SAMPLE], stage="s")
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert [json.loads(line)["thinking"] for line in lines] == [SAMPLE.thinking] * 2
    (text,) = tensorboard(tmp_path, "s").Tensors("rollouts/thinking/text_summary")
    assert text.tensor_proto.string_val[0].decode().count(markdown) == 2


def test_require_finite_names_stage_step_and_metric():
    metrics.require_finite(3, {"loss": 0.0}, stage="s")
    with pytest.raises(UserError, match=r"stage on_policy, step 37: gradient_norm is inf; lower the learning rate"):
        metrics.require_finite(37, {"loss": 1.0, "gradient_norm": float("inf")}, stage="on_policy")


def test_torn_event_file_is_cut_too(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in range(1, 5):
            writer.scalars(step, {"loss": step}, stage="s")
    (path,) = (tmp_path / "tensorboard" / "s").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.resume_at("s", 2)
        writer.scalars(3, {"loss": 30}, stage="s")
    assert scalar_points(tmp_path, "s", "loss") == [(1, 1), (2, 2), (3, 30)]


@pytest.mark.parametrize("damage", [b"", b"\x07" * 300, b'[1, {"a": "b"}]', bytes(12)])
def test_a_damaged_event_file_ends_where_the_damage_begins(tmp_path, damage):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"loss": 2.0}, stage="sft")
    (file,) = (tmp_path / "tensorboard" / "sft").iterdir()
    whole = file.read_bytes()
    for kept in (whole, b""):
        file.write_bytes(kept + damage)
        with metrics.MetricsWriter(tmp_path) as writer:
            writer.resume_at("sft", 1)
            writer.scalars(2, {"loss": 1.0}, stage="sft")
        steps = [event.step for event in tensorboard(tmp_path, "sft").Scalars("loss")]
        assert steps == ([1, 2] if kept else [2])
        for later in (tmp_path / "tensorboard" / "sft").iterdir():
            if later != file:
                later.unlink()


def test_text_past_the_restored_step_is_gone(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.text("note", step, f"step {step}", stage="s")
        writer.resume_at("s", 1)
        writer.text("note", 2, "again", stage="s")
    texts = tensorboard(tmp_path, "s").Tensors("note/text_summary")
    assert [text.tensor_proto.string_val[0].decode() for text in texts] == ["step 1", "again"]


def test_an_evaluation_stands_where_its_stage_ended_and_where_those_that_go_on_from_it_begin(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.scalars(step, {"loss": step}, stage="off_policy")
        for share in (0.4, 0.5):
            writer.evaluation(
                "off_policy",
                {"pass_at_1/thinking": share, "pass_at_1_stderr/thinking": 0.1},
                [SAMPLE],
                step=2,
                followers=["on_policy", "aside"],
            )
        writer.samples(2, [SAMPLE], stage="off_policy")
        writer.resume_at("on_policy", 0)
        writer.scalars(1, {"loss": 3}, stage="on_policy")
    assert scalar_points(tmp_path, "off_policy", "pass_at_1/thinking")[-1] == (2, 0.5)
    assert scalar_points(tmp_path, "off_policy", "pass_at_1_stderr/thinking")[0][0] == 2
    assert scalar_points(tmp_path, "off_policy", "loss") == [(1, 1), (2, 2)]
    for follower in ("on_policy", "aside"):
        assert scalar_points(tmp_path, follower, "pass_at_1/thinking")[-1] == (0, 0.5)
    # For programs it is among the evaluations: the metrics have a record a step.
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 1]
    # What was evaluated again replaces what was kept first.
    kept = [(record["held_out"], record["step"]) for record in read_records(tmp_path / "rollouts.jsonl")]
    assert kept == [(True, 2), (False, 2)]
    assert tensorboard(tmp_path, "off_policy").Tensors("held_out/thinking/text_summary")
