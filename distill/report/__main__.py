"""The command line: `python -m distill.report RUN [RUN …] [--to FILE]`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.monitor.records import write_atomically
from distill.monitor.terminal import make_console
from distill.report.joined import read_runs, variants_of
from distill.report.joined_page import render_joined, tables
from distill.report.page import render_page
from distill.report.reading import read_report
from distill.report.report import PAGE_FILE, terminal_table
from distill.report.results import headline
from qwen3.commands import OneLineParser, reported, spell_out
from qwen3.errors import UserError

_DESCRIPTION = """\
Read finished runs again: one as its own page, several as one page with means and spreads.

  python -m distill.report runs/a                      make the page of one run anew, from what lies there
  python -m distill.report runs/a-0 runs/a-1 runs/a-2  three seeds: mean ± standard deviation
  python -m distill.report runs/a-? runs/b-?           two variants side by side, with the fields in which they differ

Runs whose experiments differ in name, seed and description alone are one variant. The tables are printed, too; into a
pipe or a file they are Markdown.
"""
_EPILOGUE = """\
Exit status: 0 done; 2 something for you to mend, said in one line: a folder that holds no finished run, a damaged file.
"""
_PLAIN_WIDTH = 250
"""Wide enough for every table."""
_JOINED_FILE = "joined.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    spell_out()
    return reported(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = OneLineParser(
        prog="python -m distill.report",
        description=_DESCRIPTION,
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a finished run, runs/NAME")
    parser.add_argument(
        "--to",
        metavar="FILE",
        type=Path,
        help=f"where the page goes (default: RUN/{PAGE_FILE}; of several runs, {_JOINED_FILE} beside the first)",
    )
    given = parser.parse_args(arguments)
    if given.to is not None and (given.to.is_dir() or not given.to.parent.is_dir()):
        raise UserError(f"--to is {str(given.to)!r}; it must name a file, in a folder that is there")
    page = _one(given.runs[0], given.to) if len(given.runs) == 1 else _several(given.runs, given.to)
    print(f"page {page}")
    return 0


def _one(run: Path, to: Path | None) -> Path:
    report, page = read_report(run), to or run / PAGE_FILE
    write_atomically(page, render_page(run, report))
    console = make_console(plain_width=_PLAIN_WIDTH)
    console.print(terminal_table(report))
    console.print(headline(report), soft_wrap=True)
    return page


def _several(directories: Sequence[Path], to: Path | None) -> Path:
    variants = variants_of(read_runs(directories))
    page = to or Path(os.path.abspath(directories[0])).parent / _JOINED_FILE
    write_atomically(page, render_joined(variants))
    console = make_console(plain_width=_PLAIN_WIDTH)
    for table in tables(variants, plain=not console.is_terminal):
        console.print(table)
    return page


if __name__ == "__main__":
    sys.exit(main())
