"""Block-sparse attention in Triton: what the kernels share, and the forward.

One program works on a tile of rows (queries; for the gradients of keys and values: keys) and walks over tiles of
columns (keys; there queries). An *item*, a row of integers that layout.py makes, says which: `left`
tiles that need a mask, then `full` ones that need none, then `right` ones that need one. Columns come from a source:

    RANGE    neighbouring indices of the sequence, or of a column of it (every `step`-th token)
    PICKED   neighbouring indices of a list of tokens, such as the summary positions of fixed attention
    TABLE    granules of 16 to 64 indices from a list, each with a bit mask where it is not seen whole

In RANGE and PICKED query i sees the indices [low[i], high[i]). A program may walk over two sources under one softmax.

Scores are in base 2, with log2(e) folded into the scale. There are no atomics, so results are deterministic.
Legend: M rows and N columns of a tile, D head dimension (Dv of values), B batch, H heads, T queries, S keys.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "attn_implementation='block_sparse' on a GPU needs triton; install triton>=3.6, or use 'sdpa'."
    ) from error

RANGE = tl.constexpr(0)
PICKED = tl.constexpr(1)
TABLE = tl.constexpr(2)
NONE = tl.constexpr(3)
FIELDS = tl.constexpr(16)  # of an item
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Arguments that change with the length of a sequence: a kernel is not compiled anew for any value of them.
LENGTHS = [
    *("num_queries", "num_heads", "num_biases", "copies", "repeats", "period", "step", "first_distance"),
    *("stride_valid", "stride_listed", "stride_other"),
]


@triton.jit
def load_rows(base, tokens, stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows [tokens, BLOCK] of a matrix WIDTH wide: 0 beyond it and, if MASKED, where not `inside`."""
    dims = tl.arange(0, BLOCK)
    pointers = base + tokens[:, None] * stride + dims[None, :]
    if MASKED and WIDTH == BLOCK:
        rows = tl.load(pointers, mask=inside[:, None], other=0.0)
    elif MASKED:
        rows = tl.load(pointers, mask=inside[:, None] & (dims < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(tokens >= 0)[:, None] & (dims < WIDTH)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(base, tokens, stride, inside, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Write rows [tokens, BLOCK] into a matrix WIDTH wide, or add them to it."""
    dims = tl.arange(0, BLOCK)
    pointers = base + tokens[:, None] * stride + dims[None, :]
    mask = inside[:, None] & (dims < WIDTH)[None, :]
    if ADD:
        rows += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b in float32. Triton's interpreter multiplies the raw bits of bfloat16, so there both are widened."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def item_of(items, copies, repeats, period):
    """What a program works on: its item, its batch entry, its head."""
    program = tl.program_id(0)
    item = items + (program // copies) * FIELDS
    copy = program % copies
    return item, (copy // repeats).to(tl.int64), tl.load(item) + (copy % repeats) * period


@triton.jit
def walk_of(source, MASKED: tl.constexpr):
    """A source of an item: its number of indices, where its walk starts, tiles left and full, and how many to take."""
    left = tl.load(source + 2)
    full = tl.load(source + 3)
    count = full
    if MASKED:
        count = left + tl.load(source + 4)
    return tl.load(source), tl.load(source + 1), left, full, count


@triton.jit
def position_of(tile, left, full, MASKED: tl.constexpr):
    """Where the tile-th of the tiles that need a mask (or of those that need none) stands in the walk."""
    if MASKED:  # noqa: SIM108
        position = tile + tl.where(tile < left, 0, full)
    else:
        position = tile + left
    return position


@triton.jit
def indices_of(position, start, listed, BLOCK: tl.constexpr, KIND: tl.constexpr, GRANULE: tl.constexpr):
    """The indices [BLOCK] of a tile of columns; negative where the list of a table has run out."""
    offsets = tl.arange(0, BLOCK)
    if KIND == TABLE:
        granules = tl.load(listed + start + position * (BLOCK // GRANULE) + offsets // GRANULE)
        indices = granules * GRANULE + offsets % GRANULE
    else:
        indices = start + position * BLOCK + offsets
    return indices


@triton.jit
def tokens_of(indices, inside, first, step, listed, KIND: tl.constexpr):
    """Which tokens stand at these indices."""
    if KIND == PICKED:
        tokens = tl.load(listed + indices, mask=inside, other=0)
    elif KIND == RANGE:
        tokens = first + indices * step
    else:
        tokens = indices
    return tokens


@triton.jit
def bits_of(position, start, slots, bits, ROWS: tl.constexpr, BLOCK: tl.constexpr, GRANULE: tl.constexpr):
    """Which columns of a tile each row sees, [ROWS, BLOCK], by the bit masks of the tile's granules."""
    WORDS: tl.constexpr = (GRANULE + 31) // 32
    offsets = tl.arange(0, BLOCK)
    column = offsets % GRANULE
    slot = tl.load(slots + start + position * (BLOCK // GRANULE) + offsets // GRANULE)
    rows = tl.arange(0, ROWS)
    word = tl.load(bits + (slot[None, :] * ROWS + rows[:, None]) * WORDS + (column // 32)[None, :])
    return ((word >> (column % 32)[None, :]) & 1) != 0


@triton.jit
def distances_of(rows, row_tokens, indices, tokens, first_distance, row_distance, KIND: tl.constexpr):
    """How far [M, N] keys lie behind queries: in steps of a column, or in tokens."""
    if KIND == RANGE:
        distances = (rows + row_distance)[:, None] - indices[None, :]
    else:
        distances = (row_tokens + first_distance)[:, None] - tokens[None, :]
    return distances


@triton.jit
def bias_of(bias, distances, query_tokens, inside, stride_bt, stride_br, num_biases):
    """Where the bias of [rows, columns] lies, which of them have one, and what it is, in base 2."""
    indices = query_tokens * stride_bt + distances * stride_br
    mask = inside & (distances >= 0) & (distances < num_biases)
    return indices, mask, tl.load(bias + indices, mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def scores_of(
    position,
    number,
    start,
    query,
    keys,
    valid,
    bias,
    low,
    high,
    rows,
    row_tokens,
    in_rows,
    first,
    step,
    listed,
    slots,
    bits,
    stride_kt,
    stride_bt,
    stride_br,
    num_biases,
    scale,
    first_distance,
    row_distance,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KIND: tl.constexpr,
    GRANULE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile of keys: its tokens, which of them are there, the keys, their scores in base 2 (-inf where not seen).

    At the end, where their biases lie and which have one that is seen (without a bias, anything).
    """
    indices = indices_of(position, start, listed, BLOCK_N, KIND, GRANULE)
    inside = (indices >= 0) & (indices < number)
    tokens = tokens_of(indices, inside, first, step, listed, KIND)
    key = load_rows(keys, tokens, stride_kt, inside, D, BLOCK_D, MASKED)
    scores = dot(query, tl.trans(key), PRECISION, UPCAST) * scale
    bias_places = tokens
    has_bias = inside
    if HAS_BIAS:
        distances = distances_of(rows, row_tokens, indices, tokens, first_distance, row_distance, KIND)
        both = in_rows[:, None] & inside[None, :]
        bias_places, has_bias, added = bias_of(
            bias, distances, row_tokens[:, None], both, stride_bt, stride_br, num_biases
        )
        scores += added
    if MASKED:
        if KIND == TABLE:
            seen = bits_of(position, start, slots, bits, BLOCK_M, BLOCK_N, GRANULE) & inside[None, :]
        else:
            seen = (indices[None, :] >= low[:, None]) & (indices[None, :] < high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        if HAS_BIAS:
            has_bias = has_bias & seen
    if HAS_VALID:
        shown = tl.load(valid + tokens, mask=inside, other=0)
        scores = tl.where((shown != 0)[None, :], scores, float("-inf"))
    return tokens, inside, key, scores, bias_places, has_bias


@triton.jit
def forward_walk(
    accumulated,
    peak,
    total,
    query,
    keys,
    values,
    valid,
    bias,
    low,
    high,
    rows,
    row_tokens,
    in_rows,
    source,
    first,
    step,
    listed,
    slots,
    bits,
    stride_kt,
    stride_vt,
    stride_bt,
    stride_br,
    num_biases,
    scale,
    first_distance,
    row_distance,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr,
    GRANULE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the tiles of one source into the running softmax: the accumulated output, the peak and the total."""
    number, start, left, full, count = walk_of(source, MASKED)
    for tile in range(0, count):
        position = position_of(tile, left, full, MASKED)
        tokens, inside, _, scores, _, _ = scores_of(
            position, number, start, query, keys, valid, bias, low, high, rows, row_tokens, in_rows, first, step,
            listed, slots, bits, stride_kt, stride_bt, stride_br, num_biases, scale, first_distance, row_distance, D,
            BLOCK_M, BLOCK_N, BLOCK_D, KIND, GRANULE, HAS_VALID, HAS_BIAS, PRECISION, UPCAST, MASKED,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing seen so far: exp2(-inf - 0) = 0
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        value = load_rows(values, tokens, stride_vt, inside, DV, BLOCK_DV, MASKED)
        accumulated = accumulated * shrink[:, None] + dot(weights.to(value.dtype), value, PRECISION, UPCAST)
        peak = new_peak
    return accumulated, peak, total


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    output_ptr,
    lse_ptr,
    valid_ptr,
    bias_ptr,
    items_ptr,
    low_ptr,
    high_ptr,
    listed_ptr,
    slots_ptr,
    bits_ptr,
    other_low_ptr,
    other_high_ptr,
    other_listed_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_valid,
    stride_bb,
    stride_bh,
    stride_bt,
    stride_br,
    num_biases,
    stride_listed,
    stride_other,
    scale,
    num_queries,
    num_heads,
    ratio,  # query heads of a key head
    copies,  # programs of an item: batch x repeats
    repeats,  # heads that share an item
    period,  # and how far apart they are
    step,
    first_distance,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr,
    OTHER: tl.constexpr,
    GRANULE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MERGE: tl.constexpr,
    FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Output [B, T, H, Dv] and LSE [B, T, H] of a tile of queries; if MERGE merged with what is there.

    A query that sees nothing has output 0 and LSE -inf, in the end (FINAL) +inf.
    """
    item, batch, head = item_of(items_ptr, copies, repeats, period)
    if head >= num_heads:
        return
    variant = tl.load(item + 1)
    first_query = tl.load(item + 2)
    first_key = tl.load(item + 3)
    rows = tl.load(item + 4) + tl.arange(0, BLOCK_M)
    in_rows = rows < tl.load(item + 5)
    row_tokens = first_query + rows * step
    row_distance = (first_distance + first_query - first_key) // step

    key_head = head // ratio
    keys = key_ptr + batch * stride_kb + key_head.to(tl.int64) * stride_kh
    values = value_ptr + batch * stride_vb + key_head.to(tl.int64) * stride_vh
    valid = valid_ptr + batch * stride_valid
    bias = bias_ptr + batch * stride_bb + head.to(tl.int64) * stride_bh
    queries = query_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    query = load_rows(queries, row_tokens, stride_qt, in_rows, D, BLOCK_D, True)

    accumulated = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    bounds = variant * num_queries + row_tokens
    low = tl.load(low_ptr + bounds, mask=in_rows, other=0)
    high = tl.load(high_ptr + bounds, mask=in_rows, other=0)
    listed = listed_ptr + variant * stride_listed
    if KIND == TABLE:
        listed = listed_ptr
    for phase in tl.static_range(2):
        accumulated, peak, total = forward_walk(
            accumulated, peak, total, query, keys, values, valid, bias, low, high, rows, row_tokens, in_rows, item +
            6, first_key, step, listed, slots_ptr, bits_ptr, stride_kt, stride_vt, stride_bt, stride_br, num_biases,
            scale, first_distance, row_distance, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, KIND, GRANULE, HAS_VALID,
            HAS_BIAS, PRECISION, UPCAST, phase == 1,
        )  # fmt: skip
    if OTHER == PICKED:
        low = tl.load(other_low_ptr + bounds, mask=in_rows, other=0)
        high = tl.load(other_high_ptr + bounds, mask=in_rows, other=0)
        listed = other_listed_ptr + variant * stride_other
        for phase in tl.static_range(2):
            accumulated, peak, total = forward_walk(
                accumulated, peak, total, query, keys, values, valid, bias, low, high, rows, row_tokens, in_rows, item
                + 11, 0, 1, listed, slots_ptr, bits_ptr, stride_kt, stride_vt, stride_bt, stride_br, num_biases,
                scale, first_distance, row_distance, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PICKED, GRANULE,
                HAS_VALID, HAS_BIAS, PRECISION, UPCAST, phase == 1,
            )  # fmt: skip

    lse = tl.where(total > 0, peak + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    output = accumulated / tl.where(total > 0, total, 1.0)[:, None]
    outputs = output_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
    lses = lse_ptr + (batch * num_queries + row_tokens) * num_heads + head
    if MERGE:
        before = tl.load(lses, mask=in_rows, other=0.0) * LOG2E
        top = tl.maximum(before, lse)
        top = tl.where(top == float("-inf"), 0.0, top)
        weight_before = tl.exp2(before - top)
        weight = tl.exp2(lse - top)
        both = weight_before + weight
        output_before = load_rows(outputs, row_tokens, stride_ot, in_rows, DV, BLOCK_DV, True).to(tl.float32)
        output = output_before * weight_before[:, None] + output * weight[:, None]
        output = output / tl.where(both > 0, both, 1.0)[:, None]
        lse = tl.where(both > 0, top + tl.log2(tl.where(both > 0, both, 1.0)), float("-inf"))
    if FINAL:
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    tl.store(lses, lse * LN2, mask=in_rows)
    store_rows(outputs, row_tokens, stride_ot, in_rows, output, DV, BLOCK_DV, False)
