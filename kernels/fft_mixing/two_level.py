"""Long sequences: the transform over the tokens in two levels (Cooley and Tukey 1965), as Mosaic GPU kernels.

With L = J·M, tokens n = M·j + m and frequencies k = r + J·s, and w = P − iQ from the products with the cosines (P) and
the sines (Q) of the width, of tokens folded as below:

  t[r, m] = Σ_j exp(−2πi r(M·j + m) / L) w[M·j + m]      level 1: for every m a product of size J
  y[r + J·s] = Σ_m exp(−2πi ms / M) t[r, m]              level 2: for every r a product of size M

instead of one product of size L. y is real, so t[r, M − m] is the conjugate of t[r, m]: the residues m = 0 … M/2
suffice, half of the tokens. t is real at m = 0 and at m = M/2, so that level 2 sums exactly M real numbers, the real
parts of 0 … M/2 and the imaginary ones between. Everything in device memory is half as large as x.

Only w's even part under (n, d) → (−n, −d) reaches y, which is why w[−n] is the conjugate of w[n], and why half of the
columns suffices: y[k, D − e] = y[−k, e]. Rows −k are those of residue J − r, with M − 1 − s in place of s (of residue
0, with −s): a second matrix of level 2 computes them in this order. Their columns stand in reverse; a product with a
permutation matrix turns them.

XLA folds x into the halves of the columns that the cosines and the sines of the width see, for the tokens that are
needed. One kernel takes the products with these and level 1, the other level 2. In units of x's size, memory sees 1
read and ½ written, ½ read and ½ written, ½ read and 1 written.

Axes beside B, L and D: E, the frequencies 0 … D/2 of the width; J and R (residues of k), of length J; M and S, of
length M; O, the M real numbers that level 2 sums; K, columns that a product sums; C, the cosines' and the sines'
matrix; P, the parts of a number. A bfloat16 array has one part. For float32 the product along the width is TF32's, and
its result and all that follows have two parts, bfloat16 numbers whose sum it is to 16 bits, and a product of two such
arrays is the sum of three: TF32 operands would have to lie transposed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic
from kernels.fft_mixing import mosaic as direct

LENGTHS = "a multiple of 512 from 2560 to 8192 or of 1024 to 16384 (with a width that is a multiple of 128)"
_ROWS = mosaic.WARPGROUP_ROWS
_DIRECT = 64  # columns that a block of level 2 writes as they are, and as many mirrored
_COMPUTED = _DIRECT + 16  # the mirrored ones are those from 1 to `_DIRECT`, in whole tiles of 16 columns, 32 bytes
_BLOCKS = 256  # at least, where there are samples enough to share matrices in a block: two for every multiprocessor


def factors(length: int) -> tuple[int, int] | None:
  """(J, M) for a number of tokens that is one of `LENGTHS`; None for another."""
  first = 64 if length <= 64 * 128 else 128
  # Copies are of whole tiles, of 8 rows; for fewer tokens one product over all of them is as good.
  return (first, length // first) if length % (8 * first) == 0 and 2560 <= length <= 128 * 128 else None


def mixing(x_BLD: jax.Array) -> jax.Array:
  """Re(FFT over L and D) of bfloat16 or (by TF32) float32, in x's dtype; without a gradient, which is itself.

  L is one of `LENGTHS`, D a multiple of 128.
  """
  batch, length, width = x_BLD.shape
  first, second = factors(length)
  matrices = _width_matrices(width, x_BLD.dtype), _first_matrices(first, second, x_BLD.dtype)
  t_PBROE = _level_1(*matrices, _folded(x_BLD, first, second), first, width // 2 + 16)
  return _level_2(_second_matrices(second, x_BLD.dtype), t_PBROE, width, x_BLD.dtype).reshape(batch, length, width)


def _folded(x_BLD, first, second):
  """What the products with the cosines and the sines of D read, for the residues 0 … M/2: (B, M, J, D), J padded.

  The columns 0 … D/2 of the part of x that is even along both axes, then 1 … D/2 − 1 of the odd one. Rows are gathered,
  as XLA makes one loop of that; of slices and reversals it makes two, and keeps the opposite rows in memory.
  """
  batch, length, width = x_BLD.shape
  half = width // 2
  m, j = (lax.broadcasted_iota(jnp.int32, (second // 2 + 1, first), axis) for axis in range(2))
  n = (m + second * j).reshape(-1)

  def rows(n):
    return x_BLD.at[:, n].get(mode="promise_in_bounds").astype(jnp.float32)

  x_BND, opposite_BND = rows(n), rows(jnp.where(n > 0, length - n, 0))
  even, odd = x_BND + opposite_BND, x_BND - opposite_BND
  columns = (
    even[..., :1],
    even[..., 1:half] + lax.rev(even[..., half + 1 :], (2,)),
    even[..., half : half + 1],
    odd[..., 1:half] - lax.rev(odd[..., half + 1 :], (2,)),
  )
  u_BMJD = _rounded(jnp.concatenate(columns, 2), x_BLD.dtype).reshape(batch, second // 2 + 1, first, width)
  return mosaic.pad_axis(u_BMJD, 2, mosaic.round_up(first, _ROWS))


# ------------------------------------------------------------------------------------------- both levels


def _samples(batch, others):
  """How many samples a block takes: as many as leave `_BLOCKS` blocks, `others` being how many there are of each."""
  return max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or batch // n * others >= _BLOCKS))


def _start(total, slots, fetch):
  """Fetches the first steps; run by every warpgroup, but the first does it."""

  @pl.when(lax.axis_index("warpgroup") == 0)
  def _():
    for i in range(min(total, slots)):
      fetch(i, i)


def _next(i, total, slots, fetch, empty):
  """Before step i: the first warpgroup fetches into the slot that step i − 1 had, once both have read it."""

  @pl.when((lax.axis_index("warpgroup") == 0) & (i > 0) & (i - 1 + slots < total))
  def _():
    slot = lax.rem(i + slots - 1, slots)
    plgpu.barrier_wait(empty.at[slot])
    fetch(i - 1 + slots, slot)


def _release(i, total, slots, empty):
  """After step i, whose products are done. A slot that nothing more is fetched into is not reported: every completion
  of a barrier must be waited for."""

  @pl.when(i + slots < total)
  def _():
    plgpu.barrier_arrive(empty.at[lax.rem(i, slots)])


def _parts(x, dtype):
  """x in bfloat16, or for a float32 operation as two such arrays whose sum it is to 16 bits."""
  high = x.astype(jnp.bfloat16)
  return (high,) if dtype == jnp.bfloat16 else (high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16))


def _rounded(x, dtype):
  """x as the tensor cores read it: bfloat16, or float32 with TF32's eleven bits."""
  return x.astype(dtype) if dtype == jnp.bfloat16 else lax.reduce_precision(x, 8, 10)


def _width_matrices(width, dtype):
  """Cosines for the columns 0 … D/2 of `_folded` and those after, sines for its columns D/2 …: (C, E, D/2 + a step)."""
  columns, half = mosaic.round_up(width // 2 + 16, _COMPUTED), width // 2
  cosines_ED = direct._matrix(jnp.cos, width, columns, half + 1)
  sines_ED = jnp.pad(direct._matrix(jnp.sin, width, columns, half - 1), [(0, 0), (1, 0)])
  whole = half + direct._depth(dtype)
  return _rounded(jnp.stack([mosaic.pad_axis(x, 1, whole) for x in (cosines_ED, sines_ED)]), dtype)


def _first_matrices(first, second, dtype):
  """Cosines and sines of 2πr(M·j + m)/L: (M/2 + 1, C, P, R, J), with zeros up to whole tiles."""
  length = first * second
  m, r, j = (lax.broadcasted_iota(jnp.int32, (second // 2 + 1, first, first), axis) for axis in range(3))
  angles_MRJ = 2 * np.pi / length * (r * (m + second * j) % length).astype(jnp.float32)
  matrix_MCRJ = jnp.stack([jnp.cos(angles_MRJ), jnp.sin(angles_MRJ)], 1)
  padding = mosaic.round_up(first, _ROWS) - first
  return jnp.stack(_parts(jnp.pad(matrix_MCRJ, [(0, 0)] * 2 + [(0, padding)] * 2), dtype), 2)


def _second_matrices(second, dtype):
  """(3, P, S, O), with zeros up to whole tiles: for y, for y mirrored, and for y mirrored where r = 0.

  O as level 1 writes it, the imaginary parts with the opposite sign.
  """
  half = second // 2
  angles_SM = 2 * np.pi / second * (np.outer(np.arange(second), np.arange(half + 1)) % second)
  cosines_SM, sines_SM = np.cos(angles_SM), np.sin(angles_SM)
  cosines_SM[:, [0, half]] /= 2  # P and Q come doubled, and residues 1 … M/2 − 1 stand for M/2 + 1 … M − 1 too
  plain_SO = np.concatenate([cosines_SM, -sines_SM[:, 1:half]], axis=1)
  matrices = np.stack([plain_SO, plain_SO[::-1], plain_SO[-np.arange(second)]])
  padding = mosaic.round_up(second, _ROWS) - second
  matrices = jnp.asarray(np.pad(matrices, [(0, 0)] + [(0, padding)] * 2), jnp.float32)
  return jnp.stack(_parts(matrices, dtype), 1)


def _level_1(width_CEK, matrix_MCPRJ, u_BMJD, first, columns):
  """t, with the sign of its imaginary part changed: (P, B, R, O, E) with R = `first` and E = `columns`.

  One warpgroup of a block takes the cosines and the other the sines of the width, for all j. Then one sums the real
  parts, C p − S q, and the other the imaginary ones, S p + C q, for 64 rows r.
  """
  (batch, residues, tall, width), dtype = u_BMJD.shape, u_BMJD.dtype
  half, parts, depth = residues - 1, matrix_MCPRJ.shape[2], direct._depth(dtype)
  steps, tiles = width_CEK.shape[2] // depth, tall // _ROWS
  across, down = pl.cdiv(columns, _COMPUTED), pl.cdiv(first, _ROWS)
  samples = _samples(batch, residues * across * down)
  total = samples * tiles * steps
  resident, slots = _level_1_choice(width, tall, dtype)

  def fft_mixing_level_1(
    width_g, matrix_g, u_g, t_g, width_s, matrix_s, u_s, here, full, written, read, product_s, out_s
  ):
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    m, block = lax.rem(block, residues), lax.div(block, residues)
    row, block = lax.rem(block, down) * _ROWS, lax.div(block, down)
    column, sample = lax.rem(block, across) * _COMPUTED, lax.div(block, across) * samples

    def fetch_matrix(wave, i, target, barrier):
      source = width_g.at[wave, pl.ds(column, _COMPUTED), pl.ds(i * depth, depth)]
      plgpu.copy_gmem_to_smem(source, target, barrier)

    def fetch(i):
      """Step i of this warpgroup, which alone reads it. Past the last column, where the matrix is 0, come zeros."""
      slot, step, tile = lax.rem(i, slots), lax.rem(i, steps), lax.rem(lax.div(i, steps), tiles)
      deep = pl.ds(warpgroup * (width // 2) + step * depth, depth)
      source = u_g.at[sample + lax.div(i, steps * tiles), m, pl.ds(tile * _ROWS, _ROWS), deep]
      barrier = full.at[warpgroup * slots + slot]
      plgpu.copy_gmem_to_smem(source, u_s.at[warpgroup, slot], barrier)
      if not resident:
        fetch_matrix(warpgroup, step, width_s.at[warpgroup, slot], barrier)

    def by_width(first_step, accumulator):
      for step in range(steps):
        i = first_step + step
        slot = lax.rem(i, slots)
        plgpu.barrier_wait(full.at[warpgroup * slots + slot])
        mosaic.wgmma(accumulator, u_s.at[warpgroup, slot], width_s.at[warpgroup, step if resident else slot].T)
        plgpu.wgmma_wait(0)
        pl.when(i + slots < total)(functools.partial(fetch, i + slots))
      return accumulator[...]

    def by_first(p_sum, q_sum):
      for product, accumulator in enumerate((p_sum, q_sum)):
        wave = warpgroup if product == 0 else 1 - warpgroup
        # The product of two remainders is left out: it is below the precision of the sum.
        for part, other in [(0, 0), (1, 0), (0, 1)][: 2 * parts - 1]:
          mosaic.wgmma(accumulator, matrix_s.at[wave, part], product_s.at[product, other])
      plgpu.wgmma_wait(0)
      return p_sum[...] + jnp.where(warpgroup == 0, -1.0, 1.0) * q_sum[...]

    def one_sample(n, carry):
      for tile in range(tiles):
        product = functools.partial(by_width, (n * tiles + tile) * steps)
        value = pl.run_scoped(product, plgpu.ACC((_ROWS, _COMPUTED)))
        for part, value_part in enumerate(_parts(value, dtype)):
          product_s[warpgroup, part, pl.ds(tile * _ROWS, _ROWS)] = value_part
      plgpu.commit_smem()
      plgpu.barrier_arrive(written)
      plgpu.barrier_wait(written)
      value = pl.run_scoped(by_first, *[plgpu.ACC((_ROWS, _COMPUTED))] * 2)
      plgpu.barrier_arrive(read)
      for part, value_part in enumerate(_parts(value, dtype)):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what stood in `out_s` has left
        out_s[warpgroup] = value_part
        plgpu.commit_smem()

        def write(o, part=part):
          target = t_g.at[part, sample + n, pl.ds(row, _ROWS), o, pl.ds(column, _COMPUTED)]
          plgpu.copy_smem_to_gmem(out_s.at[warpgroup], target)

        pl.when(warpgroup == 0)(functools.partial(write, m))
        pl.when((warpgroup == 1) & (m > 0) & (m < half))(functools.partial(write, half + m))
      plgpu.barrier_wait(read)  # both have, so that the next products may be written
      return carry

    @pl.when(warpgroup == 0)
    def _():
      for wave in range(2):
        for part in range(parts):
          plgpu.copy_gmem_to_smem(matrix_g.at[m, wave, part, pl.ds(row, _ROWS)], matrix_s.at[wave, part], here)
        for step in range(steps if resident else 0):
          fetch_matrix(wave, step, width_s.at[wave, step], here)

    for i in range(min(total, slots)):
      fetch(i)
    plgpu.barrier_wait(here)
    lax.fori_loop(0, samples, one_sample, None)
    plgpu.wait_smem_to_gmem(0)

  transforms, tall_transforms = mosaic.swizzled(depth, dtype), mosaic.swizzled(_COMPUTED, jnp.bfloat16)
  return mosaic.kernel(
    fft_mixing_level_1,
    out_type=jax.ShapeDtypeStruct((parts, batch, first, 2 * half, columns), jnp.bfloat16),
    grid=(batch // samples * across * down * residues,),
    grid_names=("block",),
    num_threads=2,
    thread_name="warpgroup",
    scratch_types=[
      plgpu.SMEM((2, steps if resident else slots, _COMPUTED, depth), dtype, transforms=transforms),
      plgpu.SMEM((2, parts, _ROWS, tall), jnp.bfloat16, transforms=tall_transforms),
      plgpu.SMEM((2, slots, _ROWS, depth), dtype, transforms=transforms),
      plgpu.Barrier(num_arrivals=2 * parts + 2 * steps * resident),
      plgpu.Barrier(num_arrivals=1 if resident else 2, num_barriers=2 * slots),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_arrivals=2),
      plgpu.SMEM((2, parts, tall, _COMPUTED), jnp.bfloat16, transforms=tall_transforms),
      plgpu.SMEM((2, _ROWS, _COMPUTED), jnp.bfloat16, transforms=tall_transforms),
    ],
  )(width_CEK, matrix_MCPRJ, u_BMJD)


def _level_1_choice(width, tall, dtype):
  """Whether the matrices of the width stay in shared memory, and the slots of a warpgroup's ring, as fits."""
  size, depth = jnp.dtype(dtype).itemsize, direct._depth(dtype)
  parts, steps = len(_parts(jnp.zeros(()), dtype)), width // 2 // depth + 1
  fixed = 2 * parts * 2 * tall * (_ROWS + _COMPUTED) + 2 * 2 * _ROWS * _COMPUTED
  for resident, slots in ((True, 3), (True, 2), (False, 3), (False, 2), (False, 1)):
    ring = 2 * depth * size * (slots * _ROWS + (steps if resident else slots) * _COMPUTED)
    if fixed + ring <= mosaic.SHARED_MEMORY - 1024:  # a few barriers
      return resident, slots
  raise AssertionError("one slot always fits")


def _level_2(matrix_3PSO, t_PBROE, width, dtype):
  """y, (B, S, R, D).

  One warpgroup of a block writes columns of y as they are, the other their mirror images, for 64 s.
  """
  parts, batch, first, second, _ = t_PBROE.shape
  depth = _ROWS  # of o; a step reads so many of one part
  chunks = matrix_3PSO.shape[3] // depth
  across, down = width // 2 // _DIRECT, pl.cdiv(second, _ROWS)
  samples = _samples(batch, first * across * down)
  slots = 4 if parts == 1 else 3
  total = samples * parts * chunks
  # Column c of the mirrored tile is that of index _DIRECT − c.
  turn = np.zeros((_DIRECT, _COMPUTED), np.float32)
  turn[np.arange(_DIRECT), _DIRECT - np.arange(_DIRECT)] = 1

  def fft_mixing_level_2(matrix_g, turn_g, t_g, y_g, matrix_s, turn_s, t_s, here, full, empty, sum_s, out_s):
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    r, block = lax.rem(block, first), lax.div(block, first)
    row, block = lax.rem(block, down) * _ROWS, lax.div(block, down)
    column, sample = lax.rem(block, across) * _DIRECT, lax.div(block, across) * samples

    def fetch(i, slot):
      b, step = sample + lax.div(i, parts * chunks), lax.rem(i, parts * chunks)
      deep = pl.ds(lax.rem(step, chunks) * depth, depth)
      source = t_g.at[lax.div(step, chunks), b, r, deep, pl.ds(column, _COMPUTED)]
      plgpu.copy_gmem_to_smem(source, t_s.at[slot], full.at[slot])

    def one_sample(n, carry):
      def products(accumulator):
        for c in range(parts * chunks):
          i = n * parts * chunks + c
          _next(i, total, slots, fetch, empty)
          slot = lax.rem(i, slots)
          plgpu.barrier_wait(full.at[slot])
          # The product of two remainders is left out: it is below the precision of the sum.
          for part in range(parts - c // chunks):
            operand = matrix_s.at[warpgroup, part, :, pl.ds(c % chunks * depth, depth)]
            mosaic.wgmma(accumulator, operand, t_s.at[slot])
          plgpu.wgmma_wait(0)
          _release(i, total, slots, empty)
        return accumulator[...]

      def turned(accumulator):
        for part in range(parts):
          mosaic.wgmma(accumulator, sum_s.at[part], turn_s.T)
        plgpu.wgmma_wait(0)
        return accumulator[...]

      def write(value, r, column):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what stood in `out_s` has left
        out_s[warpgroup] = value.astype(dtype)
        plgpu.commit_smem()
        target = y_g.at[sample + n, pl.ds(row, _ROWS), r, pl.ds(column, _DIRECT)]
        plgpu.copy_smem_to_gmem(out_s.at[warpgroup], target)

      value = pl.run_scoped(products, plgpu.ACC((_ROWS, _COMPUTED)))

      @pl.when(warpgroup == 0)
      def _():
        write(value[:, :_DIRECT], r, column)

      @pl.when(warpgroup == 1)
      def _():
        for part, value_part in enumerate(_parts(value, dtype)):
          sum_s[part] = value_part
        plgpu.commit_smem()
        mirrored = pl.run_scoped(turned, plgpu.ACC((_ROWS, _DIRECT)))
        write(mirrored, lax.rem(first - r, first), width - column - _DIRECT)

      return carry

    @pl.when(warpgroup == 0)
    def _():
      for slot, matrix in enumerate((0, jnp.where(r == 0, 2, 1))):
        for part in range(parts):
          plgpu.copy_gmem_to_smem(matrix_g.at[matrix, part, pl.ds(row, _ROWS)], matrix_s.at[slot, part], here)
      plgpu.copy_gmem_to_smem(turn_g, turn_s, here)

    _start(total, slots, fetch)
    plgpu.barrier_wait(here)
    lax.fori_loop(0, samples, one_sample, None)
    plgpu.wait_smem_to_gmem(0)

  transforms = mosaic.swizzled(_COMPUTED, jnp.bfloat16)
  return mosaic.kernel(
    fft_mixing_level_2,
    out_type=jax.ShapeDtypeStruct((batch, second, first, width), dtype),
    grid=(batch // samples * across * down * first,),
    grid_names=("block",),
    num_threads=2,
    thread_name="warpgroup",
    scratch_types=[
      plgpu.SMEM((2, parts, _ROWS, chunks * depth), jnp.bfloat16, transforms=transforms),
      plgpu.SMEM(turn.shape, jnp.bfloat16, transforms=transforms),
      plgpu.SMEM((slots, depth, _COMPUTED), jnp.bfloat16, transforms=transforms),
      plgpu.Barrier(num_arrivals=2 * parts + 1),
      plgpu.Barrier(num_barriers=slots),
      plgpu.Barrier(num_arrivals=2, num_barriers=slots),
      plgpu.SMEM((parts, _ROWS, _COMPUTED), jnp.bfloat16, transforms=transforms),
      plgpu.SMEM((2, _ROWS, _DIRECT), dtype, transforms=mosaic.swizzled(_DIRECT, dtype)),
    ],
  )(matrix_3PSO, jnp.asarray(turn, jnp.bfloat16), t_PBROE)
