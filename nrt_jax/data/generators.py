"""The rows of the built-in tasks, by `data.source`."""

from nrt_jax.config.data import DataConfig
from nrt_jax.data import chain_addition, hard_tokens
from nrt_jax.types import Example


def generate_row(config: DataConfig, index: int) -> Example:
    """Training row `index` of a built-in task."""
    match config.source:
        case "chain_addition":
            return chain_addition.addition(config.chain, config.seed, index)
        case "chain_documents":
            return chain_addition.document(config.chain, config.seed, index)
        case "hard_tokens":
            return hard_tokens.row(config.hard_tokens, config.seed, index)
    assert config.source == "hard_documents", config.source
    return hard_tokens.document(config.hard_tokens, config.seed, index)


def generate_evaluation(config: DataConfig) -> list[Example]:
    """`data.eval_rows` different held-out examples, the same ones for every seed.

    Raises InputError when the task has too few.
    """
    documents = config.source in ("chain_documents", "hard_documents")
    if config.source in ("chain_addition", "chain_documents"):
        return chain_addition.evaluation_examples(
            config.chain, config.eval_rows, documents=documents
        )
    return hard_tokens.evaluation_examples(
        config.hard_tokens, config.eval_rows, documents=documents
    )
