import errno
import os

import pytest

from distill.monitor import records
from qwen3.errors import UserError


def test_appended_records_come_back_in_order(tmp_path):
    log = records.RecordLog(tmp_path / "new" / "log.jsonl")
    log.append({"step": 1, "text": "naïve\nline"})
    log.append({"step": 2})
    log.close()
    assert records.read_records(log.path) == [{"step": 1, "text": "naïve\nline"}, {"step": 2}]


def test_missing_file_reads_as_empty(tmp_path):
    assert records.read_records(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 2, "sca', b'{"step": 2}', b"\x00\x00", b'{"padding": "' + b"x" * 100_000])
def test_torn_last_line_is_skipped_and_then_cut_off(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert records.read_records(path) == [{"step": 1}]
    log = records.RecordLog(path)
    log.append({"step": 3})
    log.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_file_that_is_only_a_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"st')
    records.RecordLog(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("damage", [b"{oops}", b"[1]", b"", b"\xff"])
def test_damage_in_the_middle_is_named_by_line(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"log\.jsonl:2: not a JSON object"):
        records.read_records(path)


def test_keep_drops_and_goes_on_appending(tmp_path):
    log = records.RecordLog(tmp_path / "log.jsonl")
    for step in range(4):
        log.append({"step": step})
    log.keep(lambda record: record["step"] <= 1)
    log.append({"step": 9})
    log.close()
    assert [record["step"] for record in records.read_records(log.path)] == [0, 1, 9]
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_failed_rewrite_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def full_disk(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*report\.json: No space left on device"):
        records.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        records.RecordLog(tmp_path / "file" / "log.jsonl")


def test_numbers_that_json_lacks_are_refused(tmp_path):
    log = records.RecordLog(tmp_path / "log.jsonl")
    with pytest.raises(ValueError):
        log.append({"loss": float("nan")})
    log.close()
    assert log.path.read_bytes() == b""
