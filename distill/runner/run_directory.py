"""The run directory: one run of one experiment, claimed by it alone, refused to a changed experiment."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from distill.experiment import Experiment, differing_fields
from distill.hosts.processes import first_says, is_first, require_same
from distill.monitor.environment import environment
from distill.monitor.records import write_atomically
from distill.monitor.run_identity import began_at, claim_id, keep_began, require_id
from distill.report.reading import from_json
from distill.report.results import EvaluationRow, StageCost
from qwen3.errors import UserError
from qwen3.rollout import Rollout, rollouts_from_json, rollouts_to_json

_SHOWN_DIFFERENCES = 5
_RESPONSES = "teacher.responses"
"""Beside the evaluations: no stage has a dot in its name."""
_WORK = ("evaluations", "stages", "targets", "checkpoints")
"""What a run has to show for its time; a directory without any of these may still change its configuration."""


class RunDirectory:
    """What is done already, and where the rest goes."""

    def __init__(self, path: Path, config: Any, began: datetime):
        self.path = path
        self.began = began
        self.run_id = ""
        self._config = config

    @classmethod
    @contextlib.contextmanager
    def claim(cls, path: Path, experiment: Experiment) -> Iterator["RunDirectory"]:
        """Hold the directory, new or to be continued; no other run can claim it meanwhile.

        Nothing is written before `begin`: a directory that was made for a run that never began is removed again.
        Of processes that run together the first one holds it, and writes to it. Raises UserError in all of them where
        it cannot be written, another run is in it, or it holds work of another experiment.
        """
        wanted = json.loads(json.dumps(experiment.to_json()))
        require_same("the experiment's fields", json.dumps(wanted).encode)
        with contextlib.ExitStack() as held:
            first_says(lambda: cls._claim(path, wanted, held))
            yield cls(path, wanted, datetime.fromisoformat(first_says(lambda: began_at(path).isoformat())))

    @staticmethod
    def _claim(path: Path, wanted: Any, held: contextlib.ExitStack) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
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

    def begin(self) -> None:
        """Write down whose directory this is, and where it runs: from here on there is work to keep."""
        self.run_id = first_says(self._begin)

    def _begin(self) -> str:
        write_atomically(self.path / "config.json", json.dumps(self._config, indent=2) + "\n")
        write_atomically(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        keep_began(self.path, self.began)
        return claim_id(self.path)

    def evaluation(self, name: str) -> list[EvaluationRow] | None:
        """The rows of a model that has been evaluated, else None."""
        raw = self._read("evaluations", name)
        return None if raw is None else [from_json(EvaluationRow, row, f"evaluations/{name}.json") for row in raw]

    def keep_evaluation(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        self._write("evaluations", name, rows)

    def teacher_responses(self) -> list[Rollout] | None:
        """The teacher's responses to the held-out prompts, on which students are scored, if it has given them."""
        raw = self._read("evaluations", _RESPONSES)
        return None if raw is None else rollouts_from_json(raw)

    def keep_teacher_responses(self, responses: Sequence[Rollout]) -> None:
        self._write("evaluations", _RESPONSES, rollouts_to_json(responses))

    def cost(self, name: str) -> StageCost | None:
        """The cost of a stage that has finished, else None."""
        raw = self._read("stages", name)
        return None if raw is None else from_json(StageCost, raw, f"stages/{name}.json")

    def keep_cost(self, name: str, cost: Mapping[str, Any]) -> None:
        self._write("stages", name, cost)

    def check_base(self, fingerprint: str) -> None:
        """Keep who the frozen base of a student with adapters is, whose checkpoints hold the adapters only.

        Raises UserError where it was another one when the run began.
        """
        known = self._read("student", "base")
        if known is None or not first_says(lambda: _holds_work(self.path)):
            self._write("student", "base", fingerprint)
        elif known != fingerprint:
            raise UserError(
                f"{self.path} holds adapters of other weights than student.path now does; put those back, or give "
                "this run another --name"
            )

    def _read(self, kind: str, name: str) -> Any:
        file = self.path / kind / f"{name}.json"
        return first_says(lambda: json.loads(file.read_text()) if file.exists() else None)

    def _write(self, kind: str, name: str, value: Any) -> None:
        if not is_first():
            return
        require_id(self.path, self.run_id)
        (self.path / kind).mkdir(exist_ok=True)
        write_atomically(self.path / kind / f"{name}.json", json.dumps(value, indent=2) + "\n")


def _check_config(file: Path, wanted: Any) -> None:
    if not file.exists() or not _holds_work(file.parent):
        return
    differences = differing_fields(json.loads(file.read_text()), wanted)
    if differences:
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
        more = f" and {len(differences) - _SHOWN_DIFFERENCES} more" if len(differences) > _SHOWN_DIFFERENCES else ""
        raise UserError(
            f"{file.parent} holds a run of another configuration ({shown}{more}); "
            "give this one another --name, or delete that directory"
        )


def _holds_work(path: Path) -> bool:
    return any((path / kind).exists() for kind in _WORK)


def _remove_if_never_begun(path: Path) -> None:
    """Called while the lock is held, so that no other run can be in it."""
    if {file.name for file in path.iterdir()} == {".lock"}:
        (path / ".lock").unlink()
        path.rmdir()
