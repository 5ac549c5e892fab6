"""How often graders of mathematics are right on pairs of a reference and an answer whose verdict is known.

    python -m experiments.benchmarks.graders tests/distill/tasks/math_pairs.jsonl

Each line of the file is {"reference", "answer", "equal", "source"}.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import tyro

from distill.tasks.verifiers import equal_mathematics


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference, an answer, whether the answer is right, and where the two come from."""

    reference: str
    answer: str
    equal: bool
    source: str


def math_verify_alone(answer: str, reference: str) -> bool:
    """math-verify as its README uses it; a bare reference is put between dollars, which it needs."""
    from math_verify import parse, verify

    bare = "$" not in reference and "\\boxed" not in reference
    return bool(verify(parse(f"${reference}$" if bare else reference), parse(answer)))


GRADERS: dict[str, Callable[[str, str], bool]] = {
    "verifier math": equal_mathematics,
    "math-verify alone": math_verify_alone,
}


def main(pairs: Path, /) -> None:
    """Prints a table of right verdicts and of wrong ones of both kinds, by grader and source."""
    logging.disable(logging.WARNING)
    with pairs.open(encoding="utf-8") as lines:
        known = [Pair(**json.loads(line)) for line in lines]
    print("| grader | pairs from | right | false accepts | false refusals |\n|---|---|---|---|---|")
    for name, grader in GRADERS.items():
        started = time.perf_counter()
        verdicts = [(pair, grader(pair.answer, pair.reference)) for pair in known]
        seconds = time.perf_counter() - started
        for source in [*dict.fromkeys(pair.source for pair in known), "all"]:
            those = [(pair, verdict) for pair, verdict in verdicts if source in (pair.source, "all")]
            accepts = sum(verdict and not pair.equal for pair, verdict in those)
            refusals = sum(pair.equal and not verdict for pair, verdict in those)
            right = f"{len(those) - accepts - refusals} of {len(those)}"
            print(f"| {name} | {source} | {right} | {accepts} | {refusals} |")
        print(f"{name}: {seconds:.1f} s")


if __name__ == "__main__":
    tyro.cli(main)
