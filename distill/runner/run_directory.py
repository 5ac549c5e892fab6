"""The run directory: one run of one experiment, claimed by it alone, refused to a changed experiment."""

import contextlib
import fcntl
import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from distill.experiment import Experiment, differing_fields
from distill.monitor.environment import environment
from distill.monitor.metrics import read_metrics
from distill.monitor.records import read_json, write_atomically
from distill.monitor.run_identity import began_at, claim_id, keep_began, known_id, require_id
from distill.monitor.wall_clock import WallClock
from distill.report.reading import from_json
from distill.report.results import STUDENT_INITIAL, TEACHER, EvaluationRow, StageCost
from distill.runner.inputs import Inputs, check_unchanged, found_inputs, inputs_from_json
from distill.stages.stopping import Interrupted
from qwen3.errors import UserError
from qwen3.hosts.processes import first_says, is_first, require_same
from qwen3.rollout import Rollout, rollouts_from_json, rollouts_to_json

_SHOWN_DIFFERENCES = 5
_RESPONSES = "teacher.responses"
"""Beside the evaluations: no stage has a dot in its name."""
_WORK = ("evaluations", "stages", "targets", "checkpoints")
"""What a run has to show for its time; a directory without any of these may still change its configuration."""
_INPUTS = "inputs.json"
_ENVIRONMENT = "environment.json"
_WHERE_SERVED = ("urls", "outage_seconds")
_SERVED_TEACHER = "teacher.json"
_TRUSTED = "delete it if you are certain that the experiment's files are those that the run began with"
EXPORT_RECORD = "export.json"
"""What lies in export/ of this run's writing."""
_WRITTEN = (
    *_WORK, _INPUTS, _SERVED_TEACHER, EXPORT_RECORD, "wall_seconds.json", "config.json", _ENVIRONMENT, "run_id",
    "began", ".lock",
    "tensorboard", "metrics.jsonl", "rollouts.jsonl", "report.json", "report.html", "export", ".export.partial",
    ".export.previous",
)  # fmt: skip
"""All that a run writes into its directory, but for who answered for several teachers."""
Kept = TypeVar("Kept")


def identity_file(teacher: str) -> str:
    """Says who answered for a served teacher when the run began; an only teacher has the empty name."""
    return f"teacher.{teacher}.json" if teacher else _SERVED_TEACHER


def _writes(name: str) -> bool:
    """Whether a run writes something of that name into its directory."""
    return name in _WRITTEN or fnmatch.fnmatchcase(name, identity_file("*"))


class RunDirectory:
    """What is done already, and where the rest goes."""

    def __init__(self, path: Path, config: Mapping[str, Any], inputs: Inputs, began: datetime):
        self.path = path
        self.began = began
        self.run_id = ""
        self.clock = WallClock(path)
        self._config = config
        self._inputs = inputs

    @classmethod
    @contextlib.contextmanager
    def claim(cls, path: Path, experiment: Experiment) -> Iterator["RunDirectory"]:
        """Hold the directory, new or to be continued; no other run can claim it meanwhile.

        Nothing is written before `begin`: a directory that was made for a run that never began is removed again.
        Of processes that run together the first one holds it, and writes to it. Raises UserError in all of them where
        it cannot be written, another run is in it, it holds work of another experiment or of other files, or what it
        holds is damaged.
        """
        wanted = json.loads(json.dumps(experiment.to_json()))
        require_same("the experiment's fields", json.dumps(wanted).encode)
        with contextlib.ExitStack() as held:
            inputs = first_says(lambda: cls._claim(path, wanted, experiment, held))
            began = datetime.fromisoformat(first_says(lambda: began_at(path).isoformat()))
            run = cls(path, wanted, inputs, began)
            for name in (STUDENT_INITIAL, *experiment.stages, TEACHER):
                run.evaluation(name)
            for name in experiment.stages:
                run.cost(name)
            try:
                yield run
            except Interrupted:
                run.keep_time()
                raise

    @staticmethod
    def _claim(path: Path, wanted: Mapping[str, Any], experiment: Experiment, held: contextlib.ExitStack) -> Inputs:
        try:
            path.mkdir(parents=True, exist_ok=True)
            _refuse_links(path)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"run directory {path} cannot be written ({error.strerror}); choose another with --runs"
            ) from None
        held.enter_context(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is running in {path}; wait for it or stop it") from None
        held.callback(_remove_if_never_begun, path)
        _check_config(path / "config.json", wanted)
        file = path / _INPUTS
        known = read_json(file, inputs_from_json, _TRUSTED) if file.exists() and _holds_work(path) else None
        inputs = found_inputs(experiment, known or {})
        if known is not None:
            check_unchanged(known, inputs)
        known_id(path)
        if _holds_work(path):
            _known_environment(path)
        read_metrics(path)
        return inputs

    def begin(self, command: str | None) -> Mapping[str, Any]:
        """Write down whose directory this is, and where it runs: from here on there is work to keep.

        Returns the environment in which the run began, with the `command` that began it.
        """
        self.run_id = first_says(lambda: self._begin(command))
        return cast(Mapping[str, Any], first_says(lambda: _known_environment(self.path)))

    def _begin(self, command: str | None) -> str:
        if not _holds_work(self.path):
            self.clock.forget_before()
            (self.path / EXPORT_RECORD).unlink(missing_ok=True)
            (self.path / _ENVIRONMENT).unlink(missing_ok=True)
        write_atomically(self.path / "config.json", json.dumps(self._config, indent=2) + "\n")
        write_atomically(self.path / _INPUTS, json.dumps(self._inputs, indent=2) + "\n")
        if not (self.path / _ENVIRONMENT).exists():
            began_with = environment() | ({} if command is None else {"command": command})
            write_atomically(self.path / _ENVIRONMENT, json.dumps(began_with, indent=2) + "\n")
        keep_began(self.path, self.began)
        return claim_id(self.path)

    @property
    def holds_work(self) -> bool:
        """Whether there is something to go on from."""
        return _holds_work(self.path)

    def evaluation(self, name: str) -> list[EvaluationRow] | None:
        """The rows of a model that has been evaluated, else None."""
        file = self.path / "evaluations" / f"{name}.json"
        remedy = "delete it, and the same command evaluates that model again"
        return self._kept(file, lambda raw: self._rows(name, raw), remedy)

    def forget_evaluation(self, name: str) -> None:
        if is_first():
            (self.path / "evaluations" / f"{name}.json").unlink(missing_ok=True)

    def keep_evaluation(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        self._keep("evaluations", name, rows)

    def teacher_responses(self) -> list[Rollout] | None:
        """The teacher's responses to the held-out prompts, on which students are scored, if it has given them."""
        remedy = "delete it, and the same command has the teacher generate them again"
        return self._kept(self.path / "evaluations" / f"{_RESPONSES}.json", rollouts_from_json, remedy)

    def keep_teacher_responses(self, responses: Sequence[Rollout]) -> None:
        self._keep("evaluations", _RESPONSES, rollouts_to_json(responses))

    def cost(self, name: str) -> StageCost | None:
        """The cost of a stage that has finished, else None."""
        file = self.path / "stages" / f"{name}.json"
        remedy = "delete it, and the same command takes it from the stage's last checkpoint"
        return self._kept(file, lambda raw: _cost(name, raw), remedy)

    def keep_cost(self, name: str, cost: Mapping[str, Any]) -> None:
        self._keep("stages", name, cost)

    def keep_time(self) -> None:
        """Call this when work is saved: the time until now counts as the run's."""
        if is_first():
            self.clock.keep()

    def _rows(self, name: str, raw: Any) -> list[EvaluationRow]:
        rows = [from_json(EvaluationRow, row, f"row {number}") for number, row in enumerate(raw, start=1)]
        assert all(row.model == name for row in rows), "another model"
        assert [row.mode for row in rows] == self._config["evaluation"]["modes"], "other modes"
        return rows

    def _kept(self, file: Path, made: Callable[[Any], Kept], remedy: str) -> Kept | None:
        """What `made` makes of a JSON file that is kept, None where there is none."""

        def checked(raw: Any) -> Any:
            made(raw)
            return raw

        raw = first_says(lambda: read_json(file, checked, remedy) if file.exists() else None)
        return None if raw is None else made(raw)

    def _keep(self, kind: str, name: str, value: Any) -> None:
        if not is_first():
            return
        require_id(self.path, self.run_id)
        (self.path / kind).mkdir(exist_ok=True)
        write_atomically(self.path / kind / f"{name}.json", json.dumps(value, indent=2) + "\n")
        self.clock.keep()


def _cost(name: str, raw: Any) -> StageCost:
    cost = from_json(StageCost, raw, "its record")
    assert cost.name == name, "another stage"
    return cost


def _check_config(file: Path, wanted: Any) -> None:
    if not file.exists() or not _holds_work(file.parent):
        return
    remedy = "put it back from a copy, or give this run another --name"
    differences = differing_fields(_deciding(read_json(file, _json_object, remedy)), _deciding(wanted))
    if differences:
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
        more = f" and {len(differences) - _SHOWN_DIFFERENCES} more" if len(differences) > _SHOWN_DIFFERENCES else ""
        raise UserError(
            f"{file.parent} holds a run of another configuration ({shown}{more}); "
            "give this one another --name, or delete that directory"
        )


def _known_environment(path: Path) -> dict[str, Any]:
    """That in which the run began, empty where it is not known."""
    file = path / _ENVIRONMENT
    remedy = "delete it, and the same command writes down where it goes on"
    return read_json(file, _json_object, remedy) if file.exists() else {}


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what may change from one part of a run to the next: where its teachers are to be asked,
    since `identity_file` says who they are."""

    def without_place(teacher: Any) -> Any:
        if not isinstance(teacher, dict):
            return teacher
        return {name: value for name, value in teacher.items() if name not in _WHERE_SERVED}

    deciding = dict(config)
    if "teacher" in config:
        deciding["teacher"] = without_place(config["teacher"])
    if isinstance(config.get("teachers"), dict):
        deciding["teachers"] = {name: without_place(teacher) for name, teacher in config["teachers"].items()}
    return deciding


def _json_object(raw: Any) -> dict[str, Any]:
    assert isinstance(raw, dict), "no object"
    return raw


def _refuse_links(path: Path) -> None:
    """Refuses a run directory in which something that a run writes lies elsewhere: it would be overwritten there."""
    for place, folders, files in os.walk(path):
        here = Path(place)
        for name in (*folders, *files):
            if (here / name).is_symlink() and (here != path or _writes(name)):
                raise UserError(
                    f"{here / name} is a symbolic link, and a run writes nothing outside of its directory; put a real "
                    "file or folder there, or link the whole run directory"
                )
        if here == path:
            # What else lies there is not the run's, and export/ is replaced as a whole.
            folders[:] = [name for name in folders if _writes(name) and name != "export"]


def _holds_work(path: Path) -> bool:
    return any((path / kind).exists() for kind in _WORK)


def _remove_if_never_begun(path: Path) -> None:
    """Called while the lock is held, so that no other run can be in it."""
    # It may be gone, which whoever writes there says better.
    with contextlib.suppress(OSError):
        if {file.name for file in path.iterdir()} == {".lock"}:
            (path / ".lock").unlink()
            path.rmdir()
