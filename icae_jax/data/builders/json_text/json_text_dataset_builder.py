"""Any corpus of texts: The Pile, SlimPajama, C4, your own."""

import glob
import re

from icae_jax.data import forms
from icae_jax.data.builders import common, inputs
from icae_jax.errors import UserError


class Builder(common.LocalBuilder, skip_registration=True):
    """Rows with a text field, and perhaps an `id`. The user names the splits.

    Texts of white space alone are left out, and counted.
    """

    ABOUT = "any files of rows with a text field, or of text (The Pile, SlimPajama, C4, your own)"
    FLAGS = ("from", "split", "field")
    FEATURES = common.TEXTS

    def sources(self, request):
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

    def options(self):
        return {"field": self.request.field if self.request else "text"}

    def columns(self):
        return forms.FIELDS | {self.options()["field"]}

    @staticmethod
    def parse(raw, subset, field):
        yield common.row_of(common.text_of(raw, field), forms.name_of(raw, "id"))
