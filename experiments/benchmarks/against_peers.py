"""This project beside TRL and Tunix at the same work, on this machine's CPU, in float32.

    python -m experiments.benchmarks.against_peers

installs the peers into environments of their own, writes models that all of them load, lets them take turns of
two steps, and prints a table with the marks that this project sets itself. The result is also written as a file. Allow
20 minutes on two cores, and 10 GB of memory; the first time also some minutes for installing (6 GB of disk).
Environments, models and what has been measured undisturbed at this commit are kept: the same command again goes on.
"""

import dataclasses
import datetime
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments.benchmarks.comparison import OURS, ROWS, TRL_GKD, TUNIX_LOGIT, Row, summary, table
from experiments.benchmarks.contest import Contestant, Measured, contest
from experiments.benchmarks.machine import machine
from experiments.benchmarks.peer_environments import TRL, TUNIX, prepare
from experiments.benchmarks.sizes import SIZES
from experiments.benchmarks.turns import Work
from qwen3.checkpoint.hf import save
from qwen3.cores import usable_cores
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError

_EXPLANATION = """\
Contestants load the same weights and take turns of two steps, round after round: the first finds caches full
of the others' data, the second counts, where all other processes took less than 0.15 core; given are median and range
of those. Off-policy a step is the teacher, KL over the whole
vocabulary, the student's gradients and AdamW, on given rows of 256 tokens (tiny 8, vocab 4). On-policy the student
first writes 192 tokens after each prompt of 64. Tunix has no on-policy distillation: its sampler and its trainer, with
forward KL, are composed. Memory is the largest resident set, in brackets when the models were loaded.
"""
_TOKENIZER = Path(__file__).parents[1] / "quickstart_tokenizer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to measure, and where to keep things."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Kinds of work."""
    folder: Path = Path("runs/.peers")
    """The peers' environments, models, and what has been measured; 7 GB."""
    results: Path = Path(__file__).parent / "results"
    """Where the table is written."""
    again: bool = False
    """Measure anew also what has been measured undisturbed at this commit."""

    def __post_init__(self) -> None:
        for name in self.rows:
            if name not in ROWS:
                raise UserError(f"rows: {name!r} is none of {', '.join(ROWS)}")


def main(arguments: Arguments, console: Console) -> None:
    """Raises UserError where packages cannot be installed, or a contestant stops."""
    if not Path("/proc/stat").exists():
        raise UserError(
            "/proc/stat is missing: what else a machine does, and so a step's time, is judged on Linux only"
        )
    folder = arguments.folder.absolute()

    def say(text: str) -> None:
        console.print(f"  {text}", highlight=False, markup=False, style="dim", soft_wrap=True)

    pythons = {
        OURS: ("this_project.py", Path(sys.executable)),
        TRL_GKD: ("with_trl.py", prepare(TRL, folder, say)),
        TUNIX_LOGIT: ("with_tunix.py", prepare(TUNIX, folder, say)),
    }
    contestants = {
        name: Contestant(name=name, script=script, python=python) for name, (script, python) in pythons.items()
    }
    where = machine()
    kept = folder / "measured" / str(where["commit"])
    is_known = where["commit"] is not None and "+" not in where["commit"]
    measured: dict[str, dict[str, Measured]] = {}
    for number, name in enumerate(arguments.rows, 1):
        row, file = ROWS[name], kept / f"{name}.json"
        console.print(f"{number} of {len(arguments.rows)}  {row.title}", highlight=False)
        if is_known and file.exists() and not arguments.again:
            measured[name] = {who: Measured.from_json(data) for who, data in json.loads(file.read_text()).items()}
            if all(one.is_quiet for one in measured[name].values()):
                continue
        measured[name] = contest(
            [contestants[who] for who in (OURS, *row.marks)], _work(row, folder), row.pace, folder / "logs" / name, say
        )
        _write(file, json.dumps({who: dataclasses.asdict(one) for who, one in measured[name].items()}))
    text = _page(measured, where)
    file = arguments.results / f"against_peers_{datetime.date.today().isoformat()}_cpu.md"
    _write(file, text)
    console.print()
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to {file}", highlight=False)


def _work(row: Row, folder: Path) -> Work:
    """The row's work, on models that are written where they are not there."""
    size = SIZES[row.size]
    models = {}
    for seed, (who, config) in enumerate((("teacher", size.teacher), ("student", size.student))):
        models[who] = folder / "models" / f"{row.size}_{who}"
        if not (models[who] / "config.json").exists():
            save(models[who], Qwen3(config, jax.random.key(seed)))
    return Work(
        mode=row.mode,
        teacher=str(models["teacher"]),
        student=str(models["student"]),
        tokenizer=str(_TOKENIZER),
        vocab_size=size.student.vocab_size,
        rows=row.batch_size or size.batch_size,
        sequence_tokens=size.sequence_tokens,
        prompt_tokens=size.prompt_tokens,
        cores=usable_cores(),
    )


def _page(measured: Mapping[str, Mapping[str, Measured]], where: Mapping[str, Any]) -> str:
    versions = sorted(
        {f"{n} {v}" for row in measured.values() for one in row.values() for n, v in one.packages.items()}
    )
    lines = [
        "# Beside TRL and Tunix on the same work",
        f"{datetime.date.today().isoformat()}, {where['cpu_cores']} cores of {where['processor']}, float32, commit "
        f"{where['commit']}. Python {where['python']}, {', '.join(versions)}. Repeat with "
        "`python -m experiments.benchmarks.against_peers`.",
        table(measured),
        summary(measured),
        _EXPLANATION,
    ]
    return "\n\n".join(lines) + "\n"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__), Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
