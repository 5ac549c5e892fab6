"""What the quickstart's teacher was made for and its student learns, and how both are judged."""

from distill import Arithmetic, ChainSum, Evaluation, Products, SamplingParams, non_thinking_params, thinking_params

MAX_PROMPT_TOKENS = 64
THINKING_TOKENS = 72
ANSWER_TOKENS = 16


def arithmetic() -> Arithmetic:
    """Sums and differences of four to seven digits, and products by parts, worded as reasoning-gym words them."""
    return Arithmetic(
        chain_sum=ChainSum(min_terms=4, max_terms=7, weight=0.7),
        products=Products(min_digits=2, max_digits=3, weight=0.3),
    )


def qwen3_thinking() -> SamplingParams:
    return thinking_params(THINKING_TOKENS)


def qwen3_non_thinking() -> SamplingParams:
    return non_thinking_params(ANSWER_TOKENS)


def policy_thinking() -> SamplingParams:
    """The policy itself, as on-policy distillation wants it: temperature 1, nothing cut off."""
    return SamplingParams(max_new_tokens=THINKING_TOKENS)


def policy_non_thinking() -> SamplingParams:
    return SamplingParams(max_new_tokens=ANSWER_TOKENS)


def evaluation(problems: int = 200) -> Evaluation:
    """Four samples a problem at the settings that Qwen3's authors recommend for each mode."""
    return Evaluation(
        problems=problems,
        samples_per_problem=4,
        pass_at=(4,),
        thinking=qwen3_thinking(),
        non_thinking=qwen3_non_thinking(),
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        batch_size=problems,
    )
