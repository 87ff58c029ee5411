"""The folded form (see `xla`) with its two products, and the unfolding, as Mosaic GPU kernels.

The first kernel folds x to half of it along L and multiplies by the cosines and by the sines of D; where it cannot (see
`_folds`) XLA folds, along both axes, and it multiplies only. The results, P and Q, are half of x together. They are
written transposed, (E, N), so that every operand of every product is contiguous along the axis that is summed: TF32
cannot have it otherwise. The second kernel multiplies by the matrices of L and writes all of y. It keeps four sums
apart, those of P and of Q over the even and over the odd tokens: rows k and k + L/2 differ in the sign of the odd
tokens, columns e and D − e in the sign of Q. The latter columns stand in reverse order; a product with a permutation
matrix turns them.

Axes beside B, L and D: N, the tokens 0 … L/2 of the folded x, the even ones first; C, their parity, and M, their
number among those of one parity; E, the frequencies 0 … D/2 of the width; K, the frequencies of the tokens that are
computed, the first half of them if L is a multiple of 16.

A bfloat16 x has bfloat16 operands. A float32 x has TF32 operands (11 significant bits), which are rounded, where the
tensor cores by themselves would cut them off. Sums are float32.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch, mosaic
from kernels.fft_mixing import xla

_LONGEST = 8192  # tokens in one product; the matrices take 134 MB of memory then
_LONGEST_BY_DEFAULT = 2048  # beyond, such a product reads more from the L2 cache than the Fourier transform from memory
_COMPUTING = 2  # warpgroups; one more fetches
_ROWS = _COMPUTING * mosaic.WARPGROUP_ROWS  # of a block's tile
_SWIZZLE = 128  # bytes of a row that a step of a product reads
_COLUMNS = 128  # of a tile of the first kernel
_DIRECT = 64  # columns at most that a block of the second kernel writes as they are, and as many mirrored
_CHUNK = 64  # rows and columns of x that a block of the first kernel folds at once
_EXTRA = 8  # rows in which it looks for one more
_SHARING = 4  # blocks at most that fetch a matrix together: so few reads from the L2 cache take no longer than the rest
_FETCHING_REGISTERS, _COMPUTING_REGISTERS = 40, 232  # per thread: 128 · 40 + 256 · 232 fit into 65536


def refuse(x_BLD: jax.Array, by_default: bool = False) -> str | None:
  """Why the kernels cannot serve x, or with `by_default` why they are not the best choice; None if they can."""
  from kernels.fft_mixing import two_level  # which imports this module

  _, length, width = x_BLD.shape
  if by_default and x_BLD.dtype == jnp.float32:
    return "in float32 its products are TF32, less accurate than the Fourier transform; ask for it by name"
  if width % 32 or width < 64:
    return f"the width must be a multiple of 32 from 64 on, as halves of it are cut into tiles, and it is {width}"
  if length < 3:
    return f"there must be at least 3 tokens, and there are {length}"
  if levels(length, width):
    return None
  if by_default and length > _LONGEST_BY_DEFAULT:
    return (
      f"there are {length} tokens, not {two_level.LENGTHS} for two levels, and beyond {_LONGEST_BY_DEFAULT} the "
      "Fourier transform is predicted to be faster than one product over all tokens"
    )
  if length > _LONGEST:
    return (
      f"there are {length} tokens, not {two_level.LENGTHS} for two levels, and beyond {_LONGEST} the matrices for one "
      "product over all tokens grow too large"
    )
  return None


def levels(length: int, width: int) -> tuple[int, int] | None:
  """The factors of the two-level form where it serves, else None."""
  from kernels.fft_mixing import two_level  # which imports this module

  return two_level.factors(length) if width % 128 == 0 else None


def mixing(x_BLD: jax.Array) -> jax.Array:
  """Re(FFT over L and D) of bfloat16 or (by TF32) float32; the result in x's dtype."""
  return dispatch.per_device(_mixing, (True,))(x_BLD)


def halves(length: int) -> int:
  """How many halves the rows of y have that one sum over the tokens serves; their tiles begin at multiples of 8."""
  return 2 if length % 16 == 0 else 1


@xla.self_adjoint
def _mixing(x_BLD):
  from kernels.fft_mixing import two_level  # which imports this module

  batch, length, width = x_BLD.shape
  if levels(length, width):
    return two_level.mixing(x_BLD)
  parts = _folded_here(x_BLD) if _folds(x_BLD) else _folded_by_xla(x_BLD)
  return _second_product(*parts, width).reshape(batch, -1, width)[:, :length]


def _folded_by_xla(x_BLD):
  """The arguments of `_second_product` for any x: (matrix of L, (B, E, C, N) after the first product, steps) twice."""
  _, length, width = x_BLD.shape
  depth, count, parts = _depth(x_BLD.dtype), halves(length), []
  for wave, part_BND in zip((jnp.cos, jnp.sin), xla.fold(x_BLD.astype(jnp.float32)), strict=True):
    first = int(wave is jnp.sin)
    by_width_ED = _matrix(wave, width, width // 2 + 1, part_BND.shape[2])
    by_length_KN = _matrix(wave, length, length // count, part_BND.shape[1])
    steps = [pl.cdiv(piece.shape[1], depth) for piece in _by_parity(by_length_KN, first, count)]
    by_length_KN, part_BND = (_evens_first(x, first, count, depth) for x in (by_length_KN, part_BND))
    by_width_ED, by_length_KN, part_BND = (_operand(x, x_BLD.dtype) for x in (by_width_ED, by_length_KN, part_BND))
    product_BEN = _first_product(by_width_ED, part_BND)
    parts.append((by_length_KN, product_BEN.reshape(*product_BEN.shape[:2], count, -1), steps))
  return parts


def _folded_here(x_BLD):
  """The same where the first kernel folds."""
  matrices = [_length_matrix(wave, x_BLD.shape[1]) for wave in (np.cos, np.sin)]
  return [
    (jnp.asarray(matrix), p, steps) for (matrix, steps), p in zip(matrices, _fold_and_multiply(x_BLD), strict=True)
  ]


def _matrix(wave, period, rows, columns):
  """wave(2πjk / period) for j < rows; and for k from 0 if wave is the cosine, from 1 if it is the sine."""
  j, k = jnp.arange(rows), jnp.arange(columns) + (wave is jnp.sin)
  return wave(2 * np.pi / period * (jnp.outer(j, k) % period).astype(jnp.float32))


def _by_parity(x, first, count):
  """Pieces along axis 1, where entry 0 has index `first`: if count is 2, even indices and odd ones; else x."""
  return [x[:, (parity - first) % count :: count] for parity in range(count)]


def _evens_first(x, first, count, depth):
  """The pieces of `_by_parity` one after the other, with zeros up to the same multiple of `depth`."""
  pieces = _by_parity(x, first, count)
  longest = mosaic.round_up(max(piece.shape[1] for piece in pieces), depth)
  return jnp.concatenate([mosaic.pad_axis(piece, 1, longest) for piece in pieces], axis=1)


def _depth(dtype):
  """Columns of both operands that a step reads."""
  return _SWIZZLE // jnp.dtype(dtype).itemsize


def _operand(x, dtype):
  """x rounded to what the tensor cores read, with zeros up to whole tiles."""
  x = x.astype(dtype) if dtype == jnp.bfloat16 else lax.reduce_precision(x, 8, 10)
  x = mosaic.pad_axis(x, x.ndim - 2, mosaic.round_up(x.shape[-2], 8))
  return mosaic.pad_axis(x, x.ndim - 1, mosaic.round_up(x.shape[-1], _depth(dtype)))


def rounded(x: jax.Array, dtype) -> jax.Array:
  """x in `dtype`, a float32 one rounded to TF32: Dekker's split into 11 bits and the rest, without the rest."""
  if dtype == jnp.bfloat16:
    return x.astype(dtype)
  scaled = x * (2.0**13 + 1)
  return scaled - (scaled - x)


def _ring(steps, slots, fetch, full, empty):
  """Fetches all steps, each as soon as its slot is free; run by the warpgroup that does nothing else."""

  def step(i, carry):
    slot = lax.rem(i, slots)

    @pl.when(i >= slots)
    def _():
      plgpu.barrier_wait(empty.at[slot])

    fetch(i, slot, full.at[slot])
    return carry

  lax.fori_loop(0, steps, step, None)


def _accumulate(accumulator, a_s, b, start, stop, steps, full, empty):
  """accumulator += a bᵀ over the steps from `start` to `stop`, of `steps` that are fetched in all.

  `b(step, slot)` is the operand, a_s[slot] the other.
  """
  slots = a_s.shape[0]
  rows = pl.ds(lax.axis_index("warpgroup") * mosaic.WARPGROUP_ROWS, mosaic.WARPGROUP_ROWS)

  def step(i, carry):
    slot = lax.rem(i, slots)
    plgpu.barrier_wait(full.at[slot])
    mosaic.wgmma(accumulator, a_s.at[slot, rows], b(i, slot))
    plgpu.wgmma_wait(1)

    # A slot that nothing more is fetched into is not reported: every completion of a barrier must be waited for.
    @pl.when((i > start) & (i - 1 + slots < steps))
    def _():
      plgpu.barrier_arrive(empty.at[lax.rem(i + slots - 1, slots)])

    return carry

  lax.fori_loop(start, stop, step, None)
  plgpu.wgmma_wait(0)
  last = jnp.int32(stop - 1)
  pl.when(last + slots < steps)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(last, slots)]))


def _roles(fetch, compute):
  """The last warpgroup fetches, the others compute."""

  @pl.when(lax.axis_index("warpgroup") == _COMPUTING)
  def _():
    plgpu.set_max_registers(_FETCHING_REGISTERS, action="decrease")
    fetch()

  @pl.when(lax.axis_index("warpgroup") < _COMPUTING)
  def _():
    plgpu.set_max_registers(_COMPUTING_REGISTERS, action="increase")
    compute()


def _cluster(count):
  """How many blocks, neighbours of `count` that read the same matrix, fetch it together."""
  return max(n for n in (1, 2, _SHARING) if count % n == 0)


def _launch(blocks, shared=None):
  """The axes of a kernel: blocks, in clusters of `shared` where that is given; computing and fetching warpgroups."""
  cluster = {} if shared is None else dict(cluster=(shared,), cluster_names=("cluster",))
  return dict(grid=(blocks,), grid_names=("block",), num_threads=_COMPUTING + 1, thread_name="warpgroup", **cluster)


def _read(slots):
  """Barriers: the computing warpgroups of all blocks of a cluster have read a slot.

  A block's share of a matrix is copied into all blocks at once, so none may be early. What is copied into a block has
  arrived when its own warpgroups have waited for all steps, and every arrival at its barriers is waited for by its
  fetching warpgroup: no block ends while another one still reaches into its memory.
  """
  return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=_COMPUTING, num_barriers=slots)


def _ring_scratch(columns, slots, dtype):
  """Both operands' slots, and the barriers: operands have arrived, and the computing warpgroups have read them."""
  depth = _depth(dtype)
  transforms = mosaic.swizzled(depth, dtype)
  return [
    plgpu.SMEM((slots, _ROWS, depth), dtype, transforms=transforms),
    plgpu.SMEM((slots, columns, depth), dtype, transforms=transforms),
    plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    plgpu.Barrier(num_arrivals=_COMPUTING, num_barriers=slots),
  ]


def _block(across, down):
  """(sample, column, row) of this block's tile; the tiles of a column, which read the same data, are neighbours."""
  block = lax.axis_index("block")
  return lax.div(block, across * down), lax.rem(lax.div(block, down), across), lax.rem(block, down)


def _own_rows(row):
  """Of a tile that begins at `row`, the computing warpgroup's."""
  return pl.ds(row + lax.axis_index("warpgroup") * mosaic.WARPGROUP_ROWS, mosaic.WARPGROUP_ROWS)


def _first_product(a_ED, b_BND):
  """a bᵀ for every sample, (B, E, N)."""
  (height, total_depth), (batch, width, _), dtype = a_ED.shape, b_BND.shape, b_BND.dtype
  depth, slots = _depth(dtype), 4
  across, down, steps = pl.cdiv(width, _COLUMNS), pl.cdiv(height, _ROWS), total_depth // depth

  def fft_mixing_by_width(a_g, b_g, out_g, a_s, b_s, full, empty, out_s):
    b, column, row = _block(across, down)
    row, column = row * _ROWS, column * _COLUMNS

    def fetch(i, slot, barrier):
      deep = pl.ds(i * depth, depth)
      plgpu.copy_gmem_to_smem(a_g.at[pl.ds(row, _ROWS), deep], a_s.at[slot], barrier)
      plgpu.copy_gmem_to_smem(b_g.at[b, pl.ds(column, _COLUMNS), deep], b_s.at[slot], barrier)

    def compute():
      def product(accumulator):
        _accumulate(accumulator, a_s, lambda _, slot: b_s.at[slot].T, 0, steps, steps, full, empty)
        return accumulator[...]

      own_s = out_s.at[lax.axis_index("warpgroup")]
      own_s[...] = rounded(pl.run_scoped(product, plgpu.ACC((mosaic.WARPGROUP_ROWS, _COLUMNS))), dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(own_s, out_g.at[b, _own_rows(row), pl.ds(column, _COLUMNS)])
      plgpu.wait_smem_to_gmem(0)

    _roles(lambda: _ring(steps, slots, fetch, full, empty), compute)

  return mosaic.kernel(
    fft_mixing_by_width,
    out_type=jax.ShapeDtypeStruct((batch, height, width), dtype),
    **_launch(batch * across * down),
    scratch_types=[
      *_ring_scratch(_COLUMNS, slots, dtype),
      plgpu.SMEM((_COMPUTING, mosaic.WARPGROUP_ROWS, _COLUMNS), dtype, transforms=mosaic.swizzled(_COLUMNS, dtype)),
    ],
  )(a_ED, b_BND)


def _folds(x_BLD) -> bool:
  """Whether `_fold_and_multiply` can serve: its operands and what it folds must fit into shared memory."""
  _, length, width = x_BLD.shape
  return x_BLD.dtype == jnp.bfloat16 and length % 16 == 0 and width % _CHUNK == 0 and _plan(width) is not None


class _Plan(NamedTuple):
  """How a block of `_fold_and_multiply` works.

  Attributes:
    parities: of e, 2 if columns d and d + D/2 are folded, else 1.
    own: how many of them a block takes.
    chunks: of 64 columns, of one folded row.
    slots: of the matrix.
  """

  parities: int
  own: int
  chunks: int
  slots: int


def _plan(width: int) -> _Plan | None:
  """For a bfloat16 x of that width; None if none fits into shared memory."""
  parities = 2 if width % (2 * _CHUNK) == 0 else 1
  chunks = pl.cdiv(width // parities, _CHUNK)
  for own, slots in itertools.product(range(parities, 0, -1), (4, 3, 2)):
    tiles = 2 * own * chunks + 2 * slots + _COMPUTING  # folded x, matrix, result
    tiles += _COMPUTING * parities + 1  # mirror images, and the permutation
    if 2 * _CHUNK * (tiles * _CHUNK + _COMPUTING * parities * _EXTRA) + 1024 <= mosaic.SHARED_MEMORY:
      return _Plan(parities, own, chunks, slots)
  return None


def _fold_and_multiply(x_BLD):
  """P and Q, x folded along L and multiplied by the cosines and by the sines of D: two arrays (B, E, C, M).

  Tokens n = 2m + c, for m = 0 … L/4 (rounded up). Those of one parity c are mirrored among themselves, n to L − n: for
  c = 0, m to L/2 − m; for c = 1, m to L/2 − 1 − m. A block takes 64 of them and the 64 rows in which their mirror
  images lie in reverse order; a product with a permutation turns them. For c = 0 these rows begin one too early, as
  copies begin at multiples of 8, and the mirror image of the first token is read separately. That of token 0 is not
  added to it; L/2 is its own, so the sum is 2 x[L/2].

  Columns: the even frequencies e need x[d] + x[d + D/2] only, the odd ones x[d] − x[d + D/2], each with half of the
  matrix; so nothing is reversed there, and no column stands alone. Where D/2 is no multiple of 64 they are not folded.

  The sums and differences take the place of x in shared memory. Then one warpgroup multiplies by cosines and writes P,
  the other by sines and writes Q. Rows of E from D/2 + 1 on are undefined.
  """
  batch, length, width = x_BLD.shape
  parities, own, chunks, slots = _plan(width)
  half, groups = length // 2, parities // own
  evens, odds = (pl.cdiv(n, _CHUNK) for n in (length // 4 + 1, length // 4))  # tiles of tokens of each parity
  tops = [
    pl.cdiv(n, _CHUNK) for n in ((width // parities // 2 + 1, width // 4) if parities == 2 else (width // 2 + 1,))
  ]
  shared = _cluster(batch * (evens + odds))
  matrix, turns = _width_matrix(width, parities, tuple(tops)), _turns(min(_CHUNK, half))

  def fft_mixing_by_width(x_g, matrix_g, turns_g, p_g, q_g, *scratch):
    x_s, window_s, last_s, turn_s, matrix_s, out_s, here, x_here, window_here, window_read, full, empty, folded = (
      scratch
    )
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    group, block = (lax.rem(block, groups), lax.div(block, groups)) if groups > 1 else (0, block)
    block = block * shared + lax.axis_index("cluster")
    tile, b = lax.rem(block, evens + odds), lax.div(block, evens + odds)
    c = jnp.int32(tile >= evens)
    m = (tile - c * evens) * _CHUNK
    # With all parities of e in one block, its tiles of rows are those of both; else those of its group.
    tiles = sum(tops) if groups == 1 else jnp.where(group == 0, tops[0], tops[1])
    steps = tiles * chunks

    def fetch():
      plgpu.copy_gmem_to_smem(turns_g.at[c], turn_s, here)
      for j in range(chunks):
        if j >= _COMPUTING:
          plgpu.barrier_wait(window_read.at[j % _COMPUTING])
        for h in range(parities):
          columns = pl.ds(h * (width // 2) + j * _CHUNK, _CHUNK)
          plgpu.copy_gmem_to_smem(x_g.at[b, pl.ds(m, _CHUNK), c, columns], x_s.at[h, j], x_here.at[j])
          rows = pl.ds(half - m - min(_CHUNK, half), _CHUNK)
          slot = j % _COMPUTING
          plgpu.copy_gmem_to_smem(x_g.at[b, rows, c, columns], window_s.at[slot, h], window_here.at[slot])
          rows = pl.ds(jnp.minimum(half - m, half - _EXTRA), _EXTRA)  # for m = 0 nothing of it is used
          plgpu.copy_gmem_to_smem(x_g.at[b, rows, c, columns], last_s.at[slot, h], window_here.at[slot])

      def fetch_matrix(i, slot, barrier):
        tile = lax.div(i, chunks) + group * tops[0]
        source = matrix_g.at[pl.ds(tile * _ROWS, _ROWS), pl.ds(lax.rem(i, chunks) * _CHUNK, _CHUNK)]
        plgpu.copy_gmem_to_smem(source, matrix_s.at[slot], barrier, collective_axes="cluster")

      _ring(steps, slots, fetch_matrix, full, empty)

    def fold(j):
      """Chunk j, of 64 columns d; values are (D, M)."""

      def turned(*accumulators):
        for h, accumulator in enumerate(accumulators):
          mosaic.wgmma(accumulator, window_s.at[warpgroup, h].T, turn_s)
        plgpu.wgmma_wait(0)
        return [accumulator[...] for accumulator in accumulators]

      def widened(last):
        """The mirror image of the first token in its place, zeros in all others."""
        first = plgpu.broadcasted_iota(jnp.int32, last.shape, 1, layout=plgpu.Layout.WGMMA) + c == 0
        zeros = plgpu.layout_cast(jnp.zeros((_CHUNK, _CHUNK - _EXTRA), jnp.float32), plgpu.Layout.WGMMA)
        return jnp.concatenate([jnp.where(first & (m > 0), last.astype(jnp.float32), 0.0), zeros], axis=1)

      plgpu.barrier_wait(window_here.at[warpgroup])
      mirrored = pl.run_scoped(turned, *[plgpu.ACC((_CHUNK, _CHUNK))] * parities)
      lasts = [plgpu.load(last_s.at[warpgroup, h].T, layout=plgpu.Layout.WGMMA) for h in range(parities)]
      mirrored = [turned + widened(last) for turned, last in zip(mirrored, lasts, strict=True)]
      plgpu.commit_smem()  # what is read above may now be copied into
      pl.when(j + _COMPUTING < chunks)(lambda: plgpu.barrier_arrive(window_read.at[warpgroup]))
      plgpu.barrier_wait(x_here.at[j])
      x = [plgpu.load(x_s.at[h, j].T, layout=plgpu.Layout.WGMMA).astype(jnp.float32) for h in range(parities)]
      for odd in range(2):
        values = [a - b if odd else a + b for a, b in zip(x, mirrored, strict=True)]
        for parity in range(own):
          value = values[0]
          if parities == 2:
            value += values[1] * (1.0 - 2.0 * group if groups > 1 else 1.0 - 2.0 * parity)
          x_s.at[odd * own + parity, j].T[...] = value.astype(x_BLD.dtype)

    def compute():
      plgpu.barrier_wait(here)
      for j in range(0, chunks, _COMPUTING):
        pl.when(warpgroup + j < chunks)(functools.partial(fold, warpgroup + j))
      plgpu.commit_smem()
      plgpu.barrier_arrive(folded)
      plgpu.barrier_wait(folded)

      def tile_of_rows(tile, carry):
        parity = jnp.int32(tile >= tops[0]) if groups == 1 else group

        def product(accumulator):
          def operand(i, slot):
            own_parity = parity if groups == 1 else 0
            return x_s.at[warpgroup * own + own_parity, i - tile * chunks].T

          _accumulate(accumulator, matrix_s, operand, tile * chunks, (tile + 1) * chunks, steps, full, empty)
          return accumulator[...]

        value = pl.run_scoped(product, plgpu.ACC((mosaic.WARPGROUP_ROWS, _CHUNK)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what stood in `out_s` has left
        out_s[warpgroup] = value.astype(x_BLD.dtype)
        plgpu.commit_smem()
        first = (tile - (parity * tops[0] if groups == 1 else 0)) * mosaic.WARPGROUP_ROWS
        index = b, pl.ds(first, mosaic.WARPGROUP_ROWS), 2 * parity + c, pl.ds(m, _CHUNK)
        pl.when(warpgroup == 0)(lambda: plgpu.copy_smem_to_gmem(out_s.at[0], p_g.at[index]))
        pl.when(warpgroup == 1)(lambda: plgpu.copy_smem_to_gmem(out_s.at[1], q_g.at[index]))
        return carry

      lax.fori_loop(0, tiles, tile_of_rows, None)
      plgpu.wait_smem_to_gmem(0)

    _roles(fetch, compute)

  dtype = x_BLD.dtype
  transforms = mosaic.swizzled(_CHUNK, dtype)
  rows = mosaic.round_up(width // parities // 2 + 1, 8)
  out_type = jax.ShapeDtypeStruct((batch, rows, 2 * parities, evens * _CHUNK), dtype)
  products = mosaic.kernel(
    fft_mixing_by_width,
    out_type=(out_type, out_type),
    **_launch(batch * (evens + odds) // shared * groups, shared),
    scratch_types=[
      plgpu.SMEM((2 * own, chunks, _CHUNK, _CHUNK), dtype, transforms=transforms),
      plgpu.SMEM((_COMPUTING, parities, _CHUNK, _CHUNK), dtype, transforms=transforms),
      plgpu.SMEM((_COMPUTING, parities, _EXTRA, _CHUNK), dtype, transforms=transforms),
      plgpu.SMEM((_CHUNK, _CHUNK), dtype, transforms=transforms),
      plgpu.SMEM((slots, _ROWS, _CHUNK), dtype, transforms=transforms),
      plgpu.SMEM((_COMPUTING, mosaic.WARPGROUP_ROWS, _CHUNK), dtype, transforms=transforms),
      plgpu.Barrier(),
      plgpu.Barrier(num_arrivals=parities, num_barriers=chunks),
      plgpu.Barrier(num_arrivals=2 * parities, num_barriers=_COMPUTING),
      plgpu.Barrier(num_barriers=_COMPUTING),
      plgpu.Barrier(num_barriers=slots),
      _read(slots),
      plgpu.Barrier(num_arrivals=_COMPUTING),
    ],
  )(x_BLD.reshape(batch, half, 2, width), jnp.asarray(matrix), jnp.asarray(turns, dtype))
  return [product.reshape(batch, parities * rows, 2, -1) for product in products]


@functools.lru_cache(maxsize=8)
def _width_matrix(width, parities, tops):
  """Cosines and sines of the width for `_fold_and_multiply`: 64 rows of one, then 64 of the other, for every tile."""
  columns = np.arange(mosaic.round_up(width // parities, _CHUNK))
  tiles = []
  for parity, count in enumerate(tops):
    e = parities * np.arange(count * _CHUNK) + parity
    angles = 2 * np.pi / width * (np.outer(e, columns) % width)
    tiles.append(np.stack([wave(angles).reshape(count, _CHUNK, -1) for wave in (np.cos, np.sin)], 1))
  return np.concatenate(tiles).reshape(-1, len(columns)).astype(jnp.bfloat16)


def _turns(top):
  """For both parities of tokens, a matrix whose column m picks from a window of rows the mirror image of token m."""
  turns = np.zeros((2, _CHUNK, _CHUNK), np.float32)
  for c in range(2):
    m = np.arange(1 - c, top)
    turns[c, top - c - m, m] = 1
  return turns


@functools.lru_cache(maxsize=8)
def _length_matrix(wave, length):
  """The matrix of L for the tokens of `_fold_and_multiply`: (K, N), bfloat16; and the steps for either parity.

  The even tokens come first; where one stands twice, or for two that are folded, it counts once.
  """
  last = length // 4
  columns = mosaic.round_up(last + 1, _depth(jnp.bfloat16))
  matrices = []
  for c in range(2):
    m = np.arange(columns)
    n = 2 * m + c
    values = wave(2 * np.pi / length * (np.outer(np.arange(length // 2), n) % length))
    values[:, n > length // 2] = 0
    values[:, n == length // 2] /= 2
    matrices.append(values)
  steps = [pl.cdiv(n, _depth(jnp.bfloat16)) for n in (last + 1 if wave is np.cos else last, last)]
  return np.concatenate(matrices, axis=1).astype(jnp.bfloat16), steps


def _second_product(cosines, sines, width):
  """y, (B, halves, K, D).

  Args:
    cosines, sines: the matrix of L, (K, N); what it multiplies, (B, E, C, N / C), C being the parity of tokens or 1;
      and steps for the even and the odd tokens, or for all of them.
    width: D.
  """
  (cos_KN, p_BECN, p_steps), (sin_KN, q_BECN, q_steps) = cosines, sines
  batch, height, dtype = p_BECN.shape[0], cos_KN.shape[0], p_BECN.dtype
  depth, slots, count = _depth(dtype), 6 if dtype == jnp.bfloat16 else 4, len(p_steps)
  steps = [*p_steps, *q_steps]
  stops = [int(stop) for stop in np.cumsum(steps)]
  direct = math.gcd(width // 2, _DIRECT)  # columns that a block writes as they are, and as many mirrored
  computed = direct + 8  # the mirrored ones are those from 1 to `direct`, and a product has a multiple of 8 columns
  across, down = width // 2 // direct, pl.cdiv(height, _ROWS)
  shared = _cluster(batch * across)
  # Column c of the mirrored tile is that of index direct − c; the depth of a product is a multiple of 32 bytes.
  turn = np.zeros((direct, mosaic.round_up(computed, 32 // dtype.itemsize)), np.float32)
  turn[np.arange(direct), direct - np.arange(direct)] = 1

  def fft_mixing_by_length(cos_g, p_g, sin_g, q_g, turn_g, y_g, a_s, b_s, full, empty, turn_s, here, sum_s, out_s):
    block = lax.axis_index("block")
    row, block = lax.rem(block, down) * _ROWS, lax.div(block, down) * shared + lax.axis_index("cluster")
    b, column = lax.div(block, across), lax.rem(block, across) * direct

    def fetch(i, slot, barrier):
      def copy(a_g, b_g, first, odds):
        parity = jnp.int32(i >= odds)
        deep = i - jnp.where(i >= odds, odds, first)
        a = a_g.at[pl.ds(row, _ROWS), pl.ds(parity * (a_g.shape[1] // count) + deep * depth, depth)]
        b_ = b_g.at[b, pl.ds(column, computed), parity, pl.ds(deep * depth, depth)]
        plgpu.copy_gmem_to_smem(a, a_s.at[slot], barrier, collective_axes="cluster")
        plgpu.copy_gmem_to_smem(b_, b_s.at[slot], barrier)

      sines = stops[count - 1]
      pl.when(i < sines)(lambda: copy(cos_g, p_g, 0, stops[0]))
      pl.when(i >= sines)(lambda: copy(sin_g, q_g, sines, stops[count]))

    def fetch_all():
      plgpu.copy_gmem_to_smem(turn_g, turn_s, here)
      _ring(stops[-1], slots, fetch, full, empty)

    def compute():
      own_sum_s, own_s = (ref.at[lax.axis_index("warpgroup")] for ref in (sum_s, out_s))

      def products(*accumulators):
        for accumulator, start, stop in zip(accumulators, [0, *stops], stops, strict=False):
          _accumulate(accumulator, a_s, lambda _, slot: b_s.at[slot].T, start, stop, stops[-1], full, empty)
        return [accumulator[...] for accumulator in accumulators]

      def turned(accumulator):
        mosaic.wgmma(accumulator, own_sum_s, turn_s.T)
        plgpu.wgmma_wait(0)
        return accumulator[...]

      def write(value, half, mirrored):
        if half:
          plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # what stood there, all but the latest, has left
        own_s[mirrored] = value.astype(dtype)
        plgpu.commit_smem()
        columns = pl.ds(width - column - direct if mirrored else column, direct)
        plgpu.copy_smem_to_gmem(own_s.at[mirrored], y_g.at[b, half, _own_rows(row), columns])

      sums = pl.run_scoped(products, *[plgpu.ACC((mosaic.WARPGROUP_ROWS, computed))] * len(stops))
      plgpu.barrier_wait(here)
      for half in range(count):
        p, q = sums[:count], sums[count:]
        p, q = (x[0] if count == 1 else x[0] - x[1] if half else x[0] + x[1] for x in (p, q))
        write((p - q)[:, :direct], half, 0)
        # Of the last 8 columns the first is needed; beyond D/2 + 1 there may be anything, even NaN.
        last = (p + q)[:, direct:]
        first = plgpu.broadcasted_iota(jnp.int32, last.shape, 1, layout=plgpu.Layout.WGMMA) == 0
        total = [rounded((p + q)[:, :direct], dtype), rounded(jnp.where(first, last, 0.0), dtype)]
        if turn.shape[1] > computed:
          zeros = jnp.zeros((mosaic.WARPGROUP_ROWS, turn.shape[1] - computed), dtype)
          total.append(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
        own_sum_s[...] = jnp.concatenate(total, axis=1)
        plgpu.commit_smem()
        write(pl.run_scoped(turned, plgpu.ACC((mosaic.WARPGROUP_ROWS, direct))), half, 1)
      plgpu.wait_smem_to_gmem(0)

    _roles(fetch_all, compute)

  turn_transforms, out_transforms = (mosaic.swizzled(columns, dtype) for columns in (turn.shape[1], direct))
  return mosaic.kernel(
    fft_mixing_by_length,
    out_type=jax.ShapeDtypeStruct((batch, count, height, width), dtype),
    **_launch(batch * across // shared * down, shared),
    scratch_types=[
      *_ring_scratch(computed, slots, dtype)[:-1],
      _read(slots),
      plgpu.SMEM(turn.shape, dtype, transforms=turn_transforms),
      plgpu.Barrier(),
      plgpu.SMEM((_COMPUTING, mosaic.WARPGROUP_ROWS, turn.shape[1]), dtype, transforms=turn_transforms),
      plgpu.SMEM((_COMPUTING, 2, mosaic.WARPGROUP_ROWS, direct), dtype, transforms=out_transforms),
    ],
  )(cos_KN, p_BECN, sin_KN, q_BECN, jnp.asarray(turn, dtype))
