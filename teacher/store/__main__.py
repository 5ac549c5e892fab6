"""`python -m teacher.store show|stats|verify|merge DIR`: what a target store holds, whether it is whole, several as
one."""

import argparse
import collections
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3.commands import OneLineParser, reported, spell_out
from qwen3.errors import UserError
from teacher.scored_rollout import ScoredRollout
from teacher.store.target_store import TargetStore, merged

_DESCRIPTION = """\
Look into a store of a teacher's targets, such as runs/NAME/targets/STAGE.

  python -m teacher.store show DIR      whose targets they are, how many, and the first record's
  python -m teacher.store stats DIR     sizes, lengths, and how much of the teacher's mass is kept
  python -m teacher.store verify DIR    reads every byte and compares hashes
  python -m teacher.store merge DIR DIR --to NEW    all records of stores of one teacher, in a new store
"""
_EPILOGUE = """\
--json gives the same as one JSON object. Exit status: 0 done; 2 the store is damaged, unfinished or not there, said
in one line.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    spell_out()
    return reported(lambda: _main(sys.argv[1:] if arguments is None else list(arguments)))


def _main(arguments: list[str]) -> int:
    parser = OneLineParser(
        prog="python -m teacher.store",
        description=_DESCRIPTION,
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("show", "stats", "verify", "merge"), help="what to do")
    parser.add_argument("directories", metavar="DIR", nargs="+", help="the store; to merge, all of them")
    parser.add_argument("--to", metavar="NEW", help="where merged stores go")
    parser.add_argument("--record", metavar="N", type=int, default=0, help="the record to show (default: 0)")
    parser.add_argument("--json", action="store_true", help="for machines")
    own = parser.parse_args(arguments)
    directories = [Path(one) for one in own.directories]
    if (own.command == "merge") != (own.to is not None):
        raise UserError("merge needs --to NEW, and nothing else does")
    if (own.command == "merge") != (len(directories) > 1):
        raise UserError(f"{own.command} was given {len(directories)} stores; merge takes several, all else one")
    stores = [TargetStore.open(one, verify_digests=own.command == "verify") for one in directories]
    store = stores[0] if own.command != "merge" else merged(stores, own.to)
    if own.command == "show":
        found = shown(store, own.record)
    elif own.command in ("stats", "merge"):
        found = statistics(store)
    else:
        found = verified(store)
    if own.json:
        print(json.dumps(found, indent=1))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name.replace('_', ' '):{width}}  {_text(value)}")
    return 0


def shown(store: TargetStore, number: int) -> dict[str, Any]:
    """The identity under which a store was written, and one record. Raises UserError where it has no such record."""
    if not 0 <= number < len(store):
        raise UserError(f"--record is {number}, but {store.directory} has records 0 to {len(store) - 1}")
    record = store[number]
    rollout = record.rollout
    kept = np.flatnonzero(rollout.loss_mask)
    found = {**store.identity, "records": len(store), "entries_per_token": store.entries, "record": number}
    found |= {
        "prompt_id": rollout.prompt_id,
        "mode": rollout.mode,
        "prompt_tokens": rollout.prompt_length,
        "response_tokens": len(rollout.response),
        "finished": rollout.finished,
    }
    if len(kept):
        first = int(kept[0])
        found |= {
            "first_position": first,
            "next_token": int(rollout.tokens[first + 1]),
            "ids": record.ids[first].tolist(),
            "logprobs": [_finite(one) for one in record.logprobs[first].tolist()],
            "log_tail": _finite(float(record.log_tail[first])),
        }
    return found


def statistics(store: TargetStore) -> dict[str, Any]:
    """Sizes and what the targets keep, over all records. Raises UserError where one is damaged."""
    modes: collections.Counter[str] = collections.Counter()
    lengths, finished, tail_mass, top_1 = [], 0, 0.0, 0.0
    sampled = False
    for index in range(len(store)):
        record: ScoredRollout = store[index]
        kept = record.rollout.loss_mask
        modes[record.rollout.mode] += 1
        lengths.append(len(record.rollout.response))
        finished += record.rollout.finished
        sampled = sampled or record.entropy is not None
        tail_mass += float(np.exp(record.log_tail[kept]).sum())
        top_1 += float(np.exp(record.logprobs[kept].max(axis=1, initial=-np.inf)).sum())
    found: dict[str, Any] = {
        "records": len(store),
        "tokens": store.tokens,
        "targets": store.targets,
        "entries_per_token": store.entries,
        "kind": "sampled tokens" if sampled else "most likely tokens",
        "size_bytes": store.size_bytes,
        "bytes_per_target": store.size_bytes / max(1, store.targets),
        "records_by_mode": dict(sorted(modes.items())),
        "mean_response_tokens": sum(lengths) / len(lengths),
        "longest_response_tokens": max(lengths),
        "finished": finished / len(store),
    }
    if not sampled and store.targets:
        found |= {"mean_tail_mass": tail_mass / store.targets, "mean_top_1_probability": top_1 / store.targets}
    return found


def verified(store: TargetStore) -> dict[str, Any]:
    """Reads every record of a store whose hashes were compared. Raises UserError naming the first that is damaged."""
    for index in range(len(store)):
        store[index]
    return {"records": len(store), "targets": store.targets, "size_bytes": store.size_bytes, "state": "whole"}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return " ".join(_text(one) for one in value)
    return json.dumps(value) if isinstance(value, dict) else str(value)


if __name__ == "__main__":
    sys.exit(main())
