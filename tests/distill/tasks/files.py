"""Prompt files, and what a task makes of them."""

import json

import pyarrow
from pyarrow import parquet

from distill.tasks import Problem, PromptFile


def write(path, rows) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def only(path: str, **fields) -> list[Problem]:
    """All problems of a file, in its order."""
    task = PromptFile(path=path, held_out_fraction=0.0, **fields)
    return list(task._files[path].problems)
