"""Measures one plan in a process of its own: ggml reads parts of a plan only once a process."""

import json
import subprocess
import sys
from pathlib import Path

from step35.planning.tune import Sample, Workload


def measure_apart(model: Path, plan: Path, mtp: Path | None, workload: Workload) -> Sample | None:
    """Returns the speeds of a workload under a plan file; None if it doesn't run."""
    arguments = [model, plan, mtp or "", workload.n_prompt, workload.n_predict]
    command = [sys.executable, "-m", "step35.cli.tune_child", *map(str, arguments)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if done.returncode:
        return None
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(model: Path, plan: Path, mtp: Path | None, workload: Workload) -> Sample:
    """Returns the speeds of a workload under a plan file, in this process."""
    from step35.cli.benchmark import measure
    from step35.planning.autoplan import file_plan
    from step35.planning.model_header import read_headers
    from step35.sampling.sampler import Sampling

    planned = file_plan(read_headers(model, mtp), plan)
    frontiers = [workload.n_prompt]
    rows = list(measure(planned, [planned.options.draft], frontiers, workload.n_predict, Sampling(temperature=0)))
    return Sample(rows[-1].prefill_tps, rows[-1].decode_tps)


def main() -> None:
    """Prints a measurement as one line of JSON."""
    model, plan, mtp, n_prompt, n_predict = sys.argv[1:]
    workload = Workload(int(n_prompt), int(n_predict))
    sample = measure_here(Path(model), Path(plan), Path(mtp) if mtp else None, workload)
    print(json.dumps({"prefill_tps": sample.prefill_tps, "decode_tps": sample.decode_tps}))


if __name__ == "__main__":
    main()
