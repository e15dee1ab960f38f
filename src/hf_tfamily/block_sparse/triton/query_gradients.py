"""Gradients of queries in Triton: dQ, and with it the gradient of a bias, walks over keys as the forward does.

With the LSE of all parts, P = exp(S - LSE) needs nothing from other parts, so each source stands alone. The legend and
the helpers are kernels.py's.
"""

from .kernels import (
    LENGTHS,
    LOG2E,
    PICKED,
    TABLE,
    dot,
    item_of,
    load_rows,
    position_of,
    scores_of,
    store_rows,
    tl,
    triton,
    walk_of,
)


@triton.jit(do_not_specialize=["num_queries", "num_rows"])
def delta_kernel(
    grad_ptr,
    output_ptr,
    delta_ptr,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_ob,
    stride_ot,
    stride_oh,
    num_queries,
    num_heads,
    num_rows,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta = sum of dO * O over the head dimension, [B, T, H]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_DV)
    head = rows % num_heads
    token = (rows // num_heads) % num_queries
    batch = (rows // num_heads // num_queries).to(tl.int64)
    mask = (rows < num_rows)[:, None] & (dims < DV)[None, :]
    grad_rows = batch * stride_gb + token * stride_gt + head * stride_gh
    output_rows = batch * stride_ob + token * stride_ot + head * stride_oh
    grad = tl.load(grad_ptr + grad_rows[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    output = tl.load(output_ptr + output_rows[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + rows, tl.sum(grad * output, 1), mask=rows < num_rows)


@triton.jit
def query_grad_walk(
    grad_query,
    query,
    grad_output,
    lse,
    delta,
    keys,
    values,
    valid,
    bias,
    grad_bias,
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
    GRAD_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add what the tiles of one source give to dQ; if GRAD_BIAS write the gradient of their biases."""
    number, start, left, full, count = walk_of(source, MASKED)
    for tile in range(0, count):
        position = position_of(tile, left, full, MASKED)
        tokens, inside, key, scores, bias_places, has_bias = scores_of(
            position, number, start, query, keys, valid, bias, low, high, rows, row_tokens, in_rows, first, step,
            listed, slots, bits, stride_kt, stride_bt, stride_br, num_biases, scale, first_distance, row_distance, D,
            BLOCK_M, BLOCK_N, BLOCK_D, KIND, GRANULE, HAS_VALID, HAS_BIAS, PRECISION, UPCAST, MASKED,
        )  # fmt: skip
        weights = tl.exp2(scores - lse[:, None])
        value = load_rows(values, tokens, stride_vt, inside, DV, BLOCK_DV, MASKED)
        grad_weights = dot(grad_output, tl.trans(value), PRECISION, UPCAST)
        grad_scores = weights * (grad_weights - delta[:, None])
        if GRAD_BIAS:
            tl.store(grad_bias + bias_places, grad_scores.to(grad_bias.dtype.element_ty), mask=has_bias)
        grad_query += dot(grad_scores.to(key.dtype), key, PRECISION, UPCAST)
    return grad_query


@triton.jit(do_not_specialize=LENGTHS)
def query_grad_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_output_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    valid_ptr,
    bias_ptr,
    grad_bias_ptr,
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
    stride_gb,
    stride_gt,
    stride_gh,
    stride_valid,
    stride_bb,
    stride_bh,
    stride_bt,
    stride_br,
    num_biases,
    stride_listed,
    stride_other,
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
    OTHER: tl.constexpr,
    GRANULE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dQ [B, T, H, D] of a tile of queries; if ADD added to what is there."""
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
    grad_bias = grad_bias_ptr + batch * stride_bb + head.to(tl.int64) * stride_bh
    queries = query_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    grad_outputs = grad_output_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
    query = load_rows(queries, row_tokens, stride_qt, in_rows, D, BLOCK_D, True)
    grad_output = load_rows(grad_outputs, row_tokens, stride_ot, in_rows, DV, BLOCK_DV, True)
    flat = (batch * num_queries + row_tokens) * num_heads + head
    lse = tl.load(lse_ptr + flat, mask=in_rows, other=float("inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # of rows that see nothing and are not in the last pass
    delta = tl.load(delta_ptr + flat, mask=in_rows, other=0.0)

    grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bounds = variant * num_queries + row_tokens
    low = tl.load(low_ptr + bounds, mask=in_rows, other=0)
    high = tl.load(high_ptr + bounds, mask=in_rows, other=0)
    listed = listed_ptr + variant * stride_listed
    if KIND == TABLE:
        listed = listed_ptr
    for phase in tl.static_range(2):
        grad_query = query_grad_walk(
            grad_query, query, grad_output, lse, delta, keys, values, valid, bias, grad_bias, low, high, rows,
            row_tokens, in_rows, item + 6, first_key, step, listed, slots_ptr, bits_ptr, stride_kt, stride_vt,
            stride_bt, stride_br, num_biases, score_scale, first_distance, row_distance, D, DV, BLOCK_M, BLOCK_N,
            BLOCK_D, BLOCK_DV, KIND, GRANULE, HAS_VALID, HAS_BIAS, GRAD_BIAS, PRECISION, UPCAST, phase == 1,
        )  # fmt: skip
    if OTHER == PICKED:
        low = tl.load(other_low_ptr + bounds, mask=in_rows, other=0)
        high = tl.load(other_high_ptr + bounds, mask=in_rows, other=0)
        listed = other_listed_ptr + variant * stride_other
        for phase in tl.static_range(2):
            grad_query = query_grad_walk(
                grad_query, query, grad_output, lse, delta, keys, values, valid, bias, grad_bias, low, high, rows,
                row_tokens, in_rows, item + 11, 0, 1, listed, slots_ptr, bits_ptr, stride_kt, stride_vt, stride_bt,
                stride_br, num_biases, score_scale, first_distance, row_distance, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
                BLOCK_DV, PICKED, GRANULE, HAS_VALID, HAS_BIAS, GRAD_BIAS, PRECISION, UPCAST, phase == 1,
            )  # fmt: skip
    grads = grad_query_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh
    store_rows(grads, row_tokens, stride_gt, in_rows, grad_query * scale, D, BLOCK_D, ADD)
