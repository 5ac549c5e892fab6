"""The whole of it in miniature: from the command line to the report, and killed in every stage."""

import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.monitor.metrics import read_metrics
from distill.report.curves import _TEXTS, _place
from distill.report.reading import read_report, read_rollouts
from distill.report.samples import side_by_side
from distill.run import _keep_compiled
from distill.runner.execute import _cost
from distill.runner.export_folder import _found, _present
from distill.stages.loop import Spent
from distill.training.checkpoint import Checkpointer
from distill.training.train_state import TrainState, abstract_state
from qwen3.checkpoint import hf
from qwen3.decoder.model import Qwen3
from qwen3.rollout import rollouts_from_json
from qwen3.sharding import MeshShape, make_mesh
from student.init import FromScratch
from tests.distill import faults, miniature
from tests.distill.faults import Kill, launch, scalars


def test_report_has_a_row_for_every_model_and_mode(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    models = ["student_initial", "pretraining", "off_policy", "on_policy", "same_outputs", "ahead", "teacher"]
    assert [(row["model"], row["mode"]) for row in report["rows"]] == [
        (model, mode) for model in models for mode in ("thinking", "non_thinking")
    ]
    assert all(
        {"pass_at_1", "mean_response_tokens"} <= row.keys() and "2" in row["pass_at_k"] for row in report["rows"]
    )
    costs = {stage["name"]: stage for stage in report["stages"]}
    assert {name: cost["start_from"] for name, cost in costs.items()} == {
        "pretraining": "student_initial",
        "off_policy": "pretraining",
        "on_policy": "off_policy",
        "same_outputs": "off_policy",
        "ahead": "off_policy",
    }
    assert report["provenance"]["command"].startswith("python -m distill.run ")
    thinking, non_thinking = report["rows"][:2]
    assert thinking["by_family"].keys() == {"chain_sum", "products"}
    assert sum(non_thinking["length_histogram"]["counts"]) == 6 * 2
    assert costs["pretraining"]["teacher_flops"] == 0
    assert costs["off_policy"]["tokens_sampled"] > 0
    assert costs["on_policy"]["student_sample_flops"] > 0
    total = [
        sum(costs[name][field] for field in ("student_train_flops", "student_sample_flops", "teacher_flops"))
        for name in ("on_policy", "same_outputs")
    ]
    # The comparison may spend what the on-policy stage has spent, to within its last step.
    assert total[0] * 0.5 < total[1] <= total[0] * 1.25


def test_run_directory_holds_what_people_look_for(finished: Path) -> None:
    for name in ("config.json", "environment.json", "report.html", "rollouts.jsonl", "export/model.safetensors"):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").rglob("events.*"))
    assert (finished / "targets" / "off_policy" / "index.json").exists()
    assert "<script" not in (finished / "report.html").read_text()


def test_tensorboard_has_every_evaluation_where_it_was_made_in_a_run_a_stage(finished: Path) -> None:
    rows = {
        (row["model"], row["mode"]): row["pass_at_1"]
        for row in json.loads((finished / "report.json").read_text())["rows"]
    }
    for stage, start, steps in (("pretraining", "student_initial", 3), ("on_policy", "off_policy", 5)):
        events = EventAccumulator(str(finished / "tensorboard" / stage)).Reload()
        points = [(event.step, event.value) for event in events.Scalars("pass_at_1/thinking")]
        assert points == [(0, pytest.approx(rows[start, "thinking"])), (steps, pytest.approx(rows[stage, "thinking"]))]
        assert [event.step for event in events.Scalars("loss")] == list(range(1, steps + 1))
        assert {"pass_at_1_stderr/thinking", "memory_gib/process", "tokens_per_second_per_device/training"} <= set(
            events.Tags()["scalars"]
        )
        assert "mfu" not in events.Tags()["scalars"], "the peak of this machine's cores is not known"


def test_the_page_has_words_for_every_metric_and_each_models_response_to_the_same_problems(finished: Path) -> None:
    groups = {_place(name)[0] for record in read_metrics(finished) for name in record["scalars"]}
    assert groups <= _TEXTS.keys()
    problems = side_by_side(read_rollouts(finished), read_report(finished))
    assert len(problems) == 2 * 4
    assert all(len(problem["responses"]) == 7 for problem in problems)


def test_export_loads_in_transformers_and_holds_the_students_last_weights(
    experiment_file: Path, finished: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "export")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    teacher_folder = str(experiment_file.parent / "teacher")
    thinking = miniature.experiment(teacher_folder).evaluation.thinking
    for name in ("temperature", "top_p", "top_k", "min_p"):
        assert getattr(model.generation_config, name) == getattr(thinking, name), name
    assert model.generation_config.do_sample
    last, _ = _saved(finished, teacher_folder, "on_policy", 5)
    for ours, theirs in zip(jax.tree.leaves(hf.load(finished / "export")), jax.tree.leaves(last), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _saved(run: Path, teacher_folder: str, stage: str, step: int) -> tuple[Qwen3, dict]:
    """The student and the metadata of a checkpoint."""
    blank = FromScratch(architecture=miniature.DENSE, tokenizer=teacher_folder).build(jax.random.key(0))
    optimizer = miniature.experiment(teacher_folder).stages[stage].training.optimizer
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    like = abstract_state(TrainState.start(blank, optimizer.transformation(1), mesh))
    with Checkpointer(run / "checkpoints" / stage) as checkpoints:
        state, metadata = checkpoints.restore(like, step)
    return state.model, metadata


def test_every_stage_says_how_much_of_its_rows_is_padding(finished: Path) -> None:
    recorded = scalars(finished)
    assert {stage for stage, _ in recorded} == {"pretraining", "off_policy", "on_policy", "same_outputs", "ahead"}
    assert all(0 < values["padding_fraction"] < 1 for values in recorded.values())


def test_the_lag_of_rollouts_is_the_one_asked_for_and_recorded(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    lags = [record["scalars"]["staleness"] for record in records if record["stage"] == "ahead"]
    assert lags == [0, 1, 2, 2, 2]
    waits = [record["scalars"]["rollout_wait_seconds"] for record in records if record["stage"] == "ahead"]
    assert all(wait >= 0 for wait in waits)
    assert not any("staleness" in record["scalars"] for record in records if record["stage"] != "ahead")


def test_the_loss_on_stale_rollouts_is_that_of_the_current_student(experiment_file: Path, finished: Path) -> None:
    teacher_folder = str(experiment_file.parent / "teacher")
    teacher = hf.load(teacher_folder, param_dtype=jnp.float32, compute_dtype=jnp.float32)
    current, metadata = _saved(finished, teacher_folder, "ahead", 4)
    initial, _ = _saved(finished, teacher_folder, "off_policy", 4)
    data = metadata["data"]
    assert [len(data["ahead"]), data["ahead"][0]["records"][0]["policy_step"]] == [1, 2]
    rollouts = rollouts_from_json(data["ahead"][0])
    longest = max(len(rollout.tokens) for rollout in rollouts)
    tokens = np.stack([np.pad(rollout.tokens, (0, longest - len(rollout.tokens))) for rollout in rollouts])
    mask = np.stack([np.pad(rollout.loss_mask, (0, longest - len(rollout.tokens))) for rollout in rollouts])
    positions = np.broadcast_to(np.arange(longest), tokens.shape)
    said = jax.nn.log_softmax(teacher.logits(tokens, positions, np.ones_like(tokens)))

    def reverse_kl(student: Qwen3) -> float:
        own = jax.nn.log_softmax(student.logits(tokens, positions, np.ones_like(tokens)))
        return float(jnp.sum(jnp.sum(jnp.exp(own) * (own - said), -1) * mask) / mask.sum())

    recorded = scalars(finished)["ahead", 5]["loss"]
    # Two orders of summation in float32; the weights that wrote the rollouts, let alone older ones, differ by more.
    assert reverse_kl(current) == pytest.approx(recorded, rel=1e-4)
    assert reverse_kl(initial) != pytest.approx(recorded, rel=1e-2)


@pytest.mark.long
def test_killed_in_every_stage_it_ends_in_the_same_losses_and_weights(
    experiment_file: Path, finished: Path, tmp_path: Path
) -> None:
    random_state = random.Random(os.urandom(8))
    phases = ["pretraining", "off_policy: teacher generates", "on_policy", "ahead", "evaluating ahead, thinking"]
    kills = [Kill(phase=phase, delay_seconds=random_state.uniform(0, 1)) for phase in phases]
    for kill, met in faults.killed_run(experiment_file, tmp_path, kills):
        print(kill, "met it in", met)
    faults.require_same_end(tmp_path / "miniature", finished)


def test_sigterm_saves_and_exits_with_0(experiment_file: Path, finished: Path, tmp_path: Path) -> None:
    stopped = launch(experiment_file, tmp_path, kill=Kill(phase="pretraining", number=signal.SIGTERM))
    assert stopped.status == 0, stopped.output
    assert "saved after step 1 of 3" in " ".join(stopped.output.split())
    # Checkpoints come every second step; this one is there because of the signal.
    assert (tmp_path / "miniature" / "checkpoints" / "pretraining" / "1").is_dir()
    assert json.loads((tmp_path / "miniature" / "wall_seconds.json").read_text())["seconds"] > 0


@pytest.mark.long
def test_sigterm_saves_what_was_written_ahead(experiment_file: Path, finished: Path, copied: Path) -> None:
    _forget(copied, "ahead")
    stopped = launch(experiment_file, copied.parent, kill=Kill(phase="ahead", number=signal.SIGTERM))
    assert stopped.status == 0, stopped.output
    # One step, the rollouts of the next two, and a save: that is all that a stop may wait for.
    assert "saved after step 1 of 5" in " ".join(stopped.output.split())
    assert launch(experiment_file, copied.parent).status == 0
    faults.require_same_end(copied, finished)


def _forget(run: Path, stage: str, *checkpoints: int) -> None:
    """Let a copied run have stopped before `stage` had finished, or right after the first of its `checkpoints`."""
    (run / "stages" / f"{stage}.json").unlink()
    for kept in [*(run / "evaluations").glob(f"{stage}.json"), run / "report.json"]:
        kept.unlink()
    for folder in (run / "checkpoints" / stage).iterdir():
        if int(folder.name) not in checkpoints:
            shutil.rmtree(folder)


def _small_files_only() -> None:
    # What a full disk is to a checkpoint, and to nothing before it: metrics and logs are smaller. Orbax divides arrays
    # among files by their timing, so the limit lies below the largest single one (the embedding, 38 kB compressed).
    resource.setrlimit(resource.RLIMIT_FSIZE, (35_000, resource.RLIM_INFINITY))


def _error(ended: faults.Ended) -> str:
    """The one line of an error that ends with status 2."""
    assert ended.status == 2, ended.output
    assert "Traceback" not in ended.output, ended.output
    return ended.output[ended.output.index("\nerror") :].strip()


def test_damaged_and_lost_checkpoints_and_a_full_disk_leave_what_was_saved_before(
    experiment_file: Path, finished: Path, copied: Path
) -> None:
    _forget(copied, "ahead", 4, 5)
    latest = copied / "checkpoints" / "ahead" / "5"
    data = max(latest.glob("arrays/**/d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:1000])
    line = _error(launch(experiment_file, copied.parent))
    assert f"checkpoint {latest} is damaged" in line
    assert "delete this folder to resume from the one before" in line
    assert "\n" not in line

    shutil.rmtree(latest)
    line = _error(launch(experiment_file, copied.parent, before=_small_files_only))
    assert "cannot be written" in line
    assert str(latest.parent) in line
    assert "\n" not in line
    assert [path.name for path in latest.parent.iterdir() if path.name.isdigit()] == ["4"]

    # A finished stage whose last checkpoint is gone is trained to its end again, too.
    shutil.rmtree(copied / "checkpoints" / "on_policy" / "5")
    began_with = json.loads((copied / "environment.json").read_text()) | {"commit": "0123456789ab"}
    (copied / "environment.json").write_text(json.dumps(began_with))
    again = launch(experiment_file, copied.parent)
    assert again.status == 0, again.output
    faults.require_same_end(copied, finished)
    # The models that were trained again are evaluated again, so that people see what they say.
    held_out = [
        sorted((one.stage, one.step, one.mode, one.answer) for one in read_rollouts(run) if one.held_out)
        for run in (copied, finished)
    ]
    assert held_out[0] == held_out[1]
    assert "this run began with commit 0123456789ab and goes on with" in " ".join(again.output.split())
    provenance = [json.loads((run / "report.json").read_text())["provenance"] for run in (copied, finished)]
    assert provenance[0] == provenance[1] | {"commit": "0123456789ab"}


def test_a_truncated_store_is_named(experiment_file: Path, copied: Path) -> None:
    _forget(copied, "off_policy")
    shard = copied / "targets" / "off_policy" / "targets-00001.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-100])
    line = _error(launch(experiment_file, copied.parent))
    assert f"target store shard {shard} has" in line
    assert "restore it or delete" in line
    assert "\n" not in line


def test_a_checkpoint_of_another_run_is_refused(experiment_file: Path, copied: Path) -> None:
    _forget(copied, "ahead", 4)
    (copied / "run_id").write_text("0123456789abcdef")
    line = _error(launch(experiment_file, copied.parent))
    assert "is another run's; delete" in line
    assert "\n" not in line


def test_a_run_whose_directory_is_replaced_stops_and_writes_nothing_there(
    experiment_file: Path, finished: Path, tmp_path: Path
) -> None:
    ended = []
    running = threading.Thread(target=lambda: ended.append(launch(experiment_file, tmp_path)))
    running.start()
    own, deadline = tmp_path / "miniature", time.monotonic() + 60
    while not (own / "evaluations" / "student_initial.json").exists():
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.02)
    own.rename(tmp_path / "away")
    own.mkdir()
    (own / "run_id").write_text("0123456789abcdef")
    running.join()
    assert re.search(r"miniature(/\w+)* was deleted or replaced while this run was writing to it", _error(ended[0]))
    assert not list(own.glob("checkpoints/*/[0-9]*"))
    assert not (own / "export").exists()


def test_the_same_command_again_changes_nothing_and_leaves_what_others_wrote(
    experiment_file: Path, finished: Path, copied: Path
) -> None:
    (copied / "export" / "README.md").write_text("About this model.")
    (copied / "export" / "plots").mkdir()
    (copied / "export" / "plots" / "loss.png").write_bytes(b"\x89PNG")
    (copied / "export" / "generation_config.json").write_text("{}")
    names = ["metrics.jsonl", "wall_seconds.json", *(str(path) for path in copied.glob("export/**/*"))]
    before = {name: (copied / name).stat().st_mtime_ns for name in names}
    again = launch(experiment_file, copied.parent)
    assert again.status == 0, again.output
    assert {name: (copied / name).stat().st_mtime_ns for name in names} == before
    assert "export/generation_config.json is not as this run wrote it, and stays so; delete it" in again.output
    assert again.output.count("is not as this run wrote it") == 1
    for name in ("metrics.jsonl", "wall_seconds.json"):
        assert (copied / name).read_bytes() == (finished / name).read_bytes()


def test_without_a_record_export_replaces_a_model_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "export", tmp_path / "export")
    (folder / "notes.txt").write_text("mine")
    (folder / "eval_results.json").write_text("{}")
    written = json.loads((finished / "export.json").read_text())["files"]
    assert _present(folder) == sorted(written)
    # Killed between two renames, with a file of somebody's in what was put aside.
    folder.rename(tmp_path / ".export.previous")
    _, _, _, own, complete = _found(folder, tmp_path / "export.json", finished / "checkpoints" / "ahead")
    assert (own, complete) == (sorted(written), False)
    assert (folder / "notes.txt").read_text() == "mine"


def test_parts_of_a_stage_add_up_to_its_device_seconds() -> None:
    stage = miniature.experiment("teacher").stages["on_policy"]
    seconds = {"student_train_seconds": 3.0, "student_sample_seconds": 2.0, "teacher_score_seconds": 1.0}
    cost = _cost("on_policy", stage, "off_policy", Spent(steps=1, **seconds), devices=4)
    assert cost.device_seconds == 24
    assert [cost.student_train_seconds, cost.student_sample_seconds, cost.teacher_score_seconds] == [12, 8, 4]


def test_another_configuration_is_refused_with_the_fields_that_differ(experiment_file: Path, finished: Path) -> None:
    other = launch(experiment_file, finished.parent, "--stages.on-policy.training.steps", "7", "--seed", "3")
    line = _error(other)
    assert "stages.on_policy.training.steps: 5 → 7" in line
    assert "seed: 0 → 3" in line
    assert "\n" not in line


def test_compiled_programs_are_kept_beside_the_runs_unless_jax_was_told_where(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    _keep_compiled(tmp_path)
    _keep_compiled(tmp_path / "other")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".compiled")
