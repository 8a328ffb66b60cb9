"""What exports for vLLM share: requests, what sends them, and the command that serves them."""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

from icae_jax.errors import UserError
from icae_jax.interop.adapters import peft_folder
from icae_jax.interop.export.reader import DECODER_LORA, Reader
from icae_jax.interop.templates import fill_in

DTYPES = ("float32", "bfloat16", "float16")  # what vLLM takes; the default first
URL = "http://localhost:8000"
ANSWER_TOKENS = 128  # most tokens of an answer, as in `Compressor.ask`
SPARE_TOKENS = 16  # how much longer than its original a restored text may be
SCRIPTS = pathlib.Path(__file__).parent / "scripts"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclasses.dataclass(frozen=True)
class Requests:
    """Which requests are written.

    Attributes:
        questions: asked of every text.
        restore: whether to ask for the texts back, too.
        model: the server's name for the base, or for the decoder's LoRA if it has one. By default
            requests name no model, and a server's only one answers, or "decoder_lora".
        url: of the server.
        dtype: of the tensors and the server, one of `DTYPES`.
    """

    questions: tuple[str, ...] = ()
    restore: bool = False
    model: str | None = None
    url: str = URL
    dtype: str = DTYPES[0]

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype is {self.dtype}; choose from {', '.join(DTYPES)}")


def body(
    reader: Reader, requests: Requests, objective: str, fields: dict[str, Any], max_tokens: int
) -> dict[str, Any]:
    """A request's JSON body. objective: what ends the answer, a key of `reader.OBJECTIVES`."""
    lora = DECODER_LORA if reader.adapter.has_decoder_lora else None
    name = requests.model or lora
    return {
        **({} if name is None else {"model": name}),
        **fields,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stop_token_ids": reader.stop_ids(objective),
    }


def save(
    folder: pathlib.Path, lines: Sequence[dict[str, Any]], requests: Requests, serve: str, uses: str
) -> None:
    """Writes requests.jsonl, and request.py, which sends one of its lines.

    serve: the command that serves them. uses: how the script is called, for its help.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "requests.jsonl").write_text(text, encoding="utf-8")
    script = (SCRIPTS / "request.py").read_text(encoding="utf-8")
    script = fill_in(script, {"URL": requests.url, "SERVE": serve, "USES": uses})
    (folder / "request.py").write_text(script, encoding="utf-8")


def serve_command(reader: Reader, requests: Requests, flags: Sequence[str]) -> str:
    """The command that serves an export, in the export's folder. flags: those of its kind."""
    words = ["vllm", "serve", reader.base_path, "--dtype", requests.dtype]
    if reader.adapter.has_decoder_lora:
        served_as = requests.model or DECODER_LORA
        lora = peft_folder.vllm_flags(reader.adapter, DECODER_LORA, served_as)
        return f"{shlex.join([*words, *flags])} {lora}"
    name = requests.model or pathlib.PurePath(reader.base_path).name
    return shlex.join([*words, "--served-model-name", name, *flags])
