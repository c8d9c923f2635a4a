"""Pictures of many runs: all names can be read, and all lines told apart."""

import pytest

from nrt_jax.analysis import drawing
from nrt_jax.analysis.ink import LIGHT, cycle, marker


@pytest.mark.parametrize("panels", [1, 2])
def test_a_legend_of_many_long_names_is_inside_the_picture(panels):
    names = [(f"NRT-WS(−log p) · token_signal=derived {i}", i) for i in range(14)]
    panel = drawing.Panel(title="t", draw=lambda axes, ink: None)
    shown = drawing.Drawing(
        name="n", panels=(panel,) * panels, rows=[], legend=names, legend_title="seeds"
    )
    figure = drawing._whole(shown)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert figure.axes[0].get_window_extent().y1 <= box.y0
    assert box.y1 <= figure.bbox.height


def test_no_two_of_sixteen_lines_look_the_same():
    looks = {(cycle(LIGHT, i), *marker(i).values()) for i in range(16)}
    assert len(looks) == 16
