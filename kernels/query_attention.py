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
import itertools
import math
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from kinetiq.errors import ShapeError
from kinetiq.kernels._autograd import differentiate, keep_types, make_room
from kinetiq.kernels._checks import (
    check_blend,
    check_device,
    check_heads,
    check_kind,
    check_range,
    check_rows,
    check_tensor,
    check_type,
)
from kinetiq.kernels._compile import NVIDIA, CompileCase
from kinetiq.kernels._cost import Cost
from kinetiq.kernels._launch import pretend, settings
from kinetiq.kernels._triton import tl, triton

MAX_HEAD_DIM = 256  # on a GPU: a tile of queries and its sums must fit in registers
KERNEL_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_SMALL = 128  # tokens or keys; below it, plain products often beat the fused kernel of a CPU
_MILD = 8.0  # the middle of most scores, and how far from it exp loses no more than two units
_KEPT = 2**17  # scores that a CPU's cache keeps, beside their gradient
_LINES = 32  # queries at least, below which products are slow
_LANES = 16  # keys; with fewer, the fused kernel of a CPU gives 0 where all scores are NaN
_LOG2E = tl.constexpr(math.log2(math.e))
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001  with its sums
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


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
            of range; one on a GPU is not looked at, and reads memory of others if it is wrong: it
            must be checked where it is made.
    """
    inputs = Inputs(query, key, value, query_row, query_blend, key_rows, key_log_mask, heads)
    _check(inputs)
    if not query.is_cuda and not torch.compiler.is_compiling():
        return _attend_on_cpu(inputs)  # an operator is only overhead there, most in training
    out: Tensor
    recorded = is_recorded(query, key, value, query_blend)
    if query.is_cuda and recorded and not torch.compiler.is_exporting():
        out, _ = _query_attention_training(*inputs)
    else:
        out = _query_attention(*inputs)
    return out


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor[index]`, whose gradient adds up in the same order every time."""
    # Indexing sorts in its gradient on a GPU, but not on a CPU, where `index_select` has one order.
    return tensor[index] if tensor.is_cuda else tensor.index_select(0, index)


def choose_queries(query: Tensor, query_row: Tensor, query_blend: Tensor | None = None) -> Tensor:
    """Return `query` with each row's queries moved towards those of `query_row`."""
    chosen = take_rows(query, query_row)
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
    on_own_mean = mean + take_rows(query - mean, query_row)
    return torch.where(reduced.reshape(-1, 1, 1, 1), on_own_mean, take_rows(query, query_row))


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


# In the kernels below
#   a tensor is (pointer, stride of rows, of frames, of places, of columns), where a place is a
#   token of the queries or a key;
#   a matrix is what it holds of one row, frame and head: (pointer, stride of places, of columns);
#   a tile is some places of a matrix in two parts, [places, MAIN] and [places, TAIL], or in one
#   where TAIL is 0;
#   scores are q k^T + sqrt(d) M, and SCALE = 1 / sqrt(d) makes them those of the formula.


@triton.jit
def _program(blocks, frames, HEADS: tl.constexpr):
    """The row, frame, head and block of this program; neighbours share what they loop over."""
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    head = (rest % HEADS).to(tl.int64)  # int32 offsets overflow past 2**31 elements
    frame = (rest // HEADS % frames).to(tl.int64)
    row = (rest // HEADS // frames).to(tl.int64)
    return row, frame, head, block


@triton.jit
def _matrix(tensor, row, frame, head, D: tl.constexpr):
    corner = tensor[0] + row * tensor[1] + frame * tensor[2] + head * D * tensor[4]
    return corner, tensor[3], tensor[4]


@triton.jit
def _dense_matrix(ptr, first, head, HEADS: tl.constexpr, D: tl.constexpr):
    """The same of a tensor without gaps, where `first` places come before the row's frame."""
    return ptr + first * (HEADS * D) + head * D, HEADS * D, 1


@triton.jit
def _behind(matrix, start):
    """The matrix without its first `start` places."""
    return matrix[0] + tl.cast(start, tl.int64) * matrix[1], matrix[1], matrix[2]


@triton.jit
def _addresses(matrix, places, columns):
    by_place = tl.cast(places, tl.int64)[:, None] * matrix[1]
    return matrix[0] + by_place + tl.cast(columns, tl.int64)[None, :] * matrix[2]


@triton.jit
def _load_part(
    matrix, places, inside,
    D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """WIDTH columns; zeros past the D of a head and, unless EVEN, where not `inside`."""
    columns = FROM + tl.arange(0, WIDTH)
    address = _addresses(matrix, places, columns)
    if EVEN and FROM + WIDTH <= D:
        part = tl.load(address)
    elif EVEN:
        part = tl.load(address, mask=columns[None, :] < D, other=0.0)
    elif FROM + WIDTH <= D:
        part = tl.load(address, mask=inside[:, None], other=0.0)
    else:
        part = tl.load(address, mask=inside[:, None] & (columns[None, :] < D), other=0.0)
    return part


@triton.jit
def _load(
    matrix, places, inside,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile; zeros past the D columns of a head and, unless EVEN, where not `inside`."""
    main = _load_part(matrix, places, inside, D, 0, MAIN, EVEN)
    return (main, _load_part(matrix, places, inside, D, MAIN, TAIL, EVEN)) if TAIL else (main,)


@triton.jit
def _store_part(matrix, places, inside, part, D: tl.constexpr, FROM: tl.constexpr):
    columns = FROM + tl.arange(0, part.shape[1])
    mask = inside[:, None] & (columns[None, :] < D)
    address = _addresses(matrix, places, columns)
    tl.store(address, part.to(matrix[0].dtype.element_ty), mask=mask)


@triton.jit
def _store(matrix, places, inside, tile, D: tl.constexpr):
    """Put a tile where `inside`."""
    _store_part(matrix, places, inside, tile[0], D, 0)
    if len(tile) > 1:
        _store_part(matrix, places, inside, tile[1], D, tile[0].shape[1])


@triton.jit
def _zeros(PLACES: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """A tile of sums."""
    main = tl.zeros((PLACES, MAIN), tl.float32)
    return (main, tl.zeros((PLACES, TAIL), tl.float32)) if TAIL else (main,)


@triton.jit
def _scaled(tile, factor):
    main = tile[0] * factor
    return (main, tile[1] * factor) if len(tile) > 1 else (main,)


@triton.jit
def _product(left, right, PRECISION: tl.constexpr):
    """[places of left, places of right], the products summed over columns."""
    product = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    if len(left) > 1:
        product = tl.dot(left[1], tl.trans(right[1]), product, input_precision=PRECISION)
    return product


@triton.jit
def _add_product(sums, weights, tile, PRECISION: tl.constexpr):
    """`sums` + weights [places of sums, places of tile] times the tile."""
    weights = weights.to(tile[0].dtype)
    main = tl.dot(weights, tile[0], sums[0], input_precision=PRECISION)
    if len(tile) > 1:
        tail = tl.dot(weights, tile[1], sums[1], input_precision=PRECISION)
    return (main, tail) if len(tile) > 1 else (main,)


@triton.jit
def _dots(left, right):
    """[places]: the dot product of each place of one tile with that of the other."""
    dots = tl.sum(left[0].to(tl.float32) * right[0].to(tl.float32), 1)
    if len(left) > 1:
        dots += tl.sum(left[1].to(tl.float32) * right[1].to(tl.float32), 1)
    return dots


@triton.jit
def _own_and_other(query, query_row_ptr, row, frame, head, D: tl.constexpr):
    """The matrices that a row's queries are chosen from; both its own without `query_row`."""
    source = row
    if query_row_ptr is not None:
        source = tl.load(query_row_ptr + row)
    return _matrix(query, row, frame, head, D), _matrix(query, source, frame, head, D)


@triton.jit
def _share(blend_ptr, row, first, places, inside, PER_TOKEN: tl.constexpr):
    """[places], a row's share of the other row's queries; None for all of them.

    `first` is where the row's frame begins in a blend of tokens.
    """
    share = None
    if PER_TOKEN:
        share = tl.load(blend_ptr + first + places, mask=inside, other=0.0).to(tl.float32)
    elif blend_ptr is not None:
        share = tl.zeros(places.shape, tl.float32) + tl.load(blend_ptr + row).to(tl.float32)
    return share


@triton.jit
def _choose_part(
    own, other, share, places, inside,
    D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    part = _load_part(other, places, inside, D, FROM, WIDTH, EVEN)
    if share is not None:  # as torch.lerp: exact at both ends of finite numbers
        far = part.to(tl.float32)
        near = _load_part(own, places, inside, D, FROM, WIDTH, EVEN).to(tl.float32)
        way, share = far - near, share[:, None]
        blend = tl.where(share < 0.5, near + share * way, far - (1.0 - share) * way)
        part = blend.to(part.dtype)
    return part


@triton.jit
def _choose(
    own, other, share, places, inside,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of queries: the other row's, or a blend of both."""
    main = _choose_part(own, other, share, places, inside, D, 0, MAIN, EVEN)
    if TAIL:
        tail = _choose_part(own, other, share, places, inside, D, MAIN, TAIL, EVEN)
    return (main, tail) if TAIL else (main,)


@triton.jit
def _entry(key_rows_ptr, row, index, entries, keys):
    """The row whose keys come at `index`, how many of them to see, and whether they are masked.

    The own come first and unmasked, so that the maximum is finite whatever the masks say.
    """
    seen, count, masked = row, keys, index > 0
    if key_rows_ptr is not None:
        listed = key_rows_ptr + row * (entries - 1) + index - 1
        seen = tl.load(listed, mask=masked, other=0)
        seen = tl.where(masked, seen, row)
        count = tl.where(masked & (seen == row), 0, keys)
    return seen, count, masked


@triton.jit
def _mask_of(mask_ptr, row, frame, by_row, by_frame):
    """Where the log-mask of a row's and frame's keys begins; None without one."""
    mask = mask_ptr
    if mask_ptr is not None:
        mask = mask_ptr + row * by_row + frame * by_frame
    return mask


@triton.jit
def _scores(
    q, k, mask_ptr, places, inside, masked,
    SCALE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[queries, keys]; -inf where a key is not `inside`."""
    scores = _product(q, k, PRECISION)
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + places, mask=inside & masked, other=0.0)
        scores += (mask * (1.0 / SCALE))[None, :]
    if not EVEN:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _see_keys(
    q, out, high, total, key, value, mask_ptr, masked, count,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take `count` keys into the weighted sums of values, the maximum and the sum of weights."""
    lanes = tl.arange(0, BLOCK_N)
    for start in range(0, count, BLOCK_N):
        inside = start + lanes < count
        k = _load(_behind(key, start), lanes, inside, D, MAIN, TAIL, EVEN_KEYS)
        scores = _scores(q, k, mask_ptr, start + lanes, inside, masked, SCALE, EVEN_KEYS, PRECISION)
        higher = tl.maximum(high, tl.max(scores, 1))
        # Scaled after the difference, which is exactly 0 at the maximum: a fused multiply-add of
        # scores beyond 2**30 would be off by more than exp2 can bear.
        weights = tl.exp2((scores - higher[:, None]) * (SCALE * _LOG2E))
        fade = tl.exp2((high - higher) * (SCALE * _LOG2E))
        total = total * fade + tl.sum(weights, 1)
        high = higher
        v = _load(_behind(value, start), lanes, inside, D, MAIN, TAIL, EVEN_KEYS)
        out = _add_product(_scaled(out, fade[:, None]), weights, v, PRECISION)
    return out, high, total


@triton.jit
def _query_attention_kernel(
    query_ptr, key_ptr, value_ptr, query_row_ptr, blend_ptr, key_rows_ptr, mask_ptr,
    frames, tokens, keys, entries,
    query_by_row, query_by_frame, query_by_token, query_by_column,
    key_by_row, key_by_frame, key_by_key, key_by_column,
    value_by_row, value_by_frame, value_by_key, value_by_column,
    mask_by_row, mask_by_frame,
    out_ptr, statistics_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, PER_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_KEYS: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of one row's queries, and what their weights can be found from again."""
    row, frame, head, block = _program(tl.cdiv(tokens, BLOCK_M), frames, HEADS)
    query = (query_ptr, query_by_row, query_by_frame, query_by_token, query_by_column)
    key = (key_ptr, key_by_row, key_by_frame, key_by_key, key_by_column)
    value = (value_ptr, value_by_row, value_by_frame, value_by_key, value_by_column)
    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = places < tokens

    own, other = _own_and_other(query, query_row_ptr, row, frame, head, D)
    first = (row * frames + frame) * tokens
    share = _share(blend_ptr, row, first, places, inside, PER_TOKEN)
    q = _choose(own, other, share, places, inside, D, MAIN, TAIL, False)

    sums = _zeros(BLOCK_M, MAIN, TAIL)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for index in range(entries if key_rows_ptr is not None else 1):
        seen, count, masked = _entry(key_rows_ptr, row, index, entries, keys)
        sums, high, total = _see_keys(
            q, sums, high, total,
            _matrix(key, seen, frame, head, D), _matrix(value, seen, frame, head, D),
            _mask_of(mask_ptr, seen, frame, mask_by_row, mask_by_frame), masked, count,
            D, MAIN, TAIL, SCALE, BLOCK_N, EVEN_KEYS, PRECISION,
        )  # fmt: skip

    out = _dense_matrix(out_ptr, first, head, HEADS, D)
    _store(out, places, inside, _scaled(sums, 1.0 / total[:, None]), D)
    if statistics_ptr is not None:
        statistics = statistics_ptr + 2 * (first * HEADS + head * tokens)
        tl.store(statistics + places, high, mask=inside)
        tl.store(statistics + tokens + places, tl.log2(total), mask=inside)


@triton.jit
def _load_statistics(statistics, places, inside, tokens):
    """Of each query, its highest score and the logarithm to base 2 of its sum of weights.

    A query that is not `inside` has an infinite sum, and so no weight.
    """
    high = tl.load(statistics + places, mask=inside, other=0.0)
    log2_total = tl.load(statistics + tokens + places, mask=inside, other=float("inf"))
    return high, log2_total


@triton.jit
def _weights(scores, high, log2_total, SCALE: tl.constexpr):
    """The softmax, from scores that are computed again."""
    # The two stay apart: in the rounding of one large number, the sum would be lost. No score is
    # above the highest, unless its product was added up in another order than the first time;
    # and where one is NaN, so is the logarithm.
    below = tl.minimum(scores - high, 0.0)
    return tl.exp2(below * (SCALE * _LOG2E) - log2_total)


@triton.jit
def _gather_from_keys(
    q, grad, high, log2_total, dots, sums, key, value, mask_ptr, masked, count,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of a tile of queries what `count` keys say of it."""
    lanes = tl.arange(0, BLOCK_N)
    for start in range(0, count, BLOCK_N):
        inside = start + lanes < count
        k = _load(_behind(key, start), lanes, inside, D, MAIN, TAIL, EVEN_KEYS)
        scores = _scores(q, k, mask_ptr, start + lanes, inside, masked, SCALE, EVEN_KEYS, PRECISION)
        weights = _weights(scores, high[:, None], log2_total[:, None], SCALE)
        v = _load(_behind(value, start), lanes, inside, D, MAIN, TAIL, EVEN_KEYS)
        push = weights * (_product(grad, v, PRECISION) - dots[:, None])  # gradient of the scores
        sums = _add_product(sums, push, k, PRECISION)
    return sums


@triton.jit
def _query_gradient_kernel(
    grad_ptr, result_ptr, statistics_ptr,
    query_ptr, key_ptr, value_ptr, query_row_ptr, blend_ptr, key_rows_ptr, mask_ptr,
    frames, tokens, keys, entries,
    query_by_row, query_by_frame, query_by_token, query_by_column,
    key_by_row, key_by_frame, key_by_key, key_by_column,
    value_by_row, value_by_frame, value_by_key, value_by_column,
    mask_by_row, mask_by_frame,
    chosen_grad_ptr, dots_ptr, share_grad_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, PER_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries as chosen and of their shares, and their output's part in it.

    With P the weights and G the gradient of the output, that of the scores is P (G v^T - dots),
    where `dots` is the dot product of a query's output and gradient.
    """
    row, frame, head, block = _program(tl.cdiv(tokens, BLOCK_M), frames, HEADS)
    query = (query_ptr, query_by_row, query_by_frame, query_by_token, query_by_column)
    key = (key_ptr, key_by_row, key_by_frame, key_by_key, key_by_column)
    value = (value_ptr, value_by_row, value_by_frame, value_by_key, value_by_column)
    places = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = places < tokens

    own, other = _own_and_other(query, query_row_ptr, row, frame, head, D)
    first = (row * frames + frame) * tokens
    share = _share(blend_ptr, row, first, places, inside, PER_TOKEN)
    q = _choose(own, other, share, places, inside, D, MAIN, TAIL, False)

    grad = _dense_matrix(grad_ptr, first, head, HEADS, D)
    grad = _load(grad, places, inside, D, MAIN, TAIL, False)
    result = _dense_matrix(result_ptr, first, head, HEADS, D)
    dots = _dots(grad, _load(result, places, inside, D, MAIN, TAIL, False))
    line = first * HEADS + head * tokens + places
    tl.store(dots_ptr + line, dots, mask=inside)
    statistics = statistics_ptr + 2 * (first * HEADS + head * tokens)
    high, log2_total = _load_statistics(statistics, places, inside, tokens)

    sums = _zeros(BLOCK_M, MAIN, TAIL)
    for index in range(entries if key_rows_ptr is not None else 1):
        seen, count, masked = _entry(key_rows_ptr, row, index, entries, keys)
        sums = _gather_from_keys(
            q, grad, high, log2_total, dots, sums,
            _matrix(key, seen, frame, head, D), _matrix(value, seen, frame, head, D),
            _mask_of(mask_ptr, seen, frame, mask_by_row, mask_by_frame), masked, count,
            D, MAIN, TAIL, SCALE, BLOCK_N, EVEN_KEYS, PRECISION,
        )  # fmt: skip

    sums = _scaled(sums, SCALE)
    _store(_dense_matrix(chosen_grad_ptr, first, head, HEADS, D), places, inside, sums, D)
    if share_grad_ptr is not None:
        far = _dots(_load(other, places, inside, D, MAIN, TAIL, False), sums)
        near = _dots(_load(own, places, inside, D, MAIN, TAIL, False), sums)
        tl.store(share_grad_ptr + line, far - near, mask=inside)


@triton.jit
def _scores_by_key(k, q, PRECISION: tl.constexpr):
    """[keys, queries], without a mask."""
    if k[0].dtype == tl.float32:
        # The very product of the forward direction: weights are no closer than scores agree with
        # the highest that was found there. To turn it is nothing beside a float32 product; in the
        # short types, whose own rounding is far larger, it would take the registers of one matrix
        # product through shared memory to be the operand of the next.
        scores = tl.trans(_product(q, k, PRECISION))
    else:
        scores = _product(k, q, PRECISION)
    return scores


@triton.jit
def _gather_from_queries(
    k, v, key_sums, value_sums, bias, own, other, grad, statistics, dots_ptr,
    blend_ptr, reader, first, tokens,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SCALE: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a tile of keys and values what one row's queries say of them."""
    lanes = tl.arange(0, BLOCK_M)
    for start in range(0, tokens, BLOCK_M):
        places = start + lanes
        inside = places < tokens
        share = _share(blend_ptr, reader, first, places, inside, PER_TOKEN)
        q = _choose(own, other, share, places, inside, D, MAIN, TAIL, EVEN_TOKENS)
        high, log2_total = _load_statistics(statistics, places, inside, tokens)
        scores = _scores_by_key(k, q, PRECISION)
        if bias is not None:
            scores += bias[:, None]
        weights = _weights(scores, high[None, :], log2_total[None, :], SCALE)
        g = _load(grad, places, inside, D, MAIN, TAIL, EVEN_TOKENS)
        slopes = _product(v, g, PRECISION)  # gradient of the weights
        dots = tl.load(dots_ptr + places, mask=inside, other=0.0)
        push = weights * (slopes - dots[None, :])  # gradient of the scores
        value_sums = _add_product(value_sums, weights, g, PRECISION)
        key_sums = _add_product(key_sums, push, q, PRECISION)
    return key_sums, value_sums


@triton.jit
def _key_gradient_kernel(
    grad_ptr, statistics_ptr, dots_ptr,
    query_ptr, key_ptr, value_ptr, query_row_ptr, blend_ptr, mask_ptr, order_ptr, start_ptr,
    frames, tokens, keys, entries,
    query_by_row, query_by_frame, query_by_token, query_by_column,
    key_by_row, key_by_frame, key_by_key, key_by_column,
    value_by_row, value_by_frame, value_by_key, value_by_column,
    mask_by_row, mask_by_frame,
    key_grad_ptr, value_grad_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    SCALE: tl.constexpr, PER_TOKEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_TOKENS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of one row's keys and values, from all rows that see them.

    Those are order[start[row] : start[row + 1]], each as `entries` times the row that sees plus
    its entry, of which 0 is its own keys; without `order`, the row alone.
    """
    row, frame, head, block = _program(tl.cdiv(keys, BLOCK_N), frames, HEADS)
    query = (query_ptr, query_by_row, query_by_frame, query_by_token, query_by_column)
    key = (key_ptr, key_by_row, key_by_frame, key_by_key, key_by_column)
    value = (value_ptr, value_by_row, value_by_frame, value_by_key, value_by_column)
    places = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = places < keys
    k = _load(_matrix(key, row, frame, head, D), places, inside, D, MAIN, TAIL, False)
    v = _load(_matrix(value, row, frame, head, D), places, inside, D, MAIN, TAIL, False)
    mask = _mask_of(mask_ptr, row, frame, mask_by_row, mask_by_frame)

    key_sums, value_sums = _zeros(BLOCK_N, MAIN, TAIL), _zeros(BLOCK_N, MAIN, TAIL)
    start, stop = 0, 1
    if order_ptr is not None:
        start, stop = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
    for index in range(start, stop):
        reader, bias = row, None
        if order_ptr is not None:
            pair = tl.load(order_ptr + index)
            reader = pair // entries
            if mask_ptr is not None:
                masked = inside & (pair % entries != 0)
                bias = tl.load(mask + places, mask=masked, other=0.0) * (1.0 / SCALE)
        own, other = _own_and_other(query, query_row_ptr, reader, frame, head, D)
        begin = (reader * frames + frame) * tokens
        line = begin * HEADS + head * tokens
        key_sums, value_sums = _gather_from_queries(
            k, v, key_sums, value_sums, bias, own, other,
            _dense_matrix(grad_ptr, begin, head, HEADS, D),
            statistics_ptr + 2 * line, dots_ptr + line,
            blend_ptr, reader, begin, tokens,
            D, MAIN, TAIL, SCALE, PER_TOKEN, BLOCK_M, EVEN_TOKENS, PRECISION,
        )  # fmt: skip

    first = (row * frames + frame) * keys
    of_key = _dense_matrix(key_grad_ptr, first, head, HEADS, D)
    _store(of_key, places, inside, _scaled(key_sums, SCALE), D)
    of_value = _dense_matrix(value_grad_ptr, first, head, HEADS, D)
    _store(of_value, places, inside, value_sums, D)


@triton.jit
def _return_gradient_kernel(
    chosen_grad_ptr, blend_ptr, order_ptr, start_ptr,
    frames, tokens,
    query_grad_ptr,
    WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Hand the gradient of queries as chosen back to the rows that they were chosen from."""
    positions = tl.cast(frames, tl.int64) * tokens
    size = positions * WIDTH
    blocks = tl.cdiv(size, BLOCK)
    row = tl.program_id(0) // blocks
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    position = place // WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    if blend_ptr is not None:  # what is not the other row's is the own
        share = _share(blend_ptr, row, row * positions, position, inside, PER_TOKEN)
        grad = tl.load(chosen_grad_ptr + row * size + place, mask=inside, other=0.0).to(tl.float32)
        total += (1.0 - share) * grad
    for index in range(tl.load(start_ptr + row), tl.load(start_ptr + row + 1)):
        reader = tl.load(order_ptr + index)
        grad = tl.load(chosen_grad_ptr + reader * size + place, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        if blend_ptr is not None:
            share = _share(blend_ptr, reader, reader * positions, position, inside, PER_TOKEN)
            grad *= share
        total += grad
    kind = query_grad_ptr.dtype.element_ty
    tl.store(query_grad_ptr + row * size + place, total.to(kind), mask=inside)


class Inputs(NamedTuple):
    """What the operators take, in their order; each as in `query_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_row: Tensor | None
    query_blend: Tensor | None
    key_rows: Tensor | None
    key_log_mask: Tensor | None
    heads: int

    @property
    def entries(self) -> int:
        """How many rows' keys each row looks through, its own among them."""
        return 1 if self.key_rows is None else 1 + self.key_rows.shape[1]

    @property
    def shares_keys(self) -> bool:
        """Whether all frames of a row have the same keys."""
        return self.key.shape[1] != self.query.shape[1]

    def with_plain_controls(self) -> Self:
        """The same, with controls as the kernels read them: contiguous, the mask in float32."""
        row, blend, rows = (
            None if t is None else t.contiguous()
            for t in (self.query_row, self.query_blend, self.key_rows)
        )
        mask = None if self.key_log_mask is None else self.key_log_mask.float().contiguous()
        return self._replace(query_row=row, query_blend=blend, key_rows=rows, key_log_mask=mask)


def _launch_forward(inputs: Inputs, out: Tensor, statistics: Tensor | None) -> None:
    """Fill `out`, contiguous like the query, and `statistics`, if given.

    `statistics`, float32 [rows, frames, heads, 2, tokens], are the highest of a query's scores
    before they are scaled, h = max(q k^T + sqrt(d) M), and the logarithm to base 2 of the sum of
    exp((q k^T + sqrt(d) M - h) / sqrt(d)).
    """
    if not out.numel():
        return
    inputs = inputs.with_plain_controls()
    query, key, value, row, blend, key_rows, mask, _ = inputs
    sizes = _settings("query_attention", inputs)
    _query_attention_kernel[_grid(inputs, query, sizes["BLOCK_M"])](
        query, key, value, row, blend, key_rows, mask, *_sizes(inputs), *_strides(inputs),
        out, statistics,
        **_constants(inputs), **sizes, EVEN_KEYS=key.shape[2] % sizes["BLOCK_N"] == 0,
    )  # fmt: skip


def _launch_query_gradient(
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    inputs: Inputs,
    chosen_grad: Tensor,
    dots: Tensor,
    share_grad: Tensor | None,
) -> None:
    """Fill the last three from the others; `grad` and `out` are contiguous.

    `chosen_grad`, contiguous like the query, is the gradient of the queries as chosen. The others
    are float32 [rows, frames, heads, tokens]: `dots`, which the keys' gradients need, and
    `share_grad`, if given, which is each head's part of the gradient of a query's blend.
    """
    if not chosen_grad.numel():
        return
    inputs = inputs.with_plain_controls()
    query, key, value, row, blend, key_rows, mask, _ = inputs
    sizes = _settings("query_attention_query_gradient", inputs)
    _query_gradient_kernel[_grid(inputs, query, sizes["BLOCK_M"])](
        grad, out, statistics, query, key, value, row, blend, key_rows, mask,
        *_sizes(inputs), *_strides(inputs),
        chosen_grad, dots, share_grad,
        **_constants(inputs), **sizes, EVEN_KEYS=key.shape[2] % sizes["BLOCK_N"] == 0,
    )  # fmt: skip


def _launch_key_gradient(
    grad: Tensor,
    statistics: Tensor,
    dots: Tensor,
    inputs: Inputs,
    key_grad: Tensor,
    value_grad: Tensor,
) -> None:
    """Fill the last two, contiguous [rows, frames, keys, width] even where frames share keys."""
    if not key_grad.numel():
        return
    inputs = inputs.with_plain_controls()
    query, key, value, row, blend, key_rows, mask, _ = inputs
    order = start = None
    if key_rows is not None:
        rows = query.shape[0]
        own = torch.arange(rows, device=key.device)[:, None]
        others = torch.where(key_rows == own, rows, key_rows)  # nobody's, behind all rows
        order, start = _readers(torch.cat([own, others], 1).flatten(), rows)
    sizes = _settings("query_attention_key_gradient", inputs)
    _key_gradient_kernel[_grid(inputs, key, sizes["BLOCK_N"])](
        grad, statistics, dots, query, key, value, row, blend, mask, order, start,
        *_sizes(inputs), *_strides(inputs),
        key_grad, value_grad,
        **_constants(inputs), **sizes, EVEN_TOKENS=query.shape[2] % sizes["BLOCK_M"] == 0,
    )  # fmt: skip


def _launch_return_gradient(chosen_grad: Tensor, inputs: Inputs, query_grad: Tensor) -> None:
    """Fill `query_grad` with what the rows that read a row say of its queries."""
    if not query_grad.numel():
        return
    inputs = inputs.with_plain_controls()
    rows, frames, tokens, width = inputs.query.shape
    assert inputs.query_row is not None  # noqa: S101  else both gradients are one
    order, start = _readers(inputs.query_row, rows)
    sizes = settings("query_attention_return_gradient")
    grid = (rows * triton.cdiv(frames * tokens * width, sizes["BLOCK"]),)
    _return_gradient_kernel[grid](
        chosen_grad, inputs.query_blend, order, start, frames, tokens, query_grad,
        WIDTH=width, PER_TOKEN=_constants(inputs)["PER_TOKEN"], **sizes,
    )  # fmt: skip


def _readers(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Entries of `index` by value: those of `r` are order[start[r] : start[r + 1]], ascending."""
    ordered, order = torch.sort(index, stable=True)
    bounds = torch.arange(rows + 1, device=index.device)
    return order, torch.searchsorted(ordered, bounds)


def _grid(inputs: Inputs, tiled: Tensor, block: int) -> tuple[int]:
    """Programs for the blocks of places of each row, frame and head, on the axis without limit."""
    rows, frames, *_ = inputs.query.shape
    return (rows * frames * inputs.heads * triton.cdiv(tiled.shape[2], block),)


def _sizes(inputs: Inputs) -> tuple[int, int, int, int]:
    _, frames, tokens, _ = inputs.query.shape
    return frames, tokens, inputs.key.shape[2], inputs.entries


def _strides(inputs: Inputs) -> tuple[int, ...]:
    """Strides of query, key, value and of the mask's rows and frames; 0 between shared frames."""
    by_row, by_frame = (0, 0) if inputs.key_log_mask is None else inputs.key_log_mask.stride()[:2]
    of_keys = [*inputs.key.stride(), *inputs.value.stride(), by_row, by_frame]
    if inputs.shares_keys:
        of_keys[1] = of_keys[5] = of_keys[9] = 0
    return *inputs.query.stride(), *of_keys


def _constants(inputs: Inputs) -> dict[str, Any]:
    d = inputs.query.shape[-1] // inputs.heads
    main, tail = split_head_dim(d)
    return {
        "HEADS": inputs.heads,
        "D": d,
        "MAIN": main,
        "TAIL": tail,
        "SCALE": d**-0.5,
        "PER_TOKEN": inputs.query_blend is not None and inputs.query_blend.ndim == 3,
        "PRECISION": "ieee",  # of float32: TF32 would lose the 1e-4 that is promised
    }


def _settings(kernel: str, inputs: Inputs) -> dict[str, int]:
    """Settings of the padded head dim, with tiles no larger than the tensors need."""
    query, key = inputs.query, inputs.key
    head_dim = query.shape[-1] // inputs.heads
    return _fitting_settings(kernel, query.dtype, head_dim, query.shape[2], key.shape[2])


def _fitting_settings(
    kernel: str, dtype: torch.dtype, head_dim: int, queries: int, keys: int
) -> dict[str, int]:
    wide = "_fp32" if dtype == torch.float32 else ""
    chosen = settings(kernel, f"d{sum(split_head_dim(head_dim))}{wide}")
    for name, size in {"BLOCK_M": queries, "BLOCK_N": keys}.items():
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
    out = _empty_like(query)
    with torch.cuda.device_of(query):
        _launch_forward(
            Inputs(query, key, value, query_row, query_blend, key_rows, key_log_mask, heads),
            out,
            None,
        )
    return out


@_query_attention.register_fake
def _(query, *_):
    return _empty_like(query)


@_query_attention.register_kernel("cpu")
def _(*arguments):
    inputs = Inputs(*arguments)
    _check(inputs)  # a graph that was compiled or exported brings rows that nobody has looked at
    return _attend_on_cpu(inputs)


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
    out, statistics = _empty_like(query), _empty_statistics(query, heads)
    with torch.cuda.device_of(query):
        _launch_forward(
            Inputs(query, key, value, query_row, query_blend, key_rows, key_log_mask, heads),
            out,
            statistics,
        )
    return out, statistics


@_query_attention_training.register_fake
def _(*inputs):
    given = Inputs(*inputs)
    return _empty_like(given.query), _empty_statistics(given.query, given.heads)


@torch.library.custom_op("kinetiq::query_attention_backward", mutates_args=(), device_types="cuda")
def _query_attention_backward(
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_row: Tensor | None,
    query_blend: Tensor | None,
    key_rows: Tensor | None,
    key_log_mask: Tensor | None,
    heads: int,
    keys_needed: bool,
    blend_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and blend; one that is not needed has no elements."""
    inputs = Inputs(query, key, value, query_row, query_blend, key_rows, key_log_mask, heads)
    with torch.cuda.device_of(query):
        return _differentiate(grad.contiguous(), out, statistics, inputs, keys_needed, blend_needed)


@_query_attention_backward.register_fake
def _(grad, out, statistics, query, key, value, query_row, query_blend, *options):
    *_, keys_needed, blend_needed = options
    kept = ((query, True), (key, keys_needed), (value, keys_needed), (query_blend, blend_needed))
    return tuple(_empty_like(like) if needed else query.new_empty(0) for like, needed in kept)


def _differentiate(
    grad: Tensor,
    out: Tensor,
    statistics: Tensor,
    inputs: Inputs,
    keys_needed: bool,
    blend_needed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward operator returns."""
    query, key, value, query_row, query_blend, *_ = inputs
    query_grad, dots = _empty_like(query), _empty_per_query(query, inputs.heads)
    chosen_grad = query_grad if query_row is None else _empty_like(query)
    share_grad = torch.empty_like(dots) if blend_needed else None
    _launch_query_gradient(grad, out, statistics, inputs, chosen_grad, dots, share_grad)
    if query_row is not None:
        _launch_return_gradient(chosen_grad, inputs, query_grad)

    key_grad, value_grad, blend_grad = (query.new_empty(0) for _ in range(3))
    if keys_needed and inputs.shares_keys:
        # one gradient a frame, added up after: a frame's keys then need not wait for the others
        size = (key.shape[0], query.shape[1], *key.shape[2:])
        parts = [key.new_empty(size, dtype=torch.float32) for _ in range(2)]
        _launch_key_gradient(grad, statistics, dots, inputs, *parts)
        key_grad, value_grad = (part.sum(1, keepdim=True).to(key.dtype) for part in parts)
    elif keys_needed:
        key_grad, value_grad = _empty_like(key), _empty_like(value)
        _launch_key_gradient(grad, statistics, dots, inputs, key_grad, value_grad)
    if query_blend is not None and share_grad is not None:
        axes = (2,) if query_blend.ndim == 3 else (1, 2, 3)
        blend_grad = share_grad.sum(axes).to(query_blend.dtype)
    return query_grad, key_grad, value_grad, blend_grad


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_per_query(query: Tensor, heads: int) -> Tensor:
    rows, frames, tokens, _ = query.shape
    return query.new_empty(rows, frames, heads, tokens, dtype=torch.float32)


def _empty_statistics(query: Tensor, heads: int) -> Tensor:
    rows, frames, tokens, _ = query.shape
    return query.new_empty(rows, frames, heads, 2, tokens, dtype=torch.float32)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _save_training(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor):
    """The gradient of the operator that keeps nothing but its inputs."""
    tensors = list(ctx.saved_tensors)
    if grad.is_cuda:
        inputs = Inputs._make((*tensors, ctx.heads))
        out, statistics = _query_attention_training(*inputs)
        return _run_backward(ctx, grad, out, statistics, inputs)
    masked = len(tensors) - 1  # no gradient flows to a log-mask
    needed = [need and at != masked for at, need in enumerate(ctx.needs_input_grad[:-1])]

    def run(*given):
        return _attend_on_cpu(Inputs._make((*given, ctx.heads)), judged=False)

    return *differentiate(run, tensors, needed, grad), None


def _backward_training(ctx, grad: Tensor, _: Tensor | None):
    *tensors, out, statistics = ctx.saved_tensors
    return _run_backward(ctx, grad, out, statistics, Inputs._make((*tensors, ctx.heads)))


def _run_backward(ctx, grad: Tensor, out: Tensor, statistics: Tensor, inputs: Inputs):
    _, key_needed, value_needed, _, blend_needed, *_ = ctx.needs_input_grad
    keys_needed = key_needed or value_needed
    grads = _query_attention_backward(grad, out, statistics, *inputs, keys_needed, blend_needed)
    needed = (True, keys_needed, keys_needed, blend_needed)
    query, key, value, blend = (t if need else None for t, need in zip(grads, needed, strict=True))
    return query, key, value, None, blend, None, None, None


_query_attention.register_autograd(_backward, setup_context=_save)
_query_attention_training.register_autograd(_backward_training, setup_context=_save_training)


def _attend_on_cpu(inputs: Inputs, *, judged: bool = True) -> Tensor:
    """The same in PyTorch's own operators, which autograd records.

    With as few calls as can be: in a small image they take as long as the attention itself.
    `judged` is whether the gradient may depend on how large scores are, which a traced one cannot.
    """
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):  # the result has the type of `query`
            return _attend_on_cpu(inputs, judged=judged)
    query, key, value, query_row, query_blend, key_rows, key_log_mask, heads = inputs
    if query_row is not None:
        query = choose_queries(query, query_row, query_blend)
    size = *_, width = query.shape
    mask = None
    if key_rows is not None:
        known = None if key_log_mask is None else key_log_mask.detach()
        key, value, mask = extend_keys(key, value, key_rows, known)
        mask = mask.flatten(0, 1)[:, None, None]
    if key.shape[1] == 1:  # keys shared by all frames: fold the frames into the tokens
        query = query.flatten(1, 2).unsqueeze(1)
    q, k, v = (
        t.flatten(0, 1).unflatten(-1, (heads, width // heads)).transpose(1, 2)
        for t in (query, key, value)
    )
    return _attend(q, k, v, mask, judged=judged).transpose(1, 2).reshape(size).contiguous()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, judged: bool
) -> Tensor:
    """Softmax attention over [batch, heads, tokens, d], by a CPU's quickest way that keeps NaN."""
    recorded = is_recorded(query, key, value)
    fused = F.scaled_dot_product_attention
    wider = torch.promote_types(query.dtype, torch.float32)  # scores may be beyond float16
    if min(query.shape[-2], key.shape[-2]) >= _SMALL:
        if not recorded:
            return fused(query, key, value, mask)
        # To scale queries rounds each once, and all of a query's scores alike; to scale scores
        # would round each score, and the gradient would take that for a difference of weights.
        scaled = query.to(wider) * query.shape[-1] ** -0.5
        given = (_dense_last(t.to(wider)) for t in (scaled, key, value))
        added = None if mask is None else mask.to(wider)
        most = _mild(query.dtype) if judged else 0.0
        out: Tensor = _Fused.apply(*given, added, most)[0]  # type: ignore[no-untyped-call]
        return out.to(query.dtype)
    if query.dtype == torch.float32 and not recorded and key.shape[-2] >= _LANES:
        return fused(query, key, value, mask)
    scores = (query.to(wider) * query.shape[-1] ** -0.5) @ key.to(wider).transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    # In the wider type: with an odd number of keys some CPUs' products in bfloat16 read into the
    # next line of weights, which brings a NaN from one query to its neighbour.
    return (scores.softmax(-1) @ value.to(wider)).to(value.dtype)


def _dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _mild(dtype: torch.dtype) -> float:
    """How large logarithms may be for the fused gradient to be as good as this type.

    They are of each query's sum of weights. It takes a weight from exp(score - logarithm), so that
    the rounding of that number, at most half of its last place, is in all weights of a query: up
    to this bound half a unit of a short type, or two of float32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return max(torch.finfo(dtype).eps / torch.finfo(wide).eps, _MILD)


class _Fused(torch.autograd.Function):
    """A CPU's fused attention of scores q k^T + M; its gradient is fused where they are mild.

    Arguments are queries, keys and values [batch, heads, tokens, d], M [batch, 1, 1, keys] or None,
    and the largest logarithm of a sum of weights that is mild. Scores are moved by a number that
    is in the middle of most, which changes no weight. Returns the logarithms of the moved as well,
    which are not differentiable, and whether all are mild: only what is returned may be kept.
    """

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, most: float
    ) -> tuple[Tensor, Tensor, bool]:
        out, sums = _FUSED(query, key, value, attn_mask=_moved_mask(key, mask), scale=1.0)
        mild = most > 0 and sums.numel() > 0 and bool(sums.abs().max() <= most)
        return out, sums, mild

    @staticmethod
    def setup_context(ctx, inputs, outputs) -> None:
        *results, ctx.mild = outputs
        ctx.mark_non_differentiable(results[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], *results)

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_):
        if grad is None:
            return None, None, None, None, None
        query, key, value, mask, *results = ctx.saved_tensors
        if ctx.mild and not torch.is_grad_enabled():  # else it must be differentiable itself
            options = {"attn_mask": _moved_mask(key, mask), "scale": 1.0}
            found = _FUSED_BACKWARD(grad, query, key, value, *results, 0.0, False, **options)
        else:
            with keep_types(grad):
                found = _differentiate_on_cpu(grad, query, key, value, mask)
        return *found, None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        """One more batch axis, folded into the first; the fused gradient takes none."""

        def folded(tensor: Tensor | None, axis: int | None) -> Tensor | None:
            if tensor is None:
                return None
            if axis is None:
                tensor, axis = tensor.expand(info.batch_size, *tensor.shape), 0
            return tensor.movedim(axis, 0).flatten(0, 1)

        given = [folded(t, axis) for t, axis in zip(inputs[:-1], in_dims[:-1], strict=True)]
        *outs, mild = _Fused.apply(*given, 0.0)  # type: ignore[no-untyped-call]
        return (*(t.unflatten(0, (info.batch_size, -1)) for t in outs), mild), (0, 0, None)


def _moved_mask(key: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return key.new_full((1, 1, 1, 1), -_MILD).expand(1, 1, 1, key.shape[2])
    return mask - _MILD


def _differentiate_on_cpu(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, as `_Fused` takes them, whatever the scores are.

    Weights are computed again, some queries at a time, with their own maximum and sum: as plain
    PyTorch computes them, but in memory that does not grow with the square of the tokens.
    """
    batch, heads, tokens, d = query.shape
    keys, given = key.shape[2], (grad, query, key, value)
    of_query, of_key, of_value = (  # in memory as the inputs are: heads side by side
        make_room(given, (batch, t.shape[2], heads, d)).transpose(1, 2) for t in (query, key, value)
    )
    some, lines = max(_KEPT // (tokens * keys), 1), max(_KEPT // keys, _LINES)
    nothing = query.new_zeros((1, 1, 1))
    for head, start in itertools.product(range(heads), range(0, batch, some)):
        part = slice(start, start + some)
        k, v = key[part, head], value[part, head]
        for first in range(0, tokens, lines):
            line = slice(first, first + lines)
            q, g = query[part, head, line], grad[part, head, line]
            added = nothing if mask is None else mask[part, 0]
            weights = torch.baddbmm(added, q, k.mT).softmax(2)
            slopes = torch.bmm(g, v.mT)
            push = torch._softmax_backward_data(slopes, weights, 2, q.dtype)  # noqa: SLF001  one pass
            of_query[part, head, line].copy_(torch.bmm(push, k))
            if first == 0:
                of_k, of_v = torch.bmm(push.mT, q), torch.bmm(weights.mT, g)
            else:
                of_k.baddbmm_(push.mT, q)
                of_v.baddbmm_(weights.mT, g)
        of_key[part, head].copy_(of_k)
        of_value[part, head].copy_(of_v)
    return of_query, of_key, of_value


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is made of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check(inputs: Inputs) -> None:
    where = "query_attention"
    query, key, value, query_row, query_blend, key_rows, key_log_mask, heads = inputs
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        check_tensor(where, name, tensor)
    check_heads(where, heads)
    if query.ndim != 4 or query.shape[-1] % heads:
        raise ShapeError(
            f"{where}: query must be [rows, frames, tokens, heads * d] with heads = {heads}, "
            f"got {list(query.shape)}"
        )
    rows, frames, tokens, width = query.shape
    if query.is_cuda:
        _check_kernel(query, heads)
    check_type(where, "query", query)
    for name, tensor in {"key": key, "value": value}.items():
        if tensor.ndim != 4 or tensor.shape[0] != rows or tensor.shape[-1] != width:
            raise ShapeError(
                f"{where}: {name} must be [rows = {rows}, frames or 1, keys, {width}] to match "
                f"query {list(query.shape)}, got {list(tensor.shape)}"
            )
        # Compared one by one: a trace puts no guard on sizes in a tuple.
        if tensor.shape[1] != 1 and tensor.shape[1] != frames:
            raise ShapeError(
                f"{where}: {name} must have {frames} frames or 1, got {tensor.shape[1]}"
            )
        check_kind(where, name, tensor, query)
    if key.shape != value.shape:
        raise ShapeError(
            f"{where}: key and value must have one shape, got {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    if not frames or not width or not key.shape[2]:
        raise ShapeError(
            f"{where}: query and key must have at least one frame, key and channel, got "
            f"{list(query.shape)} and {list(key.shape)}"
        )
    controls = {
        "query_row": query_row,
        "query_blend": query_blend,
        "key_rows": key_rows,
        "key_log_mask": key_log_mask,
    }
    for name, control in controls.items():
        check_device(where, name, control, query)
    check_rows(where, "query_row", query_row, rows)
    check_blend(where, "query_blend", query_blend, (rows, frames, tokens))
    if query_blend is not None and query_row is None:
        raise ShapeError(f"{where}: query_blend needs query_row, got query_blend alone")
    _check_further(where, key, key_rows, key_log_mask)


def _check_kernel(query: Tensor, heads: int) -> None:
    """Require what the GPU kernels can hold."""
    d = query.shape[-1] // heads
    if d > MAX_HEAD_DIM or query.dtype not in KERNEL_TYPES:
        raise ShapeError(
            f"query_attention: query must be float32, float16 or bfloat16 with d <= {MAX_HEAD_DIM} "
            f"on a GPU, got {query.dtype} with d = {d}"
        )


def _check_further(
    where: str, key: Tensor, key_rows: Tensor | None, key_log_mask: Tensor | None
) -> None:
    """Require rows whose keys are seen too, and a mask of all keys if there is one."""
    rows = key.shape[0]
    if key_rows is not None:
        if key_rows.ndim != 2 or key_rows.shape[0] != rows or key_rows.dtype != torch.int64:
            raise ShapeError(
                f"{where}: key_rows must be int64 [rows = {rows}, n], "
                f"got {key_rows.dtype} {list(key_rows.shape)}"
            )
        check_range(where, "key_rows", key_rows, rows)
    if key_log_mask is None:
        return
    if key_rows is None:
        raise ShapeError(f"{where}: key_log_mask needs key_rows, got key_log_mask alone")
    if key_log_mask.shape != key.shape[:3]:
        raise ShapeError(
            f"{where}: key_log_mask must be [rows, frames, keys] = {list(key.shape[:3])} like key, "
            f"got {list(key_log_mask.shape)}"
        )
    check_type(where, "key_log_mask", key_log_mask)


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
    head = sum(split_head_dim(d)) / d
    seen = tokens if keys is None else keys

    def count_padded() -> float:
        return head * _padded_pairs(tokens, seen, d, backward=backward)

    return CompileCase("query_attention", shape, not backward, launch, count_padded, head)


def _padded_pairs(queries: int, keys: int, d: int, *, backward: bool) -> float:
    """Pairs of a query and a key multiplied for each one asked for, where it is most."""
    gradients = ("query_attention_query_gradient", "query_attention_key_gradient")
    kernels = gradients if backward else ("query_attention",)
    most = 0.0
    for target in NVIDIA:
        with pretend(target):
            for kernel in kernels:
                sizes = _fitting_settings(kernel, torch.float16, d, queries, keys)
                padded = _whole(queries, sizes["BLOCK_M"]) * _whole(keys, sizes["BLOCK_N"])
                most = max(most, padded / (queries * keys))
    return most


def _whole(count: int, block: int) -> int:
    return -(-count // block) * block


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
    inputs = Inputs(query, key, key, query_row, query_blend, key_rows, mask, heads)
    statistics = _empty_statistics(query, heads)
    if backward:
        _differentiate(query, query, statistics, inputs, keys_needed=True, blend_needed=False)
    else:
        _launch_forward(inputs, query, statistics)


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
    _compile_case("zeroscope_20x36", 24, 720, 10, 64, blend=1),
    _compile_case("zeroscope_10x18", 24, 180, 20, 64, blend=1),
    _compile_case("zeroscope_5x9", 24, 45, 20, 64, blend=1),
    _compile_case("videocrafter2_40x64", 16, 2560, 5, 64, blend=1),
    _compile_case("videocrafter2_20x32", 16, 640, 10, 64, blend=1),
    _compile_case("head_dim_16", 16, 256, 8, 16, blend=1),
    _compile_case("head_dim_96", 16, 256, 8, 96, blend=1),
    _compile_case("head_dim_128", 16, 256, 8, 128, blend=1),
    _compile_case("head_dim_144", 16, 256, 8, 144, blend=1),
    _compile_case("head_dim_192", 16, 256, 8, 192, blend=1),
    _compile_case("head_dim_256", 16, 256, 8, 256, blend=1),
    _compile_case("embedded_16x16", 8, 256, 2, 32, blend=1),
    _compile_case("embedded_16x16_prompt", 8, 256, 2, 32, keys=24),
    _compile_case("embedded_8x8", 8, 64, 4, 32, blend=1),
    _compile_case("embedded_4x4", 8, 16, 4, 32, blend=1),
    _compile_case("animatediff_64x64", 16, 4096, 8, 40, backward=True),
    _compile_case("animatediff_64x64_prompt", 16, 4096, 8, 40, keys=77, backward=True),
    _compile_case("animatediff_32x32", 16, 1024, 8, 80, blend=1, backward=True),
    _compile_case("animatediff_32x32_shots", 16, 1024, 8, 80, further=3, backward=True),
    _compile_case("animatediff_16x16", 16, 256, 8, 160, blend=1, backward=True),
    _compile_case("head_dim_16", 16, 256, 8, 16, blend=1, backward=True),
    _compile_case("head_dim_96", 16, 256, 8, 96, blend=1, backward=True),
    _compile_case("head_dim_128", 16, 256, 8, 128, blend=1, backward=True),
    _compile_case("head_dim_144", 16, 256, 8, 144, blend=1, backward=True),
    _compile_case("head_dim_192", 16, 256, 8, 192, blend=1, backward=True),
    _compile_case("head_dim_256", 16, 256, 8, 256, blend=1, backward=True),
    _compile_case("zeroscope_40x72", 24, 2880, 5, 64, blend=1, backward=True),
    _compile_case("videocrafter2_40x64", 16, 2560, 5, 64, blend=1, backward=True),
    _compile_case("embedded_16x16", 8, 256, 2, 32, blend=1, backward=True),
)
