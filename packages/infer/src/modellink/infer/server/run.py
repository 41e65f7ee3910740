"""`modellink-infer serve`: the server around an engine, on the first rank; the other ranks follow it."""

from __future__ import annotations

import importlib.util
import signal

from modellink.core import processes
from modellink.infer.engine import Engine
from modellink.kernels.errors import ModelLinkError

CONNECTIONS_PER_ANSWER = 4  # beyond this many connections for each answer that may wait a new one gets status 503
GRACE = 30  # seconds in which answers may come to their end when the server is told to stop


def check_installed() -> None:
    """Raise with the command that helps where the server's libraries are missing."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelLinkError(f"the server needs {' and '.join(missing)}", fix='python -m pip install "modellink-infer[server]"')


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
                limit_concurrency=max(64, CONNECTIONS_PER_ANSWER * most_waiting))
