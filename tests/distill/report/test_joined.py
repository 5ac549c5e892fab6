"""Finished runs, read again: one as its own page, several as one with means and spreads."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from distill.report.__main__ import main
from distill.report.joined import Spread, differences, read_runs, variants_of
from distill.report.results import LengthHistogram, Score
from tests.distill.reported import REPORT, Page, row


def finished(
    runs: Path, name: str, seed: int, pass_at_1: float, *, learning_rate: float = 1e-3, **changes: Any
) -> Path:
    """The directory of a finished run."""
    report = dataclasses.replace(
        REPORT,
        experiment=name,
        lineage=("off_policy", "on_policy"),
        rows=[REPORT.rows[0], row("on_policy", pass_at_1, **changes), row("teacher", 0.995)],
        wall_seconds=60.0 + seed,
    )
    (runs / name).mkdir(parents=True)
    (runs / name / "report.json").write_text(json.dumps(report.to_json()))
    config = {"name": name, "seed": seed, "description": name, "stages": {"on_policy": {"lr": learning_rate}}}
    (runs / name / "config.json").write_text(json.dumps(config))
    return runs / name


@pytest.fixture
def six(tmp_path: Path) -> list[Path]:
    """Three seeds each of two variants."""
    slow = [finished(tmp_path, f"slow-{seed}", seed, share) for seed, share in enumerate((0.80, 0.90, 0.85))]
    fast = [
        finished(tmp_path, f"fast-{seed}", seed, share, learning_rate=2e-3)
        for seed, share in enumerate((0.90, 0.92, 0.94))
    ]
    return [*slow, *fast]


def test_runs_that_differ_in_their_seed_alone_are_one_variant(six: list[Path]) -> None:
    variants = variants_of(read_runs(six))
    assert [(variant.name, variant.seeds) for variant in variants] == [
        ("slow", "seeds 0, 1, 2"),
        ("fast", "seeds 0, 1, 2"),
    ]
    assert differences(variants) == [("stages.on_policy.lr", ["0.001", "0.002"])]
    spread = variants[0].spread("on_policy", "thinking", lambda one: one.pass_at_1)
    assert spread is not None
    assert spread.values == (0.80, 0.90, 0.85)
    # The standard deviation over n - 1 of 80, 90 and 85.
    assert spread.text(100) == "85.0 ± 5.0"


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (("run-10", "run-11", "run-12"), "run"),
        (("my_run-1", "my_run-10"), "my_run"),
        (("a-0", "a-1"), "a"),
        (("lr1e-3-0", "lr1e-3-1"), "lr1e-3"),
        (("seed0", "seed1"), "seed"),
        (("x", "y"), "x"),
    ],
)
def test_a_variant_is_called_by_what_its_runs_have_in_common(
    tmp_path: Path, names: tuple[str, ...], variant: str
) -> None:
    runs = [finished(tmp_path, name, seed, 0.5) for seed, name in enumerate(names)]
    assert [one.name for one in variants_of(read_runs(runs))] == [variant]


def test_the_page_goes_to_a_file_in_a_folder_that_is_there(
    six: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for to in (".", "/", str(tmp_path), str(tmp_path / "no" / "x.html"), str(six[0] / "report.json" / "x.html")):
        assert main([str(six[0]), "--to", to]) == 2
        assert re.fullmatch(
            r"error: --to is [^\n]+; it must name a file, in a folder that is there\n", capsys.readouterr().err
        )


def test_one_run_has_no_spread_and_what_no_run_has_is_absent() -> None:
    one = Spread.of(iter([0.5, None]))
    assert one is not None
    assert (one.deviation, one.text(100)) == (None, "50.0")
    assert Spread.of(iter([None])) is None


def test_several_runs_become_one_page_and_markdown_tables(
    six: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main([*map(str, six), "--to", str(page)]) == 0
    said = capsys.readouterr().out
    assert "6 runs, 2 variants, mean ± standard deviation over seeds" in said
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert ["on_policy", "thinking", "slow", "85.0 ± 5.0", "31.4 ± 0.0", "80.0, 90.0, 85.0"] in lines
    assert ["on_policy", "thinking", "fast", "92.0 ± 2.0", "31.4 ± 0.0", "90.0, 92.0, 94.0"] in lines
    shown = Page(page.read_text(encoding="utf-8"))
    assert {"85.0 ± 5.0", "92.0 ± 2.0", "stages.on_policy.lr", "0.002", "seeds 0, 1, 2", str(six[4])} <= set(
        shown.texts
    )
    assert "script" not in shown.tags
    assert not shown.addresses or all(address.startswith("#") for address in shown.addresses)


def test_without_a_place_the_page_lies_beside_the_first_run(
    six: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, six[:2])]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page {six[0].parent / 'joined.html'}"
    assert "85.0 ± 7.1" in (six[0].parent / "joined.html").read_text(encoding="utf-8")


def test_the_page_of_one_run_is_made_anew(six: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = (six[0] / "report.json").read_bytes()
    assert main([str(six[0])]) == 0
    assert "80.0" in Page((six[0] / "report.html").read_text(encoding="utf-8")).texts
    assert (six[0] / "report.json").read_bytes() == before
    assert "after on_policy" in capsys.readouterr().out


def _damage(run: Path, file: str, text: str) -> list[str]:
    (run / file).write_text(text)
    return [str(run)]


REFUSED = {
    "no folder": (lambda run: [str(run / "nothing")], "nothing is no folder"),
    "a file": (lambda run: [str(run / "report.json")], "report.json is no folder"),
    "the folder of the runs": (lambda run: [str(run.parent)], "perhaps you meant"),
    "an empty folder": (lambda run: [str(_empty(run))], "is no run directory"),
    "an unfinished run": (lambda run: [str(_unfinished(run))], "has not finished"),
    "named twice": (lambda run: [str(run), f"{run}/../{run.name}"], "named twice"),
    "no JSON": (lambda run: _damage(run, "report.json", "{"), "report.json is not valid JSON"),
    "no object": (
        lambda run: _damage(run, "report.json", "[1]"),
        "holds list, not a JSON object; restore it",
    ),
    "nothing in it": (lambda run: _damage(run, "report.json", "{}"), "report.json: experiment is missing"),
    "a row that is none": (
        lambda run: _damage(run, "report.json", '{"experiment": "a", "rows": [3], "stages": []}'),
        "report.json: rows[0]: 3 is not an object",
    ),
    "rows that are none": (
        lambda run: _damage(run, "report.json", '{"experiment": "a", "rows": {}, "stages": []}'),
        "report.json: rows is {}; it must be a list",
    ),
    "a wrong type": (lambda run: _wrong(run, "pass_at_1", "0.5"), "rows[0]: pass_at_1 is '0.5'; it must be a number"),
    "not a number": (
        lambda run: _wrong(run, "mean_response_tokens", float("nan")),
        "holds NaN, which is no number; correct it",
    ),
    "a histogram that is none": (
        lambda run: _wrong(run, "length_histogram", {"bin_tokens": 0, "counts": [1]}),
        "bins of 0 tokens",
    ),
    "no share": (lambda run: _wrong(run, "pass_at_1", 95.5), "rows[0]: student_initial, thinking: pass_at_1=95.5"),
    "no k": (lambda run: _wrong(run, "pass_at_k", {"eight": 0.5}), "must be a whole number"),
    "a mode that is none": (lambda run: _wrong(run, "mode", "loud"), "rows[0]: mode is 'loud'"),
    "metrics": (lambda run: _damage(run, "metrics.jsonl", '{"stage": "a"}\n'), "metrics.jsonl:1: not a record"),
    "a metric": (
        lambda run: _damage(run, "metrics.jsonl", '{"stage": "a", "step": 1, "scalars": {"loss": "low"}}\n'),
        "metrics.jsonl:1: not a record",
    ),
    "rollouts": (
        lambda run: _damage(run, "rollouts.jsonl", '{"stage": "a", "step": 1}\n'),
        "rollouts.jsonl:1: mode is",
    ),
    "config": (lambda run: _damage(run, "config.json", "nonsense"), "config.json is not valid JSON"),
    "a place that is none": (lambda run: [str(run), "--to", str(run / "no" / "where.html")], "it must name a file"),
}


def _empty(run: Path) -> Path:
    (run / "empty").mkdir()
    return run / "empty"


def _unfinished(run: Path) -> Path:
    (run / "report.json").unlink()
    return run


def _wrong(run: Path, field: str, value: Any) -> list[str]:
    raw = json.loads((run / "report.json").read_text())
    raw["rows"][0][field] = value
    (run / "report.json").write_text(json.dumps(raw))
    return [str(run)]


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_no_finished_run_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, complaint = REFUSED[case]
    run = finished(tmp_path, "a", 0, 0.5)
    assert main(arguments(run)) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")


def test_a_report_that_was_read_back_is_the_one_that_was_written(tmp_path: Path) -> None:
    told = {
        "length_histogram": LengthHistogram.of([3, 4, 4], 72),
        "by_family": {"a": Score(pass_at_1=0.5, problems=2, pass_at_1_stderr=0.1)},
        "finished": 0.5,
    }
    run = finished(tmp_path, "a", 0, 0.5, **told)
    (read,) = read_runs([run])
    assert json.dumps(read.report.to_json()) == (run / "report.json").read_text()
    assert read.report.rows[1].by_family == told["by_family"]
    assert read.report.rows[1].length_histogram == told["length_histogram"]
    assert list(read.report.rows[1].pass_at_k) == [8]
