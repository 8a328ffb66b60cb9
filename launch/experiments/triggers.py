"""What a frozen base does behind a trigger: does it look back at a text that it has read?

    python launch/experiments/triggers.py --base SmolLM2-135M-Instruct.Q4_1.gguf \
        --texts arxiv/valid.jsonl.gz

The base, without a memory, reads a text, the trigger, and the text again (or first another one).
Prints the loss of the second copy's first token and of the following ones, nats, means of all
texts. A compressor whose first token costs the same behind another's text cannot restore it.
"""

import argparse

from icae_jax.runtime import compiled

compiled.set_up()  # before anything imports JAX

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from icae_jax.data import sources  # noqa: E402
from icae_jax.errors import UserError  # noqa: E402
from icae_jax.interop.hub import base as bases  # noqa: E402
from icae_jax.interop.hub import tokenizer as tokenizers  # noqa: E402
from icae_jax.interop.hub.text import user_ids  # noqa: E402
from icae_jax.models.llama import FrozenModel, Llama  # noqa: E402


@jax.jit
def losses(model, ids_BT, start):
    """Nats of every token of `ids_BT [B, T]` from index `start` on, the others 0."""
    T = ids_BT.shape[1]
    hidden, _ = model(ids_BT, jnp.arange(T)[None], jnp.ones((1, T), bool))
    log_probs = jax.nn.log_softmax(model.head.logits(hidden[:, :-1]), -1)
    nats = -jnp.take_along_axis(log_probs, ids_BT[:, 1:, None], -1)[..., 0]
    return jnp.where(jnp.arange(1, T) >= start, nats, 0.0)


def main():
    """Prints one line a trigger."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--base", required=True, help="a GGUF file, folder or hub id")
    add("--texts", required=True, help="JSON lines with a field `text`")
    add("--tokens", type=int, default=64, help="of each text")
    add("--limit", type=int, default=8, help="texts")
    add(
        "--triggers",
        nargs="+",
        help="tokens, by default those that begin and end texts and turns, none, and a newline",
    )
    args = parser.parse_args()
    base = bases.load_base(args.base)
    model, tokenizer = FrozenModel(Llama(base.config), base.params), base.tokenizer
    rows = sources.read_texts(args.texts, "--texts")[: args.limit]
    texts = [user_ids(tokenizer, row.text)[: args.tokens] for row in rows]
    texts = np.asarray([ids for ids in texts if len(ids) == args.tokens])
    others = np.roll(texts, 1, axis=0)
    for trigger in args.triggers or ["", *tokenizer.all_special_tokens, "\n"]:
        ids = [tokenizers.token_id(tokenizer, trigger)] if trigger else []
        if None in ids:
            raise UserError(f"--triggers {trigger!r} is not a token of the base's tokenizer")
        ids = np.tile(np.asarray(ids, int), (len(texts), 1))
        found = []
        for context in (texts, others):
            sequence = np.concatenate([context, ids, texts], 1)
            start = sequence.shape[1] - args.tokens
            nats = np.asarray(losses(model, jnp.asarray(sequence), start))[:, start - 1 :]
            found += [nats[:, 0].mean(), nats[:, 1:].mean()]
        first, rest, other_first, other_rest = found
        print(
            f"{trigger!r:20} first token {first:6.2f} (behind another's text {other_first:6.2f}), "
            f"the following {rest:5.2f} ({other_rest:5.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
