"""`step35 serve` as a process of its own on a free port, for tests and benches."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from narrowed import present

READY_WITHIN_S = 120


class LiveServer:
    """A running server; `lines` are what it said on stderr so far."""

    def __init__(self, model: Path, *options: str) -> None:
        command = [sys.executable, "-m", "step35.cli", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._stderr = present(self.process.stderr)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait(
            lambda: next(filter(None, (re.search(r"http://\S+:\d+", line) for line in self.lines)), None)
        )[0]

    def _read(self) -> None:
        for line in self._stderr:
            self.lines.append(line.rstrip())

    def wait(self, found: Callable[[], Any]) -> Any:
        """Returns what `found` returns as soon as it is something; fails with what the server said."""
        end = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < end:
            if result := found():
                return result
            if self.process.poll() is not None:
                self._reader.join()
                raise AssertionError(f"the server ended with {self.process.returncode}:\n" + "\n".join(self.lines))
            time.sleep(0.02)
        raise AssertionError("the server took too long:\n" + "\n".join(self.lines))

    def ready(self) -> Self:
        """Waits until the model is loaded."""
        self.wait(lambda: self.get("/health")[0] == 200)
        return self

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.send("GET", path, None, **headers)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Sends JSON, or bytes as they are; returns the status and the answer, parsed if it is JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, **{"content_type": "application/json"} | headers)

    def send(self, method: str, path: str, data: bytes | None, **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, data, named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def stop(self, wait_s: float = 60) -> int:
        """Asks the server to end and returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self._end(wait_s)

    def kill(self) -> None:
        self.process.kill()
        self._end(10)

    def _end(self, wait_s: float) -> int:
        code = self.process.wait(wait_s)
        self._reader.join(5)
        self._stderr.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()


def conversation_log(lines: list[str]) -> list[dict[str, Any]]:
    """Returns the server's log lines of requests, parsed."""
    found = (re.search(r"request (\{.*\})$", line) for line in lines)
    return [json.loads(match[1]) for match in found if match]
