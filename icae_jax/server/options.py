"""What `icae serve` is told: where it listens, who may ask, and how much."""

import dataclasses
import ipaddress
import math
import os
import pathlib

from icae_jax.errors import UserError

TOKENS_VARIABLE = "ICAE_SERVE_TOKENS"  # bearer tokens, separated by commas or spaces
LEAST_TOKEN = 16  # characters


@dataclasses.dataclass(frozen=True)
class Options:
    """Each field is a flag of the same name.

    Attributes:
        adapter: see `training.trained.find`; None for the one that the store names.
        base: by default the one that the adapter names.
        base_dtype: see `inference.loading.load`.
        mesh: devices, such as "fsdp=4,tensor=2".
        store: folder of documents, which is made if it is not there; None for none.
        read_only: whether documents are only read, so that another process may fill the store.
        host: the address to listen on.
        port: 0 takes a free one.
        model_name: what requests call the model; by default base and method.
        rows: requests that decode at once, of the smallest bucket (`scheduler.buckets`).
        queue: requests that may wait for a row.
        timeout: seconds that a request may take.
        max_body_mib: of a request.
        max_context_tokens: of a text; by default what the base has positions for.
        max_new_tokens: of an answer where the request does not say.
        cache_mib: of memories that are kept for the next question.
        token_file: a file with a bearer token on each line, beside those of `TOKENS_VARIABLE`.
        cors: origins whose pages may ask; none by default.
        grace: seconds that running requests may take to end after SIGTERM.
        access_log: file for the access log, by default stderr; "none" for none.
    """

    adapter: str | None = None
    base: str | None = None
    base_dtype: str | None = None
    mesh: str | None = None
    store: str | None = None
    read_only: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    rows: int = 16
    queue: int = 256
    timeout: float = 300.0
    max_body_mib: float = 8.0
    max_context_tokens: int | None = None
    max_new_tokens: int = 256
    cache_mib: int = 512
    token_file: str | None = None
    cors: tuple[str, ...] = ()
    grace: float = 30.0
    access_log: str | None = None

    def __post_init__(self):
        if not self.adapter and not self.store:
            raise UserError("give --adapter, or --store, a store that names its adapter")
        if self.read_only and not self.store:
            raise UserError("--read_only is of a store; give --store")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port is {self.port}; give one up to 65535, or 0 for a free one")
        for name in ("rows", "queue", "max_new_tokens", "max_context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1")
        for name in ("timeout", "max_body_mib", "cache_mib", "grace"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UserError(f"--{name} is {value}; it must be positive and finite")
        for origin in self.cors:
            if not origin.startswith(("http://", "https://")) or origin.endswith("/"):
                raise UserError(
                    f"--cors is {origin!r}; give an origin such as https://example.org, without a "
                    "path"
                )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_tokens(options: Options) -> tuple[str, ...]:
    """The bearer tokens: of the file, then of the environment.

    UserError if the address is public and there are none, or if one is too short to be a secret.
    """
    tokens: list[str] = []
    if options.token_file is not None:
        try:
            text = pathlib.Path(options.token_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--token_file {options.token_file} cannot be read ({error}); give a text file "
                "with a token on each line"
            ) from error
        tokens += [line.strip() for line in text.splitlines() if line.strip()]
        if not tokens:
            raise UserError(
                f"--token_file {options.token_file} holds no token; write one on each line"
            )
    tokens += os.environ.get(TOKENS_VARIABLE, "").replace(",", " ").split()
    for number, token in enumerate(tokens):
        if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable():
            raise UserError(
                f"bearer token {number + 1} has {len(token)} characters, or others than ASCII's "
                f"printable ones; give at least {LEAST_TOKEN}, such as those of `openssl rand "
                "-hex 32`"
            )
    if not tokens and not options.loopback:
        raise UserError(
            f"--host {options.host} can be reached from other machines, and there is no bearer "
            f"token; give --token_file or {TOKENS_VARIABLE}, or listen on 127.0.0.1"
        )
    return tuple(tokens)
