"""What a run lends to its stages: where to write, what to ask, whom to tell."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from distill.monitor.metrics import MetricsWriter
from distill.monitor.progress import Progress
from distill.monitor.records import read_json, write_atomically
from distill.monitor.run_identity import require_id
from distill.report.results import StageCost
from distill.stages.stopping import StopRequest
from distill.tasks.mixture import TaskMixture
from distill.training.train_step import TeacherHeads
from qwen3.chat.chat import ChatTokenizer
from qwen3.decoder.config import ModelConfig
from qwen3.decoder.model import Qwen3
from qwen3.field_types import check_product
from qwen3.generation.engine import Engine, OnProgress, Request
from qwen3.generation.sampling import SamplingParams
from qwen3.hosts.processes import first_says
from qwen3.rollout import Rollout
from teacher.scoring import Scorer
from teacher.served import ServedEngine, ServedModel, ServedScorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherModel:
    """The teacher's weights, here or behind servers, and how they are known to a target store."""

    model: Qwen3 | ServedModel
    mesh: Mesh
    """Where its weights lie: the student's mesh, or its own. Of a served teacher the student's, where targets come."""
    fingerprint: str
    """Hash of the teacher's folder, and its quantisation: targets of one teacher are refused for another."""

    def scorer(self, wanted_on: Mesh) -> Scorer | ServedScorer:
        """What scores with it; targets and head come to the mesh `wanted_on`."""
        if isinstance(self.model, ServedModel):
            return ServedScorer(self.model, wanted_on)
        return Scorer(self.model, self.mesh, wanted_on=wanted_on)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSizes:
    """What a stage or an evaluation decides about the engine that it generates with."""

    batch_size: int
    """Sequences generated at once."""
    max_prompt_tokens: int
    """Longest prompt."""
    sampling: tuple[SamplingParams, ...]
    """The ways in which sequences are sampled; the longest of them says how long they get."""
    record_entropies: bool = False
    """Whether the entropy of each distribution that a token is drawn from is wanted."""

    @property
    def longest_tokens(self) -> int:
        """The most that a prompt and the response to it may have."""
        return self.max_prompt_tokens + max(params.max_new_tokens for params in self.sampling)

    def check(self, field: str) -> None:
        """Refuses, naming the `field` that says how many, sequences with more tokens than a cache can number."""
        sizes = {field: self.batch_size, "tokens of a prompt and its response": self.longest_tokens}
        check_product(sizes, "for the tokens in a cache are numbered in 32 bits")


class Generator(Protocol):
    """An engine, here or behind servers."""

    def generate(
        self,
        model: Any,
        requests: Sequence[Request],
        *,
        seed: int,
        policy_step: int,
        step: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Rollout]: ...


class EndTokens(Protocol):
    """Of a tokenizer, what ends a sequence or its thinking."""

    eos_ids: tuple[int, ...]
    pad_id: int
    think_end_id: int | None

    @property
    def stop_thinking_ids(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunContext:
    directory: Path
    run_id: str
    """Whose directory that is: checkpoints carry it."""
    seed: int
    mesh: Mesh
    tokenizer: ChatTokenizer
    tasks: TaskMixture
    load_teacher: Callable[[str], TeacherModel]
    """Loads the teacher of that name at the first call and gives the same one afterwards."""
    teachers: tuple[str, ...] = ("",)
    """The names of several teachers; one has the empty name."""
    metrics: MetricsWriter
    progress: Progress
    stop: StopRequest
    costs: Mapping[str, StageCost]
    """What the finished stages of this run cost, by name."""
    starts: Mapping[str, str]
    """The model that each stage starts from, by name of the stage: `student_initial` or another stage."""
    keep_time: Callable[[], None]
    """Called when work is saved: the time until then counts as the run's."""

    @property
    def named_teachers(self) -> tuple[str, ...]:
        """The teachers' names where there are several, by which measurements are told apart."""
        return self.teachers if self.teachers != ("",) else ()

    def scorers(self) -> dict[str, Scorer | ServedScorer]:
        """What scores with each teacher for the student, by name; loads them."""
        return {name: self.load_teacher(name).scorer(self.mesh) for name in self.teachers}

    def heads(self, scorers: Mapping[str, Scorer | ServedScorer]) -> TeacherHeads:
        """The output matrices of these teachers, as training takes them."""
        heads = {name: scorer.head for name, scorer in scorers.items()}
        return heads if len(heads) > 1 else next(iter(heads.values()), None)

    def require_directory(self) -> None:
        """Raises UserError, in all processes, where the directory has become another run's or is gone."""
        first_says(lambda: require_id(self.directory, self.run_id))

    def stage_seed(self, name: str) -> int:
        """A seed of its own for everything random in one stage, 32 bits."""
        return stage_seed(self.seed, name)

    def engine(self, model: Qwen3 | ServedModel, sizes: EngineSizes) -> Generator:
        """An engine that stops and thinks as this run's tokenizer says, where the model is."""
        if isinstance(model, ServedModel):
            return ServedEngine()
        return make_engine(model.config, self.tokenizer, sizes)


def stage_seed(seed: int, name: str) -> int:
    """The seed of stage `name` in a run of `seed`, 32 bits."""
    words = np.frombuffer(name.encode().ljust(-(-len(name.encode()) // 4) * 4, b"\0"), np.uint32)
    return int(np.random.SeedSequence([seed, *words.tolist()]).generate_state(1)[0])


def make_engine(config: ModelConfig, tokens: EndTokens, sizes: EngineSizes) -> Engine:
    """The engine of these sizes that stops and thinks with these tokens."""
    # Without a token that ends thinking there is no thinking, as the preflight sees to.
    budgeted = tokens.think_end_id is not None and any(params.thinking_budget is not None for params in sizes.sampling)
    return _engine(
        config,
        batch_size=sizes.batch_size,
        max_prompt_tokens=sizes.max_prompt_tokens,
        max_new_tokens=max(params.max_new_tokens for params in sizes.sampling),
        stop_ids=tokens.eos_ids,
        pad_id=tokens.pad_id,
        stop_thinking_ids=tokens.stop_thinking_ids if budgeted else (),
        think_end_id=tokens.think_end_id,
        record_entropies=sizes.record_entropies,
    )


@functools.cache
def _engine(config: ModelConfig, **fields: Any) -> Engine:
    """Stages and evaluations that write alike share an engine and its compiled programs; it holds no weights."""
    return Engine(config, **fields)


class Stopwatch:
    """Seconds by purpose, added up over a run and its resumed parts."""

    def __init__(self, file: Path):
        """Goes on with the seconds that `file` holds, if it exists."""
        self._file = file
        remedy = "delete it: only times that the report states are lost"
        self.seconds = read_json(file, _seconds_by_purpose, remedy) if file.exists() else {}

    @contextmanager
    def timing(self, purpose: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.monotonic() - started

    def save(self) -> None:
        write_atomically(self._file, json.dumps(self.seconds))


def _seconds_by_purpose(raw: Any) -> dict[str, float]:
    if not isinstance(raw, dict) or not all(type(seconds) in (int, float) for seconds in raw.values()):
        raise ValueError("it holds no seconds by purpose")
    return raw
