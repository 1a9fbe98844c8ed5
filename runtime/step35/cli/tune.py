"""`step35 tune`: measures a plan and its neighbours on this box and writes the fastest to a plan file."""

import json
import tempfile
from pathlib import Path

import click

from step35.cli.renamed_option import mtp_file_option


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@mtp_file_option
@click.option(
    "--plan", "plan_path", type=click.Path(path_type=Path), help="Tune this plan instead of one made for this box."
)
@click.option(
    "-c", "--ctx", "n_ctx", type=int, help="Context size in tokens; default 32768, or less if that is what fits."
)
@click.option(
    "--prompt", "n_prompt", type=click.IntRange(16), default=512, show_default=True, help="Prompt tokens to measure."
)
@click.option("-n", "--n-predict", type=click.IntRange(8), default=64, show_default=True, help="Tokens to decode.")
@click.option(
    "--rounds", type=click.IntRange(1, 9), default=2, show_default=True, help="Measurements of each candidate."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where the plan goes; default --plan's file, or MODEL.plan.yaml."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def tune(model, mtp, plan_path, n_ctx, n_prompt, n_predict, rounds, out, as_json) -> None:
    """Tries neighbours of MODEL's plan, each loaded afresh, and keeps the fastest; the plain plan is in every round."""
    from step35.cli.tune_child import measure_apart
    from step35.planning.hardware import probe, this_box
    from step35.planning.model_header import read_model
    from step35.planning.plan_file import rpc_of, to_text
    from step35.planning.remote import UNKNOWN_NETWORK, with_remotes
    from step35.planning.tune import Workload, fastest, neighbours, report, tuned
    from step35.planning.tune import tune as run

    header = read_model(model, mtp)
    machine = probe(this_box())
    if plan_path is not None and (hosts := rpc_of(plan_path, header)):
        machine = with_remotes(machine, hosts, UNKNOWN_NETWORK)
    plain = _plain(header, machine, plan_path, n_ctx)
    workload = Workload(n_prompt, n_predict)
    changes = neighbours(header, machine, plain)
    n_plans = 1 + len(changes)
    click.echo(f"step35: {rounds} rounds of {n_plans} plans, each loaded afresh; then the gains together", err=True)
    with tempfile.TemporaryDirectory(prefix="step35-tune-") as folder:

        def measure(placement):
            candidate = Path(folder) / "plan.yaml"
            candidate.write_text(to_text(placement, model.name), encoding="utf-8")
            sample = measure_apart(model, candidate, mtp, workload)
            click.echo(_progress(placement, sample), err=True)
            return sample

        trials = run(plain, changes, measure, workload, rounds)
    best = fastest(trials, workload)
    lines = report(trials, best, workload)
    if not trials[0].samples:
        raise click.ClickException(f"nothing measured: the plain plan doesn't run; see step35 doctor {model}")
    out = out or plan_path or model.with_name(model.name + ".plan.yaml")
    out.write_text(to_text(tuned(best, lines), model.name), encoding="utf-8")
    click.echo(
        json.dumps({"plan": str(out), "kept": best.what, "trials": lines}) if as_json else "\n".join([*lines, str(out)])
    )


def _plain(header, machine, plan_path, n_ctx):
    from step35.planning.autoplan import place_here
    from step35.planning.placement import Constraints
    from step35.planning.plan_file import read_plan

    if plan_path is None:
        return place_here(header, machine, Constraints(n_ctx=n_ctx)).placement
    if n_ctx is not None:
        raise click.UsageError("--plan and --ctx: the plan says it already; leave one out, or edit the plan")
    return read_plan(plan_path, header, machine)


def _progress(placement, sample) -> str:
    from step35.planning.memory_usage import HOST

    run = placement.run
    what = f"batch {run.n_batch}, {placement.n_threads} threads, {run.n_heads} heads"
    if placement.layout.gpus and placement.layout.host_experts:
        n_on_gpu = sum(device != HOST for devices in placement.layout.experts for device in devices)
        what += f", {n_on_gpu} expert matrices on the GPU, op offload from {placement.op_offload_from or 'never'}"
    if sample is None:
        return f"{what}: did not run"
    return f"{what}: prefill {sample.prefill_tps:.1f}, decode {sample.decode_tps:.1f} tok/s"
