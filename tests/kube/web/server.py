"""A web server that drains: on SIGTERM it goes on for a second (endpoints are slow), then ends."""

import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

DRAIN_S = 1.0


def facts() -> str:
    """Return what this process sees of its pod."""
    try:
        Path("/file").write_text("")
        root = "writable"
    except OSError:
        root = "read-only"
    nobody = ""
    try:
        socket.getaddrinfo("nobody", 80)
    except socket.gaierror as error:
        nobody = "unknown" if error.errno == socket.EAI_NONAME else str(error)
    found = {
        "uid": os.getuid(), "groups": ",".join(map(str, os.getgroups())), "pid": os.getpid(), "root": root,
        "host": socket.gethostname(), "name": socket.gethostbyname("web"),
        "ip": os.environ["POD_IP"], "own": socket.gethostbyname(socket.gethostname()), "nobody": nobody,
        "key": Path("/secrets/key").read_text(),
    }  # fmt: skip
    return "".join(f"{name}={value}\n" for name, value in found.items())


class Handler(BaseHTTPRequestHandler):
    """Answers everything."""

    def do_GET(self) -> None:
        body = (facts() if self.path == "/facts" else "ok").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = ThreadingHTTPServer((os.environ["POD_IP"], 8000), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Timer(DRAIN_S, server.shutdown).start())
server.serve_forever()
