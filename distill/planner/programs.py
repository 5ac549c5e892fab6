"""What an experiment compiles: its models as shapes, placed on a topology's devices, and the programs that run them.

No weight is read or made. Each program is the function that the run calls, from the class that calls it, with abstract
arguments placed as the run places them.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from distill.evaluation.comparison import SumsProgram, scoring_shape, sums_program
from distill.experiment import Experiment, Teacher, asks_for_hidden, asks_teacher, scoring_passes, teacher_field
from distill.planner.program import EVALUATION, Program, Purpose, Role
from distill.stages import Grpo, OffPolicy, OnPolicy, Sft, Stage
from distill.stages.asking import places_of_stage
from distill.stages.context import EngineSizes, make_engine
from distill.stages.loop import Training
from distill.training.losses import Loss
from distill.training.policy import PolicyData
from distill.training.train_state import TrainState
from distill.training.train_step import Batch, TrainStep
from qwen3.checkpoint.quantisation import Quantisation, quantised
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.sharding import placed_shapes
from student.init import FromCheckpoint
from teacher.scoring import (
    ScoringProgram,
    at_ids_program,
    following_program,
    head_sharding,
    hidden_program,
    packed_shape,
    sampled_program,
    top_k_program,
)
from teacher.targets import Hidden, Sampled, Targets, TopK, one_hot


def programs(experiment: Experiment, devices: list[jax.Device]) -> list[Program]:
    """All programs of a run on `devices` (`kernels_pallas.topologies.devices`), in the order of its stages.

    A step's update and, where it may have several, its later microbatches count once; the short programs of a run's
    start and end are left out, and so are, of what lies beside a program, the targets of microbatches whose turn is yet
    to come, with several passes of the whole batch. Raises UserError where the devices do not make up the experiment's
    meshes, a size does not divide, or an architecture is not known.
    """
    return list(_Planned(experiment, devices).programs())


def architectures(experiment: Experiment) -> dict[str, tuple[ModelConfig, str]]:
    """By field, the architecture and the folder that says so: the checkpoint's, or `planned_as` as long as it lacks a
    config.json. Raises UserError where there is neither."""
    student = experiment.student
    if isinstance(student, FromCheckpoint):
        found = {"student": _architecture(student.path, student.planned_as)}
    else:
        found = {"student": (student.model_config(), student.tokenizer)}
    for name, teacher in experiment.all_teachers.items():
        found[teacher_field(name)] = _architecture(teacher.path, teacher.planned_as)
    return found


def _architecture(path: str, planned_as: str | None) -> tuple[ModelConfig, str]:
    folder = planned_as if planned_as is not None and not (Path(path) / "config.json").exists() else path
    return ModelConfig.from_folder(folder), folder


def _fresh(config: ModelConfig, quantisation: Quantisation | None = None, **dtypes: Any) -> Qwen3:
    def make() -> Qwen3:
        model = Qwen3(config, jax.random.key(0), **dtypes)
        return model if quantisation is None else quantised(model, quantisation)

    return jax.eval_shape(make)


def _batch_shapes(rows: int, length: int, targets: Targets | None, places: int | None = None) -> Batch:
    def array(dtype: DTypeLike, columns: int = length) -> Any:
        return jax.ShapeDtypeStruct((rows, columns), dtype)

    return Batch(
        tokens=array(np.int32),
        positions=array(np.int32),
        segment_ids=array(np.int32),
        loss_mask=array(np.bool_, places or length),
        mode=array(np.uint8, places or length),
        targets=targets,
        places=None if places is None else array(np.int32, places),
    )


@dataclasses.dataclass
class _Tokens:
    """Stands in for a tokenizer, of whose tokens only the number enters a program."""

    eos_ids: tuple[int, ...] = (0,)
    pad_id: int = 0
    think_end_id: int | None = 0

    @property
    def stop_thinking_ids(self) -> tuple[int, ...]:
        """As many as Qwen3's stop-thinking text has."""
        return (0,) * 24


class _Planned:
    """The abstract models of an experiment, and the programs that run them."""

    def __init__(self, experiment: Experiment, devices: list[jax.Device]):
        self._experiment = experiment
        self._mesh, self._teacher_mesh = experiment.meshes(devices)
        experiment.check_meshes(self._mesh, self._teacher_mesh)
        known = architectures(experiment)
        named = experiment.tokens_per_target
        self._student = self._placed(self._fresh_student(known["student"][0]), self._mesh, tokens_per_target=named)
        # Equal ones are one. Of several the largest is taken to answer all; the others lie in memory.
        fields = {teacher.as_loaded: teacher_field(name) for name, teacher in experiment.all_teachers.items()}
        teachers = [
            self._placed(self._fresh_teacher(teacher, known[field][0]), self._teacher_mesh)
            for teacher, field in fields.items()
        ]
        teachers.sort(key=lambda model: sum(leaf.size for leaf in jax.tree.leaves(model)))
        self._teacher: Qwen3 | None = teachers.pop() if teachers else None
        self._other_teachers = teachers

    def _placed(self, model: Qwen3, mesh: Mesh, *, tokens_per_target: int = 0) -> Qwen3:
        kernels = self._experiment.kernels
        with jax.set_mesh(mesh):
            kernels.check(model.config, model.compute_dtype, mesh, tokens_per_target=tokens_per_target)
        model.kernels = kernels
        return placed_shapes(model, mesh)

    def _fresh_teacher(self, teacher: Teacher, config: ModelConfig) -> Qwen3:
        dtype = jnp.dtype(teacher.dtype)
        return _fresh(config, teacher.quantisation, param_dtype=dtype, compute_dtype=dtype)

    def _fresh_student(self, config: ModelConfig) -> Qwen3:
        student, dtype = self._experiment.student, jnp.dtype(self._experiment.compute_dtype)
        lora = student.lora if isinstance(student, FromCheckpoint) else None
        if lora is None:
            return _fresh(config, param_dtype=jnp.float32, compute_dtype=dtype)
        lora.check(config)

        def adapted() -> Qwen3:
            model = Qwen3(config, jax.random.key(0), param_dtype=jnp.dtype(lora.base_dtype), compute_dtype=dtype)
            lora.attach(model, jax.random.key(0), dtype=jnp.float32)
            return model

        return jax.eval_shape(adapted)

    def programs(self) -> Iterator[Program]:
        for name, stage in self._experiment.stages.items():
            if isinstance(stage, OnPolicy | Grpo):
                yield from self._generates(name, "student", stage.generation)
                if asks_teacher(stage):
                    yield self._scores(name, stage)
                if scoring_passes(stage):
                    yield self._scores_itself(name, stage)
            elif isinstance(stage, OffPolicy) and stage.writes:
                yield from self._generates(name, "teacher", stage.generation)
                yield self._scores(name, stage)
            yield from self._trains(name, stage)
        evaluation = self._experiment.evaluation
        if evaluation.problems:
            yield from self._generates(EVALUATION, "student", evaluation.generation)
        if self._experiment.compares:
            yield from self._generates(EVALUATION, "teacher", evaluation.generation)
            yield from self._compares(evaluation.generation)

    def _generates(self, stage: str, role: Role, sizes: EngineSizes) -> Iterator[Program]:
        model, mesh = self._model(role)
        # A stage generates in both modes at once, an evaluation in one after the other: this is its first one.
        together = sizes.sampling[:1] if stage == EVALUATION else sizes.sampling
        programs = make_engine(model.config, _Tokens(), sizes).programs(model, together)
        prefills: Purpose = "teacher_prefills" if role == "teacher" else "student_prefills"
        generates: Purpose = "teacher_generates" if role == "teacher" else "student_generates"
        beside = self._beside(stage, generates)
        yield Program(
            stage=stage,
            purpose=prefills,
            model=model.config,
            mesh=mesh,
            beside=beside,
            function=programs.prefill,
            arguments=programs.prefill_arguments,
            options=programs.prefill_options,
            rows=programs.prefill_arguments[2].tokens.shape[1],
            length=sizes.max_prompt_tokens,
        )
        yield Program(
            stage=stage,
            purpose=generates,
            model=model.config,
            mesh=mesh,
            beside=beside,
            function=programs.decode,
            arguments=programs.decode_arguments,
            options=programs.decode_options,
            rows=sizes.batch_size,
            groups=sizes.batch_size // programs.decode_arguments[4].token.shape[0],
            length=sizes.longest_tokens,
        )

    def _scores_itself(self, name: str, stage: OnPolicy | Grpo) -> Program:
        """What the student says of its own tokens where older weights generated them, and what it said at the start;
        which tokens are its likeliest."""
        rows, length = packed_shape(self._mesh, stage.training.rows, stage.training.row_length)
        if stage.targets is None:
            program = following_program(self._student, self._mesh, rows=rows, length=length)
        else:
            program = top_k_program(self._student, self._mesh, rows=rows, length=length, k=stage.targets.k)
        return Program(
            stage=name,
            purpose="student_scores",
            model=self._student.config,
            function=program.function,
            arguments=program.arguments,
            mesh=self._mesh,
            rows=rows,
            length=length,
            beside=self._beside(name, "student_scores"),
        )

    def _scores(self, name: str, stage: OffPolicy | OnPolicy | Grpo) -> Program:
        model, mesh = self._model("teacher")
        if isinstance(stage, OnPolicy | Grpo):
            rows, length = stage.training.rows, stage.training.row_length
            if stage.targets is None:
                program = hidden_program(model, mesh, rows=rows, length=length, places=self._places(stage))
            else:
                asked, k, places = stage.targets.asked, stage.targets.k, self._places(stage)
                program = at_ids_program(model, mesh, rows=rows, length=length, entries=asked, top_k=k, places=places)
        else:
            rows, length = packed_shape(mesh, stage.batch_size, stage.longest_tokens)
            if stage.sampled_tokens is None:
                program = top_k_program(model, mesh, rows=rows, length=length, k=stage.top_k)
            else:
                program = sampled_program(model, mesh, rows=rows, length=length, sampled_tokens=stage.sampled_tokens)
        return Program(
            stage=name,
            purpose="teacher_scores",
            model=model.config,
            function=program.function,
            arguments=program.arguments,
            mesh=mesh,
            rows=rows,
            length=length,
            beside=self._beside(name, "teacher_scores"),
        )

    def _compares(self, sizes: EngineSizes) -> Iterator[Program]:
        """What scores a student beside the teacher."""
        teacher, teacher_mesh = self._model("teacher")
        rows, length = scoring_shape(sizes, self._mesh, teacher_mesh)
        batch = _batch_shapes(rows, length, self._hidden_targets(rows, length))
        scores = hidden_program(teacher, teacher_mesh, rows=rows, length=length)
        compares = sums_program(self._student, batch, self._teacher_head(), self._mesh)
        planned: list[tuple[Purpose, Qwen3, Mesh, ScoringProgram | SumsProgram]] = [
            ("teacher_scores", teacher, teacher_mesh, scores),
            ("student_scores", self._student, self._mesh, compares),
        ]
        for purpose, model, mesh, program in planned:
            yield Program(
                stage=EVALUATION,
                purpose=purpose,
                model=model.config,
                function=program.function,
                arguments=program.arguments,
                mesh=mesh,
                rows=rows,
                length=length,
                beside=self._beside(EVALUATION, purpose),
            )

    def _teacher_head(self) -> jax.ShapeDtypeStruct:
        """On the student's devices."""
        assert self._teacher is not None
        shape = (self._teacher.config.vocab_size, self._teacher.config.hidden_size)
        head = jax.ShapeDtypeStruct(shape, self._teacher.embed.get_value().dtype)
        return head.update(sharding=head_sharding(head, self._mesh))

    def _hidden_targets(self, rows: int, length: int) -> Hidden:
        assert self._teacher is not None
        shape = (rows, length, self._teacher.config.hidden_size)
        abstract: Any = jax.ShapeDtypeStruct(shape, self._teacher.compute_dtype)
        return Hidden(hidden=abstract)

    def _trains(self, name: str, stage: Stage) -> Iterator[Program]:
        training, loss = stage.training, Loss(name="forward_kl") if isinstance(stage, Sft) else stage.loss
        state = self._state(training)
        head: Any = None
        if asks_for_hidden(stage):
            head = self._teacher_head()
        step = TrainStep(
            transformation=training.optimizer.transformation(training.steps or 1),
            loss=loss,
            mesh=self._mesh,
            rematerialise=training.rematerialise,
            teacher_head=head,
            policy=stage.objective if isinstance(stage, Grpo) else None,
        )
        made = step.programs(state, self._batch(stage))
        several = isinstance(stage, OnPolicy | Grpo) or stage.microbatches_per_step > 1
        purposes: dict[Purpose, tuple[Any, tuple[Any, ...]]] = {}
        if several and made.add_load is not None:
            purposes["student_routes"] = made.add_load
        purposes["student_trains"] = made.more_gradients if several else made.first_gradients
        purposes["student_updates"] = made.update
        for purpose, (function, arguments) in purposes.items():
            yield Program(
                stage=name,
                purpose=purpose,
                model=state.model.config,
                function=function,
                arguments=arguments,
                mesh=self._mesh,
                rows=training.rows,
                length=training.row_length,
                beside=self._beside(name, purpose),
            )

    def _batch(self, stage: Stage) -> Batch:
        """A microbatch as the stage's data has it."""

        def rows(dtype: DTypeLike, *last: int) -> Any:
            return jax.ShapeDtypeStruct((stage.training.rows, stage.training.row_length, *last), dtype)

        targets: Any
        policy: Any = None
        places: int | None = None
        if isinstance(stage, Grpo):
            arrays: dict[str, Any] = {name: rows(np.float32) for name in stage.policy_arrays}
            policy = PolicyData(**arrays) if arrays else None
        if isinstance(stage, Grpo) and not asks_teacher(stage):
            targets = None
        elif isinstance(stage, OnPolicy | Grpo):
            places = self._places(stage)
            shape = stage.training.rows, places or stage.training.row_length
            targets = self._hidden_targets(*shape) if stage.targets is None else stage.targets.shapes(*shape)
        elif isinstance(stage, Sft):
            targets = jax.eval_shape(one_hot, rows(np.int32))
        else:
            source = stage if stage.targets_of is None else self._experiment.stages[stage.targets_of]
            assert isinstance(source, OffPolicy)
            several = (
                rows(np.int32, source.sampled_tokens or source.top_k),
                rows(np.float32, source.sampled_tokens or source.top_k),
            )
            if source.sampled_tokens is None:
                targets = TopK(ids=several[0], logprobs=several[1], log_tail=rows(np.float32))
            else:
                targets = Sampled(ids=several[0], log_shares=several[1], entropy=rows(np.float32))
        batch = _batch_shapes(stage.training.rows, stage.training.row_length, targets, places)
        return dataclasses.replace(batch, policy=policy)

    def _places(self, stage: OnPolicy | Grpo) -> int | None:
        return places_of_stage(stage, self._mesh, self._teacher_mesh)

    def _state(self, training: Training) -> TrainState:
        # The schedule is no part of the state, and any number of steps gives the same program.
        return TrainState.shapes(self._student, training.optimizer.transformation(training.steps or 1), self._mesh)

    def _model(self, role: Role) -> tuple[Qwen3, Mesh]:
        if role == "student":
            return self._student, self._mesh
        assert self._teacher is not None
        return self._teacher, self._teacher_mesh

    def _beside(self, stage_name: str, purpose: Purpose) -> dict[str, Any]:
        """What a program finds on its devices beside its arguments: of the teacher, once it is loaded, the weights; of
        the student those with which the stage began, and while it trains those that it changes and their moments."""
        role: Role = "teacher" if purpose.startswith("teacher") else "student"
        stage = self._experiment.stages.get(stage_name)
        held: dict[str, Any] = {"other teachers": self._other_teachers} if self._other_teachers else {}
        if self._teacher is not None and role != "teacher" and self._mesh == self._teacher_mesh:
            held["teacher"] = self._teacher
        if role == "teacher" and self._mesh != self._teacher_mesh:
            return held
        if stage is None:
            return held | ({"student": self._student} if role == "teacher" else {})
        if isinstance(stage, OffPolicy) and role == "teacher":
            return held | {"student": self._student}
        state = self._state(stage.training)
        held["student at the stage's start"] = state.split()[0].model
        if purpose != "student_updates":
            held["optimizer"] = state.optimizer
        if role == "teacher":
            held["student"] = state.model
        return held
