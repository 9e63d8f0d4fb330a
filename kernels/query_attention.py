r"""Attention within a frame whose queries, and whose further keys, may come from other rows.

    out[r] = softmax(Q[r] K[r]^T / sqrt(d) + M[r]) V[r]
    Q[r]   = q[r] + blend[r] (q[query_row[r]] - q[r])
    K[r]   = k[r], then k[s] of each s in key_rows[r] other than r; V[r] likewise
    M[r]   = 0 over the row's own keys, key_log_mask[s] over those of row s

Rows are elements of the denoiser's batch. With `query_row[r] = r` a row uses its own queries; with
another row's index it looks at its own keys and values through that row's eyes, which is how
queries carry motion from a reference to a target. With `key_rows` it also sees the same frame of
other rows, which is how shots come to agree on a subject.

Scores, softmax and sums are in float32. One program owns a tile of one row's, frame's and head's
queries and passes over the keys with a running maximum, so that no score reaches memory. Queries
and further keys are addressed through their row index and never copied. A head dim is split into
a power of two and a tail (40 = 32 + 16, 80 = 64 + 16, 160 = 128 + 32), which pads 40 to 48 and not
to 64. The backward direction gathers instead of adding in place: which rows read a row is sorted
first, so that gradients are the same bits every time.

Source: "Motion by Queries", arXiv:2412.07750, sec. 3 (query injection) and sec. 5 (extended
attention); the running maximum, FlashAttention-2, arXiv:2307.08691, sec. 3.
"""

import functools
import math

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.errors import ShapeError
from kinetiq.kernels._compile import CompileCase
from kinetiq.kernels._cost import Cost
from kinetiq.kernels._launch import settings
from kinetiq.kernels._triton import tl, triton

MAX_HEAD_DIM = 256  # on a GPU: a tile of queries and its sums must fit in registers
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_SMALL = 128  # keys; below it, and in bf16 at any length, the products beat the fused CPU kernel
_LOG2E = tl.constexpr(math.log2(math.e))


def query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
    key_rows: Tensor | None = None,
    key_log_mask: Tensor | None = None,
) -> Tensor:
    """Return attention of each frame to its own keys, with queries and further keys by row.

    Args:
        query: [rows, frames, tokens, heads * d], any strides; on a GPU float32, float16 or
            bfloat16, and d at most `MAX_HEAD_DIM`.
        key: [rows, frames, keys, heads * d]; `frames` may be 1 where all frames share keys.
        value: like `key`.
        heads: number of attention heads.
        query_row: int64 [rows], whose queries each row uses; None: its own.
        query_blend: [rows] or [rows, frames, tokens], the share of the other row's queries;
            None: all of them.
        key_rows: int64 [rows, n], whose keys and values of the same frame each row sees after
            its own, which it always sees, once. An entry that is the row itself adds nothing,
            so it fills up a list that is shorter; another row that is listed twice counts twice.
        key_log_mask: [rows, frames or 1 as in `key`, keys], added to the scores of a row's keys
            where *other* rows see them, such as 0 for a subject and -inf elsewhere; a row's view
            of its own keys is not masked. None: 0. No gradient flows to it.

    Returns:
        [rows, frames, tokens, heads * d], contiguous, the type of `query`.

    Raises:
        ShapeError: a shape, type or device does not match, or an index that is on the CPU is out
            of range; one on a GPU is not read, and must be checked where it is made.
    """
    _check(query, key, value, heads, query_row, query_blend)
    _check_keys(key, key_rows, key_log_mask)
    if key_log_mask is not None:
        key_log_mask = key_log_mask.detach()
    inputs = (query, key, value, query_row, query_blend, key_rows, key_log_mask, heads)
    if not query.is_cuda and not torch.compiler.is_compiling():
        return _attend_on_cpu(*inputs)  # an operator is only overhead there, most in training
    out: Tensor
    if query.is_cuda and _is_trained(query, key, value, query_blend):
        out, _ = _query_attention_training(*inputs)
    else:
        out = _query_attention(*inputs)
    return out


def choose_queries(query: Tensor, query_row: Tensor, query_blend: Tensor | None = None) -> Tensor:
    """Return `query` with each row's queries moved towards those of `query_row`."""
    chosen = query[query_row]
    if query_blend is None:
        return chosen
    blend = query_blend.to(query.dtype)
    blend = blend.reshape(*blend.shape, *([1] * (query.ndim - blend.ndim)))
    return torch.lerp(query, chosen, blend)


def reduce_leak(query: Tensor, query_row: Tensor, reduced: Tensor) -> Tensor:
    """Return the queries of `query_row`, on the row's own mean over frames where `reduced`.

    Where `reduced` [rows] is true the result is mean_F(q[r]) + q[s] - mean_F(q[s]) with
    s = query_row[r]: the other row's motion without what its queries say of what it shows.
    """
    mean = query.mean(1, keepdim=True)
    on_own_mean = mean + (query - mean)[query_row]
    return torch.where(reduced.reshape(-1, 1, 1, 1), on_own_mean, query[query_row])


def extend_keys(
    key: Tensor, value: Tensor, key_rows: Tensor, key_log_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values of each row and of its `key_rows`, and what is added to the scores.

    Args:
        key: [rows, frames, keys, width].
        value: like `key`.
        key_rows: int64 [rows, n], as in `query_attention`.
        key_log_mask: [rows, frames, keys], as in `query_attention`.

    Returns:
        Keys and values [rows, frames, (1 + n) * keys, width], the row's own first, and the mask
        [rows, frames, (1 + n) * keys] in the type of `key`, -inf where an entry adds nothing.
    """
    own = torch.arange(key.shape[0], device=key.device)[:, None]
    seen = torch.cat([own, key_rows], 1)  # [rows, 1 + n]
    mask = key.new_zeros(key.shape[:3])[seen]  # [rows, 1 + n, frames, keys]
    if key_log_mask is not None:
        mask[:, 1:] = key_log_mask.to(key.dtype)[key_rows]
    mask[:, 1:].masked_fill_((key_rows == own)[:, :, None, None], -math.inf)
    keys, values = (t[seen].transpose(1, 2).flatten(2, 3) for t in (key, value))
    return keys, values, mask.transpose(1, 2).flatten(2, 3)


def query_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    query_row: Tensor | None = None,
    query_blend: Tensor | None = None,
    key_rows: Tensor | None = None,
    key_log_mask: Tensor | None = None,
) -> Tensor:
    """The definition, in PyTorch. Computes in float32 or wider, returns the type of `query`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (query, key, value))
    if query_row is not None:
        q = choose_queries(q, query_row, query_blend)
    mask = k.new_zeros(k.shape[:3])
    if key_rows is not None:
        k, v, mask = extend_keys(k, v, key_rows, key_log_mask)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(2, 3) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask[:, :, None, None]
    return (scores.softmax(-1) @ v).transpose(2, 3).flatten(-2).to(query.dtype)


def cost(
    query_shape: tuple[int, int, int, int],
    key_shape: tuple[int, int, int, int],
    itemsize: int,
    *,
    further_rows: int = 0,
    backward: bool = False,
) -> Cost:
    """Bytes that must cross memory and operations that must run, whatever the implementation.

    Args:
        query_shape: [rows, frames, tokens, heads * d].
        key_shape: [rows, frames or 1, keys, heads * d].
        itemsize: bytes of one element.
        further_rows: n of `key_rows`, where no entry is the row itself.
        backward: the cost of the gradient, whose scores have to be computed again.
    """
    queries, keys = math.prod(query_shape), math.prod(key_shape)
    seen = key_shape[2] * (1 + further_rows)
    if backward:  # reads q, k, v, the output and its gradient, writes three; five products
        return Cost(bytes=itemsize * 4 * (queries + keys), flops=10 * queries * seen)
    return Cost(bytes=itemsize * 2 * (queries + keys), flops=4 * queries * seen)


def split_head_dim(d: int) -> tuple[int, int]:
    """Return the powers of two, the second perhaps 0, that `d` columns are held in.

    The second is at least 16, which is what a matrix instruction takes. Where the two would be
    no less than the next power of two, that is the first and the second is 0.
    """
    whole = max(16, triton.next_power_of_2(d))
    main = whole // 2
    tail = max(16, triton.next_power_of_2(d - main)) if d > main else 0
    return (main, tail) if main >= 16 and main + tail < whole else (whole, 0)


@triton.jit
def _tile(
    ptr, places, columns, inside, stride_token, stride_column,
    D: tl.constexpr, EVEN: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load [places, columns]; zeros where not `inside`, unless EVEN says that all are."""
    places = tl.cast(places, tl.int64)[:, None] * stride_token
    address = ptr + places + tl.cast(columns, tl.int64)[None, :] * stride_column
    if EVEN and EVEN_COLUMNS:
        tile = tl.load(address)
    elif EVEN:
        tile = tl.load(address, mask=columns[None, :] < D, other=0.0)
    elif EVEN_COLUMNS:
        tile = tl.load(address, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(address, mask=inside[:, None] & (columns[None, :] < D), other=0.0)
    return tile


@triton.jit
def _query_tile(
    own_ptr, other_ptr, share, places, columns, inside, stride_token, stride_column,
    D: tl.constexpr, MODE: tl.constexpr, EVEN: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of queries: the other row's in MODE 1, a blend in MODE 2 and 3, else the own."""
    if MODE == 0:
        tile = _tile(
            own_ptr, places, columns, inside, stride_token, stride_column, D, EVEN, EVEN_COLUMNS
        )
    else:
        tile = _tile(
            other_ptr, places, columns, inside, stride_token, stride_column, D, EVEN, EVEN_COLUMNS
        )
        if MODE > 1:
            own = _tile(
                own_ptr, places, columns, inside, stride_token, stride_column,
                D, EVEN, EVEN_COLUMNS,
            ).to(tl.float32)  # fmt: skip
            way = tile.to(tl.float32) - own
            weight = share[:, None]
            # as torch.lerp: exact at both ends
            moved = tl.where(
                weight < 0.5, own + weight * way, tile.to(tl.float32) - way * (1.0 - weight)
            )
            tile = moved.to(tile.dtype)
    return tile


@triton.jit
def _shares(
    blend_ptr, row, frame, places, inside, frames, tokens, like,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The share of the other row's queries at each place, rounded to their type."""
    if MODE == 3:
        address = blend_ptr + (row * frames + frame) * tokens + places
        share = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    elif MODE == 2:
        share = tl.load(blend_ptr + row).to(tl.float32) + tl.zeros([BLOCK], tl.float32)
    else:
        share = tl.zeros([BLOCK], tl.float32)
    return share.to(like).to(tl.float32)


@triton.jit
def _log2_scores(
    q_main, q_tail, k_main, k_tail, SCALE: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr
):
    """Q k^T / sqrt(d) in units of log2(e), so that exp2 can follow."""
    scores = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
    if TAIL:
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    return scores * (SCALE * _LOG2E)


@triton.jit
def _seen_row(key_rows_ptr, row, index, further, keys):
    """The row whose keys come at `index`, the own first, and how many of them there are to see."""
    listed = tl.load(key_rows_ptr + row * further + index - 1, mask=index > 0, other=0)
    seen = tl.where(index > 0, listed, row)
    return seen, tl.where((index > 0) & (listed == row), 0, keys)


@triton.jit
def _see_keys(
    q_main, q_tail, out_main, out_tail, high, total,
    key_ptr, value_ptr, mask_ptr, masked, count,
    key_stride_token, key_stride_column, value_stride_token, value_stride_column,
    SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_KEYS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take `count` keys into the running maximum, total and sums of values."""
    places = tl.arange(0, BLOCK_N)
    mains, tails = tl.arange(0, MAIN), MAIN + tl.arange(0, 16 if TAIL == 0 else TAIL)
    for start in range(0, count, BLOCK_N):
        inside = start + places < count
        key = key_ptr + tl.cast(start, tl.int64) * key_stride_token
        value = value_ptr + tl.cast(start, tl.int64) * value_stride_token
        k_main = _tile(
            key, places, mains, inside, key_stride_token, key_stride_column,
            D, EVEN_KEYS, EVEN_COLUMNS or TAIL > 0,
        )  # fmt: skip
        k_tail = k_main
        if TAIL:
            k_tail = _tile(
                key, places, tails, inside, key_stride_token, key_stride_column,
                D, EVEN_KEYS, EVEN_COLUMNS,
            )  # fmt: skip
        scores = _log2_scores(q_main, q_tail, k_main, k_tail, SCALE, TAIL, PRECISION)
        if mask_ptr is not None:
            mask = tl.load(mask_ptr + start + places, mask=inside & masked, other=0.0)
            scores += (mask * _LOG2E)[None, :]
        if not EVEN_KEYS:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, 1))
        weights = tl.math.exp2(scores - higher[:, None])  # [BLOCK_M, BLOCK_N]
        fade = tl.math.exp2(high - higher)
        total = total * fade + tl.sum(weights, 1)
        high = higher
        v_main = _tile(
            value, places, mains, inside, value_stride_token, value_stride_column,
            D, EVEN_KEYS, EVEN_COLUMNS or TAIL > 0,
        )  # fmt: skip
        weights = weights.to(v_main.dtype)
        out_main = tl.dot(weights, v_main, out_main * fade[:, None], input_precision=PRECISION)
        if TAIL:
            v_tail = _tile(
                value, places, tails, inside, value_stride_token, value_stride_column,
                D, EVEN_KEYS, EVEN_COLUMNS,
            )  # fmt: skip
            out_tail = tl.dot(weights, v_tail, out_tail * fade[:, None], input_precision=PRECISION)
    return out_main, out_tail, high, total


@triton.jit
def _query_attention_kernel(
    query_ptr, key_ptr, value_ptr, query_row_ptr, blend_ptr, key_rows_ptr, mask_ptr,
    frames, tokens, keys, further,
    query_stride_row, query_stride_frame, query_stride_token, query_stride_column,
    key_stride_row, key_stride_frame, key_stride_token, key_stride_column,
    value_stride_row, value_stride_frame, value_stride_token, value_stride_column,
    mask_stride_row, mask_stride_frame,
    out_ptr, log2_total_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_KEYS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_M)
    block = tl.program_id(0) % blocks  # neighbours share keys, which then stay in the cache
    rest = tl.program_id(0) // blocks
    head = (rest % HEADS).to(tl.int64)
    frame = (rest // HEADS % frames).to(tl.int64)
    row = (rest // HEADS // frames).to(tl.int64)  # int32 offsets overflow past 2**31 elements

    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = places < tokens
    mains, tails = tl.arange(0, MAIN), MAIN + tl.arange(0, 16 if TAIL == 0 else TAIL)
    source = row
    if MODE > 0:
        source = tl.load(query_row_ptr + row)
    share = _shares(
        blend_ptr, row, frame, places, inside, frames, tokens, query_ptr.dtype.element_ty,
        MODE, BLOCK_M,
    )  # fmt: skip
    query = query_ptr + frame * query_stride_frame + head * D * query_stride_column
    own, other = query + row * query_stride_row, query + source * query_stride_row
    q_main = _query_tile(
        own, other, share, places, mains, inside, query_stride_token, query_stride_column,
        D, MODE, False, EVEN_COLUMNS or TAIL > 0,
    )  # fmt: skip
    q_tail = q_main
    if TAIL:
        q_tail = _query_tile(
            own, other, share, places, tails, inside, query_stride_token, query_stride_column,
            D, MODE, False, EVEN_COLUMNS,
        )  # fmt: skip

    out_main = tl.zeros([BLOCK_M, MAIN], tl.float32)
    out_tail = tl.zeros([BLOCK_M, 16 if TAIL == 0 else TAIL], tl.float32)
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    key = key_ptr + frame * key_stride_frame + head * D * key_stride_column
    value = value_ptr + frame * value_stride_frame + head * D * value_stride_column
    if key_rows_ptr is None:
        out_main, out_tail, high, total = _see_keys(
            q_main, q_tail, out_main, out_tail, high, total,
            key + row * key_stride_row, value + row * value_stride_row, None, False, keys,
            key_stride_token, key_stride_column, value_stride_token, value_stride_column,
            SCALE, D, MAIN, TAIL, BLOCK_N, EVEN_KEYS, EVEN_COLUMNS, PRECISION,
        )  # fmt: skip
    else:
        # the own keys come first and unmasked, so the maximum is finite whatever the masks say
        for index in range(further + 1):
            seen, count = _seen_row(key_rows_ptr, row, index, further, keys)
            mask = mask_ptr
            if mask_ptr is not None:
                mask = mask_ptr + seen * mask_stride_row + frame * mask_stride_frame
            out_main, out_tail, high, total = _see_keys(
                q_main, q_tail, out_main, out_tail, high, total,
                key + seen * key_stride_row, value + seen * value_stride_row,
                mask, index > 0, count,
                key_stride_token, key_stride_column, value_stride_token, value_stride_column,
                SCALE, D, MAIN, TAIL, BLOCK_N, EVEN_KEYS, EVEN_COLUMNS, PRECISION,
            )  # fmt: skip

    out = out_ptr + ((row * frames + frame) * tokens + places[:, None]) * (HEADS * D) + head * D
    main = (out_main / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out + mains[None, :], main, mask=inside[:, None] & (mains[None, :] < D))
    if TAIL:
        tail = (out_tail / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out + tails[None, :], tail, mask=inside[:, None] & (tails[None, :] < D))
    if log2_total_ptr is not None:
        line = ((row * frames + frame) * HEADS + head) * tokens + places
        tl.store(log2_total_ptr + line, high + tl.math.log2(total), mask=inside)


@triton.jit
def _query_gradient_kernel(
    grad_ptr, result_ptr, log2_total_ptr,
    query_ptr, key_ptr, value_ptr, query_row_ptr, blend_ptr, key_rows_ptr, mask_ptr,
    frames, tokens, keys, further,
    query_stride_row, query_stride_frame, query_stride_token, query_stride_column,
    key_stride_row, key_stride_frame, key_stride_token, key_stride_column,
    value_stride_row, value_stride_frame, value_stride_token, value_stride_column,
    mask_stride_row, mask_stride_frame,
    query_grad_ptr, dots_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_KEYS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries as chosen, and of each the dot product of output and gradient."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    head = (rest % HEADS).to(tl.int64)
    frame = (rest // HEADS % frames).to(tl.int64)
    row = (rest // HEADS // frames).to(tl.int64)

    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = places < tokens
    mains, tails = tl.arange(0, MAIN), MAIN + tl.arange(0, 16 if TAIL == 0 else TAIL)
    source = row
    if MODE > 0:
        source = tl.load(query_row_ptr + row)
    share = _shares(
        blend_ptr, row, frame, places, inside, frames, tokens, query_ptr.dtype.element_ty,
        MODE, BLOCK_M,
    )  # fmt: skip
    query = query_ptr + frame * query_stride_frame + head * D * query_stride_column
    own, other = query + row * query_stride_row, query + source * query_stride_row
    q_main = _query_tile(
        own, other, share, places, mains, inside, query_stride_token, query_stride_column,
        D, MODE, False, EVEN_COLUMNS or TAIL > 0,
    )  # fmt: skip
    width = HEADS * D
    corner = (row * frames + frame) * tokens * width + head * D
    grad_main = _tile(
        grad_ptr + corner, places, mains, inside, width, 1, D, False, EVEN_COLUMNS or TAIL > 0
    )
    result = _tile(
        result_ptr + corner, places, mains, inside, width, 1, D, False, EVEN_COLUMNS or TAIL > 0
    )
    dots = tl.sum(grad_main.to(tl.float32) * result.to(tl.float32), 1)  # [BLOCK_M]
    q_tail, grad_tail = q_main, grad_main
    if TAIL:
        q_tail = _query_tile(
            own, other, share, places, tails, inside, query_stride_token, query_stride_column,
            D, MODE, False, EVEN_COLUMNS,
        )  # fmt: skip
        grad_tail = _tile(
            grad_ptr + corner, places, tails, inside, width, 1, D, False, EVEN_COLUMNS
        )
        result = _tile(result_ptr + corner, places, tails, inside, width, 1, D, False, EVEN_COLUMNS)
        dots += tl.sum(grad_tail.to(tl.float32) * result.to(tl.float32), 1)
    line = ((row * frames + frame) * HEADS + head) * tokens + places
    tl.store(dots_ptr + line, dots, mask=inside)
    log2_total = tl.load(log2_total_ptr + line, mask=inside, other=float("inf"))

    sum_main = tl.zeros([BLOCK_M, MAIN], tl.float32)
    sum_tail = tl.zeros([BLOCK_M, 16 if TAIL == 0 else TAIL], tl.float32)
    key = key_ptr + frame * key_stride_frame + head * D * key_stride_column
    value = value_ptr + frame * value_stride_frame + head * D * value_stride_column
    if key_rows_ptr is None:
        sum_main, sum_tail = _gather_from_keys(
            q_main, q_tail, grad_main, grad_tail, log2_total, dots, sum_main, sum_tail,
            key + row * key_stride_row, value + row * value_stride_row, None, False, keys,
            key_stride_token, key_stride_column, value_stride_token, value_stride_column,
            SCALE, D, MAIN, TAIL, BLOCK_N, EVEN_KEYS, EVEN_COLUMNS, PRECISION,
        )  # fmt: skip
    else:
        for index in range(further + 1):
            seen, count = _seen_row(key_rows_ptr, row, index, further, keys)
            mask = mask_ptr
            if mask_ptr is not None:
                mask = mask_ptr + seen * mask_stride_row + frame * mask_stride_frame
            sum_main, sum_tail = _gather_from_keys(
                q_main, q_tail, grad_main, grad_tail, log2_total, dots, sum_main, sum_tail,
                key + seen * key_stride_row, value + seen * value_stride_row,
                mask, index > 0, count,
                key_stride_token, key_stride_column, value_stride_token, value_stride_column,
                SCALE, D, MAIN, TAIL, BLOCK_N, EVEN_KEYS, EVEN_COLUMNS, PRECISION,
            )  # fmt: skip

    out = query_grad_ptr + corner + tl.cast(places, tl.int64)[:, None] * width
    main = (sum_main * SCALE).to(query_grad_ptr.dtype.element_ty)
    tl.store(out + mains[None, :], main, mask=inside[:, None] & (mains[None, :] < D))
    if TAIL:
        tail = (sum_tail * SCALE).to(query_grad_ptr.dtype.element_ty)
        tl.store(out + tails[None, :], tail, mask=inside[:, None] & (tails[None, :] < D))


@triton.jit
def _gather_from_keys(
    q_main, q_tail, grad_main, grad_tail, log2_total, dots, sum_main, sum_tail,
    key_ptr, value_ptr, mask_ptr, masked, count,
    key_stride_token, key_stride_column, value_stride_token, value_stride_column,
    SCALE: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_KEYS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of a tile of queries what `count` keys say of it."""
    places = tl.arange(0, BLOCK_N)
    mains, tails = tl.arange(0, MAIN), MAIN + tl.arange(0, 16 if TAIL == 0 else TAIL)
    for start in range(0, count, BLOCK_N):
        inside = start + places < count
        key = key_ptr + tl.cast(start, tl.int64) * key_stride_token
        value = value_ptr + tl.cast(start, tl.int64) * value_stride_token
        k_main = _tile(
            key, places, mains, inside, key_stride_token, key_stride_column,
            D, EVEN_KEYS, EVEN_COLUMNS or TAIL > 0,
        )  # fmt: skip
        v_main = _tile(
            value, places, mains, inside, value_stride_token, value_stride_column,
            D, EVEN_KEYS, EVEN_COLUMNS or TAIL > 0,
        )  # fmt: skip
        k_tail = k_main
        slope = tl.dot(grad_main, tl.trans(v_main), input_precision=PRECISION)
        if TAIL:
            k_tail = _tile(
                key, places, tails, inside, key_stride_token, key_stride_column,
                D, EVEN_KEYS, EVEN_COLUMNS,
            )  # fmt: skip
            v_tail = _tile(
                value, places, tails, inside, value_stride_token, value_stride_column,
                D, EVEN_KEYS, EVEN_COLUMNS,
            )  # fmt: skip
            slope = tl.dot(grad_tail, tl.trans(v_tail), slope, input_precision=PRECISION)
        scores = _log2_scores(q_main, q_tail, k_main, k_tail, SCALE, TAIL, PRECISION)
        if mask_ptr is not None:
            mask = tl.load(mask_ptr + start + places, mask=inside & masked, other=0.0)
            scores += (mask * _LOG2E)[None, :]
        if not EVEN_KEYS:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        weights = tl.math.exp2(scores - log2_total[:, None])
        push = (weights * (slope - dots[:, None])).to(k_main.dtype)  # gradient of the scores
        sum_main = tl.dot(push, k_main, sum_main, input_precision=PRECISION)
        if TAIL:
            sum_tail = tl.dot(push, k_tail, sum_tail, input_precision=PRECISION)
    return sum_main, sum_tail


@triton.jit
def _key_gradient_kernel(
    grad_ptr, log2_total_ptr, dots_ptr,
    query_ptr, key_ptr, value_ptr, query_row_ptr, blend_ptr, mask_ptr, order_ptr, start_ptr,
    frames, tokens, keys, entries,
    query_stride_row, query_stride_frame, query_stride_token, query_stride_column,
    key_stride_row, key_stride_frame, key_stride_token, key_stride_column,
    value_stride_row, value_stride_frame, value_stride_token, value_stride_column,
    mask_stride_row, mask_stride_frame,
    key_grad_ptr, value_grad_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_TOKENS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of one row's keys and values, from all rows that see them."""
    blocks = tl.cdiv(keys, BLOCK_N)
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    head = (rest % HEADS).to(tl.int64)
    frame = (rest // HEADS % frames).to(tl.int64)
    row = (rest // HEADS // frames).to(tl.int64)

    places = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = places < keys
    mains, tails = tl.arange(0, MAIN), MAIN + tl.arange(0, 16 if TAIL == 0 else TAIL)
    key = key_ptr + row * key_stride_row + frame * key_stride_frame + head * D * key_stride_column
    value = value_ptr + row * value_stride_row + frame * value_stride_frame
    value += head * D * value_stride_column
    k_main = _tile(
        key, places, mains, inside, key_stride_token, key_stride_column,
        D, False, EVEN_COLUMNS or TAIL > 0,
    )  # fmt: skip
    v_main = _tile(
        value, places, mains, inside, value_stride_token, value_stride_column,
        D, False, EVEN_COLUMNS or TAIL > 0,
    )  # fmt: skip
    k_tail, v_tail = k_main, v_main
    if TAIL:
        k_tail = _tile(
            key, places, tails, inside, key_stride_token, key_stride_column, D, False, EVEN_COLUMNS
        )
        v_tail = _tile(
            value, places, tails, inside, value_stride_token, value_stride_column,
            D, False, EVEN_COLUMNS,
        )  # fmt: skip

    k_sum_main = tl.zeros([BLOCK_N, MAIN], tl.float32)
    v_sum_main = tl.zeros([BLOCK_N, MAIN], tl.float32)
    k_sum_tail = tl.zeros([BLOCK_N, 16 if TAIL == 0 else TAIL], tl.float32)
    v_sum_tail = tl.zeros([BLOCK_N, 16 if TAIL == 0 else TAIL], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if order_ptr is None:
        k_sum_main, k_sum_tail, v_sum_main, v_sum_tail = _gather_from_queries(
            k_main, k_tail, v_main, v_tail, k_sum_main, k_sum_tail, v_sum_main, v_sum_tail,
            bias, grad_ptr, log2_total_ptr, dots_ptr, query_ptr, query_row_ptr, blend_ptr,
            row, frame, head, frames, tokens,
            query_stride_row, query_stride_frame, query_stride_token, query_stride_column,
            HEADS, D, MAIN, TAIL, SCALE, MODE, PRECISION, BLOCK_M, EVEN_TOKENS, EVEN_COLUMNS,
        )  # fmt: skip
    else:
        for index in range(tl.load(start_ptr + row), tl.load(start_ptr + row + 1)):
            pair = tl.load(order_ptr + index)
            if mask_ptr is not None:
                mask = mask_ptr + row * mask_stride_row + frame * mask_stride_frame + places
                bias = tl.load(mask, mask=inside & (pair % entries != 0), other=0.0) * _LOG2E
            k_sum_main, k_sum_tail, v_sum_main, v_sum_tail = _gather_from_queries(
                k_main, k_tail, v_main, v_tail, k_sum_main, k_sum_tail, v_sum_main, v_sum_tail,
                bias, grad_ptr, log2_total_ptr, dots_ptr, query_ptr, query_row_ptr, blend_ptr,
                pair // entries, frame, head, frames, tokens,
                query_stride_row, query_stride_frame, query_stride_token, query_stride_column,
                HEADS, D, MAIN, TAIL, SCALE, MODE, PRECISION, BLOCK_M, EVEN_TOKENS, EVEN_COLUMNS,
            )  # fmt: skip

    corner = (row * frames + frame) * keys * (HEADS * D) + head * D
    corner += tl.cast(places, tl.int64)[:, None] * (HEADS * D)
    kept = inside[:, None] & (mains[None, :] < D)
    kind = key_grad_ptr.dtype.element_ty
    tl.store(key_grad_ptr + corner + mains[None, :], (k_sum_main * SCALE).to(kind), mask=kept)
    tl.store(value_grad_ptr + corner + mains[None, :], v_sum_main.to(kind), mask=kept)
    if TAIL:
        kept = inside[:, None] & (tails[None, :] < D)
        tl.store(key_grad_ptr + corner + tails[None, :], (k_sum_tail * SCALE).to(kind), mask=kept)
        tl.store(value_grad_ptr + corner + tails[None, :], v_sum_tail.to(kind), mask=kept)


@triton.jit
def _gather_from_queries(
    k_main, k_tail, v_main, v_tail, k_sum_main, k_sum_tail, v_sum_main, v_sum_tail,
    bias, grad_ptr, log2_total_ptr, dots_ptr, query_ptr, query_row_ptr, blend_ptr,
    reader, frame, head, frames, tokens,
    query_stride_row, query_stride_frame, query_stride_token, query_stride_column,
    HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, EVEN_TOKENS: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a tile of keys and values what one row's queries say of them."""
    mains, tails = tl.arange(0, MAIN), MAIN + tl.arange(0, 16 if TAIL == 0 else TAIL)
    width = HEADS * D
    source = reader
    if MODE > 0:
        source = tl.load(query_row_ptr + reader)
    query = query_ptr + frame * query_stride_frame + head * D * query_stride_column
    own, other = query + reader * query_stride_row, query + source * query_stride_row
    grad = grad_ptr + (reader * frames + frame) * tokens * width + head * D
    line = ((reader * frames + frame) * HEADS + head) * tokens
    for start in range(0, tokens, BLOCK_M):
        places = start + tl.arange(0, BLOCK_M)
        inside = places < tokens
        share = _shares(
            blend_ptr, reader, frame, places, inside, frames, tokens, query_ptr.dtype.element_ty,
            MODE, BLOCK_M,
        )  # fmt: skip
        q_main = _query_tile(
            own, other, share, places, mains, inside, query_stride_token, query_stride_column,
            D, MODE, EVEN_TOKENS, EVEN_COLUMNS or TAIL > 0,
        )  # fmt: skip
        grad_main = _tile(
            grad, places, mains, inside, width, 1, D, EVEN_TOKENS, EVEN_COLUMNS or TAIL > 0
        )
        q_tail, grad_tail = q_main, grad_main
        slope = tl.dot(v_main, tl.trans(grad_main), input_precision=PRECISION)
        if TAIL:
            q_tail = _query_tile(
                own, other, share, places, tails, inside, query_stride_token, query_stride_column,
                D, MODE, EVEN_TOKENS, EVEN_COLUMNS,
            )  # fmt: skip
            grad_tail = _tile(grad, places, tails, inside, width, 1, D, EVEN_TOKENS, EVEN_COLUMNS)
            slope = tl.dot(v_tail, tl.trans(grad_tail), slope, input_precision=PRECISION)
        # a query that is not there has an infinite total, and so no weight
        log2_total = tl.load(log2_total_ptr + line + places, mask=inside, other=float("inf"))
        dots = tl.load(dots_ptr + line + places, mask=inside, other=0.0)
        scores = _log2_scores(k_main, k_tail, q_main, q_tail, SCALE, TAIL, PRECISION)
        weights = tl.math.exp2(scores + bias[:, None] - log2_total[None, :])  # [keys, queries]
        push = (weights * (slope - dots[None, :])).to(q_main.dtype)
        weights = weights.to(grad_main.dtype)
        v_sum_main = tl.dot(weights, grad_main, v_sum_main, input_precision=PRECISION)
        k_sum_main = tl.dot(push, q_main, k_sum_main, input_precision=PRECISION)
        if TAIL:
            v_sum_tail = tl.dot(weights, grad_tail, v_sum_tail, input_precision=PRECISION)
            k_sum_tail = tl.dot(push, q_tail, k_sum_tail, input_precision=PRECISION)
    return k_sum_main, k_sum_tail, v_sum_main, v_sum_tail


@triton.jit
def _return_gradient_kernel(
    chosen_grad_ptr, blend_ptr, order_ptr, start_ptr,
    size, width, tokens_of_row,
    query_grad_ptr,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Hand the gradient of queries as chosen back to the rows that they were chosen from."""
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    token = place // width
    kind = query_grad_ptr.dtype.element_ty
    total = tl.zeros([BLOCK], tl.float32)
    if MODE > 1:
        share = _share_of(blend_ptr, row, token, inside, tokens_of_row, kind, MODE)
        grad = tl.load(chosen_grad_ptr + row * size + place, mask=inside, other=0.0)
        total += (1.0 - share) * grad.to(tl.float32)
    for index in range(tl.load(start_ptr + row), tl.load(start_ptr + row + 1)):
        reader = tl.load(order_ptr + index)
        grad = tl.load(chosen_grad_ptr + reader * size + place, mask=inside, other=0.0)
        if MODE > 1:
            share = _share_of(blend_ptr, reader, token, inside, tokens_of_row, kind, MODE)
            total += share * grad.to(tl.float32)
        else:
            total += grad.to(tl.float32)
    tl.store(query_grad_ptr + row * size + place, total.to(kind), mask=inside)


@triton.jit
def _share_of(blend_ptr, row, token, inside, tokens_of_row, like, MODE: tl.constexpr):
    if MODE == 3:
        share = tl.load(blend_ptr + row * tokens_of_row + token, mask=inside, other=0.0)
    else:
        share = tl.load(blend_ptr + row)
    return share.to(like).to(tl.float32)


def _launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    key_rows: Tensor | None,
    key_log_mask: Tensor | None,
    heads: int,
    out: Tensor,
    log2_total: Tensor | None,
) -> None:
    """Fill `out`, contiguous like `query`, and `log2_total`, float32 [rows, frames, heads, tokens].

    `log2_total` is the logarithm to base 2 of the sum of the exponentials of a query's scores.
    """
    rows, frames, tokens, width = query.shape
    keys, d = key.shape[2], width // heads
    key_rows, key_log_mask = _plain(key_rows), _plain_mask(key_log_mask)
    sizes = _settings("query_attention", d, query.dtype, tokens, keys)
    grid = (rows * frames * heads * triton.cdiv(tokens, sizes["BLOCK_M"]),)
    _query_attention_kernel[grid](
        query, key, value, _plain(query_row), _plain(query_blend), key_rows, key_log_mask,
        frames, tokens, keys, 0 if key_rows is None else key_rows.shape[1],
        *_strides(query, key, value, key_log_mask),
        out, log2_total,
        **_constants(query, query_row, query_blend, heads),
        **sizes,
        EVEN_KEYS=keys % sizes["BLOCK_N"] == 0,
    )  # fmt: skip


def _launch_backward(
    grad: Tensor,
    out: Tensor,
    log2_total: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    key_rows: Tensor | None,
    key_log_mask: Tensor | None,
    heads: int,
    chosen_grad: Tensor,
    dots: Tensor,
    query_grad: Tensor,
    key_grad: Tensor,
    value_grad: Tensor,
) -> None:
    """Fill the last five from the others; `grad` and `out` are contiguous.

    `chosen_grad`, like `query`, is the gradient of the queries as chosen, and the same tensor as
    `query_grad` where there is no `query_row`; `dots` is float32 like `log2_total`; `key_grad` and
    `value_grad` are [rows, frames, keys, width] whether or not the frames share keys.
    """
    rows, frames, tokens, width = query.shape
    keys, d = key.shape[2], width // heads
    blend, row, mask = _plain(query_blend), _plain(query_row), _plain_mask(key_log_mask)
    key_rows = _plain(key_rows)
    further = 0 if key_rows is None else key_rows.shape[1]
    constants = _constants(query, query_row, query_blend, heads)
    strides = _strides(query, key, value, mask)

    sizes = _settings("query_attention_query_gradient", d, query.dtype, tokens, keys)
    grid = (rows * frames * heads * triton.cdiv(tokens, sizes["BLOCK_M"]),)
    _query_gradient_kernel[grid](
        grad, out, log2_total, query, key, value, row, blend, key_rows, mask,
        frames, tokens, keys, further, *strides,
        chosen_grad, dots,
        **constants, **sizes, EVEN_KEYS=keys % sizes["BLOCK_N"] == 0,
    )  # fmt: skip

    order = start = None
    if key_rows is not None:
        own = torch.arange(rows, device=key.device)[:, None]
        nobody = torch.where(key_rows == own, rows, key_rows)  # sorts behind all rows
        order, start = _readers(torch.cat([own, nobody], 1).flatten(), rows)
    sizes = _settings("query_attention_key_gradient", d, query.dtype, tokens, keys)
    grid = (rows * frames * heads * triton.cdiv(keys, sizes["BLOCK_N"]),)
    _key_gradient_kernel[grid](
        grad, log2_total, dots, query, key, value, row, blend, mask, order, start,
        frames, tokens, keys, 1 + further, *strides,
        key_grad, value_grad,
        **constants, **sizes, EVEN_TOKENS=tokens % sizes["BLOCK_M"] == 0,
    )  # fmt: skip

    if row is not None:
        order, start = _readers(row, rows)
        size = frames * tokens * width
        chosen = settings("query_attention_return_gradient")
        _return_gradient_kernel[(rows * triton.cdiv(size, chosen["BLOCK"]),)](
            chosen_grad, blend, order, start, size, width, frames * tokens, query_grad,
            MODE=constants["MODE"], **chosen,
        )  # fmt: skip


def _readers(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Entries of `index` by value: those of `r` are order[start[r] : start[r + 1]], ascending."""
    ordered, order = torch.sort(index, stable=True)
    bounds = torch.arange(rows + 1, device=index.device)
    return order, torch.searchsorted(ordered, bounds)


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _plain_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.float().contiguous()


def _strides(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """Strides of the four, those of shared keys with 0 in place of the frame's."""
    of_mask = (0, 0) if mask is None else mask.stride()[:2]
    strides = (*query.stride(), *key.stride(), *value.stride(), *of_mask)
    if key.shape[1] == query.shape[1]:
        return strides
    return tuple(0 if at in (5, 9, 13) else stride for at, stride in enumerate(strides))


def _constants(
    query: Tensor, query_row: Tensor | None, query_blend: Tensor | None, heads: int
) -> dict[str, int | float | str | bool]:
    d = query.shape[-1] // heads
    main, tail = split_head_dim(d)
    mode = 0 if query_row is None else 1
    if query_blend is not None:
        mode = 2 if query_blend.ndim == 1 else 3
    return {
        "HEADS": heads,
        "D": d,
        "MAIN": main,
        "TAIL": tail,
        "SCALE": d**-0.5,
        "MODE": mode,
        "PRECISION": "ieee",  # of float32: TF32 would lose the 1e-4 that is promised
        "EVEN_COLUMNS": main + tail == d,
    }


def _settings(kernel: str, d: int, dtype: torch.dtype, tokens: int, keys: int) -> dict[str, int]:
    """Settings of the padded head dim, with tiles no larger than the tensors need."""
    wide = "_fp32" if dtype == torch.float32 else ""
    chosen = settings(kernel, f"d{sum(split_head_dim(d))}{wide}")
    for name, size in {"BLOCK_M": tokens, "BLOCK_N": keys}.items():
        needed = max(16, triton.next_power_of_2(size))
        if needed < chosen[name]:
            chosen[name] = needed
            chosen["num_warps"] = min(chosen["num_warps"], 4)
    return chosen


@torch.library.custom_op("kinetiq::query_attention", mutates_args=(), device_types="cuda")
def _query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    key_rows: Tensor | None,
    key_log_mask: Tensor | None,
    heads: int,
) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _launch_forward(
        query, key, value, query_row, query_blend, key_rows, key_log_mask, heads, out, None
    )
    return out


@_query_attention.register_fake
def _(query, key, value, query_row, query_blend, key_rows, key_log_mask, heads):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@_query_attention.register_kernel("cpu")
def _(query, key, value, query_row, query_blend, key_rows, key_log_mask, heads):
    with torch.autocast("cpu", enabled=False):  # the operator's type is that of `query`
        out = _attend_on_cpu(
            query, key, value, query_row, query_blend, key_rows, key_log_mask, heads
        )
    return out.contiguous()


@torch.library.custom_op("kinetiq::query_attention_training", mutates_args=(), device_types="cuda")
def _query_attention_training(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    key_rows: Tensor | None,
    key_log_mask: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """The same, and what the backward direction would else have to compute again."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    log2_total = _per_query(query, heads)
    _launch_forward(
        query, key, value, query_row, query_blend, key_rows, key_log_mask, heads, out, log2_total
    )
    return out, log2_total


@_query_attention_training.register_fake
def _(query, key, value, query_row, query_blend, key_rows, key_log_mask, heads):
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, _per_query(query, heads)


@torch.library.custom_op("kinetiq::query_attention_backward", mutates_args=(), device_types="cuda")
def _query_attention_backward(
    grad: Tensor,
    out: Tensor,
    log2_total: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    key_rows: Tensor | None,
    key_log_mask: Tensor | None,
    heads: int,
    blend_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query_grad, key_grad, value_grad, blend_grad = _gradients(
        query, key, query_blend if blend_needed else None
    )
    chosen_grad = query_grad if query_row is None else torch.empty_like(query_grad)
    # one gradient a frame, added up after: a frame's keys then need not wait for the others
    shared = key.shape[1] != query.shape[1]
    parts = [
        t.new_empty(t.shape[0], query.shape[1], *t.shape[2:], dtype=torch.float32) if shared else t
        for t in (key_grad, value_grad)
    ]
    _launch_backward(
        grad.contiguous(), out, log2_total, query, key, value, query_row, query_blend, key_rows,
        key_log_mask, heads, chosen_grad, torch.empty_like(log2_total), query_grad, *parts,
    )  # fmt: skip
    if shared:
        key_grad, value_grad = (part.sum(1, keepdim=True).to(key.dtype) for part in parts)
    if query_row is not None and query_blend is not None and blend_needed:
        way = query[query_row].float() - query.float()
        along = (chosen_grad.float() * way).sum(-1)  # [rows, frames, tokens]
        along = along.sum((1, 2)) if query_blend.ndim == 1 else along
        blend_grad = along.to(query_blend.dtype)
    return query_grad, key_grad, value_grad, blend_grad


@_query_attention_backward.register_fake
def _(
    grad, out, log2_total, query, key, value, query_row, query_blend, key_rows, key_log_mask,
    heads, blend_needed,
):  # fmt: skip
    return _gradients(query, key, query_blend if blend_needed else None)


def _gradients(
    query: Tensor, key: Tensor, blend: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty gradients of query, key, value and blend; the last has no elements without one."""
    whole = torch.contiguous_format
    query_grad = torch.empty_like(query, memory_format=whole)
    key_grad, value_grad = (torch.empty_like(key, memory_format=whole) for _ in range(2))
    if blend is None:
        return query_grad, key_grad, value_grad, query.new_empty(0)
    return query_grad, key_grad, value_grad, torch.empty_like(blend, memory_format=whole)


def _per_query(query: Tensor, heads: int) -> Tensor:
    rows, frames, tokens, _ = query.shape
    return query.new_empty(rows, frames, heads, tokens, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _save_training(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad: Tensor):
    """The gradient of an operator that saved nothing but its inputs."""
    tensors = ctx.saved_tensors
    if grad.is_cuda:
        kept = _query_attention_training(*tensors, ctx.heads)
        return _launch_saved(ctx, grad, tensors, kept)
    wanted = [at for at in (0, 1, 2, 4) if ctx.needs_input_grad[at]]
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() if at in wanted else t for at, t in enumerate(tensors)
        ]
        query, key, value, row, blend, key_rows, mask = leaves
        out = _attend_on_cpu(query, key, value, row, blend, key_rows, mask, ctx.heads)
    found = torch.autograd.grad(out, [leaves[at] for at in wanted], grad)
    grads: list[Tensor | None] = [None] * 8
    for at, gradient in zip(wanted, found, strict=True):
        grads[at] = gradient
    return tuple(grads)


def _differentiate_training(ctx, grad: Tensor, _: Tensor | None):
    *tensors, out, log2_total = ctx.saved_tensors
    return _launch_saved(ctx, grad, tensors, (out, log2_total))


def _launch_saved(ctx, grad: Tensor, tensors, kept):
    blend_needed = ctx.needs_input_grad[4]
    query_grad, key_grad, value_grad, blend_grad = _query_attention_backward(
        grad, *kept, *tensors, ctx.heads, blend_needed
    )
    blend_grad = blend_grad if blend_needed else None
    return query_grad, key_grad, value_grad, None, blend_grad, None, None, None


_query_attention.register_autograd(_differentiate, setup_context=_save)
_query_attention_training.register_autograd(_differentiate_training, setup_context=_save_training)


def _attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    key_rows: Tensor | None,
    key_log_mask: Tensor | None,
    heads: int,
) -> Tensor:
    if query_row is not None:
        query = choose_queries(query, query_row, query_blend)
    rows, frames, tokens, width = query.shape
    mask = None
    if key_rows is not None:
        key, value, mask = extend_keys(key, value, key_rows, key_log_mask)
        mask = mask.flatten(0, 1)[:, None, None]
    if key.shape[1] == 1:  # keys shared by all frames: fold the frames into the tokens
        query = query.reshape(rows, 1, frames * tokens, width)
    q, k, v = (
        t.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value)
    )
    out = _attend(q, k, v) if mask is None else _attend(q, k, v, mask)
    return out.transpose(1, 2).reshape(rows, frames, tokens, width)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over [batch, heads, tokens, d], by whichever way is quicker on a CPU."""
    if min(query.shape[-2], key.shape[-2]) >= _SMALL:
        if query.dtype == torch.bfloat16 and query.requires_grad:
            q, k, v = query.float(), key.float(), value.float()
            wide = None if mask is None else mask.float()
            return F.scaled_dot_product_attention(q, k, v, wide).to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, mask)
    if query.dtype == torch.float32 and not query.requires_grad:
        return F.scaled_dot_product_attention(query, key, value, mask)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    wider = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wider).to(value.dtype) @ value


def _is_trained(query: Tensor, key: Tensor, value: Tensor, blend: Tensor | None) -> bool:
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (query, key, value, blend))


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    query_row: Tensor | None,
    query_blend: Tensor | None,
) -> None:
    where = "query_attention"
    if query.ndim != 4 or heads < 1 or query.shape[-1] % heads:
        raise ShapeError(
            f"{where}: query must be [rows, frames, tokens, heads * d] with heads = {heads}, "
            f"got {list(query.shape)}"
        )
    rows, frames, tokens, width = query.shape
    if query.is_cuda and (width // heads > MAX_HEAD_DIM or query.dtype not in KERNEL_TYPES):
        raise ShapeError(
            f"{where}: query must be float32, float16 or bfloat16 with d <= {MAX_HEAD_DIM} on a "
            f"GPU, got {query.dtype} with d = {width // heads}"
        )
    for name, tensor in {"key": key, "value": value}.items():
        if tensor.ndim != 4 or tensor.shape[0] != rows or tensor.shape[-1] != width:
            raise ShapeError(
                f"{where}: {name} must be [rows = {rows}, frames or 1, keys, {width}] to match "
                f"query {list(query.shape)}, got {list(tensor.shape)}"
            )
        if tensor.shape[1] not in (1, frames):
            raise ShapeError(
                f"{where}: {name} must have {frames} frames or 1, got {tensor.shape[1]}"
            )
        check_kind(where, name, tensor, query)
    if key.shape != value.shape:
        raise ShapeError(
            f"{where}: key and value must have one shape, got {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ShapeError(
            f"{where}: query and key must have elements, got {list(query.shape)} and "
            f"{list(key.shape)}"
        )
    check_rows(where, "query_row", query_row, rows)
    check_blend(where, "query_blend", query_blend, (rows, frames, tokens))
    if query_blend is not None and query_row is None:
        raise ShapeError(f"{where}: query_blend needs query_row, got query_blend alone")


def _check_keys(key: Tensor, key_rows: Tensor | None, key_log_mask: Tensor | None) -> None:
    where = "query_attention"
    if key_rows is not None:
        if key_rows.ndim != 2 or len(key_rows) != len(key) or key_rows.dtype != torch.int64:
            raise ShapeError(
                f"{where}: key_rows must be int64 [rows = {len(key)}, n], "
                f"got {key_rows.dtype} {list(key_rows.shape)}"
            )
        _check_range(where, "key_rows", key_rows, len(key))
    if key_log_mask is None:
        return
    if key_rows is None:
        raise ShapeError(f"{where}: key_log_mask needs key_rows, got key_log_mask alone")
    if key_log_mask.shape != key.shape[:3] or not key_log_mask.is_floating_point():
        raise ShapeError(
            f"{where}: key_log_mask must be floating [rows, frames, keys] = "
            f"{list(key.shape[:3])} like key, got {key_log_mask.dtype} {list(key_log_mask.shape)}"
        )


def check_kind(where: str, name: str, tensor: Tensor, query: Tensor) -> None:
    """Require `tensor` to have the type of `query` and to be on its device."""
    if tensor.dtype != query.dtype or tensor.device != query.device:
        raise ShapeError(
            f"{where}: {name} must be {query.dtype} on {query.device} like query, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def check_rows(where: str, name: str, index: Tensor | None, rows: int) -> None:
    """Require `index` to be int64 [rows], with values in range.

    Values on a GPU are not read, since that would wait for it: they are checked when controls are
    resolved.
    """
    if index is not None and (list(index.shape) != [rows] or index.dtype != torch.int64):
        raise ShapeError(
            f"{where}: {name} must be int64 [rows = {rows}], got {index.dtype} {list(index.shape)}"
        )
    if index is not None:
        _check_range(where, name, index, rows)


def _check_range(where: str, name: str, index: Tensor, rows: int) -> None:
    if index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= rows:
        raise ShapeError(
            f"{where}: {name} must have values from 0 to {rows - 1}, got {low} to {high}"
        )


def check_blend(where: str, name: str, blend: Tensor | None, full: tuple[int, int, int]) -> None:
    """Require `blend` to be [rows] or [rows, frames, tokens]."""
    if blend is not None and tuple(blend.shape) not in (full[:1], full):
        raise ShapeError(
            f"{where}: {name} must be [rows] or [rows, frames, tokens] = {list(full)}, "
            f"got {list(blend.shape)}"
        )


def _compile_case(
    shape: str,
    frames: int,
    tokens: int,
    heads: int,
    d: int,
    *,
    keys: int | None = None,
    blend: int = 0,
    further: int = 0,
    backward: bool = False,
) -> CompileCase:
    """A launch with three rows: two halves of guidance, and the source that they read.

    `keys` are those of a prompt that the frames share, `blend` is the rank of `query_blend`, and
    `further` the length of `key_rows`.
    """
    launch = functools.partial(
        _launch_empty, (3, frames, tokens, heads * d), heads, keys, blend, further, backward
    )
    padded = sum(split_head_dim(d)) / d
    return CompileCase("query_attention", shape, not backward, launch, padded)


def _launch_empty(
    shape: tuple[int, int, int, int],
    heads: int,
    keys: int | None,
    blend: int,
    further: int,
    backward: bool,
    dtype: torch.dtype,
) -> None:
    empty = functools.partial(torch.empty, device="meta")
    rows, frames, tokens, width = shape
    query = empty(shape, dtype=dtype)
    key = empty(shape if keys is None else (rows, 1, keys, width), dtype=dtype)
    query_row = empty(rows, dtype=torch.int64) if keys is None else None
    query_blend = empty((rows, frames, tokens)[:blend], dtype=dtype) if blend else None
    key_rows = empty(rows, further, dtype=torch.int64) if further else None
    mask = empty(key.shape[:3]) if further else None
    inputs = (query, key, key, query_row, query_blend, key_rows, mask, heads)
    if not backward:
        _launch_forward(*inputs, query, _per_query(query, heads))
        return
    kept = _per_query(query, heads)
    key_grad = empty((rows, frames, *key.shape[2:]), dtype=dtype if keys is None else None)
    _launch_backward(query, query, kept, *inputs, query, kept, query, key_grad, key_grad)


COMPILED = (
    _compile_case("animatediff_64x64", 16, 4096, 8, 40),
    _compile_case("animatediff_64x64_region", 16, 4096, 8, 40, blend=3),
    _compile_case("animatediff_64x64_shots", 16, 4096, 8, 40, further=3),
    _compile_case("animatediff_64x64_prompt", 16, 4096, 8, 40, keys=77),
    _compile_case("animatediff_32x32", 16, 1024, 8, 80, blend=1),
    _compile_case("animatediff_32x32_prompt", 16, 1024, 8, 80, keys=77),
    _compile_case("animatediff_16x16", 16, 256, 8, 160, blend=1),
    _compile_case("animatediff_16x16_prompt", 16, 256, 8, 160, keys=77),
    _compile_case("animatediff_8x8", 16, 64, 8, 160, blend=1),
    _compile_case("zeroscope_40x72", 24, 2880, 5, 64, blend=1),
    _compile_case("zeroscope_40x72_prompt", 24, 2880, 5, 64, keys=77),
    _compile_case("zeroscope_5x9", 24, 45, 20, 64, blend=1),
    _compile_case("videocrafter2_40x64", 16, 2560, 5, 64, blend=1),
    _compile_case("embedded_16x16", 8, 256, 2, 32, blend=1),
    _compile_case("embedded_16x16_prompt", 8, 256, 2, 32, keys=24),
    _compile_case("animatediff_64x64", 16, 4096, 8, 40, backward=True),
    _compile_case("animatediff_64x64_prompt", 16, 4096, 8, 40, keys=77, backward=True),
    _compile_case("animatediff_32x32", 16, 1024, 8, 80, blend=1, backward=True),
    _compile_case("animatediff_32x32_shots", 16, 1024, 8, 80, further=3, backward=True),
    _compile_case("animatediff_16x16", 16, 256, 8, 160, blend=1, backward=True),
    _compile_case("zeroscope_40x72", 24, 2880, 5, 64, blend=1, backward=True),
    _compile_case("embedded_16x16", 8, 256, 2, 32, blend=1, backward=True),
)
