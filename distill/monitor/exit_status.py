"""How every command ends: what the user can mend is said in one line, and programs are told by the exit status."""

import sys
from collections.abc import Callable

import jax

from distill.monitor.terminal import give_up_output
from qwen3.errors import UserError

ENDED_BY_CTRL_C = 130
"""The exit status of a process that Ctrl-C has ended, as shells have it."""
_SHOWN_CHARACTERS = 160


def reported(work: Callable[[], int], where: Callable[[], str] = lambda: "") -> int:
    """The status of `work`; 2 for what the user can mend, which is said in one line with `where()` it happened."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        # `… --help | head`: whoever read has enough.
        give_up_output()
        return 0
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        return ENDED_BY_CTRL_C
    except OSError as error:
        if error.filename is None and error.strerror is None:
            raise
        message = f"{error.filename or 'disk'}: {error.strerror}"
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        said = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in said:
            raise
        message = (
            f"out of memory ({said[:_SHOWN_CHARACTERS] or 'of this host'}); lower rows, row_length, batch_size or the "
            "model's sizes, or see what fits with python -m distill.plan"
        )
    print(f"error{where()}: {message}", file=sys.stderr)
    return 2
