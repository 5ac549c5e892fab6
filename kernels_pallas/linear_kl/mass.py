"""What the logits of a token add up to, and what the teacher says of the student's likeliest entry.

All that is needed of a whole vocabulary can be put together from its parts: blocks that follow each other, parts that
run side by side, devices that share the entries.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mass:
    """What exponentials of logits add up to, scaled by the largest so that nothing overflows; parts can be merged.

    `total` is Σ exp(z - top) and `moment` Σ exp(z - top)·(z - top), which is all that the entropy needs.
    """

    top: Float[Array, " M"]
    total: Float[Array, " M"]
    moment: Float[Array, " M"]

    @classmethod
    def of(cls, logits: Float[Array, "..."], axis: int) -> "Mass":
        top = logits.max(axis)
        below = jnp.maximum(logits - jnp.expand_dims(finite(top), axis), jnp.finfo(logits.dtype).min)
        mass = jnp.exp(below)
        return cls(top=top, total=mass.sum(axis), moment=(mass * below).sum(axis))

    @classmethod
    def nothing(cls, shape: tuple[int, ...], dtype) -> "Mass":
        zero = jnp.zeros(shape, dtype)
        return cls(top=jnp.full(shape, -jnp.inf, dtype), total=zero, moment=zero)

    def merge(self, other: "Mass") -> "Mass":
        both = jax.tree.map(lambda *parts: jnp.stack(parts), self, other)
        return both.together(both.top.max(0), functools.partial(jnp.sum, axis=0))

    def over(self, vocab_axis: str | None) -> "Mass":
        """Merged over the devices of a mesh axis, each of which has some of the entries; as it is without one."""
        if vocab_axis is None:
            return self
        return self.together(lax.pmax(self.top, vocab_axis), functools.partial(lax.psum, axis_name=vocab_axis))

    def together(self, top: Float[Array, " M"], add: Callable[[Array], Array]) -> "Mass":
        """Several masses as one, of which the largest logit is `top`; `add` sums over them."""
        fall = jnp.maximum(self.top - finite(top), jnp.finfo(top.dtype).min)
        shrink = jnp.exp(fall)
        return Mass(top=top, total=add(shrink * self.total), moment=add(shrink * (self.moment + fall * self.total)))

    def log(self) -> Float[Array, " M"]:
        return jnp.log(self.total) + finite(self.top)

    def logprobs(self, logits: Float[Array, "... M"]) -> Float[Array, "... M"]:
        """Log-probabilities. The largest logit is taken off first: a log-sum-exp is rounded as coarsely as it is
        large, and a probability of nearly 1 would be off by as much."""
        return (logits - finite(self.top)) - jnp.log(self.total)

    def entropy(self) -> Float[Array, " M"]:
        """In nats, of the distribution that the logits stand for."""
        return jnp.log(self.total) - self.moment / self.total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """The masses of both models, and the teacher's logit at the student's likeliest entry."""

    student: Mass
    teacher: Mass
    teacher_at_top: Float[Array, " M"]

    @classmethod
    def nothing(cls, shape: tuple[int, ...], dtype) -> "Survey":
        mass = Mass.nothing(shape, dtype)
        return cls(student=mass, teacher=mass, teacher_at_top=mass.top)

    def with_block(self, student: Float[Array, "V M"], teacher: Float[Array, "V M"]) -> "Survey":
        """Together with the logits of further entries."""
        before, here = self.student.top, student.max(0)
        at_top = jnp.where(student == here, teacher, -jnp.inf).max(0)
        return Survey(
            student=self.student.merge(Mass.of(student, 0)),
            teacher=self.teacher.merge(Mass.of(teacher, 0)),
            teacher_at_top=jnp.maximum(
                jnp.where(before >= here, self.teacher_at_top, -jnp.inf), jnp.where(here >= before, at_top, -jnp.inf)
            ),
        )

    def over(self, vocab_axis: str | None) -> "Survey":
        """As `Mass.over`."""
        if vocab_axis is None:
            return self
        student, teacher = self.student.over(vocab_axis), self.teacher.over(vocab_axis)
        return self.together(student, teacher, functools.partial(lax.pmax, axis_name=vocab_axis))

    def together(self, student: Mass, teacher: Mass, largest: Callable[[Array], Array]) -> "Survey":
        """Several surveys as one, whose masses are known; `largest` is the maximum over them."""
        at_top = jnp.where(self.student.top == student.top, self.teacher_at_top, -jnp.inf)
        return Survey(student=student, teacher=teacher, teacher_at_top=largest(at_top))

    @property
    def agreement(self) -> Float[Array, " M"]:
        """1 where an entry is the likeliest of both."""
        return (self.teacher_at_top >= self.teacher.top).astype(self.teacher.total.dtype)


def finite(x: Array) -> Array:
    """-inf as 0, so that exp(-inf - x) is 0 instead of NaN where nothing has any mass."""
    return jnp.where(x == -jnp.inf, 0, x)
