"""`step35 launch`: an agent's settings for a running server, and a tool call to see that it works."""

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click

from step35.cli.agents import CLIENTS, KEY_NAME, Server, Settings
from step35.errors import Step35Error

EXAMPLES = """
\b
Examples:
  step35 launch codex
  step35 launch claude --url http://192.168.1.7:8035 --api-key "$KEY"
  step35 launch opencode --print > step35.json
"""
TIMEOUT_S = 600.0
POLL_S = 0.5


@click.command(epilog=EXAMPLES)
@click.argument("client", type=click.Choice(list(CLIENTS)))
@click.option("--url", default="http://127.0.0.1:8035", show_default=True, help="Where step35 serve listens.")
@click.option("--api-key", envvar=KEY_NAME, help=f"The server's key; also {KEY_NAME}.")
@click.option("--print", "prints", is_flag=True, help="Print the settings and write nothing.")
@click.option("--check/--no-check", default=True, show_default=True, help="Ask for a tool call and answer it.")
def launch(client: str, url: str, api_key: str | None, prints: bool, check: bool) -> None:
    """Points CLIENT at a running server.

    Asks for a tool call in the API that the client speaks, then writes a settings file of its own in the
    client's folder, no file of yours, and says how to start the client with it.
    """
    url = url.rstrip("/").removesuffix("/v1")
    server, chosen = _find_server(url, api_key), CLIENTS[client]
    if check:
        trip = chosen.round_trip(server, lambda path, body: _ask(url + path, api_key, body))
        cached = f"{trip.n_cached} of {trip.n_prompt} prompt tokens of the next turn were cached"
        click.echo(f"step35: {chosen.title}: a tool call and back works; {cached}", err=True)
    settings = chosen.settings(server)
    if prints:
        click.echo(settings.text, nl=False)
        click.echo(f"step35: save it as ~/{settings.path}", err=True)
    else:
        _write(settings)
    click.echo(f"step35: start it with: {settings.command}", err=True)


def _find_server(url: str, api_key: str | None) -> Server:
    """Returns what a client needs to know, once the server has loaded its model."""
    model = _ask(f"{url}/v1/models", api_key)["data"][0]
    if "context_length" not in model:
        click.echo(f"step35: {url} is loading its model; waiting for it", err=True)
    while "context_length" not in model:
        time.sleep(POLL_S)
        model = _ask(f"{url}/v1/models", api_key)["data"][0]
    return Server(url, model["id"], model["context_length"], api_key)


def _write(settings: Settings) -> None:
    """Writes the file as a whole, for its owner alone: it may hold a key."""
    path = Path.home() / settings.path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(settings.text)
    unfinished.replace(path)
    click.echo(f"step35: wrote {path}", err=True)


def _ask(url: str, api_key: str | None, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the JSON that the server answers with; raises Step35Error."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {api_key}"} if api_key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise Step35Error(f"the server refused: {url}: {error.code} {_reason(error)}") from error
    except (OSError, ValueError) as error:
        raise Step35Error(f"no server: {url}: {error}; start one with step35 serve MODEL, or give --url") from error


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read(2000).decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
