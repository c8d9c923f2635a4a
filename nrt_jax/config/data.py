"""The `data` section: questions and reference answers, and how they become tokens."""

import math
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nrt_jax.config.hard_tokens import HardTokensConfig
from nrt_jax.config.load import MOST_TOKENS, CacheFolder, ConfigPath, Section
from nrt_jax.config.rows import (
    CONVERSATIONS,
    GENERATORS,
    Benchmarks,
    DataPaths,
    MixturePart,
    RowsConfig,
)
from nrt_jax.config.tulu3 import SOURCES, TABLE4

UNSTATED = "unstated"
"""In data.exclude_licences, what no licence is stated for."""


class ChainConfig(Section):
    """The built-in task: a chain of additions modulo a small number."""

    digits: int = Field(default=7, ge=2, le=100)
    """Digits that a question adds up."""
    modulus: int = Field(default=5, ge=2, le=10)
    """Digits are below it, and the answer is their sum modulo it."""
    rows: int = Field(default=100_000, ge=1, le=2**31 - 1)
    """Training rows of an epoch; each is generated when it is read."""
    totals_rows: int = Field(default=0, ge=0)
    """chain_documents: number of first rows that show only running totals (a curriculum)."""
    totals_share: float = Field(default=0.3, ge=0, le=1)
    """chain_documents: share of documents that show the running totals."""
    nothing_share: float = Field(default=0.3, ge=0, le=1)
    """chain_documents: share with nothing between question and answer."""
    noise_share: float = Field(default=0.2, ge=0, le=1)
    """chain_documents: share with random symbols."""
    copy_share: float = Field(default=0.2, ge=0, le=1)
    """chain_documents: share with a copied part of the question."""

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "ChainConfig":
        shares = (self.totals_share, self.nothing_share, self.noise_share, self.copy_share)
        if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"totals_share, nothing_share, noise_share and copy_share sum to {sum(shares):g}; "
                "they must sum to 1"
            )
        return self


class DataConfig(RowsConfig):
    """Where questions and reference answers come from, and how they become tokens."""

    mixture: tuple[MixturePart, ...] = ()
    """Several sources instead of path: each with a name, either a weight or a number of rows, and
    the keys of this table from source to strip_suffixes."""
    eval_path: DataPaths = None
    """Evaluation files, named as in path and read as its rows are; without them, eval_rows
    questions are held out of the training rows."""
    eval_rows: int = Field(default=1024, ge=0)
    """Evaluation questions: held out of path by seed, drawn by seed from eval_path (all of it when
    it has fewer), or generated (the same ones for every seed)."""
    eval_split: str | None = None
    """tfds and hub: the split of eval_path; null: that of split."""
    permutation_seed: int | None = Field(default=None, ge=0)
    """Permute all rows of path, before any is left out, by
    numpy.random.default_rng(permutation_seed): without eval_path the first eval_rows of them
    evaluate, and the others train in this order. That is train_test_split of the library datasets.
    null: the order of path."""
    total_rows: int | None = Field(default=None, ge=1)
    """With permutation_seed: how many rows path must have, since another number gives another
    permutation; null: they are counted."""
    train_rows: int | None = Field(default=None, ge=1)
    """With permutation_seed: how many usable rows are trained on, the first in the permuted order;
    null: all of them. As many rows are read as suffice when max_bad_share of them cannot be
    used."""
    source_rows: dict[str, Annotated[int, Field(ge=0)]] | Literal["tulu3_table4"] | None = None
    """With permutation_seed and source_field: how many usable rows of each source are trained on,
    the first of each in the permuted order; tulu3_table4: the counts of the paper's Table 4."""
    exclude_licences: tuple[str, ...] = ()
    """Sources with these licences are left out, unstated those without one: parts of mixture by
    their licence, and with source_field the sources of tulu-3 by that of its card."""
    template: Literal["plain", "tulu", "tokenizer"] = "plain"
    """plain: the prompt is the question, unchanged; tulu: the chat format of tulu-3; tokenizer: the
    chat template of the tokenizer's directory."""
    template_file: ConfigPath | None = None
    """Jinja file whose chat template replaces the one that `template` names."""
    add_bos: bool = True
    """Start prompts with the beginning-of-sequence token, if the tokenizer has one. Where a chat
    template writes the token, no second one is added; false removes it."""
    tokenizer: ConfigPath | None = None
    """Directory with tokenizer.json and tokenizer_config.json; null for the model's own."""
    think_start: str = "<|think_start|>"
    """Special token that opens the reasoning trace. A name that the tokenizer lacks goes to one of
    its reserved tokens, or else to a new token."""
    think_end: str = "<|think_end|>"
    """Special token that closes the reasoning trace; chosen as think_start is."""
    max_prompt_tokens: int = Field(default=4096, ge=1, le=MOST_TOKENS)
    """Rows with a longer prompt (beginning-of-sequence token included) are bad rows."""
    max_answer_tokens: int = Field(default=4093, ge=2, le=MOST_TOKENS)
    """Rows with a longer answer (end-of-sequence token included) are bad rows."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """Bad rows are counted and skipped up to this share of a file; beyond it the run stops."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Training rows with the prompt and the answer of an earlier one, white space at their ends
    aside: drop leaves them out, keep trains on them; both count them."""
    contamination: Benchmarks = ()
    """Benchmarks whose questions are left out of training: files, or mappings with the keys of this
    table from source to strip_suffixes."""
    contamination_ngram: int = Field(default=8, ge=1, le=100)
    """Words of a run that a prompt and a benchmark question must share to count. A shorter question
    matches only a prompt that asks it alone."""
    contamination_share: float = Field(default=0.5, ge=0, lt=1)
    """A row is left out when more than this share of a benchmark question's words stands in shared
    runs. 8 words and 0.5 are the rule of tulu-3; 13 and 0 that of GPT-3."""
    leave_out: ConfigPath | None = None
    """JSON Lines with the file and row of training rows to leave out, such as `nrt-jax data
    deduplicate` writes."""
    shuffle: bool = True
    """Shuffle the rows anew for every epoch; false keeps the order of the source."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of held-out rows, generated rows and shuffling."""
    cache: CacheFolder = "auto"
    """Folder where files of more than 16 MB in all, and data sets of the hub, are kept as prepared
    data for later runs: the first start tokenises them, the next ones read the tokens. auto for
    nrt_jax/data in the user's cache folder (XDG_CACHE_HOME, else ~/.cache); off: every start
    tokenises all rows and keeps them in memory."""
    read_threads: int = Field(default=2, ge=0, le=64)
    """Threads that read the next batches while a step runs, as many batches ahead; 0: a batch is
    read when its step begins."""
    chain: ChainConfig = ChainConfig()
    """Settings of chain_addition and chain_documents."""
    hard_tokens: HardTokensConfig = HardTokensConfig()
    """Settings of hard_tokens and hard_documents."""

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> "DataConfig":
        if self.mixture:
            self._check_mixture()
        elif self.path is None and self.source not in GENERATORS:
            named = "no source" if self.source is None else f"source '{self.source}'"
            raise ValueError(f"{named} needs a file; set data.path")
        if self.generated and (self.contamination or self.leave_out):
            raise ValueError(
                f"contamination and leave_out filter the rows of files and source '{self.source}' "
                "generates its rows; leave them out"
            )
        if self.template == "plain" and self.template_file is not None:
            raise ValueError(
                f"template_file={self.template_file} is a chat template and template 'plain' has "
                "none; set data.template=tokenizer"
            )
        curriculum, first_rows = {
            "chain_documents": ("chain.totals_rows", self.chain.totals_rows),
            "hard_documents": ("hard_tokens.worked_rows", self.hard_tokens.worked_rows),
        }.get(str(self.source), ("", 0))
        if first_rows and self.shuffle:
            raise ValueError(
                f"{curriculum}={first_rows} is a curriculum and needs the order of the source; "
                "set data.shuffle=false"
            )
        self._check_choice_of_rows()
        for part in (self, *self.mixture):
            if self.template == "plain" and part.preset in CONVERSATIONS:
                raise ValueError(
                    f"preset={part.preset} makes conversations and template 'plain' has no turns; "
                    "set data.template=tulu, or tokenizer for an instruct model"
                )
        return self

    def _check_choice_of_rows(self) -> None:
        if self.permutation_seed is not None and (self.mixture or self.generated):
            named = "a mixture draws" if self.mixture else f"source '{self.source}' generates"
            raise ValueError(
                f"permutation_seed={self.permutation_seed} permutes the rows of path, and {named} "
                "its own; leave it out"
            )
        for name in ("total_rows", "train_rows", "source_rows"):
            if getattr(self, name) is not None and self.permutation_seed is None:
                raise ValueError(f"{name} counts rows in a permuted order; set permutation_seed")
        if self.source_rows is not None and self.source_field is None:
            raise ValueError("source_rows counts rows by their source; set source_field")
        if self.exclude_licences and self.source_field is None and not self.mixture:
            raise ValueError("exclude_licences leaves sources out; set source_field or a mixture")
        if self.source_rows is not None and self.train_rows not in (None, self.rows_in_all):
            raise ValueError(
                f"train_rows={self.train_rows} and source_rows, which has {self.rows_in_all} rows "
                "in all, differ; leave one out"
            )
        if self.eval_split is not None and self.eval_path is None:
            raise ValueError(
                f"eval_split={self.eval_split} is a split of eval_path; set eval_path, also where "
                "it is the same as path"
            )

    @field_validator("exclude_licences")
    @classmethod
    def _licences_that_are_known(cls, names: tuple[str, ...], info: Any) -> tuple[str, ...]:
        parts, of_rows = info.data.get("mixture", ()), info.data.get("source_field") is not None
        stated = [info.data.get("licence"), *(part.licence for part in parts)]
        if of_rows or any(part.source_field for part in parts):
            stated += [source.licence for source in SOURCES.values()]
        known = sorted({licence for licence in stated if licence is not None} | {UNSTATED})
        for name in names:
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.5)
                meant = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}"
                raise ValueError(f"{name}: no source has this licence; {meant}")
        return names

    def _check_mixture(self) -> None:
        if self.path is not None or self.source in GENERATORS:
            raise ValueError("mixture and path both name training rows; leave one out")
        if not self.parts:
            raise ValueError("exclude_licences leaves no source of mixture; keep one")
        names = [part.name for part in self.mixture]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"mixture has two sources of the name {twice[0]}; rename one")
        weighted = [part for part in self.mixture if part.weight is not None]
        if weighted and len(weighted) < len(names):
            raise ValueError(
                "some sources of mixture have a weight and others none; give every one a weight, "
                "or each its number of rows"
            )

    @property
    def rows_by_source(self) -> dict[str, int] | None:
        """How many rows of each source are trained on, where source_rows says it."""
        counts = self.source_rows
        if counts == TABLE4:
            counts = {name: source.table4 for name, source in SOURCES.items()}
        assert not isinstance(counts, str), counts
        return counts and {name: rows for name, rows in counts.items() if not self.excludes(name)}

    @property
    def rows_in_all(self) -> int | None:
        """How many rows are trained on; None for all of them."""
        by_source = self.rows_by_source
        return self.train_rows if by_source is None else sum(by_source.values())

    def licence_of(self, name: str) -> str | None:
        """The licence of what source_field names; None where none is stated."""
        return SOURCES[name].licence if name in SOURCES else self.licence

    def excludes(self, name: str) -> bool:
        """Whether the licence of what source_field names is excluded."""
        return (self.licence_of(name) or UNSTATED) in self.exclude_licences

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The parts of the mixture whose licences are not excluded."""
        excluded = self.exclude_licences
        return tuple(part for part in self.mixture if (part.licence or UNSTATED) not in excluded)

    @property
    def reads_every_row(self) -> bool:
        """Whether no training row is passed over before it is read."""
        return self.permutation_seed is None and not self.exclude_licences

    @property
    def generated(self) -> bool:
        """Whether the rows come from a built-in generator."""
        return self.source in GENERATORS

    @property
    def generated_rows(self) -> int:
        """How many training rows an epoch of a built-in generator has."""
        hard = self.source in ("hard_tokens", "hard_documents")
        return self.hard_tokens.rows if hard else self.chain.rows

    @property
    def location(self) -> str:
        """Where the training rows come from, in one name; of a mixture the names of its sources."""
        if self.mixture:
            return " + ".join(self.source_names)
        return super().location

    def short_location(self, parts: int) -> str:
        """`location` with the last `parts` parts of each path."""
        if self.mixture or self.path is None:
            return self.location
        paths = self.path if isinstance(self.path, tuple) else (self.path,)
        return ", ".join("/".join(str(path).split("/")[-parts:]) for path in paths)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources of a mixture, or one empty name."""
        return tuple(part.name for part in self.parts) or ("",)

    @property
    def sources(self) -> "tuple[DataConfig, ...]":
        """The config of each source alone: the parts of a mixture, or the config itself."""
        if not self.mixture:
            return (self,)
        return tuple(
            self.model_copy(
                update={"mixture": (), **{k: getattr(part, k) for k in RowsConfig.model_fields}}
            )
            for part in self.parts
        )
