"""A run says what keeping its teacher in eight bits saves, and does not take its targets for those of the whole one."""

import dataclasses
import io

import jax
from rich.console import Console

from distill.experiment import Teacher
from distill.monitor.progress import Progress
from distill.runner.teachers import Teachers
from qwen3.chat.chat import ChatTokenizer
from qwen3.sharding import MeshShape, make_mesh
from tests.distill import miniature


def test_what_is_saved_is_said_and_the_teacher_is_another_one(tmp_path) -> None:
    whole = miniature.experiment(miniature.make_teacher(tmp_path))
    assert whole.teacher is not None
    quantised = dataclasses.replace(whole, teacher=dataclasses.replace(whole.teacher, quantisation="int8"))
    mesh, said = make_mesh(MeshShape(), jax.devices()[:1]), io.StringIO()
    tokenizer = ChatTokenizer.from_folder(whole.teacher.path)
    before = Teachers(whole, tokenizer, mesh, Progress(Console(file=io.StringIO()))).load("")
    after = Teachers(quantised, tokenizer, mesh, Progress(Console(file=said, width=200))).load("")
    assert after.fingerprint == f"{before.fingerprint} int8"
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(one.model)) for one in (before, after)]
    kept, saved = (f"{count / 1e6:,.1f} MB" for count in (sizes[1], sizes[0] - sizes[1]))
    assert f"its weights take {kept} with int8, {saved} less than in float32 alone" in said.getvalue()
    assert Teacher(path="teacher").quantisation is None
