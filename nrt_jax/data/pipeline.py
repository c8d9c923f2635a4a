"""Rows → tokenised examples → endless shuffled batches that resume exactly."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import grain
import numpy as np

from nrt_jax.data import chain_addition
from nrt_jax.data.bad_rows import BadRow, BadRows, shorten
from nrt_jax.data.chat_template import Rendered, render
from nrt_jax.data.config import DataConfig
from nrt_jax.data.sources import Row, read_rows
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.records import Example, TokenizedExample

ROWS_PER_SLICE = 4096
IN_EVALUATION = "question of the evaluation"


@dataclass(frozen=True)
class Dataset:
    """What a run trains and evaluates on; no question is in both."""

    train: Sequence[TokenizedExample]
    eval: list[TokenizedExample]
    bad_rows: dict[str, int]
    """Rows left out by reason, among them training rows that ask a question of the evaluation."""


def load_dataset(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Read, check and tokenise the config's data; generated rows are made when asked for.

    Raises InputError for files that cannot be read and for too many bad rows.
    """
    if config.source in ("chain_addition", "chain_documents"):
        return _generated(config, tokenizer)
    assert config.path is not None, "DataConfig requires a path for file sources"
    train, bad_rows = _read_file(config.path, config, tokenizer)
    if config.eval_path is None:
        evaluation = _hold_out(train, config)
    else:
        evaluation, eval_bad_rows = _read_file(config.eval_path, config, tokenizer)
        bad_rows += eval_bad_rows
        order = np.random.default_rng(config.seed).permutation(len(evaluation))
        evaluation = [evaluation[i] for i in order[: config.eval_rows]]
    questions = {example.example.question for example in evaluation}
    kept = [example for example in train if example.example.question not in questions]
    # With an evaluation file they are an overlap worth reporting; held-out rows are none.
    overlap = len(train) - len(kept) - (len(evaluation) if config.eval_path is None else 0)
    if overlap:
        bad_rows[IN_EVALUATION] = overlap
    if not kept:
        raise InputError(
            f"{config.path}: every row asks a question of data.eval_path={config.eval_path}; "
            "give different questions to train on"
        )
    return Dataset(kept, evaluation, dict(bad_rows))


def tokenize_prompt(question: str, config: DataConfig, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of the prompt x that a row with this question has, int32; its row needs no answer.

    Raises InputError for a question that would make the row a bad one, and for one with characters
    that the tokenizer cannot spell.
    """
    fields = {config.question_field: question, config.answer_field: "any"}
    try:
        texts = render(fields, config).prompt
        ids = tokenizer.encode_batch(texts)
        _check_controls(texts, ids, tokenizer)
        prompt = _join_prompt(texts, ids, config, tokenizer)
    except BadRow as bad:
        raise InputError(bad.detail) from bad
    if tokenizer.unk_id is not None and tokenizer.unk_id in prompt:
        unknown = [c for c in dict.fromkeys(question) if tokenizer.unk_id in tokenizer.encode(c)]
        raise InputError(
            f"the prompt {shorten(question)} has characters that the tokenizer cannot spell "
            f"({shorten(''.join(unknown))}); use those of its vocabulary"
        )
    return np.array(prompt, np.int32)


class BatchIterator:
    """Endless batches of exactly `batch_size` examples.

    Every epoch has each example once, in an order of its own when shuffled; batches run on across
    the end of an epoch, so none is short and no example is dropped. A batch as large as the data
    would repeat examples, which is an InputError.
    """

    def __init__(
        self, examples: Sequence[TokenizedExample], batch_size: int, shuffle: bool, seed: int
    ):
        assert batch_size >= 1, batch_size
        if len(examples) < batch_size:
            raise InputError(
                f"a batch of {batch_size} prompts needs as many training rows, and the data has "
                f"{len(examples)}; lower the batch size or add rows"
            )
        self._identity = {
            "rows": len(examples),
            "batch_size": batch_size,
            "shuffle": shuffle,
            "seed": seed,
        }
        rows = grain.MapDataset.source(examples)
        if shuffle:
            # Grain's epoch e takes the order of seed + e: near seeds must not share their epochs.
            spread_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
            rows = rows.shuffle(seed=spread_seed)
        # Endless, so nothing is dropped; the other way of counting batches overflows at size 1.
        batches = rows.repeat().batch(batch_size, drop_remainder=True, batch_fn=list)
        # Rows are ready or cheap to make: threads would only add latency and nondeterminism.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._batches = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> Iterator[list[TokenizedExample]]:
        return self

    def __next__(self) -> list[TokenizedExample]:
        return next(self._batches)

    def get_state(self) -> dict:
        """The position, as JSON: what set_state needs to go on with the very next batch."""
        return {**self._identity, "position": self._batches.get_state()}

    def set_state(self, state: dict) -> None:
        """Go to a saved position; InputError when it was saved over other data or batches."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise InputError(
                    f"the saved data position has {name}={state.get(name)}, this run has "
                    f"{name}={value}; continue with the data and batch settings of the saved run"
                )
        self._batches.set_state(state["position"])


# --- files ---------------------------------------------------------------------------------------


def _read_file(
    path: Path, config: DataConfig, tokenizer: Tokenizer
) -> tuple[list[TokenizedExample], Counter[str]]:
    bad_rows = BadRows(str(path))
    examples: list[TokenizedExample] = []
    rows = read_rows(config.source, path)
    while rows_of_slice := list(islice(rows, ROWS_PER_SLICE)):
        examples += _tokenize_rows(rows_of_slice, bad_rows, config, tokenizer)
    bad_rows.check(len(examples), config.max_bad_share)
    return examples, bad_rows.counts


def _hold_out(examples: list[TokenizedExample], config: DataConfig) -> list[TokenizedExample]:
    """Evaluation examples drawn by seed, one a question."""
    order = np.random.default_rng(config.seed).permutation(len(examples))
    by_question: dict[str, TokenizedExample] = {}
    for i in order:
        by_question.setdefault(examples[i].example.question, examples[i])
    if config.eval_rows >= len(by_question):
        raise InputError(
            f"{config.path}: data.eval_rows={config.eval_rows} leaves none of its "
            f"{len(by_question)} questions to train on; lower it or set data.eval_path"
        )
    return list(by_question.values())[: config.eval_rows]


def _tokenize_rows(
    rows: Iterable[Row], bad_rows: BadRows, config: DataConfig, tokenizer: Tokenizer
) -> Iterator[TokenizedExample]:
    rendered: list[tuple[Row, Rendered]] = []
    for row in rows:
        try:
            if isinstance(row.fields, BadRow):
                raise row.fields
            rendered.append((row, render(row.fields, config)))
        except BadRow as bad:
            bad_rows.add(row.number, row.place, bad)
    texts = chain.from_iterable((*text.prompt, text.answer) for _, text in rendered)
    encoded = iter(tokenizer.encode_batch(list(texts)))
    for row, text in rendered:
        ids = list(islice(encoded, len(text.prompt) + 1))
        try:
            yield _to_example(row.number, text, ids, config, tokenizer)
        except BadRow as bad:
            bad_rows.add(row.number, row.place, bad)


# --- generators ----------------------------------------------------------------------------------


class _GeneratedExamples(Sequence):
    """The training rows of a built-in task, by index."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config = config
        self._tokenizer = tokenizer
        documents = config.source == "chain_documents"
        self._generate = chain_addition.document if documents else chain_addition.addition

    def __len__(self) -> int:
        return self._config.chain.rows

    def __getitem__(self, index: int) -> TokenizedExample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = self._generate(self._config.chain, self._config.seed, int(index))
        return _tokenize_generated(example, self._config, self._tokenizer)


def _generated(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
    documents = config.source == "chain_documents"
    held_out = chain_addition.evaluation_examples(
        config.chain, config.eval_rows, documents=documents
    )
    evaluation = [_tokenize_generated(example, config, tokenizer) for example in held_out]
    return Dataset(_GeneratedExamples(config, tokenizer), evaluation, {})


def _tokenize_generated(
    example: Example, config: DataConfig, tokenizer: Tokenizer
) -> TokenizedExample:
    fields = {config.question_field: example.question, config.answer_field: example.answer}
    text = render(fields, config)
    ids = tokenizer.encode_batch([*text.prompt, text.answer])
    try:
        return _to_example(example.index, text, ids, config, tokenizer)
    except BadRow as bad:
        raise InputError(f"data.source={config.source}: {bad.detail}") from bad


# --- ids -----------------------------------------------------------------------------------------


def _to_example(
    index: int, text: Rendered, ids: list[list[int]], config: DataConfig, tokenizer: Tokenizer
) -> TokenizedExample:
    """Join the ids of a row's texts with its control tokens; BadRow when they break a rule."""
    *pieces, answer = ids
    answer = [*answer, tokenizer.eos_id]
    _check_controls((*text.prompt, text.answer), ids, tokenizer)
    _check_spelling(text.answer, ids[-1], tokenizer)
    prompt = _join_prompt(text.prompt, pieces, config, tokenizer)
    _check_length("answer", len(answer), config.max_answer_tokens, text.answer)
    question = tokenizer.token(tokenizer.eos_id).join(text.prompt)
    return TokenizedExample(
        example=Example(index, question, text.answer),
        prompt_tokens=np.array(prompt, np.int32),
        answer_tokens=np.array(answer, np.int32),
    )


def _join_prompt(
    texts: Sequence[str], pieces: list[list[int]], config: DataConfig, tokenizer: Tokenizer
) -> list[int]:
    bos = tokenizer.bos_id if config.add_bos else None
    prompt = [] if bos is None else [bos]
    for i, piece in enumerate(pieces):
        prompt += [tokenizer.eos_id, *piece] if i else piece
    _check_length("prompt", len(prompt), config.max_prompt_tokens, "".join(texts))
    return prompt


def _check_controls(texts: Sequence[str], ids: list[list[int]], tokenizer: Tokenizer) -> None:
    for content, content_ids in zip(texts, ids, strict=True):
        control = tokenizer.control_in(content_ids)
        if control is not None:
            raise BadRow(
                "spells a control token", f"{shorten(content)} spells {control}; reword the text"
            )


def _check_spelling(answer: str, ids: list[int], tokenizer: Tokenizer) -> None:
    """The model cannot learn to write what its vocabulary cannot spell."""
    if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
        raise BadRow(
            "answer not in the vocabulary",
            f"the answer {shorten(answer)} has characters that the tokenizer cannot spell; "
            "use another tokenizer or drop the row",
        )


def _check_length(what: str, length: int, limit: int, text: str) -> None:
    if length > limit:
        raise BadRow(
            f"{what} too long",
            f"the {what} {shorten(text)} has {length} tokens, more than "
            f"data.max_{what}_tokens={limit}; raise it or shorten the row",
        )
