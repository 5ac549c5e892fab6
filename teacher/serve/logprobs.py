"""Log-probabilities as vLLM 0.33 and OpenAI write them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from teacher.serve.answering import Token
from teacher.wire import Answer

_LEAST_LOGPROB = -9999.0
"""What stands for a logarithm of 0 in JSON, which has no infinities; OpenAI's own."""
Spell = Callable[[int], str]
"""The text of a token on its own."""


def finite(logprob: float) -> float:
    """A logarithm as JSON holds it."""
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def prompt_logprobs(
    ids: Sequence[int], top: Answer, k: int, spell: Spell | None
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's list: None for the first token, then by id the k likeliest and the one that stands there."""
    found: list[dict[str, dict[str, Any]] | None] = [None]

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": None if spell is None else spell(token)}

    for token, own, own_rank, likeliest in _following(ids, top, k):
        entries = {str(one): entry(one, logprob, rank) for rank, (one, logprob) in enumerate(likeliest, start=1)}
        found.append({str(token): entry(token, own, own_rank)} | entries)
    return found


def prompt_tokens(ids: Sequence[int], top: Answer, k: int) -> list[Token]:
    """The prompt's tokens but for the first, about which nothing is said, as if they had been generated."""
    return [Token(token, own, likeliest) for token, own, _, likeliest in _following(ids, top, k)]


def _following(ids: Sequence[int], top: Answer, k: int) -> list[tuple[int, float, int, list[tuple[int, float]]]]:
    """Every token but the first, its log-probability and rank, and the k likeliest in its place."""
    likeliest = zip(top["ids"][:, :k].tolist(), top["logprobs"][:, :k].tolist(), strict=True)
    rows = zip(ids[1:], top["following_logprobs"].tolist(), top["following_ranks"].tolist(), likeliest, strict=False)
    return [(token, own, rank, list(zip(*best, strict=True))) for token, own, rank, best in rows]


def completion_logprobs(
    prompt: Sequence[int], tokens: Sequence[Token], spell: Spell, *, offset: int, k: int
) -> dict[str, Any]:
    """OpenAI's lists for completions. `prompt` is at most one token, the first, of which no more is known.

    `offset` is where the first of them stands in the text. By the token's own text, as OpenAI and vLLM have it, the
    dictionaries hold the k likeliest and the token itself."""
    texts = [spell(one) for one in (*prompt, *(token.id for token in tokens))]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    nothing = [None] * len(prompt)
    named: list[dict[str, float] | None] = [
        {spell(token.id): finite(token.logprob)} | {spell(one): finite(logprob) for one, logprob in token.top}
        for token in tokens
    ]
    return {
        "text_offset": offsets,
        "tokens": texts,
        "token_logprobs": [*nothing, *(finite(token.logprob) for token in tokens)],
        "top_logprobs": [*nothing, *named] if k else None,
    }


def chat_logprobs(tokens: Sequence[Token], spell: Spell) -> dict[str, Any]:
    """OpenAI's list for chats. A token that is no text on its own has no bytes."""

    def entry(one: int, logprob: float) -> dict[str, Any]:
        text = spell(one)
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode()) if whole else None}

    content = [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(one, logprob) for one, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content}


def token_speller(decode: Callable[[list[int]], str], *, by_id: bool) -> Spell:
    """Texts of single tokens, or token_id:ID for clients that want them told apart."""
    return (lambda one: f"token_id:{one}") if by_id else (lambda one: decode([one]))
