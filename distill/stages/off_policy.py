"""Off-policy distillation: the teacher generates in both modes, a store keeps what it said, the student learns it."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from distill.stages.context import EngineSizes, Generator, RunContext, Stopwatch
from distill.stages.loop import Spent, StepData, Training, train
from distill.stages.packed import documents_flops
from distill.stages.stopping import Interrupted
from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import ModeMix, prompt_ids, teacher_prompt_ids
from distill.tasks.samples import judged_by
from distill.training.flops import forward_flops, training_flops
from distill.training.losses import Loss
from distill.training.packing import Example, packed_batches, rows_needed, scored_example
from distill.training.train_step import Batch
from qwen3.decoder.adapter import adapter_parameters
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.field_types import Count, Problems, check_fields
from qwen3.generation.engine import Request
from qwen3.generation.sampling import SamplingParams, non_thinking_params, thinking_params
from qwen3.hosts.processes import first_says, require_same
from qwen3.rollout import THINKING, Mode
from teacher.identity import tokenizer_hashes
from teacher.scored_rollout import ScoredRollout, after_prompt
from teacher.scoring import Scorer
from teacher.served import ServedModel, ServedScorer
from teacher.store import TargetStore, TargetStoreWriter
from teacher.targets import Sampled, TopK

_SAMPLED_RECORDS = 512
"""Records from which the cost of a packed row is estimated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffPolicy:
    """The student minimises a divergence from the teacher's stored targets on the teacher's own responses."""

    kind: ClassVar[str] = "OffPolicy"

    prompts: Problems = 10_000
    """Different training prompts that the teacher answers, once each."""
    modes: ModeMix = dataclasses.field(default_factory=ModeMix)
    thinking: SamplingParams = dataclasses.field(default_factory=lambda: thinking_params(30_720))
    """How the teacher samples in thinking mode."""
    non_thinking: SamplingParams = dataclasses.field(default_factory=lambda: non_thinking_params(8_192))
    """How the teacher samples in non-thinking mode."""
    max_prompt_tokens: Count = 2_048
    """Most tokens of a prompt, the chat template's own included; a longer one is refused, not cut."""
    batch_size: Count = 64
    """Sequences that the teacher generates at once."""
    top_k: Count = 64
    """Teacher entries kept per token; the mass of all others is kept as one number."""
    sampled_tokens: Count | None = None
    """Tokens sampled from the teacher at each position, kept in place of its top_k: a dozen give a small store from
    which the forward KL, and no other loss, is right on average over the whole vocabulary. None: keep the top_k."""
    loss: Loss = dataclasses.field(default_factory=Loss)
    microbatches_per_step: Count = 1
    """Microbatches whose gradients are added up for one update, to train on more rows than fit at once."""
    training: Training = dataclasses.field(default_factory=lambda: Training(steps=1000, row_length=32_768))
    start_from: str | None = None
    """Stage whose student this one starts from; None for the stage before."""
    targets_of: str | None = None
    """Stage whose target store this one reads instead of writing its own."""
    store: str | None = None
    """Folder of a finished target store that this stage reads instead, such as `python -m teacher.store merge` makes;
    `top_k` or `sampled_tokens` say what it keeps."""
    flops_of: str | None = None
    """Stage whose whole cost in FLOPs (teacher included) this one may use up; training.steps is then None."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.training.check_tokens({"microbatches_per_step": self.microbatches_per_step})
        self.generation.check("batch_size")
        if self.sampled_tokens is not None and self.loss.name != "forward_kl":
            raise UserError(
                f"loss {self.loss.name} cannot be had from sampled tokens: use forward_kl, or sampled_tokens None"
            )
        if (self.training.steps is None) == (self.flops_of is None):
            raise UserError("give either training.steps or flops_of: one of them must say how long to train")
        if self.targets_of is not None and self.store is not None:
            raise UserError(
                f"targets_of is {self.targets_of!r} and store {self.store!r}, but a stage reads one of them; leave the "
                "other"
            )
        if self.writes and self.longest_tokens > self.training.row_length:
            raise UserError(
                f"prompt and response may have {self.longest_tokens} tokens, training.row_length is "
                f"{self.training.row_length}; raise it, or lower max_prompt_tokens or max_new_tokens"
            )

    @property
    def writes(self) -> bool:
        """Whether the teacher generates for it."""
        return self.targets_of is None and self.store is None

    @property
    def longest_tokens(self) -> int:
        """The most that a prompt and the teacher's response to it may have."""
        return self.max_prompt_tokens + max(self.thinking.max_new_tokens, self.non_thinking.max_new_tokens)

    @property
    def generation(self) -> EngineSizes:
        """Of the engine with which the teacher generates."""
        return EngineSizes(
            batch_size=self.batch_size,
            max_prompt_tokens=self.max_prompt_tokens,
            sampling=(self.thinking, self.non_thinking),
        )

    def asked(self, tasks: TaskMixture, seed: int) -> list[tuple[Problem, Mode]]:
        """The prompts that the teacher answers, each with its mode. Raises UserError where there are too few."""
        return self.modes.assign(tasks.problems("train", self.prompts, seed), seed)

    def run(self, name: str, model: Qwen3, context: RunContext) -> tuple[Qwen3, Spent]:
        spent = Spent()
        if self.store is not None:
            store = TargetStore.open(self.store)
        elif self.targets_of is not None:
            store = TargetStore.open(context.directory / "targets" / self.targets_of)
        else:
            store = _write_store(self, name, context, spent)
        self.check_lengths(store)
        steps = self.training.steps or self._affordable_steps(store, model, context, spent)
        data = _StoredTargets(self, context.stage_seed(name), model, store, context.named_teachers)
        return train(name, model, self.training, self.loss, data, context, steps=steps, before=spent)

    def check_store(self, field: str, here: Mapping[str, Any], teachers: Mapping[str, str]) -> None:
        """Refuses, before anything is spent, a `store` that is not what this stage says, or of others than these.

        Args:
            field: How the experiment calls the stage.
            here: The experiment's "tokenizer" and "template", hashes, and the student's "vocab_size".
            teachers: What its teachers are known as, by name; none where it has no teacher.

        Raises UserError.
        """
        assert self.store is not None
        store = TargetStore.open(self.store)
        known = store.identity
        for name, own in here.items():
            # Stores of earlier versions say less.
            if known.get(name, own if name != "tokenizer" else "not said") != own:
                raise UserError(
                    f"{field}.store {self.store} was written with another {name} than the experiment's "
                    f"({known.get(name, 'not said')}, here {own}); read a store of this one"
                )
        one = teachers.get("", dict(teachers))
        if teachers and known.get("teacher") != one:
            raise UserError(
                f"{field}.store {self.store} was written by teacher {known.get('teacher', 'not said')}, but the "
                f"experiment's is {one}; name that teacher, or none where no stage and no evaluation asks one"
            )
        kept = self.sampled_tokens or self.top_k
        if known.get("sampled_tokens") != self.sampled_tokens or store.entries != kept:
            kind = "top_k" if known.get("sampled_tokens") is None else "sampled_tokens"
            other = f", and {field}.sampled_tokens to None" if kind == "top_k" and self.sampled_tokens else ""
            raise UserError(
                f"{field}.store {self.store} keeps {kind} {store.entries}; set {field}.{kind} to that{other}"
            )
        self.check_lengths(store)

    def check_lengths(self, store: TargetStore) -> None:
        """Raises UserError where a response of `store` does not fit a row."""
        if store.longest_tokens > self.training.row_length:
            raise UserError(
                f"the longest response in {store.directory} has {store.longest_tokens} tokens, training.row_length is "
                f"{self.training.row_length}; raise it"
            )

    def _affordable_steps(self, store: TargetStore, model: Qwen3, context: RunContext, spent: Spent) -> int:
        """Steps that the other stage's FLOPs pay for after what writing the targets has cost."""
        assert self.flops_of is not None
        other = context.costs[self.flops_of]
        budget = other.student_train_flops + other.student_sample_flops + other.teacher_flops - spent.teacher_flops
        lengths = [len(store[index].rollout.tokens) for index in range(min(len(store), _SAMPLED_RECORDS))]
        rows_of_sample = rows_needed(lengths, self.training.row_length)
        flops = training_flops(model.config, adapter_parameters(model), microbatches=self.microbatches_per_step)
        flops_of_row = flops.of(lengths) / rows_of_sample
        steps = int(budget / (flops_of_row * self.training.rows * self.microbatches_per_step))
        if steps < 1:
            raise UserError(
                f"flops_of {self.flops_of!r}: writing the targets took {spent.teacher_flops:.3g} FLOPs, which leaves "
                "nothing to train with; lower prompts"
            )
        return steps


def generating_title(name: str) -> str:
    """What the progress bar of the teacher's responses for stage `name` is called."""
    return f"{name}: teacher generates"


def _write_store(stage: OffPolicy, name: str, context: RunContext, spent: Spent) -> TargetStore:
    """Write the stage's target store, or what a killed run left unwritten of it, and count what it cost."""
    seed = context.stage_seed(name)
    directory = context.directory / "targets" / name
    asked = stage.asked(context.tasks, seed)
    fraction = stage.modes.flag_fraction
    own_prompts = [prompt_ids(problem, mode, context.tokenizer, flag_fraction=fraction) for problem, mode in asked]
    requests = [
        Request(
            prompt_ids=teacher_prompt_ids(problem, mode, context.tokenizer, flag_fraction=fraction),
            prompt_id=problem.problem_id,
            sample_index=0,
            mode=mode,
            params=stage.thinking if mode == THINKING else stage.non_thinking,
        )
        for problem, mode in asked
    ]
    teachers = {one: context.load_teacher(one) for one in context.teachers}
    sampling = {"thinking": dataclasses.asdict(stage.thinking), "non_thinking": dataclasses.asdict(stage.non_thinking)}
    what = [
        (request.prompt_ids, request.mode)
        + ((problem.teacher,) if problem.teacher else ())
        + ((own,) if problem.teacher_prompt else ())
        for request, own, (problem, _) in zip(requests, own_prompts, asked, strict=True)
    ]
    prompts = hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()
    fingerprints = {one: teacher.fingerprint for one, teacher in teachers.items()}
    tokenizer, template = tokenizer_hashes(context.tokenizer.folder)
    identity = {
        "teacher": fingerprints.get("", fingerprints), "top_k": stage.top_k, "sampled_tokens": stage.sampled_tokens,
        "seed": seed, "prompts": prompts, "sampling": sampling, "batch_size": stage.batch_size,
        "tokenizer": tokenizer, "template": template,
        "vocab_size": next(iter(teachers.values())).model.config.vocab_size,
    }  # fmt: skip
    require_same(f"the prompts of stage {name}", prompts.encode)

    def begin() -> dict[str, Any]:
        writer = TargetStoreWriter(directory, identity)
        return {"finished": writer.finished, "shards": sorted(writer.completed_shards())}

    begun = first_says(begin)
    watch = Stopwatch(directory / "seconds.json")
    if not begun["finished"]:
        answering = {
            one: _Answering(
                context.engine(teacher.model, stage.generation), teacher.model, teacher.scorer(teacher.mesh)
            )
            for one, teacher in teachers.items()
        }
        firsts = range(0, len(requests), stage.batch_size)
        done = begun["shards"]
        written = min(len(requests), len(done) * stage.batch_size)
        with context.progress.task(
            generating_title(name), len(requests), completed_steps=written, unit="rollouts"
        ) as bar:
            for shard, first in enumerate(firsts):
                if shard in done:
                    continue
                places = range(first, min(first + stage.batch_size, len(requests)))
                found: dict[int, ScoredRollout] = {}
                for one, each in answering.items():
                    own = [place for place in places if asked[place][0].teacher == one]
                    if not own:
                        continue
                    with watch.timing("write"):
                        rollouts = each.engine.generate(
                            each.model, [requests[place] for place in own], seed=seed, policy_step=0
                        )
                        rollouts = judged_by(rollouts, [asked[place][0] for place in own])
                    with watch.timing("score"):
                        length, pad_id = stage.longest_tokens, context.tokenizer.pad_id
                        shape = {"rows": stage.batch_size, "length": length, "pad_id": pad_id}
                        scored = (
                            each.scorer.score_rollouts(rollouts, k=stage.top_k, **shape)
                            if stage.sampled_tokens is None
                            else each.scorer.sample_rollouts(
                                rollouts, sampled_tokens=stage.sampled_tokens, seed=seed, number=shard, **shape
                            )
                        )
                    found |= zip(own, scored, strict=True)
                records = [
                    after_prompt(found[place], own_prompts[place]) if asked[place][0].teacher_prompt else found[place]
                    for place in places
                ]
                context.require_directory()
                first_says(functools.partial(_write_shard, directory, identity, shard, records, watch))
                context.keep_time()
                bar.advance(len(records), tokens=sum(len(record.rollout.response) for record in records))
                if context.stop.agreed() and first != firsts[-1]:
                    raise Interrupted(f"stage {name}: the teacher has generated {first + len(records)} rollouts")
        first_says(lambda: TargetStoreWriter(directory, identity).finish())
    store = TargetStore.open(directory, identity)
    flops = {one: forward_flops(teacher.model.config) for one, teacher in teachers.items()}
    for index, request in enumerate(requests):
        rollout = store[index].rollout
        spent.tokens_sampled += len(rollout.response)
        # Once to write and once to score, both behind what the teacher reads: the engine keeps no distributions.
        read = len(request.prompt_ids) + len(rollout.response)
        spent.teacher_flops += 2 * flops[rollout.teacher].of([read])
    spent.teacher_generate_seconds = watch.seconds.get("write", 0.0)
    spent.teacher_score_seconds = watch.seconds.get("score", 0.0)
    return store


class _Answering(NamedTuple):
    """A teacher as it answers and scores."""

    engine: Generator
    model: Qwen3 | ServedModel
    scorer: Scorer | ServedScorer


def _write_shard(
    directory: Path, identity: Mapping[str, Any], shard: int, records: Sequence[ScoredRollout], watch: Stopwatch
) -> None:
    TargetStoreWriter(directory, identity).write_shard(shard, records)
    watch.save()


class _StoredTargets:
    """Packed batches from a target store."""

    def __init__(self, stage: OffPolicy, seed: int, model: Qwen3, store: TargetStore, teachers: Sequence[str]):
        self._batches = packed_batches(
            store,
            rows=stage.training.rows,
            length=stage.training.row_length,
            seed=seed,
            prefetch_batches=2,
            to_example=functools.partial(_example, teachers),
        )
        self._microbatches = stage.microbatches_per_step
        self._flops = training_flops(model.config, adapter_parameters(model), microbatches=self._microbatches)

    def step_data(self, step: int, model: Qwen3, spent: Spent) -> StepData:
        del step, model, spent
        arrays = [next(self._batches) for _ in range(self._microbatches)]
        flops = sum(documents_flops(self._flops, batch) for batch in arrays)
        batches = [Batch.of(batch, _targets(batch)) for batch in arrays]
        return StepData(batches=batches, train_flops=flops)

    def state(self) -> Mapping[str, Any]:
        return {"batches": self._batches.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state(state["batches"])


def _example(teachers: Sequence[str], record: ScoredRollout) -> Example:
    """As it is packed; of several teachers with the number of its own."""
    example, rollout = scored_example(record), record.rollout
    if teachers:
        example["teacher"] = np.full(len(rollout.tokens), teachers.index(rollout.teacher), np.uint8)
    return example


def _targets(batch: Mapping[str, Any]) -> TopK | Sampled:
    """What the store keeps says which they are."""
    ids, logprobs = batch["target_ids"], batch["target_logprobs"]
    if "target_entropy" in batch:
        return Sampled(ids=ids, log_shares=logprobs, entropy=batch["target_entropy"])
    return TopK(ids=ids, logprobs=logprobs, log_tail=batch["target_log_tail"])
