"""Rows by source: how many there are, beside those of the paper, and their licences."""

import logging
from collections.abc import Mapping

from nrt_jax.config.data import UNSTATED, DataConfig
from nrt_jax.config.tulu3 import SOURCES

log = logging.getLogger(__name__)


def licences(config: DataConfig) -> Mapping[str, str | None]:
    """The licence of each source by the name that its examples have; None where none is stated.

    Where rows name their sources these are the sources of tulu-3, and `config.licence_of` tells
    that of another.
    """
    found: dict[str, str | None] = {}
    for name, source in zip(config.source_names, config.sources, strict=True):
        found[name] = source.licence
        if source.source_field is not None:
            found |= {f"{name}/{own}".strip("/"): s.licence for own, s in SOURCES.items()}
    return found


def source_table(config: DataConfig, counts: Mapping[str, int]) -> list[str]:
    """Lines with the rows and the share of each source, the largest first.

    Beside them, where a source is one of tulu-3, stand those of the paper's Table 4, and the
    licence.
    """
    known, total = licences(config), sum(counts.values())
    of_paper = {name: SOURCES[name].table4 for name in counts if name in SOURCES}
    width, in_all = max(map(len, [*counts, "source"])), sum(s.table4 for s in SOURCES.values())
    header = f"{'source':<{width}}  {'rows':>9}  {'share':>7}"
    lines = [header + ("  Table 4    share  licence" if of_paper else "  licence")]
    for name, rows in sorted(counts.items(), key=lambda count: (-count[1], count[0])):
        line = f"{name:<{width}}  {rows:>9,}  {rows / total:>7.2%}"
        if of_paper:
            paper = of_paper.get(name)
            line += (
                f"  {'-':>7}  {'-':>7}"
                if paper is None
                else (f"  {paper:>7,}  {paper / in_all:>7.2%}")
            )
        lines.append(f"{line}  {known.get(name, config.licence) or UNSTATED}")
    return lines


def log_counts(config: DataConfig, counts: Mapping[str, int]) -> None:
    """Log the table of the numbers of examples by source, where rows name theirs."""
    if any(source.source_field is not None for source in config.sources):
        for line in source_table(config, counts):
            log.info("data: %s", line)
