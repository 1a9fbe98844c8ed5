"""`step35 serve`: one model behind the OpenAI and Anthropic APIs, for agents and chat front ends."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from step35.cli.plan import Size, engine_plan
from step35.cli.renamed_option import renamed_option

if TYPE_CHECKING:
    from step35.planning.autoplan import EnginePlan
    from step35.server.http.serve import Address
    from step35.server.service import Service

EXAMPLES = """
\b
Examples:
  step35 serve model.gguf
  step35 serve model.gguf --ctx 131072 --session-dir ~/.cache/step35
  step35 serve model.gguf --host 0.0.0.0 --api-key "$KEY"
"""
N_SPARE = 2
"""Sessions beyond the parallel ones: one for short side requests, one for a conversation that is idle."""

SERVER_OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address; any but loopback needs --api-key."),
    click.option(
        "--port", type=click.IntRange(0, 65535), default=8035, show_default=True, help="Port; 0 takes a free one."
    ),
    click.option("--api-key", envvar="STEP35_API_KEY", help="What clients must send; also STEP35_API_KEY."),
    click.option("--cors", metavar="ORIGIN", help="A web page's origin that may call, such as http://localhost:3000."),
    click.option("--name", help="The model's name in the APIs; default the file's."),
    click.option("--parallel", type=click.IntRange(1, 62), default=4, show_default=True, help="Answers at a time."),
    click.option(
        "--sessions", "n_sessions", type=click.IntRange(1, 64), help="Conversations in memory; default parallel + 2."
    ),
    click.option(
        "--queue",
        "n_waiting",
        type=click.IntRange(0, 10000),
        default=32,
        show_default=True,
        help="Requests that may wait.",
    ),
    click.option(
        "--session-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keep conversations here over a restart.",
    ),
    click.option(
        "--session-size", type=Size(), default="20GiB", show_default=True, help="What they may take together."
    ),
    renamed_option(
        "--record",
        "--trace",
        "record",
        type=click.Path(path_type=Path, file_okay=False),
        help="Write requests and answers here, texts and all.",
    ),
    click.option(
        "--drain",
        "drain_s",
        type=click.FloatRange(0),
        default=30.0,
        show_default=True,
        help="Seconds that answers have at the end.",
    ),
)


class GroupedCommand(click.Command):
    """A command whose help lists the server's options before those of the engine."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {param.name: record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))}
        server = {param.name for param in self.get_params(ctx)} & _SERVER_NAMES
        for title, wanted in (("Server", server), ("Model", records.keys() - server)):
            with formatter.section(title):
                formatter.write_dl([record for name, record in records.items() if name in wanted])


_SERVER_NAMES = {
    "host", "port", "api_key", "cors", "name", "parallel", "n_sessions", "n_waiting", "session_dir", "session_size",
    "record", "drain_s",
}  # fmt: skip


def make_serve(model_options: tuple) -> click.Command:
    """Returns the command; `model_options` are those that every command with a model takes."""
    function = _serve
    for option in reversed((*model_options, *SERVER_OPTIONS)):
        function = option(function)
    return click.command("serve", cls=GroupedCommand, epilog=EXAMPLES)(function)


def _serve(
    host: str,
    port: int,
    api_key: str | None,
    cors: str | None,
    name: str | None,
    parallel: int,
    n_sessions: int | None,
    n_waiting: int,
    session_dir: Path | None,
    session_size: int,
    record: Path | None,
    drain_s: float,
    **engine_options: Any,
) -> None:
    """Serves MODEL to agents and chat programs over HTTP.

    OpenAI's chat completions, completions and responses, Anthropic's messages. SIGTERM or Ctrl-C lets
    running answers end, a second one doesn't.
    """
    from step35.server.http.app import Access
    from step35.server.http.serve import Address, listen, run
    from step35.server.policy import Limits
    from step35.server.service import Service, Serving

    address = Address(host, port)
    if not address.is_loopback and not api_key:
        raise click.UsageError(f"--host {host} lets others in: give --api-key, too")
    _log_to_stderr()
    for folder in filter(None, (session_dir, record)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    listener = listen(address)
    address = replace(address, port=listener.getsockname()[1])
    plan = _plan(parallel, n_sessions, engine_options)
    options = plan.options
    serving = Serving(
        name or options.model.stem, Limits(min(parallel, options.n_sessions), n_waiting), session_dir, session_size
    )
    service = Service(serving, lambda: _open(plan))
    click.echo(f"step35: {address} (loading {options.model.name})", err=True)
    run(service, Access(api_key, cors, record_dir=record), listener, lambda: _say_ready(service, address), drain_s)


def _plan(parallel: int, n_sessions: int | None, engine_options: dict) -> "EnginePlan":
    """Returns the engine's plan; a plan file has its own number of sessions."""
    if engine_options["plan_path"] is not None:
        return engine_plan(**engine_options)
    return engine_plan(**engine_options, n_sessions=n_sessions or min(parallel + N_SPARE, 64))


def _open(plan: "EnginePlan"):
    from step35.engine.engine import Engine

    return Engine(plan.options, plan.headers)


def _say_ready(service: "Service", address: "Address") -> None:
    engine, serving = service.engine, service.serving
    options = engine.options
    for note in engine.notes:
        click.echo(f"step35: {note}", err=True)
    answers = f"{serving.limits.n_parallel} answers at a time"
    lines = [
        f"ready: {serving.name}, context of {engine.n_ctx} tokens for {options.n_sessions} conversations, {answers}",
        f"drafting {options.draft}, {engine.n_draft_heads} MTP heads; sessions on disk: {serving.session_dir or 'no'}",
        f"OpenAI: {address}/v1   Anthropic: {address}   page: {address}/",
    ]
    for line in lines:
        click.echo(f"step35: {line}", err=True)


def _log_to_stderr() -> None:
    logger = logging.getLogger("step35.server")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
