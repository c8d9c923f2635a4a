"""The documents name only what exists: links, files, targets, commands, config keys."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator

import pytest
import yaml

import nrt_jax
from nrt_jax.config.run import RunConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.objective.advantages import ESTIMATORS
from nrt_jax.options import make_parser
from nrt_jax.verbs import load
from tests.conftest import REPOSITORY

PAGES = [
    *(REPOSITORY / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *REPOSITORY.glob("docs/**/*.md"),
]
TEXTS = {page.relative_to(REPOSITORY).as_posix(): page.read_text("utf-8") for page in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
GENERATOR = runpy.run_path(str(REPOSITORY / "docs" / "generate_configuration.py"))
SECTIONS = [k for k, f in RunConfig.model_fields.items() if GENERATOR["_section_of"](f.annotation)]
KEYS = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_0-9.]+)(?:=[^`]*|: [^`]*)?`")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def code_pieces(text: str) -> Iterator[str]:
    """Lines of fenced blocks, and inline code."""
    for _, block in FENCE.findall(text):
        yield from block.splitlines()
    yield from CODE.findall(prose(text))


def commands(program: str) -> list[str]:
    """Every command line in a fenced block that calls the program, without its comment."""
    blocks = [block for text in TEXTS.values() for _, block in FENCE.findall(text)]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line.startswith(program + " ")})


def anchor(heading: str) -> str:
    """The fragment that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_configuration_reference_is_that_of_the_schema():
    assert GENERATOR["TARGET"].read_text("utf-8") == GENERATOR["render"](), "run `make docs`"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_method_has_a_row_for_every_scheme(scheme):
    assert f"\n| `{scheme}` | {SCHEMES[scheme].title} |" in TEXTS["docs/method.md"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_method_has_a_row_for_every_estimator(estimator):
    assert re.search(rf"^\| `{estimator}`[^|]*\|", TEXTS["docs/method.md"], re.M)


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page]))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, fragment = link.partition("#")
        target = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert target.exists(), f"{page} links to {link}"
        if fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M)
            assert fragment in map(anchor, headings), f"{page} links to {link}"


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_exist(page):
    for piece in code_pieces(TEXTS[page]):
        for name in re.findall(
            r"(?<![\w./])(?:configs|nrt_jax|tests|docs|benchmarks)/[\w./]+", piece
        ):
            assert (REPOSITORY / name.rstrip(".")).exists(), f"{page} names {name}"
        for name in re.findall(r"(?<![\w./])requirements[\w-]*\.txt", piece):
            assert (REPOSITORY / name).exists(), f"{page} names {name}"


@pytest.mark.parametrize("command", commands("nrt-jax"))
def test_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    args = make_parser().parse_args(shlex.split(command)[1:])
    # A verb that takes a config may also take the run that the page made before.
    takes_config = getattr(args, "config", None) and getattr(args, "kind", "") != "slurm-sweep"
    if takes_config and not args.config[0].startswith("runs/"):
        load(args)


@pytest.mark.parametrize("page", TEXTS)
def test_verbs_and_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.M)
    verbs = re.findall(r"^    ([a-z]+) ", make_parser().format_help(), re.M)
    for piece in code_pieces(TEXTS[page]):
        for target in re.findall(r"\bmake ([a-z-]+)", piece):
            assert target in targets, f"{page} names make {target}"
        for verb in re.findall(r"\bnrt-jax ([a-z]+)", piece):
            assert verb in verbs, f"{page} names nrt-jax {verb}"


@pytest.mark.parametrize("page", TEXTS)
def test_config_keys_exist(page):
    keys = KEYS.findall(TEXTS[page])
    for key in keys:
        section = RunConfig
        for name in key.split("."):
            assert section is not None, f"{page} names {key}"
            assert name in section.model_fields, f"{page} names {key}"
            section = GENERATOR["_section_of"](section.model_fields[name].annotation)


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if "```python" in text])
def test_python_examples_run(page, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    examples = [block for language, block in FENCE.findall(TEXTS[page]) if language == "python"]
    for example in examples:
        exec(compile(example, page, "exec"), {})


def test_the_checks_find_something_to_check():
    assert {command.split()[1] for command in commands("nrt-jax")} >= {
        "train",
        "diagnose",
        "generate",
        "serve",
        "import",
        "export",
        "data",
        "report",
        "config",
    }
    assert KEYS.findall(TEXTS["README.md"])


RECORDER = runpy.run_path(str(REPOSITORY / "docs" / "figures.py"))
RECORDED = json.loads(RECORDER["FIGURES"].read_text("utf-8"))


@pytest.mark.parametrize("section", RECORDER["TEXTS"])
def test_the_documents_show_the_recorded_figures(section):
    """And no text that `docs/figures.py` could not find again."""
    texts = RECORDER["replaced"](section, RECORDED[section], RECORDED[section])
    assert texts
    assert all(path.read_text("utf-8") == text for path, text in texts.items())
    changed = {name: value + 1 for name, value in RECORDED[section].items()}
    with pytest.raises(ValueError, match="must hold once"):
        RECORDER["replaced"](section, changed, RECORDED[section])


def test_the_site_leads_to_every_page():
    text = (REPOSITORY / "mkdocs.yml").read_text("utf-8")
    navigation = text[text.index("\nnav:") :]
    missing = [page for page in TEXTS if page.startswith("docs/") and page[5:] not in navigation]
    assert not missing
    assert "CHANGELOG.md" in TEXTS


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == nrt_jax.__version__
    assert f"## {nrt_jax.__version__}" in TEXTS["CHANGELOG.md"]
