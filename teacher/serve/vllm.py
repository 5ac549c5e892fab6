"""vLLM's token endpoint, `POST /inference/v1/generate`, as prime-rl and others ask it: ids in, ids out.

Fields and their places are those of vLLM 0.33. What a server gives beside them: `prompt_token_id_log_tail`, the
logarithm of the mass of all tokens that `prompt_logprob_token_ids` did not name, and `teacher`, who has answered.
"""

import base64
import hashlib
import io
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen3.generation.engine import Request
from qwen3.rollout import NON_THINKING, Rollout
from teacher.limits import Limits
from teacher.serve.schemas import VllmGenerate, VllmSampling, check_ids, check_prompt, sampling_params
from teacher.wire import Answer, Refused, TargetsRequest

_LEAST_LOGPROB = -9999.0
"""What stands for a logarithm of 0 in JSON, which has no infinities; OpenAI's own."""


def check(asked: VllmGenerate, limits: Limits, vocab_size: int) -> None:
    """Refuses, naming the field, what is not served."""
    sampling, ids = asked.sampling_params, asked.token_ids
    if not ids:
        raise Refused("token_ids", "is empty; a prompt has at least one token")
    check_ids("token_ids", ids, vocab_size)
    if sampling.max_tokens and not _is_one_scored_token(sampling):
        check_prompt("token_ids", ids, limits, vocab_size)
    asks_scores = _asks_scores(sampling)
    longest = len(ids) + (sampling.max_tokens if sampling.logprobs else 0)
    if (asks_scores or sampling.logprobs) and longest > limits.max_sequence_tokens:
        raise Refused(
            "token_ids",
            f"and what follows may have {longest} tokens; this server scores at most {limits.max_sequence_tokens} "
            "(max_sequence_tokens)",
            413,
        )
    if asks_scores and sampling.temperature != 1:
        raise Refused(
            "sampling_params.temperature",
            f"is {sampling.temperature}, but log-probabilities of a prompt are the teacher's own, at temperature 1; "
            "ask with 1 and divide what you compare them with by no other",
        )
    most = min(limits.max_top_k, vocab_size)
    for field in ("prompt_logprobs", "logprobs"):
        if (getattr(sampling, field) or 0) > most:
            raise Refused(
                f"sampling_params.{field}",
                f"is {getattr(sampling, field)}; this server gives at most {most} (max_top_k)",
                413,
            )
    if sampling.prompt_logprob_token_ids is not None:
        _check_named(sampling, len(ids), limits, vocab_size)


def _check_named(sampling: VllmSampling, length: int, limits: Limits, vocab_size: int) -> None:
    field, named = "sampling_params.prompt_logprob_token_ids", sampling.prompt_logprob_token_ids
    assert named is not None
    start = sampling.prompt_logprob_start
    if not start < length - 1:
        raise Refused(
            "sampling_params.prompt_logprob_start",
            f"is {start}, but of {length} tokens none follows position {length - 1}; it must be below that",
        )
    if len(named) != length - 1 - start:
        raise Refused(field, f"has {len(named)} rows; {length} tokens from {start} on take {length - 1 - start}")
    if not any(named):
        raise Refused(field, "names no token; leave it out")
    for row in named:
        if len(row) > limits.max_ids:
            raise Refused(
                field, f"has {len(row)} ids in a row; this server takes at most {limits.max_ids} (max_ids)", 413
            )
        check_ids(field, row, vocab_size, least=-1)


def _asks_scores(sampling: VllmSampling) -> bool:
    return sampling.prompt_logprobs is not None or sampling.prompt_logprob_token_ids is not None


def _is_one_scored_token(sampling: VllmSampling) -> bool:
    """Whether the request is to score its prompt, and has one token generated since vLLM knows no fewer: such prompts
    may be longer than those that are generated from."""
    whole = sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k < 1 and sampling.min_p == 0
    one = sampling.max_tokens == 1 and sampling.n == 1 and sampling.logprobs is None
    return _asks_scores(sampling) and one and whole


def one_token_targets(asked: VllmGenerate) -> TargetsRequest | None:
    """What gives the one token of a request that is to score its prompt; None for other requests."""
    if not _is_one_scored_token(asked.sampling_params):
        return None
    ids = np.asarray(asked.token_ids, np.int32)
    seed = int(prompt_name(asked.token_ids, asked.sampling_params.seed)[:8], 16)
    return TargetsRequest(targets="sampled", sequences=[ids], starts=[len(ids) - 1], entries=1, seeds=[seed])


def one_token_rollout(asked: VllmGenerate, sampled: Answer, stop_ids: Sequence[int]) -> Rollout:
    """The prompt with the token that `one_token_targets` has sampled."""
    token = int(sampled["ids"][0, 0])
    length = len(asked.token_ids)
    own = asked.sampling_params.stop_token_ids
    ends = () if asked.sampling_params.ignore_eos else stop_ids if own is None else own
    return Rollout(
        tokens=np.asarray([*asked.token_ids, token], np.int32),
        prompt_length=length,
        loss_mask=np.arange(length + 1) == length - 1,
        sampler_logprobs=np.zeros(length + 1, np.float32),
        mode=NON_THINKING,
        prompt_id="",
        sample_index=0,
        policy_step=0,
        finished=token in ends,
    )


def requests(asked: VllmGenerate, limits: Limits, vocab_size: int) -> list[Request]:
    """What the engine is asked for: `n` sequences, whose seed is the request's own."""
    sampling = asked.sampling_params
    if not sampling.max_tokens or _is_one_scored_token(sampling):
        return []
    params = sampling_params(
        "sampling_params",
        {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": max(0, sampling.top_k),
            "min_p": sampling.min_p,
            "stop_ids": () if sampling.ignore_eos else sampling.stop_token_ids,
        },
        limits,
        vocab_size,
    )
    name = prompt_name(asked.token_ids, sampling.seed)
    return [
        Request(prompt_ids=asked.token_ids, prompt_id=name, sample_index=index, mode=NON_THINKING, params=params)
        for index in range(sampling.n)
    ]


def prompt_name(ids: Sequence[int], seed: int | None) -> str:
    """What decides what is sampled: prompt and seed, or chance without one. The engine's own seed is one for all."""
    seed = secrets.randbits(63) if seed is None else seed
    return hashlib.blake2b(repr((seed, list(ids))).encode(), digest_size=16).hexdigest()


def named_targets(asked: VllmGenerate) -> TargetsRequest | None:
    """What `prompt_logprob_token_ids` asks for, if it is there. Short rows are filled up with -1."""
    named, start = asked.sampling_params.prompt_logprob_token_ids, asked.sampling_params.prompt_logprob_start
    if named is None:
        return None
    width = max(map(len, named))
    ids = np.full((len(named), width), -1, np.int32)
    for row, found in zip(ids, named, strict=True):
        row[: len(found)] = found
    # The last token is what its predecessor's row is about; no row is about what follows it.
    tokens = np.asarray(asked.token_ids[:-1], np.int32)
    return TargetsRequest(targets="at_ids", sequences=[tokens], starts=[start], entries=width, ids=[ids])


def top_targets(asked: VllmGenerate, rollouts: Sequence[Rollout], vocab_size: int) -> TargetsRequest | None:
    """The likeliest tokens at the prompt's positions and at those that were generated from, as far as asked for."""
    sampling = asked.sampling_params
    prompt = np.asarray(asked.token_ids, np.int32)
    wanted = max(sampling.prompt_logprobs or 0, sampling.logprobs or 0)
    if sampling.prompt_logprobs is None and not sampling.logprobs:
        return None
    start = 0 if sampling.prompt_logprobs is not None else len(prompt) - 1
    # With logprobs every sequence is looked at whole, else the prompt alone.
    sequences = [rollout.tokens for rollout in rollouts] if sampling.logprobs and rollouts else [prompt]
    k = min(max(1, wanted), vocab_size)
    return TargetsRequest(targets="top_k", sequences=sequences, starts=[start] * len(sequences), entries=k)


def response(
    asked: VllmGenerate,
    rollouts: Sequence[Rollout],
    top: tuple[TargetsRequest, Answer] | None,
    named: Answer | None,
    *,
    request_id: str,
    teacher: str,
) -> dict[str, Any]:
    """The answer as JSON data; `top` and `named` are what `top_targets` and `named_targets` have asked for."""
    sampling = asked.sampling_params
    prompt_tokens = len(asked.token_ids)
    firsts = [0] if top is None else [0, *np.cumsum(top[0].rows)[:-1].tolist()]
    choices = []
    for index, rollout in enumerate(rollouts):
        choice: dict[str, Any] = {
            "index": index,
            "token_ids": rollout.response.tolist(),
            "finish_reason": "stop" if rollout.finished else "length",
            "logprobs": None,
        }
        if sampling.logprobs is not None:
            answer = None
            if top is not None and sampling.logprobs:
                shift = firsts[index] + prompt_tokens - 1 - top[0].starts[index]
                answer = {name: array[shift:] for name, array in top[1].items()}
            choice["logprobs"] = {"content": _content(rollout, answer, sampling.logprobs)}
        choices.append(choice)
    found: dict[str, Any] = {"request_id": request_id, "choices": choices, "prompt_logprobs": None, "teacher": teacher}
    if sampling.prompt_logprobs is not None and top is not None:
        found["prompt_logprobs"] = prompt_logprobs(asked.token_ids, top[1], sampling.prompt_logprobs)
    if named is not None:
        found["prompt_token_id_logprobs"] = npy(_in_their_places(asked, named))
        found["prompt_token_id_log_tail"] = npy(named["log_tail"])
    return found


def prompt_logprobs(ids: Sequence[int], top: Answer, k: int) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's list: None for the first token, then by id the k likeliest and the one that stands there."""
    found: list[dict[str, dict[str, Any]] | None] = [None]
    for position, token in enumerate(ids[1:]):
        entries = {
            str(one): _entry(float(logprob), rank)
            for rank, (one, logprob) in enumerate(
                zip(top["ids"][position, :k].tolist(), top["logprobs"][position, :k].tolist(), strict=True), start=1
            )
        }
        own = _entry(float(top["following_logprobs"][position]), int(top["following_ranks"][position]))
        found.append({str(token): own} | entries)
    return found


def _entry(logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": finite(logprob), "rank": rank, "decoded_token": None}


def _content(rollout: Rollout, top: Answer | None, k: int) -> list[dict[str, Any]]:
    begin = rollout.prompt_length - 1
    content = []
    for offset, token in enumerate(rollout.response.tolist()):
        likeliest = (
            []
            if top is None
            else zip(top["ids"][offset, :k].tolist(), top["logprobs"][offset, :k].tolist(), strict=True)
        )
        content.append(
            {
                "token_id": token,
                "logprob": finite(float(rollout.sampler_logprobs[begin + offset])),
                "top_logprobs": [{"token_id": one, "logprob": finite(logprob)} for one, logprob in likeliest],
            }
        )
    return content


def finite(logprob: float) -> float:
    """A logarithm as JSON holds it."""
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def _in_their_places(asked: VllmGenerate, named: Answer) -> np.ndarray:
    """The log-probabilities, at repetitions of an id too, which the targets have once."""
    rows = asked.sampling_params.prompt_logprob_token_ids
    assert rows is not None
    found = np.array(named["logprobs"], np.float32)
    for row, ids in enumerate(rows):
        first: dict[int, int] = {}
        for column, one in enumerate(ids):
            if one >= 0:
                found[row, column] = found[row, first.setdefault(one, column)]
    return found


def npy(array: np.ndarray) -> str:
    """A float32 array as a base64 .npy file."""
    file = io.BytesIO()
    np.save(file, np.asarray(array, np.float32), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
