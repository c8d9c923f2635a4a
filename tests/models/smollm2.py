"""A random model of the shape of SmolLM2, with its special tokens and its chat template."""

from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.data.made_tokenizers import CORPUS, save
from tests.data.templates import SMOLLM2
from tests.models.references import VARIANTS, make_model

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_small_smollm2(directory: Path) -> Path:
    """A Hugging Face directory with bfloat16 weights."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    unknown, start, end = SPECIALS
    save(backend, directory, bos_token=start, eos_token=end, unk_token=unknown)
    (directory / "chat_template.jinja").write_text(SMOLLM2)
    config = VARIANTS["smollm2"].config.to_dict() | {
        "vocab_size": backend.get_vocab_size(),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = make_model(transformers.LlamaConfig(**config))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory
