"""Duplicates and near-duplicates of training rows, found by datatrove: `nrt-jax data deduplicate`.

`stages` defines pipelines, which any executor of datatrove runs one after the other:

    exact-signatures   N tasks  a hash of each row
    exact-duplicates   1        rows of equal hashes, of which one stays
    signatures         N        MinHash signatures of the others, 14 buckets of 8 hashes of 5-grams
    buckets            14       pairs of rows that agree in a bucket
    clusters           1        rows linked by pairs, of which one stays
    left-out           N        the rows that do not stay; with data.contamination, also those of
                                benchmarks
    list               1        leave_out.jsonl, for data.leave_out

The text of a row is its turns and its answer. Two rows whose 5-grams have the Jaccard index s are
linked with the probability 1 - (1 - s^8)^14: 0.92 at 0.8, 0.36 at 0.65, 0.05 at 0.5 (arXiv
1911.00359, arXiv 2406.17557). Nothing compares the texts of linked rows.

Words stand between white space, after datatrove's simplification (lower case, no punctuation, no
accents): its own tokenizers need spaCy or NLTK. Numbers stay as they are, unlike in datatrove's
default, in which problems of arithmetic that differ in their numbers are equal. datatrove's indexer
of benchmarks needs lighteval and its filter rejects any shared n-gram; so that a row is treated
alike everywhere, `Contamination` decides here too.
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from multiprocess.forkserver import set_forkserver_preload

from nrt_jax.config.data import DataConfig
from nrt_jax.data.all_rows import library_rows
from nrt_jax.data.bad_rows import BadRow, Rejected, excerpt
from nrt_jax.data.contamination import Contamination
from nrt_jax.data.files import find_files, reaching
from nrt_jax.data.hub_rows import HubRows
from nrt_jax.data.prepared import prepared_directory
from nrt_jax.data.row_tokens import read_conversation
from nrt_jax.data.rows import Row
from nrt_jax.data.training_rows import read_source, sources_of
from nrt_jax.errors import InputError

LIST_FILE, _SETTINGS_FILE = "leave_out.jsonl", "settings.json"
# xxhash, datatrove's default, is a package more.
_SAME, _NEAR, _ASKED, _KEPT = "same", "near", "asked", "kept"
"""Parts of the list."""
_HASH = HashConfig(precision=64, hash_fc="sha1")
MINHASH = MinhashConfig(
    n_grams=5,
    num_buckets=14,
    hashes_per_bucket=8,
    norm_config=TextNormConfig(norm_numbers=False),
    hash_config=_HASH,
)


class Stage(NamedTuple):
    """One pipeline: its blocks, and the number of tasks that must run it."""

    name: str
    blocks: list[PipelineStep]
    tasks: int


def stages(
    config: DataConfig, out: Path, tasks: int, minhash: MinhashConfig = MINHASH
) -> list[Stage]:
    """The pipelines over the training rows of a config in their order; each needs those before.

    `tasks` share the rows. Which row of a cluster stays depends on their number. Raises InputError
    for data that cannot be found, and when `out` holds another work.
    """
    _claim(out, config, tasks, minhash)
    exact = ExactDedupConfig(content_getter=_text_of, hash_config=_HASH)
    work = {name: str(out / "work" / name) for name in ("exact", "same", "minhash", "pairs", "ids")}
    rows = RowReader(config)
    parts = out / "work" / "parts"
    same = _ListWriter(parts / _SAME, "duplicate", "has the text of another row, which stays")
    near = _ListWriter(parts / _NEAR, "near-duplicate", "{}")
    kept = _ListWriter(parts / _KEPT, "kept", "{}")
    asked = _ListWriter(parts / _ASKED, "question of a benchmark", "{}")
    only_first = ExactDedupFilter(work["same"], exact)
    last: list[PipelineStep] = [
        rows,
        ExactDedupFilter(work["same"], exact, exclusion_writer=same),
        MinhashDedupFilter(work["ids"], exclusion_writer=near, load_cluster_ids=True),
        _KeptOfClusters(kept),
    ]
    if config.contamination:
        last.append(_BenchmarkFilter(config, asked))
    words = _Words()
    return [
        Stage("exact-signatures", [rows, ExactDedupSignature(work["exact"], exact)], tasks),
        Stage("exact-duplicates", [ExactFindDedups(work["exact"], work["same"], exact)], 1),
        Stage(
            "signatures",
            [rows, only_first, MinhashDedupSignature(work["minhash"], minhash, words)],
            tasks,
        ),
        Stage(
            "buckets",
            [MinhashDedupBuckets(work["minhash"], work["pairs"], config=minhash)],
            minhash.num_buckets,
        ),
        Stage(
            "clusters",
            [_Cluster(work["pairs"], work["ids"], minhash, save_cluster_id=True)],
            1,
        ),
        Stage("left-out", last, tasks),
        Stage("list", [_Join(parts, out / LIST_FILE)], 1),
    ]


def deduplicate(config: DataConfig, out: Path, tasks: int) -> Counter[str]:
    """Run the stages in processes of this machine; the counts of left-out rows by reason.

    A stopped work goes on where it was. Raises InputError.
    """
    # Every stage starts processes, which would each spend a second on imports.
    set_forkserver_preload([__name__])
    for stage in stages(config, out, tasks):
        LocalPipelineExecutor(
            pipeline=stage.blocks,
            tasks=stage.tasks,
            workers=min(tasks, stage.tasks),
            logging_dir=str(out / "logs" / stage.name),
        ).run()
    with (out / LIST_FILE).open(encoding="utf-8") as file:
        return Counter(json.loads(line)["reason"] for line in file)


def _claim(out: Path, config: DataConfig, tasks: int, minhash: MinhashConfig) -> None:
    """Write what the work in `out` is made of; InputError when it holds something else."""
    if config.generated:
        raise InputError(f"data.source={config.source} generates its rows; name files")
    if (prepared := prepared_directory(config)) is not None:
        raise InputError(f"{prepared}: is prepared data; name the files that it was prepared from")
    stamps = [stamp for source in sources_of(config) for stamp in _stamps(source)]
    if config.contamination:
        Contamination(config)  # a benchmark that cannot be read is told before the work
    settings = {
        "data": config.model_dump(mode="json", exclude={"leave_out", "duplicates"}),
        "files": stamps,
        "tasks": tasks,
        "minhash": str(minhash),
    }
    content = json.dumps(settings, indent=1) + "\n"
    path = out / _SETTINGS_FILE
    if path.exists():
        if path.read_text("utf-8") != content:
            raise InputError(
                f"{out}: holds the work on other data, settings or tasks ({_SETTINGS_FILE}); name "
                "another folder, or remove it"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty and holds no such work; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")


def _stamps(source: DataConfig) -> list[list[Any]]:
    """What tells whether a source has changed: stamps of its files, or the commit on the hub."""
    library = library_rows(source, source.path)
    if isinstance(library, HubRows):
        return [[library.name, library.commit]]
    if library is None:
        assert source.path is not None, "DataConfig requires a path for file sources"
        paths = [file.path for file in find_files(source.path, source.source)]
    else:
        paths = list(library.files.values())
    return [[str(path), *_stamp(path)] for path in paths]


def _stamp(path: Any) -> tuple[int, float]:
    """Size and time of modification, which tell whether a file has changed."""
    try:
        with reaching(path):
            stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; correct data.path") from error
    if isinstance(path, Path):
        return stat.st_size, stat.st_mtime
    return stat.length, float(stat.mtime)


# --- blocks --------------------------------------------------------------------------------------


class RowReader(PipelineStep):
    """The readable training rows of a config, as documents with the id "FILE line 3"."""

    type = "📖 - READER"
    name = "rows of nrt-jax"

    def __init__(self, config: DataConfig):
        super().__init__()
        self.config = config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The rows of one task: whole files where there are enough, else every n-th row."""
        del data
        for source in sources_of(self.config):
            for row in _rows_of_task(source, rank, world_size):
                document = _document(source, row)
                if document is not None:
                    self.stat_update("documents")
                    self.update_doc_stats(document)
                    yield document


def _rows_of_task(source: DataConfig, rank: int, world_size: int) -> Iterator[Row]:
    assert source.path is not None, "DataConfig requires a path for file sources"
    # Which rows are read of a source as a whole cannot be told from one of its files.
    whole = library_rows(source, source.path) is not None or not source.reads_every_row
    files = [] if whole else find_files(source.path, source.source)
    if len(files) < world_size:
        yield from islice(read_source(source, source.path), rank, None, world_size)
        return
    for path, file_format in files[rank::world_size]:
        yield from read_source(
            source.model_copy(update={"source": file_format}),
            path if isinstance(path, Path) else str(path),
        )


def _document(source: DataConfig, row: Row) -> Document | None:
    """None for an unusable row, which training rejects."""
    if isinstance(row.fields, BadRow):
        return None
    try:
        turns, answers = read_conversation(source, row.fields)
    except BadRow:
        return None
    return Document(
        text="\n\n".join([*(turn["content"].strip() for turn in turns), answers[0].strip()]),
        id=f"{row.file} {row.place_in_file}",
        metadata={
            "file": row.file,
            "row": row.place_in_file,
            "excerpt": excerpt(row.fields),
            "turns": turns,
        },
    )


def _text_of(document: Document) -> str:
    return document.text


class _Words(WordTokenizer):
    """Words between white space, for all languages."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError("MinHash asks for words alone")


class _Cluster(MinhashDedupCluster):
    """Also names the clusters of tasks from which no row goes, which the filter would not read."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        super().run(data, rank, world_size)
        for name in self.output_folder.list_files(glob_pattern="*.clusters"):
            self.output_folder.open(name.replace(".clusters", ".remove"), "ab").close()


class _BenchmarkFilter(BaseFilter):
    """Rejects rows that ask a question of the config's benchmarks."""

    name = "💥 questions of benchmarks"

    def __init__(self, config: DataConfig, exclusion_writer: DiskWriter):
        super().__init__(exclusion_writer)
        self.config = config
        self._contamination: Contamination | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self._contamination is None:
            self._contamination = Contamination(self.config)
        found = self._contamination.find(doc.metadata["turns"])
        return True if found is None else (False, found.detail)


class _KeptOfClusters(PipelineStep):
    """Writes down the rows that stay of their clusters."""

    type = "💽 - WRITER"
    name = "📝 rows that stay"

    def __init__(self, writer: DiskWriter):
        super().__init__()
        self.writer = writer

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        del world_size
        with self.writer as writer:
            for document in data:
                if document.metadata.get("minhash_cluster_id", -1) >= 0:
                    writer.write(document, rank)
                yield document


class _ListWriter(DiskWriter):
    """Writes left-out rows as `rejected.jsonl` has them."""

    default_output_filename = "${rank}.jsonl"
    name = "📝 left-out rows"

    def __init__(self, folder: Path, reason: str, detail: str):
        super().__init__(str(folder))
        self.reason, self.detail = reason, detail

    def _default_adapter(self, document: Document) -> dict:
        known = document.metadata
        why = known.get("filter_reason", known.get("minhash_cluster_id"))
        line = Rejected(
            file=known["file"],
            row=known["row"],
            reason=self.reason,
            detail=self.detail.format(why),
            excerpt=known["excerpt"],
        )
        return line._asdict()

    def _write(self, document: dict, file_handler: IO, filename: str) -> None:
        del filename
        file_handler.write(json.dumps(document) + "\n")


class _Join(PipelineStep):
    """Joins the parts of the list, and names for each near-duplicate the row that stays."""

    type = "💽 - WRITER"
    name = "📝 list of left-out rows"

    def __init__(self, parts: Path, whole: Path):
        super().__init__()
        self.parts, self.whole = parts, whole

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        del data, rank, world_size
        kept = {line["detail"]: f"{line['file']} {line['row']}" for line in self._lines(_KEPT)}
        part = self.whole.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for name in (_SAME, _NEAR, _ASKED):
                for line in self._lines(name):
                    if name == _NEAR:
                        line["detail"] = f"is in the cluster of {kept[line['detail']]}, which stays"
                    file.write(json.dumps(line) + "\n")
        part.replace(self.whole)

    def _lines(self, name: str) -> Iterator[dict[str, str]]:
        for path in sorted((self.parts / name).glob("*.jsonl")):
            with path.open(encoding="utf-8") as file:
                yield from map(json.loads, file)
