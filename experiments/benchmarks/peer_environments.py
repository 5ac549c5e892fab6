"""The peers' own virtual environments, pinned: what is compared must not move by itself."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qwen3.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """One folder of packages, installed in batches: the first must not let the later ones choose its version."""

    name: str
    batches: tuple[tuple[str, ...], ...]

    @property
    def packages(self) -> tuple[str, ...]:
        return tuple(package for batch in self.batches for package in batch)


TRL = Environment(
    name="trl",
    batches=(("torch==2.13.0",), ("transformers==5.23.0", "trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0")),
)
TRANSFORMERS = Environment(name="transformers", batches=(("torch==2.13.0",), ("transformers[serving]==5.23.0",)))
TUNIX = Environment(name="tunix", batches=(("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8"),))


def prepare(environment: Environment, folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of an environment below `folder`, which is made where it is not there with just these packages.

    Raises UserError where a package cannot be installed.
    """
    home = folder / environment.name
    python = home / "bin" / "python"
    # Written last, so that what a kill left behind is installed over.
    installed = home / "installed.txt"
    wanted = "\n".join(environment.packages)
    if installed.exists() and installed.read_text() == wanted:
        return python
    say(f"installing {', '.join(environment.packages)} into {home} (once, some minutes)")
    _run([sys.executable, "-m", "venv", "--clear", str(home)], f"no virtual environment can be made in {home}")
    for batch in environment.batches:
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *batch]
        _run(command, f"{' '.join(batch)} cannot be installed into {home}")
    installed.write_text(wanted)
    return python


def _run(command: list[str], trouble: str) -> None:
    # pip would read the calling environment's packages from PYTHONPATH.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UserError(f"{trouble}: {said[-1].strip() if said else f'exit status {done.returncode}'}")
