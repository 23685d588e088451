"""`dice_cross_entropy` as Triton kernels.

Shapes: N batch, C classes, V = D·H·W voxels. Scores and their gradient are (N, C, V) or, channels-last, (N, V, C).

Forward, two launches: `_sums`, a fixed number of programs for each sample, each of which walks its share of the voxels in tiles
of all classes × some voxels and writes its sums; `_combine`, one program for each sample, which adds them in order, in float64.
No atomics: a call gives the same bits every time. Then torch takes the mean over the samples.

Backward, one launch, `_gradient`, of one program for each tile: with p = softmax(scores), for a voxel of class y

    grad[c] = p[c] · (q[c] - Σ_k p[k]·q[k]) + (p[c] - [y = c]) / (N·V),   q[c] = all[c] + [y = c] · hit[c]

where (hit, all) = (-2 / den, num / den²) / (N · classes in the Dice term) are what `_combine` left of the sums.

A tile holds TILE scores, so that registers do not grow with the classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import INTERPRETED, MISSING, on_device_of
from .reference import SMOOTH

try:
    import triton
    import triton.language as tl
except ImportError:  # the other backends do without
    triton = None

TILE = 2048  # scores; not tuned: 16 of each thread, of which the forward holds three such sets
WARPS = 4
PROGRAMS = 1024  # of a sample
ROWS = 64  # of partial sums that `_combine` reads together
MOST_CLASSES = 256
MOST_SAMPLES = 2**16 - 1  # the second axis of a grid
MOST_VOXELS = 2**31 - PROGRAMS * TILE  # of a sample, counted in 32 bits, beyond its end by a tile of each program


def refuses(scores: Tensor) -> str:
    """Why this backend cannot take a call with these scores, or ""."""
    if MISSING:
        return MISSING
    if not scores.is_cuda and not INTERPRETED:
        return f"it runs on a GPU (or with TRITON_INTERPRET=1), and the scores are on {scores.device}"
    if scores.shape[0] > MOST_SAMPLES or scores.shape[1] > MOST_CLASSES:
        return f"it takes {MOST_SAMPLES} samples and {MOST_CLASSES} classes, and the scores have {tuple(scores.shape[:2])}"
    if scores.shape[2] * scores.shape[3] * scores.shape[4] > MOST_VOXELS:
        return f"it counts the voxels of a class in 32 bits, and the scores have {tuple(scores.shape[2:])}"
    return ""


def _voxels(scores: Tensor) -> int:
    return scores.shape[2] * scores.shape[3] * scores.shape[4]


def _tile(scores: Tensor) -> dict[str, int]:
    """What a kernel is compiled for. The classes are: channels-last they are the step that says whether vectors may be read."""
    lanes = triton.next_power_of_2(scores.shape[1])
    return {"C": scores.shape[1], "LAST": not scores.is_contiguous(), "LANES": lanes, "BLOCK": TILE // lanes}


def forward(scores: Tensor, label: Tensor, loss: Tensor, coefficients: Tensor, *, include_background: bool) -> None:
    """Write `loss` () and `coefficients` (N, C, 2); scores are dense, contiguous or channels-last, the label contiguous."""
    n, voxels, tile = scores.shape[0], _voxels(scores), _tile(scores)
    tiles = triton.cdiv(voxels, tile["BLOCK"])
    programs = min(PROGRAMS, tiles)
    sums = torch.empty((n, programs, 3, tile["LANES"]), dtype=torch.float32, device=scores.device)
    losses = torch.empty(n, dtype=torch.float32, device=scores.device)
    with on_device_of(scores):
        _sums[(programs, n)](scores, label, sums, voxels, triton.cdiv(tiles, programs), **tile, num_warps=WARPS)
        _combine[(n,)](sums, losses, coefficients, programs, n, voxels, C=tile["C"], FIRST=int(not include_background),
                       SMOOTH=SMOOTH, LANES=tile["LANES"], ROWS=min(ROWS, TILE // tile["LANES"]), num_warps=WARPS)
        torch.mean(losses, 0, out=loss)


def backward(grad: Tensor, scores: Tensor, label: Tensor, coefficients: Tensor, grad_scores: Tensor) -> None:
    """Write `grad_scores`, dense as the scores are."""
    n, voxels, tile = scores.shape[0], _voxels(scores), _tile(scores)
    with on_device_of(scores):
        _gradient[(triton.cdiv(voxels, tile["BLOCK"]), n)](
            grad, scores, label, coefficients, grad_scores, 1 / (n * voxels), voxels, **tile, num_warps=WARPS)


if triton is not None:

    @triton.jit
    def _classes(label, voxel, V, C: tl.constexpr):
        """Of the voxels of a tile, the class, or -1 where the label is none or there is no voxel."""
        y = tl.load(label + voxel, mask=voxel < V, other=0)
        if y.dtype.primitive_bitwidth < 32:  # C may be no number of its type
            y = y.to(tl.int32)
        known = (y >= 0) & (y < C) & (voxel < V)
        return tl.where(known, y, 0).to(tl.int32) - tl.where(known, 0, 1)

    @triton.jit
    def _exponentials(scores, voxel, V, C: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr):
        """(offsets, which lie within, score - the voxel's greatest, its exponential); beyond the classes -inf and 0."""
        c = tl.arange(0, LANES)
        if LAST:
            at = c.to(tl.int64)[:, None] + (voxel.to(tl.int64) * C)[None, :]
        else:
            at = (c.to(tl.int64) * V)[:, None] + voxel.to(tl.int64)[None, :]
        within = (c < C)[:, None] & (voxel < V)[None, :]
        s = tl.load(scores + at, mask=within, other=0.0).to(tl.float32)
        s = tl.where((c < C)[:, None], s, float("-inf"))
        x = s - tl.max(s, 0)[None, :]
        return at, within, x, tl.exp(x)

    @triton.jit
    def _sums(
        scores, label, sums, V, tiles, C: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """Grid (programs, N). Of its share of a sample: for each class Σ p over its voxels, and Σ p + its voxels; Σ -log p[y]."""
        n = tl.program_id(1).to(tl.int64)
        scores += n * V * C
        label += n * V
        c = tl.arange(0, LANES)
        hit = tl.zeros([LANES, BLOCK], tl.float32)
        both = tl.zeros([LANES, BLOCK], tl.float32)
        surprise = tl.zeros([BLOCK], tl.float32)
        for tile in range(tiles):
            # Programs take turns: what they read at a time lies together.
            voxel = (tile * tl.num_programs(0) + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
            y = _classes(label, voxel, V, C)
            _, _, x, e = _exponentials(scores, voxel, V, C, LAST, LANES)
            total = tl.sum(e, 0)
            is_class = y[None, :] == c[:, None]
            # In a voxel beyond the last no class is counted, in one of no class the surprise is no number.
            p = tl.where((voxel < V)[None, :], e * (1.0 / total)[None, :], 0.0)
            hit += tl.where(is_class, p, 0.0)
            both += tl.where(is_class, p + 1.0, p)
            own = tl.sum(tl.where(is_class, x, 0.0), 0)
            own = tl.where(y >= 0, tl.log(total) - own, float("nan"))
            surprise += tl.where(voxel < V, own, 0.0)
        sums += (n * tl.num_programs(0) + tl.program_id(0)) * (3 * LANES)
        tl.store(sums + c, tl.sum(hit, 1))
        tl.store(sums + LANES + c, tl.sum(both, 1))
        tl.store(sums + 2 * LANES + c, tl.sum(surprise, 0) + tl.zeros([LANES], tl.float32))

    @triton.jit
    def _column(sums, programs, which, LANES: tl.constexpr, ROWS: tl.constexpr):
        """One of the three sums of a sample, over all programs: [LANES] float64."""
        c = tl.arange(0, LANES)
        total = tl.zeros([ROWS, LANES], tl.float64)
        for first in range(0, programs, ROWS):
            row = first + tl.arange(0, ROWS)
            at = (row * 3 + which)[:, None] * LANES + c[None, :]
            total += tl.load(sums + at, mask=(row < programs)[:, None], other=0.0).to(tl.float64)
        return tl.sum(total, 0)

    @triton.jit
    def _combine(
        sums, losses, coefficients, programs, N, V, C: tl.constexpr, FIRST: tl.constexpr, SMOOTH: tl.constexpr,
        LANES: tl.constexpr, ROWS: tl.constexpr,
    ):
        """Grid (N,). The loss of a sample, and (hit, all) of its classes over N."""
        n = tl.program_id(0).to(tl.int64)
        sums += n * programs * (3 * LANES)
        c = tl.arange(0, LANES)
        taken = (c >= FIRST) & (c < C)
        numerator = 2.0 * _column(sums, programs, 0, LANES, ROWS) + SMOOTH
        denominator = _column(sums, programs, 1, LANES, ROWS) + SMOOTH
        surprise = _column(sums, programs, 2, LANES, ROWS) / V  # the same for every class
        dice = tl.sum(tl.where(taken, 1.0 - numerator / denominator, 0.0), 0) / (C - FIRST)
        cross_entropy = tl.sum(tl.where(c == 0, surprise, 0.0), 0)
        tl.store(losses + n, (dice + cross_entropy).to(tl.float32))
        # Where it is no number the sample has no gradient that is one; an infinite one leaves the Dice term as it is.
        spoilt = tl.where(surprise == surprise, 0.0, surprise)
        share = denominator * (C - FIRST) * N
        hit = tl.where(taken, -2.0 / share, 0.0) + spoilt
        everywhere = tl.where(taken, numerator / (denominator * share), 0.0) + spoilt
        coefficients += (n * C + c) * 2
        tl.store(coefficients, hit.to(tl.float32), mask=c < C)
        tl.store(coefficients + 1, everywhere.to(tl.float32), mask=c < C)

    @triton.jit
    def _gradient(
        grad, scores, label, coefficients, grad_scores, share, V, C: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Grid (tiles, N). See the module's docstring."""
        n = tl.program_id(1).to(tl.int64)
        scores += n * V * C
        grad_scores += n * V * C
        c = tl.arange(0, LANES)
        voxel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        upstream = tl.load(grad)
        coefficients += (n * C + c) * 2
        hit = tl.load(coefficients, mask=c < C, other=0.0) * upstream
        everywhere = tl.load(coefficients + 1, mask=c < C, other=0.0) * upstream
        even = upstream * share
        y = _classes(label + n * V, voxel, V, C)
        at, within, _, e = _exponentials(scores, voxel, V, C, LAST, LANES)
        p = e * (1.0 / tl.sum(e, 0))[None, :]
        is_class = y[None, :] == c[:, None]
        q = everywhere[:, None] + tl.where(is_class, hit[:, None], 0.0)
        mean = tl.sum(p * q, 0)
        out = p * (q - mean[None, :] + even) - tl.where(is_class, even, 0.0)
        tl.store(grad_scores + at, out.to(grad_scores.dtype.element_ty), mask=within)
