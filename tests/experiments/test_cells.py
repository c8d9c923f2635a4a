"""Cells of a sweep: which there are, what each is called, and sweeps that are refused."""

from pathlib import Path

import pytest

from nrt_jax.config.presets import sweeps
from nrt_jax.errors import InputError
from nrt_jax.experiments.cells import read_sweep
from nrt_jax.experiments.sweep_table import plan_table
from nrt_jax.topologies import parse_topology

SHIPPED = {"ablations": 45, "hard_tokens": 70, "quickstart_methods": 14, "table3": 63}
"""How many runs each sweep of the package has."""
METHODS = """
base: quickstart/nrt
grid:
  method: {gm: methods/nrt_gm, sft: [methods/sft, train.steps=5]}
  rollout.traces_per_prompt: [2, 4]
seeds: [0, 7]
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Read a sweep from its text."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str):
        file = tmp_path / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        return read_sweep(file, overrides)

    return read


def test_a_grid_is_every_combination_and_each_a_resolved_config(sweep):
    cells = sweep(METHODS, "optimizer.learning_rate=0.5").cells
    assert [tuple(cell.options.values()) for cell in cells] == [
        (method, traces, seed)
        for method in ("gm", "sft")
        for traces in ("2", "4")
        for seed in ("0", "7")
    ]
    last = cells[-1].config
    assert (last.method, last.train.steps, last.seed) == ("sft", 5, 7)
    assert (last.rollout.traces_per_prompt, last.optimizer.learning_rate) == (4, 0.5)
    assert cells[0].config.objective.scheme == "gm"
    folder = cells[0].config.run_dir
    assert folder.parent == Path("runs/sweeps/mine")
    assert folder.name.startswith("method=gm,rollout.traces_per_prompt=2,seed=0-")


def test_the_folder_of_a_cell_changes_with_its_config_alone(sweep):
    cell = sweep(METHODS).cells[0]
    assert sweep("# a comment\n" + METHODS).cells[0].name == cell.name
    assert sweep(METHODS, "train.steps=9").cells[0].name != cell.name


def test_axes_of_zip_advance_together(sweep):
    text = """
base: [quickstart/nrt, methods/nrt_gm]
grid: {objective.format_where: [all, natural_end]}
zip:
  train.steps: [10, 20]
  optimizer.learning_rate: [1.0e-5, 2.0e-5]
exclude: [{train.steps: 20, objective.format_where: all}]
"""
    cells = sweep(text).cells
    found = [(cell.config.objective.format_where, cell.config.train.steps) for cell in cells]
    assert found == [("all", 10), ("natural_end", 10), ("natural_end", 20)]
    assert cells[-1].config.optimizer.learning_rate == 2e-5


def test_files_of_a_sweep_are_beside_it(sweep, tmp_path):
    (tmp_path / "mine_too.yaml").write_text("extends: quickstart/nrt\ntrain: {steps: 3}\n")
    (cell,) = sweep("base: [mine_too.yaml]").cells
    assert cell.config.train.steps == 3


@pytest.mark.parametrize(("name", "count"), SHIPPED.items())
def test_a_sweep_of_the_package_has_its_cells(name, count):
    cells = read_sweep(Path("sweeps") / name).cells
    assert len(cells) == count
    if name not in ("ablations", "table3"):
        # A comparison of methods: equal prompts, traces and updates.
        sizes = {(c.config.train, c.config.optimizer, c.config.rollout) for c in cells}
        assert len(sizes) == 1


def test_every_sweep_of_the_package_is_counted():
    assert set(sweeps()) == set(SHIPPED)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: quickstart/nrt\ngrid: {objective.shceme: [gm]}", "unknown key; did you mean"),
        (
            "base: quickstart/nrt\ngrid: {method: {a: methods/nrt_gn}}",
            "did you mean 'methods/nrt_gm'",
        ),
        ("base: quickstart/nrt\ngrd: {}", "unknown key; did you mean 'grid'?"),
        ("base: quickstart/nrt\ngrid: {train.steps: []}", "axis train.steps has no options"),
        ("base: quickstart/nrt\ngrid: {seed: [1]}", "list the seeds in seeds"),
        ("base: quickstart/nrt\nseeds: []", "seeds"),
        ("base: quickstart/nrt\nseeds: [3, 3]", "have the same config"),
        ("base: quickstart/nrt\ngrid: {train.steps: [5, 5]}", "have the same config"),
        (
            "base: quickstart/nrt\nzip: {train.steps: [5], optimizer.learning_rate: [1.0, 2.0]}",
            "train.steps has 1, optimizer.learning_rate has 2",
        ),
        ("base: quickstart/nrt\nexclude: [{steps: 3}]", "steps is no axis; there are seed"),
        ("base: quickstart/nrt\nexclude: [{seed: 1}]", "seed has no option 1; there are 0"),
        ("base: quickstart/nrt\nexclude: [{seed: 0}]", "leaves out every cell"),
        ("base: quickstart/nrt\ngrid: {train.steps: [x]}", "cell train.steps=x, seed=0: "),
        ("grid: {}", "base: required"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line(sweep, text, said):
    with pytest.raises(InputError) as error:
        sweep(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_override_that_hides_an_axis_is_told(sweep):
    with pytest.raises(InputError, match="an override hides their difference"):
        sweep("base: quickstart/nrt\ngrid: {train.steps: [5, 6]}", "train.steps=7")


def test_planned_cells_have_memory_and_hours(sweep):
    text = "base: [models/llama3_2_3b, hardware/h100x8, recipes/paper, quickstart/task]"
    one = sweep(text + "\n", "data.source=chain_addition", "train.steps=10")
    table = plan_table(one, parse_topology("h100x8"))
    head, row, total = table.splitlines()
    assert "memory per device" in head
    assert "GiB" in row
    assert "hours of h100x8 in all" in total


def test_a_sweep_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(InputError, match="did you mean quickstart_methods"):
        read_sweep(Path("sweeps/quickstart_method"))


def test_the_folder_of_a_sweep_is_not_its_file(tmp_path):
    with pytest.raises(InputError, match="is a directory; name the sweep's file or preset"):
        read_sweep(tmp_path)
