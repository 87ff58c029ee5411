"""Pallas Mosaic GPU kernels for Hopper: the two softmaxes between tokens and landmarks never leave the chip.

One kernel streams keys and values past the landmarks, softmax(Q̃ Kᵀ) V with a running maximum and sum, and one streams
queries past them, softmax(Q K̃ᵀ) (Z U). Their gradients recompute the softmax from the inputs, so that nothing of size
L·M reaches device memory, forward or backward. Two more do all steps of the pseudo-inverse and of its gradient, up to
64 landmarks. Means of segments, skip convolution and all other products of size M are XLA's.

Axes here besides those of the package: P parts of a number, C chunks of the tokens, S padded landmarks, X = N·K. A
bfloat16 array has one part. A float32 array has two, bfloat16 numbers whose sum it is to 16 bits, and a product of two
such arrays is the sum of three products: float32 operands of the tensor cores (TF32) would have to lie transposed.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch, mosaic
from kernels.nystrom_attention import reference, xla

MAX_LANDMARKS = 128
MAX_WIDTH = 128
_BLOCK = mosaic.WARPGROUP_ROWS
_BLOCKS_PER_MULTIPROCESSOR = 2  # of the grid at least, where there are tokens enough
_TILE_ROWS = 8  # the hardware copies whole tiles of so many rows, so that L must be a multiple
_OUT_COLUMNS = 64  # that a product holds in registers on its way to device memory
_STAGES = 5  # numbers that a step of the pseudo-inverse's gradient takes from `_hidden_zeros`
_LOWEST = -1e30  # a score below all others; finite, as the difference of two infinite ones is none
_LAYOUT = plgpu.Layout.WGMMA


def nystrom_attention(q_BLNK, k_BLNK, v_BLNK, w_skip_RN, *, landmarks, pinv_iterations, pinv_init, mask_BL):
  """Arguments and result as of `kernels.nystrom_attention.nystrom_attention`."""
  length, width = q_BLNK.shape[1], q_BLNK.shape[-1]

  def wide(x_BMNK):
    return mosaic.pad_axis(x_BMNK, 3, _padded_width(width))

  def whole_tiles(x_BL):
    return mosaic.pad_axis(x_BL, 1, mosaic.round_up(length, _TILE_ROWS))

  def per_device(function, *arrays):
    present = [array for array in arrays if array is not None]
    return dispatch.per_device(function, (True,) * len(present))(*present)

  def inverse(a_BNMM):
    if landmarks > _BLOCK or not pinv_iterations:
      return reference.pseudo_inverse(a_BNMM, pinv_iterations, pinv_init)
    steps = functools.partial(_inverse, iterations=pinv_iterations, parts=2 if v_BLNK.dtype == jnp.bfloat16 else 3)
    return per_device(steps, a_BNMM, reference.first_inverse(a_BNMM, pinv_init))

  q_BMNK, k_BMNK = (xla.scaled_landmarks(xla.masked(x, mask_BL), landmarks) for x in (q_BLNK, k_BLNK))
  keep_BL = None
  if mask_BL is not None or length % _TILE_ROWS:
    keep_BL = jnp.ones(q_BLNK.shape[:2], jnp.float32) if mask_BL is None else mask_BL.astype(jnp.float32)
    keep_BL = whole_tiles(keep_BL)
  q, k, v = (wide(whole_tiles(x)) for x in (q_BLNK, k_BLNK, v_BLNK))
  values_BNMK = per_device(_landmark_values, wide(q_BMNK), k, v, keep_BL)
  values_BNMK = xla.through_inverse(q_BMNK, k_BMNK, values_BNMK, inverse)
  values_BMNK = values_BNMK.swapaxes(1, 2).astype(v_BLNK.dtype)
  out_BLNK = per_device(_token_values, q, wide(k_BMNK), values_BMNK, keep_BL)[:, :length, :, :width]
  if w_skip_RN is not None:
    out_BLNK = out_BLNK + reference.skip_convolution(xla.masked(v_BLNK, mask_BL), w_skip_RN)
  return out_BLNK


def refuse(q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, landmarks: int) -> str | None:
  """Why the arguments do not suit the kernels; None if they do."""
  shape, width, dtype = q_BLNK.shape, q_BLNK.shape[-1], q_BLNK.dtype
  if dtype not in (jnp.bfloat16, jnp.float32) or not dtype == k_BLNK.dtype == v_BLNK.dtype:
    return f"it takes bfloat16 or float32 for all, not {dtype}, {k_BLNK.dtype} and {v_BLNK.dtype}"
  if landmarks == shape[1]:
    return f"{landmarks} landmarks for {landmarks} tokens are plain softmax attention"
  if landmarks > MAX_LANDMARKS:
    return f"it takes at most {MAX_LANDMARKS} landmarks, not {landmarks}"
  if width > MAX_WIDTH:
    return f"it takes heads of width {MAX_WIDTH} at most, not {width}"
  if 0 in shape:
    return f"there is nothing to do for shape {shape}"
  sizes = 2 if dtype == jnp.float32 else 1, mosaic.round_up(landmarks, _BLOCK), _padded_width(width)
  if not all(any(_gradient_choices(*sizes, keys)) for keys in (True, False)):
    return f"{landmarks} landmarks and heads of width {width} in {dtype} need more shared memory than a block has"
  return None


# ------------------------------------------------------------------------------------------- U = softmax(Q̃ Kᵀ) V


@jax.custom_vjp
def _landmark_values(q_BMNK, k_BLNK, v_BLNK, keep_BL=None):
  """softmax(Q̃ Kᵀ) V over the tokens that `keep_BL` keeps (1, or 0 for none): (B, N, M, K), float32."""
  return _landmark_values_forward(q_BMNK, k_BLNK, v_BLNK, keep_BL)[0]


def _landmark_values_forward(q_BMNK, k_BLNK, v_BLNK, keep_BL=None):
  landmarks, heads = q_BMNK.shape[1:3]
  q_PBSX, k_PBLX, v_PBLX = _landmark_parts(q_BMNK), _parts(k_BLNK), _parts(v_BLNK)
  sums_BNCSK, tops_BNCS, totals_BNCS = _stream_keys(q_PBSX, k_PBLX, v_PBLX, keep_BL, heads)
  top_BNS = tops_BNCS.max(2)
  share_BNCS = jnp.exp2(tops_BNCS - top_BNS[:, :, None])
  total_BNS = (totals_BNCS * share_BNCS).sum(2)
  some = total_BNS > 0  # there is a key at all
  total_BNS = jnp.where(some, total_BNS, 1)
  u_BNSK = (sums_BNCSK * share_BNCS[..., None]).sum(2) / total_BNS[..., None]
  logs_BNS = jnp.where(some, top_BNS, 0) + jnp.log2(total_BNS)
  u_BNMK = u_BNSK[:, :, :landmarks]
  return u_BNMK, (q_BMNK, k_BLNK, v_BLNK, keep_BL, logs_BNS, u_BNMK)


def _landmark_values_backward(residuals, du_BNMK):
  q_BMNK, k_BLNK, v_BLNK, keep_BL, logs_BNS, u_BNMK = residuals
  deltas_BNM = (du_BNMK * u_BNMK).sum(3)
  du_BMNK = du_BNMK.swapaxes(1, 2)
  columns_BN2S = jnp.stack([logs_BNS, mosaic.pad_axis(deltas_BNM, 2, logs_BNS.shape[2])], 2)
  dk_BLX, dv_BLX, dq_BNCSK = _stream_gradients(
    _parts(k_BLNK), _parts(v_BLNK), _landmark_parts(q_BMNK), _landmark_parts(du_BMNK.astype(v_BLNK.dtype)),
    keep_BL, columns_BN2S, q_BMNK.shape[2], q_BMNK.shape[1], k_BLNK.dtype,
  )  # fmt: skip
  dkeep = None if keep_BL is None else jnp.zeros_like(keep_BL)
  return _sum_of_chunks(dq_BNCSK, q_BMNK), dk_BLX.reshape(k_BLNK.shape), dv_BLX.reshape(v_BLNK.shape), dkeep


_landmark_values.defvjp(_landmark_values_forward, _landmark_values_backward)


# ------------------------------------------------------------------------------------------- softmax(Q K̃ᵀ) (Z U)


@jax.custom_vjp
def _token_values(q_BLNK, k_BMNK, values_BMNK, keep_BL=None):
  """softmax(Q K̃ᵀ) values, with queries of zeros where `keep_BL` is 0: (B, L, N, K) in the dtype of q."""
  return _token_values_forward(q_BLNK, k_BMNK, values_BMNK, keep_BL)[0]


def _token_values_forward(q_BLNK, k_BMNK, values_BMNK, keep_BL=None):
  landmarks, heads = k_BMNK.shape[1:3]
  parts = _parts(q_BLNK), _landmark_parts(k_BMNK), _landmark_parts(values_BMNK)
  out_BLX = _stream_queries(*parts, keep_BL, heads, landmarks, q_BLNK.dtype)
  return out_BLX.reshape(q_BLNK.shape), (q_BLNK, k_BMNK, values_BMNK, keep_BL)


def _token_values_backward(residuals, dout_BLNK):
  q_BLNK, k_BMNK, values_BMNK, keep_BL = residuals
  dq_BLX, dk_BNCSK, dvalues_BNCSK = _stream_gradients(
    _parts(q_BLNK), _parts(dout_BLNK), _landmark_parts(k_BMNK), _landmark_parts(values_BMNK),
    keep_BL, None, k_BMNK.shape[2], k_BMNK.shape[1], q_BLNK.dtype,
  )  # fmt: skip
  dk_BMNK, dvalues_BMNK = _sum_of_chunks(dk_BNCSK, k_BMNK), _sum_of_chunks(dvalues_BNCSK, values_BMNK)
  dkeep = None if keep_BL is None else jnp.zeros_like(keep_BL)
  return dq_BLX.reshape(q_BLNK.shape), dk_BMNK, dvalues_BMNK, dkeep


_token_values.defvjp(_token_values_forward, _token_values_backward)


# ------------------------------------------------------------------------------------------- the kernels


def _stream_keys(q_PBSX, k_PBLX, v_PBLX, keep_BL, heads):
  """Unnormalised softmax(Q̃ Kᵀ) V of every chunk, and its maxima (log2) and sums: (B, N, C, S, K), twice (B, N, C, S).

  A warpgroup holds 64 landmarks; all warpgroups of a block share the tiles of keys and values.
  """
  parts, batch, padded, _ = q_PBSX.shape
  length, width = k_PBLX.shape[2], k_PBLX.shape[3] // heads
  groups = padded // _BLOCK
  rows = 2 * _BLOCK if parts * width <= 64 else _BLOCK
  slots = 3 if parts * width <= 32 else 2
  tiles = pl.cdiv(length, rows)
  steps, chunks = _chunks(tiles, batch * heads)
  keep_BL = _padded_keep(keep_BL, batch, length, rows, needed=length % rows != 0)
  inputs = [q_PBSX, k_PBLX, v_PBLX] + ([] if keep_BL is None else [keep_BL])

  def nystrom_keys(q_g, k_g, v_g, *refs, q_s, k_s, v_s, weights_s, start, full, meet, keep_s=None):
    sums_g, tops_g, totals_g = refs[-3:]
    b, n, c, group = (lax.axis_index(name) for name in "bncg")
    columns = pl.ds(n * width, width)
    first = c * steps
    count = jnp.minimum(steps, tiles - first)

    def load(i):
      slot, tokens = lax.rem(i, slots), pl.ds((first + i) * rows, rows)
      for part in range(parts):
        for x_g, x_s in ((k_g, k_s), (v_g, v_s)):
          plgpu.copy_gmem_to_smem(x_g.at[part, b, tokens, columns], x_s.at[slot, part], full.at[slot])
      if keep_s is not None:
        plgpu.copy_gmem_to_smem(refs[0].at[b, tokens], keep_s.at[slot], full.at[slot])

    @pl.when(group == 0)
    def _():
      for part in range(parts):
        for block in range(groups):
          landmarks = pl.ds(block * _BLOCK, _BLOCK)
          plgpu.copy_gmem_to_smem(q_g.at[part, b, landmarks, columns], q_s.at[part, block], start)
      _first(load, slots, count)

    plgpu.barrier_wait(start)

    def tile(i, carry):
      top, total, sums = carry
      slot = lax.rem(i, slots)
      plgpu.barrier_wait(full.at[slot])
      scores = _product(q_s.at[:, group], k_s.at[slot], transpose_b=True)
      if keep_s is not None:
        keep = plgpu.load(keep_s.at[slot], layout=_LAYOUT.reduce(0))
        kept = lax.broadcast_in_dim(keep, scores.shape, [1]) > 0
        scores = jnp.where(kept, scores, _LOWEST)
      new_top = jnp.maximum(top, scores.max(axis=1))
      weights = jnp.exp2(scores * mosaic.LOG2_E - _down(new_top * mosaic.LOG2_E, scores))
      if keep_s is not None:
        weights = jnp.where(kept, weights, 0.0)  # of a tile of padding alone, whose maximum is _LOWEST
      shrink = jnp.exp2((top - new_top) * mosaic.LOG2_E)
      _store_parts(weights_s.at[:, group], weights)
      plgpu.commit_smem()
      more = _product(weights_s.at[:, group], v_s.at[slot])
      _meet(meet, groups)

      @pl.when((group == 0) & (i + slots < count))
      def _():
        load(i + slots)

      return new_top, total * shrink + weights.sum(axis=1), sums * _down(shrink, sums) + more

    column = plgpu.layout_cast(jnp.zeros((_BLOCK,), jnp.float32), _LAYOUT.reduce(1))
    sums = plgpu.layout_cast(jnp.zeros((_BLOCK, width), jnp.float32), _LAYOUT)
    top, total, sums = lax.fori_loop(0, count, tile, (column + _LOWEST, column, sums))
    own = pl.ds(group * _BLOCK, _BLOCK)
    sums_g[b, n, c, own] = sums
    tops_g[b, n, c, own] = top * mosaic.LOG2_E
    totals_g[b, n, c, own] = total

  swizzled = mosaic.swizzled(width, jnp.bfloat16)
  scratch = dict(
    q_s=_shared((parts, groups, _BLOCK, width), swizzled),
    k_s=_shared((slots, parts, rows, width), swizzled),
    v_s=_shared((slots, parts, rows, width), swizzled),
    weights_s=_shared((parts, groups, _BLOCK, rows), swizzled),
    start=plgpu.Barrier(num_arrivals=parts * groups),
    full=plgpu.Barrier(num_arrivals=2 * parts + (keep_BL is not None), num_barriers=slots),
    meet=plgpu.Barrier(num_arrivals=groups),
  )
  if keep_BL is not None:
    scratch["keep_s"] = plgpu.SMEM((slots, rows), jnp.float32)
  vectors = jax.ShapeDtypeStruct((batch, heads, chunks, padded), jnp.float32)
  return mosaic.kernel(
    nystrom_keys,
    out_type=(jax.ShapeDtypeStruct((*vectors.shape, width), jnp.float32), vectors, vectors),
    scratch_types=scratch,
    grid=(batch, heads, chunks),
    grid_names=("b", "n", "c"),
    num_threads=groups,
    thread_name="g",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs)


def _stream_queries(q_PBLX, k_PBSX, values_PBSX, keep_BL, heads, landmarks, dtype):
  """softmax(Q K̃ᵀ) values: (B, L, X) in `dtype`. A block is one warpgroup; a tile is 64 queries."""
  parts, batch, length, columns_all = q_PBLX.shape
  padded, width = k_PBSX.shape[2], columns_all // heads
  slots = 3 if parts * width <= 64 else 2
  tiles = pl.cdiv(length, _BLOCK)
  steps, chunks = _chunks(tiles, batch * heads)
  keep_BL = _padded_keep(keep_BL, batch, length, _BLOCK, needed=False)
  inputs = [q_PBLX, k_PBSX, values_PBSX] + ([] if keep_BL is None else [keep_BL])

  def nystrom_queries(q_g, k_g, values_g, *refs, q_s, k_s, values_s, weights_s, out_s, start, full, keep_s=None):
    out_g = refs[-1]
    b, n, c = (lax.axis_index(name) for name in "bnc")
    columns = pl.ds(n * width, width)
    first = c * steps
    count = jnp.minimum(steps, tiles - first)

    def load(i):
      slot, tokens = lax.rem(i, slots), pl.ds((first + i) * _BLOCK, _BLOCK)
      for part in range(parts):
        plgpu.copy_gmem_to_smem(q_g.at[part, b, tokens, columns], q_s.at[slot, part], full.at[slot])
      if keep_s is not None:
        plgpu.copy_gmem_to_smem(refs[0].at[b, tokens], keep_s.at[slot], full.at[slot])

    for part in range(parts):
      plgpu.copy_gmem_to_smem(k_g.at[part, b, :, columns], k_s.at[part], start)
      plgpu.copy_gmem_to_smem(values_g.at[part, b, :, columns], values_s.at[part], start)
    _first(load, slots, count)
    plgpu.barrier_wait(start)

    @pl.loop(0, count)
    def _(i):
      slot = lax.rem(i, slots)
      plgpu.barrier_wait(full.at[slot])
      scores = _product(q_s.at[slot], k_s, transpose_b=True)
      keep = None if keep_s is None else plgpu.load(keep_s.at[slot], layout=_LAYOUT.reduce(1))
      weights, total = _softmax_of_landmarks(scores, keep, landmarks)
      _store_parts(weights_s.at[:, 0], weights)
      plgpu.commit_smem()

      @pl.when(i + slots < count)
      def _():
        load(i + slots)

      out = _product(weights_s.at[:, 0], values_s)
      _send(out / _down(total, out), out_s, out_g.at[b, pl.ds((first + i) * _BLOCK, _BLOCK), columns])

    plgpu.wait_smem_to_gmem(0)

  swizzled = mosaic.swizzled(width, jnp.bfloat16)
  scratch = dict(
    q_s=_shared((slots, parts, _BLOCK, width), swizzled),
    k_s=_shared((parts, padded, width), swizzled),
    values_s=_shared((parts, padded, width), swizzled),
    weights_s=_shared((parts, 1, _BLOCK, padded), swizzled),
    out_s=plgpu.SMEM((_BLOCK, width), dtype, transforms=mosaic.swizzled(width, dtype)),
    start=plgpu.Barrier(num_arrivals=2 * parts),
    full=plgpu.Barrier(num_arrivals=parts + (keep_BL is not None), num_barriers=slots),
  )
  if keep_BL is not None:
    scratch["keep_s"] = plgpu.SMEM((slots, _BLOCK), jnp.float32)
  return mosaic.kernel(
    nystrom_queries,
    out_type=jax.ShapeDtypeStruct((batch, length, columns_all), dtype),
    scratch_types=scratch,
    grid=(batch, heads, chunks),
    grid_names=("b", "n", "c"),
    num_threads=1,
    thread_name="g",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs)


def _stream_gradients(x_PBLX, d_PBLX, y_PBSX, e_PBSX, keep_BL, columns_BN2S, heads, landmarks, dtype):
  """Gradients of one of the two softmaxes between tokens and landmarks, whose weights it recomputes.

  With weights P of tokens (rows) and landmarks (columns) from the scores x yᵀ, dP = d eᵀ and dS = P (dP − δ):
    queries, softmax over landmarks: x = Q, d = dout, y = K̃, e = values, δ = Σ P dP of every row, and
      dx = dS y, dy = dSᵀ x, de = Pᵀ d;
    keys, softmax over tokens: x = K, d = V, y = Q̃, e = dU, the logarithms (base 2) of the softmax's sums and δ in
      `columns_BN2S`, and dx = dS y, dd = P e, dy = dSᵀ x.
  There is one dy and de for every chunk of the tokens.

  A warpgroup computes 64 rows of P and dS, and accumulates 64 landmarks of dy and de over the rows of all warpgroups.
  Rows beyond the last token need no care: they are read as zeros, so that they add nothing to dy and de.

  Args:
    columns_BN2S: see above; None for the queries.
    dtype: of dx and dd.

  Returns:
    dx (B, L, X); for keys dd (B, L, X); dy (B, N, C, S, K); for queries de (B, N, C, S, K). dy and de are float32.
  """
  keys = columns_BN2S is not None
  parts, batch, length, columns_all = x_PBLX.shape
  padded, width = y_PBSX.shape[2], columns_all // heads
  groups = padded // _BLOCK
  rows = groups * _BLOCK
  slots, buffers = next(_gradient_choices(parts, padded, width, keys))
  tiles = pl.cdiv(length, rows)
  columns = min(width, _OUT_COLUMNS)
  steps, chunks = _chunks(tiles, batch * heads * (width // columns))
  keep_BL = _padded_keep(keep_BL, batch, length, rows, needed=False)
  inputs = [x_PBLX, d_PBLX, y_PBSX, e_PBSX] + [x for x in (columns_BN2S, keep_BL) if x is not None]

  def body(x_g, d_g, y_g, e_g, *refs, x_s, d_s, y_s, e_s, ds_s, weights_s, out_s, start, full, meet, columns_s=None,
           keep_s=None):  # fmt: skip
    outs_g, dy_g = (refs[-3:-1], refs[-1]) if keys else (refs[-3:-2], refs[-2])
    b, n, h, c, group = (lax.axis_index(name) for name in "bnhcg")
    part_columns = pl.ds(h * columns, columns)
    out_columns = pl.ds(n * width + h * columns, columns)
    first = c * steps
    count = jnp.minimum(steps, tiles - first)
    own = pl.ds(group * _BLOCK, _BLOCK)

    def load(i):
      slot = lax.rem(i, slots)
      for block in range(groups):
        tokens = pl.ds((first + i) * rows + block * _BLOCK, _BLOCK)
        for part in range(parts):
          for all_g, tile_s in ((x_g, x_s), (d_g, d_s)):
            plgpu.copy_gmem_to_smem(
              all_g.at[part, b, tokens, pl.ds(n * width, width)], tile_s.at[slot, part, block], full.at[slot]
            )
      if keep_s is not None:
        plgpu.copy_gmem_to_smem(refs[keys].at[b, pl.ds((first + i) * rows, rows)], keep_s.at[slot], full.at[slot])

    @pl.when(group == 0)
    def _():
      for part in range(parts):
        plgpu.copy_gmem_to_smem(y_g.at[part, b, :, pl.ds(n * width, width)], y_s.at[0, part], start)
        plgpu.copy_gmem_to_smem(e_g.at[part, b, :, pl.ds(n * width, width)], e_s.at[0, part], start)
      if keys:
        plgpu.copy_gmem_to_smem(refs[0].at[b, n], columns_s, start)
      _first(load, slots, count)

    plgpu.barrier_wait(start)

    def gradients_of_queries(tile, keep):
      scores = _product(tile.x_s.at[:, group], tile.y_s, transpose_b=True)
      weights, total = _softmax_of_landmarks(scores, keep, landmarks)
      weights = weights * _down(1 / total, weights)
      _store_parts(tile.weights_s.at[:, group], weights)
      dweights = _product(tile.d_s.at[:, group], tile.e_s, transpose_b=True)
      dscores = weights * (dweights - _down((weights * dweights).sum(axis=1), dweights))
      if keep is not None:
        dscores = dscores * _down(keep, dscores)
      _store_parts(tile.ds_s.at[:, group], dscores)

    def gradients_of_keys(tile, keep):
      scores = _product(tile.x_s.at[:, group], tile.y_s, transpose_b=True)
      weights = jnp.exp2(
        scores * mosaic.LOG2_E - _across(plgpu.load(columns_s.at[0], layout=_LAYOUT.reduce(0)), scores)
      )
      if keep is not None:
        weights = jnp.where(_down(keep, scores) > 0, weights, 0.0)
      _store_parts(tile.weights_s.at[:, group], weights)
      dweights = _product(tile.d_s.at[:, group], tile.e_s, transpose_b=True)
      _store_parts(
        tile.ds_s.at[:, group],
        weights * (dweights - _across(plgpu.load(columns_s.at[1], layout=_LAYOUT.reduce(0)), dweights)),
      )

    def accumulate(dy, de=None):
      @pl.loop(0, count)
      def _(i):
        zero = _hidden_zero(i, count)
        slot = lax.rem(i, slots) if slots > 1 else zero
        tile = _Tile(x_s.at[slot], d_s.at[slot], y_s.at[zero], e_s.at[zero], ds_s.at[zero], weights_s.at[zero])
        plgpu.barrier_wait(full.at[slot])
        keep = None if keep_s is None else plgpu.load(keep_s.at[slot, own], layout=_LAYOUT.reduce(1))
        if keys:
          gradients_of_keys(tile, keep)
        else:
          gradients_of_queries(tile, keep)
        plgpu.commit_smem()

        tokens = pl.ds((first + i) * rows + group * _BLOCK, _BLOCK)
        for k, (left_s, right_s) in enumerate(((tile.ds_s, tile.y_s), (tile.weights_s, tile.e_s))[: 1 + keys]):
          out = _product(left_s.at[:, group], right_s.at[:, :, part_columns])
          _send(out, out_s.at[k % buffers, group], outs_g[k].at[b, tokens, out_columns], buffers - 1)
        _meet(meet, groups)

        @pl.loop(0, groups)
        def _(block):
          _accumulate(dy, tile.ds_s.at[:, block, :, own], tile.x_s.at[:, block, :, part_columns], transpose_a=True)
          if not keys:
            _accumulate(
              de, tile.weights_s.at[:, block, :, own], tile.d_s.at[:, block, :, part_columns], transpose_a=True
            )

        plgpu.wgmma_wait(0)
        _meet(meet, groups)

        @pl.when((group == 0) & (i + slots < count))
        def _():
          load(i + slots)

      dy_g[b, n, c, own, part_columns] = dy[...]
      if not keys:
        refs[-1][b, n, c, own, part_columns] = de[...]

    accumulator = plgpu.ACC((_BLOCK, columns), jnp.float32)
    pl.run_scoped(accumulate, *[accumulator] * (1 if keys else 2))
    plgpu.wait_smem_to_gmem(0)

  def nystrom_keys_gradient(*refs, **named):
    body(*refs, **named)

  def nystrom_queries_gradient(*refs, **named):
    body(*refs, **named)

  swizzled = mosaic.swizzled(width, jnp.bfloat16)
  scratch = dict(
    x_s=_shared((slots, parts, groups, _BLOCK, width), swizzled),
    d_s=_shared((slots, parts, groups, _BLOCK, width), swizzled),
    y_s=_shared((1, parts, padded, width), swizzled),
    e_s=_shared((1, parts, padded, width), swizzled),
    ds_s=_shared((1, parts, groups, _BLOCK, padded), swizzled),
    weights_s=_shared((1, parts, groups, _BLOCK, padded), swizzled),
    out_s=plgpu.SMEM((buffers, groups, _BLOCK, columns), dtype, transforms=mosaic.swizzled(columns, dtype)),
    start=plgpu.Barrier(num_arrivals=2 * parts + keys),
    full=plgpu.Barrier(num_arrivals=2 * parts * groups + (keep_BL is not None), num_barriers=slots),
    meet=plgpu.Barrier(num_arrivals=groups),
  )
  if keys:
    scratch["columns_s"] = plgpu.SMEM((2, padded), jnp.float32)
  if keep_BL is not None:
    scratch["keep_s"] = plgpu.SMEM((slots, rows), jnp.float32)
  tokens = jax.ShapeDtypeStruct((batch, length, columns_all), dtype)
  sums = jax.ShapeDtypeStruct((batch, heads, chunks, padded, width), jnp.float32)
  return mosaic.kernel(
    nystrom_keys_gradient if keys else nystrom_queries_gradient,
    out_type=(tokens, tokens, sums) if keys else (tokens, sums, sums),
    scratch_types=scratch,
    grid=(batch, heads, width // columns, chunks),
    grid_names=("b", "n", "h", "c"),
    num_threads=groups,
    thread_name="g",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs)


def _gradient_choices(parts: int, padded: int, width: int, keys: bool) -> Iterator[tuple[int, int]]:
  """(Tiles held at once, buffers for results) with which `_stream_gradients` fits shared memory, the best first."""
  for slots, buffers in ((2, 2), (2, 1), (1, 1)) if keys else ((2, 1), (1, 1)):
    tiles = 2 * slots * parts * padded * width * 2
    landmarks = 2 * parts * padded * width * 2
    weights = 2 * parts * padded * padded * 2
    out = buffers * padded * min(width, _OUT_COLUMNS) * 2 * parts
    vectors = (slots + 2 * keys) * padded * 4
    some = 3072  # for barriers and the compiler's own
    if tiles + landmarks + weights + out + vectors + some <= mosaic.SHARED_MEMORY:
      yield slots, buffers


# ------------------------------------------------------------------------------------------- the pseudo-inverse


@functools.partial(jax.custom_vjp, nondiff_argnames=("iterations", "parts"))
def _inverse(a_BNMM, z_BNMM, iterations, parts):
  """Z after so many steps of `reference.pseudo_inverse` from the given one: (B, N, M, M), float32, M to 64.

  XLA launches two kernels a product; here a block does all steps of a matrix, and no product leaves it. Numbers are
  sums of `parts` bfloat16 numbers: 2 keep 16 bits, 3 all of float32.
  """
  return _stream_inverse(a_BNMM, z_BNMM, iterations, parts, keep=False)[0]


def _inverse_forward(a_BNMM, z_BNMM, iterations, parts):
  last_BNMM, starts_IBNMM = _stream_inverse(a_BNMM, z_BNMM, iterations, parts, keep=True)
  return last_BNMM, (a_BNMM, starts_IBNMM)


def _inverse_backward(iterations, parts, residuals, dlast_BNMM):
  return _stream_inverse_gradients(*residuals, dlast_BNMM, parts)


_inverse.defvjp(_inverse_forward, _inverse_backward)


def _stream_inverse(a_BNMM, z_BNMM, iterations, parts, keep):
  """The last Z (B, N, M, M) and, to `keep`, the one before every step (I, B, N, M, M). A block has one matrix.

  Rows and columns of zeros, up to 64, stay zeros.
  """
  batch, heads, landmarks, _ = a_BNMM.shape
  a_GSS, z_GSS = (_whole_matrices(x) for x in (a_BNMM, z_BNMM))
  matrices = len(a_GSS)

  def nystrom_inverse(a_g, z_g, zeros_g, *refs, matrices_s):
    last_g = refs[0]
    m = lax.axis_index("m")
    _store_parts(matrices_s.at[0, 0], _load(a_g.at[m]))

    def step(i, z):
      zero = zeros_g[i]
      a_s, z_s, x_s, p_s = (matrices_s.at[zero, k] for k in range(4))
      product = functools.partial(_product, zero=_keeping_loops(zero, parts))
      if keep:
        refs[1][i, m] = z
      _store_parts(z_s, z)
      plgpu.commit_smem()
      _polynomial(product, a_s, z_s, x_s, p_s, p_s)
      return 3.25 * z - 0.25 * product(z_s, p_s)

    last_g[m] = lax.fori_loop(0, iterations, step, _load(z_g.at[m]))

  matrix = jax.ShapeDtypeStruct(a_GSS.shape, jnp.float32)
  starts = [jax.ShapeDtypeStruct((iterations, *a_GSS.shape), jnp.float32)] if keep else []
  last_GSS, *starts_IGSS = mosaic.kernel(
    nystrom_inverse,
    out_type=(matrix, *starts),
    scratch_types=dict(matrices_s=_matrices(4, parts)),
    grid=(matrices,),
    grid_names=("m",),
    num_threads=1,
    thread_name="g",
  )(a_GSS, z_GSS, _hidden_zeros(iterations))
  own = slice(landmarks)
  last_BNMM = last_GSS.reshape(batch, heads, *last_GSS.shape[1:])[..., own, own]
  return last_BNMM, starts_IGSS[0] if keep else None


def _stream_inverse_gradients(a_BNMM, starts_IGSS, dlast_BNMM, parts):
  """Gradients by A and the first Z, both (B, N, M, M), of what `_stream_inverse` makes of them.

  A step is Z' = ¼ (13 Z − ZV) with X = AZ, W = 7 X − XX and V = 15 X − XW. Back through it with G = ¼ dZ':
    dZ = 13 G − G Vᵀ;  dV = −Zᵀ G;  dX = 15 dV − dV Wᵀ;  dW = −Xᵀ dV;  dX += 7 dW − dW Xᵀ − Xᵀ dW;
    dA += dX Zᵀ;  dZ += Aᵀ dX.
  """
  batch, heads, landmarks, _ = a_BNMM.shape
  iterations = len(starts_IGSS)
  a_GSS, dlast_GSS = (_whole_matrices(x) for x in (a_BNMM, dlast_BNMM))
  matrices = len(a_GSS)

  def nystrom_inverse_gradient(a_g, starts_g, dlast_g, zeros_g, da_g, dz_g, matrices_s, da_s):
    m = lax.axis_index("m")
    _store_parts(matrices_s.at[0, 0], _load(a_g.at[m]))
    # The sum is not kept in registers: those are for the other four matrices.
    da_s[...] = plgpu.layout_cast(jnp.zeros((_BLOCK, _BLOCK), jnp.float32), _LAYOUT)

    def step(i, dz):
      def addresses(stage):
        zero = zeros_g[i * _STAGES + stage]
        return [matrices_s.at[zero, k] for k in range(6)]

      looped = _keeping_loops(zeros_g[i * _STAGES + _STAGES - 1], parts)
      product = functools.partial(_product, zero=looped)

      a_s, z_s, x_s, w_s, v_s, g_s = addresses(0)
      _store_parts(z_s, _load(starts_g.at[iterations - 1 - i, m]))
      _store_parts(g_s, 0.25 * dz)
      plgpu.commit_smem()
      _polynomial(product, a_s, z_s, x_s, w_s, v_s)
      a_s, z_s, x_s, w_s, v_s, g_s = addresses(1)
      dz = 3.25 * dz - product(g_s, v_s, transpose_b=True)
      dv = -product(z_s, g_s, transpose_a=True)
      dv_s = v_s
      _store_parts(dv_s, dv)
      plgpu.commit_smem()
      dx = 15 * dv - product(dv_s, w_s, transpose_b=True)
      dw = -product(x_s, dv_s, transpose_a=True)
      a_s, z_s, x_s, dw_s, dx_s, g_s = addresses(2)  # over w and v, which are not read again
      _store_parts(dw_s, dw)
      plgpu.commit_smem()

      def both(accumulator):
        _accumulate(accumulator, dw_s, x_s, transpose_b=True, zero=looped)
        _accumulate(accumulator, x_s, dw_s, transpose_a=True, zero=looped)
        return accumulator[...]

      dx = dx + 7 * dw - pl.run_scoped(both, plgpu.ACC((_BLOCK, _BLOCK), jnp.float32))
      a_s, z_s, x_s, dw_s, dx_s, g_s = addresses(3)
      _store_parts(dx_s, dx)
      plgpu.commit_smem()
      da_s[...] = plgpu.load(da_s, layout=_LAYOUT) + product(dx_s, z_s, transpose_b=True)
      return dz + product(a_s, dx_s, transpose_a=True)

    dz_g[m] = lax.fori_loop(0, iterations, step, _load(dlast_g.at[m]))
    da_g[m] = plgpu.load(da_s, layout=_LAYOUT)

  matrix = jax.ShapeDtypeStruct(a_GSS.shape, jnp.float32)
  grads = mosaic.kernel(
    nystrom_inverse_gradient,
    out_type=(matrix, matrix),
    scratch_types=dict(
      matrices_s=_matrices(6, parts),
      da_s=plgpu.SMEM((_BLOCK, _BLOCK), jnp.float32, transforms=mosaic.swizzled(_BLOCK, jnp.float32)),
    ),
    grid=(matrices,),
    grid_names=("m",),
    num_threads=1,
    thread_name="g",
  )(a_GSS, starts_IGSS, dlast_GSS, _hidden_zeros(iterations))
  own = slice(landmarks)
  return tuple(x.reshape(batch, heads, _BLOCK, _BLOCK)[..., own, own] for x in grads)


def _polynomial(product, a_s, z_s, x_s, w_s, v_s):
  """X = AZ, W = 7 X − XX and V = 15 X − XW to shared memory; v_s may be w_s."""
  x = product(a_s, z_s)
  _store_parts(x_s, x)
  plgpu.commit_smem()
  _store_parts(w_s, 7 * x - product(x_s, x_s))
  plgpu.commit_smem()
  _store_parts(v_s, 15 * x - product(x_s, w_s))
  plgpu.commit_smem()


def _hidden_zeros(iterations):
  """Zeros for the purpose of `_hidden_zero`, in device memory.

  What is computed from a block's number instead depends on how many blocks there are, and with it the machine code: it
  needed too many registers for some numbers of matrices.
  """
  return jnp.zeros(iterations * _STAGES, jnp.int32)


def _keeping_loops(zero, parts):
  """For `_accumulate`: with two parts the assembler serialises products in loops that it unrolls, with three others."""
  return zero if parts == 2 else 0


def _load(x_g):
  """From device memory to registers, not by way of shared memory."""
  return plgpu.load(x_g, layout=_LAYOUT, optimized=False)


def _matrices(count, parts):
  return _shared((1, count, parts, _BLOCK, _BLOCK), mosaic.swizzled(_BLOCK, jnp.bfloat16))


def _whole_matrices(x_BNMM):
  """(B·N, 64, 64), with zeros."""
  x_BNSS = mosaic.pad_axis(mosaic.pad_axis(x_BNMM, 2, _BLOCK), 3, _BLOCK)
  return x_BNSS.reshape(-1, _BLOCK, _BLOCK)


# ------------------------------------------------------------------------------------------- within a kernel


class _Tile(NamedTuple):
  """References to what `_stream_gradients` needs for one tile of tokens; the first axis is the parts' of each."""

  x_s: Any
  d_s: Any
  y_s: Any
  e_s: Any
  ds_s: Any
  weights_s: Any


def _shared(shape, transforms):
  return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _accumulate(accumulator, a_s, b_s, transpose_a=False, transpose_b=False, zero=0):
  """accumulator += a · b for references of all parts of a and b; products below the last part's size are left out.

  `zero` may be 0 in disguise, see `_hidden_zero`, which keeps the loop below a loop.
  """
  parts = a_s.shape[0]

  def add(i, j):
    a, b = a_s.at[i], b_s.at[j]
    mosaic.wgmma(accumulator, a.T if transpose_a else a, b.T if transpose_b else b)

  if parts == 1:
    add(0, 0)
  else:  # a loop, as the addresses of three products in a row would be kept in registers

    @pl.loop(0, parts * (parts + 1) // 2 + zero)
    def _(k):  # all i and j whose sum is below the number of parts
      if parts == 2:
        add(k // 2, lax.rem(k, 2))
      else:
        add(k // 3 + k // 5, k - 3 * (k // 3) - 2 * (k // 5))


def _product(a_s, b_s, transpose_a=False, transpose_b=False, zero=0):
  """a · b as of `_accumulate`, float32. Complete when it returns: the operands may be overwritten."""

  def product(accumulator):
    _accumulate(accumulator, a_s, b_s, transpose_a, transpose_b, zero)
    return accumulator[...]

  rows, columns = a_s.shape[2 if transpose_a else 1], b_s.shape[1 if transpose_b else 2]
  return pl.run_scoped(product, plgpu.ACC((rows, columns), jnp.float32))


def _down(column, like):
  """A value for every row, repeated along the columns."""
  return lax.broadcast_in_dim(column, like.shape, [0])


def _across(row, like):
  """A value for every column, repeated along the rows."""
  return lax.broadcast_in_dim(row, like.shape, [1])


def _softmax_of_landmarks(scores, keep, landmarks):
  """Unnormalised weights of the scores' rows, their maxima and sums; rows that `keep` (0 or 1) drops count as zeros."""
  if keep is not None:
    scores = scores * _down(keep, scores)
  if landmarks < scores.shape[1]:
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=_LAYOUT)
    scores = jnp.where(column < landmarks, scores, _LOWEST)
  top = scores.max(axis=1)
  weights = jnp.exp2((scores - _down(top, scores)) * mosaic.LOG2_E)
  return weights, weights.sum(axis=1)


def _store_parts(x_s, x):
  """x to its parts in shared memory."""
  for part in range(x_s.shape[0]):
    high = x.astype(jnp.bfloat16)
    x_s.at[part][...] = high
    if part + 1 < x_s.shape[0]:
      x = x - high.astype(jnp.float32)


def _send(x, x_s, x_g, pending=0):
  """x to device memory by way of shared memory; all copies but the last `pending` may still be reading that memory."""
  plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
  x_s[...] = x.astype(x_s.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(x_s, x_g)


def _hidden_zero(i, count):
  """0 for every step i below `count`, which the compiler does not see.

  As an index it makes an address look new in every step. The addresses of all products' operands would otherwise be
  computed before the loop and be kept in more registers than the numbers themselves.
  """
  return lax.div(i, count)


def _first(load, slots, count):
  """Loads the first tiles, as many as there are slots."""
  for i in range(slots):
    pl.when(i < count)(functools.partial(load, i))


def _meet(barrier, groups):
  """All warpgroups wait for each other."""
  if groups > 1:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


# ------------------------------------------------------------------------------------------- around the kernels


def _parts(x_BLNK: jax.Array) -> jax.Array:
  """(P, B, L, X): x itself, or where it is float32 two bfloat16 arrays whose sum it nearly is."""
  x_BLX = x_BLNK.reshape(*x_BLNK.shape[:2], -1)
  if x_BLX.dtype == jnp.bfloat16:
    return x_BLX[None]
  # XLA may drop a conversion to bfloat16 and back, which would make the low part zero, but not this rounding.
  high_BLX = lax.reduce_precision(x_BLX, exponent_bits=8, mantissa_bits=7)
  return jnp.stack([high_BLX, x_BLX - high_BLX]).astype(jnp.bfloat16)


def _landmark_parts(x_BMNK: jax.Array) -> jax.Array:
  """(P, B, S, X) as of `_parts`, with landmarks of zeros up to a multiple of 64."""
  return _parts(mosaic.pad_axis(x_BMNK, 1, mosaic.round_up(x_BMNK.shape[1], _BLOCK)))


def _padded_width(width: int) -> int:
  """A width of heads that the kernels take: a multiple of 16 up to 64, or 128."""
  return mosaic.round_up(width, 16) if width <= _OUT_COLUMNS else MAX_WIDTH


def _padded_keep(keep_BL, batch, length, rows, needed):
  """`keep_BL` with zeros up to a multiple of `rows`; ones where there is none but one is needed."""
  if keep_BL is None:
    if not needed:
      return None
    keep_BL = jnp.ones((batch, length), jnp.float32)
  return mosaic.pad_axis(keep_BL, 1, mosaic.round_up(length, rows))


def _chunks(tiles: int, sequences: int) -> tuple[int, int]:
  """(tiles of a chunk, chunks) for a grid that fills the GPU; the last chunk may have fewer tiles, but has one."""
  wanted = pl.cdiv(_BLOCKS_PER_MULTIPROCESSOR * mosaic.MULTIPROCESSORS, sequences)
  steps = pl.cdiv(tiles, wanted)
  return steps, pl.cdiv(tiles, steps)


def _sum_of_chunks(x_BNCSK, like_BMNK):
  """(B, M, N, K), summed in float32, in the dtype of `like_BMNK`."""
  return x_BNCSK.sum(2)[:, :, : like_BMNK.shape[1]].swapaxes(1, 2).astype(like_BMNK.dtype)
