"""What an experiment is: one frozen document from which a run follows, checked as a whole before anything starts."""

import dataclasses
import difflib
import json
import numbers
import re
from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Annotated, Any, Literal

import jax
from jax.sharding import Mesh

from distill.evaluation.evaluate import Evaluation
from distill.rewards.reward import Reward, reward_name, reward_source
from distill.stages import Grpo, OffPolicy, OnPolicy, Stage
from distill.tasks import Arithmetic, PromptFile, ReasoningGym
from distill.tasks.mixture import TaskMixture
from qwen3.chat.turns import THINK_END, THINK_START
from qwen3.checkpoint.quantisation import Quantisation
from qwen3.decoder.kernels import Kernels
from qwen3.errors import UserError
from qwen3.field_types import MOST, Bounds, Positive, check_fields
from qwen3.rollout import MODES
from qwen3.sharding import MeshShape, check_batch, check_rows, make_mesh
from student.init import FromCheckpoint, FromScratch
from teacher.dialects import Program, kinds_of
from teacher.placement import own_mesh

_RESERVED = ("student_initial", "teacher", "evaluation")
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """Whose distributions are learned."""

    path: str
    """Folder in Hugging Face format."""
    planned_as: str | None = None
    """A folder whose config.json a plan goes by as long as there is none in `path`; a run needs `path`."""
    dtype: Dtype = "bfloat16"
    """What the weights are kept and computed in; they are never trained."""
    quantisation: Quantisation | None = None
    """Keep projections and experts in eight bits, to which they are rounded as they are read: near half the memory of
    bfloat16, for targets that differ a little (measured by experiments/benchmarks/quantised_teacher.py)."""
    placement: Literal["colocated", "own_mesh", "service"] = "colocated"
    """colocated: on the student's mesh, taking turns with it. own_mesh: on devices of the same job that the student
    has not, scoring the next rows while the student trains on those before; of several processes each gives both
    equally many. service: behind servers; of its folder only config.json and the tokenizer need be here."""
    server: Program = "teacher.serve"
    """With service, the program that serves there: python -m teacher.serve, vllm or sglang. teacher/README.md says what
    each can give; of the latter two `dtype` says nothing."""
    prompt: str | None = None
    """What this teacher alone reads in place of a problem's question, with {prompt}, {solution} and {answer} of the
    problem in it, where the data has no teacher_prompt of its own. The student's response is scored behind it; prompts
    are never trained. `<think>{solution}</think>` at its end is the teacher's own thinking before a non-thinking
    answer. None: what the student reads."""
    urls: tuple[str, ...] = ()
    """With service the addresses of the servers, http://HOST:PORT, all of the same teacher. Beyond this machine the
    environment variable TEACHER_TOKEN is their token."""
    outage_seconds: Positive = 600.0
    """With service, how long the run waits while no server answers."""
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    """With own_mesh the teacher's devices along each axis; the student's are those that are left."""

    def __post_init__(self) -> None:
        check_fields(self, "teacher")
        if not self.path:
            raise UserError("teacher.path is empty; name a folder in Hugging Face format")
        fields = {field for _, field, _, _ in _parsed(self.prompt or "") if field is not None}
        if unknown := sorted(fields - {"prompt", "solution", "answer"}):
            raise UserError(
                f"teacher.prompt names {{{unknown[0]}}}; use {{prompt}}, {{solution}} and {{answer}}, and write braces "
                "twice that stand for themselves"
            )
        if THINK_START in (self.prompt or "") and not str(self.prompt).rstrip().endswith(THINK_END):
            raise UserError(
                "teacher.prompt has a think block that does not end it; put it last and close it, as in "
                f"'{{prompt}}{THINK_START}{{solution}}{THINK_END}'"
            )
        if self.placement != "own_mesh" and self.mesh != MeshShape():
            where = "on the student's mesh" if self.placement == "colocated" else "on the servers' devices"
            raise UserError(
                f"teacher.mesh is set, but teacher.placement is {self.placement}, {where}; leave it, or set "
                "teacher.placement to own_mesh"
            )
        if (self.placement == "service") != bool(self.urls):
            raise UserError(
                f"teacher.placement is {self.placement}, but teacher.urls names {len(self.urls)} servers; servers go "
                "with placement service, which needs at least one"
            )
        if self.placement != "service" and self.server != "teacher.serve":
            raise UserError(
                f"teacher.server is {self.server}, but teacher.placement is {self.placement}; leave it, or set "
                "teacher.placement to service"
            )
        if self.placement == "service" and self.quantisation is not None:
            raise UserError(
                f"teacher.quantisation is {self.quantisation}, but teacher.placement is service; leave it, and give "
                "--quantisation to the server"
            )

    @property
    def as_loaded(self) -> "Teacher":
        """Without what does not change its weights: equal ones are one model, whatever each reads."""
        return dataclasses.replace(self, prompt=None, planned_as=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A run: who learns, from whom, on what, in which stages, and how it is judged."""

    name: str
    """Names the run directory, runs/NAME."""
    description: str
    """One sentence for people: what this is and what to expect."""
    student: FromCheckpoint | FromScratch
    """Who learns: a checkpoint's weights, or fresh ones of a stated architecture."""
    teacher: Teacher | None = None
    """None where no stage learns from one, or where there are several."""
    teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
    """Several teachers in place of one, by name. Each is asked about the problems of the task of its name, or about
    those whose `teacher_column` names it. They share one tokenizer; equal ones are loaded once."""
    tasks: Mapping[str, Arithmetic | ReasoningGym | PromptFile]
    """Where problems come from, by a name of your choice; each task gives its share by weight."""
    stages: Mapping[str, Stage]
    """What happens, in order; names are yours and become names in TensorBoard and the report."""
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    export_stage: str | None = None
    """Stage whose student is exported; None for the last one."""
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    kernels: Kernels = dataclasses.field(default_factory=Kernels)
    """Of the student and of the teacher."""
    compute_dtype: Dtype = "bfloat16"
    """What the student computes in; trained weights and the optimiser's state are float32 whatever this says."""
    export_dtype: Dtype = "bfloat16"
    """What the exported weights are stored in."""
    export_adapter: bool = False
    """Export the student's adapters alone, for PEFT to load onto their base, instead of a whole model."""
    seed: Annotated[int, Bounds(0, MOST, f"lie in 0..{MOST}")] = 0
    """Decides everything that is random, except which problems are held out and evaluated."""

    def __post_init__(self) -> None:
        check_fields(self)
        if faults := [*self._faults()]:
            raise UserError("; and ".join(faults))

    def _faults(self) -> Iterator[str]:
        """What fields say that other fields contradict: all of it at once."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            yield f"name is {self.name!r}; it names a folder: use letters, digits, '.', '_' and '-'"
        for field in ("tasks", "stages"):
            if not getattr(self, field):
                yield f"{field} is empty; an experiment needs at least one"
        for name in self.tasks:
            if not re.fullmatch(r"\S(.*\S)?", name):
                yield f"tasks has {name!r}; give every task a name of one line, without white space around it"
        yield from self._wrong_teachers()
        yield from self._beyond_servers()
        names = list(self.stages)
        for index, (name, stage) in enumerate(self.stages.items()):
            if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in _RESERVED:
                yield f"stages has {name!r}; use letters, digits and '_', and none of {', '.join(_RESERVED)}"
            yield from self._wrong_references(name, stage, names[:index])
            if not self.all_teachers and isinstance(stage, Grpo) and stage.teacher_kl:
                yield f"stages.{name}.teacher_kl is {stage.teacher_kl:g} and needs a teacher; give the experiment one"
            needs_one = stage.writes if isinstance(stage, OffPolicy) else isinstance(stage, OnPolicy)
            if not self.all_teachers and needs_one:
                yield f"stages.{name} needs a teacher; give the experiment one"
        if self.export_adapter and self.adapted_base is None:
            yield "export_adapter is True, but the student has no adapters; give student.lora, or leave it"
        if self.export_stage is not None and self.export_stage not in self.stages:
            yield _unknown_stage("export_stage", self.export_stage, names)

    def _wrong_teachers(self) -> Iterator[str]:
        if self.teacher is not None and self.teachers:
            yield "teacher and teachers are both given; leave one of them"
        for name, teacher in self.teachers.items():
            if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in (*MODES, "all"):
                yield f"teachers has {name!r}; use letters, digits and '_', and neither a mode's name nor 'all'"
            if teacher.placement == "own_mesh":
                yield (
                    f"teachers.{name}.placement is own_mesh, which one teacher alone can have: devices are given to "
                    "one; use colocated or service"
                )

    def _beyond_servers(self) -> Iterator[str]:
        """What the teachers' servers cannot give."""
        for teacher_name, teacher in self.all_teachers.items():
            kinds = kinds_of(teacher.server)
            by = f"{teacher_field(teacher_name)}.server {teacher.server}"
            for name, stage in self.stages.items():
                field = f"stages.{name}"
                if isinstance(stage, OffPolicy):
                    if stage.writes and stage.sampled_tokens is not None and "sampled" not in kinds:
                        yield (
                            f"{field}.sampled_tokens is {stage.sampled_tokens}, but {by} samples no targets; leave it, "
                            "which keeps top_k"
                        )
                elif asks_teacher(stage) and "at_ids" not in kinds:
                    yield (
                        f"{field} asks about other tokens at every position, of which {by} says nothing; take vllm "
                        "with targets=StudentTopK(), or python -m teacher.serve"
                    )
                elif asks_for_hidden(stage) and "hidden" not in kinds:
                    yield f"{field}.targets is None: hidden states, which {by} does not give; set it to StudentTopK()"

    def _wrong_references(self, name: str, stage: Stage, earlier: list[str]) -> Iterator[str]:
        fields = ("start_from", "targets_of", "flops_of")
        for field in fields:
            other = getattr(stage, field, None)
            if other is not None and other not in earlier:
                yield _unknown_stage(f"stages.{name}.{field}", other, earlier)
        if isinstance(stage, OffPolicy) and stage.targets_of in earlier:
            source = self.stages[stage.targets_of]
            if not isinstance(source, OffPolicy) or not source.writes:
                yield f"stages.{name}.targets_of is {stage.targets_of!r}, which writes no targets of its own"
                return
            if source.sampled_tokens is not None and stage.loss.name != "forward_kl":
                yield (
                    f"stages.{name}.loss is {stage.loss.name}, but {stage.targets_of} keeps sampled tokens, which give "
                    "only forward_kl"
                )
            if source.longest_tokens > stage.training.row_length:
                yield (
                    f"stages.{name}.training.row_length is {stage.training.row_length}, but what {stage.targets_of} "
                    f"generates may have {source.longest_tokens} tokens; raise it"
                )

    @property
    def tokens_per_target(self) -> int:
        """The most that targets name at a position: those of a store or of a student's likeliest, or the one that
        follows, for the cross-entropy of supervised stages and for perplexity; 0 where none is needed."""
        stages = self.stages.values()
        own = [stage for stage in stages if isinstance(stage, OffPolicy) and stage.targets_of is None]
        named = [stage.sampled_tokens or stage.top_k for stage in own]
        named += [stage.targets.entries for stage in stages if isinstance(stage, OnPolicy | Grpo) and stage.targets]
        one = any(stage.kind == "Sft" for stage in stages) or self.compares
        return max(named, default=int(one))

    @property
    def all_teachers(self) -> Mapping[str, Teacher]:
        """All teachers by name, an only one by the empty name; none where no stage learns from one."""
        return self.teachers if self.teacher is None else {"": self.teacher}

    def mixture(self) -> TaskMixture:
        """The tasks as one source of problems, each with the teacher that is asked about it and what that one reads."""
        return TaskMixture(self.tasks, {name: teacher.prompt for name, teacher in self.all_teachers.items()})

    @property
    def evaluates_teacher(self) -> bool:
        """Whether the teacher answers held-out problems itself."""
        return bool(self.all_teachers) and self.evaluation.problems > 0

    @property
    def compares(self) -> bool:
        """Whether evaluations compare students with the teacher, for which all teachers give hidden states."""
        return self.evaluates_teacher and all("hidden" in kinds_of(one.server) for one in self.all_teachers.values())

    @property
    def adapted_base(self) -> str | None:
        """The folder of the weights that stay frozen beside adapters; None where there are no adapters."""
        return self.student.path if isinstance(self.student, FromCheckpoint) and self.student.lora else None

    def meshes(self, devices: list[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
        """The student's mesh and the teacher's over `devices`, all by default: one mesh where they share them.

        Raises UserError where the devices do not make up what `mesh` and `teacher.mesh` ask for.
        """
        if self.teacher is None or self.teacher.placement != "own_mesh":
            mesh = make_mesh(self.mesh, devices)
            return mesh, mesh
        teacher_mesh, mesh = own_mesh(self.teacher.mesh, self.mesh, devices)
        return mesh, teacher_mesh

    def check_meshes(self, mesh: Mesh, teacher_mesh: Mesh) -> None:
        """Refuses whatever the devices of student or teacher cannot share."""
        evaluated_on = (mesh, teacher_mesh) if self.all_teachers else (mesh,)
        for its_mesh in evaluated_on if self.evaluation.problems else ():
            check_rows("evaluation.batch_size", self.evaluation.batch_size, its_mesh)
        for name, stage in self.stages.items():
            if isinstance(stage, OffPolicy) and stage.writes:
                check_rows(f"stages.{name}.batch_size", stage.batch_size, teacher_mesh)
            if isinstance(stage, OnPolicy | Grpo):
                asked = stage.generation.batch_size
                check_rows(f"stages.{name}.prompts_per_step × samples_per_prompt", asked, mesh)
                stage.check_meshes(name, mesh, teacher_mesh)
            # On-policy, the teacher scores the very rows that the student trains on.
            for its_mesh in (mesh, teacher_mesh) if asks_teacher(stage) else (mesh,):
                check_batch(f"stages.{name}.training", stage.training.rows, stage.training.row_length, its_mesh)

    def start_of(self, name: str) -> str | None:
        """The stage whose student stage `name` starts from; None for the initial student."""
        names = list(self.stages)
        previous = names[names.index(name) - 1] if names.index(name) else None
        return self.stages[name].start_from or previous

    def lineage(self) -> list[str]:
        """The stages that the exported student went through, in order; the others are comparisons."""
        stage: str | None = self.export_stage or list(self.stages)[-1]
        line: list[str] = []
        while stage is not None:
            line.insert(0, stage)
            stage = self.start_of(stage)
        return line

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data of every field, with the class of each stage, task and student as `kind`."""
        raw = _plain(self)
        assert isinstance(raw, dict)
        return raw


def _parsed(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"teacher.prompt is {template!r}: {error}; write braces that stand for themselves twice"
        ) from None


def teacher_field(name: str) -> str:
    """How the experiment calls the teacher of this name, which is empty for an only one."""
    return f"teachers.{name}" if name else "teacher"


def asks_teacher(stage: Stage) -> bool:
    """Whether a teacher scores the student's own rollouts."""
    return isinstance(stage, OnPolicy) or (isinstance(stage, Grpo) and stage.teacher_kl > 0)


def asks_for_hidden(stage: Stage) -> bool:
    """Whether that teacher is asked for hidden states, from which the student's devices make logits."""
    return asks_teacher(stage) and isinstance(stage, OnPolicy | Grpo) and stage.targets is None


def scoring_passes(stage: Stage) -> int:
    """Forward passes of the student over its rollouts, beside those of training, that a batch of them takes."""
    if not isinstance(stage, OnPolicy | Grpo):
        return 0
    return (stage.targets is not None) + (stage.scoring_passes if isinstance(stage, Grpo) else 0)


def differing_fields(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted paths of the values in which two JSON documents differ, each with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line
            for key in keys
            for line in differing_fields(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == after else [f"{path}: {json.dumps(before)} → {json.dumps(after)}"]


def _unknown_stage(field: str, name: str, earlier: list[str]) -> str:
    near = difflib.get_close_matches(name, earlier, n=1)
    hint = f"perhaps you meant {near[0]!r}" if near else f"use one of {', '.join(earlier) or 'the stages before it'}"
    return f"{field} is {name!r}, which is no earlier stage; {hint}"


def _plain(value: Any) -> Any:
    if callable(value) and not isinstance(value, type):
        return _plain_reward(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return fields if isinstance(value, Experiment) else {"kind": type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, bool):
        return value
    # NumPy's numbers are no JSON.
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _plain_reward(reward: Reward) -> dict[str, Any]:
    """By what a reward is known: its name and its source, and the values of its fields if it has some."""
    known = {"kind": reward_name(reward), "source": reward_source(reward)}
    fields: Any = reward
    if dataclasses.is_dataclass(fields):
        known |= {field.name: _plain(getattr(reward, field.name)) for field in dataclasses.fields(fields) if field.init}
    return known
