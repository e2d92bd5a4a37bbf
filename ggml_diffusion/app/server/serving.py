"""The server from its start to its end.

Deliberately not here: what it answers (routes.py).
"""

import os
import socket
import sys
from types import FrameType

import uvicorn

from ggml_diffusion.app.server.guard import LOOPBACK
from ggml_diffusion.app.server.routes import Service, application
from ggml_diffusion.app.server.writer import Writer
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.diffusion_model import DiffusionModel

_KEEP_ALIVE_S = 5
_MAX_CONNECTIONS = 256
_END_S = 1  # what is being denoised has this long to end by itself


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket, before the model is loaded.

    Raises:
        UserError: the port is in use, or the host is none of this machine.

    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}") from None
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen()
    except OSError as error:
        opened.close()
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen on {host}, port {port}: {reason}: give another --port") from None
    return opened


def hosts_for(host: str) -> frozenset[str] | None:
    """Names that a server on this host answers to; None = any, since it is there for others."""
    return frozenset(LOOPBACK) if host in LOOPBACK else None


class _Server(uvicorn.Server):
    """Gives all requests up at the first interrupt, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, writer: Writer) -> None:
        super().__init__(config)
        self._writer = writer

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self._writer.close()
        super().handle_exit(sig, frame)


def serve(
    model: DiffusionModel, name: str, listening: socket.socket, host: str, key: str | None, max_waiting: int
) -> None:
    """Answer until a signal comes, which is then raised."""
    writer = Writer(max_waiting)
    config = uvicorn.Config(
        application(Service(model, name, writer, key, hosts_for(host))),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_END_S,
        limit_concurrency=_MAX_CONNECTIONS,
    )
    try:
        _Server(config, writer).run(sockets=[listening])
    finally:
        writer.close()
        if not writer.join(_END_S):
            # A step of a large model still computes: it must not find the engine gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
