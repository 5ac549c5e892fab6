"""Who is asked when: generators become unique problems of one side of the split, weights an order of turns."""

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Annotated

from distill.tasks.problem import Excluded, Problem, Split, split_of
from qwen3.errors import UserError
from qwen3.field_types import Bounds

Weight = Annotated[float, Bounds(0, 1e9, "be 0, to leave it out, or a positive number of at most 1e9")]
"""How often a family or a task is drawn, relative to others."""
_SMALLEST_SIDE = 0.001


def stream_seed(*parts: object) -> int:
    """A 31-bit seed from its parts.

    reasoning-gym seeds item i with seed + i, so streams of neighbouring seeds are the same stream shifted;
    hashing keeps them apart. 31 bits, because numpy refuses a seed + i of 2**32 and more.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 33


def unique_problems(
    candidates: Iterable[Problem], split: Split, held_out_fraction: float, without: Excluded | None = None
) -> Iterator[Problem]:
    """The candidates of one side without repeats and without what `without` is true of.

    Ends when the candidates seem to have no new one.

    With R problems found, a missing one among equally likely candidates escapes 20·(R+50) draws of its side with
    probability e**-20.
    """
    share = held_out_fraction if split == "held_out" else 1 - held_out_fraction
    if share == 0:
        return
    seen: set[str] = set()
    draws_without_news = 0
    for problem in candidates:
        new = problem.problem_id not in seen and split_of(problem.user_words, held_out_fraction) == split
        if new and not (without and without(problem.user_words)):
            seen.add(problem.problem_id)
            draws_without_news = 0
            yield problem
            continue
        draws_without_news += 1
        if draws_without_news > 20 * (len(seen) + 50) / share:
            return


def mix(
    streams: Mapping[str, tuple[float, Iterator[Problem]]], *, count: int, seed: int, split: Split
) -> list[Problem]:
    """`count` problems from weighted streams of unique problems.

    The family of every place is drawn before its problem, so that a family that runs dry is an error and not a
    quiet change of the mixture.

    Args:
        streams: weight (relative, not negative) and problems by name.

    Raises:
        UserError: a stream ended; says how many it had.
    """
    if count < 0:
        raise ValueError(f"count is {count}; ask for 0 or more problems")
    active = {name: (weight, stream) for name, (weight, stream) in streams.items() if weight > 0}
    names = list(active)
    cumulative = list(itertools.accumulate(weight for weight, _ in active.values()))
    rng = random.Random(stream_seed("mix", seed))
    taken = dict.fromkeys(names, 0)
    problems = []
    for _ in range(count):
        name = rng.choices(names, cum_weights=cumulative)[0]
        problem = next(active[name][1], None)
        if problem is None:
            raise UserError(
                f"{name}: only {taken[name]} different {split} problems found, more were asked for "
                f"({count} over {len(names)} families); ask for fewer, lower this family's weight or widen its options"
            )
        taken[name] += 1
        problems.append(problem)
    return problems


def turns_by_weight(weights: Mapping[str, float], count: int) -> list[str]:
    """Who has each of `count` turns: every prefix holds each name's share of it, rounded down or up.

    The j-th turn of a name with share s must come in places floor((j - 1) / s) to ceil(j / s) - 1, counted from 0. Of
    those that may come, the one that must come soonest does; this misses none (Baruah et al. 1996, Proportionate
    progress). Where shares are equal, the names take turns in the order given.
    """
    exact = {name: exact_decimal(weight) for name, weight in weights.items() if weight > 0}
    denominator = math.lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * denominator) for name, weight in exact.items()}
    total = sum(whole.values())
    taken = dict.fromkeys(whole, 0)
    turns = []
    for place in range(count):
        may = [name for name, weight in whole.items() if taken[name] * total < (place + 1) * weight]
        name = min(may, key=lambda one: -(-(taken[one] + 1) * total // whole[one]))
        taken[name] += 1
        turns.append(name)
    return turns


def exact_decimal(value: float) -> Fraction:
    """The number that was written: 0.1 is a tenth, not the binary fraction next to it."""
    return Fraction(str(float(value)))


def check_searchable(held_out_fraction: float) -> None:
    """Refuses a split of what generators ask of which one side is so small that its questions are hardly ever met."""
    if 0 < min(held_out_fraction, 1 - held_out_fraction) < _SMALLEST_SIDE:
        raise UserError(
            f"held_out_fraction is {held_out_fraction}; one side of the split would be searched for very long: use 0, "
            f"1, or a share from {_SMALLEST_SIDE} to {1 - _SMALLEST_SIDE}"
        )
