"""The site of the documents: built whole without a warning, with the pages that it adds."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("mkdocs", reason="needs requirements-docs.txt, as `make docs-site` installs it")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        build, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_readme_is_the_first_page_and_leads_to_its_sources(site):
    text = (site / "index.html").read_text("utf-8")
    assert 'href="source/nrt_jax/training/nrt.py.html"' in text
    source = (site / "source/nrt_jax/training/nrt.py.html").read_text("utf-8")
    assert '<span class="nf">train_nrt</span>' in source


def test_formulas_are_drawn_without_a_script(site):
    text = (site / "method.html").read_text("utf-8")
    assert "<math" in text
    assert "arithmatex" not in text


def test_functions_have_their_docstrings(site):
    text = (site / "reference/objective.html").read_text("utf-8")
    assert 'id="nrt_jax.objective.rewards.score_rewards"' in text


def test_no_page_asks_for_a_file_of_another_server(site):
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert 'src="http' not in text, page
        assert '<link rel="stylesheet" href="http' not in text, page
