"""TensorBoard event files that a killed and resumed run leaves exact: one line a curve, no zigzag, no hole.

tensorboardX's `SummaryWriter` hands events to a thread, which loses them on SIGKILL even after `flush()`, and
TensorBoard's own purge of a restarted run drops scalars but neither texts nor tensors. So events are written here at
once, and what lies past the restored step is cut out of the files.
"""

import os
import pathlib
import struct
import time
from collections.abc import Iterable, Iterator

from google.protobuf.message import DecodeError
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from distill.monitor.records import unwritable

# TFRecord framing: uint64 length, uint32 checksum of it, the data, uint32 checksum of the data; little-endian.
_LENGTH_BYTES, _CHECKSUM_BYTES = 8, 4


class EventLog:
    """The event directory of one stage; every event is with the operating system when a call returns."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._writer: EventsWriter | None = None

    def write(self, step: int, summary: Summary, unix_seconds: float | None = None) -> None:
        """Appends `summary` at `step`.

        Raises:
          UserError: if the disk is full or the directory not writable.
        """
        moment = time.time() if unix_seconds is None else unix_seconds
        self._append(Event(step=step, wall_time=moment, summary=summary))

    def forget_after(self, step: int) -> None:
        """Removes what was written past `step`, from the files and from TensorBoards that are watching."""
        self.close()
        files = sorted(self._directory.glob("events.out.tfevents.*"))
        try:
            for file in files:
                _cut_events(file, last_step=step)
        except OSError as error:
            raise unwritable(self._directory, error) from error
        if files:
            restart = SessionLog(status=SessionLog.START)
            self._append(Event(step=step + 1, wall_time=time.time(), session_log=restart))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _append(self, event: Event) -> None:
        try:
            if self._writer is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                # The suffix keeps two restarts within one second apart, and in order.
                prefix = str(self._directory / "events")
                self._writer = EventsWriter(prefix, filename_suffix=f".{time.time_ns()}")
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            raise unwritable(self._directory, error) from error


def _cut_events(path: pathlib.Path, last_step: int) -> None:
    events = list(_read_events(path))
    kept = [event for event in events if not (event.HasField("summary") and event.step > last_step)]
    if len(kept) < len(events):
        _rewrite(path, kept)


def _rewrite(path: pathlib.Path, events: Iterable[Event]) -> None:
    draft = path.with_name(f".{path.name}")
    writer = RecordWriter(str(draft))
    for event in events:
        writer.write(event.SerializeToString())
    writer.close()
    os.replace(draft, path)


def _read_events(path: pathlib.Path) -> Iterator[Event]:
    """Up to where the file is torn (the process was killed while it wrote) or damaged, where TensorBoard ends too."""
    data = path.read_bytes()
    start = 0
    while start + _LENGTH_BYTES + _CHECKSUM_BYTES <= len(data):
        length, checksum = struct.unpack_from("<QI", data, start)
        begin = start + _LENGTH_BYTES + _CHECKSUM_BYTES
        if checksum != masked_crc32c(data[start : start + _LENGTH_BYTES]):
            return
        start = begin + length + _CHECKSUM_BYTES
        if start > len(data):
            return
        try:
            yield Event.FromString(data[begin : begin + length])
        except DecodeError:
            return
