"""Small tokenizers of the kinds that checkpoints have, trained on the spot."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

MULTILINGUAL = [
    "Natalia sold clips to 48 of her friends in April.",
    "  two  spaces,\ttab\nand a line\r\n\n",
    "Die Straße über die Brücke – für 3,50 € – ist gesperrt.",
    "Съешь же ещё этих мягких французских булок",
    "数学的な推論を学習する。 今日は良い天気です。",
    "한국어 문장도 있습니다",
    "مرحبا بالعالم، كيف حالك؟",
    "नमस्ते दुनिया",
    "Ünïcödé é vs é, ﬁ ligature, \u200bzero width",
    "🙂👩‍👩‍👧‍👦 \x00\x07 \U0001f9ff",
    "def f(x):\n    return {'a': x ** 2}  # ▁meta",
    "∫₀¹ x² dx = ⅓ ≠ √2",
]
CORPUS = [*MULTILINGUAL, "the user asks the assistant a question and it answers it in words"] * 3
KINDS = ("llama3", "prepend", "first", "always")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(8)),
)
SENTENCEPIECE_SPECIALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


def save(backend: tokenizers.Tokenizer, directory: Path, **settings) -> Path:
    """A tokenizer directory that AutoTokenizer reads as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_made_tokenizer(kind: str, directory: Path) -> Path:
    """llama3: byte-level; the others as from sentencepiece, by where they put a first space."""
    if kind == "llama3":
        return _write_llama3(directory)
    backend = tokenizers.Tokenizer(_sentencepiece_model())
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SENTENCEPIECE_SPECIALS])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(backend, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _write_llama3(directory: Path) -> Path:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in LLAMA3_SPECIALS])
    bos = (LLAMA3_SPECIALS[0], backend.token_to_id(LLAMA3_SPECIALS[0]))
    backend.post_processor = Sequence(
        [
            ByteLevel(trim_offsets=False),
            TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos]),
        ]
    )
    described = {
        str(i): {
            "content": token.content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in backend.get_added_tokens_decoder().items()
    }
    return save(
        backend,
        directory,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        added_tokens_decoder=described,
        additional_special_tokens=list(LLAMA3_SPECIALS[2:]),
    )


@cache
def _sentencepiece_model() -> models.BPE:
    """Special tokens, the 256 bytes, then pieces and merges: the order of sentencepiece."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, min_frequency=2, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    first = [*SENTENCEPIECE_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate([*first, "▁▁", *pieces])}
    merges = [*map(tuple, model["merges"]), ("▁", "▁")]
    return models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
