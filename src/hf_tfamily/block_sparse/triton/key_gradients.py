"""Gradients of keys and values in Triton: dK and dV walk over queries, with scores transposed.

With the LSE of all parts, P = exp(S - LSE) needs nothing from other parts, so each source stands alone. The legend and
the helpers are kernels.py's.
"""

from .kernels import (
    LENGTHS,
    LOG2E,
    RANGE,
    TABLE,
    bias_of,
    bits_of,
    dot,
    indices_of,
    item_of,
    load_rows,
    position_of,
    store_rows,
    tl,
    tokens_of,
    triton,
    walk_of,
)


@triton.jit
def key_grad_walk(
    grad_key,
    grad_value,
    key,
    value,
    queries,
    grad_outputs,
    lses,
    deltas,
    bias,
    lows,
    highs,
    key_places,
    key_tokens,
    in_keys,
    source,
    first,
    step,
    listed,
    slots,
    bits,
    stride_qt,
    stride_ot,
    stride_bt,
    stride_br,
    num_biases,
    scale,
    first_distance,
    row_distance,
    num_heads,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr,
    GRANULE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the tiles of queries of one head give to dK and dV (before the scale)."""
    number, start, left, full, count = walk_of(source, MASKED)
    for tile in range(0, count):
        position = position_of(tile, left, full, MASKED)
        rows = indices_of(position, start, listed, BLOCK_M, KIND, GRANULE)
        inside = (rows >= 0) & (rows < number)
        tokens = rows
        if KIND != TABLE:
            tokens = first + rows * step
        query = load_rows(queries, tokens, stride_qt, inside, D, BLOCK_D, MASKED)
        scores = dot(key, tl.trans(query), PRECISION, UPCAST) * scale
        if HAS_BIAS:
            distances = (tokens + first_distance)[None, :] - key_tokens[:, None]
            if KIND == RANGE:
                distances = (rows + row_distance)[None, :] - key_places[:, None]
            both = in_keys[:, None] & inside[None, :]
            _, _, added = bias_of(bias, distances, tokens[None, :], both, stride_bt, stride_br, num_biases)
            scores += added
        lse = tl.load(lses + tokens * num_heads, mask=inside, other=float("inf")) * LOG2E
        weights = tl.exp2(scores - lse[None, :])
        if MASKED and KIND == TABLE:
            seen = bits_of(position, start, slots, bits, BLOCK_N, BLOCK_M, GRANULE) & inside[None, :]
            weights = tl.where(seen, weights, 0.0)
        elif MASKED:
            low = tl.load(lows + tokens, mask=inside, other=0)
            high = tl.load(highs + tokens, mask=inside, other=0)
            seen = (key_places[:, None] >= low[None, :]) & (key_places[:, None] < high[None, :])
            weights = tl.where(seen, weights, 0.0)
        grad_output = load_rows(grad_outputs, tokens, stride_ot, inside, DV, BLOCK_DV, MASKED)
        grad_value += dot(weights.to(grad_output.dtype), grad_output, PRECISION, UPCAST)
        delta = tl.load(deltas + tokens * num_heads, mask=inside, other=0.0)
        grad_weights = dot(value, tl.trans(grad_output), PRECISION, UPCAST)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_key += dot(grad_scores.to(query.dtype), query, PRECISION, UPCAST)
    return grad_key, grad_value


@triton.jit(do_not_specialize=LENGTHS)
def key_grad_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_output_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    workspace_ptr,
    valid_ptr,
    bias_ptr,
    items_ptr,
    low_ptr,
    high_ptr,
    listed_ptr,
    slots_ptr,
    bits_ptr,
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
    stride_gkb,
    stride_gkt,
    stride_gkh,
    stride_gvb,
    stride_gvt,
    stride_gvh,
    stride_valid,
    stride_bb,
    stride_bh,
    stride_bt,
    stride_br,
    num_biases,
    stride_listed,
    scale,
    score_scale,
    num_queries,
    num_heads,
    ratio,
    copies,
    repeats,
    period,
    step,
    first_distance,
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
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dK [B, S, heads, D] and dV [B, S, heads, Dv] of a tile of keys; if ADD added to what is there.

    `heads` are the query heads: their key head's gradient is a sum over them (a loop here would spill registers). If
    SPLIT the item covers some of the queries only, and its sums go to the workspace [items, B, repeats, N, D + Dv].
    """
    program = tl.program_id(0)
    item, batch, head = item_of(items_ptr, copies, repeats, period)
    if head >= num_heads:
        return
    variant = tl.load(item + 1)
    first_query = tl.load(item + 2)
    first_key = tl.load(item + 3)
    indices = tl.load(item + 4) + tl.arange(0, BLOCK_N)
    in_keys = indices < tl.load(item + 5)
    listed = listed_ptr + variant * stride_listed
    tokens = tokens_of(indices, in_keys, first_key, step, listed, KIND)
    row_distance = (first_distance + first_query - first_key) // step

    key_head = (head // ratio).to(tl.int64)
    key = load_rows(key_ptr + batch * stride_kb + key_head * stride_kh, tokens, stride_kt, in_keys, D, BLOCK_D, True)
    value = load_rows(
        value_ptr + batch * stride_vb + key_head * stride_vh, tokens, stride_vt, in_keys, DV, BLOCK_DV, True
    )
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    query_head = head.to(tl.int64)
    queries = query_ptr + batch * stride_qb + query_head * stride_qh
    grad_outputs = grad_output_ptr + batch * stride_ob + query_head * stride_oh
    bias = bias_ptr + batch * stride_bb + query_head * stride_bh
    flat = batch * num_queries * num_heads + query_head
    for phase in tl.static_range(2):
        grad_key, grad_value = key_grad_walk(
            grad_key, grad_value, key, value, queries, grad_outputs, lse_ptr + flat, delta_ptr + flat, bias,
            low_ptr + variant * num_queries, high_ptr + variant * num_queries, indices, tokens, in_keys, item + 6,
            first_query, step, listed_ptr, slots_ptr, bits_ptr, stride_qt, stride_ot, stride_bt, stride_br,
            num_biases, score_scale, first_distance, row_distance, num_heads, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
            BLOCK_DV, KIND, GRANULE, HAS_BIAS, PRECISION, UPCAST, phase == 1,
        )  # fmt: skip
    grad_key *= scale
    if HAS_VALID:
        shown = tl.load(valid_ptr + batch * stride_valid + tokens, mask=in_keys, other=0) != 0
        grad_key = tl.where(shown[:, None], grad_key, 0.0)
        grad_value = tl.where(shown[:, None], grad_value, 0.0)
    if SPLIT:
        rows = tl.arange(0, BLOCK_N)
        sums = workspace_ptr + program.to(tl.int64) * BLOCK_N * (D + DV)
        store_rows(sums, rows, D + DV, rows >= 0, grad_key, D, BLOCK_D, False)
        store_rows(sums + D, rows, D + DV, rows >= 0, grad_value, DV, BLOCK_DV, False)
    else:
        grads = grad_key_ptr + batch * stride_gkb + head.to(tl.int64) * stride_gkh
        store_rows(grads, tokens, stride_gkt, in_keys, grad_key, D, BLOCK_D, ADD)
        grads = grad_value_ptr + batch * stride_gvb + head.to(tl.int64) * stride_gvh
        store_rows(grads, tokens, stride_gvt, in_keys, grad_value, DV, BLOCK_DV, ADD)


@triton.jit(do_not_specialize=["num_out_heads", "copies", "repeats", "period", "step", "stride_listed"])
def key_grad_sum_kernel(
    workspace_ptr,
    grad_key_ptr,
    grad_value_ptr,
    items_ptr,
    listed_ptr,
    stride_gkb,
    stride_gkt,
    stride_gkh,
    stride_gvb,
    stride_gvt,
    stride_gvh,
    stride_listed,
    num_out_heads,
    copies,
    repeats,
    period,
    step,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr,
):
    """Add up, always in the same order, what the items of one tile of keys left in the workspace; add it to dK, dV."""
    copy = tl.program_id(0) % copies
    item, batch, head = item_of(items_ptr, copies, repeats, period)
    if head >= num_out_heads:
        return
    indices = tl.load(item + 4) + tl.arange(0, BLOCK_N)
    in_keys = indices < tl.load(item + 5)
    listed = listed_ptr + tl.load(item + 1) * stride_listed
    tokens = tokens_of(indices, in_keys, tl.load(item + 3), step, listed, KIND)
    first = tl.load(item + 6)
    count = tl.load(item + 7)

    rows = tl.arange(0, BLOCK_N)
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for slot in range(0, count):
        sums = workspace_ptr + ((first + slot).to(tl.int64) * copies + copy) * BLOCK_N * (D + DV)
        grad_key += load_rows(sums, rows, D + DV, rows >= 0, D, BLOCK_D, True)
        grad_value += load_rows(sums + D, rows, D + DV, rows >= 0, DV, BLOCK_DV, True)
    grads = grad_key_ptr + batch * stride_gkb + head.to(tl.int64) * stride_gkh
    store_rows(grads, tokens, stride_gkt, in_keys, grad_key, D, BLOCK_D, True)
    grads = grad_value_ptr + batch * stride_gvb + head.to(tl.int64) * stride_gvh
    store_rows(grads, tokens, stride_gvt, in_keys, grad_value, DV, BLOCK_DV, True)
