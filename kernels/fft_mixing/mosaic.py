"""The folded form (see `xla`) with its two products, and the unfolding, as Mosaic GPU kernels.

XLA folds x into its even-even part and its odd-odd part, each a quarter of x. The first kernel multiplies both by the
quarter matrices of D and writes the results transposed, (E, N), so that every operand of every product is contiguous
along the axis that is summed: TF32 cannot have it otherwise. The second kernel multiplies by the matrices of L and
writes all of y. It keeps four sums apart, those of P (cosines) and of Q (sines) over the even and over the odd tokens:
rows k and k + L/2 differ in the sign of the odd tokens, columns e and D − e in the sign of Q. The latter columns stand
in reverse order; a product with a permutation matrix turns them.

Axes beside B, L and D: N, the tokens 0 … L/2 of the folded x, the even ones first; E, the frequencies 0 … D/2 of the
width; K, the frequencies of the tokens that are computed, the first half of them if L is a multiple of 16.

A bfloat16 x has bfloat16 operands. A float32 x has TF32 operands (11 significant bits), which are rounded, where the
tensor cores by themselves would cut them off. Sums are float32.
"""

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
_DIRECT = 64  # columns that a block of the second kernel writes as they are, and as many mirrored
_COMPUTED = _DIRECT + 8  # the mirrored ones are those from 1 to `_DIRECT`, and a product has a multiple of 8 columns
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
  if two_level.factors(length):
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
  if two_level.factors(length):
    return two_level.mixing(x_BLD)
  parts = []
  for wave, part_BND in zip((jnp.cos, jnp.sin), xla.fold(x_BLD.astype(jnp.float32)), strict=True):
    depth, first = _depth(x_BLD.dtype), int(wave is jnp.sin)
    by_width_ED = _matrix(wave, width, width // 2 + 1, part_BND.shape[2])
    by_length_KN = _matrix(wave, length, length // halves(length), part_BND.shape[1])
    steps = [pl.cdiv(piece.shape[1], depth) for piece in _by_parity(by_length_KN, first, halves(length))]
    by_length_KN, part_BND = (_evens_first(x, first, halves(length), depth) for x in (by_length_KN, part_BND))
    by_width_ED, by_length_KN, part_BND = (_operand(x, x_BLD.dtype) for x in (by_width_ED, by_length_KN, part_BND))
    parts.append((by_length_KN, _first_product(by_width_ED, part_BND), steps))
  return _second_product(*parts, width).reshape(batch, -1, width)[:, :length]


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


def _accumulate(accumulator, a_s, b_s, start, stop, steps, full, empty):
  """accumulator += a bᵀ over the steps from `start` to `stop`, of `steps` that are fetched in all."""
  slots = a_s.shape[0]
  rows = pl.ds(lax.axis_index("warpgroup") * mosaic.WARPGROUP_ROWS, mosaic.WARPGROUP_ROWS)

  def step(i, carry):
    slot = lax.rem(i, slots)
    plgpu.barrier_wait(full.at[slot])
    mosaic.wgmma(accumulator, a_s.at[slot, rows], b_s.at[slot].T)
    plgpu.wgmma_wait(1)

    # A slot that nothing more is fetched into is not reported: every completion of a barrier must be waited for.
    @pl.when((i > start) & (i - 1 + slots < steps))
    def _():
      plgpu.barrier_arrive(empty.at[lax.rem(i + slots - 1, slots)])

    return carry

  lax.fori_loop(start, stop, step, None)
  plgpu.wgmma_wait(0)
  if stop - 1 + slots < steps:
    plgpu.barrier_arrive(empty.at[(stop - 1) % slots])


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
        _accumulate(accumulator, a_s, b_s, 0, steps, steps, full, empty)
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
    grid=(batch * across * down,),
    grid_names=("block",),
    num_threads=_COMPUTING + 1,
    thread_name="warpgroup",
    scratch_types=[
      *_ring_scratch(_COLUMNS, slots, dtype),
      plgpu.SMEM((_COMPUTING, mosaic.WARPGROUP_ROWS, _COLUMNS), dtype, transforms=mosaic.swizzled(_COLUMNS, dtype)),
    ],
  )(a_ED, b_BND)


def _second_product(cosines, sines, width):
  """y, (B, halves, K, D).

  Args:
    cosines, sines: the matrix of L, (K, N); what it multiplies, (B, E, N); and steps for the even and the odd tokens,
      or for all of them.
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
  # Column c of the mirrored tile is that of index direct − c; the depth of a product is a multiple of 32 bytes.
  turn = np.zeros((direct, mosaic.round_up(computed, 32 // dtype.itemsize)), np.float32)
  turn[np.arange(direct), direct - np.arange(direct)] = 1

  def fft_mixing_by_length(cos_g, p_g, sin_g, q_g, turn_g, y_g, a_s, b_s, full, empty, turn_s, here, sum_s, out_s):
    b, column, row = _block(across, down)
    row, column = row * _ROWS, column * direct

    def fetch(i, slot, barrier):
      def copy(a_g, b_g, first, odds):
        parity = jnp.int32(i >= odds)
        deep = i - jnp.where(i >= odds, odds, first)
        a = a_g.at[pl.ds(row, _ROWS), pl.ds(deep * depth + parity * a_g.shape[1] // count, depth)]
        b_ = b_g.at[b, pl.ds(column, computed), parity, pl.ds(deep * depth, depth)]
        plgpu.copy_gmem_to_smem(a, a_s.at[slot], barrier)
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
          _accumulate(accumulator, a_s, b_s, start, stop, stops[-1], full, empty)
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
        columns = pl.ds(width - column - _DIRECT if mirrored else column, _DIRECT)
        plgpu.copy_smem_to_gmem(own_s.at[mirrored], y_g.at[b, half, _own_rows(row), columns])

      sums = pl.run_scoped(products, *[plgpu.ACC((mosaic.WARPGROUP_ROWS, _COMPUTED))] * len(stops))
      plgpu.barrier_wait(here)
      for half in range(count):
        p, q = sums[:count], sums[count:]
        p, q = (x[0] if count == 1 else x[0] - x[1] if half else x[0] + x[1] for x in (p, q))
        write((p - q)[:, :_DIRECT], half, 0)
        total = rounded(p + q, dtype)
        if turn.shape[1] > _COMPUTED:
          zeros = jnp.zeros((mosaic.WARPGROUP_ROWS, turn.shape[1] - _COMPUTED), dtype)
          total = jnp.concatenate([total, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)], axis=1)
        own_sum_s[...] = total
        plgpu.commit_smem()
        write(pl.run_scoped(turned, plgpu.ACC((mosaic.WARPGROUP_ROWS, _DIRECT))), half, 1)
      plgpu.wait_smem_to_gmem(0)

    _roles(fetch_all, compute)

  turn_transforms, out_transforms = (mosaic.swizzled(columns, dtype) for columns in (turn.shape[1], _DIRECT))
  return mosaic.kernel(
    fft_mixing_by_length,
    out_type=jax.ShapeDtypeStruct((batch, count, height, width), dtype),
    grid=(batch * across * down,),
    grid_names=("block",),
    num_threads=_COMPUTING + 1,
    thread_name="warpgroup",
    scratch_types=[
      *_ring_scratch(_COMPUTED, slots, dtype),
      plgpu.SMEM(turn.shape, dtype, transforms=turn_transforms),
      plgpu.Barrier(),
      plgpu.SMEM((_COMPUTING, mosaic.WARPGROUP_ROWS, turn.shape[1]), dtype, transforms=turn_transforms),
      plgpu.SMEM((_COMPUTING, 2, mosaic.WARPGROUP_ROWS, _DIRECT), dtype, transforms=out_transforms),
    ],
  )(cos_KN, p_BEN, sin_KN, q_BEN, jnp.asarray(turn, dtype))
