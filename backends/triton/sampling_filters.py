"""Which tokens top-k, top-p and min-p leave, without sorting a vocabulary.

Ranked by logit, and equal ones by id, each filter keeps a prefix, and so do all of them together: all that is above one
logit, the cut, and the first few of the tokens that have just this logit. The cut is searched for: a pass over the row
counts the tokens above four pivots (top-k) or sums up their weights (top-p), which narrows the range of the cut to a
fifth or less; as soon as few tokens are left in the range, they are gathered and compared each with each.

A row belongs to one program; sums have an order that depends on nothing but the vocabulary's size.
"""

import triton.language as tl

from .noise import gumbel, natural_log
from .runtime import device_function

LOWEST_KEY = tl.constexpr(-0x7F800000)  # of the lowest finite number: what is forbidden, -inf, is below
PIVOTS = tl.constexpr(4)
MOST_BLOCKS = 255  # of a row: what `weights_above` can count
BY_VALUE = tl.constexpr(6)  # passes that space their pivots by logit; later ones by the bits, which are soon through
SMALLEST = tl.constexpr(1e-37)


@device_function
def key_of(x):
    """float32 but NaN -> int32 in the same order; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@device_function
def value_of(key):
    """The float32 of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@device_function
def weights_above(row, V, pivots, top, inverse, BLOCK: tl.constexpr, STAGES: tl.constexpr, WEIGHTED: tl.constexpr):
    """How many logits of a row [V] are above each of the pivots i32 [4], and, if WEIGHTED, the sum of their
    exp((x - top) * inverse), else their number again; f32 [4] each."""
    byte = tl.arange(0, PIVOTS)[:, None] * 8
    count = tl.zeros((1, BLOCK), tl.int32)  # four counts in the bytes of one number: registers are scarce
    weight = tl.zeros((PIVOTS, BLOCK), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)[None, :]
        x = tl.load(row + place, mask=place < V, other=float("-inf")).to(tl.float32)
        above = key_of(x) > pivots[:, None]
        count += tl.sum(above.to(tl.int32) << byte, 0, keep_dims=True)
        if WEIGHTED:
            weight += tl.where(above, tl.exp((x - top) * inverse), 0.0)
    counts = tl.sum((count >> byte) & 0xFF, 1).to(tl.float32)
    return counts, tl.sum(weight, 1) if WEIGHTED else counts


@device_function
def gather(row, V, scratch, low, high, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Write the logits of row [V] whose keys are in low..high to scratch, in the order of their ids."""
    tl.debug_barrier()  # until all threads of this program have read what is there
    written = 0
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(row + place, mask=place < V, other=float("-inf"))
        key = key_of(x.to(tl.float32))
        inside = ((key >= low) & (key <= high)).to(tl.int32)
        count = tl.sum(inside, 0)
        if count > 0:
            tl.store(scratch + written + tl.cumsum(inside, 0) - 1, x, mask=inside != 0)
        written += count
    tl.debug_barrier()
    return written


@device_function
def settle(scratch, size, high, base, goal, top, inverse, FEW: tl.constexpr, WEIGHTED: tl.constexpr):
    """As `search`, among the logits in scratch [size], size <= FEW, above which there is `base`: each with each."""
    place = tl.arange(0, FEW)
    x = tl.load(scratch + place, mask=place < size, other=float("-inf")).to(tl.float32)
    key = key_of(x)
    weight = tl.exp((x - top) * inverse) if WEIGHTED else tl.where(place < size, 1.0, 0.0)
    above = base + tl.sum(tl.where(key[None, :] > key[:, None], weight[None, :], 0.0), 1)
    enough = (above < goal) & (place < size)
    return tl.min(tl.where(enough, key, high), 0), tl.max(tl.where(enough, above, base), 0)


@device_function
def between(low, high, by_value):
    """Four pivots of low..high - 1 in even steps."""
    step = tl.arange(0, PIVOTS) + 1
    part = step.to(tl.float32) / (PIVOTS + 1)
    x = value_of(low) * (1 - part) + value_of(high) * part
    even = low.to(tl.int64) + (high.to(tl.int64) - low.to(tl.int64)) * step // (PIVOTS + 1)
    pivots = tl.where(by_value, key_of(x), even.to(tl.int32))
    return tl.maximum(tl.minimum(pivots, high - 1), low)


@device_function
def snapped(row, V, low, high, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The range low..high of keys, shrunk to the lowest and the highest that occur in row [V]; to low if none does."""
    lowest = tl.zeros((BLOCK,), tl.int32) + high
    highest = tl.zeros((BLOCK,), tl.int32) + low
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        key = key_of(tl.load(row + place, mask=place < V, other=float("-inf")).to(tl.float32))
        inside = (key >= low) & (key <= high)
        lowest = tl.minimum(lowest, tl.where(inside, key, high))
        highest = tl.maximum(highest, tl.where(inside, key, low))
    top = tl.max(highest, 0)
    return tl.minimum(tl.min(lowest, 0), top), top


@device_function
def search(
    row, V, scratch, low, high, pivots, goal, ties, top, inverse,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, FEW: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The smallest key of low..high with less than the goal above it -> key, how much is above it, goal.

    How much: of tokens, or, if WEIGHTED, of their weight; then the goal is a share of the weight of low and above, of
    low's own tokens `ties` at most, and the first two pivots are low - 1 and low. The key may be any of those between
    two tokens' keys.
    """
    zero = tl.full((), 0.0, tl.float32)
    count_low, count_high, amount_high = V.to(tl.float32), zero, zero  # above low - 1, above high
    inside = count_low  # tokens of low..high, at most
    passes = 0
    while (passes == 0) | ((low < high) & (inside > FEW)):
        count, amount = weights_above(row, V, pivots, top, inverse, BLOCK, STAGES, WEIGHTED)
        if WEIGHTED:
            number = tl.arange(0, PIVOTS)
            above = tl.sum(tl.where(number == 1, amount, 0.0), 0)
            equal = tl.sum(tl.where(number == 0, count, 0.0) - tl.where(number == 1, count, 0.0), 0)
            own = tl.exp(tl.maximum(value_of(low) - top, -1e30) * inverse)  # low may be the lowest of all numbers
            whole = above + tl.minimum(equal, ties.to(tl.float32)) * own
            goal = tl.where(passes == 0, goal * whole, goal)
        enough = amount < goal  # the pivots at the cut or above it
        if tl.max(enough.to(tl.int32), 0) > 0:
            high = tl.maximum(tl.minimum(high, tl.min(tl.where(enough, pivots, high), 0)), low)
            count_high = tl.max(tl.where(enough, count, 0.0), 0)
            amount_high = tl.max(tl.where(enough, amount, 0.0), 0)
        count_low = tl.minimum(count_low, tl.min(tl.where(enough, count_low, count), 0))
        low = tl.minimum(tl.maximum(low, tl.max(tl.where(enough, low, pivots + 1), 0)), high)
        passes += 1
        if inside == count_low - count_high:  # a pass that leaves as many has probably found tokens that are all equal
            low, high = snapped(row, V, low, high, BLOCK, STAGES)
        inside = count_low - count_high
        pivots = between(low, high, passes <= BY_VALUE)
    if low < high:
        size = gather(row, V, scratch, low, high, BLOCK, STAGES)
        low, amount_high = settle(scratch, size, high, amount_high, goal, top, inverse, FEW, WEIGHTED)
    return low, amount_high, goal


@device_function
def find_cut(
    row, V, scratch, top, temperature, inverse, top_k, top_p, min_p,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The filters' prefix of row [V], whose largest logit is `top`: all tokens above a key, and the first `ties` equal
    to it -> key i32, ties i32."""
    high = key_of(top)
    cut = tl.minimum(LOWEST_KEY, high)
    ties = V
    number = tl.arange(0, PIVOTS)
    if min_p > 0:
        floor = top + temperature * natural_log(tl.maximum(min_p, SMALLEST))
        cut = tl.minimum(tl.maximum(cut, key_of(floor)), high)
    if (top_k > 0) & (top_k < V):
        # 1, 4, 16 and 64 below the largest.
        pivots = tl.maximum(key_of(top - (1 << (2 * number)).to(tl.float32)), cut)
        goal = top_k.to(tl.float32)
        cut, above, goal = search(
            row, V, scratch, cut, high, pivots, goal, ties, top, inverse, BLOCK, STAGES, FEW, False
        )
        ties = top_k - above.to(tl.int32)
    if top_p < 1:
        # All that is less likely than (1 - top_p) / V of the likeliest has less than 1 - top_p of the weight.
        tail = key_of(top + temperature * natural_log(tl.maximum((1 - top_p) / V.to(tl.float32), SMALLEST)))
        near = key_of(top - 3 * temperature)
        pivots = tl.where(number == 2, tl.maximum(tail - 1, cut), tl.maximum(near, cut))
        pivots = tl.where(number < 2, cut - 1 + number, pivots)
        most = ties
        lowest = cut
        cut, above, goal = search(
            row, V, scratch, cut, high, pivots, top_p, ties, top, inverse, BLOCK, STAGES, FEW, True
        )
        own = tl.exp((value_of(cut) - top) * inverse)
        ties = tl.maximum(tl.minimum(tl.ceil((goal - above) / own), V.to(tl.float32)), 1.0).to(tl.int32)
        ties = tl.where(cut == lowest, tl.minimum(ties, most), ties)
    return cut, ties


@device_function
def race(row, tokens, size, best, token, top, inverse, first, second, BLOCK: tl.constexpr):
    """The largest of `best` and (x - top) * inverse + noise of tokens i32 [size], and whose it is."""
    tl.debug_barrier()  # other threads of this program wrote them
    for start in tl.range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        racer = tl.load(tokens + place, mask=place < size, other=0)
        x = tl.load(row + racer, mask=place < size, other=float("-inf")).to(tl.float32)
        noisy = tl.fma(x - top, inverse.broadcast_to(x.shape), gumbel(first, second, racer))
        score, at = tl.max(noisy, 0, return_indices=True)
        if score > best:
            best, token = score, tl.load(tokens + start + at)
    tl.debug_barrier()
    return best, token


@device_function
def draw(row, V, tokens, cut, ties, top, inverse, first, second, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The token i32 of the largest (x - top) * inverse + noise among those above the cut and the first `ties` at it.

    Noise costs more than all else, and mostly few tokens are left: they are listed in `tokens` i32 [2 * BLOCK] first.
    """
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    listed = 0
    seen = 0  # tokens at the cut
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        key = key_of(tl.load(row + place, mask=place < V, other=float("-inf")).to(tl.float32))
        if tl.max(key, 0) >= cut:
            # Two running counts in one: of those above the cut in the upper half, of those at it in the lower.
            counts = tl.cumsum(tl.where(key > cut, 1 << 16, 0) + (key == cut).to(tl.int32), 0)
            equal = seen + (counts & 0xFFFF)
            kept = (key > cut) | ((key == cut) & (equal <= ties))
            rank = (counts >> 16) + tl.minimum(equal, ties) - tl.minimum(seen, ties)
            tl.store(tokens + listed + rank - 1, place, mask=kept)
            listed += tl.max(rank, 0)
            seen = tl.max(equal, 0)
        if (listed > BLOCK) | (start + BLOCK >= V):
            best, token = race(row, tokens, listed, best, token, top, inverse, first, second, BLOCK)
            listed = 0
    return token
