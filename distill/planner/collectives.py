"""What a compiled program sends between devices: read from its HLO, loops counted as often as they run.

The compiler's own analysis counts the body of a loop once. Here every collective is counted with the trip counts of
the loops around it. A loop whose end depends on data, such as decoding's, is counted once and reported as open.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from kernels_pallas.chips import Chip

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
_SCATTERS = re.compile(r'"emitter":"\w*AllReduceScatterFusion"')
_DONE = re.compile(r" [\w\-]+-(?:done|update)\(")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COUNTED_TO = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_LESS_THAN = re.compile(r"ROOT .*(?:direction=LT|fusion\()")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective operation of a program."""

    kind: str
    whole_bytes: float
    """What all devices of a group hold together: the result of an all-gather, the operand of a reduce-scatter or an
    all-reduce, a device's operand of an all-to-all or a permutation."""
    group: tuple[int, ...]
    """Places, in the mesh's order of devices, of one of the groups that take part."""
    times: int
    """How often a call of the program does it."""
    open_loops: int
    """Loops around it that end when data says so, and are counted once in `times`."""


def collectives(hlo: str) -> list[Collective]:
    """Those of a compiled program, from `jax.stages.Compiled.as_text()`."""
    computations, entry = _computations(hlo)
    found: collections.Counter[tuple[str, float, tuple[int, ...], int]] = collections.Counter()
    open_names = [(entry, 1, 0, False)]
    while open_names:
        name, times, open_loops, scatters = open_names.pop()
        for line in computations[name]:
            if match := _WHILE.search(line):
                condition, body = match.groups()
                trips = _trip_count(line, computations[condition])
                open_names.append((body, times * (trips or 1), open_loops + (trips is None), False))
                continue
            if match := _COLLECTIVE.search(line):
                kind = match[2]
                group = _group(line)
                if len(group) > 1:
                    whole = _whole_bytes(kind, match[1], bool(match[3]), len(group))
                    found["reduce-scatter" if scatters else kind, whole, group, open_loops] += times
                continue
            if not _DONE.search(line):
                # A TPU's reduce-scatter is written as an all-reduce and the slice of it that a device keeps, in one.
                inner = times, open_loops, bool(_SCATTERS.search(line))
                open_names += [(called, *inner) for called in _called(line) if called in computations]
    return [
        Collective(kind=kind, whole_bytes=whole, group=group, times=times, open_loops=open_loops)
        for (kind, whole, group, open_loops), times in found.items()
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What collectives put on the wires of a device, in one call of a program."""

    sent_bytes: float = 0.0
    """By a device, over all its wires."""
    link_bytes: float = 0.0
    """One way over its busiest link: of the torus, or of a GPU's NVLink."""
    network_bytes: float = 0.0
    """Between hosts, where they are no part of a torus."""
    seconds: float = 0.0
    """At the full speed of the wires, one collective after the other."""

    def __add__(self, other: "Traffic") -> "Traffic":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Traffic(**dict(zip((f.name for f in dataclasses.fields(self)), (a + b for a, b in pairs), strict=True)))

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(**{name: value * times for name, value in dataclasses.asdict(self).items()})


def traffic(found: Sequence[Collective], devices: Sequence[jax.Device], chip: Chip) -> Traffic:
    """What `found` puts on the wires of `devices`, in the mesh's order, with rings wherever the torus has them."""
    total = Traffic()
    for one in found:
        total += _traffic_of(one, [devices[place] for place in one.group], devices, chip) * one.times
    return total


def _traffic_of(one: Collective, group: Sequence[jax.Device], devices: Sequence[jax.Device], chip: Chip) -> Traffic:
    count = len(group)
    sent = one.whole_bytes * (count - 1) / count
    if one.kind == "all-reduce":
        sent *= 2
    elif one.kind == "collective-permute":
        sent = one.whole_bytes
    if not chip.torus_dimensions:
        hosts = len({device.process_index for device in group})
        if hosts == 1 or chip.network_bytes_per_s is None:
            across = 0.0
        elif one.kind in ("all-to-all", "ragged-all-to-all", "collective-permute"):
            across = sent * (count - count / hosts) / (count - 1)
        else:
            # The cards of a host share what comes from outside, and pass it on over NVLink.
            across = sent * (hosts - 1) / (count - 1)
        within = sent - across
        seconds = within / chip.link_bytes_per_s
        seconds += across / chip.network_bytes_per_s if chip.network_bytes_per_s else 0.0
        return Traffic(sent_bytes=sent, link_bytes=within, network_bytes=across, seconds=seconds)
    # Of each dimension that the group reaches over, its chips and whether they close a ring.
    crossed = []
    for axis in range(chip.torus_dimensions):
        reached, size = (len({device.coords[axis] for device in some}) for some in (group, devices))
        if reached > 1:
            crossed.append((reached, reached == size >= chip.ring_from))
    if not crossed:  # The devices of one chip.
        return Traffic(sent_bytes=sent)
    per_link = sent / sum(2 if is_ring else 1 for _, is_ring in crossed)
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        # What goes to the far side passes every link on the way: an eighth of a ring's, or a quarter of a line's.
        per_link = max(one.whole_bytes * reached / (8 if is_ring else 4) for reached, is_ring in crossed)
    elif one.kind == "collective-permute":
        per_link = sent
    return Traffic(sent_bytes=sent, link_bytes=per_link, seconds=per_link / chip.link_bytes_per_s)


def _computations(hlo: str) -> tuple[Mapping[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        if not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    if not entry:
        raise ValueError("the text has no ENTRY computation; pass what Compiled.as_text() returns")
    return computations, entry


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for names in _BRANCHES.findall(line):
        yield from re.findall(r"[\w.\-]+", names)


def _trip_count(line: str, condition: Sequence[str]) -> int | None:
    """What the compiler knows, or the one constant that a counter from 0 is compared with; None if data decides."""
    if match := _TRIPS.search(line):
        return int(match[1])
    constants = [match[1] for match in map(_COUNTED_TO.search, condition) if match]
    if len(constants) == 1 and any(_LESS_THAN.search(line) for line in condition) and len(condition) <= 4:
        return int(constants[0])
    return None


def _whole_bytes(kind: str, result: str, started: bool, count: int) -> float:
    sizes = [
        _BYTES.get(dtype, int(re.sub(r"\D.*", "", dtype.lstrip("sufc")) or 8) / 8)
        * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape in _SHAPE.findall(result)
    ]
    if kind == "collective-permute":
        return sizes[0]
    if started and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]  # Operands come first.
    return sum(sizes) * (count if kind == "reduce-scatter" else 1)


def _group(line: str) -> tuple[int, ...]:
    """The first of the replica groups, in any of the ways in which HLO writes them."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        pairs = re.findall(r"\{(\d+),(\d+)", match[0])
        return next(((int(a), int(b)) for a, b in pairs if a != b), (0,))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(map(int, match[1].split(",")))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return tuple(_iota(match[2], match[3]).reshape(_numbers(match[1]))[0].tolist())
    if match := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line
    ):
        return _mesh_group(*match.groups())
    raise ValueError(f"the devices of a collective are not understood: {line.strip()[:200]}")


def _mesh_group(mesh: str, ids: str | None, permutation: str | None, axes: str) -> tuple[int, ...]:
    """`mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}`; a part of an axis is written 'a':(size before)size."""
    sizes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", mesh)}
    order = _iota(ids, permutation) if ids else np.arange(math.prod(sizes.values()))
    shape: list[int] = []
    taken: list[int] = []
    parts = {name: (before, size) for name, before, size in re.findall(r"'([\w.]+)'(?::\((\d+)\)(\d+))?", axes)}
    for name, size in sizes.items():
        before, part = parts.get(name, ("", ""))
        if name in parts:
            left, own = (int(before), int(part)) if part else (1, size)
            taken.append(len(shape) + 1)
            shape += [left, own, size // left // own]
        else:
            shape.append(size)
    rest = [axis for axis in range(len(shape)) if axis not in taken]
    count = math.prod(shape[axis] for axis in taken)
    return tuple(order.reshape(shape).transpose(*rest, *taken).reshape(-1, count)[0].tolist())


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    array = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return array.transpose(_numbers(permutation)) if permutation else array


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
