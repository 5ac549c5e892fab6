"""Devices are split between teacher and student as asked, and refused with the numbers where they cannot be."""

import jax
import pytest

from qwen3.errors import UserError
from qwen3.sharding import MeshShape
from teacher.placement import own_mesh


@pytest.mark.parametrize(
    ("teacher", "student", "sizes"),
    [
        (MeshShape(data=1, expert=6), MeshShape(), (6, 2)),
        (MeshShape(data=2, expert=2), MeshShape(data=2, tensor=2), (4, 4)),
        (MeshShape(tensor=2), MeshShape(data=1, fsdp=2), (6, 2)),
        (MeshShape(data=7), MeshShape(data=1), (7, 1)),
    ],
)
def test_the_devices_are_split_without_one_left_or_shared(teacher, student, sizes):
    of_teacher, of_student = own_mesh(teacher, student)
    assert (of_teacher.size, of_student.size) == sizes
    assert {*of_teacher.devices.flat, *of_student.devices.flat} == set(jax.devices())
    assert of_student.devices.flat[0] == jax.devices()[0]


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        (MeshShape(), MeshShape(), r"teacher\.mesh\.data and mesh\.data are both -1, .* how many of 8 devices"),
        (MeshShape(data=8), MeshShape(), r"8 devices cannot be split .*: mesh would get 0, of 8 \+ 0"),
        (MeshShape(data=4), MeshShape(data=2), r"teacher\.mesh would get 4, of 4 \+ 2; choose sizes that make up 8"),
        (MeshShape(expert=3), MeshShape(data=1), r"teacher\.mesh \(data -1 × .*expert 3.*: teacher\.mesh would get 7"),
        (MeshShape(data=5), MeshShape(tensor=2), r"mesh would get 3, of 5 \+ 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(teacher, student, message):
    with pytest.raises(UserError, match=message):
        own_mesh(teacher, student)
