"""Reinforcement learning: groups of the student's own responses, rewarded as wholes, against each other.

Engine, loop, packing, resuming, generating ahead and evaluation are those of `OnPolicy`; only where the weight of a
token comes from differs. A teacher may stand beside the reward: the exact divergence of `OnPolicy` is then added to the
policy gradient in one loss. Group advantages: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740); clips
and sums: DAPO (2503.14476), GSPO (2507.18071).
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from distill.rewards.advantages import Advantages, advantages, have_signal
from distill.rewards.reward import Failed, Reward, RewardFailed, Rewards, Truncated, check_reward
from distill.stages.ahead import Outcome, Written
from distill.stages.asking import Asked, asked_of, check_ahead, check_asking, fresh_steps
from distill.stages.context import EngineSizes, RunContext
from distill.stages.loop import Spent, Training, train
from distill.stages.own_rollouts import OwnRollouts
from distill.stages.student_top_k import StudentTopK
from distill.tasks import Problem
from distill.tasks.drawing import exact_decimal
from distill.tasks.mixture import TaskMixture
from distill.tasks.requests import ModeMix
from distill.tasks.samples import Verdict
from distill.training.flops import forward_flops
from distill.training.losses import Loss
from distill.training.policy import Policy, PolicyLoss
from distill.training.train_step import Batch
from qwen3.decoder.adapter import adapter_parameters
from qwen3.decoder.model import Qwen3
from qwen3.errors import UserError
from qwen3.field_types import Bounds, Count, Natural, NotNegative, Positive, Problems, Share, check_fields
from qwen3.generation.sampling import SamplingParams
from qwen3.hosts.processes import first_says
from qwen3.rollout import THINKING, Mode, Rollout
from teacher.scoring import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """The student makes those of its own responses likelier that are rewarded better than others to the same prompt."""

    kind: ClassVar[str] = "Grpo"

    prompts_per_step: Problems = 64
    """Training prompts of every update. Those of a file come again, in a new order, when all of them were asked."""
    samples_per_prompt: Count = 8
    """Responses to each prompt: the group in which they are compared."""
    modes: ModeMix = dataclasses.field(default_factory=ModeMix)
    thinking: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(max_new_tokens=30_720))
    """How the student samples in thinking mode; temperature 1 without truncation is the policy itself."""
    non_thinking: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(max_new_tokens=8_192))
    """How the student samples in non-thinking mode."""
    max_prompt_tokens: Count = 2_048
    """Most tokens of a prompt, the chat template's own included; a longer one is refused, not cut."""
    reward: Reward | None = None
    """What a response is worth: a function of problem and decoded response. None: 1 where the task's verifier accepts
    the answer, else 0."""
    reward_timeout_seconds: Annotated[float, Bounds(1e-3, 1e6, "lie in 0.001..1e6")] = 300.0
    """The longest that the verifier, and after it the reward, may take over one response before they have failed. Code
    that never lets go of Python's interpreter, such as a regular expression that backtracks for ever, is not
    interrupted."""
    failed: Failed = "left_out"
    """Responses over which verifier or reward raise or do not come to an end in time; `reward_failures` in the metrics
    counts them. left_out: neither compared with nor learned from. wrong: 0, which a verifier gives wrong answers."""
    most_failed: Share = 0.1
    """Share of a batch's responses that may fail so before the run ends; replaced ones count, too."""
    most_timeouts: Natural = 4
    """Responses of a batch for which the time may run out before the run ends: each takes reward_timeout_seconds, and
    leaves a thread behind that goes on."""
    truncated: Truncated = "wrong"
    """Responses that the length limit cut off. wrong: no answer, which the verifier rewards with 0 and a reward of your
    own as it likes. masked: neither compared with nor learned from."""
    penalty_tokens: Natural = 0
    """Last tokens of max_new_tokens over which the reward falls by 1, linearly (DAPO's soft overlong punishment)."""
    advantages: Advantages = "grpo"
    """A response's reward against its group's: over mean and standard deviation (grpo), over the mean (dr_grpo), over
    the mean of the others (rloo)."""
    unlikely_below: Annotated[float, Bounds(0, 1, "lie in 0..1")] | None = None
    """In the place of rewards: a token to which the student gave less than this probability as it generated it has the
    advantage -1, every other 0. Neither teacher nor reward is listened to: the control that says what they are worth
    (arXiv 2608.31046). None: advantages by reward."""
    resample_factor: Annotated[float, Bounds(1, 64, "lie in 1..64")] = 1.0
    """Groups whose rewards are all equal teach nothing and are replaced by groups of other prompts (DAPO's dynamic
    sampling), until this many times a batch's prompts were asked; 1 replaces none. What is generated in vain is counted
    in the stage's cost."""
    policy: PolicyLoss = dataclasses.field(default_factory=PolicyLoss)
    """How advantages become a loss."""
    policy_weight: NotNegative = 1.0
    """What the policy's loss is multiplied by; 0 measures rewards and learns from the teacher alone."""
    teacher_kl: NotNegative = 0.0
    """Weight of `loss`, the exact divergence from the teacher on every token; 0 needs no teacher."""
    loss: Loss = dataclasses.field(default_factory=lambda: Loss(name="reverse_kl"))
    """With teacher_kl, the divergence."""
    targets: StudentTopK | None = None
    """With teacher_kl, what it is computed from, as in OnPolicy."""
    entropy_floor: NotNegative = 0.0
    """Mean entropy, in nats a token, below which an entropy bonus is raised after every update by entropy_step, and
    above which it is lowered again; 0: none."""
    entropy_step: Positive = 0.005
    """Change of the bonus's weight after an update."""
    entropy_most: Positive = 1.0
    """Largest weight of the bonus."""
    updates_per_batch: Count = 1
    """Updates that one batch of rollouts is divided among, each with prompts_per_step prompts: the student generates so
    many at once, and the later updates learn from what older weights generated."""
    passes: Count = 1
    """Times that each batch of rollouts is learned from, with the ratio against the weights that generated; as in
    OnPolicy."""
    training: Training = dataclasses.field(default_factory=lambda: Training(steps=200, row_length=32_768))
    """How it learns; a step has as many microbatches as its packed rollouts fill."""
    max_staleness: Natural = 0
    """Batches of rollouts by which the weights that generate lag behind, beside what updates_per_batch and passes
    bring; as in OnPolicy."""
    samples_every_steps: Count = 25
    """Steps between rollouts that are kept for people to read."""
    start_from: str | None = None
    """Stage whose student this one starts from; None for the stage before."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_asking(self, "reinforcement learning", beside=self.prompts_beside)
        if not self.policy_weight and not self.teacher_kl:
            raise UserError("policy_weight and teacher_kl are 0: nothing would be learned; give one of them a weight")
        if self.targets is not None and not self.teacher_kl:
            raise UserError("targets are given, but teacher_kl is 0: no teacher is asked; leave them, or give a weight")
        if self.unlikely_below is not None and (self.resample_factor > 1 or not self.policy_weight):
            raise UserError(
                f"unlikely_below is {self.unlikely_below:g}, by which no group lacks a signal: leave resample_factor "
                "at 1 and give policy_weight a weight"
            )
        if self.unlikely_below is not None and self.teacher_kl:
            raise UserError(
                f"unlikely_below is {self.unlikely_below:g}, with which no teacher is listened to: leave teacher_kl at "
                f"0, not {self.teacher_kl:g}"
            )
        if self.policy_weight and self.samples_per_prompt < 2 and self.unlikely_below is None:
            raise UserError(
                f"samples_per_prompt is {self.samples_per_prompt}: an advantage is over the others of a group; give at "
                "least 2"
            )
        if self.resample_factor > 1 and not self.prompts_beside:
            raise UserError(
                f"resample_factor is {self.resample_factor:g}, which adds no prompt to {self.prompts_per_step} "
                "prompts_per_step; raise one of them, or set it to 1"
            )
        for name, params in (("thinking", self.thinking), ("non_thinking", self.non_thinking)):
            if self.policy_weight and params.greedy:
                raise UserError(
                    f"{name}.temperature is 0: all responses of a group are the same, and none is better than another; "
                    "sample at temperature 1"
                )
        if not self.policy_weight and (self.policy.reference_kl or self.policy.correction != "none"):
            raise UserError(
                "policy_weight is 0, by which policy.reference_kl and policy.correction are weighed; leave them out"
            )
        check_reward(self.reward)
        shortest = min(self.thinking.max_new_tokens, self.non_thinking.max_new_tokens)
        if self.penalty_tokens > shortest:
            raise UserError(f"penalty_tokens is {self.penalty_tokens}, above max_new_tokens {shortest}; lower it")

    @property
    def rollout_tokens(self) -> None:
        """A reward is for whole responses."""
        return None

    @property
    def token_share(self) -> float:
        """An advantage is every token's."""
        return 1.0

    @property
    def generation(self) -> EngineSizes:
        """Of the engine with which the student generates."""
        return EngineSizes(
            batch_size=self.prompts_per_step * self.samples_per_prompt * self.updates_per_batch,
            max_prompt_tokens=self.max_prompt_tokens,
            sampling=(self.thinking, self.non_thinking),
        )

    @property
    def prompts_beside(self) -> int:
        """Of every step, those that may be asked in the place of others."""
        return int(self.prompts_per_step * (exact_decimal(self.resample_factor) - 1))

    @property
    def learns_from_rewards(self) -> bool:
        """Whether the loss has a part that a teacher's divergence has not."""
        return self.policy_weight > 0 or self.entropy_floor > 0

    @property
    def learns_later(self) -> bool:
        """Whether some updates learn from what older weights generated."""
        return self.updates_per_batch > 1 or self.passes > 1 or self.max_staleness > 0

    @property
    def keeps_old_logprobs(self) -> bool:
        """Whether what the generating weights say is computed by the trainer before they are gone."""
        # A clip as narrow as a sequence's would act on the engine's rounding.
        needed = self.policy.correction != "none" or self.policy.ratio == "sequence"
        return self.learns_from_rewards and self.learns_later and needed

    @property
    def keeps_reference_logprobs(self) -> bool:
        """Whether what the student at the stage's start says is computed."""
        return self.learns_from_rewards and self.policy.reference_kl > 0

    @property
    def scoring_passes(self) -> int:
        """Forward passes over the rollouts, beside those of training, that a batch of them takes."""
        return self.keeps_old_logprobs + self.keeps_reference_logprobs

    @property
    def objective(self) -> Policy | None:
        """What an update learns beside `loss`; None where that is all, and weighs what it weighs in OnPolicy."""
        if not self.learns_from_rewards and self.teacher_kl == 1:
            return None
        return Policy(loss=self.policy, teacher_kl=self.teacher_kl)

    @property
    def policy_arrays(self) -> tuple[str, ...]:
        """What an update's rows carry for its objective, by the names of `PolicyData`; empty where it has none."""
        if self.objective is None:
            return ()
        wanted = {
            "old_logprobs": self.learns_later,
            "reference_logprobs": self.keeps_reference_logprobs,
            "entropy_weights": self.entropy_floor > 0,
        }
        always = ("advantages", "weights", "sampler_logprobs")
        return always + tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def check_meshes(self, name: str, mesh: Mesh, teacher_mesh: Mesh) -> None:
        """Refuses, by the name of the stage, to generate ahead where nothing would be gained by it."""
        check_ahead(self, name, mesh, teacher_mesh if self.teacher_kl else None)

    def asked(self, tasks: TaskMixture, seed: int) -> list[tuple[Problem, Mode]]:
        """The prompts of all steps, one step's after the other's, each with its mode, and after them `prompts_beside`
        of each. Raises UserError where there are none, or where one that must be verified has no answer."""
        asked = asked_of(self, tasks, seed, beside=self.prompts_beside)
        if self.reward is None and self.unlikely_below is None:
            for problem, _ in asked:
                if problem.answer is None:
                    raise UserError(
                        f"problem {problem.problem_id} of family {problem.family!r} has no answer, which its reward "
                        "goes by; give the data an answer column, or the stage a reward"
                    )
        return asked

    def run(self, name: str, model: Qwen3, context: RunContext) -> tuple[Qwen3, Spent]:
        assert self.training.steps is not None
        scorers = context.scorers() if self.teacher_kl else {}
        if scorers:
            self.check_meshes(name, context.mesh, context.load_teacher(context.teachers[0]).mesh)
        asked = self.asked(context.tasks, context.stage_seed(name))
        lesson = _FromRewards(self, model, context, asked[self.prompts_per_step * fresh_steps(self) :])
        with contextlib.closing(OwnRollouts(self, name, model, context, asked, scorers=scorers, lesson=lesson)) as data:
            return train(
                name, model, self.training, self.loss, data, context, steps=self.training.steps,
                teacher_head=None if self.targets else context.heads(scorers), policy=self.objective,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group:
    """The responses to one prompt."""

    rollouts: Sequence[Rollout]
    verdicts: Sequence[Verdict]
    rewards: Sequence[float]
    failed: Sequence[bool]
    has_signal: bool


@dataclasses.dataclass
class _Failures:
    """Of verifier and reward, over all responses that were generated for a batch."""

    stage: Grpo
    responses: int = 0
    failed: int = 0
    timed_out: int = 0

    def add(self, error: RewardFailed) -> None:
        """Raises UserError where more have failed than may."""
        self.failed += 1
        self.timed_out += error.timed_out
        share = f"{self.failed} of {self.responses} responses failed"
        if self.failed > self.stage.most_failed * self.responses:
            raise UserError(f"{error} ({share}, and most_failed is {self.stage.most_failed:g})") from error
        if self.timed_out > self.stage.most_timeouts:
            late = f"{self.timed_out} of them for want of time, and most_timeouts is {self.stage.most_timeouts}"
            raise UserError(f"{error} ({share}, {late})") from error


class _FromRewards:
    """Rewards, advantages, and what each token weighs; and the entropy bonus that adapts."""

    def __init__(self, stage: Grpo, start: Qwen3, context: RunContext, beside: Asked):
        """`beside` are the prompts of all steps that may be asked in the place of others."""
        self._stage, self._start, self._context, self._beside = stage, start, context, beside
        self._rewards = Rewards(
            tasks=context.tasks,
            tokenizer=context.tokenizer,
            reward=stage.reward,
            penalty_tokens=stage.penalty_tokens,
            timeout_seconds=stage.reward_timeout_seconds,
        )
        self._flops = forward_flops(start.config, adapter_parameters(start))
        self.learns = stage.objective is not None
        self._entropy_coefficient = 0.0

    def complete(
        self,
        written: Written,
        asked: Asked,
        model: Qwen3,
        batch: int,
        generate: Callable[[Asked], list[Rollout]],
        require_open: Callable[[], None],
    ) -> Written:
        reward = functools.partial(self._rewarded, _Failures(self._stage), require_open)
        written = reward(written, asked)
        if self._stage.resample_factor > 1:
            written = self._with_signal(written, batch, generate, reward)
        return dataclasses.replace(
            written,
            old_logprobs=self._logprobs(model, written) if self._stage.keeps_old_logprobs else (),
            reference_logprobs=self._logprobs(self._start, written) if self._stage.keeps_reference_logprobs else (),
        )

    def _with_signal(
        self,
        written: Written,
        batch: int,
        generate: Callable[[Asked], list[Rollout]],
        reward: Callable[[Written, Asked], Written],
    ) -> Written:
        """Groups of other prompts in the place of those without signal, as far as prompts and signals go."""
        stage, others = self._stage, iter(self._beside_of(batch))
        groups, seconds, replaced = self._groups(written), written.seconds, list[Outcome]()
        while more := list(itertools.islice(others, sum(not group.has_signal for group in groups))):
            started = time.monotonic()
            rollouts = generate(more)
            seconds += time.monotonic() - started
            places = [place for place, group in enumerate(groups) if not group.has_signal]
            free = iter(places)
            found = self._groups(reward(Written(rollouts=rollouts, seconds=0), more))
            for place, group in zip(places[: len(found)], found, strict=True):
                dropped = group
                if group.has_signal:
                    place = next(free)
                    dropped, groups[place] = groups[place], group
                replaced += self._outcomes(dropped, place // stage.prompts_per_step)
        assert all(len(group.rollouts) == stage.samples_per_prompt for group in groups)
        return dataclasses.replace(
            written,
            seconds=seconds,
            rollouts=[one for group in groups for one in group.rollouts],
            verdicts=[one for group in groups for one in group.verdicts],
            rewards=[one for group in groups for one in group.rewards],
            failed=[one for group in groups for one in group.failed],
            replaced=replaced,
        )

    def _outcomes(self, group: "_Group", part: int) -> list[Outcome]:
        known = self._known(group.rollouts, group.failed)
        judged = zip(group.rollouts, group.verdicts, group.rewards, group.failed, strict=True)
        return [
            Outcome(
                part=part,
                mode=rollout.mode,
                tokens=len(rollout.tokens),
                response_tokens=len(rollout.response),
                finished=rollout.finished,
                correct=verdict.correct,
                reward=reward,
                failed=failed,
                known=bool(known[index]),
                teacher=rollout.teacher,
            )
            for index, (rollout, verdict, reward, failed) in enumerate(judged)
        ]

    def _groups(self, written: Written) -> list["_Group"]:
        size = self._stage.samples_per_prompt
        known = self._known(written.rollouts, written.failed)
        signal = have_signal(self._grouped(written.rewards), self._grouped(known))
        return [
            _Group(
                rollouts=written.rollouts[first : first + size],
                verdicts=written.verdicts[first : first + size],
                rewards=written.rewards[first : first + size],
                failed=written.failed[first : first + size],
                has_signal=bool(signal[first // size]),
            )
            for first in range(0, len(written.rollouts), size)
        ]

    def _beside_of(self, batch: int) -> Asked:
        count = self._stage.prompts_beside * self._stage.updates_per_batch
        return self._beside[batch * count : (batch + 1) * count]

    def _rewarded(
        self, failures: _Failures, require_open: Callable[[], None], written: Written, asked: Asked
    ) -> Written:
        """With verdicts and rewards of each prompt's rollouts, one prompt's after the other's. Raises UserError where
        more fail than may."""

        def judged() -> list[tuple[bool | None, bool | None, float, bool]]:
            failures.responses += len(written.rollouts)
            found = []
            for index, rollout in enumerate(written.rollouts):
                require_open()
                problem = asked[index // self._stage.samples_per_prompt][0]
                try:
                    verdict, reward = self._rewards.of(rollout, problem, self._most_tokens(rollout.mode))
                    failed = False
                except RewardFailed as error:
                    failures.add(error)
                    verdict, reward, failed = error.verdict, 0.0, True
                found.append((*verdict, reward, failed))
            return found

        # Whether time has run out differs between processes.
        said = first_says(judged)
        return dataclasses.replace(
            written,
            verdicts=[Verdict(correct, working) for correct, working, _, _ in said],
            rewards=[reward for _, _, reward, _ in said],
            failed=[failed for *_, failed in said],
        )

    def _most_tokens(self, mode: Mode) -> int:
        stage = self._stage
        return (stage.thinking if mode == THINKING else stage.non_thinking).max_new_tokens

    def _logprobs(self, model: Qwen3, written: Written) -> list[np.ndarray]:
        """What a model says of the rollouts' tokens, by the trainer's own kernels."""
        training, context = self._stage.training, self._context
        return Scorer(model, context.mesh).rollout_logprobs(
            list(written.rollouts), rows=training.rows, length=training.row_length, pad_id=context.tokenizer.pad_id
        )

    def more_problems(self, batch: int) -> Sequence[Problem]:
        return [problem for problem, _ in self._beside_of(batch)]

    def per_token(self, written: Written, part: slice) -> list[dict[str, np.ndarray]]:
        stage, rollouts = self._stage, written.rollouts[part]
        known = self._known(rollouts, written.failed[part])
        of_response = advantages(self._grouped(written.rewards[part]), self._grouped(known), stage.advantages).reshape(
            -1
        )
        weights = self._weights(rollouts, known)
        trained = sum(int(rollout.loss_mask.sum()) for rollout in rollouts)
        old = written.old_logprobs or [rollout.sampler_logprobs for rollout in written.rollouts]
        found = []
        for place, rollout in enumerate(rollouts):
            index, mask = part.start + place, rollout.loss_mask
            of_token = of_response[place]
            if stage.unlikely_below is not None:
                of_token = np.where(np.exp(rollout.sampler_logprobs) < stage.unlikely_below, -1.0, 0.0)
            arrays = {
                "advantages": of_token * mask,
                "weights": weights[place] * mask,
                "sampler_logprobs": rollout.sampler_logprobs,
                "old_logprobs": old[index],
                # The coefficient, which changes with every update, comes in `before`.
                "entropy_weights": mask / trained,
            }
            if written.reference_logprobs:
                arrays["reference_logprobs"] = written.reference_logprobs[index]
            found.append({name: np.asarray(arrays[name], np.float32) for name in stage.policy_arrays})
        return found

    def _known(self, rollouts: Sequence[Rollout], failed: Sequence[bool]) -> np.ndarray:
        """Which of the rollouts are compared and learned from."""
        known = np.array([rollout.finished or self._stage.truncated == "wrong" for rollout in rollouts])
        listens = self._stage.failed == "left_out" and self._stage.unlikely_below is None
        return known & ~np.array(failed, bool) if failed and listens else known

    def _grouped(self, values: Sequence[Any] | np.ndarray) -> np.ndarray:
        return np.asarray(values).reshape(-1, self._stage.samples_per_prompt)

    def _weights(self, rollouts: Sequence[Rollout], known: np.ndarray) -> np.ndarray:
        """What a token of each rollout weighs in the sum over an update; in float64."""
        stage = self._stage
        lengths = np.array([rollout.loss_mask.sum() for rollout in rollouts], np.float64)
        count, tokens = max(1, int(known.sum())), max(1.0, float(lengths[known].sum()))
        if stage.policy.total == "tokens":
            weights = np.full(len(rollouts), 1 / tokens)
        elif stage.policy.total == "sequence":
            weights = 1 / (count * np.maximum(lengths, 1))
        else:
            most = max(stage.thinking.max_new_tokens, stage.non_thinking.max_new_tokens)
            weights = np.full(len(rollouts), 1 / (count * most))
        return np.where(known, stage.policy_weight * weights, 0)

    def told(self, written: Written, part: slice) -> dict[str, float]:
        """Of all that was generated for the part: rewards by mode, how many could not be had, and how many groups were
        all right, all wrong or mixed; nothing of problems that nobody can reward."""
        stage, rollouts = self._stage, written.rollouts[part]
        number = part.start // (part.stop - part.start)
        replaced = [one for one in written.replaced if one.part == number]
        rewards = np.array([*written.rewards[part], *(one.reward for one in replaced)], np.float64)
        modes = np.array([*(rollout.mode for rollout in rollouts), *(one.mode for one in replaced)])
        failed = np.array([*(written.failed[part] or [False] * len(rollouts)), *(one.failed for one in replaced)])
        known = np.array([*self._known(rollouts, written.failed[part]), *(one.known for one in replaced)])
        metrics = {"reward_failures": float(failed.mean())}
        correct = [*(verdict.correct for verdict in written.verdicts[part]), *(one.correct for one in replaced)]
        rewarded = np.array([stage.reward is not None or verdict is not None for verdict in correct])
        given = rewarded if stage.failed == "wrong" else rewarded & ~failed
        for name, which in {"reward": given, **{f"reward/{m}": given & (modes == m) for m in sorted({*modes})}}.items():
            if which.any():
                metrics[name] = float(rewards[which].mean())
        if rewarded.any():
            groups = self._grouped(rewarded)[:, 0]
            grouped, known = self._grouped(rewards)[groups], self._grouped(known)[groups]
            signal = have_signal(grouped, known)
            metrics["group_outcomes/mixed"] = float(signal.mean())
            best = np.where(known, grouped, -np.inf).max(1) > 0
            metrics["group_outcomes/all_right"] = float((~signal & best).mean())
            metrics["group_outcomes/all_wrong"] = float((~signal & ~best).mean())
        if stage.resample_factor > 1:
            metrics["kept_tokens"] = 1 - written.replaced_tokens / written.tokens
        return metrics

    def before(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        if not self._stage.entropy_floor:
            return batches
        bonus = np.float32(self._entropy_coefficient)

        def with_bonus(batch: Batch) -> Batch:
            assert batch.policy is not None
            weights: Any = np.asarray(batch.policy.entropy_weights) * bonus
            return dataclasses.replace(batch, policy=dataclasses.replace(batch.policy, entropy_weights=weights))

        return [with_bonus(batch) for batch in batches]

    def after(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        stage = self._stage
        if not stage.entropy_floor:
            return {}
        used = self._entropy_coefficient
        change = stage.entropy_step if metrics["student_entropy"] < stage.entropy_floor else -stage.entropy_step
        self._entropy_coefficient = min(max(used + change, 0.0), stage.entropy_most)
        return {"entropy_coefficient": used}

    def flops(self, written: Written) -> float:
        passes = bool(written.old_logprobs) + bool(written.reference_logprobs)
        return passes * self._flops.of(len(rollout.tokens) for rollout in written.rollouts)

    def state(self) -> Mapping[str, Any]:
        return {"entropy_coefficient": self._entropy_coefficient} if self._stage.entropy_floor else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._entropy_coefficient = state["entropy_coefficient"]
