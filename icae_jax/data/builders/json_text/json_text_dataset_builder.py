"""Any corpus of texts: The Pile, SlimPajama, C4, your own."""

import glob
import re
from collections.abc import Iterator

from icae_jax.data import forms
from icae_jax.data.builders import common, inputs
from icae_jax.data.rows import Row
from icae_jax.errors import UserError


class Builder(common.LocalBuilder, skip_registration=True):
    """Rows with a text field, and perhaps an `id`. The user names the splits.

    Texts of white space alone are left out, and counted.
    """

    ABOUT = "any files of rows with a text field, or of text (The Pile, SlimPajama, C4, your own)"
    FLAGS = ("from", "split", "field")
    FEATURES = common.TEXTS

    def sources(self, request: inputs.Request) -> dict[str, list[inputs.Input]]:
        """The files of `--from` as split train, or those of each `--split`."""
        if bool(request.paths) == bool(request.patterns):
            raise UserError(
                "give either --from FILE_OR_FOLDER (all of it is split train) or --split "
                "NAME=GLOB, one or more"
            )
        if request.paths:
            paths = {"train": inputs.files_in(request.paths)}
        else:
            paths = {}
            for split, pattern in request.patterns:
                # "all" means all splits to TFDS.
                if not re.fullmatch(r"[A-Za-z]\w*", split) or split == "all":
                    raise UserError(
                        f"--split {split}={pattern}: a split's name is letters, digits and _, and "
                        "not all"
                    )
                matches = sorted(glob.glob(pattern, recursive=True))
                if not matches:
                    raise UserError(f"--split {split}={pattern}: no such file")
                paths.setdefault(split, []).extend(inputs.files_in(matches))
        return {
            split: [inputs.Input(str(path)) for path in dict.fromkeys(of_split)]
            for split, of_split in paths.items()
        }

    def options(self) -> dict[str, str]:
        """The field of the text."""
        return {"field": self.request.field if self.request else "text"}

    def columns(self) -> frozenset[str]:
        """The columns that are wanted of a table, the field of the text among them."""
        return forms.FIELDS | {self.options()["field"]}

    @staticmethod
    def parse(raw: dict, subset: str, field: str) -> Iterator[Row]:
        """Yields the one text of a row."""
        yield common.row_of(common.text_of(raw, field), forms.name_of(raw, "id"))
