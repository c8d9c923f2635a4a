"""The figures of benchmarks/format_where.py: the first step, and the mean of the last three."""

from tests.benchmarks.scripts import load

FORMAT_WHERE = load("format_where")


def test_the_ends_of_a_run():
    steps = [
        {"trace/tokens": 10.0 * n, "trace/end_length_share": 0.5, "policy/format_nats": 20.0 - n}
        for n in range(1, 7)
    ]
    found = FORMAT_WHERE.ends("all", steps)
    assert (found["all_tokens_first"], found["all_tokens_last"]) == (10, 50)
    assert (found["all_format_nats_first"], found["all_format_nats_last"]) == (19, 15)
    assert found["all_end_length_share_last"] == 0.5


def test_a_picture_is_drawn(tmp_path):
    steps = [{"step": n} | dict.fromkeys(FORMAT_WHERE.PANELS, float(n)) for n in (1, 2)]
    FORMAT_WHERE.draw(dict.fromkeys(FORMAT_WHERE.CHOICES, steps), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
