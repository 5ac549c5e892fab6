"""What a benchmark's result depends on besides the code: the machine, the versions and the commit."""

import os
from typing import Any

from distill.environment import environment


def machine() -> dict[str, Any]:
    """The fields that every result carries."""
    where = environment()
    fields = ("processor", "cpu_cores", "devices", "python", "packages", "commit")
    return {name: where[name] for name in fields} | {"load_1min": round(os.getloadavg()[0], 2)}
