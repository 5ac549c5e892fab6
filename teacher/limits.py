"""What one server of a teacher takes: said at its start, told to its clients, and enforced before anything is run."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, Final

from qwen3.errors import UserError
from qwen3.field_types import Count, Natural, Positive, check_fields

TOKEN_VARIABLE: Final = "TEACHER_TOKEN"


def token_of_environment() -> str | None:
    """The secret of servers that others can reach, without white space around it; None where there is none.

    Raises UserError, without the secret, where it cannot go into an HTTP header.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if re.fullmatch(r"[\x20-\x7e]*", token) is None:
        raise UserError(
            f"the environment variable {TOKEN_VARIABLE} holds other characters than visible ASCII; make another secret"
        )
    return token or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes of the compiled programs, and of what may wait for them."""

    max_sequence_tokens: Count = 4_096
    """Longest sequence that is scored."""
    batch_tokens: Count = 8_192
    """Tokens that are scored together at most; at least one sequence of the longest kind."""
    max_top_k: Count = 64
    """Most likely tokens a position that can be asked for."""
    max_ids: Count = 64
    """Ids a position that can be asked for by name."""
    max_sampled_tokens: Count = 64
    """Tokens a position that can be sampled."""
    prefix_cache_tokens: Natural = 16_384
    """Tokens whose keys, values and hidden states are kept for further sequences that begin with them, for each share
    of the rows (that is, for each device, or those along mesh.tensor together); 0 keeps none."""
    max_request_sequences: Count = 256
    """Sequences in one request."""
    max_request_tokens: Count = 16_384
    """Tokens of all sequences in one request; as hidden states they may come back as a hundred megabytes."""
    max_body_bytes: Count = 64 * 2**20
    """Bytes of one request."""
    max_held_bytes: Count = 2**30
    """Bytes of all requests and answers that are held; while there are more, further ones are told to come again."""
    max_queue_requests: Count = 256
    """Requests that wait or are being answered; further ones are told to come again (429)."""
    max_queue_tokens: Count = 2**20
    """Tokens in them."""
    deadline_seconds: Positive = 600.0
    """After which a request is given up (408), whoever still waits for it."""
    generation_batch_size: Count = 16
    """Sequences generated at once."""
    max_prompt_tokens: Count = 2_048
    """Longest prompt to generate from."""
    max_new_tokens: Count = 2_048
    """Most tokens that are generated for one prompt."""

    def __post_init__(self) -> None:
        check_fields(self)
        generated = self.max_prompt_tokens + self.max_new_tokens
        for field, other, least in (
            ("max_request_tokens", "max_sequence_tokens", self.max_sequence_tokens),
            ("max_request_tokens", "max_prompt_tokens + max_new_tokens", generated),
            ("max_queue_tokens", "max_request_tokens", self.max_request_tokens),
            ("max_held_bytes", "max_body_bytes", self.max_body_bytes),
        ):
            if getattr(self, field) < least:
                raise UserError(
                    f"{field} is {getattr(self, field)}, less than {other}, {least}; raise it, or lower the other"
                )

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Limits":
        """What a server says of itself. Raises UserError for another document."""
        names = {field.name for field in dataclasses.fields(cls)}
        if missing := names - raw.keys():
            raise UserError(f"a server's limits lack {', '.join(sorted(missing))}; it is of another version")
        return cls(**{name: raw[name] for name in names})
