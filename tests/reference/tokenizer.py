"""Train the tiny checkpoint's tokenizer: byte-level BPE with DeepSeek-V3's pre-tokenization and Step's tokens."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IM_START, IM_END, IM_PATCH = "<|im_start|>", "<|im_end|>", "<im_patch>"
CONTROL = [IM_START, IM_PATCH, IM_END]
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

N_USED = 2040  # of 2048 embedding rows: the real checkpoint has unused rows at its end as well

# The three splits of llama.cpp's `deepseek-v3` pre-tokenizer, in order.
SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """BPE of N_USED tokens: BOS, EOS and PAD first, then the base vocabulary, then Step's own tokens."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, _trainer())
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP])
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A {BOS}:1 $B:1", [bos])
    return tokenizer


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token that the vocabulary has."""
    found = tokenizer.token_to_id(text)
    if found is None:
        raise KeyError(f"the tokenizer has no token {text!r}")
    return found


def _trainer() -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=N_USED - len(CONTROL) - len(MARKUP),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def tokenizer_config(tokenizer: Tokenizer, chat_template: str) -> dict:
    """The contents of tokenizer_config.json."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(i): {
                "content": token.content,
                "lstrip": False,
                "normalized": token.normalized,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "chat_template": chat_template,
    }
