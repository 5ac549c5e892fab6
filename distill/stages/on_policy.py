"""On-policy distillation: the student generates in both modes, the teacher judges every token, the KL is minimised.

The loss of a position is a sum over every next token under the student as it is now and the teacher's hidden states.
Which token was sampled next, and how likely it was, does not enter. So stale rollouts (`max_staleness`) change which
prefixes are trained and nothing else, for reverse_kl and jsd as for forward_kl: a batch has no place for anything
that the older weights computed. With `StudentTopK` they also say which tokens are told apart, and still no probability.

There is no importance weight min(π/π_old, C). A weight for the next token would correct an estimate from the
sampled token, where here the sum over the vocabulary is exact, and would favour the positions at which the student has
become surer. What is stale is how often a prefix occurs; the weight for that is the product over all tokens of the
prefix, whose variance grows with every token, and which would be clipped away. The lag is kept small instead.

The same holds for a batch of rollouts that is learned from several times (`passes`): the teacher's targets belong to
the text and stay what they are, and the divergence is the current student's at every pass. Nothing is left of the
weights that generated but the choice of the text."""

import contextlib
import dataclasses
from typing import Annotated, ClassVar

from jax.sharding import Mesh

from distill.stages.asking import asked_of, check_ahead, check_asking
from distill.stages.context import EngineSizes, RunContext
from distill.stages.loop import Spent, Training, train
from distill.stages.own_rollouts import OwnRollouts
from distill.stages.rollout_schedule import RolloutSchedule
from distill.stages.student_top_k import StudentTopK
from distill.tasks import Problem
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import ModeMix
from distill.training.losses import Loss
from qwen3.decoder.model import Qwen3
from qwen3.field_types import Bounds, Count, Natural, Problems, check_fields
from qwen3.generation.sampling import SamplingParams
from qwen3.rollout import Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """The student minimises an exact divergence from the teacher on its own responses."""

    kind: ClassVar[str] = "OnPolicy"

    prompts_per_step: Problems = 64
    """Training prompts of every step. Those of a file come again, in a new order, when all of them were asked: at
    another step the student generates anew."""
    samples_per_prompt: Count = 1
    """Responses that the student generates to each prompt of a step."""
    modes: ModeMix = dataclasses.field(default_factory=ModeMix)
    thinking: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(max_new_tokens=30_720))
    """How the student samples in thinking mode; temperature 1 without truncation is the policy itself."""
    non_thinking: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(max_new_tokens=8_192))
    """How the student samples in non-thinking mode."""
    max_prompt_tokens: Count = 2_048
    """Most tokens of a prompt, the chat template's own included; a longer one is refused, not cut."""
    rollout_tokens: RolloutSchedule | None = None
    """Short prefixes first, and longer ones step by step; None: every rollout runs to its end. Accuracy and share of
    finished responses are then of the rollouts that run in full."""
    token_share: Annotated[float, Bounds(2**-10, 1, "lie in 0.001..1")] = 1.0
    """Share of each response's tokens that are learned from: those at which the entropy of the student that generated
    was highest. Heads of student and teacher are multiplied out at these alone; the loss, and every metric by token, is
    a mean over them. 1: all. The pass that finds the tokens of StudentTopK multiplies the student's head out at all."""
    loss: Loss = dataclasses.field(default_factory=lambda: Loss(name="reverse_kl"))
    targets: StudentTopK | None = None
    """None: the teacher's hidden states, with which the divergence is exact over the whole vocabulary. StudentTopK: its
    log-probabilities at the student's likeliest tokens and its own, with one bucket for all others: less to send, and a
    forward pass of the student more."""
    training: Training = dataclasses.field(default_factory=lambda: Training(steps=200, row_length=32_768))
    """How it learns; a step has as many microbatches as its packed rollouts fill."""
    updates_per_batch: Count = 1
    """Updates that one batch of rollouts is divided among, each with prompts_per_step prompts: the student generates so
    many at once."""
    passes: Count = 1
    """Times that each batch of rollouts is learned from: generating and scoring are paid once, and training.steps
    counts the updates of all passes. The divergence is the current student's at each, over the whole vocabulary of the
    same text, which takes no importance ratio; what grows is the lag of the text, `staleness` in the metrics. The
    teacher's targets of a batch stay on the devices meanwhile."""
    max_staleness: Natural = 0
    """Batches of rollouts by which the weights that generate lag behind those that learn: batch n is what the weights
    before the updates of batch max(0, n - max_staleness) have written. 0 is strictly on-policy, where a batch is a
    step; above it, a student on one device trains while the next rollouts are written and scored, and a teacher on
    devices of its own scores while the student generates and trains."""
    samples_every_steps: Count = 25
    """Steps between rollouts that are kept for people to read."""
    start_from: str | None = None
    """Stage whose student this one starts from; None for the stage before."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_asking(self, "on-policy distillation")

    @property
    def generation(self) -> EngineSizes:
        """Of the engine with which the student generates."""
        return EngineSizes(
            batch_size=self.prompts_per_step * self.samples_per_prompt * self.updates_per_batch,
            max_prompt_tokens=self.max_prompt_tokens,
            sampling=(self.thinking, self.non_thinking),
            record_entropies=self.token_share < 1,
        )

    def check_meshes(self, name: str, mesh: Mesh, teacher_mesh: Mesh) -> None:
        """Refuses, by the name of the stage, to generate ahead where nothing would be gained by it."""
        check_ahead(self, name, mesh, teacher_mesh)

    def asked(self, tasks: TaskMixture, seed: int) -> list[tuple[Problem, Mode]]:
        """The prompts of all steps, one step's after the other's, each with its mode. Raises UserError where there are
        none."""
        return asked_of(self, tasks, seed)

    def run(self, name: str, model: Qwen3, context: RunContext) -> tuple[Qwen3, Spent]:
        assert self.training.steps is not None
        scorers = context.scorers()
        asked = self.asked(context.tasks, context.stage_seed(name))
        self.check_meshes(name, context.mesh, context.load_teacher(context.teachers[0]).mesh)
        with contextlib.closing(OwnRollouts(self, name, model, context, asked, scorers=scorers)) as data:
            return train(
                name, model, self.training, self.loss, data, context, steps=self.training.steps,
                teacher_head=context.heads(scorers) if self.targets is None else None,
            )  # fmt: skip
