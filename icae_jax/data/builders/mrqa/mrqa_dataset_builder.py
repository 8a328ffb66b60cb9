"""The MRQA 2019 shared task: extractive questions of twelve data sets (Fisch et al., 2019)."""

from collections.abc import Iterator

import tensorflow_datasets as tfds

from icae_jax.data import forms
from icae_jax.data.builders import common, inputs
from icae_jax.data.rows import Row

RELEASE = "https://s3.us-east-2.amazonaws.com/mrqa/release/v2"
# The task's own download scripts shorten three of the names.
IN_DOMAIN = (
    ("SQuAD",),
    ("NewsQA",),
    ("TriviaQA-web", "TriviaQA"),
    ("SearchQA",),
    ("HotpotQA",),
    ("NaturalQuestionsShort", "NaturalQuestions"),
)
OUT_OF_DOMAIN = (
    ("BioASQ",),
    ("DROP",),
    ("DuoRC.ParaphraseRC", "DuoRC"),
    ("RACE",),
    ("RelationExtraction",),
    ("TextbookQA",),
)


def _published(split, names, folder, by_folder):
    url = f"{RELEASE}/{folder}/{names[0]}.jsonl.gz"
    return inputs.Published(split, names, url, names[0], folder if by_folder else "")


FILES = (
    *(_published("train", names, "train", True) for names in IN_DOMAIN),
    *(_published("validation", names, "dev", True) for names in IN_DOMAIN),
    *(_published("test", names, "dev", False) for names in OUT_OF_DOMAIN),
)


class Builder(common.LocalBuilder, skip_registration=True):
    """One example per question: `id` (the qid), `context`, `question`, `answers`, `subset`.

    Markers such as [PAR] stay in the context. Splits: train; validation, the held-out questions of
    the same six data sets; test, those of six others.
    """

    ABOUT = "train/NAME.jsonl.gz and dev/NAME.jsonl.gz of the MRQA 2019 shared task"
    FILES = FILES
    FEATURES = common.QUESTIONS | {"id": tfds.features.Text(), "subset": tfds.features.Text()}

    @staticmethod
    def parse(raw: dict, subset: str) -> Iterator[Row]:
        """Yields a row for each question of a line."""
        if "header" in raw:
            return
        common.text_of(raw, "context")
        common.check_field(raw, "qas")
        rows = [row for row in forms.paragraph(raw, "", "", subset) if row.question is not None]
        for row, question in zip(rows, raw["qas"], strict=True):
            yield row._replace(id=common.text_of(question, "qid"))
