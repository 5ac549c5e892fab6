import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3.errors import UserError
from qwen3.rollout import MODES, Rollout
from teacher.scored_rollout import ScoredRollout, decode, empty_targets, encode
from teacher.store import TargetStore, TargetStoreWriter
from teacher.store.__main__ import main

IDENTITY = {"teacher": "a1b2", "entries": 4, "tokenizer": "c3", "sampling": {"temperature": 1.0}}


def scored(seed: int, length: int | None = None, entries: int = 4) -> ScoredRollout:
    random = np.random.default_rng(seed)
    length = int(random.integers(2, 40)) if length is None else length
    loss_mask = random.random(length) < 0.6
    loss_mask[-1] = False
    logprobs = np.sort(random.normal(size=(length, entries)), axis=-1)[:, ::-1] - 7
    logprobs = logprobs.astype(np.float16).astype(np.float32)  # as they are stored
    return ScoredRollout(
        rollout=Rollout(
            tokens=random.integers(0, 1000, length).astype(np.int32),
            prompt_length=int(random.integers(0, length)),
            loss_mask=loss_mask,
            sampler_logprobs=np.where(loss_mask, random.normal(size=length), 0).astype(np.float32),
            mode=MODES[seed % 2],
            prompt_id=f"prompt/{seed} „ü“",
            sample_index=seed % 3,
            policy_step=seed,
            finished=bool(seed % 2),
        ),
        ids=random.integers(0, 1000, (length, entries)).astype(np.int32),
        logprobs=logprobs,
        log_tail=np.log1p(-np.exp(logprobs).sum(-1)),
    )


def drawn(seed: int) -> ScoredRollout:
    """As `scored`, but of words drawn from the teacher."""
    record = scored(seed)
    entropy = np.random.default_rng(seed).random(len(record.log_tail), np.float32)
    return dataclasses.replace(record, log_tail=np.full_like(record.log_tail, -np.inf), entropy=entropy)


def write_store(directory: Path, shards: int = 3, records: int = 5) -> list[ScoredRollout]:
    writer = TargetStoreWriter(directory, IDENTITY)
    everything = []
    for shard in range(shards):
        shard_records = [scored(shard * records + i) for i in range(records)]
        writer.write_shard(shard, shard_records)
        everything += shard_records
    writer.finish()
    return everything


def assert_same(read: ScoredRollout, written: ScoredRollout) -> None:
    for field in ("prompt_length", "mode", "prompt_id", "sample_index", "policy_step", "finished"):
        assert getattr(read.rollout, field) == getattr(written.rollout, field)
        assert type(getattr(read.rollout, field)) is type(getattr(written.rollout, field))
    kept = written.rollout.loss_mask
    pairs = [
        (getattr(read.rollout, n), getattr(written.rollout, n)) for n in ("tokens", "loss_mask", "sampler_logprobs")
    ]
    pairs += [(getattr(read, n)[kept], getattr(written, n)[kept]) for n in ("ids", "logprobs", "log_tail")]
    for left, right in pairs:
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype


def test_drawn_words_keep_the_teachers_entropy() -> None:
    written = drawn(7)
    read = decode(encode(written))
    assert_same(read, written)
    kept = written.rollout.loss_mask
    assert read.entropy is not None
    assert written.entropy is not None
    np.testing.assert_array_equal(read.entropy[kept], written.entropy[kept])
    assert np.all(np.isfinite(read.log_tail[~kept]))
    assert decode(encode(scored(7))).entropy is None
    with pytest.raises(ValueError, match=r"entropy \(1,\) must be \[T\]"):
        dataclasses.replace(written, entropy=np.zeros(1, np.float32))


def test_round_trip_is_exact_at_every_position_with_a_target(tmp_path: Path) -> None:
    written = write_store(tmp_path / "targets")
    store = TargetStore.open(tmp_path / "targets", IDENTITY, verify_digests=True)
    assert len(store) == len(written)
    for index in np.random.default_rng(0).permutation(len(written)):
        assert_same(store[index], written[index])
    assert store.entries == 4
    assert store.tokens == sum(len(record.rollout.tokens) for record in written)
    assert store.targets == sum(record.rollout.loss_mask.sum() for record in written)
    assert store.longest_tokens == max(len(record.rollout.tokens) for record in written)
    with pytest.raises(IndexError):
        store[len(written)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 60), entries=st.integers(1, 9))
def test_record_bytes_round_trip(seed: int, length: int, entries: int) -> None:
    record = scored(seed, length, entries)
    assert_same(decode(encode(record)), record)


def test_transposed_memory_is_written_as_its_values() -> None:
    record = scored(1, 10)
    turned = ScoredRollout(
        rollout=record.rollout, ids=np.asfortranarray(record.ids), logprobs=record.logprobs, log_tail=record.log_tail
    )
    assert_same(decode(encode(turned)), record)


def test_positions_without_target_hold_a_distribution_and_cost_no_bytes() -> None:
    record = scored(0, length=30, entries=6)
    read = decode(encode(record))
    unscored = ~record.rollout.loss_mask
    mass = np.exp(read.logprobs[unscored]).sum(-1) + np.exp(read.log_tail[unscored])
    np.testing.assert_allclose(mass, 1, rtol=1e-6)  # float32 rounding of 7 terms
    assert (read.ids[unscored] == empty_targets(6).ids).all()
    masked = ScoredRollout(
        rollout=Rollout(**{**vars(record.rollout), "loss_mask": np.zeros(30, bool)}),
        ids=record.ids,
        logprobs=record.logprobs,
        log_tail=record.log_tail,
    )
    saved_bytes = len(encode(record)) - len(encode(masked))
    # safetensors pads its header to 8 bytes, and shorter shapes make it a little shorter.
    assert abs(saved_bytes - record.rollout.loss_mask.sum() * (6 * 5 + 4)) <= 32


def test_rounding_to_16_bits_moves_a_divergence_by_less_than_a_millinat() -> None:
    """24 entries with a heavy tail, as a teacher with 151,936 tokens gives them."""
    random = np.random.default_rng(0)
    entries, length = 24, 200
    logits = -np.log1p(np.arange(4000)) + random.gumbel(size=(length, 4000))
    logprobs = -np.sort(-(logits - np.log(np.exp(logits).sum(-1, keepdims=True))), axis=-1)
    tail = np.log(np.exp(logprobs[:, entries:]).sum(-1))
    rollout = dataclasses.replace(scored(0, length).rollout, loss_mask=np.arange(length) < length - 1)
    record = ScoredRollout(
        rollout=rollout,
        ids=random.integers(0, 151_936, (length, entries)).astype(np.int32),
        logprobs=logprobs[:, :entries].astype(np.float32),
        log_tail=tail.astype(np.float32),
    )
    read = decode(encode(record))
    kept = rollout.loss_mask
    np.testing.assert_array_equal(read.ids[kept], record.ids[kept])
    np.testing.assert_array_equal(read.log_tail[kept], record.log_tail[kept])
    # Half a unit in the last of 11 places, and what makes up for it in their sum: of their mean size.
    np.testing.assert_allclose(read.logprobs[kept], record.logprobs[kept], rtol=2**-11, atol=2**-11)
    exact = np.concatenate((logprobs[:, :entries], tail[:, None]), axis=1)[kept]
    rounded = np.concatenate((read.logprobs, read.log_tail[:, None]), axis=1)[kept].astype(np.float64)
    np.testing.assert_allclose(np.exp(rounded).sum(-1), 1, atol=2e-6)  # second order in a thousandth
    # Nearly what the teacher says, and something else.
    for distance in (1e-3, 1):
        student = exact + distance * random.normal(size=exact.shape)
        student -= np.log(np.exp(student).sum(-1, keepdims=True))
        divergences = [(np.exp(own) * (own - student)).sum(-1) for own in (exact, rounded)]
        assert divergences[1].min() > -2e-6, "none is negative"
        assert abs(divergences[1].mean() - divergences[0].mean()) < 1e-3


def test_stores_of_one_teacher_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = {"teacher": "a1", "tokenizer": "c3", "top_k": 4, "sampled_tokens": None}

    def store(name: str, first: int, **other: object) -> str:
        writer = TargetStoreWriter(tmp_path / name, identity | {"seed": first} | other)
        for shard in range(2):
            writer.write_shard(shard, [scored(first + shard)])
        writer.finish()
        return str(tmp_path / name)

    one, two = store("one", 0), store("two", 10)
    together = str(tmp_path / "together")
    for _ in range(2):  # again: nothing is left to do
        assert main(["merge", one, two, "--to", together]) == 0
    assert "records" in capsys.readouterr().out
    merged = TargetStore.open(together, verify_digests=True)
    for index, seed in enumerate((0, 1, 10, 11)):
        assert_same(merged[index], scored(seed))
    assert merged.identity["teacher"] == "a1"
    assert [one["seed"] for one in merged.identity["merged"]] == [0, 10]
    for name, other, complaint in (
        ("teacher", "b2", 'differ in teacher: "a1" and "b2"; merge only'),
        ("tokenizer", "d4", 'differ in tokenizer: "c3" and "d4"; merge only'),
    ):
        assert main(["merge", one, store(f"other-{name}", 20, **{name: other}), "--to", str(tmp_path / "no")]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["merge", one, one, "--to", str(tmp_path / "no")]) == 2
    assert "hold the same prompts by the same seed" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main(["merge", together, two, "--to", str(tmp_path / "no")]) == 2
    assert "together and " in (said := capsys.readouterr().err)
    assert "hold the same prompts by the same seed" in said
    assert main(["merge", together, store("three", 30), "--to", str(tmp_path / "more")]) == 0
    more = TargetStore.open(tmp_path / "more")
    assert [one["seed"] for one in more.identity["merged"]] == [0, 10, 30]
    assert main(["merge", one, "--to", together]) == 2
    assert main(["show", one, two]) == 2


def test_a_new_writer_continues_after_the_completed_shards(tmp_path: Path) -> None:
    TargetStoreWriter(tmp_path, IDENTITY).write_shard(0, [scored(0)])
    (tmp_path / ".targets-00001.arrayrecord.unfinished").write_bytes(b"half a shard")
    with pytest.raises(UserError, match="unfinished"):
        TargetStore.open(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": 1}))
    writer = TargetStoreWriter(tmp_path, IDENTITY)
    assert writer.completed_shards() == {0}
    assert not writer.finished
    with pytest.raises(ValueError, match="already written"):
        writer.write_shard(0, [scored(0)])
    writer.write_shard(2, [scored(2)])
    with pytest.raises(ValueError, match=r"lacks shards \[1\]"):
        writer.finish()
    writer.write_shard(1, [scored(1)])
    writer.finish()
    assert TargetStoreWriter(tmp_path, IDENTITY).finished
    assert json.loads((tmp_path / "index.json").read_text())["format"] == 2, "later shards are"
    store = TargetStore.open(tmp_path)
    for index in range(3):
        assert_same(store[index], scored(index))


def test_killed_writer_loses_only_the_shard_it_was_writing(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        sys.path[:0] = sys.argv[2:]
        from test_store import IDENTITY, scored
        from teacher.store import TargetStoreWriter
        writer = TargetStoreWriter(sys.argv[1], IDENTITY)
        for shard in range(100000):
            writer.write_shard(shard, [scored(shard)] * 20)
            print(shard, flush=True)
        """
    )
    here = Path(__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(here.parent), str(here.parents[2])],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 4:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    writer = TargetStoreWriter(tmp_path, IDENTITY)
    done = len(writer.completed_shards())
    assert writer.completed_shards() == set(range(done))
    assert done >= 5
    writer.write_shard(done, [scored(done)] * 20)
    writer.finish()
    store = TargetStore.open(tmp_path, verify_digests=True)
    assert len(store) == 20 * (done + 1)
    assert_same(store[20 * done], scored(done))


def test_another_identity_is_refused_with_the_fields(tmp_path: Path) -> None:
    write_store(tmp_path)
    other = {**IDENTITY, "teacher": "ffff", "sampling": {"temperature": 0.5}}
    with pytest.raises(UserError, match=r"sampling: .*teacher: stored 'a1b2', wanted 'ffff'"):
        TargetStore.open(tmp_path, other)
    with pytest.raises(UserError, match="teacher"):
        TargetStoreWriter(tmp_path, other)


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json is missing"):
        TargetStore.open(tmp_path / "nothing")
    write_store(tmp_path)
    shard = tmp_path / "targets-00001.arrayrecord"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"targets-00001.*bytes, the index says"):
        TargetStore.open(tmp_path)

    flipped = bytearray(whole)
    flipped[whole.index(b"\x28\xb5\x2f\xfd") + 40] ^= 1  # inside the first zstd frame: record 0 of the shard
    shard.write_bytes(flipped)
    with pytest.raises(UserError, match=r"targets-00001.*SHA-256"):
        TargetStore.open(tmp_path, verify_digests=True)
    store = TargetStore.open(tmp_path)
    with pytest.raises(UserError, match=r"targets-00001.*damaged at record"):
        list(map(store.__getitem__, range(len(store))))

    shard.unlink()
    with pytest.raises(UserError, match=r"targets-00001.*missing"):
        TargetStore.open(tmp_path)

    index = json.loads((tmp_path / "index.json").read_text())
    del index["shards"]["2"]["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks sha256"):
        TargetStore.open(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        TargetStore.open(tmp_path)
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 2"):
        TargetStore.open(tmp_path)


@pytest.mark.parametrize("field", ["logprobs", "log_tail", "entropy"])
def test_nan_is_refused_before_it_is_stored_and_where_a_store_holds_it(tmp_path: Path, field: str) -> None:
    record = drawn(0)
    kept = int(np.flatnonzero(record.rollout.loss_mask)[-1])
    getattr(record, field)[kept] = np.nan
    with pytest.raises(UserError, match="the teacher's log-probabilities are NaN; check its weights"):
        dataclasses.replace(record)
    writer = TargetStoreWriter(tmp_path, {})
    writer.write_shard(0, [drawn(1), record])
    writer.finish()
    store = TargetStore.open(tmp_path)
    assert store[0].rollout.prompt_id == drawn(1).rollout.prompt_id
    with pytest.raises(UserError, match=r"targets-00000\.arrayrecord is damaged at record 1: .* are NaN"):
        store[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"shards": {}},
        {"shards": []},
        {"shards": {"0": [1]}},
        {"shards": {"first": "SHARD"}},
        {"shards": {"1": "SHARD"}},
        {"entries": None},
        {"entries": "four"},
        {"finished": "yes"},
        {"identity": []},
        {"shards": {"0": {"records": "many"}}},
        {"shards": {"0": {"records": True}}},
        {"shards": {"0": {"records": -5}}},
    ],
)
def test_an_index_of_another_shape_is_named(tmp_path: Path, wrong: dict[str, object]) -> None:
    write_store(tmp_path, shards=1)
    index = json.loads((tmp_path / "index.json").read_text())
    whole = index["shards"]["0"]
    shards = wrong.get("shards", index["shards"])
    if isinstance(shards, dict):
        filled = {
            number: whole if shard == "SHARD" else whole | shard if isinstance(shard, dict) else shard
            for number, shard in shards.items()
        }
        wrong = wrong | {"shards": filled}
    (tmp_path / "index.json").write_text(json.dumps(index | wrong))
    with pytest.raises(UserError, match=r"index\.json is damaged: .*; restore it or delete") as refused:
        TargetStore.open(tmp_path)
    assert "\n" not in str(refused.value)


def test_an_index_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"index\.json cannot be read: .*; restore it or delete"):
        TargetStore.open(tmp_path)


def test_unusable_places_and_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        TargetStoreWriter(tmp_path / "file" / "targets", IDENTITY)
    writer = TargetStoreWriter(tmp_path / "targets", IDENTITY)
    writer.write_shard(0, [scored(0, entries=4)])
    with pytest.raises(ValueError, match="J = 5"):
        writer.write_shard(1, [scored(1, entries=5)])
    with pytest.raises(ValueError, match="no records"):
        writer.write_shard(1, [])
    (tmp_path / "targets" / ".targets-00001.arrayrecord.unfinished").mkdir()
    with pytest.raises(UserError, match="shard 1 of target store"):
        writer.write_shard(1, [scored(1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # below any shard: array_record pads to 64 KB
    try:
        with pytest.raises(UserError, match=r"shard 2 of target store .* cannot be written"):
            writer.write_shard(2, [scored(1)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write_shard(2, [scored(1)])
    assert writer.completed_shards() == {0, 2}
    record = scored(0, length=5)
    with pytest.raises(ValueError, match="ids"):
        ScoredRollout(rollout=record.rollout, ids=record.ids[:4], logprobs=record.logprobs, log_tail=record.log_tail)
    with pytest.raises(ValueError, match="log_tail"):
        ScoredRollout(rollout=record.rollout, ids=record.ids, logprobs=record.logprobs, log_tail=record.log_tail[:4])


def test_the_command_shows_whose_targets_they_are_and_a_record(tmp_path: Path, capsys) -> None:
    written = write_store(tmp_path / "store")
    assert main(["show", str(tmp_path / "store"), "--record", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    record = written[7]
    first = int(np.flatnonzero(record.rollout.loss_mask)[0])
    assert found["teacher"] == IDENTITY["teacher"]
    assert (found["records"], found["prompt_id"]) == (15, record.rollout.prompt_id)
    assert (found["first_position"], found["next_token"]) == (first, int(record.rollout.tokens[first + 1]))
    assert found["ids"] == record.ids[first].tolist()
    assert found["logprobs"] == pytest.approx(record.logprobs[first].tolist())
    assert main(["show", str(tmp_path / "store")]) == 0
    assert "prompt id" in capsys.readouterr().out


def test_the_command_counts_what_a_store_keeps(tmp_path: Path, capsys) -> None:
    written = write_store(tmp_path / "store")
    assert main(["stats", str(tmp_path / "store"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = [record.rollout.loss_mask for record in written]
    targets = sum(int(mask.sum()) for mask in kept)
    assert (found["targets"], found["entries_per_token"]) == (targets, 4)
    tails = np.concatenate([record.log_tail[mask] for record, mask in zip(written, kept, strict=True)])
    assert found["mean_tail_mass"] == pytest.approx(np.exp(tails).mean(), rel=1e-5)
    assert found["bytes_per_target"] == pytest.approx(found["size_bytes"] / targets)
    assert sum(found["records_by_mode"].values()) == 15
    assert found["mean_response_tokens"] == pytest.approx(np.mean([len(one.rollout.response) for one in written]))


def test_the_command_says_in_one_line_what_is_damaged(tmp_path: Path, capsys) -> None:
    write_store(tmp_path / "store")
    assert main(["verify", str(tmp_path / "store")]) == 0
    assert "whole" in capsys.readouterr().out
    shard = tmp_path / "store" / "targets-00001.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for arguments, said in (
        (["verify", str(tmp_path / "store")], "targets-00001.arrayrecord does not match its SHA-256"),
        (["show", str(tmp_path / "store"), "--record", "15"], "--record is 15, but"),
        (["show", str(tmp_path / "nothing")], "is not a target store"),
        (["delete", str(tmp_path / "store")], "invalid choice: 'delete'"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error, error
        assert error.count("\n") == 1
