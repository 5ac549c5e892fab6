"""Where the teacher's devices are: the student's own, or some of the same job that it has to itself."""

import dataclasses
import math

import jax
from jax.sharding import Mesh

from qwen3.errors import UserError
from qwen3.sharding import MESH_AXES, MeshShape, make_mesh


def own_mesh(teacher: MeshShape, student: MeshShape, devices: list[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
    """The teacher's mesh over the last `devices` (all by default) and the student's over the others.

    Where several processes run together, each gives its last devices, and all give equally many: what the teacher says
    stays in the process that trains on it, as far as both meshes cut the rows alike (see `teacher.transfer`).

    One of the two may leave `data` at -1 and takes what the other leaves. Raises UserError where the sizes do not make
    up the number of devices, or where the processes cannot give equal parts to both.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if teacher.data == student.data == -1:
        raise UserError(
            f"teacher.mesh.data and mesh.data are both -1, which says nothing about who gets how many of {count} "
            "devices; set one of them"
        )
    teachers = count - _size(student) if teacher.data == -1 else _size(teacher)
    students = count - teachers if student.data == -1 else _size(student)
    for field, shape, given in (("teacher.mesh", teacher, teachers), ("mesh", student, students)):
        others = _size(dataclasses.replace(shape, data=1))
        if given < 1 or given % others or teachers + students != count:
            raise UserError(
                f"{count} devices cannot be split into teacher.mesh ({_text(teacher)}) and mesh ({_text(student)}): "
                f"{field} would get {given}, of {teachers} + {students}; choose sizes that make up {count}, or let "
                "one data be -1, which takes what is left"
            )
    of_processes = _by_process(devices)
    for field, given in (("teacher.mesh", teachers), ("mesh", students)):
        if given % len(of_processes) or len({len(own) for own in of_processes}) > 1:
            raise UserError(
                f"teacher.placement is own_mesh, but {len(of_processes)} processes with "
                f"{', '.join(str(len(own)) for own in of_processes)} devices cannot give equally many to {field}, "
                f"which has {given}; choose a size that {len(of_processes)} divides, or use colocated"
            )
    each = students // len(of_processes)
    of_teacher = [device for own in of_processes for device in own[each:]]
    of_student = [device for own in of_processes for device in own[:each]]
    return make_mesh(teacher, of_teacher), make_mesh(student, of_student)


def _by_process(devices: list[jax.Device]) -> list[list[jax.Device]]:
    own: dict[int, list[jax.Device]] = {}
    for device in devices:
        own.setdefault(device.process_index, []).append(device)
    return [own[process] for process in sorted(own)]


def _size(shape: MeshShape) -> int:
    return math.prod(getattr(shape, axis) for axis in MESH_AXES)


def _text(shape: MeshShape) -> str:
    return " × ".join(f"{axis} {getattr(shape, axis)}" for axis in MESH_AXES)
