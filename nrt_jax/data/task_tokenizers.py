"""The tokenizers of the built-in tasks in Hugging Face's format: a token per character or word."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from nrt_jax.data import hard_tokens
from nrt_jax.data.chain_addition import NOISE_SYMBOLS

PAD, BOS, EOS, UNKNOWN = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
THINK_START, THINK_END = "<|think_start|>", "<|think_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, THINK_START, THINK_END)
CHARACTERS = "0123456789+=\n" + NOISE_SYMBOLS


def write_quickstart_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of chain_addition: characters."""
    vocabulary = _ids(CHARACTERS)
    # A BPE model without merges splits text into characters, the line break included.
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    _write(tokenizer, directory)


def write_hard_tokens_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of hard_tokens: words between spaces."""
    # Without a decoder, tokens are joined by spaces.
    tokenizer = Tokenizer(models.WordLevel(_ids(hard_tokens.words()), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    _write(tokenizer, directory)


def _ids(tokens: str | tuple[str, ...]) -> dict[str, int]:
    return {token: i for i, token in enumerate((*SPECIAL_TOKENS, *tokens))}


def _write(tokenizer: Tokenizer, directory: Path) -> None:
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "extra_special_tokens": [THINK_START, THINK_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(settings, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
