"""How a vLLM server frames a chat about a memory, beside how the adapter was trained.

The server renders a chat template and tokenises the text as a whole. Behind the memory it puts a
newline and the question, as the template `chat` of `objectives.targets` does.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from icae_jax import errors
from icae_jax.interop.export.reader import Reader
from icae_jax.interop.prompts import question_ids, start_ids
from icae_jax.objectives import joint

# A user's turn that begins with a memory, and one that does not. Their contents are strings
# (`--chat-template-content-format string`).
_JINJA = """\
{{%- for message in messages -%}}
{{%- set content = message['content'] -%}}
{{%- if message['role'] == 'assistant' -%}}
{{{{ {gap} + content + {stop} }}}}
{{%- elif content.startswith({memory}) -%}}
{{{{ {head} + {memory} + {before} + content[{length}:] + {after} }}}}
{{%- else -%}}
{{{{ ({start} if loop.first else {between}) + {before} + content + {after} }}}}
{{%- endif -%}}
{{%- endfor -%}}
"""
_GAPS = ("", " ", "\n")
_COMPLETIONS = "the prompts for completions are framed as trained"


class Framing(NamedTuple):
    """How a server is to frame chats.

    jinja: the chat template to serve the base with; None for its own. padding: what is put before
    a question, so that most have the ids that they had in training. note: what the server reads
    otherwise than in training; empty if it reads nothing so.
    """

    jinja: str | None = None
    padding: str = ""
    note: str = ""


def framing(reader: Reader, questions: Sequence[str]) -> Framing:
    """How chats that ask these questions are framed best.

    A base without a chat template gets one that frames as trained, if text can spell it.
    """
    tokenizer, template = reader.base.tokenizer, reader.adapter.template
    own = tokenizer.chat_template
    if own and template.name != "chat":
        return Framing(
            note=f"the adapter was trained with template {template.name}, and in a chat the server "
            f"frames the memory with its own; {_COMPLETIONS}"
        )
    if own:
        ways = [Framing(None, padding) for padding in joint.PADDINGS]
    else:
        ways = [Framing(jinja) for jinja in _candidates(tokenizer, template)]
    if not ways:
        return Framing(
            note="the base has no chat template, and no text spells the trained tokens of the "
            f"adapter's template {template.name}, so there are no chats; {_COMPLETIONS}"
        )
    marked = joint.with_memory_token(tokenizer)
    best, most_unlike = ways[0], None
    for way in ways:
        unlike = [
            question
            for question in (*questions, *joint.PROBES)
            if not _alike(marked, reader, way.jinja or own, way.padding + question, question)
        ]
        if most_unlike is None or len(unlike) < len(most_unlike):
            best, most_unlike = way, unlike
        if not unlike:
            return way
    unlike = [question for question in questions if question in most_unlike]
    if not unlike:
        return best
    return best._replace(
        note=f"in a chat the server gives {errors.counted(len(unlike), 'questions')} other token "
        f"ids than in training, {unlike[0]!r} for one; {_COMPLETIONS}"
    )


def _alike(marked, reader, jinja, content, question):
    """Whether the server's ids of a chat are those of training."""
    template = reader.adapter.template
    message = {"role": "user", "content": f"{joint.MEMORY}\n{content}"}
    try:
        text = marked.apply_chat_template(
            [message], chat_template=jinja, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # templates are programs: they raise anything
        return False
    if text.count(joint.MEMORY) != 1:
        return False
    head, behind = joint.around_memory(marked, text)
    want = template.prompt(question_ids(question, reader.base.tokenizer, template))
    return head == list(template.head) and behind == want


def _candidates(tokenizer, template):
    """Chat templates that spell a template, with and without spaces between its parts.

    There are none if it has trained tokens.
    """
    ids = (template.head, template.before, template.after)
    if any(i < 0 for part in ids for i in part):
        return
    head, before, after, stop, start, between = (
        tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in (*ids, (template.stop,), start_ids(tokenizer), _between(tokenizer, template))
    )
    for ahead, left, right in itertools.product(_GAPS, repeat=3):
        yield _JINJA.format(
            memory=repr(joint.MEMORY),
            length=len(joint.MEMORY) + 1,  # a newline is behind it
            head=repr(head),
            before=repr(ahead + before + left),
            after=repr(right + after),
            gap=repr(right),
            stop=repr(stop),
            start=repr(head or start),
            between=repr(between),
        )


def _between(tokenizer, template):
    """What later questions begin with: the head without `<s>`."""
    return tuple(i for i in template.head if i != tokenizer.bos_token_id)
