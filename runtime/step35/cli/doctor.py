"""`step35 doctor`: what is wrong with the installation, the box or a model, and what to do about it."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def doctor(model, as_json) -> None:
    """Examines this installation and box, and MODEL if given. Exit code 1 if something is wrong."""
    from step35.engine.engine import Engine
    from step35.planning.hardware import this_box
    from step35.selftest.doctor import examine

    findings = []
    for finding in examine(this_box(), model, Engine):
        findings.append(finding)
        if not as_json:
            click.echo(f"{'ok ' if finding.is_well else 'BAD'}  {finding.what}: {finding.found}")
            if not finding.is_well:
                click.echo(f"     do: {finding.remedy}")
    if as_json:
        rows = [{"what": f.what, "ok": f.is_well, "found": f.found, "remedy": f.remedy} for f in findings]
        click.echo(json.dumps({"ok": all(f.is_well for f in findings), "findings": rows}))
    if not all(finding.is_well for finding in findings):
        raise SystemExit(1)
