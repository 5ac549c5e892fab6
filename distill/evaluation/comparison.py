"""How far a student is from its teacher on held-out prompts, token by token: it needs no answers.

The teacher answers every prompt once, and every student is scored on that text, so that its figures can be compared
with those of any other. What a student does with its own mistakes shows on its own text alone: there too the teacher
scores it, as on-policy distillation does. Both models' distributions are whole; neither's logits are ever held.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from distill.monitor.progress import Task as Bar
from distill.stages.context import EngineSizes, RunContext
from distill.stages.stopping import Interrupted
from distill.tasks import Problem
from distill.tasks.requests import teacher_prompt_ids
from distill.training.losses import Loss, distillation_loss
from distill.training.packing import Example, pack_rollouts, places_read, read_at, rollout_example, rows_needed
from distill.training.train_step import Batch
from kernels_pallas.linear_kl import DivergenceName
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.rollout import Mode, Rollout, with_prompt
from qwen3.sharding import TOKENS, batch_sharding, batch_shares, place, row_shapes, to_pieces
from teacher.scoring import Scorer
from teacher.served import ServedScorer
from teacher.targets import Hidden, Targets, one_hot

TOKENS_AT_ONCE = 4_096
"""Of every share of the rows, at least a row: few, since the last batch is as large as all others and partly empty."""


class Figures(TypedDict, total=False):
    """The fields of an `EvaluationRow` that compare a student with its teacher, less those that no token tells."""

    forward_kl_by_teacher: Mapping[str, float]
    forward_kl: float
    reverse_kl: float
    reverse_kl_own: float
    perplexity: float
    top_1_agreement: float
    compared_tokens: int


class Comparison:
    """Compares students of one architecture with the teacher; the programs are compiled once and serve all of them."""

    def __init__(
        self,
        sizes: EngineSizes,
        context: RunContext,
        responses: Sequence[Rollout],
        problems: Sequence[Problem] = (),
    ):
        """`responses` are the teacher's, of every mode; `sizes` bound them and the students'. Of `problems` with a
        prompt for the teacher alone it reads that."""
        self._hinted = {one.problem_id: one for one in problems if one.teacher_prompt is not None}
        self._context, self._responses = context, responses
        of_teacher = context.load_teacher(context.teachers[0])
        self._rows, self._length = scoring_shape(sizes, context.mesh, of_teacher.mesh)

    def figures(self, name: str, model: Qwen3, mode: Mode, own: Sequence[Rollout]) -> Figures:
        """Of `model`, which has given the responses `own`.

        Raises Interrupted between batches where the run was asked to stop, UserError where a figure is not finite.
        """
        of_teacher = [rollout for rollout in self._responses if rollout.mode == mode]
        title = f"scoring {name}, {mode.replace('_', '-')}"
        on_teachers, on_own = collections.Counter[str](), collections.Counter[str]()
        by_teacher: dict[str, float] = {}
        with self._context.progress.task(title, len(of_teacher) + len(own), unit="responses") as bar:
            # Not kept: between two meshes they hold copies of the teachers' heads.
            for teacher, scorer in self._context.scorers().items():
                sums = self._sums(name, model, scorer, [one for one in of_teacher if one.teacher == teacher], bar)
                if sums.get("tokens") and teacher:
                    by_teacher[teacher] = sums["forward_kl"] / sums["tokens"]
                on_teachers.update(sums)
                on_own.update(self._sums(name, model, scorer, [one for one in own if one.teacher == teacher], bar))
        figures = Figures(forward_kl_by_teacher=by_teacher) if by_teacher else Figures()
        if tokens := on_teachers["tokens"]:
            figures |= Figures(
                forward_kl=on_teachers["forward_kl"] / tokens,
                reverse_kl=on_teachers["reverse_kl"] / tokens,
                perplexity=perplexity(on_teachers["cross_entropy"] / tokens),
                top_1_agreement=on_teachers["agreements"] / tokens,
                compared_tokens=int(tokens),
            )
        if on_own["tokens"]:
            figures["reverse_kl_own"] = on_own["reverse_kl"] / on_own["tokens"]
        for field, value in cast("dict[str, Any]", figures).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(
                    f"evaluation of {name}: {field} is {value}; look for weights that are not finite or far too large "
                    "in the student's and the teacher's checkpoints"
                )
        return figures

    def _sums(
        self, name: str, model: Qwen3, scorer: Scorer | ServedScorer, rollouts: Sequence[Rollout], bar: Bar
    ) -> Mapping[str, float]:
        sums: collections.Counter[str] = collections.Counter()
        for arrays, read in self._batches(rollouts):
            rows = read["tokens"], read["positions"], read["segment_ids"]
            places = None if read is arrays else places_read(arrays, read)
            targets = scorer.hidden(*rows, read["loss_mask"], places)
            batch = place(Batch.of(arrays, targets), batch_sharding(self._context.mesh))
            measured = jax.device_get(_sums(model, batch, scorer.head, self._context.mesh))
            sums.update({what: float(value) for what, value in measured.items()})
            bar.advance(int(np.sum(np.max(arrays["segment_ids"], axis=1))))
            if self._context.stop.agreed():
                raise Interrupted(f"evaluation of {name}: it starts again with the next run")
        return sums

    def _batches(self, rollouts: Sequence[Rollout]) -> Iterator[tuple[Example, Example]]:
        """Packed rows, all of one shape, as the student reads them and as the teacher does."""
        if not rollouts:
            return
        views = [self._as_read(rollout) for rollout in rollouts] if self._hinted else rollouts
        rooms = [max(len(rollout.tokens), len(view.tokens)) for rollout, view in zip(rollouts, views, strict=True)]
        whole = -(-rows_needed(rooms, self._length) // self._rows) * self._rows

        def packed(records: Sequence[Any], to_example: Callable[[Any], Example]) -> Example:
            return pack_rollouts(
                records, rows=whole, length=self._length, one_per_row=False, to_example=to_example, rooms=rooms
            )

        if views is rollouts:
            arrays = read = packed(rollouts, rollout_example)
        else:
            pairs = [*zip(rollouts, views, strict=True)]
            arrays = packed(pairs, lambda pair: rollout_example(pair[0], read_at=read_at(*pair)))
            read = packed(views, rollout_example)
        for first in range(0, whole, self._rows):
            part = {name: array[first : first + self._rows] for name, array in arrays.items()}
            yield (
                part,
                part if read is arrays else {name: array[first : first + self._rows] for name, array in read.items()},
            )

    def _as_read(self, rollout: Rollout) -> Rollout:
        """After the prompt that the teacher reads."""
        problem = self._hinted.get(rollout.prompt_id)
        if problem is None:
            return rollout
        return with_prompt(rollout, teacher_prompt_ids(problem, rollout.mode, self._context.tokenizer))


def perplexity(nats: float) -> float:
    """Of a cross-entropy a token; infinite where that is larger than any number."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def scoring_shape(sizes: EngineSizes, mesh: Mesh, teacher_mesh: Mesh) -> tuple[int, int]:
    """Rows that student and teacher score together, and their length, which both meshes divide."""
    meshes = mesh, teacher_mesh
    pieces = math.lcm(*(one.shape["context"] for one in meshes))
    length = math.ceil(sizes.longest_tokens / pieces) * pieces
    shares = math.lcm(*map(batch_shares, meshes))
    most = min(batch_shares(one) * max(1, TOKENS_AT_ONCE * one.shape["context"] // length) for one in meshes)
    return shares * max(1, min(most // shares, math.ceil(sizes.batch_size / shares))), length


class SumsProgram(NamedTuple):
    """The program that scores a student, and what it is compiled for."""

    function: Any
    arguments: tuple[Any, ...]


def sums_program(model: Qwen3, batch: Batch, teacher_head: Any, mesh: Mesh) -> SumsProgram:
    """What a comparison runs on batches of this shape; everything may be abstract."""
    return SumsProgram(_sums, (model, row_shapes(batch, mesh, TOKENS), teacher_head, mesh))


@functools.partial(jax.jit, static_argnums=3)
def _sums(model: Qwen3, batch: Batch, teacher_head: Float[Array, "V D"], mesh: Mesh) -> dict[str, Array]:
    """Over the tokens that the policy chose: their number, both divergences and the cross-entropy in nats, and where
    both models agree on the likeliest."""
    following = one_hot(batch.tokens)
    hidden = model.hidden(batch.tokens, batch.positions, batch.segment_ids, mesh)
    hidden, batch, following = to_pieces((hidden, batch, following), mesh)
    weights = batch.loss_mask.astype(jnp.float32)

    def divergence(name: DivergenceName, targets: Targets, head: Array | None = None) -> tuple[Array, dict[str, Array]]:
        return distillation_loss(
            hidden,
            model.head,
            targets,
            weights,
            Loss(name=name),
            teacher_head=head,
            implementation=model.kernels.linear_kl,
            mesh=mesh,
        )

    assert isinstance(batch.targets, Hidden)
    forward, statistics = divergence("forward_kl", batch.targets, teacher_head)
    reverse, _ = divergence("reverse_kl", batch.targets, teacher_head)
    cross_entropy, _ = divergence("forward_kl", following)
    return {
        "tokens": jnp.sum(batch.loss_mask),
        "forward_kl": forward,
        "reverse_kl": reverse,
        "cross_entropy": cross_entropy,
        "agreements": jnp.sum(jnp.where(batch.loss_mask, statistics["top1_agreement"], 0)),
    }
