"""How a run comes by its teacher: its weights on the run's devices, or servers that answer for them."""

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill.experiment import Experiment, Teacher, asks_teacher, teacher_field
from distill.monitor.progress import Progress
from distill.monitor.records import read_json, write_atomically
from distill.runner import selftest
from distill.runner.run_directory import RunDirectory, identity_file
from distill.stages import OffPolicy, Sft
from distill.stages.context import EngineSizes, TeacherModel
from qwen3.chat.chat import ChatTokenizer
from qwen3.checkpoint import hf
from qwen3.checkpoint.quantisation import saved_bytes
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from teacher.client import TeacherClient
from teacher.identity import StatedIdentity, TeacherIdentity, known_as, tokenizer_hashes
from teacher.served import ServedModel
from teacher.token_client import TokenClient


class Teachers:
    """An experiment's teachers, each loaded or reached when it is first asked for; equal ones are one."""

    def __init__(self, experiment: Experiment, tokenizer: ChatTokenizer, mesh: Mesh, progress: Progress):
        """`mesh` is where their weights lie, and where what servers say comes to."""
        self._experiment, self._tokenizer, self._mesh, self._progress = experiment, tokenizer, mesh, progress
        self._known: dict[Teacher, TeacherModel] = {}

    def load(self, name: str) -> TeacherModel:
        """The teacher of that name, an only one by the empty name. Raises UserError where its weights cannot be read or
        score no numbers."""
        teacher = self._experiment.all_teachers[name].as_loaded
        if teacher not in self._known:
            self._known[teacher] = self._loaded(teacher)
        return self._known[teacher]

    def _loaded(self, teacher: Teacher) -> TeacherModel:
        experiment, progress = self._experiment, self._progress
        path, dtype, kind = teacher.path, jnp.dtype(teacher.dtype), teacher.quantisation
        with progress.reading("loading the teacher") as on_read:
            model = hf.load(
                path, param_dtype=dtype, compute_dtype=dtype, mesh=self._mesh, on_read=on_read, quantisation=kind
            )
        model.kernels = experiment.kernels
        selftest.check_scores(model, path, self._tokenizer, experiment.evaluation.modes[0], self._mesh)
        if kind is not None:
            kept, saved = (f"{count / 1e6:,.1f} MB" for count in (_bytes(model), saved_bytes(model, dtype)))
            progress.print(f"teacher    its weights take {kept} with {kind}, {saved} less than in {dtype.name} alone")
        return TeacherModel(model=model, mesh=self._mesh, fingerprint=known_as(path, kind))

    @contextlib.contextmanager
    def served(self, run: RunDirectory) -> Iterator[None]:
        """Reaches those behind servers, while the block lasts.

        Raises UserError where no server answers, one answers for another teacher than the others, than the
        run began with, or than the tokenizer at its path, or where they do not take what the stages ask for.
        """
        with contextlib.ExitStack() as opened:
            for name, one in self._experiment.all_teachers.items():
                if one.placement == "service" and (teacher := one.as_loaded) not in self._known:
                    self._known[teacher] = opened.enter_context(self._reached(name, teacher, run))
            yield

    @contextlib.contextmanager
    def _reached(self, name: str, teacher: Teacher, run: RunDirectory) -> Iterator[TeacherModel]:
        field = teacher_field(name)
        if jax.process_count() > 1:
            raise UserError(
                f"{field}.placement is service, which {jax.process_count()} processes that run together cannot ask as "
                f"one; run one process, or set {field}.placement to own_mesh"
            )
        file = run.path / identity_file(name)
        config = ModelConfig.from_folder(teacher.path)
        client = self._client(teacher, config, file if file.exists() and run.holds_work else None)
        with contextlib.closing(client):
            if isinstance(client, TokenClient):
                for note in client.notes:
                    self._progress.print(f"teacher    {note}")
            else:
                _check_folder(field, teacher, config, client)
            client.check(_asked(self._experiment))
            self._progress.print(f"teacher    served by {', '.join(teacher.urls)}, weights {client.identity.weights}")
            model = ServedModel(client=client, config=config)
            yield TeacherModel(model=model, mesh=self._mesh, fingerprint=client.identity.weights)

    def _client(self, teacher: Teacher, config: ModelConfig, file: Path | None) -> TeacherClient | TokenClient:
        """Asks its servers, which must have whom `file`, if there is one, names."""
        remedy = "delete it if the servers have the teacher with which the run began"
        urls, seconds = teacher.urls, teacher.outage_seconds
        if teacher.server == "teacher.serve":
            known = None if file is None else read_json(file, TeacherIdentity.from_json, remedy)
            return TeacherClient(urls, outage_seconds=seconds, expected=known)
        stated = None if file is None else read_json(file, StatedIdentity.from_json, remedy)
        return TokenClient(
            teacher.server,
            urls,
            self._tokenizer,
            vocab_size=config.vocab_size,
            outage_seconds=seconds,
            expected=stated,
        )

    def check_stores(self, finished: Collection[str]) -> None:
        """Refuses, naming the field, a store of another teacher or tokenizer, or of other targets, than the stage that
        reads it says. Raises UserError."""
        stages = self._experiment.stages.items()
        given = {name: one for name, one in stages if isinstance(one, OffPolicy) and one.store is not None}
        reading = {name: one for name, one in given.items() if name not in finished}
        if reading:
            tokenizer, template = tokenizer_hashes(self._tokenizer.folder)
            vocab_size = self._experiment.student.model_config().vocab_size
            here = {"tokenizer": tokenizer, "template": template, "vocab_size": vocab_size}
            teachers = {name: self._fingerprint(one) for name, one in self._experiment.all_teachers.items()}
            for name, stage in reading.items():
                stage.check_store(f"stages.{name}", here, teachers)

    def _fingerprint(self, teacher: Teacher) -> str:
        """As stores keep it, without loading the weights."""
        known = self._known.get(teacher.as_loaded)
        return known.fingerprint if known is not None else known_as(teacher.path, teacher.quantisation)

    def keep_identities(self, directory: Path) -> None:
        """Writes down who answers, for the run's later parts to insist on."""
        for name, teacher in self._experiment.all_teachers.items():
            known = self._known.get(teacher.as_loaded)
            if known is not None and isinstance(model := known.model, ServedModel):
                identity = dataclasses.asdict(model.client.identity)
                write_atomically(directory / identity_file(name), json.dumps(identity, indent=2) + "\n")


def check_one_tokenizer(teachers: Mapping[str, Teacher]) -> None:
    """Refuses teachers of which one has another tokenizer or chat template than the first: the same prompts go to all
    of them. Raises UserError."""
    (first, known), *others = teachers.items()
    hashes = tokenizer_hashes(known.path)
    for name, teacher in others:
        differing = [
            what
            for what, one, other in zip(
                ("tokenizer", "chat template"), hashes, tokenizer_hashes(teacher.path), strict=True
            )
            if one != other
        ]
        if differing:
            raise UserError(
                f"the {' and '.join(differing)} of {teacher_field(name)}, {teacher.path}, is another than that of "
                f"{teacher_field(first)}, {known.path}; prompts are shared, so take teachers of one family"
            )


def _check_folder(field: str, teacher: Teacher, config: ModelConfig, client: TeacherClient) -> None:
    """Refuses a folder that is not the served teacher's."""
    if client.identity.dtype != teacher.dtype:
        raise UserError(
            f"{field}.dtype is {teacher.dtype}, but the teacher at {teacher.urls[0]} computes in "
            f"{client.identity.dtype}; say the same here and there (--dtype)"
        )
    tokenizer, template = tokenizer_hashes(teacher.path)
    for what, here in (("tokenizer", tokenizer), ("template", template)):
        if getattr(client.identity, what) != here:
            raise UserError(
                f"the {what} in {field}.path {teacher.path} is not that of the teacher at {teacher.urls[0]}; "
                "name a folder with the served teacher's config.json and tokenizer"
            )
    if config.vocab_size != client.vocab_size:
        raise UserError(
            f"{teacher.path}/config.json has vocab_size {config.vocab_size}, the teacher at {teacher.urls[0]} "
            f"{client.vocab_size}; name a folder with the served teacher's config.json"
        )


def _asked(experiment: Experiment) -> Iterator[tuple[str, int, str]]:
    """Field, how much of a limit it needs, and the limit."""

    def generates(field: str, sizes: EngineSizes) -> Iterator[tuple[str, int, str]]:
        yield f"{field}.max_prompt_tokens", sizes.max_prompt_tokens, "max_prompt_tokens"
        new_tokens = max(params.max_new_tokens for params in sizes.sampling)
        yield f"{field}: max_new_tokens", new_tokens, "max_new_tokens"

    for name, stage in experiment.stages.items():
        field = f"stages.{name}"
        if isinstance(stage, OffPolicy) and stage.writes:
            yield from generates(field, stage.generation)
            yield f"{field}: prompt and response", stage.longest_tokens, "max_sequence_tokens"
            if stage.sampled_tokens is None:
                yield f"{field}.top_k", stage.top_k, "max_top_k"
            else:
                yield f"{field}.sampled_tokens", stage.sampled_tokens, "max_sampled_tokens"
        if not isinstance(stage, OffPolicy | Sft) and asks_teacher(stage):
            yield f"{field}: prompt and response", stage.generation.longest_tokens, "max_sequence_tokens"
            if stage.targets is not None:
                yield f"{field}.targets.k", stage.targets.k, "max_top_k"
                yield f"{field}.targets.k and the sampled token", stage.targets.asked, "max_ids"
    if experiment.evaluates_teacher:
        yield from generates("evaluation", experiment.evaluation.generation)
        longest = experiment.evaluation.generation.longest_tokens
        yield "evaluation: prompt and response", longest, "max_sequence_tokens"


def _bytes(model: Qwen3) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))
