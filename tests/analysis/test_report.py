"""The page: complete in one file, safe to open, and the picture beside it."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from nrt_jax.analysis.curves import MAX_POINTS, PANELS, band, panel_svg, series
from nrt_jax.analysis.figure_sections import make_figures
from nrt_jax.analysis.page import config_differences, render_page, visible
from nrt_jax.analysis.report import write_report
from nrt_jax.analysis.run_records import read_runs
from nrt_jax.analysis.seeds import group_by_seed
from nrt_jax.analysis.summary import summarise
from tests.analysis.conftest import MakeRun, sample

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; every tag must be closed by its own."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("h4", "p", "td", "th"):
            self.text += " "

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page_of(runs: list[Path], out: Path) -> tuple[str, Page]:
    write_report(runs, out)
    html = (out / "report.html").read_text("utf-8")
    page = Page(html)
    page.text = " ".join(page.text.split())
    return html, page


def test_one_file_that_loads_nothing(make_run: MakeRun, tmp_path: Path):
    html, page = page_of([make_run("sft", "sft"), make_run("nrt")], tmp_path / "out")
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in html
    # Those of the curves and of Fig. 2, and the four of Fig. 4.
    assert page.tags.count("svg") == len(PANELS) + 4
    assert "prefers-color-scheme: dark" in html


def test_what_the_page_says(make_run: MakeRun, tmp_path: Path):
    sft = make_run("sft", "sft", before=0.125, after=0.5)
    _, page = page_of([sft, make_run("nrt")], tmp_path / "out")
    for text in (
        "Two copies of one model were trained on the same 384 question–answer pairs",
        "25.0 % right with a trace and 12.5 % without one before training, and after it 50.0 %",
        "Base model ✗ wrong trace, ended by <|think_end|> 3↵ 4 answer =4",
        "SFT ✓ right answer =3",
        "sampling traces – 24.0 s",
        "method sft nrt",
        "git checkout abc123 # with changes that were not committed",
        f"nrt-jax train {sft}/config.yaml run_dir=again/sft",
        "nrt-jax report again/sft again/nrt --out again",
    ):
        assert text in page.text


def test_text_of_models_and_data_is_escaped(make_run: MakeRun, tmp_path: Path):
    evil = "<script>alert(1)</script>\"'&amp;"
    texts = {"question": evil, "trace": evil, "answer": evil, "reference": evil, "trace_end": evil}
    rows = [sample(0, "nrt", **texts), sample(12, "nrt", **texts)]
    run = make_run("<b>&$x$", samples=rows, data={"question_field": evil})
    other = make_run("other", samples=rows)
    html, page = page_of([run, other], tmp_path / "out")
    assert "<script" not in html
    assert "script" not in page.tags
    assert "b" not in page.tags
    # Question and reference once; trace, its end and the answer in three columns; the config once.
    assert page.text.count(evil) == 2 + 3 * 3 + 1
    assert "<b>&$x$" in page.text


def test_what_is_not_there_is_said(make_run: MakeRun, tmp_path: Path):
    empty = make_run("empty", samples=[sample(0, "nrt", trace="")])
    _, page = page_of([empty], tmp_path / "a")
    assert "trace, ended by <|think_end|> (empty)" in page.text
    assert "NRT-WS(−log p) (not saved)" in page.text
    silent = make_run("silent", samples=[])
    (silent / "samples.jsonl").unlink()
    _, page = page_of([silent], tmp_path / "b")
    assert "No samples were saved" in page.text


def test_samples_are_matched_by_problem_and_all_are_shown(make_run: MakeRun, tmp_path: Path):
    first = [sample(12, "sft", question=f"q{i:02}", answer=f"s{i:02}") for i in range(12)]
    second = [sample(12, "nrt", question=f"q{i:02}", answer=f"n{i:02}") for i in range(12)]
    runs = [make_run("sft", "sft", samples=first), make_run("nrt", samples=second[::-1])]
    _, page = page_of(runs, tmp_path / "out")
    for i in range(12):
        section = page.text.split(f" {i + 1}. q{i:02} ")[1].split(" q")[0]
        assert section.index(f"s{i:02}") < section.index(f"n{i:02}")


def test_more_than_ten_samples_can_be_filtered(make_run: MakeRun, tmp_path: Path):
    """The filter's script is the only one, and is there only when it is needed."""

    def rows(count: int, **right: bool) -> list[dict]:
        return [
            sample(step, "nrt", question=f"q{i}", correct=right[name])
            for step, name in ((0, "before"), (12, "after"))
            for i in range(count)
        ]

    few = make_run("few", samples=rows(10, before=False, after=True))
    html, _ = page_of([few], tmp_path / "few")
    assert "<script" not in html
    gained = make_run("gained", samples=rows(11, before=False, after=True))
    lost = make_run("lost", samples=rows(11, before=True, after=False), objective={"scheme": "gm"})
    html, page = page_of([gained, lost], tmp_path / "many")
    assert page.tags.count("script") == 1
    assert html.count('data-outcomes="all differ gained"') == 11
    html, _ = page_of([lost], tmp_path / "lost")
    assert html.count('data-outcomes="all lost wrong"') == 11


def test_real_prompts_are_named_by_their_question(make_run: MakeRun, tmp_path: Path):
    """The control tokens of a chat template are no headline; the whole prompt is beside it."""
    question = "<|start|>user\nHow many?<|end|>"
    rows = [sample(s, "nrt", question=question, user_text="How many?") for s in (0, 12)]
    run = make_run("nrt", samples=rows, data={"source": "jsonl", "path": "/data/gsm8k/train.jsonl"})
    html, page = page_of([run], tmp_path / "out")
    assert "<h1>NRT-WS(−log p): base trained on gsm8k/train.jsonl</h1>" in html
    assert "1. How many? reference" in page.text
    assert "the prompt as the model sees it <|start|>user↵ How many?<|end|>" in page.text


def test_runs_that_differ_by_their_seed_are_one_line(make_run: MakeRun, tmp_path: Path):
    runs = [make_run(f"s{seed}", after=0.9 + seed / 100, seed=seed) for seed in (1, 2, 3)]
    again, other = make_run("again", seed=3), make_run("gm", seed=1, objective={"scheme": "gm"})
    groups = group_by_seed(read_runs([*runs, again, other]))
    assert [len(group.records) for group in groups] == [3, 1, 1]
    steps, values = band(groups[0], "eval/exact_match")
    assert steps == [0, 12]
    assert values == [[0.25] * 3, [0.91, 0.92, 0.93]]
    # One line and one band: the band is the only filled path of the figure.
    assert panel_svg(PANELS[0], groups[:1]).count("PolyCollection") > 0
    assert panel_svg(PANELS[0], groups[1:2]).count("PolyCollection") == 0
    _, page = page_of([*runs, make_run("sft", "sft", before=0.125, after=0.5)], tmp_path / "out")
    assert "mean of 3 seeds (lowest to highest) 92.0 % (91.0 to 93.0 %)" in page.text
    assert "after it 50.0 % (SFT) and 92.0 % (NRT-WS(−log p)). Figures are means" in page.text


def test_hidden_characters_are_spelt_out():
    assert str(visible("a\r\nb\x1b[\u202e\ud800")) == (
        'a<span class="note">↵</span>\nb\\u001b[\\u202e\\ud800'
    )
    assert "(empty)" in visible("")


def test_config_differences(make_run: MakeRun):
    runs = read_runs([make_run("a"), make_run("b", seed=4, data={"eval_path": "/eval"})])
    assert config_differences(runs) == [
        ("seed", ["3", "4"]),
        ("data.eval_path", ["null", "/eval"]),
    ]


def test_curves_hold_the_values(make_run: MakeRun):
    (run,) = read_runs([make_run("nrt")])
    assert series(run, "eval/exact_match") == ([0, 12], [0.25, 0.95])
    assert series(run, "trace/tokens") == (list(range(1, 13)), list(range(1, 13)))
    run.training[:] = [{"step": i, "m": float(i)} for i in range(1, 4 * MAX_POINTS + 1)]
    steps, values = series(run, "m")
    assert len(steps) == MAX_POINTS
    assert (steps[0], values[0]) == (2.5, 2.5)
    assert (steps[-1], values[-1]) == (998.5, 998.5)


def test_svg_takes_its_colours_from_the_page(make_run: MakeRun):
    runs = group_by_seed(read_runs([make_run("nrt"), make_run("sft", "sft")]))
    svg = panel_svg(PANELS[0], runs)
    for name in ("ink", "grid", "run-0", "run-1"):
        assert f"var(--{name})" in svg
    assert "#f" not in svg.replace("#fff", "")
    assert "no traces in these runs" in panel_svg(PANELS[1], runs[1:])
    assert "no traces in these runs" not in panel_svg(PANELS[1], runs)


def test_a_warmup_has_a_panel_of_its_own(make_run: MakeRun):
    cold, warm = read_runs([make_run("cold"), make_run("warm")])
    names = ("warmup/answer_logprob", "warmup/start_logprob")
    warm.warmup[:] = [{"step": step, **dict.fromkeys(names, step - 3.0)} for step in (-1, 0)]
    assert series(warm, "warmup/answer_logprob") == ([-1, 0], [-4.0, -3.0])
    for runs, panels in (([cold], 0), ([cold, warm], 1)):
        groups = group_by_seed(runs)
        html = render_page(groups, summarise(groups), make_figures(groups))
        Page(html)
        assert html.count('aria-label="Warm-up') == panels


@pytest.mark.parametrize("count", [1, 9])
def test_any_number_of_runs(make_run: MakeRun, tmp_path: Path, count: int):
    runs = [make_run(f"run{i}", "nrt" if i % 2 else "sft") for i in range(count)]
    page_of(runs, tmp_path / "out")
    picture = matplotlib.image.imread(tmp_path / "out" / "curves.png")
    assert picture.shape[1] == 1600


def test_jax_and_training_are_not_loaded():
    code = (
        "import sys, nrt_jax.analysis.report; "
        "print([m for m in sys.modules if m == 'jax' or m.startswith('nrt_jax.training')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
