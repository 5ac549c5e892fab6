import io
import sys

import pytest

from distill.monitor.terminal import make_console
from qwen3.commands import spell_out


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("latin-1", "0.0 ± 0.1 % → 3 × é", b"0.0 \xb1 0.1 % -> 3 \xd7 \xe9"),
        ("ascii", "0.0 ± 0.1 % → 3 × é …", b"0.0 +- 0.1 % -> 3 x ? ..."),
        ("utf-8", "0.0 ± 0.1 % →", "0.0 ± 0.1 % →".encode()),
        # Half of a surrogate pair: how Python holds a byte of a file name that is no UTF-8.
        ("utf-8", "runs/\udce9", b"runs/?"),
    ],
)
def test_what_cannot_be_encoded_is_spelled_out(monkeypatch, encoding, text, written):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    spell_out()
    make_console().print(text, soft_wrap=True)
    sys.stdout.flush()
    assert raw.getvalue() == written + b"\n"


def test_names_and_paths_are_no_markup(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    path = "/data/[red]x/[/]/:smile:/" + "long/" * 40
    make_console().print(path, soft_wrap=True)
    sys.stdout.seek(0)
    assert sys.stdout.read() == path + "\n"


def test_a_reader_that_has_gone_is_told_as_such(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        make_console().print("anything")


def test_tables_keep_their_width_where_no_terminal_has_one(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert make_console(plain_width=250).width == 250
