"""Rows of JSONL and Parquet files as plain JSON values, the same from either: what a format adds is taken away here."""

import decimal
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qwen3.errors import UserError

if TYPE_CHECKING:
    import pyarrow

_JSONL_SUFFIXES: Final = (".jsonl", ".ndjson")
_EXACT_FLOATS: Final = 2**53
"""Below it, a float with a whole value is that whole number and none of its neighbours."""
_MISSING: Final = object()


def read_rows(path: Path, columns: Mapping[str, str | None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row as its place in the file, for messages, and its values by the names in `columns`, which say of each what
    else can be done where a row lacks it; None: it is null there.

    A name with dots is a field inside of a column, unless there is a column of that very name. Nulls inside objects are
    left out, because Parquet gives every object the keys that any has. NaN is null, and a number with a whole value is
    that whole number, because pandas turns whole numbers into floats where one of them is missing.

    Raises:
        UserError: The file or a row cannot be read or lacks a column, or a value is nothing that JSON knows.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a JSONL or Parquet file")
    if path.suffix in _JSONL_SUFFIXES:
        rows = _jsonl_rows(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, columns)
    else:
        raise UserError(f"{path}: ends in {path.suffix!r}; give a {', '.join(_JSONL_SUFFIXES)} or .parquet file")
    try:
        for where, row in rows:
            try:
                values = {
                    name: plain(f"{where}: {name}", _cell(where, row, name, remedy)) for name, remedy in columns.items()
                }
            except RecursionError as error:
                raise UserError(f"{where}: nested too deeply ({error}); mend the row") from error
            yield where, values
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason}); check the file or copy it again") from error


def kind(value: object) -> str:
    """What a value is, for a message that says what it should be."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "a text" if value.strip() else "an empty text"
    if isinstance(value, bool):
        return f"the truth value {value}"
    if isinstance(value, int | float):
        return f"the number {value}"
    return f"a {type(value).__name__}"


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                reason = f"{error.msg}, column {error.colno}"
                raise UserError(f"{where}: not JSON ({reason}); write one JSON object a line") from error
            except (ValueError, RecursionError) as error:
                # A number of thousands of digits, or brackets nested as deep.
                raise UserError(f"{where}: not JSON that can be read ({error}); mend the line") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: holds {kind(row)}; write one JSON object a line")
            yield where, row


def _parquet_rows(path: Path, columns: Mapping[str, str | None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            blank = {field.name: _blank(field.type) for field in file.schema_arrow}
            for column, remedy in columns.items():
                _cell(str(path), blank, column, remedy)
            held = [name for name in blank if any(f"{column}.".startswith(f"{name}.") for column in columns)]
            for batch in file.iter_batches(columns=held):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield f"{path} row {number}", row
    except (UnicodeDecodeError, OverflowError) as error:
        raise UserError(
            f"{path}: a value after row {number} cannot be read ({error}); store texts as UTF-8 and dates as texts"
        ) from error
    except pyarrow.ArrowException as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({first_line}); write or copy it again") from error


def _blank(kind: "pyarrow.DataType") -> Mapping[str, Any] | None:
    """A value of this type that holds nothing but the fields inside of it."""
    from pyarrow import types

    return {field.name: _blank(field.type) for field in kind} if types.is_struct(kind) else None


def _cell(where: str, row: Mapping[str, Any], column: str, other_remedy: str | None) -> Any:
    """The value of a column, or of a field inside of one: null where what should hold it is null, and without a remedy
    where nothing does."""
    value = _looked_up(row, column)
    if value is _MISSING:
        if other_remedy is None:
            return None
        names = sorted(_names(row))
        close = difflib.get_close_matches(column, names, n=1)
        remedy = f"perhaps you meant {close[0]!r}" if close else f"it has {', '.join(names) or 'none'}"
        raise UserError(f"{where}: has no column {column!r}; {remedy}{other_remedy}")
    return value


def _looked_up(held: Any, name: str) -> Any:
    if not isinstance(held, Mapping):
        return None if held is None else _MISSING
    if name in held:
        return held[name]
    return next((_looked_up(held[head], rest) for head, rest in _heads(name) if head in held), _MISSING)


def _heads(column: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a dotted name in two, the longest head first."""
    parts = column.split(".")
    return ((".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(len(parts) - 1, 0, -1))


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        yield name
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in _names(value))


def plain(where: str, value: Any) -> Any:
    """A value as JSON has it, without nulls inside objects and with whole numbers where floats are whole.

    Raises UserError, which begins with `where`, at what JSON does not know.
    """
    if isinstance(value, decimal.Decimal):
        value = int(value) if value == value.to_integral_value() else float(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} has half of a surrogate pair; write the whole character") from error
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < _EXACT_FLOATS else value
    if isinstance(value, Mapping):
        items = {plain(where, str(key)): plain(where, item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None}
    if isinstance(value, list):
        return [plain(where, item) for item in value]
    raise UserError(f"{where} holds {kind(value)}; store it as text, a finite number, a list or an object")
