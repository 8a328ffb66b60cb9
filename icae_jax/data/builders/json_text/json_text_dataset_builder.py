"""Any corpus of texts: The Pile, SlimPajama, C4, one's own."""

import glob
import re

from icae_jax.data import rows
from icae_jax.data.builders import common, inputs
from icae_jax.errors import UserError


class Builder(common.LocalBuilder, skip_registration=True):
    """Rows with a text field, and perhaps an `id`. Splits have the user's names; texts of white space alone are left out, and counted."""

    ABOUT = "any files of rows with a text field, or of text (The Pile, SlimPajama, C4, your own)"
    FLAGS = ("from", "split", "field")
    FEATURES = common.TEXTS

    def sources(self, request):
        if bool(request.paths) == bool(request.patterns):
            raise UserError(
                "give either --from FILE_OR_FOLDER (all of it is split train) or --split NAME=GLOB, one or more"
            )
        if request.paths:
            found = {"train": inputs.files_in(request.paths)}
        else:
            found = {}
            for split, pattern in request.patterns:
                if (
                    not re.fullmatch(r"[A-Za-z]\w*", split) or split == "all"
                ):  # "all" means all splits to TFDS
                    raise UserError(
                        f"--split {split}={pattern}: a split's name is letters, digits and _, and not all"
                    )
                paths = sorted(glob.glob(pattern, recursive=True))
                if not paths:
                    raise UserError(f"--split {split}={pattern}: no such file")
                found.setdefault(split, []).extend(
                    p for p in inputs.files_in(paths) if p not in found.get(split, [])
                )
        return {split: [inputs.Input(str(p)) for p in paths] for split, paths in found.items()}

    def options(self):
        return {"field": self.request.field if self.request else "text"}

    def columns(self):
        return rows.FIELDS | {self.options()["field"]}

    @staticmethod
    def parse(raw, subset, field):
        yield common.row_of(common.text_of(raw, field), rows.name_of(raw, "id"))
