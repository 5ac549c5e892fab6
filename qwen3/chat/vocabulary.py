"""Whether tokenizers and models go together: by their vocabularies, on which every target rests."""

from qwen3.chat.chat import ChatTokenizer
from qwen3.errors import UserError


def check_vocabulary(tokenizer: ChatTokenizer, model_vocab_size: int) -> None:
    """Refuses a tokenizer with ids that the model has no embedding for; a larger, padded model is as it should be.

    Raises:
        UserError: The highest id is not below `model_vocab_size`.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size is {model_vocab_size}; "
            "take tokenizer and weights from the same checkpoint"
        )


def check_same_vocabulary(teacher: ChatTokenizer, student: ChatTokenizer) -> None:
    """Refuses two tokenizers that mean different text by the same id: token-level targets would be wrong.

    Raises:
        UserError: The vocabularies differ; names the first id that does.
    """
    theirs, ours = teacher.tokens_by_id(), student.tokens_by_id()
    for one in sorted(theirs.keys() | ours.keys()):
        if theirs.get(one) != ours.get(one):
            raise UserError(
                f"tokenizers disagree: id {one} is {theirs.get(one)!r} to the teacher, {ours.get(one)!r} to the "
                "student; give the student the teacher's tokenizer"
            )
