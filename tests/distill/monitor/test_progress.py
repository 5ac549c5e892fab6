import io

import pytest
from rich.console import Console

from distill.monitor.progress import Progress
from distill.monitor.time_left import Part, duration


class Clock:
    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def plain(clock, **settings):
    output = io.StringIO()
    return Progress(Console(file=output, width=40), clock=clock, **settings), output


def terminal(clock, width):
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    return Progress(console, clock=clock), output


def test_log_gets_a_line_an_interval_and_no_control_codes(clock):
    progress, output = plain(clock, line_interval_seconds=10)
    with progress, progress.task("off_policy", 40, completed_steps=20) as task:
        for step in range(20):
            clock.seconds += 2
            task.advance(tokens=512, values={"loss": 1 / (step + 1)})
    assert output.getvalue().splitlines() == [
        "off_policy: 40 steps, continuing after 20",
        "off_policy  25/40 steps (62%)  loss 0.200  256 tokens/s  30 s left",
        "off_policy  30/40 steps (75%)  loss 0.100  256 tokens/s  20 s left",
        "off_policy  35/40 steps (88%)  loss 0.0667  256 tokens/s  10 s left",
        "off_policy  40/40 steps (100%)  loss 0.0500  256 tokens/s  took 40 s",
    ]


def test_short_nested_tasks_do_not_fill_the_log(clock):
    progress, output = plain(clock, line_interval_seconds=10)
    with progress, progress.task("on_policy", 2) as stage:
        for seconds in (3, 30):
            with progress.task("sampling", 8, unit="rollouts") as sampling:
                clock.seconds += seconds
                sampling.advance(8)
            stage.advance()
    lines = output.getvalue().splitlines()
    assert [line for line in lines if "sampling" in line] == ["  sampling  8/8 rollouts (100%)  took 30 s"]


def test_speed_leaves_out_the_first_step_and_forgets_the_distant_past(clock):
    progress, _ = plain(clock)
    with progress, progress.task("stage", 100) as task:
        clock.seconds += 60
        task.advance(tokens=10)
        assert task.speed.steps_per_second is None
        assert task.seconds_left is None
        for _ in range(10):
            clock.seconds += 10
            task.advance(tokens=10)
        assert task.speed.steps_per_second == pytest.approx(0.1)
        for _ in range(60):
            clock.seconds += 1
            task.advance(tokens=10)
        assert task.speed.steps_per_second == pytest.approx(1)
        assert task.speed.tokens_per_second == pytest.approx(10)
        assert task.seconds_left == pytest.approx(100 - 71)


def test_figures_that_are_not_known_are_absent(clock):
    progress, output = plain(clock)
    with progress, progress.task("export", 0, unit="files"):
        pass
    assert output.getvalue().splitlines()[-1] == "export  0/0 files  took 0.0 s"


def test_error_leaves_the_terminal_in_order(clock):
    progress, output = terminal(clock, 100)
    with pytest.raises(RuntimeError), progress, progress.task("stage", 2):
        raise RuntimeError
    show_cursor = "\x1b[?25h"
    assert output.getvalue().endswith(show_cursor)


@pytest.mark.parametrize("width", [80, 200])
def test_terminal_rows_never_wrap_and_nested_rows_stay_between_visits(clock, width):
    progress, output = terminal(clock, width)
    with progress, progress.task("on_policy", 100) as stage:
        for _ in range(2):
            with progress.task("sampling", 8, unit="rollouts") as sampling:
                clock.seconds += 1
                sampling.advance(8, tokens=4096)
            stage.advance(tokens=4096, values={"loss": 0.25})
        progress._bars.refresh()
        lines = last_frame(output)
        assert len(lines) == 2
        assert lines[0].startswith("on_policy")
        assert lines[0].endswith("2/100 steps  loss 0.250  4,096 tokens/s  1 min 38 s left")
        assert lines[1].startswith("  sampling")
        assert "8/8 rollouts" in lines[1]
    assert "sampling" not in output.getvalue().rpartition("\x1b[2K")[2]


def last_frame(output):
    return [line.rstrip() for line in output.getvalue().rpartition("\x1b[2K")[2].splitlines()]


def test_a_task_that_ends_leaves_a_whole_line_in_a_terminal_too(clock):
    progress, output = terminal(clock, 30)
    with progress, progress.task("evaluating student_initial, non-thinking", 8, unit="responses") as task:
        clock.seconds += 3
        task.advance(8)
        task.result = "95.2 ± 1.3 %"
    said = "evaluating student_initial, non-thinking  8/8 responses (100%)  95.2 ± 1.3 %  took 3.0 s"
    assert f"\x1b[2K{said}\n" in output.getvalue()


@pytest.mark.parametrize("width", [1, 5, 20, 40])
def test_small_terminals_get_one_row_a_task(clock, width):
    progress, output = terminal(clock, width)
    progress.plan([part("off_policy", "stage", "stage 1 of 1")])
    with progress, progress.task("off_policy", 10_000) as task:
        clock.seconds += 1
        task.advance(tokens=4096, values={"loss": 0.25})
        progress._bars.refresh()
        lines = last_frame(output)
        assert len(lines) == 2
        assert all(len(line) <= width for line in lines)


def part(title, kind, place, pace=None):
    return Part(title=title, kind=kind, whose=title, place=place, pace=pace)


def test_the_log_says_which_stage_it_is_and_what_is_left_of_the_run(clock):
    progress, output = plain(clock, line_interval_seconds=100)
    progress.plan(
        [
            part("evaluating start", "evaluation", "before stage 1 of 2", "fast"),
            part("sft", "stage", "stage 1 of 2"),
            part("evaluating sft", "evaluation", "stage 1 of 2", "fast"),
            part("on_policy", "stage", "stage 2 of 2"),
            part("evaluating on_policy", "evaluation", "stage 2 of 2", "fast"),
            part("evaluating teacher", "evaluation", "after stage 2 of 2"),
        ]
    )
    with progress:
        for title in ("evaluating start", "sft", "evaluating sft", "on_policy", "evaluating on_policy"):
            with progress.task(title, 2) as task:
                clock.seconds += 10
                task.advance(2)
    begun = [line for line in output.getvalue().splitlines() if ": 2 steps" in line]
    assert begun == [
        "evaluating start: 2 steps  (before stage 1 of 2, 2 stages and 4 evaluations left)",
        "sft: 2 steps  (stage 1 of 2, ~20 s, 2 stages and 1 evaluation left)",
        "evaluating sft: 2 steps  (stage 1 of 2, ~20 s, 1 stage and 1 evaluation left)",
        "on_policy: 2 steps  (stage 2 of 2, ~10 s, 1 stage and 1 evaluation left)",
        "evaluating on_policy: 2 steps  (stage 2 of 2, ~10 s and 1 evaluation left)",
    ]


def test_a_terminal_shows_the_time_left_of_the_whole_run(clock):
    progress, output = terminal(clock, 100)
    progress.plan(
        [
            part("evaluating start", "evaluation", "before stage 1 of 1", "fast"),
            part("sft", "stage", "stage 1 of 1"),
            part("evaluating sft", "evaluation", "stage 1 of 1", "fast"),
        ]
    )
    with progress:
        with progress.task("evaluating start", 1) as task:
            clock.seconds += 60
            task.advance()
        with progress.task("sft", 100) as task:
            for _ in range(2):
                clock.seconds += 1
                task.advance()
            progress._bars.refresh()
            assert last_frame(output)[0].startswith("whole run")
            # 98 steps of a second each, and another evaluation.
            assert last_frame(output)[0].endswith("stage 1 of 1 ~2 min 38 s left")
    assert "whole run" not in output.getvalue().rpartition("\x1b[2K")[2]


def test_markup_in_lines_is_shown_as_it_is(clock):
    progress, output = plain(clock)
    with progress:
        progress.print("rollout [bold]12[/bold] [/] :smile: of a rather long line, longer than the console is wide")
    assert (
        output.getvalue()
        == "rollout [bold]12[/bold] [/] :smile: of a rather long line, longer than the console is wide\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (308, "5 min 08 s"),
        (12_000, "3 h 20 min"),
        (190_000, "2 d 4 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_reading_shows_its_speed_in_bytes(clock):
    progress, output = plain(clock, line_interval_seconds=10)
    with progress, progress.reading("loading the teacher") as on_read:
        for done in range(1, 21):
            clock.seconds += 2
            on_read(done * 5 * 10**9, 100 * 10**9)
    assert output.getvalue().splitlines() == [
        "loading the teacher: 100,000 MB",
        "loading the teacher  30,000/100,000 MB (30%)  GB/s 2.50  28 s left",
        "loading the teacher  55,000/100,000 MB (55%)  GB/s 2.50  18 s left",
        "loading the teacher  80,000/100,000 MB (80%)  GB/s 2.50  8.0 s left",
        "loading the teacher  100,000/100,000 MB (100%)  GB/s 2.50  took 38 s",
    ]


def test_reading_little_is_not_shown(clock):
    progress, output = plain(clock)
    with progress, progress.reading("loading the teacher") as on_read:
        on_read(10**6, 10**6)
    assert output.getvalue() == ""
