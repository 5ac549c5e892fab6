"""Where the teacher's devices are: the student's own, or some of the same job that it has to itself."""

import dataclasses
import math

import jax
from jax.sharding import Mesh

from qwen3.errors import UserError
from qwen3.sharding import MESH_AXES, MeshShape, make_mesh


def own_mesh(teacher: MeshShape, student: MeshShape, devices: list[jax.Device] | None = None) -> tuple[Mesh, Mesh]:
    """The teacher's mesh over the last `devices` (all by default) and the student's over the others.

    One of the two may leave `data` at -1 and takes what the other leaves. Raises UserError where the sizes do not make
    up the number of devices, or where several processes run together: every process would need devices of both.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"teacher.placement is own_mesh, but {jax.process_count()} processes run this experiment, of which each "
            "would need devices of both meshes; use colocated, or one process"
        )
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
    return make_mesh(teacher, devices[students:]), make_mesh(student, devices[:students])


def _size(shape: MeshShape) -> int:
    return math.prod(getattr(shape, axis) for axis in MESH_AXES)


def _text(shape: MeshShape) -> str:
    return " × ".join(f"{axis} {getattr(shape, axis)}" for axis in MESH_AXES)
