"""The type checker of the tests' import hook: beartype, which takes an int where a float is asked."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
