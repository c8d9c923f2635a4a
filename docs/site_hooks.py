"""What the site has beside the pages of docs/: README, a page per package, linked sources, MathML.

Called by MkDocs (mkdocs.yml). Pages link to files of the repository by relative paths, as GitHub
wants them; on the site such a link leads to a page with the text of the file, so that the site
needs no server and no network. Formulas become MathML, which browsers draw themselves.
"""

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Documents of the root, and what they are on the site."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash"}
"""Of sources; others are shown as plain text."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The pages of the packages are the last part of the navigation."""
    assert config.nav is not None
    config.nav.append({"API": [name for name, _ in reference_pages()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the root, the pages of the packages, and the sources that are linked."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text("utf-8")))
    for name, text in reference_pages():
        files.append(File.generated(config, name, content=text))
    linked = {target for file in files.documentation_pages() for target in sources_of(file)}
    for target in sorted(linked):
        files.append(File.generated(config, source_page(target), content=source_text(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their pages on the site."""

    def replaced(match: re.Match) -> str:
        target = repository_path(page.file.src_uri, match[1])
        if target is None:
            return match[0]
        uri = site_uri(target)
        start = posixpath.dirname(page.file.src_uri) or "."
        return posixpath.relpath(uri, start) + (match[2] or "")

    return outside_fences(markdown, lambda text: LINK.sub(replaced, text))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """TeX to MathML."""

    def formula(match: re.Match) -> str:
        display = "inline" if match[1] == "span" else "block"
        return convert(html.unescape(match[2]), display=display)

    return FORMULA.sub(formula, content)


def sources_of(file: File) -> Iterator[str]:
    """Paths of the files and folders that a page links to and that are no pages themselves."""
    text = FENCE.sub("", file.content_string)
    for match in LINK.finditer(text):
        target = repository_path(file.src_uri, match[1])
        if target is not None and site_uri(target) == source_page(target):
            yield target


def repository_path(page: str, link: str) -> str | None:
    """Where a link of a page leads, from the root; None for what is not in the repository."""
    if "://" in link or link.startswith("mailto:"):
        return None
    origin = next((name for name, uri in PAGES.items() if uri == page), f"docs/{page}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return target if (ROOT / target).exists() else None


def site_uri(target: str) -> str:
    """The page or file of the site for a path of the repository."""
    if target in PAGES:
        return PAGES[target]
    inside = target.removeprefix("docs/")
    shown = inside != target and Path(target).suffix not in (".py", ".json", "")
    return inside if shown else source_page(target)


def source_page(target: str) -> str:
    return f"source/{target}.md"


def source_text(target: str) -> str:
    """A page with the text of a file, or the names in a folder."""
    path = ROOT / target
    if path.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if p.name[0] not in "._")
        return f"# {target}/\n\n" + "\n".join(f"- `{name}`" for name in names) + "\n"
    language = LANGUAGES.get(path.suffix, "text")
    return f"# {target}\n\n`````{language}\n{path.read_text('utf-8').rstrip()}\n`````\n"


def outside_fences(text: str, change) -> str:
    """The text changed everywhere but in fenced blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def reference_pages() -> Iterator[tuple[str, str]]:
    """A page per package with its modules from their docstrings, and an index of the packages."""
    package = ROOT / "nrt_jax"
    folders = sorted(p.parent for p in package.glob("*/__init__.py"))
    yield "reference/index.md", index_page(folders)
    yield "reference/top.md", package_page("nrt_jax", sorted(package.glob("[!_]*.py")))
    for folder in folders:
        modules = sorted(folder.rglob("[!_]*.py"))
        yield f"reference/{folder.name}.md", package_page(f"nrt_jax.{folder.name}", modules)


def index_page(folders: list[Path]) -> str:
    links = "\n".join(f"- [nrt_jax.{folder.name}]({folder.name}.md)" for folder in folders)
    return (
        "# API\n\nEvery public function and class, from its docstring: what it computes, shapes, "
        f"units and errors.\n\n- [nrt_jax](top.md): the command line and what all use\n{links}\n"
    )


def package_page(name: str, modules: list[Path]) -> str:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    return f"# {name}\n\n" + "\n\n".join(f"::: {n}" for n in names) + "\n"
