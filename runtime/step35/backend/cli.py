"""`step35 backend`: our patches on llama.cpp's sources, and builds of them."""

from pathlib import Path

import click


@click.group()
def backend() -> None:
    """Builds llama.cpp with step35's patches, and chooses which build runs."""


# for those who work on the patches

_SDIST = click.option(
    "--sdist",
    type=click.Path(path_type=Path),
    help="The pinned llama-cpp-python's sdist, carried here; default: pip fetches it.",
)


@backend.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_SDIST
def sources(folder: Path, sdist: Path | None) -> None:
    """Puts llama.cpp's sources into FOLDER as a git repository, one commit a patch, to work on them."""
    from step35.backend.series import commit_all, read_series
    from step35.backend.sources import pristine
    from step35.backend.upstream import patches_folder

    if folder.exists():
        raise click.UsageError(f"{folder} exists; name a new folder")
    series = read_series(patches_folder())
    pristine(folder, sdist)
    commit_all(series, folder)
    click.echo(f"step35: {len(series)} patches on llama.cpp in {folder}; commit, then: step35 backend export {folder}", err=True)


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
