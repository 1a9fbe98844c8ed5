"""Runs upstream's convert_hf_to_gguf.py, unchanged on disk, with the two patches it needs here.

usage: upstream_convert.py LLAMA_CPP_FOLDER [arguments of convert_hf_to_gguf.py ...]

- AutoConfig of transformers 5 knows `step3p5` and renames its fields, and the converter dies with
  KeyError 'num_attention_groups'. Refusing makes it take its own way out: config.json as data.
- The pre-tokenizer is found by the hash of a sample text, which fits one vocabulary only. Our
  small vocabulary splits text as DeepSeek-V3's does, so that name is given.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any


class NoAutoConfig:
    """Stands for transformers' AutoConfig and knows no model."""

    @staticmethod
    def from_pretrained(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("read config.json as data")


def main() -> None:
    llama_cpp, *arguments = sys.argv[1:]
    sys.path[:0] = [str(Path(llama_cpp) / "gguf-py"), llama_cpp]
    base = _upstream("conversion.base")
    base.AutoConfig = NoAutoConfig
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    _upstream("convert_hf_to_gguf").main()


def _upstream(name: str) -> Any:
    """A module of the folder that stands first on the path now."""
    return import_module(name)


if __name__ == "__main__":
    main()
