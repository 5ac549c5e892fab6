"""The benchmarks run, at a miniature size, and what they conclude follows from what they measured."""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import pytest

from experiments.benchmarks import distill_step, own_mesh, sampler, service
from experiments.benchmarks.comparison import OURS, ROWS, TRL_GKD, TUNIX_LOGIT, Row, summary, table, verdicts
from experiments.benchmarks.contest import FEWEST_STEPS, QUIET_CORES, Contestant, Measured, Pace, contest
from experiments.benchmarks.peer_environments import Environment, prepare
from experiments.benchmarks.sizes import SIZES, Size
from experiments.benchmarks.turns import Work
from qwen3.errors import UserError

MEASURED = Measured(
    packages={"some": "1.0"},
    tokens_per_step=100,
    seconds=(1.0, 1.1, 9.0, 1.2, 1.3, 1.4),
    others_cores=(0.0, 0.1, 1.5, 0.0, 0.0, 0.0),
    sampling_seconds=(),
    first_loss=0.07,
    peak_rss_mb_before=400.0,
    peak_rss_mb=900.0,
)


def disturbed(measured: Measured) -> Measured:
    return dataclasses.replace(measured, others_cores=(1.0,) * len(measured.seconds))


def miniature() -> Size:
    small = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    return Size(
        teacher=dataclasses.replace(SIZES["tiny"].teacher, num_experts=2, moe_intermediate_size=8, **small),
        student=dataclasses.replace(SIZES["tiny"].student, intermediate_size=16, **small),
        batch_size=2,
        sequence_tokens=12,
        prompt_tokens=4,
    )


def test_a_step_is_measured_where_rows_are_given_and_where_the_student_writes() -> None:
    arguments = distill_step.Arguments(steps=3, warm=1)
    given = distill_step.measure(miniature(), arguments)
    assert given["steps"] == 2
    assert given["last_loss"] < given["first_loss"]
    assert given["tokens_per_second"] == pytest.approx(2 * 12 / given["step_seconds"], rel=0.2)
    assert "sampling_seconds" not in given
    written = distill_step.measure(miniature(), dataclasses.replace(arguments, mode="on"))
    assert 0 < written["sampling_seconds"] < written["step_seconds"]
    assert written["tokens_per_second"] == pytest.approx(2 * 8 / written["step_seconds"], rel=0.2)


def test_sampling_is_measured() -> None:
    row = sampler.measure(miniature(), sampler.Arguments(batch=3, steps=2))
    assert row["tokens_per_second"] == pytest.approx(3 * 8 / row["step_seconds"], rel=0.2)


@pytest.mark.long
def test_a_teacher_on_a_device_of_its_own_is_measured() -> None:
    asked = own_mesh.Arguments(microbatches=2, score_seconds=0.03, train_seconds=0.05, generate_seconds=0.02, rounds=1)
    rows = {row["way"]: row for row in own_mesh.measure(asked, jax.devices()[:2])}
    assert rows["own meshes"]["ideal_seconds"] == pytest.approx(0.03 + 2 * 0.05)
    assert rows["on-policy, own meshes, generated ahead"]["ideal_seconds"] == pytest.approx(0.02 + 2 * 0.05)
    # Others on the machine make a device's time longer. It is shorter where the core was slower, or the process had
    # more than one thread at work, in the milliseconds in which rounds were counted.
    assert all(
        rows[f"{what} alone"]["fastest_seconds"] > 0.4 * rows[f"{what} alone"]["ideal_seconds"]
        for what in ("score", "train")
    )


def test_a_thread_that_ends_while_threads_are_counted_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda tasks: iter([tasks / "0", tasks / str(os.getpid())]))
    assert own_mesh.thread_seconds() > 0


@pytest.mark.long
def test_a_served_teacher_is_measured_beside_one_in_the_same_process(tmp_path: Path) -> None:
    size = miniature()
    size = dataclasses.replace(size, teacher=dataclasses.replace(size.teacher, vocab_size=1_024))
    asked = service.Arguments(clients=3, requests=2, rounds=2, singles=2, peer=False)
    rows = {row["comparison"]: row for row in service.measure(size, tmp_path / "model", asked)}
    assert rows.keys() == {f"{what}, {kind}" for what in ("scoring", "one request") for kind in ("top_k", "hidden")}
    for kind in ("top_k", "hidden"):
        scoring, one = rows[f"scoring, {kind}"], rows[f"one request, {kind}"]
        lowest, highest = scoring["share_of_in_process_range"]
        assert 0 < lowest <= scoring["share_of_in_process"] <= highest
        assert one["served_ms"] > one["program_ms"] > 0


def test_ratios_are_of_one_rounds_turns() -> None:
    over, under = (
        [service.Turn(*one) for one in turns] for turns in ([(1, 4), (9, 4), (2, 4)], [(2, 1), (3, 2), (1, 4)])
    )
    found = service.ratio("times", over, under)
    assert (found["times"], found["times_range"]) == (2, [0.5, 3])
    assert (found["times_by_cpu_seconds"], found["times_by_cpu_seconds_range"]) == (2, [1, 4])


def test_disturbed_steps_do_not_count_where_enough_others_do() -> None:
    assert MEASURED.is_quiet
    assert MEASURED.counted_seconds == [1.0, 1.1, 1.2, 1.3, 1.4]
    assert MEASURED.median_seconds == 1.2
    assert MEASURED.tokens_per_second == pytest.approx(100 / 1.2)
    few = dataclasses.replace(MEASURED, others_cores=(QUIET_CORES,) * 2 + (0.0,) * 4)
    assert not few.is_quiet
    assert few.counted_seconds == list(MEASURED.seconds)


@pytest.mark.parametrize(("factor", "is_met"), [(1.3, True), (1.1, False)])
def test_a_mark_is_judged_by_medians(factor: float, is_met: bool) -> None:
    row = Row(title="work", size="tiny", mode="off", marks={TRL_GKD: 1.2}, memory_mark_mb=500)
    peer = dataclasses.replace(MEASURED, seconds=tuple(factor * seconds for seconds in MEASURED.seconds))
    memory, speed = verdicts(row, {OURS: MEASURED, TRL_GKD: peer})
    assert (memory.against, memory.is_met, memory.reached) == (OURS, True, "+500 MiB")
    assert (speed.against, speed.is_met, speed.reached) == (TRL_GKD, is_met, f"{factor:.2f} × as fast")
    _, slowed_peer = verdicts(row, {OURS: MEASURED, TRL_GKD: disturbed(peer)})
    assert slowed_peer.is_met is (None if is_met else False)
    _, slowed_us = verdicts(
        row, {OURS: disturbed(MEASURED), TRL_GKD: dataclasses.replace(peer, seconds=(factor * 1.35,) * 6)}
    )
    assert slowed_us.is_met is (True if is_met else None)


def test_the_table_has_a_line_for_everyone_and_the_summary_names_what_is_missed() -> None:
    slow = dataclasses.replace(MEASURED, seconds=tuple(3 * seconds for seconds in MEASURED.seconds))
    measured = {"tiny-on": {OURS: MEASURED, TRL_GKD: MEASURED, TUNIX_LOGIT: slow}}
    lines = table(measured).splitlines()
    assert len(lines) == 2 + 3
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "1.200 (1.000–1.400) | 5 |" in lines[2]
    assert lines[3].endswith("| 1.00 × as fast | ≥ 2.5 ×: missed |")
    assert lines[4].endswith("| 3.00 × as fast | ≥ 1.6 ×: met |")
    assert summary(measured) == "- tiny, on-policy, TRL GKD: 1.00 × as fast, mark ≥ 2.5 ×: missed"
    assert summary({"tiny-off": {OURS: MEASURED, TRL_GKD: slow}}) == "All marks are met."


def test_every_row_is_of_a_size_and_has_a_mark() -> None:
    assert all(row.size in SIZES and row.marks for row in ROWS.values())


def contestant(tmp_path: Path, name: str, code: str) -> Contestant:
    script = tmp_path / f"{name}.py"
    script.write_text(code)
    return Contestant(name=name, script=str(script), python=Path(sys.executable))


WORK = Work(
    mode="off",
    teacher="",
    student="",
    tokenizer="",
    vocab_size=32,
    rows=2,
    sequence_tokens=8,
    prompt_tokens=2,
    cores=1,
)
TAKES_TURNS = """
import itertools, os
from experiments.benchmarks.turns import Turns, Work
work, turns = Work.from_argument(), Turns("numpy")
for step in itertools.count():
    turns.begin()
    print("a library talks")
    with open({order!r}, "a") as order:
        print({name!r}, step, file=order)
    turns.end(loss=float(work.tokens(step).sum()))
"""


def test_contestants_take_turns_at_the_same_work(tmp_path: Path) -> None:
    order = tmp_path / "order"
    both = [contestant(tmp_path, name, TAKES_TURNS.format(order=str(order), name=name)) for name in "ab"]
    pace = Pace(warm=1, rounds=99, seconds=0.3, patience_seconds=0)
    measured = contest(both, WORK, pace, tmp_path / "logs", print)
    steps = order.read_text().split("\n")[:-1]
    turns = [(0,), *((1 + 2 * round_, 2 + 2 * round_) for round_ in range(FEWEST_STEPS))]
    wanted = [f"{name} {step}" for turn in turns for name in "ab" for step in turn]
    assert steps[: len(wanted)] == wanted
    assert measured["a"].first_loss == measured["b"].first_loss == float(WORK.tokens(0).sum())
    assert len(measured["a"].seconds) == len(measured["b"].seconds) == (len(steps) // 2 - 1) // 2
    assert "numpy" in measured["a"].packages
    assert Measured.from_json(dataclasses.asdict(measured["a"])) == measured["a"]
    assert (tmp_path / "logs" / "a.log").read_text().startswith("a library talks")


def test_contestants_whose_losses_differ_are_not_compared(tmp_path: Path) -> None:
    other = TAKES_TURNS.replace(".sum()))", ".sum()) * 1.02)")
    both = [
        contestant(tmp_path, name, code.format(order=str(tmp_path / "order"), name=name))
        for name, code in (("a", TAKES_TURNS), ("b", other))
    ]
    with pytest.raises(UserError, match=r"first losses on the same rows differ \(a \d+\.\d{4}, b \d+\.\d{4}\)"):
        contest(both, WORK, Pace(warm=1, rounds=1, seconds=0, patience_seconds=0), tmp_path / "logs", print)


def test_a_contestant_that_dies_between_its_turns_is_named(tmp_path: Path) -> None:
    dies = TAKES_TURNS.replace("    turns.end", "    if step == 2:\n        raise SystemExit('killed')\n    turns.end")
    both = [
        contestant(tmp_path, name, code.format(order=str(tmp_path / "order"), name=name))
        for name, code in (("a", TAKES_TURNS), ("b", dies))
    ]
    with pytest.raises(UserError, match="b stopped: killed"):
        contest(both, WORK, Pace(warm=1, rounds=9, seconds=9, patience_seconds=0), tmp_path / "logs", print)


def test_a_contestant_that_stops_is_named_with_its_last_words(tmp_path: Path) -> None:
    broken = contestant(tmp_path, "broken", "raise SystemExit('no such model')")
    with pytest.raises(UserError, match=rf"broken stopped: no such model \(all of it: {tmp_path}/logs/broken.log\)"):
        contest([broken], WORK, Pace(), tmp_path / "logs", print)


@pytest.mark.long
def test_a_package_that_cannot_be_installed_is_said_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    absent = Environment(name="absent", batches=(("no-such-package==1.0",),))
    with pytest.raises(UserError, match=r"no-such-package==1\.0 cannot be installed into .*: ERROR: ") as caught:
        prepare(absent, tmp_path, print)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "absent" / "installed.txt").exists()
