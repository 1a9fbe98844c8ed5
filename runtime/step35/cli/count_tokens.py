"""`step35 count-tokens`: how often each token comes in texts, for convert-step35 mtp trim."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from step35.native.model import Model

PIECE = 1 << 14


@click.command("count-tokens")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", type=click.Path(path_type=Path), nargs=-1, required=True)
def count_tokens(model: Path, texts: tuple[Path, ...]) -> None:
    """Counts MODEL's tokens in TEXTS, as JSON on stdout. Only MODEL's vocabulary is loaded.

    Text like what the model reads and writes for you is best: code, conversations, the text of an imatrix.
    """
    from step35.native.model import Model
    from step35.options import ModelOptions
    from step35.planning.model_header import read_header
    from step35.yaml_file import read_text

    found: Counter[int] = Counter()
    vocabulary = Model(ModelOptions(model, vocab_only=True), read_header(model).draft_vocabulary)
    try:
        for path in texts:
            for tokens in tokenized(vocabulary, read_text(path)):
                found.update(tokens)
        counts = [found[token] for token in range(vocabulary.n_vocab)]
    finally:
        vocabulary.close()
    click.echo(json.dumps({"n_tokens": found.total(), "counts": counts}))


def tokenized(vocabulary: "Model", text: str) -> Iterator[list[int]]:
    """Yields the tokens of the text's pieces; all cores work, since one tokenizes 1.5 MB a second."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(
            lambda piece: vocabulary.tokenize(piece.encode(), add_bos=False, parse_special=True), pieces(text)
        )


def pieces(text: str) -> Iterator[str]:
    """Yields the text in pieces of whole lines: llama.cpp takes long over long texts."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + PIECE) + 1 or len(text)
        yield text[at:end]
        at = end
