# SPDX-License-Identifier: Apache-2.0
"""`modellink-infer serve`: runs the server around an engine on the first rank; the other ranks follow it."""

from __future__ import annotations

import errno
import importlib.util
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modellink.kernels.errors import InternalError, ModelLinkError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from uvicorn import Server

    from modellink.infer.engine import Engine
    from modellink.infer.server.replicas import Replica

# beyond these, or four per completion that may wait, a connection gets status 503; many are only idle
CONNECTIONS = 1024
GRACE_SECONDS = 30  # in which completions may finish after SIGTERM


def check_installed() -> None:
    """Raise, with the command that installs them, if the server's libraries are missing."""
    missing = [name for name in ("fastapi", "httpx", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelLinkError(f"the server needs {', '.join(missing)}",
                             fix='python -m pip install "modellink-infer[server]"')


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind a port before the weights are read. Connections are accepted only when `serve` listens.

    Raises:
        ModelLinkError: the port is in use, or the address is not one of this machine.
    """
    found: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            one = socket.socket(family, kind, protocol)
            # connections of an earlier server may still linger
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                one.bind(address)
            except OSError as error:
                one.close()
                if error.errno == errno.EADDRNOTAVAIL and len(addresses) > 1:
                    continue  # `localhost` resolves to an IPv6 address even without IPv6
                raise
            found.append(one)
        if not found:
            raise OSError(errno.EADDRNOTAVAIL, "the address is not one of this machine")
    except (OSError, OverflowError) as error:
        for one in found:
            one.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        reason = getattr(error, "strerror", None) or error
        where, fix = "--host, --port", None
        if in_use:
            where, fix = "--port", "stop the program that uses the port, or choose another --port"
        raise ModelLinkError(f"the server cannot listen on {host}:{port}: {reason}", where=where,
                             fix=fix) from None
    return found


def serve(engine: Engine, sockets: Sequence[socket.socket], *, name: str, api_key: str | None = None,
          max_waiting: int = 256, max_body: int = 2 << 20) -> None:
    """Serve until SIGTERM or Ctrl-C. Every rank calls it, the first one with the sockets of `bind`.

    Args:
        name: of the model in `/v1/models`.
        api_key: key that requests must send as `Authorization: Bearer`; None: no key is needed.
        max_waiting: the most completions that may run or wait; further ones get status 429.
        max_body: maximum size of a body in bytes; a larger one gets status 413.

    Raises:
        InternalError: the model failed; its clients got an error.
    """
    from modellink.core import launch
    from modellink.infer.server.service import Service
    service = Service(engine, max_waiting=max_waiting)
    if launch.rank() > 0:
        service.follow()
        return
    from modellink.infer.server.app import make_app
    server = _server(make_app(service, name=name, api_key=api_key, max_body=max_body), max_waiting)

    def stop() -> None:
        server.should_exit = True  # so that requests go to a process that can answer them
    service.on_failure = stop
    _run(server, sockets)
    if service.failure is not None:
        raise InternalError(f"the model has failed: {service.failure}", fix="restart the server")


def serve_replicas(replicas: Sequence[Replica], sockets: Sequence[socket.socket], *, max_waiting: int = 256,
                   max_body: int = 2 << 20) -> None:
    """Forward requests to several servers of the same model, until SIGTERM or Ctrl-C; see front.py.

    Raises:
        ModelLinkError: a replica cannot start with its options.
    """
    from modellink.infer.server.front import make_front

    def stop() -> None:
        server.should_exit = True
    server = _server(make_front(replicas, max_body=max_body, on_refused=stop), max_waiting * len(replicas))
    _run(server, sockets, f" with {len(replicas)} replicas")
    if refused := [replica.index for replica in replicas if replica.refused]:
        raise ModelLinkError(f"replica {refused[0]} cannot start", fix="see its error message above")


def _server(app: FastAPI, max_waiting: int) -> Server:
    import uvicorn
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False,
                                         timeout_graceful_shutdown=GRACE_SECONDS,
                                         limit_concurrency=_connections(max_waiting)))


def _run(server: Server, sockets: Sequence[socket.socket], suffix: str = "") -> None:
    host, port = sockets[0].getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    startup = server.startup

    async def started(sockets: list[Any] | None = None) -> None:
        await startup(sockets)
        print(f"serving at http://{address}:{port}{suffix}", file=sys.stderr, flush=True)
    server.startup = started  # type: ignore[method-assign]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn stops the server, then raises the signal again
    server.run(list(sockets))


def _connections(max_waiting: int) -> int:
    """Return how many connections may be open, and raise the limit on open files accordingly."""
    wanted = max(CONNECTIONS, 4 * max_waiting)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + 256  # a server in front of replicas has one more connection per request
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE,
                           (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))
    return wanted
