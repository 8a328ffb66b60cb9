"""The type checker of the tests' import hook: beartype, with ints allowed as floats."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
