"""A run from first check to export, as a list of steps; each is skipped where an earlier process has done it."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill.experiment import Experiment
from distill.monitor.environment import commit
from distill.monitor.metrics import METRICS_FILE, MetricsWriter, NoMetrics
from distill.monitor.progress import Progress
from distill.report.report import Report, StageCost, write_report
from distill.report.results import STUDENT_INITIAL, TEACHER, record_json
from distill.runner import selftest
from distill.runner.evaluations import Evaluations
from distill.runner.export_folder import check_export_record, export_student
from distill.runner.parts import parts_of
from distill.runner.preflight import preflight
from distill.runner.run_directory import RunDirectory
from distill.runner.teachers import Teachers, check_one_tokenizer
from distill.stages import Grpo, Stage
from distill.stages.context import RunContext, StopRequest
from distill.stages.loop import Spent, trained_model
from qwen3.chat.chat import ChatTokenizer
from qwen3.decoder.adapter import adapter_parameters
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.hosts.processes import first_says, is_first


def execute(
    experiment: Experiment, directory: Path, progress: Progress, stop: StopRequest, command: str | None = None
) -> Report:
    """Run `experiment` in `directory`, or what is left of it, and return the report that it has written.

    `command`, by which it was started, is told in the report, where nothing was done before.

    Raises UserError for what the user can mend and Interrupted where the run was asked to stop and has saved.
    """
    with RunDirectory.claim(directory, experiment) as run, contextlib.ExitStack() as opened:
        first_says(lambda: check_export_record(directory))
        mesh, teacher_mesh = experiment.meshes()
        tokenizer = _tokenizer(experiment, run.began)
        tasks = experiment.mixture()
        agreements = _agreements(experiment, tokenizer, run.began)
        finished = [name for name in experiment.stages if run.cost(name) is not None]
        preflight(experiment, mesh, teacher_mesh, tokenizer, tasks, progress, finished)
        teachers = Teachers(experiment, tokenizer, teacher_mesh, progress)
        opened.enter_context(teachers.served(run))
        teachers.check_stores(finished)
        student = _student(experiment, tokenizer, mesh)
        rewards = any(isinstance(stage, Grpo) for stage in experiment.stages.values())
        agreements += selftest.check_numerics(student, tokenizer, experiment.evaluation.modes[0], mesh, rewards=rewards)
        for agreement in agreements:
            progress.print(f"self-test  {agreement.check}: {agreement.finding}")

        began_with = run.begin(command)
        if began_with.get("commit") != (now := commit()):
            progress.print(f"this run began with commit {began_with.get('commit')} and goes on with {now}")
        first_says(functools.partial(teachers.keep_identities, run.path))
        metrics = opened.enter_context(_metrics(directory))
        metrics.config(experiment.to_json())
        costs: dict[str, StageCost] = {}
        context = RunContext(
            directory=directory,
            run_id=run.run_id,
            seed=experiment.seed,
            mesh=mesh,
            tokenizer=tokenizer,
            tasks=tasks,
            load_teacher=teachers.load,
            teachers=tuple(experiment.all_teachers) or ("",),
            metrics=metrics,
            progress=progress,
            stop=stop,
            costs=costs,
            starts={name: experiment.start_of(name) or STUDENT_INITIAL for name in experiment.stages},
            keep_time=run.keep_time,
        )
        _say_lost_records(run, experiment, metrics, progress)
        names = (STUDENT_INITIAL, *experiment.stages, TEACHER)
        progress.plan(parts_of(experiment, [name for name in names if run.evaluation(name)], finished))
        evaluations = Evaluations(experiment, context, run)
        rows = evaluations.of_student(STUDENT_INITIAL, student)
        models: dict[str | None, Qwen3] = {None: student}
        for name, stage in experiment.stages.items():
            start = models[experiment.start_of(name)]
            models[name], costs[name] = _stage(name, stage, start, context, run)
            rows += evaluations.of_student(name, models[name])
            _forget_unneeded(experiment, name, models)
        rows += evaluations.of_teacher()
        context.require_directory()
        export_student(experiment, models[experiment.lineage()[-1]], context)
        folders = {teacher.path for teacher in experiment.all_teachers.values()}
        report = Report(
            experiment=experiment.name,
            description=experiment.description,
            rows=rows,
            stages=list(costs.values()),
            lineage=experiment.lineage(),
            student_parameters=_parameters(student.config),
            adapter_parameters=adapter_parameters(student) or None,
            teacher_parameters=sum(_parameters(ModelConfig.from_folder(folder)) for folder in folders) or None,
            wall_seconds=first_says(run.clock.total),
            provenance=_provenance(experiment, began_with),
        )
        if is_first():
            write_report(directory, report)
        return report


def _provenance(experiment: Experiment, began_with: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the same run again: the command and the commit with which this one began."""
    paths = {name: teacher.path for name, teacher in experiment.all_teachers.items()}
    known: dict[str, Any] = {"seed": experiment.seed, "teacher": paths.get("", ", ".join(paths.values())) or None}
    known |= {name: began_with.get(name) for name in ("command", "commit")}
    return {name: value for name, value in known.items() if value is not None}


def _say_lost_records(run: RunDirectory, experiment: Experiment, metrics: MetricsWriter, progress: Progress) -> None:
    for name in experiment.stages:
        cost = run.cost(name)
        if cost is not None and is_first() and (last := metrics.last_step(name)) < cost.steps:
            progress.print(
                f"{run.path / METRICS_FILE} has lost what stage {name} recorded after step {last} of {cost.steps}, "
                "and its curves end there; restore it from a copy to have them whole"
            )


def _metrics(directory: Path) -> MetricsWriter:
    return MetricsWriter(directory) if is_first() else NoMetrics()


def _student(experiment: Experiment, tokenizer: ChatTokenizer, mesh: Mesh) -> Qwen3:
    key = jax.random.key(experiment.seed)
    model = experiment.student.build(key, mesh, jnp.float32, jnp.dtype(experiment.compute_dtype))
    # The student ends as the teacher does, and says so in the exported config.json.
    eos = tokenizer.eos_ids[0] if len(tokenizer.eos_ids) == 1 else tokenizer.eos_ids
    model.config = dataclasses.replace(model.config, eos_token_id=eos, pad_token_id=tokenizer.pad_id)
    model.kernels = experiment.kernels
    return model


def _tokenizer(experiment: Experiment, began: datetime) -> ChatTokenizer:
    """The teacher's; without a teacher the student's, which then stops where the turns end that it learns to write."""
    if teachers := experiment.all_teachers:
        check_one_tokenizer(teachers)
        return ChatTokenizer.from_folder(next(iter(teachers.values())).path, now=began)
    return ChatTokenizer.from_folder(experiment.student.tokenizer_folder, now=began).stopping_at_turns()


def _agreements(experiment: Experiment, tokenizer: ChatTokenizer, began: datetime) -> list[selftest.Agreement]:
    """What student and teacher, whose tokenizer is given, agree upon."""
    found: list[selftest.Agreement] = []
    for path in dict.fromkeys(teacher.path for teacher in experiment.all_teachers.values()):
        found = selftest.check_tokenizers(
            ChatTokenizer.from_folder(experiment.student.tokenizer_folder, now=began),
            experiment.student.model_config(),
            tokenizer,
            ModelConfig.from_folder(path),
        )
    return found


def _stage(name: str, stage: Stage, start: Qwen3, context: RunContext, run: RunDirectory) -> tuple[Qwen3, StageCost]:
    done = run.cost(name)
    if done is not None:
        trained = trained_model(name, start, stage.training, context, done.steps)
        if trained is not None:
            return trained, done
    # Of a student that is there no more, if there is any: its last checkpoint is gone.
    run.forget_evaluation(name)
    model, spent = stage.run(name, start, context)
    cost = _cost(name, stage, context.starts[name], spent, jax.device_count())
    run.keep_cost(name, record_json(cost))
    return model, cost


def _cost(name: str, stage: Stage, start: str, spent: Spent, devices: int) -> StageCost:
    seconds = {field: getattr(spent, field) * devices or None for field in _SECONDS}
    return StageCost(
        name=name,
        kind=stage.kind,
        start_from=start,
        steps=spent.steps,
        tokens_trained=spent.tokens_trained,
        tokens_sampled=spent.tokens_sampled,
        student_train_flops=spent.student_train_flops,
        student_sample_flops=spent.student_sample_flops,
        teacher_flops=spent.teacher_flops,
        device_seconds=spent.seconds * devices,
        **seconds,
    )


_SECONDS = ("student_train_seconds", "student_sample_seconds", "teacher_generate_seconds", "teacher_score_seconds")


def _forget_unneeded(experiment: Experiment, name: str, models: dict[str | None, Qwen3]) -> None:
    """Free the students that no later stage and no export will ask for."""
    names = list(experiment.stages)
    later = names[names.index(name) + 1 :]
    needed = {experiment.start_of(other) for other in later} | {experiment.lineage()[-1]}
    for held in [held for held in models if held not in needed]:
        del models[held]


def _parameters(config: ModelConfig) -> int:
    """Of the model itself: adapters are counted apart, and scales of quantised weights are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: Qwen3(config, jax.random.key(0)))))
