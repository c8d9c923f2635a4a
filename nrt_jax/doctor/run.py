"""All checks in order, of this process and of the others."""

import json
from collections.abc import Iterator, Sequence

from nrt_jax import distributed
from nrt_jax.config.compilation import CompilationConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.doctor import folders, host
from nrt_jax.doctor.finding import Finding, first_wrong, table
from nrt_jax.errors import RunFailed


def examine(config: RunConfig | None, *, cpu_asked: bool) -> list[Finding]:
    """Every finding on this machine, in the order in which a user mends them."""
    found = [host.versions(), host.environment()]
    found.append(host.accelerators(host.look(cpu_asked=cpu_asked)))
    if found[-1].remedy is None:
        # jax would print what the line above says, or wait for a TPU that is not there.
        from nrt_jax.doctor.devices import check_devices

        found += check_devices()
    found += check_folders(config)
    return found


def check_folders(config: RunConfig | None) -> Iterator[Finding]:
    """The cache, and what the config names."""
    yield folders.check_cache(CompilationConfig() if config is None else config.compilation)
    if config is None:
        return
    model, weights = folders.check_model(config)
    yield model
    yield folders.check_tokenizer(config)
    yield folders.check_data(config.data)
    if any(not source.generated for source in config.data.sources):
        yield folders.check_data_cache(config.data)
    yield folders.check_run_dir(config, weights)


def shown(found: Sequence[Finding], *, as_json: bool) -> list[str]:
    """Lines to print."""
    if not as_json:
        return table(found)
    wrong = first_wrong(found)
    name = None if wrong is None else wrong.name
    lines = {"first_wrong": name, "findings": [finding.to_json() for finding in found]}
    return [json.dumps(lines, indent=1)]


def of_all(found: Sequence[Finding]) -> list[Finding]:
    """The findings of process 0, and the first that is wrong in each other process."""
    wrong = first_wrong(found)
    theirs = distributed.gather("the doctor", None if wrong is None else list(wrong[:3]))
    merged = list(found)
    for process, other in enumerate(theirs):
        if process != distributed.process_index() and other is not None:
            finding = Finding(*other)
            merged.append(finding._replace(name=f"process {process}: {finding.name}"))
    return merged


def raise_first(found: Sequence[Finding]) -> None:
    """RunFailed with the remedy of the first finding that is wrong; nothing when all is well."""
    wrong = first_wrong(found)
    if wrong is not None:
        raise RunFailed(f"{wrong.name}: {wrong.value}; {wrong.remedy}")
