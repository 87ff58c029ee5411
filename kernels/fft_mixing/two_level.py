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

Axes beside B, L and D: E, the frequencies 0 … D/2 of the width; J and R (residues of k), of length J; M and S, of
length M; O, the M real numbers that level 2 sums; C, the cosines' and the sines' matrix; P, the parts of a number. A
bfloat16 array has one part; a float32 one has TF32 products up to level 1, whose result has two parts, bfloat16 numbers
whose sum it is to 16 bits: TF32 operands would have to lie transposed there.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic
from kernels.fft_mixing import mosaic as direct
from kernels.fft_mixing import xla

LENGTHS = "a multiple of 512 from 2560 to 8192 or of 1024 to 16384"
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
  p_BEMJ, q_BEMJ = _by_width(x_BLD, first, second)
  t_PBROE = _level_1(_first_matrices(first, second, x_BLD.dtype), p_BEMJ, q_BEMJ, width // 2 + 16)
  return _level_2(_second_matrices(second, x_BLD.dtype), t_PBROE, width, x_BLD.dtype).reshape(batch, length, width)


# ------------------------------------------------------------------------------------------- width


def _by_width(x_BLD, first, second):
  """2P and 2Q for the residues 0 … M/2: two arrays (B, E, M, J) in x's dtype, E padded to a multiple of 8."""
  batch, _, width = x_BLD.shape
  dtype = x_BLD.dtype
  x_BLD = x_BLD.astype(jnp.float32)
  opposite_BLD = jnp.roll(lax.rev(x_BLD, (1,)), 1, 1)

  def by_residue(x_BLD):
    x_BJMD = x_BLD.reshape(batch, first, second, width)[:, :, : second // 2 + 1]
    return x_BJMD.swapaxes(1, 2).reshape(batch, -1, width)

  x_BND, opposite_BND = by_residue(x_BLD), by_residue(opposite_BLD)
  products = []
  for wave, part_BND in (
    (jnp.cos, xla._fold(x_BND + opposite_BND, 2)[0]),
    (jnp.sin, xla._fold(x_BND - opposite_BND, 2)[1]),
  ):
    matrix_ED = direct._matrix(wave, width, width // 2 + 1, part_BND.shape[2])
    product_BEN = direct._first_product(*(direct._operand(x, dtype) for x in (matrix_ED, part_BND)))
    products.append(product_BEN.reshape(batch, -1, second // 2 + 1, first))
  return products


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


def _first_matrices(first, second, dtype):
  """Cosines and sines of 2πr(M·j + m)/L: (M/2 + 1, C, R, J), with zeros up to whole tiles."""
  length = first * second
  m, r, j = (lax.broadcasted_iota(jnp.int32, (second // 2 + 1, first, first), axis) for axis in range(3))
  angles_MRJ = 2 * np.pi / length * (r * (m + second * j) % length).astype(jnp.float32)
  matrix_MCRJ = jnp.stack([jnp.cos(angles_MRJ), jnp.sin(angles_MRJ)], 1)
  padding = mosaic.round_up(first, _ROWS) - first
  return direct.rounded(jnp.pad(matrix_MCRJ, [(0, 0)] * 2 + [(0, padding)] * 2), dtype)


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


def _level_1(matrix_MCRJ, p_BEMJ, q_BEMJ, columns):
  """t, with the sign of its imaginary part changed: (P, B, R, O, E) with `columns` columns.

  One warpgroup of a block sums the real parts, C p − S q, the other the imaginary ones, S p + C q, for 64 rows r.
  """
  (batch, _, residues, first), dtype = p_BEMJ.shape, p_BEMJ.dtype
  half, parts, depth = residues - 1, len(_parts(jnp.zeros(()), dtype)), direct._depth(dtype)
  chunks = matrix_MCRJ.shape[3] // depth  # of J; a step reads one of p or of q
  across, down = pl.cdiv(columns, _COMPUTED), pl.cdiv(first, _ROWS)
  samples = _samples(batch, residues * across * down)
  slots, total = 4, samples * 2 * chunks

  def fft_mixing_level_1(matrix_g, p_g, q_g, t_g, matrix_s, operand_s, here, full, empty, out_s):
    block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    m, block = lax.rem(block, residues), lax.div(block, residues)
    row, block = lax.rem(block, down) * _ROWS, lax.div(block, down)
    column, sample = lax.rem(block, across) * _COMPUTED, lax.div(block, across) * samples

    def fetch(i, slot):
      b, chunk = sample + lax.div(i, 2 * chunks), lax.rem(i, 2 * chunks)

      def copy(operand_g, chunk):
        source = operand_g.at[b, pl.ds(column, _COMPUTED), m, pl.ds(chunk * depth, depth)]
        plgpu.copy_gmem_to_smem(source, operand_s.at[slot], full.at[slot])

      pl.when(chunk < chunks)(lambda: copy(p_g, chunk))
      pl.when(chunk >= chunks)(lambda: copy(q_g, chunk - chunks))

    def one_sample(n, carry):
      def products(p_sum, q_sum):
        for c in range(2 * chunks):
          i = n * 2 * chunks + c
          _next(i, total, slots, fetch, empty)
          slot = lax.rem(i, slots)
          plgpu.barrier_wait(full.at[slot])
          factor = warpgroup if c < chunks else 1 - warpgroup
          operand = matrix_s.at[factor, :, pl.ds(c % chunks * depth, depth)]
          mosaic.wgmma(p_sum if c < chunks else q_sum, operand, operand_s.at[slot].T)
          plgpu.wgmma_wait(0)
          _release(i, total, slots, empty)
        return p_sum[...] + jnp.where(warpgroup == 0, -1.0, 1.0) * q_sum[...]

      value = pl.run_scoped(products, *[plgpu.ACC((_ROWS, _COMPUTED))] * 2)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what stood in `out_s` has left
      for part, value_part in enumerate(_parts(value, dtype)):
        out_s[warpgroup, part] = value_part
      plgpu.commit_smem()

      def write(o):
        for part in range(parts):
          target = t_g.at[part, sample + n, pl.ds(row, _ROWS), o, pl.ds(column, _COMPUTED)]
          plgpu.copy_smem_to_gmem(out_s.at[warpgroup, part], target)

      pl.when(warpgroup == 0)(lambda: write(m))
      pl.when((warpgroup == 1) & (m > 0) & (m < half))(lambda: write(half + m))
      return carry

    @pl.when(warpgroup == 0)
    def _():
      for wave in range(2):
        plgpu.copy_gmem_to_smem(matrix_g.at[m, wave, pl.ds(row, _ROWS)], matrix_s.at[wave], here)

    _start(total, slots, fetch)
    plgpu.barrier_wait(here)
    lax.fori_loop(0, samples, one_sample, None)
    plgpu.wait_smem_to_gmem(0)

  transforms = mosaic.swizzled(depth, dtype)
  return mosaic.kernel(
    fft_mixing_level_1,
    out_type=jax.ShapeDtypeStruct((parts, batch, first, 2 * half, columns), jnp.bfloat16),
    grid=(batch // samples * across * down * residues,),
    grid_names=("block",),
    num_threads=2,
    thread_name="warpgroup",
    scratch_types=[
      plgpu.SMEM((2, _ROWS, matrix_MCRJ.shape[3]), dtype, transforms=transforms),
      plgpu.SMEM((slots, _COMPUTED, depth), dtype, transforms=transforms),
      plgpu.Barrier(num_arrivals=2),
      plgpu.Barrier(num_barriers=slots),
      plgpu.Barrier(num_arrivals=2, num_barriers=slots),
      plgpu.SMEM((2, parts, _ROWS, _COMPUTED), jnp.bfloat16, transforms=mosaic.swizzled(_COMPUTED, jnp.bfloat16)),
    ],
  )(matrix_MCRJ, p_BEMJ, q_BEMJ)


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
