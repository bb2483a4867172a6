"""The real engine on a clock: what users would see, and that the budget of a step is one of time."""

from functools import lru_cache

import pytest

from dsv3 import ModelConfig, UserError
from dsv3.serving.nodes import Node
from dsv3.serving.roofline import Chunk, Roofline, mesh_layout
from dsv3.serving.scheduler import Limits
from dsv3.serving.simulate import Arrival, Course, Outcome, Simulation, poisson, quantile

pytestmark = pytest.mark.slow

V3, LONG = ModelConfig.from_pretrained("deepseek-v3-671b"), 131072
BY_TIME, BY_TOKENS = Limits(seconds=0.05), Limits(tokens=2048, seconds=float("inf"))


@lru_cache
def eight_h200(absorbed: int | None = None) -> Roofline:
    return Roofline(V3, Node.parse("8xh200"), mesh_layout(V3, 8, 1, "fp8"), cache="fp8", absorbed=absorbed)


@lru_cache
def beside_128k(limits: str, absorbed: int | None = None) -> dict[str, float]:
    """Eight sequences of V3 with about 128K of context each decode on 8 H200 while a prompt of 128K comes in."""
    budget = {"time": BY_TIME, "tokens": BY_TOKENS}[limits]
    return Simulation(eight_h200(absorbed), LONG, 8, budget).beside_a_prompt(8, LONG, LONG - 64, 64).report()


def small(limits: Limits | None = None) -> Simulation:
    config = ModelConfig.from_pretrained("dsv3-15m")
    roofline = Roofline(config, Node.parse("1xh200", ["overhead-ms=5"]), mesh_layout(config, 1, 1, "bf16"), "bf16")
    return Simulation(roofline, 4096, 4, limits or Limits())


# --- a long prompt beside those who decode ---


def test_with_a_budget_of_time_a_128k_prompt_holds_nobodys_next_token_up_for_100_ms():
    seen = beside_128k("time")
    assert seen["itl_p99_ms"] < 100 and seen["itl_max_ms"] < 100
    assert seen["itl_max_ms"] == pytest.approx(50, rel=0.15)  # and uses the time that it may take
    assert seen["ttft_p50_ms"] < 90_000


def test_with_a_budget_of_2048_tokens_it_would_for_half_a_second():
    assert 1e3 * sum(vars(eight_h200().bill(LONG - 2048, 2048)).values()) > 473
    seen = beside_128k("tokens")
    assert seen["itl_p99_ms"] > 400
    assert seen["itl_max_ms"] > 5 * beside_128k("time")["itl_max_ms"]


def test_the_price_of_even_tokens_is_a_later_first_one():
    assert beside_128k("tokens")["ttft_p50_ms"] < beside_128k("time")["ttft_p50_ms"]


def test_if_small_chunks_expanded_all_latents_before_them_time_would_not_be_kept():
    """Why the form of attention must go by what is cheaper."""
    assert eight_h200().break_even > 300
    assert beside_128k("time", absorbed=4)["itl_p99_ms"] > 100


def test_traffic_that_does_not_fit_is_refused_instead_of_waiting_for_ever():
    with pytest.raises(UserError, match="10 sequences and one more of 131072 tokens do not fit: 10 do"):
        Simulation(eight_h200(), LONG, 10, BY_TIME).beside_a_prompt(10, LONG, LONG - 64, 64)


# --- requests at random ---


def test_every_request_gets_its_tokens_in_order_and_no_step_is_free():
    arrivals = poisson(20, 30, 200, 20, 4096, seed=1)
    outcome = small().open_loop(arrivals)
    assert sorted(len(course.tokens) for course in outcome.courses) == sorted(a.output for a in arrivals)
    for course in outcome.courses:
        assert course.tokens == sorted(course.tokens) and course.ttft >= 0.005
    assert outcome.report()["itl_p50_ms"] >= 5


def test_an_idle_engine_waits_for_the_next_request_on_the_clock():
    outcome = small().open_loop([Arrival(0.0, 10, 2), Arrival(60.0, 10, 2)])
    assert outcome.courses[1].arrival == 60.0 and 60.0 < outcome.courses[1].tokens[0] < 60.1


def test_a_lone_request_is_served_as_fast_as_the_roofline_says():
    simulation = small()
    roofline = simulation.runner.roofline
    (course,) = simulation.open_loop([Arrival(0.0, 1000, 5)]).courses
    assert course.ttft == pytest.approx(roofline.prefill(1000))
    assert [gap for _, gap in course.gaps] == pytest.approx([roofline.step([Chunk(1000 + i, 1)]) for i in range(4)])


@pytest.mark.slow
def test_more_requests_a_second_wait_longer():
    slow, fast = (small(Limits(running=4)).open_loop(poisson(rate, 40, 500, 50, 4096)).report() for rate in (1, 100))
    assert fast["ttft_p50_ms"] > 2 * slow["ttft_p50_ms"]
    assert fast["output_tokens_per_s"] > slow["output_tokens_per_s"]


def test_poisson_arrivals_have_the_rate_and_lengths_that_were_asked_for_and_fit_the_context():
    arrivals = poisson(5, 2000, 300, 30, 1024)
    assert arrivals[-1].at == pytest.approx(400, rel=0.1)
    assert sum(a.output for a in arrivals) / 2000 == pytest.approx(30, rel=0.1)
    assert all(a.prompt + a.output <= 1024 and a.output >= 1 for a in arrivals)
    assert poisson(5, 20, 300, 30, 1024) == arrivals[:20]


# --- the report ---


def test_the_report_counts_times_as_the_field_does():
    courses = [Course(1.0, 7, [1.5, 1.6, 1.8]), Course(2.0, 5, [2.1]), Course(0.0, 9, [0.0, 0.4], closed=True)]
    report = Outcome(courses, 4.0, 10).report()
    assert report["ttft_p50_ms"] == pytest.approx(100) and report["ttft_p99_ms"] == pytest.approx(500)
    assert report["itl_p50_ms"] == pytest.approx(200) and report["itl_max_ms"] == pytest.approx(400)
    assert report["tpot_p50_ms"] == pytest.approx(150)  # (1.8 - 1.5) / 2; the other has 400
    assert report["output_tokens_per_s"] == pytest.approx(6 / 4) and report["prompt_tokens_per_s"] == pytest.approx(3)


def test_quantiles_are_values_that_were_seen():
    values = [float(i) for i in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0), quantile([3.0], 0.5)) == (
        50,
        99,
        100,
        3,
    )
