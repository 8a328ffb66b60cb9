"""Text files of the package that are filled in and written for others: READMEs and scripts."""

import re

_PLACEHOLDER = re.compile("@([A-Z]+)@")


def fill_in(template: str, values: dict[str, str]) -> str:
    """Replaces each `@NAME@` by the value of that name. KeyError if a name has no value."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
