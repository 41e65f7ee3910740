"""`modellink-infer serve`: the server around an engine, on the first rank; the other ranks follow it."""

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

CONNECTIONS = 1024  # beyond this many, or four for each answer that may wait, a new one gets status 503; many only idle
GRACE = 30  # seconds in which answers may come to their end when the server is told to stop


def check_installed() -> None:
    """Raise with the command that helps where the server's libraries are missing."""
    missing = [name for name in ("fastapi", "httpx", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelLinkError(f"the server needs {', '.join(missing)}", fix='python -m pip install "modellink-infer[server]"')


def bind(host: str, port: int) -> list[socket.socket]:
    """Take a port before the weights are read: connections are accepted once `serve` listens.

    Raises:
        ModelLinkError: another program has it, or there is no such address.
    """
    found: list[socket.socket] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            one = socket.socket(family, kind, protocol)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may still linger
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                one.bind(address)
            except OSError as error:
                one.close()
                if error.errno == errno.EADDRNOTAVAIL and len(addresses) > 1:
                    continue  # `localhost` names an IPv6 address also where there is no IPv6
                raise
            found.append(one)
        if not found:
            raise OSError(errno.EADDRNOTAVAIL, "the address is not of this machine")
    except (OSError, OverflowError) as error:
        for one in found:
            one.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise ModelLinkError(f"the server cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}",
                             where="--port" if taken else "--host, --port",
                             fix="end what listens there, or use another --port" if taken else None) from None
    return found


def serve(engine: Engine, sockets: Sequence[socket.socket], *, name: str, api_key: str | None = None, most_waiting: int = 256,
          largest_body: int = 2 << 20) -> None:
    """Serve until SIGTERM or Ctrl-C. Every rank calls it, the first with what `bind` gave.

    Args:
        name: what the model is called in `/v1/models`.
        api_key: what requests must carry as `Authorization: Bearer`; None asks for none.
        most_waiting: answers that may be under way or wait; more get status 429.
        largest_body: in bytes; more gets status 413.

    Raises:
        InternalError: the model failed; who was answered was told.
    """
    from modellink.core import launch
    from modellink.infer.server.service import Service
    service = Service(engine, most_waiting=most_waiting)
    if launch.rank() > 0:
        service.follow()
        return
    from modellink.infer.server.app import make_app
    server = _server(make_app(service, name=name, api_key=api_key, largest_body=largest_body), most_waiting)

    def leave() -> None:
        server.should_exit = True  # a process that answers nothing would only keep requests from one that does
    service.on_failure = leave
    _run(server, sockets)
    if service.failure is not None:
        raise InternalError(f"the model has failed: {service.failure}", fix="start the server anew")


def serve_replicas(replicas: Sequence[Replica], sockets: Sequence[socket.socket], *, most_waiting: int = 256,
                   largest_body: int = 2 << 20) -> None:
    """Serve with several servers that have the model each, until SIGTERM or Ctrl-C; see replicas.py.

    Raises:
        ModelLinkError: a replica cannot start with what it was given.
    """
    from modellink.infer.server.replicas import make_front

    def leave() -> None:
        server.should_exit = True
    server = _server(make_front(replicas, largest_body=largest_body, on_refused=leave), most_waiting * len(replicas))
    _run(server, sockets, f" with {len(replicas)} replicas")
    if refused := [replica.index for replica in replicas if replica.refused]:
        raise ModelLinkError(f"replica {refused[0]} cannot start", fix="mend what it said above")


def _server(app: FastAPI, most_waiting: int) -> Server:
    import uvicorn
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE,
                                         limit_concurrency=_connections(most_waiting)))


def _run(server: Server, sockets: Sequence[socket.socket], how: str = "") -> None:
    host, port = sockets[0].getsockname()[:2]
    startup = server.startup

    async def started(sockets: list[Any] | None = None) -> None:
        await startup(sockets)
        print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}{how}", file=sys.stderr, flush=True)
    server.startup = started  # type: ignore[method-assign]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn ends the server, then raises the signal again
    server.run(list(sockets))


def _connections(most_waiting: int) -> int:
    """How many connections may be open, with as many files as they need."""
    wanted = max(CONNECTIONS, 4 * most_waiting)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + 256  # a server in front has another one to a replica
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))
    return wanted
