"""Start the server, and open the user's browser when it answers."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterable
from typing import Any

from unweave.errors import UnweaveError
from unweave.web import _security


def need_web() -> None:
    """Say what to install when the ``web`` extra is missing."""
    import importlib.util

    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnweaveError(f"the browser needs {' and '.join(missing)}: pip install 'unweave[web]'")


def serve(
    run: Any,
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    open_browser: bool = True,
    token: str | None = None,
    allowed_hosts: Iterable[str] = (),
) -> None:
    """Show a run until interrupted (Ctrl+C).

    Args:
        host: the address to listen on. Anywhere but on loopback a token is needed; one is made if none is given.
        port: 0 takes any free port; a port that is taken gives way to the next free one only when it is the default.
        open_browser: open the system's browser once the server answers.
        allowed_hosts: more names to answer to (without port), for a server behind another name.

    Raises:
        UnweaveError: when the address cannot be listened on.
    """
    need_web()
    import uvicorn

    from unweave.web._app import create_app

    local = _security.is_loopback(host)
    extra = tuple(allowed_hosts)
    if not local or any(not _security.is_loopback(name) for name in extra):
        token = token or secrets.token_urlsafe(24)
    # With a token the name does not matter: a page that rebinds its own name has no cookie for it.
    names = (*_security.LOOPBACK, host, *extra) if local else ("*",)
    app = create_app(run, token=token, allowed_hosts=names)
    listener = listen(host, port)
    address = _address(host, listener.getsockname()[1], token)
    config = uvicorn.Config(app, log_level="warning", server_header=False, proxy_headers=False, access_log=False)
    server = uvicorn.Server(config)
    print(f"{run.name}: {address}\nCtrl+C stops it.", flush=True)
    if open_browser:
        threading.Thread(target=_open_when_ready, args=(server, address), daemon=True).start()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; the default port gives way to a free one when another run is open on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        try:
            listener.bind((host.strip("[]"), port))
        except OSError:
            if port != 8765:
                raise
            listener.bind((host.strip("[]"), 0))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise UnweaveError(
            f"cannot listen on {host}:{port}: {reason}. Choose another port, or 0 for any free one."
        ) from None
    return listener


def _address(host: str, port: int, token: str | None) -> str:
    shown = host if host not in ("0.0.0.0", "::") else socket.gethostname()
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def _open_when_ready(server: Any, address: str) -> None:
    import time
    import webbrowser

    for _ in range(100):
        if server.started:
            webbrowser.open(address)
            return
        time.sleep(0.1)
