import pytest

from distill.monitor import records
from distill.monitor.wall_clock import WallClock
from qwen3.errors import UserError


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def test_processes_add_up_to_their_last_save(tmp_path):
    clock = Clock()
    first = WallClock(tmp_path, clock)
    clock.seconds += 10
    first.keep()
    clock.seconds += 50  # killed before the next save
    second = WallClock(tmp_path, clock)
    clock.seconds += 5
    second.keep()
    clock.seconds += 1
    assert second.total() == 16
    assert WallClock(tmp_path, clock).seconds == 16


def test_a_process_that_keeps_nothing_adds_nothing(tmp_path):
    clock = Clock()
    first = WallClock(tmp_path, clock)
    clock.seconds += 10
    first.keep()
    again = WallClock(tmp_path, clock)
    clock.seconds += 50
    assert again.total() == 10
    assert WallClock(tmp_path, clock).seconds == 10


def test_time_of_work_that_is_gone_is_forgotten(tmp_path):
    clock = Clock()
    first = WallClock(tmp_path, clock)
    clock.seconds += 10
    first.keep()
    again = WallClock(tmp_path, clock)
    again.forget_before()
    clock.seconds += 3
    again.keep()
    assert again.total() == 3


def test_killed_while_it_is_kept_the_old_time_is_there(tmp_path, monkeypatch):
    clock = Clock()
    first = WallClock(tmp_path, clock)
    clock.seconds += 10
    first.keep()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        first.keep()
    assert WallClock(tmp_path, clock).seconds == 10


@pytest.mark.parametrize("content", ["", "1.5", "null", "{}", "[1]", '{"seconds": 1'])
def test_damage_is_named_with_a_remedy(tmp_path, content):
    (tmp_path / "wall_seconds.json").write_text(content)
    with pytest.raises(UserError, match=r"wall_seconds\.json is damaged .*; delete it") as refused:
        WallClock(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("seconds", ["null", "-1", "1e999", "NaN", "[1]", '"1"', "true", "1" * 400, "1" * 5000])
def test_a_time_that_cannot_be_is_named(tmp_path, seconds):
    (tmp_path / "wall_seconds.json").write_text(f'{{"seconds": {seconds}}}')
    with pytest.raises(UserError, match=r"wall_seconds\.json is damaged .*; delete it"):
        WallClock(tmp_path)
