"""Supervised fine-tuning on worked solutions: how a teacher is made, and how a student gets off the ground."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax

from distill.stages.context import RunContext
from distill.stages.loop import Spent, StepData, Training, train
from distill.stages.packed import documents_flops
from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import ModeMix, raw_document, worked_document
from distill.training.flops import training_flops
from distill.training.losses import Loss
from distill.training.packing import packed_batches, rollout_example
from distill.training.train_step import Batch
from qwen3.decoder.adapter import adapter_parameters
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.field_types import Count, Problems, check_fields
from qwen3.rollout import Mode
from teacher.targets import one_hot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Cross-entropy on worked solutions of the tasks' training problems."""

    kind: ClassVar[str] = "Sft"

    problems: Problems = 10_000
    """Different training problems; they are repeated in a new order each epoch."""
    form: Literal["chat", "raw"] = "chat"
    """chat: responses in the chat format, prompts not trained. raw: running text, all of it trained."""
    modes: ModeMix = dataclasses.field(default_factory=ModeMix)
    microbatches_per_step: Count = 1
    """Microbatches whose gradients are added up for one update, to train on more rows than fit at once."""
    training: Training = dataclasses.field(default_factory=lambda: Training(steps=1000))
    start_from: str | None = None
    """Stage whose student this one starts from; None for the stage before."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.training.check_tokens({"microbatches_per_step": self.microbatches_per_step})
        if self.training.steps is None:
            raise UserError("training.steps is None; supervised fine-tuning needs a number of steps")

    def asked(self, tasks: TaskMixture, seed: int) -> list[tuple[Problem, Mode]]:
        """The problems whose solutions are trained, each with its mode. Raises UserError where there are too few."""
        return self.modes.assign(tasks.problems("train", self.problems, seed), seed)

    def run(self, name: str, model: Qwen3, context: RunContext) -> tuple[Qwen3, Spent]:
        assert self.training.steps is not None
        return train(
            name,
            model,
            self.training,
            Loss(name="forward_kl"),
            _WorkedDocuments(self, name, model, context),
            context,
            steps=self.training.steps,
        )


class _WorkedDocuments:
    """Packed batches of worked solutions, each its own one-hot teacher."""

    def __init__(self, stage: Sft, name: str, model: Qwen3, context: RunContext):
        seed = context.stage_seed(name)
        asked = stage.asked(context.tasks, seed)
        tokenizer = context.tokenizer
        if stage.form == "raw":
            documents = [raw_document(problem, tokenizer) for problem, _ in asked]
        else:
            documents = [
                worked_document(problem, mode, tokenizer, flag_fraction=stage.modes.flag_fraction)
                for problem, mode in asked
            ]
        self._batches = packed_batches(
            documents,
            rows=stage.training.rows,
            length=stage.training.row_length,
            seed=seed,
            prefetch_batches=2,
            to_example=rollout_example,
        )
        self._microbatches = stage.microbatches_per_step
        self._flops = training_flops(model.config, adapter_parameters(model), microbatches=self._microbatches)
        self._one_hot = jax.jit(one_hot)

    def step_data(self, step: int, model: Qwen3, spent: Spent) -> StepData:
        del step, model, spent
        arrays = [next(self._batches) for _ in range(self._microbatches)]
        return StepData(
            batches=[Batch.of(batch, self._one_hot(batch["tokens"])) for batch in arrays],
            train_flops=sum(documents_flops(self._flops, batch) for batch in arrays),
        )

    def state(self) -> Mapping[str, Any]:
        return {"batches": self._batches.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._batches.set_state(state["batches"])
