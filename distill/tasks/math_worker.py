"""Runs math-verify in a process of its own; started as a script by `verifiers`, never imported.

math-verify stops hopeless expressions with SIGALRM, which only a main thread may use and which cannot interrupt one
huge power. Here the main thread does nothing else, and the parent can end the process.

One JSON line {"reference", "answer"} on standard input gives one line `true` or `false` on standard output.
"""

import json
import logging
import resource
import sys

STEP_TIMEOUT_SECONDS = 3
MEMORY_LIMIT_BYTES = 4 << 30


def main() -> None:
    """Answers until standard input ends, which it also does when the parent dies."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, resource.RLIM_INFINITY))
    # Every stopped expression would print a warning into the progress display.
    logging.disable(logging.WARNING)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reference, answer = request["reference"], request["answer"]
        if "$" not in reference and "\\boxed" not in reference:
            # math-verify reads LaTeX only inside an environment; data sets store it bare.
            reference = f"${reference}$"
        correct = verify(
            parse(reference, parsing_timeout=STEP_TIMEOUT_SECONDS),
            parse(answer, parsing_timeout=STEP_TIMEOUT_SECONDS),
            timeout_seconds=STEP_TIMEOUT_SECONDS,
        )
        print(json.dumps(bool(correct)), flush=True)


if __name__ == "__main__":
    main()
