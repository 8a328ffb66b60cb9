"""PwC, prompts on contexts (arXiv 2307.06945, section 3.1)."""

from collections.abc import Iterator

from icae_jax.data.builders import common, inputs
from icae_jax.data.rows import Row

HUB = "https://huggingface.co/datasets/sggetao/PwC/resolve/main"
FILES = tuple(
    inputs.Published(
        split, (f"PwC_{split}",), f"{HUB}/PwC_{split}.jsonl (hub data set sggetao/PwC)"
    )
    for split in ("train", "test")
)


class Builder(common.LocalBuilder, skip_registration=True):
    """Rows `{"input", "prompt", "answer"}` as `context`, `question` and one of `answers`."""

    ABOUT = "PwC_train.jsonl and PwC_test.jsonl (hub data set sggetao/PwC)"
    FILES = FILES
    FEATURES = common.QUESTIONS

    @staticmethod
    def parse(raw: dict, subset: str) -> Iterator[Row]:
        """Yields the one question of a row."""
        context, question, answer = (
            common.text_of(raw, field) for field in ("input", "prompt", "answer")
        )
        yield common.row_of(context, question=question, answers=(answer,))
