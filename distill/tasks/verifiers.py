"""Exact verdicts on an answer: no partial credit and no answer that merely occurs somewhere in the text."""

import re

_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")


def equal_integers(answer_text: str, reference: str) -> bool:
    """Whether the text, white space around it aside, is one integer with the reference's value."""
    answer = answer_text.strip()
    return _INTEGER.fullmatch(answer) is not None and int(answer) == int(reference)


def equal_texts(answer_text: str, reference: str) -> bool:
    """Whether both are the same words in the same order; any run of white space counts as one space."""
    return answer_text.split() == reference.split()
