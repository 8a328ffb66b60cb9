"""Requests and responses: OpenAI's fields, and those of memories.

Fields are strict: a number as text, or a field that nobody knows, is an error rather than a guess.
What OpenAI's clients may send and this server does not do can only be given empty.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from icae_jax.inference.sampling import MOST_ALTERNATIVES

MOST_CHOICES = 16  # of n
MOST_STOPS, LONGEST_STOP = 16, 256  # stop texts, and characters of one
MOST_MESSAGES = 1024
MOST_PROMPTS = 32
MOST_DOCUMENTS = 64  # read together
LONGEST_ID = 512  # characters

Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
MemoryId = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_ID)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Strict):
    """How a response is streamed."""

    include_usage: bool | None = Field(None, description="a last chunk with the usage")
    include_obfuscation: bool | None = Field(None, description="accepted; nothing is added")


class Sampled(_Strict):
    """How an answer is chosen, and from what: the fields of chats and completions."""

    model: Annotated[str, StringConstraints(max_length=1024)] | None = Field(
        None, description="the name that /v1/models gives; may be left out"
    )
    memory: (
        MemoryId
        | Annotated[list[MemoryId], Field(min_length=1, max_length=MOST_DOCUMENTS)]
        | (None)
    ) = Field(
        None,
        description="id of a memory, or several, which are read together in this order",
        examples=["report-2026"],
    )
    context: Annotated[str, StringConstraints(min_length=1)] | None = Field(
        None,
        description="a text that is compressed now, behind `memory` if both are given; its memory "
        "is kept for the next question about the same text",
    )
    compress: bool = Field(
        True, description="false: the base reads `context` as it is, as without a memory"
    )
    ratio: Annotated[Finite, Field(ge=0.001, le=1e6)] | None = Field(
        None, description="wanted context tokens per memory token of `context`; the nearest known"
    )
    memory_tokens: Annotated[int, Field(ge=1, le=10**6)] | None = Field(
        None, description="wanted memory tokens of `context`, in place of `ratio`"
    )
    max_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = Field(
        None, description="0, the default, takes the best token"
    )
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=0.001, le=1000)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="of the draws; choice i draws with seed + i"
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted, and without effect here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Only as if they were not given.
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    # What a client has from an answer, and sends back with it.
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "What is the pet of Nils?"}],
                    "memory": "0",
                },
                {
                    "messages": [{"role": "user", "content": "Where was Anna born?"}],
                    "context": "Meet Anna Baker. Anna was born in Oslo.",
                    "ratio": 4.0,
                    "stream": True,
                },
            ]
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(Sampled):
    """`POST /v1/completions`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Nils lives in", "memory": "0"}]}
    )

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_PROMPTS),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class MemoryRequest(_Strict):
    """`POST /v1/memories`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "text": "Meet Anna Baker. Anna was born in Oslo.",
                    "id": "people",
                    "metadata": {"source": "letter"},
                }
            ]
        }
    )

    text: Annotated[str, StringConstraints(min_length=1)]
    id: MemoryId | None = Field(
        None, description="by default made of the text; a document of that id is replaced"
    )
    metadata: dict[str, Any] | None = None
    keep: bool = Field(
        True,
        description="in the store; false, or where there is no store: until newer memories push it "
        "out of the cache",
    )
    ratio: Annotated[Finite, Field(ge=0.001, le=1e6)] | None = None
    memory_tokens: Annotated[int, Field(ge=1, le=10**6)] | None = None


class RestoreRequest(_Strict):
    """`POST /v1/memories/{id}/restore`."""

    max_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        None, description="by default the length of the text, and some to spare"
    )
    stream: bool | None = None


# --- Responses ---


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error, in OpenAI's form."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens of a request.

    prompt_tokens: what the model read before its first token, memory tokens included.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    memory_tokens: int = Field(description="memory tokens read")
    context_tokens: int = Field(description="tokens of text that the memory stands for")


class MemoryObject(BaseModel):
    """A memory, and what was compressed into it."""

    id: str
    object: Literal["memory"] = "memory"
    context_tokens: int
    memory_tokens: int
    memory_tokens_per_segment: int
    ratio: float
    bytes: int
    kept: Literal["store", "cache"]
    metadata: dict[str, Any]


class MemoryList(BaseModel):
    """A page of memories."""

    object: Literal["list"] = "list"
    data: list[MemoryObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A memory that is gone."""

    id: str
    object: Literal["memory.deleted"] = "memory.deleted"
    deleted: Literal[True] = True


class Restored(BaseModel):
    """A text read back from its memory."""

    id: str
    object: Literal["memory.restored"] = "memory.restored"
    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage


class ModelFacts(BaseModel):
    """What is particular to a compressor."""

    method: str
    base: str
    template: str
    context_positions: int
    segment_tokens: int
    memory_tokens_per_segment: list[int] | None
    default_memory_tokens_per_segment: int
    max_context_tokens: int
    documents: bool
    writable: bool


class ModelObject(BaseModel):
    """The model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["icae_jax"] = "icae_jax"
    compressor: ModelFacts


class ModelList(BaseModel):
    """The models: one."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Status(BaseModel):
    """Whether the server lives, or takes requests."""

    status: Literal["ok", "ready", "warming_up", "draining"]
