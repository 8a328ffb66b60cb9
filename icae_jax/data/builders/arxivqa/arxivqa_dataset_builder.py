"""ArxivQA, questions on arXiv abstracts (arXiv 2408.03094, section 4.1)."""

from collections.abc import Iterator

from icae_jax.data.builders import common, inputs
from icae_jax.data.rows import Row

WHERE = (
    "not public: the authors of 500xCompressor have not released it; any file of lines with "
    "context, question and answer will do"
)
FILES = tuple(inputs.Published(split, (split,), WHERE) for split in ("train", "validation", "test"))


class Builder(common.LocalBuilder, skip_registration=True):
    """Rows `{"context", "question", "answer"}`."""

    ABOUT = (
        "train.jsonl, validation.jsonl and test.jsonl of lines with context, question and answer "
        "(ArxivQA itself is not public)"
    )
    FILES = FILES
    FEATURES = common.QUESTIONS

    @staticmethod
    def parse(raw: dict, subset: str) -> Iterator[Row]:
        """Yields the one question of a row."""
        context, question, answer = (
            common.text_of(raw, field) for field in ("context", "question", "answer")
        )
        yield common.row_of(context, question=question, answers=(answer,))
