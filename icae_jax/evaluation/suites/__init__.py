"""The suites of `icae evaluate`: one file each, after a table or a figure of the papers."""

from icae_jax.evaluation.suites.ablate import Ablate
from icae_jax.evaluation.suites.autoencode import Autoencode
from icae_jax.evaluation.suites.continuation import Continue
from icae_jax.evaluation.suites.memorise import Memorise
from icae_jax.evaluation.suites.qa import Qa
from icae_jax.evaluation.suites.span import Span
from icae_jax.evaluation.suites.tokens import Tokens

SUITES = {suite.name: suite for suite in (Autoencode, Continue, Memorise, Qa, Ablate, Span, Tokens)}
