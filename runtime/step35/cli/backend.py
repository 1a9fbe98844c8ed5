"""`step35 backend`: builds of llama.cpp with our patches, and the patches themselves; `step35 rpc-server`."""

import os
import sys
from pathlib import Path

import click

EXAMPLES = """
\b
Examples:
  step35 backend build --cuda --arch dgx-spark
  step35 backend build --cuda --arch sm_90 --sdist llama_cpp_python-0.3.36.tar.gz
  step35 backend list
  step35 backend use stock
"""


@click.group(epilog=EXAMPLES)
def backend() -> None:
    """Builds llama.cpp with step35's patches, and chooses which build runs."""


_SDIST = click.option(
    "--sdist",
    type=click.Path(path_type=Path),
    help="The pinned llama-cpp-python's sdist, carried here; default: pip fetches it.",
)


@backend.command()
@click.option("--cuda", "target", flag_value="cuda", help="For NVIDIA GPUs; needs the CUDA toolkit.")
@click.option("--rocm", "target", flag_value="rocm", help="For AMD GPUs; needs ROCm.")
@click.option("--vulkan", "target", flag_value="vulkan", help="For any GPU with Vulkan; needs glslc and headers.")
@click.option("--metal", "target", flag_value="metal", help="For Macs; the default there.")
@click.option("--cpu", "target", flag_value="cpu", help="Without GPUs; the default elsewhere.")
@click.option(
    "--arch",
    "architectures",
    multiple=True,
    help="GPU to build for, repeatable; default the one in this box. CUDA: dgx-spark (sm_121), rtx50 (sm_120), "
    "hopper (sm_90), ada (sm_89), ampere (sm_80, sm_86); ROCm: strix-halo (gfx1151), rdna4, rdna3, mi300.",
)
@click.option("-D", "--define", "definitions", multiple=True, metavar="NAME=VALUE", help="One more setting for cmake.")
@_SDIST
@click.option(
    "-j", "--jobs", "n_jobs", type=click.IntRange(1), help="Compilers at a time; default the cores, as memory allows."
)
@click.option("--no-use", is_flag=True, help="Build it, but don't choose it.")
@click.option("--no-gpu-here", is_flag=True, help="It is for another box: pass the self-test without a GPU.")
def build(target, architectures, definitions, sdist, n_jobs, no_use, no_gpu_here) -> None:
    """Builds the pinned llama.cpp with the patches and its RPC backend, tests it, and chooses it.

    Without an option for a GPU it is what the stock wheel is. Builds for GPUs have not been tried by those who
    wrote this.
    """
    from functools import partial

    from step35.backend.build import Wanted, this_box
    from step35.backend.build import build as make
    from step35.backend.check import self_test
    from step35.backend.upstream import patches_folder
    from step35.native import builds

    if not target and Path("/proc/driver/nvidia/version").exists():
        click.echo("step35: this box has an NVIDIA driver; --cuda builds for its GPU", err=True)
    wanted = Wanted(target or "", architectures, _pairs(definitions), sdist, n_jobs or 0)
    made = make(wanted, this_box(), patches_folder(), _say, partial(self_test, needs_gpu=not no_gpu_here))
    if not no_use:
        builds.use(made.name)
        click.echo("step35: chosen; step35 backend use stock takes it back", err=True)
    click.echo(made.name)


def _pairs(definitions: tuple[str, ...]) -> dict[str, str]:
    for text in definitions:
        if not text.partition("=")[1]:
            raise click.UsageError(f"-D expected NAME=VALUE, got {text!r}")
    return dict(text.split("=", 1) for text in definitions)


def _say(line: str) -> None:
    """Tells a step; a compiler's progress stays on one line, and only a terminal sees it."""
    is_progress, is_terminal = line.startswith("["), sys.stderr.isatty()
    if is_terminal:
        click.echo(f"\r\033[K{line[:100] if is_progress else f'step35: {line}'}", err=True, nl=not is_progress)
    elif not is_progress:
        click.echo(f"step35: {line}", err=True)


@backend.command("list")
def list_() -> None:
    """Lists the builds; * is the chosen one."""
    from step35.native import builds

    chosen = builds.chosen_name()
    rows = [(builds.STOCK, "llama-cpp-python's own"), *((build.name, build.about) for build in builds.builds())]
    for name, about in rows:
        click.echo(f"{'*' if name == chosen else ' '} {name}  {about}")
    if chosen not in [name for name, _ in rows]:
        click.echo(f"* {chosen}  gone; step35 backend use stock, or build it again")


@backend.command()
@click.argument("name")
def use(name: str) -> None:
    """Chooses the build NAME, or `stock`, for all that starts from now on."""
    from step35.native import builds

    builds.use(name)


@backend.command()
@click.argument("name")
def remove(name: str) -> None:
    """Deletes the build NAME."""
    from step35.native import builds

    builds.remove(name)


@click.command("rpc-server")
@click.option("-H", "--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option("-p", "--port", type=click.IntRange(1, 65535), default=50052, show_default=True)
@click.option("-c", "--cache", is_flag=True, help="Keep the weights on this disk, so that they travel once.")
@click.option("-d", "--device", help="ggml's names of the devices to lend, with commas; default all GPUs.")
@click.option("-t", "--threads", type=click.IntRange(1), help="For the CPU, where it is what is lent.")
def rpc_server(host, port, cache, device, threads) -> None:
    """Lends this box to another one: runs llama.cpp's rpc-server of the chosen build.

    On the other box: step35 plan MODEL --rpc HOST:PORT --out plan.yaml, and run that plan. Whoever reaches the port can
    do as they like with this process: open it to a trusted network only.
    """
    from step35.native.builds import server_program

    program = server_program()
    command = [str(program), "--host", host, "--port", str(port), *(["--cache"] if cache else [])]
    command += ["--device", device] if device else []
    command += ["--threads", str(threads)] if threads else []
    os.execv(program, command)


# for those who work on the patches


@backend.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_SDIST
def sources(folder: Path, sdist: Path | None) -> None:
    """Puts llama.cpp's sources into FOLDER as a git repository, one commit a patch, to work on them."""
    from step35.backend.series import commit_all, read_series
    from step35.backend.sources import pristine
    from step35.backend.upstream import patches_folder, read_upstream

    if folder.exists():
        raise click.UsageError(f"{folder} exists; name a new folder")
    series = read_series(patches_folder())
    pristine(read_upstream(patches_folder()), folder, sdist)
    commit_all(series, folder)
    click.echo(
        f"step35: {len(series)} patches on llama.cpp; commit there, then step35 backend export {folder}", err=True
    )


@backend.command()
@click.argument("tree", type=click.Path(path_type=Path))
def apply(tree: Path) -> None:
    """Applies the patches to a TREE of the pinned llama.cpp; those that are in it already are left alone."""
    from step35.backend.series import apply as apply_series
    from step35.backend.series import read_series
    from step35.backend.upstream import patches_folder

    series = read_series(patches_folder())
    new = apply_series(series, tree)
    for patch in series:
        click.echo(f"{'applied' if patch.name in new else 'already applied'}  {patch.name}")


@backend.command()
@click.argument("tree", type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="A folder of patches; default this checkout's patches/.")
def export(tree: Path, to: Path | None) -> None:
    """Writes the commits of a TREE made by `sources` as patches and series."""
    from step35.backend.series import export as export_series
    from step35.backend.series import write_series
    from step35.backend.upstream import patches_folder

    series = export_series(tree)
    write_series(series, to or patches_folder())
    for patch in series:
        click.echo(patch.name)
