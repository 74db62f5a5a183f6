"""What a log says of long work."""

from __future__ import annotations

import pytest

from cluster.cli.console import _pace, _PlainLines


def test_a_log_says_how_fast_rows_go_and_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    lines = _PlainLines(clock=lambda: now)
    for done in (400, 450, 500, 1000):  # 400 of the rows were done by an earlier run
        lines("screening rows", done, 1000)
        now += 10.0
    assert capsys.readouterr().err.splitlines() == [
        "screening rows: 400/1000",
        "screening rows: 500/1000 (5/s, 1:40 left)",
        "screening rows: 1000/1000 (20/s)",
    ]


def test_long_and_slow_work_is_told_in_hours() -> None:
    assert _pace(0.5, 4000) == "0.5/s, 2:13:20 left"
    assert _pace(12345.6, 12345) == "12,346/s, 0:01 left"
