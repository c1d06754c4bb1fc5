"""The kernels themselves, in Triton's language; `triton_launch` is how they are called. Importing this needs Triton.

Shapes: R rows, H heads, N tokens of the running scale, D head size (padded to a power of two), P slots of a store,
M queries and C keys of one tile, K heads that keep their new tokens.

Numbers of tokens and heads are not specialised: tokens change from scale to scale, and kernels compiled for divisible
ones would gain nothing. Offsets into tensors are computed in 64 bits. Some detours are for Triton's interpreter; they
cost nothing worth having where kernels are compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Adding and subtracting 1.5 * 2^23 rounds a number below 2^22 to whole ones, half to even.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def _as_type(x, DTYPE: tl.constexpr):
    """fp32 rounded to DTYPE, half to even."""
    if DTYPE == tl.bfloat16:
        # by hand, since Triton's interpreter cuts off; not a number stays so
        bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _as_fp32(x):
    if x.dtype == tl.bfloat16:
        # by hand, since Triton's interpreter is wrong about numbers below 2^-126
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _float8_code(x):
    """The bits of float8_e4m3fn of an fp32 within +-448, half to even, on devices without the type as well."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # seven bits of exponent and mantissa, with the bias of the exponent changed from 127 to 7
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    # below 2^-6 the codes are multiples of 2^-9, the spacing of fp32 at 2^14
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(bits < (121 << 23), small, normal) | sign).to(tl.uint8)


@triton.jit
def _decoded(codes, FLOAT8: tl.constexpr, COMPUTE: tl.constexpr):
    if FLOAT8:
        return codes.to(tl.float8e4nv, bitcast=True).to(COMPUTE)
    else:
        return codes.to(COMPUTE)


@triton.jit
def _add_tile(q_MD, k_CD, v_CD, factor, shift_1C, weight, max_M, sum_M, acc_MD):
    """One step of the online softmax, base 2: over keys with logits `q k^T * factor + shift`, values times `weight`.

    A key with shift -inf counts for nothing. Every tile has a key that counts, so the maximum is finite from the first.
    """
    logits_MC = tl.dot(q_MD, tl.trans(k_CD), input_precision="ieee") * factor + shift_1C
    new_max_M = tl.maximum(max_M, tl.max(logits_MC, 1))
    p_MC = tl.exp2(logits_MC - new_max_M[:, None])
    fade_M = tl.exp2(max_M - new_max_M)
    sum_M = sum_M * fade_M + tl.sum(p_MC, 1)
    acc_MD = tl.dot((p_MC * weight).to(v_CD.dtype), v_CD, acc_MD * fade_M[:, None], input_precision="ieee")
    return new_max_M, sum_M, acc_MD


@triton.jit
def _listed(slots_X, bias_X, begin, start, count, BLOCK_C: tl.constexpr, BIASED: tl.constexpr):
    """Of the tile at `start` of a head's list: who is in the list, the slots, and what is added to the logits."""
    at_C = start + tl.arange(0, BLOCK_C)
    listed_C = at_C < count
    slot_C = tl.load(slots_X + begin + at_C, mask=listed_C, other=0).to(tl.int64)
    if BIASED:
        bias_C = tl.load(bias_X + begin + at_C, mask=listed_C, other=0.0) * LOG2E
    else:
        bias_C = tl.zeros((BLOCK_C,), tl.float32)
    return listed_C, slot_C, tl.where(listed_C, bias_C, float("-inf"))[None, :]


@triton.jit
def _add_plain(
    q_MD, max_M, sum_M, acc_MD, keys_PD, values_PD, stride_p, begin, count, slots_X, bias_X, channel_D, in_D,
    BIASED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The online softmax over the uncoded tokens of a head."""
    for start in range(0, count, BLOCK_C):
        listed_C, slot_C, shift_1C = _listed(slots_X, bias_X, begin, start, count, BLOCK_C, BIASED)
        at_CD = slot_C[:, None] * stride_p + channel_D[None, :]
        in_CD = listed_C[:, None] & in_D
        k_CD = tl.load(keys_PD + at_CD, mask=in_CD, other=0.0).to(COMPUTE)
        v_CD = tl.load(values_PD + at_CD, mask=in_CD, other=0.0).to(COMPUTE)
        max_M, sum_M, acc_MD = _add_tile(q_MD, k_CD, v_CD, LOG2E, shift_1C, 1.0, max_M, sum_M, acc_MD)
    return max_M, sum_M, acc_MD


@triton.jit
def _add_coded(
    q_MD, max_M, sum_M, acc_MD, keys_PD, values_PD, stride_p, key_scales_P, value_scales_P, begin, count, slots_X,
    bias_X, channel_D, in_D, BIASED: tl.constexpr, FLOAT8: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The online softmax over the coded tokens of a head."""
    unit = 1.0
    for start in range(0, count, BLOCK_C):
        listed_C, slot_C, shift_1C = _listed(slots_X, bias_X, begin, start, count, BLOCK_C, BIASED)
        at_CD = slot_C[:, None] * stride_p + channel_D[None, :]
        in_CD = listed_C[:, None] & in_D
        k_CD = _decoded(tl.load(keys_PD + at_CD, mask=in_CD, other=0), FLOAT8, COMPUTE)
        v_CD = _decoded(tl.load(values_PD + at_CD, mask=in_CD, other=0), FLOAT8, COMPUTE)
        k_scale_C = _as_fp32(tl.load(key_scales_P + slot_C, mask=listed_C, other=0.0))
        v_scale_C = _as_fp32(tl.load(value_scales_P + slot_C, mask=listed_C, other=0.0))
        if COMPUTE == tl.float16:
            # Weights times scales would be too small for half precision, so the sum is carried in a unit of its
            # own: the largest scale of the tile, or 2^-24 where values are so small that they vanish anyway.
            new_unit = tl.maximum(tl.max(v_scale_C, 0), 5.9604645e-08)
            acc_MD = acc_MD * (unit / new_unit)
            v_scale_C = v_scale_C / new_unit
            unit = new_unit
        max_M, sum_M, acc_MD = _add_tile(
            q_MD, k_CD, v_CD, k_scale_C[None, :] * LOG2E, shift_1C, v_scale_C[None, :], max_M, sum_M, acc_MD
        )
    return max_M, sum_M, acc_MD * unit


@triton.jit(do_not_specialize=["part_rows", "all_rows", "heads", "tokens"])
def attention_kernel(
    out_RHND, out_stride_r, out_stride_h, out_stride_n,
    q_RHND, q_stride_r, q_stride_h, q_stride_n,
    k_RHND, k_stride_r, k_stride_h, k_stride_n,
    v_RHND, v_stride_r, v_stride_h, v_stride_n,
    arena_2RPD, arena_stride_2, arena_stride_r, arena_stride_p,
    plain_begins_RH, plain_begins_stride_r, plain_counts_RH, plain_counts_stride_r, plain_slots_X, plain_bias_X,
    codes_2RPD, codes_stride_2, codes_stride_r, codes_stride_p,
    scales_2RP, scales_stride_2, scales_stride_r,
    coded_begins_RH, coded_begins_stride_r, coded_counts_RH, coded_counts_stride_r, coded_slots_X, coded_bias_X,
    part_rows, all_rows, heads, tokens,
    PLAIN: tl.constexpr, PLAIN_BIASED: tl.constexpr, CODED: tl.constexpr, CODED_BIASED: tl.constexpr,
    FLOAT8: tl.constexpr, COMPUTE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M queries of one head of one row; programs of one head run together, as they share keys."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    held_row = row // part_rows * all_rows + row % part_rows
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    query_M = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    channel_D = tl.arange(0, BLOCK_D)
    in_D = (channel_D < D)[None, :]
    in_MD = (query_M < tokens)[:, None] & in_D
    query_M = query_M.to(tl.int64)

    at_MD = row * q_stride_r + head * q_stride_h + query_M[:, None] * q_stride_n + channel_D[None, :]
    q_MD = tl.load(q_RHND + at_MD, mask=in_MD, other=0.0).to(COMPUTE)
    max_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    if PLAIN:
        begin = tl.load(plain_begins_RH + row * plain_begins_stride_r + head)
        count = tl.load(plain_counts_RH + row * plain_counts_stride_r + head)
        keys_PD = arena_2RPD + held_row * arena_stride_r
        values_PD = keys_PD + tl.cast(arena_stride_2, tl.int64)
        max_M, sum_M, acc_MD = _add_plain(
            q_MD, max_M, sum_M, acc_MD, keys_PD, values_PD, arena_stride_p, begin, count, plain_slots_X, plain_bias_X,
            channel_D, in_D, PLAIN_BIASED, COMPUTE, BLOCK_C,
        )  # fmt: skip
    if CODED:
        begin = tl.load(coded_begins_RH + row * coded_begins_stride_r + head)
        count = tl.load(coded_counts_RH + row * coded_counts_stride_r + head)
        keys_PD = codes_2RPD + held_row * codes_stride_r
        values_PD = keys_PD + tl.cast(codes_stride_2, tl.int64)
        key_scales_P = scales_2RP + held_row * scales_stride_r
        value_scales_P = key_scales_P + tl.cast(scales_stride_2, tl.int64)
        max_M, sum_M, acc_MD = _add_coded(
            q_MD, max_M, sum_M, acc_MD, keys_PD, values_PD, codes_stride_p, key_scales_P, value_scales_P, begin, count,
            coded_slots_X, coded_bias_X, channel_D, in_D, CODED_BIASED, FLOAT8, COMPUTE, BLOCK_C,
        )  # fmt: skip

    keys_ND = k_RHND + row * k_stride_r + head * k_stride_h
    values_ND = v_RHND + row * v_stride_r + head * v_stride_h
    for start in range(0, tokens, BLOCK_C):
        key_C = start + tl.arange(0, BLOCK_C)
        shift_1C = tl.where(key_C < tokens, 0.0, float("-inf"))[None, :]
        in_CD = (key_C < tokens)[:, None] & in_D
        key_C = key_C.to(tl.int64)
        k_CD = tl.load(keys_ND + key_C[:, None] * k_stride_n + channel_D[None, :], mask=in_CD, other=0.0).to(COMPUTE)
        v_CD = tl.load(values_ND + key_C[:, None] * v_stride_n + channel_D[None, :], mask=in_CD, other=0.0).to(COMPUTE)
        max_M, sum_M, acc_MD = _add_tile(q_MD, k_CD, v_CD, LOG2E, shift_1C, 1.0, max_M, sum_M, acc_MD)

    at_MD = row * out_stride_r + head * out_stride_h + query_M[:, None] * out_stride_n + channel_D[None, :]
    tl.store(out_RHND + at_MD, _as_type(acc_MD / sum_M[:, None], out_RHND.dtype.element_ty), mask=in_MD)


@triton.jit
def _append(
    x_ND, stride_n, store_PD, stride_p, scales_P, token_C, slot_C, in_C, channel_D, in_D,
    CODED: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Write the keys or the values of C tokens of one head."""
    in_CD = in_C[:, None] & in_D
    x_CD = _as_fp32(tl.load(x_ND + token_C[:, None] * stride_n + channel_D[None, :], mask=in_CD, other=0.0))
    at_CD = slot_C[:, None] * stride_p + channel_D[None, :]
    if CODED:
        largest: tl.constexpr = 448.0 if FLOAT8 else 127.0
        scale_C = _as_type(tl.div_rn(tl.max(tl.abs(x_CD), 1), largest), tl.bfloat16)
        scale_C = _as_fp32(scale_C)
        scale_C = tl.where(scale_C == 0.0, 1.0, scale_C)
        tl.store(scales_P + slot_C, _as_type(scale_C, tl.bfloat16), mask=in_C)
        coded_CD = tl.clamp(tl.div_rn(x_CD, scale_C[:, None]), -largest, largest)
        if FLOAT8:
            tl.store(store_PD + at_CD, _float8_code(coded_CD), mask=in_CD)
        else:
            tl.store(store_PD + at_CD, (coded_CD + ROUNDING - ROUNDING).to(tl.int8), mask=in_CD)
    else:
        tl.store(store_PD + at_CD, _as_type(x_CD, store_PD.dtype.element_ty), mask=in_CD)


@triton.jit(do_not_specialize=["part_rows", "all_rows", "kept", "tokens"])
def append_kernel(
    k_RHND, k_stride_r, k_stride_h, k_stride_n,
    v_RHND, v_stride_r, v_stride_h, v_stride_n,
    store_2RPD, store_stride_2, store_stride_r, store_stride_p,
    scales_2RP, scales_stride_2, scales_stride_r,
    heads_K, slots_KN, slots_stride_k,
    part_rows, all_rows, kept, tokens,
    CODED: tl.constexpr, FLOAT8: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write keys and values of BLOCK_C new tokens of one kept head of one row to their slots, as they are or coded."""
    blocks = tl.cdiv(tokens, BLOCK_C)
    row = (tl.program_id(0) // blocks // kept).to(tl.int64)
    of_kept = (tl.program_id(0) // blocks % kept).to(tl.int64)
    head = tl.load(heads_K + of_kept).to(tl.int64)
    token_C = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    in_C = token_C < tokens
    slot_C = tl.load(slots_KN + of_kept * slots_stride_k + token_C, mask=in_C, other=0).to(tl.int64)
    token_C = token_C.to(tl.int64)
    channel_D = tl.arange(0, BLOCK_D)
    in_D = (channel_D < D)[None, :]
    x_ND = k_RHND + row * k_stride_r + head * k_stride_h
    held_row = row // part_rows * all_rows + row % part_rows
    store_PD = store_2RPD + held_row * store_stride_r
    scales_P = scales_2RP
    if CODED:
        scales_P = scales_2RP + held_row * scales_stride_r
    _append(
        x_ND, k_stride_n, store_PD, store_stride_p, scales_P, token_C, slot_C, in_C, channel_D, in_D, CODED, FLOAT8
    )  # fmt: skip
    x_ND = v_RHND + row * v_stride_r + head * v_stride_h
    store_PD += tl.cast(store_stride_2, tl.int64)
    if CODED:
        scales_P += tl.cast(scales_stride_2, tl.int64)
    _append(
        x_ND, v_stride_n, store_PD, store_stride_p, scales_P, token_C, slot_C, in_C, channel_D, in_D, CODED, FLOAT8
    )  # fmt: skip
