"""Questions as ids behind a memory."""

from transformers import PreTrainedTokenizerBase

from icae_jax.errors import UserError
from icae_jax.interop.hub.text import user_ids
from icae_jax.objectives.targets import Template


def question_ids(
    question: str, tokenizer: PreTrainedTokenizerBase, template: Template, where: str = ""
) -> list[int]:
    """The ids of a question.

    UserError if neither they nor the template have a token, since decoding needs one to start
    from. where: the beginning of the message.
    """
    ids = user_ids(tokenizer, question)
    if not template.prompt(ids):
        raise UserError(
            f"{where}the question {question!r} has no tokens, and template {template.name} puts no "
            "words around it; ask something"
        )
    return ids
