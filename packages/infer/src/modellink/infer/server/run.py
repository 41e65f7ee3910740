"""`modellink-infer serve`: the server around an engine, on the first rank; the other ranks follow it."""

from __future__ import annotations

import importlib.util
import resource
import signal
import sys
from collections.abc import Sequence

from modellink.core import processes
from modellink.infer.engine import Engine
from modellink.kernels.errors import ModelLinkError

CONNECTIONS = 1024  # beyond this many, or four for each answer that may wait, a new one gets status 503; many only idle
GRACE = 30  # seconds in which answers may come to their end when the server is told to stop


def check_installed() -> None:
    """Raise with the command that helps where the server's libraries are missing."""
    missing = [name for name in ("fastapi", "httpx", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelLinkError(f"the server needs {', '.join(missing)}", fix='python -m pip install "modellink-infer[server]"')


def serve(engine: Engine, *, host: str, port: int, name: str, api_key: str | None = None, most_waiting: int = 256,
          largest_body: int = 2 << 20) -> None:
    """Serve until SIGTERM or Ctrl-C. Every rank calls it.

    Args:
        name: what the model is called in `/v1/models`.
        api_key: what requests must carry as `Authorization: Bearer`; None asks for none.
        most_waiting: answers that may be under way or wait; more get status 429.
        largest_body: in bytes; more gets status 413.
    """
    from modellink.infer.server.service import Service
    service = Service(engine, most_waiting=most_waiting)
    if processes.rank() > 0:
        service.follow()
        return
    import uvicorn

    from modellink.infer.server.app import make_app
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn ends the server, then raises the signal again
    app = make_app(service, name=name, api_key=api_key, largest_body=largest_body)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE,
                limit_concurrency=_connections(most_waiting))


def _connections(most_waiting: int) -> int:
    """How many connections may be open, with as many files as they need."""
    wanted = max(CONNECTIONS, 4 * most_waiting)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + 256  # a server in front has another one to a replica
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))
    return wanted


def serve_replicas(count: int, arguments: Sequence[str], *, host: str, port: int, most_waiting: int = 256,
                   largest_body: int = 2 << 20) -> None:
    """Serve with several processes that have the model each, until SIGTERM or Ctrl-C; see replicas.py.

    Args:
        arguments: of `modellink-infer`, as a replica runs it.
    """
    import uvicorn

    from modellink.infer.server.replicas import make_front, make_replicas
    print(f"serving at http://{host}:{port} with {count} replicas", file=sys.stderr, flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    app = make_front(make_replicas(count, arguments), largest_body=largest_body)
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE,
                limit_concurrency=_connections(most_waiting * count))
