"""What serving costs at least: the numbers of a calculation by hand, and what must hold of any model and node."""

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ModelConfig, UserError
from dsv3.doctor import count_parameters
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.share import Share
from dsv3.serving.nodes import DEVICES, Node
from dsv3.serving.roofline import Chunk, Layout, Roofline, held_by_rank, ideal_layout, mesh_layout

V3 = ModelConfig.from_pretrained("deepseek-v3-671b")
LONG = 131072
NODES = ("8xh200", "8xmi300x", "16x910c")


@lru_cache
def layout(tp: int, dp: int, weights: str = "fp8") -> Layout:
    """tp 0: cut over all dp devices, as nothing can be."""
    return mesh_layout(V3, tp, dp, weights) if tp else ideal_layout(V3, dp, weights)


def plan(node: str, how: str, cache: str = "bf16", weights: str = "fp8", **options) -> Roofline:
    machine = Node.parse(node)
    tp, dp = {"ideal": (0, machine.count), "dp": (1, machine.count), "tp": (machine.count, 1)}[how]
    return Roofline(V3, machine, layout(tp, dp, weights), weights, cache, **options)


# --- the table of a 128K context, reckoned by hand ---


@pytest.mark.parametrize(("node", "ms"), [*zip(NODES, (1.2, 1.1, 0.9), strict=True)])
def test_one_sequence_that_all_devices_share_reads_weights_and_latents_in_about_a_millisecond(node, ms):
    assert 1e3 * plan(node, "ideal").reading(1, LONG) == pytest.approx(ms, rel=0.03)


@pytest.mark.parametrize(("node", "ms"), [*zip(NODES, (10.8, 9.2, 12.6), strict=True)])
def test_eight_long_sequences_with_attention_of_their_own_take_about_eleven_milliseconds(node, ms):
    assert 1e3 * plan(node, "dp").decode(8, LONG) == pytest.approx(ms, rel=0.05)


# On 16x910c the table has 208 in FP8. There 13 would fit in a device by 0.2 GB less than embedding and head take, which
# our engine holds on every one.
@pytest.mark.parametrize(("node", "bf16", "fp8"), [("8xh200", 32, 56), ("8xmi300x", 72, 128), ("16x910c", 112, 192)])
def test_so_many_long_sequences_fit_with_attention_of_their_own(node, bf16, fp8):
    assert plan(node, "dp").sequences(LONG) == bf16
    assert plan(node, "dp", "fp8").sequences(LONG) == fp8


# The table has 4 / 7, 9 / 16, 7 / 13: the same memory as above. Tensor parallelism leaves more, as it cuts attention.
@pytest.mark.parametrize(("node", "bf16", "fp8"), [("8xh200", 5, 10), ("8xmi300x", 11, 19), ("16x910c", 8, 15)])
def test_plain_tensor_parallelism_has_room_for_a_fraction_as_every_device_holds_all_latents(node, bf16, fp8):
    assert plan(node, "tp").sequences(LONG) == bf16 <= plan(node, "dp").sequences(LONG) / 6
    assert plan(node, "tp", "fp8").sequences(LONG) == fp8


def test_v3_decodes_behind_128k_in_far_less_than_100_ms_on_eight_h200():
    assert plan("8xh200", "dp").decode(32, LONG) < 0.035
    assert plan("8xh200", "dp").decode(1, LONG) == pytest.approx(0.0075, rel=0.06)


def test_weights_in_bfloat16_need_more_than_eight_h200_and_fit_on_larger_nodes():
    assert plan("8xh200", "tp", weights="bf16").free < 0
    assert plan("8xmi300x", "tp", weights="bf16").sequences(LONG) == 2
    assert plan("16x910c", "dp", weights="bf16").free > 0


def test_a_prompt_of_128k_takes_sixteen_seconds_and_a_chunk_nine_times_as_long_at_its_end():
    ideal = plan("8xh200", "ideal")
    assert ideal.prefill(LONG) == pytest.approx(16.5, rel=0.02)
    for start, count, ms in ((0, 2048, 50), (LONG, 2048, 473), (LONG, 512, 118)):
        bill = ideal.bill(start, count)
        assert 1e3 * (bill.products + bill.attention) == pytest.approx(ms, rel=0.02)


def test_a_chunk_also_expands_the_latents_before_it_once_more_which_the_table_leaves_out():
    ideal = plan("8xh200", "ideal")
    assert ideal.bill(LONG, 512).expansion == ideal.bill(LONG, 2048).expansion == pytest.approx(0.085, rel=0.01)
    assert ideal.bill(0, 2048).expansion == 0


# --- what it is made of ---


def test_sizes_of_v3_are_those_of_its_checkpoint():
    v3 = plan("8xh200", "ideal")
    assert v3.parameters == 671_026_419_200
    assert v3.active_parameters == 36_625_618_432
    assert layout(1, 1).held.total == pytest.approx(672e9, rel=0.003)
    assert layout(1, 1, "bf16").held.total == pytest.approx(1342e9, rel=0.001)
    assert (plan("8xh200", "dp").latent_bytes, plan("8xh200", "dp", "fp8").latent_bytes) == (70_272, 40_016)
    assert v3.absorbed_flops * LONG == pytest.approx(2.23e12, rel=0.002)


@pytest.mark.parametrize(("preset", "tp", "dp"), [("deepseek-v2-lite", 2, 2), ("dsv3-15m", 4, 1), ("dsv3-2m", 1, 4)])
@pytest.mark.parametrize("weights", ["fp8", "bf16"])
def test_what_a_device_holds_is_what_the_engine_would_load_there(preset, tp, dp, weights):
    config = ModelConfig.from_pretrained(preset).replace(num_nextn_predict_layers=0)
    assert held_by_rank(config, Mesh(tp, dp), weights) == Share(config, Mesh(tp, dp)).bytes(fp8=weights == "fp8")


def test_a_batch_touches_few_experts_when_it_is_small_and_all_when_it_is_large():
    v3 = plan("8xh200", "dp")
    assert v3.touched(1) == pytest.approx(8)
    assert v3.touched(8) == pytest.approx(57.4, abs=0.1)
    assert v3.touched(4096) == pytest.approx(256)


@pytest.mark.parametrize("preset", ["deepseek-v2-lite", "dsv3-15m"])
def test_parameters_of_other_models_are_counted_alike(preset):
    config = ModelConfig.from_pretrained(preset)
    roofline = Roofline(config, Node.parse("1xh200"), ideal_layout(config, 1, "fp8"))
    assert roofline.parameters == count_parameters(config)["main"]


def test_chunks_take_the_form_of_attention_that_is_cheaper():
    v3 = plan("8xh200", "tp")
    few, many = Chunk(LONG, int(v3.break_even) - 20), Chunk(LONG, int(v3.break_even) + 20)
    expanding, in_latents = plan("8xh200", "tp", absorbed=1), plan("8xh200", "tp", absorbed=10_000)
    assert v3.attention(few) == in_latents.attention(few) < expanding.attention(few)
    assert v3.attention(many) == expanding.attention(many) < in_latents.attention(many)
    assert v3.break_even == pytest.approx(323, abs=1)
    assert plan("8xh200", "tp", absorbed=4).attention(Chunk(0, 512)) == v3.attention(Chunk(0, 512))


# --- what must hold anywhere ---

chunks = st.lists(st.builds(Chunk, st.integers(0, LONG), st.integers(16, 4096)), max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    chunks=chunks,
    decoding=st.integers(0, 40),
    cache=st.sampled_from(["bf16", "fp8"]),
    how=st.sampled_from(["tp", "dp"]),
)
def test_the_schedulers_sum_is_never_below_the_roofline(chunks, decoding, cache, how):
    """So that a step which is planned within its time stays within it."""
    roofline = plan("8xh200", how, cache)
    groups = roofline.layout.groups
    decoding = decoding // groups * groups
    spread = [Chunk(chunk.start, chunk.count, i % groups) for i, chunk in enumerate(chunks)]
    works = [Chunk(LONG - 1, 1, i % groups) for i in range(decoding)] + spread
    cost = roofline.cost_model(decoding, LONG)
    assert roofline.step(works) <= 1.0001 * (cost.step + sum(cost.of_chunk(w.start, w.count) for w in works))


@settings(max_examples=30, deadline=None)
@given(
    context=st.integers(2, LONG),
    sequences=st.integers(1, 64),
    node=st.sampled_from(NODES),
    cache=st.sampled_from(["bf16", "fp8"]),
)
def test_more_sequences_or_more_context_never_take_less_time_and_no_layout_beats_the_bound(
    context, sequences, node, cache
):
    ideal = plan(node, "ideal", cache)
    for how in ("dp", "tp"):
        roofline = plan(node, how, cache)
        time = roofline.decode(sequences, context)
        assert time <= roofline.decode(sequences + 1, context) and time <= roofline.decode(sequences, context + 1)
        assert time >= ideal.decode(sequences, context) * (1 - 1e-6)


def test_a_better_device_is_faster_and_a_larger_one_holds_more():
    base = plan("8xh200", "dp")
    better = Roofline(V3, Node.parse("8xh200", ["bandwidth-tbs=6", "tflops=2000", "memory-gb=192"]), base.layout)
    assert better.decode(8, LONG) < base.decode(8, LONG) and better.sequences(LONG) > base.sequences(LONG)
    slower = Roofline(V3, Node.parse("8xh200", ["overhead-ms=30"]), base.layout)
    assert slower.decode(8, LONG) == pytest.approx(base.decode(8, LONG) + 0.03)


# --- nodes ---


def test_every_device_says_where_its_numbers_come_from():
    for device in DEVICES.values():
        assert device.source and 50e9 < device.memory < 300e9 and 2e12 < device.bandwidth < 10e12


@pytest.mark.parametrize(
    ("node", "assumptions", "line"),
    [
        ("h200", [], "node 'h200' is not COUNTxDEVICE, such as 8xh200; devices are h100, "),
        ("0xh200", [], "is not COUNTxDEVICE"),
        ("8xh20", [], "unknown device 'h20' of node '8xh20'; did you mean 8xh200?"),
        ("8xtpu", [], "devices are h100, h800, h200, mi300x, 910c"),
        ("8xh200", ["speed=3"], "unknown assumption 'speed=3'; it is NAME=NUMBER, and names are memory-gb, "),
        ("8xh200", ["tflops=many"], "tflops must be a number above 0"),
        ("8xh200", ["tflops=0"], "tflops must be a number above 0"),
        ("8xh200", ["memory-gb=inf"], "memory-gb must be a number above 0"),
        ("8xh200", ["products=1.5"], "products must be a number from 0 to 1"),
        ("8xh200", ["overhead-ms=-1"], "overhead-ms must be a number 0 or more"),
    ],
)
def test_a_wrong_node_or_number_is_answered_with_what_would_be_right(node, assumptions, line):
    with pytest.raises(UserError) as caught:
        Node.parse(node, assumptions)
    assert line in str(caught.value) and "\n" not in str(caught.value)
