"""TensorBoard event files that a killed and resumed run leaves exact: one line a curve, no zigzag, no hole.

TensorBoard's `EventFileWriter` hands events to a thread, which loses them on SIGKILL, and its purge of a restarted run
drops scalars but neither texts nor tensors. So events are written here at once, and what lies past the restored step
is cut out of the files. (tensorboardX has no such thread in its `EventsWriter`, but imports torch wherever torch is:
2.5 seconds of every command.)
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c

from distill.monitor.records import unwritable

# TFRecord framing: uint64 length, uint32 checksum of it, the data, uint32 checksum of the data; little-endian.
_LENGTH_BYTES, _CHECKSUM_BYTES = 8, 4
_FORMAT = "brain.Event:2"
"""What the first event of a file says."""


def scalars(values: Mapping[str, float]) -> Summary:
    """One point of each curve, by tag."""
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def text(tag: str, markdown: str) -> Summary:
    """`markdown` for the text page."""
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=shape)
    metadata = create_summary_metadata(display_name="", description="")
    return Summary(value=[Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)])


class EventLog:
    """The event directory of one stage; every event is with the operating system when a call returns."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._writer: RecordWriter | None = None

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
                # The nanoseconds keep two restarts within one second apart, and in order.
                now = time.time_ns()
                name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
                self._writer = RecordWriter((self._directory / name).open("wb"))
                self._writer.write(Event(wall_time=now / 1e9, file_version=_FORMAT).SerializeToString())
            self._writer.write(event.SerializeToString())
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
    writer = RecordWriter(draft.open("wb"))
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
