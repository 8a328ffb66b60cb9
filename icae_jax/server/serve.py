"""Runs the server: takes the port, loads, serves, and ends in order."""

import contextlib
import os
import signal
import socket
import sys
import types

import uvicorn

from icae_jax.errors import UserError
from icae_jax.inference import loading, store
from icae_jax.inference.compressor import Compressor
from icae_jax.runtime import sharding
from icae_jax.server import api, middleware
from icae_jax.server.documents import Documents
from icae_jax.server.options import Options, read_tokens
from icae_jax.server.service import Service

KEEP_ALIVE_SECONDS = 30  # that an idle connection stays open
BACKLOG = 1024


class Server(uvicorn.Server):
    """Ends with exit code 0 when it was told to end and what ran has ended."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Refuses what comes; a second signal gives up what runs."""
        self._service.status = "draining"
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise them again at its end


def bind(options: Options) -> socket.socket:
    """The socket to listen on. UserError if the address cannot be had, such as a port in use."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((options.host, options.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise UserError(
            f"--host {options.host} --port {options.port} cannot be listened on "
            f"({error.strerror or error}); end what listens there, or give another --port"
        ) from error
    return listening


def load(options: Options) -> tuple[Compressor, Documents | None]:
    """The compressor, and the store that it reads. UserError as for `loading.load`."""
    mesh = sharding.local_mesh(sharding.parse(options.mesh)) if options.mesh else None
    how = {"dtype": options.base_dtype, "mesh": mesh}
    there = options.store is not None and store.exists(options.store)
    if options.store is not None and not there and (options.read_only or not options.adapter):
        remedy = "leave --read_only out" if options.adapter else "give --adapter to make it"
        raise UserError(f"--store {options.store} is no store; fill one, or {remedy}")
    if there:
        compressor, opened = loading.load_with_store(
            options.store, options.adapter, options.base, **how
        )
        opened.close()
    else:
        compressor = loading.load(options.adapter, options.base, **how)
    documents = None
    if options.store is not None:
        documents = Documents(compressor, options.store, options.read_only)
    return compressor, documents


def serve(options: Options) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code 0.

    UserError on bad input: before anything is loaded where that can be told.
    """
    tokens = read_tokens(options)
    log = middleware.open_log(options.access_log)
    with contextlib.closing(bind(options)) as listening:
        compressor, documents = load(options)
        service = Service(compressor, options, documents)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host

        def ready():
            line = f"icae serve: ready on http://{shown}:{port} (model {service.name})"
            print(line, file=sys.stderr, flush=True)

        config = uvicorn.Config(
            api.make_app(service, options, tokens, log, ready),
            log_level="error",  # requests are in the access log
            access_log=False,
            timeout_graceful_shutdown=round(options.grace) + 2,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False,
            lifespan="on",
            ws="none",
        )
        for sig in (signal.SIGTERM, signal.SIGINT):  # uvicorn's handlers until it has ended
            signal.signal(sig, signal.SIG_IGN)
        server = Server(config, service)
        server.run([listening])
        if server.force_exit:
            sys.stderr.flush()
            os._exit(0)  # threads may still compress; what the store was given is on disk
    return 0
