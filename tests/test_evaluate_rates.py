from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeft.errors import MeasurementError
from safeft.evaluate import Rate, differ


@st.composite
def rates(draw: st.DrawFn) -> Rate:
    n = draw(st.integers(1, 10_000))
    return Rate(draw(st.integers(0, n)), n)


# R. G. Newcombe, Statistics in Medicine 17:857 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_equals_published_values(hits: int, n: int, low: float, high: float) -> None:
    rate = Rate(hits, n)
    assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)


@given(rates())
def test_the_interval_ends_solve_the_score_equation(rate: Rate) -> None:
    # The definition: |value - p| is 1.96 standard errors taken at p itself; found by bisection.
    def excess(p: float) -> float:
        return abs(rate.value - p) - 1.959963984540054 * math.sqrt(p * (1 - p) / rate.n)

    def root(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
        return inside

    low = 0.0 if rate.hits == 0 else root(rate.value, 0.0)
    high = 1.0 if rate.hits == rate.n else root(rate.value, 1.0)
    if rate.hits == 0:
        high = 1.959963984540054**2 / (rate.n + 1.959963984540054**2)
    if rate.hits == rate.n:
        low = rate.n / (rate.n + 1.959963984540054**2)
    assert rate.low == pytest.approx(low, abs=1e-9)
    assert rate.high == pytest.approx(high, abs=1e-9)


@given(rates())
def test_the_interval_lies_in_0_1_and_holds_the_value(rate: Rate) -> None:
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.low < rate.high


@given(rates(), st.integers(2, 50))
def test_the_same_share_of_more_answers_has_a_narrower_interval(rate: Rate, times: int) -> None:
    more = Rate(rate.hits * times, rate.n * times)
    assert more.high - more.low < rate.high - rate.low


@given(rates())
def test_counting_the_misses_mirrors_the_interval(rate: Rate) -> None:
    misses = Rate(rate.n - rate.hits, rate.n)
    assert misses.low == pytest.approx(1 - rate.high, abs=1e-12)


@given(rates(), rates())
def test_two_rates_differ_only_if_their_intervals_do_not_meet(a: Rate, b: Rate) -> None:
    assert differ(a, b) == differ(b, a)
    assert not differ(a, a)
    assert differ(a, b) == (not max(a.low, b.low) <= min(a.high, b.high))


def test_a_rate_over_nothing_is_an_error_not_a_number() -> None:
    with pytest.raises(MeasurementError, match="unknown"):
        Rate(0, 0)


@pytest.mark.parametrize(("hits", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="hits"):
        Rate(hits, n)


def test_a_rate_reads_as_percent_with_interval_and_n() -> None:
    assert str(Rate(94, 100)) == "94.0 % (87.5-97.2, n=100)"
    assert Rate(1, 4).to_dict() == {
        "hits": 1,
        "n": 4,
        "value": 0.25,
        "low": pytest.approx(0.0456, abs=1e-4),
        "high": pytest.approx(0.6994, abs=1e-4),
    }
