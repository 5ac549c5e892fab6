"""The fields of an experiment as options of a command: changed by tyro, and where that fails, said in one line."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.text import Text

from distill.experiment import Experiment
from distill.runner.field_help import first_fields
from qwen3.commands import OneLineParser
from qwen3.errors import UserError
from qwen3.field_types import shown

_KINDS = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "STR": "a text",
    "[INT [INT ...]]": "whole numbers",
    "{[INT [INT ...]]}": "whole numbers",
    "{None}": "None",
}
"""How tyro spells types, and what they are called."""


def parser_of(command: str, description: str, epilogue: str, experiment: str) -> argparse.ArgumentParser:
    """Of a command that takes an experiment, explained in sentences, and changes of its fields; its own options are to
    be added. It knows no --help: with an experiment that is `overridden`'s."""
    parser = OneLineParser(
        prog=command,
        description=description,
        epilog=epilogue,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", nargs="?", help=experiment)
    return parser


def overridden(
    experiment: Experiment, fields: Sequence[str], path: Path, parser: argparse.ArgumentParser
) -> Experiment:
    """The experiment of file `path` with the fields changed that `parser` has left over.

    --help lists the command's own options beside the fields that people change first, --help-all beside all. Raises
    UserError where an argument names no field or a value that cannot be, SystemExit after help.
    """
    prog = f"{parser.prog} {path}"
    options = {
        f"{action.option_strings[0]} {action.metavar or ''}".strip(): str(action.help)
        for action in parser._actions
        if action.option_strings
    }
    if {"--help", "-h"} & {*fields}:
        follow = (
            "The fields that people change first, of a stage those that differ from the first of its kind, follow\n"
            "(--help-all: all of them)"
        )
        said = _description(experiment, prog, options, follow)
        print(f"usage: {prog} [--field.path VALUE …]\n\n{said}\n\n{first_fields(experiment)}")
        raise SystemExit(0)
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            return tyro.cli(
                Experiment,
                default=experiment,
                args=["--help" if field == "--help-all" else field for field in fields],
                prog=prog,
                description=_description(experiment, prog, options, "The fields of the experiment follow"),
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        said = _in_one_line(refusal.getvalue(), experiment, path)
        raise UserError(f"{said}; all fields: {prog} --help-all") from None


def _description(experiment: Experiment, prog: str, options: Mapping[str, str], follow: str) -> str:
    width = max(map(len, options))
    own = "\n".join(f"  {option:{width}}  {words}" for option, words in options.items())
    return (
        f"{experiment.description}\n\n"
        f"Options of the command:\n{own}\n\n"
        f"{follow}, with the values that the file gives them.\n"
        "A changed experiment needs another --name:\n"
        f"  {prog} --name {experiment.name}-1 --seed 1"
    )


def _in_one_line(box: str, experiment: Experiment, path: Path) -> str:
    """What tyro's box of several lines says: its first part, and the nearest option where it suggests some.

    On a UTF-8 terminal the box has a frame with the title in it, else only rules below the title and between parts.
    """
    _, *rows = (row.strip("│ ") for row in Text.from_ansi(box).plain.strip().splitlines())
    parts = [list(part) for is_rule, part in itertools.groupby(rows, lambda row: not row.strip("─-╰╯")) if not is_rule]
    said = " ".join(row for row in parts[0] if row).rstrip(". ")
    near = next((row for before, row in itertools.pairwise(rows) if before == "Perhaps you meant:"), None)
    if near is not None:
        return f"{said}; perhaps you meant {near.split()[0]}"
    if unknown := re.match(r"Unrecognized options: --([\w.-]+)", said):
        return _unset(unknown[1], experiment, path) or said
    if choice := re.match(r"invalid choice '(.*)' for argument '(--[\w.-]+)'. Expected one of \((.*?),?\)", said):
        return f"{choice[2]} is {shown(choice[1])}; use one of {choice[3].replace(chr(39), '')}"
    if value := re.match(r"Error parsing (--[\w.-]+): .*?'([^']*)'[\]. ]*( Got errors.*)?$", said):
        return f"{value[1]} is {shown(value[2])}; it must be {_kind(value[1], rows)}"
    if check := re.match(r"Error parsing ([\w.-]+): (.*)", said):
        return _with_path(*check.groups())
    return said


def _kind(option: str, rows: Sequence[str]) -> str:
    """The type of an option in plain English; tyro's help for it is in another part of the box."""
    usage = next((row.removeprefix(option) for row in rows if row.startswith(f"{option} ")), " another value")
    # None comes first in tyro's spelling and is the exception.
    return " or ".join(reversed([_KINDS.get(kind, kind) for kind in usage.strip().split("|")]))


def _with_path(owner: str, complaint: str) -> str:
    """A check of a dataclass's own fields, `training.steps is 0`, with the path of what holds it, once."""
    if owner == Experiment.__name__:
        return complaint
    own, _, field = complaint.partition(".")
    if field and own == owner.rpartition(".")[2].replace("-", "_"):
        return f"{owner}.{field}"
    return f"{owner}.{complaint}" if re.match(r"\w+ (is|has) ", complaint) else f"{owner}: {complaint}"


def _unset(option: str, experiment: Experiment, path: Path) -> str | None:
    """What to do for an option inside of what the file leaves None; None where that is not the reason."""
    names = option.replace("-", "_").split(".")
    held: Any = experiment
    for depth, name in enumerate(names[:-1], start=1):
        fields = held if isinstance(held, Mapping) else vars(held)
        if name not in fields:
            return None
        held = fields[name]
        if held is None:
            owner = ".".join(names[:depth])
            return f"--{option} needs {owner}, which is None in {path}; set {owner} there first"
        if not isinstance(held, Mapping) and not dataclasses.is_dataclass(held):
            return None
    return None
