"""The recurrence as a Mosaic GPU kernel that reads x once and writes the states once.

A block owns one sequence and a tile of its states, and goes through time in chunks that the TMA brings into a ring in
shared memory. Each of the four warps has a quarter of the chunk's steps, each lane one or two states. First every warp
finds where its steps lead from a zero state; that and the powers of the diagonal over whole quarters tell the state
that it truly begins with; then it goes through its steps again, writes the states over x, and the TMA takes them away.
So nothing but shared memory is read twice, and a sequence takes half as many steps as one after the other.

The gradient by x is the same kernel in the other direction with conj(a); for a constant diagonal it reads h as well
and sums the diagonal's gradient on the way. All arithmetic is float32, without tensor cores: exact to rounding.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic

_QUARTERS = 4  # of a chunk, one for each warp of a warpgroup
_LANES = 32  # of a warp
_UNROLLED = 8  # steps whose inputs are loaded together, to wait for shared memory once
_WIDTHS = (64, 32)  # states of a tile
# Two for each multiprocessor: one cannot fill the time that another waits for shared memory or at a barrier.
_ENOUGH_BLOCKS = 2 * mosaic.MULTIPROCESSORS
_MOST_SHARING = 4  # blocks on a multiprocessor
_FEWEST_CHUNKS = 3  # in the ring: one is worked on, one arrives, one leaves
_MOST_CHUNKS = 6
_CHUNK_BYTES = 32 * 1024  # of all streams; larger ones gain nothing
_LONGEST_QUARTER = 32  # steps: |a|⁹⁶ must not overflow
_RESERVED = 8 * 1024  # bytes of shared memory for everything but the ring, and for the system


def refuse(x_re_BTN: jax.Array) -> str | None:
  """Why the kernel cannot serve inputs of x's shape, in words; None if it can."""
  if not x_re_BTN.size:
    return f"it needs at least one state of one step of one sequence, and x has shape {x_re_BTN.shape}"
  return None


def recurrence(
  x_re_BTN: jax.Array, x_im_BTN: jax.Array, a_re: jax.Array, a_im: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """States of all steps; arguments and result as in `xla.sequential`.

  N that is no multiple of 16 bytes is padded, which copies x and the result. |a| may be up to 2.5.
  """
  return _recurrence(reverse, x_re_BTN, x_im_BTN, a_re, a_im)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(reverse, x_re_BTN, x_im_BTN, a_re, a_im):
  return _forward(reverse, x_re_BTN, x_im_BTN, a_re, a_im)[0]


def _forward(reverse, x_re_BTN, x_im_BTN, a_re, a_im):
  h, _ = _scan((x_re_BTN, x_im_BTN), (a_re, a_im), reverse)
  return h, (*h, a_re, a_im)


def _backward(reverse, residuals, cotangents):
  h_re_BTN, h_im_BTN, a_re, a_im = residuals
  h, conjugate = (h_re_BTN, h_im_BTN), (a_re, -a_im)
  if _constant(a_re):
    dx, da = _scan(cotangents, conjugate, not reverse, h=h)
    return *dx, *da
  dx, _ = _scan(cotangents, conjugate, not reverse, multiply_last=True)
  # h_{t−1}: XLA makes one pass of all this, reading h and dx and writing da.
  edges = (0, 0, 0), (-1, 1, 0) if reverse else (1, -1, 0), (0, 0, 0)
  h = (lax.pad(part, jnp.zeros((), part.dtype), edges) for part in h)
  (h_re, h_im), (dx_re, dx_im) = ([part.astype(jnp.float32) for part in pair] for pair in (h, dx))
  return *dx, h_re * dx_re + h_im * dx_im, h_re * dx_im - h_im * dx_re


_recurrence.defvjp(_forward, _backward)


def _scan(x, a, reverse, *, h=None, multiply_last=False):
  """The recurrence, and on request a sum. Complex numbers are pairs of arrays.

  Args:
    x: (B, T, N).
    a: in float32, (1, 1, N) if constant or (B, T, N).
    reverse: whether to run from the last step to the first.
    h: (B, T, N) for the sum; a must be constant.
    multiply_last: whether to return s_t = u_{t−1} + x_t with u_t = a_t s_t, instead of s_t = a_t s_{t−1} + x_t.

  Returns:
    s, (B, T, N) in x's dtype, and the sum over B and T of conj(h_t) s_{t−1}, (1, 1, N), or nothing if h is None.
  """
  batch, steps, states = x[0].shape
  constant = _constant(a[0])
  streams = [*x, *(h or ()), *(() if constant else a)]
  # The TMA wants rows of a multiple of 16 bytes.
  padded = mosaic.round_up(states, 16 // min(stream.dtype.itemsize for stream in streams))
  width, quarter, chunks = _tiling(batch, steps, padded, sum(stream.dtype.itemsize for stream in streams))
  quarters, tiles = pl.cdiv(steps, quarter), pl.cdiv(padded, width)
  streams = [mosaic.pad_axis(mosaic.pad_axis(stream, 2, padded), 1, quarters * quarter) for stream in streams]
  streams = [stream.reshape(batch, quarters, quarter, padded) for stream in streams]
  powers = [mosaic.pad_axis(_powers(a, quarter, reverse), 3, tiles * width)] if constant else []
  sums = 2 * [jax.ShapeDtypeStruct((batch, _QUARTERS, tiles * width), jnp.float32)] if h else []

  def linear_recurrence(*refs):
    remaining = iter(refs)
    groups = (list(itertools.islice(remaining, count)) for count in (len(streams), len(powers), 2, len(sums)))
    _body(*groups, *remaining, reverse=reverse, multiply_last=multiply_last)

  s_re, s_im, *totals = mosaic.kernel(
    linear_recurrence,
    out_type=[*(jax.ShapeDtypeStruct(part.shape, part.dtype) for part in streams[:2]), *sums],
    # One axis: only the fastest may have more than 65535 blocks. Neighbours in memory are neighbours in time.
    grid=(batch * tiles,),
    grid_names=("block",),
    scratch_types=[
      [plgpu.SMEM((chunks, _QUARTERS, quarter, width), stream.dtype) for stream in streams],
      [plgpu.SMEM((2, 2 * _QUARTERS, width), jnp.float32) for _ in range(1 if constant else 2)],
      plgpu.Barrier(num_arrivals=len(streams), num_barriers=chunks),
    ],
    # Every thread reads only what it has written itself, or what was written before a `commit_smem` or by the TMA.
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
  )(*streams, *powers)
  totals = [total.sum((0, 1))[None, None, :states] for total in totals]
  s = [part.reshape(batch, -1, padded)[:, :steps, :states] for part in (s_re, s_im)]
  return tuple(s), totals


def _tiling(batch, steps, states, itemsize):
  """States of a tile, steps of a quarter of a chunk (a power of two), and chunks in the ring.

  Traffic is the same whatever the tile, and bounds the time if there are `_ENOUGH_BLOCKS`. So the widest tile is taken
  that leaves so many, since device memory reads long rows best, or else the narrowest. Then as many blocks as there are
  share a multiprocessor, up to four, and a quarter is as long as leaves room for `_FEWEST_CHUNKS`.

  Args:
    itemsize: bytes per step and state of all streams.
  """
  # A tile of all states is contiguous in memory. Mosaic stores that by an instruction that knows no end of time, and
  # would write the rest of a last chunk over the next sequence.
  widths = [width for width in _WIDTHS if width != states]
  enough = [width for width in widths if width <= states and batch * pl.cdiv(states, width) >= _ENOUGH_BLOCKS]
  width = enough[0] if enough else widths[-1]
  row = _QUARTERS * width * itemsize
  sharing = min(
    pl.cdiv(batch * pl.cdiv(states, width), mosaic.MULTIPROCESSORS),
    mosaic.SHARED_MEMORY // (_FEWEST_CHUNKS * _UNROLLED * row + _RESERVED),
    _MOST_SHARING,
  )
  room = mosaic.SHARED_MEMORY // sharing - _RESERVED
  longest = min(room // (_FEWEST_CHUNKS * row), _CHUNK_BYTES // row, steps // _QUARTERS, _LONGEST_QUARTER)
  quarter = _UNROLLED
  # One that does not divide the steps would cost a padded copy of x.
  while 2 * quarter <= longest and steps % (2 * quarter) == 0:
    quarter *= 2
  return width, quarter, min(room // (quarter * row), _MOST_CHUNKS, pl.cdiv(steps, _QUARTERS * quarter))


def _powers(a, quarter, reverse):
  """a¹, then a to once, twice and three times `quarter`, as each warp needs them: (4, 2, _QUARTERS, N).

  The axes are power, part, warp and state. A power is zero for the warps that have fewer quarters of the chunk before
  them. They are made in float64: the error of a power enters a slow state at every chunk, always to the same side.
  """
  a_re_N, a_im_N = (part[0, 0] for part in a)
  with jax.enable_x64(True):
    once = tuple(lax.convert_element_type(part, np.float64) for part in (a_re_N, a_im_N))
    for _ in range(quarter.bit_length() - 1):
      once = _product(once, once)
    twice = _product(once, once)
    jumps = [[lax.convert_element_type(p, np.float32) for p in power] for power in (once, twice, _product(twice, once))]
  powers = jnp.stack([jnp.stack(power) for power in ([a_re_N, a_im_N], *jumps)])
  before = np.arange(_QUARTERS)[::-1] if reverse else np.arange(_QUARTERS)
  needed = np.arange(_QUARTERS)[:, None] <= before
  return jnp.where(needed[:, None, :, None], powers[:, :, None], 0.0)


def _body(streams, powers, results, sums, rings, ends, full, *, reverse, multiply_last):
  """One block: all steps of some states of one sequence.

  Args:
    streams: x, then h if there are sums or a if it varies, in device memory, (B, quarters, steps, N).
    powers: the one array of `_powers` if a is constant.
    results: s, likewise.
    sums: if any, the sums over the steps of each warp and over this sequence, (B, _QUARTERS, N).
    rings: for every stream (chunks, _QUARTERS, steps, states) in shared memory; s is written over x.
    ends: (2, 2 × _QUARTERS, states): where the quarters of this chunk led to from zero, and those of the chunk before
      in truth, in the order of time. If a varies, also the products of a over the quarters, zero for the chunk before.
    full: a barrier for each chunk of the ring.
    reverse, multiply_last: as in `_scan`.
  """
  _, quarters, _, states = streams[0].shape
  slots, _, quarter, width = rings[0].shape
  chunks = pl.cdiv(quarters, _QUARTERS)
  tiles = pl.cdiv(states, width)
  sequence, tile = lax.div(lax.axis_index("block"), tiles), lax.rem(lax.axis_index("block"), tiles)
  columns = pl.ds(tile * width, width)
  # A value is a row for each warp, and a lane has one state of it or two neighbours.
  tiling = fragmented_array.Tiling(((_QUARTERS, width), (width // _LANES,)))
  layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

  def load(ref):
    return plgpu.load(ref, layout=layout).astype(jnp.float32)

  def splat(value):
    return plgpu.layout_cast(jnp.full((_QUARTERS, width), value, jnp.float32), layout)

  zero, one = splat(0.0), splat(1.0)

  def rows(chunk):
    """Of a chunk in device memory. Chunks are counted in the direction of the recurrence, quarters in that of time."""
    first = (chunks - 1 - chunk if reverse else chunk) * _QUARTERS
    return sequence, pl.ds(first, _QUARTERS), slice(None), columns

  def fetch(chunk):
    slot = lax.rem(chunk, slots)
    for ref, ring in zip(streams, rings, strict=True):
      plgpu.copy_gmem_to_smem(ref.at[rows(chunk)], ring.at[slot], full.at[slot])

  @pl.loop(0, min(slots, chunks))
  def _(chunk):
    fetch(chunk)

  # Rows of `ends` of the two chunks.
  before, current = (_QUARTERS, 0) if reverse else (0, _QUARTERS)

  def store_ends(ref, first, values):
    for part, value in enumerate(values):
      ref.at[part, pl.ds(first, _QUARTERS)][...] = value

  def load_ends(ref, distance):
    """For each warp the end of the quarter that lies `distance` quarters before its own."""
    first = current + distance if reverse else current - distance
    return tuple(load(ref.at[part, pl.ds(first, _QUARTERS)]) for part in range(2))

  def each_step(slot, carry, step):
    """`step(t, inputs, carry)` → carry for all steps of the quarter; inputs are pairs, in the order of the streams."""
    blocks = quarter // _UNROLLED

    def several(k, carry):
      first = (blocks - 1 - k if reverse else k) * _UNROLLED
      times = [first + i for i in range(_UNROLLED)][:: -1 if reverse else 1]
      inputs = [[load(ring.at[slot, :, t]) for ring in rings] for t in times]
      for t, parts in zip(times, inputs, strict=True):
        carry = step(t, list(zip(parts[::2], parts[1::2], strict=True)), carry)
      return carry

    return lax.fori_loop(0, blocks, several, carry)

  def load_power(power):
    # In device memory, where jax 0.11 knows no optimized load.
    refs = [powers[0].at[power, part, :, columns] for part in range(2)]
    return tuple(plgpu.load(ref, layout=layout, optimized=False) for ref in refs)

  if powers:
    a, *jumps = map(load_power, range(4))

  def advance(s, inputs):
    """The state, or what it is multiplied to, after a step, and the result of the step."""
    x, by = inputs[0], a if powers else inputs[1]
    if multiply_last:
      result = s[0] + x[0], s[1] + x[1]
      return _product(by, result), result
    s = _multiply_add(by, s, x)
    return s, s

  def process(chunk, totals):
    slot = lax.rem(chunk, slots)
    plgpu.barrier_wait(full.at[slot])

    def from_zero(t, inputs, carry):
      s, *product = carry
      return advance(s, inputs)[0], *(_product(inputs[1], p) for p in product)

    found = each_step(slot, ((zero, zero), *([] if powers else [(one, zero)])), from_zero)
    for ref, value in zip(ends, found, strict=True):
      store_ends(ref, current, value)
    plgpu.commit_smem()
    s, jump = load_ends(ends[0], 1), (one, zero)
    for distance in range(1, _QUARTERS):
      jump = jumps[distance - 1] if powers else _product(jump, load_ends(ends[1], distance))
      s = _multiply_add(jump, load_ends(ends[0], distance + 1), s)

    def from_start(t, inputs, carry):
      s, *totals = carry
      if totals:
        h_re, h_im = inputs[1]
        totals = [_multiply_add((h_re, -h_im), s, totals[0])]
      s, result = advance(s, inputs)
      for ring, part in zip(rings[:2], result, strict=True):
        ring.at[slot, :, t][...] = part.astype(ring.dtype)
      return s, *totals

    s, *totals = each_step(slot, (s, *totals), from_start)
    plgpu.commit_smem()
    store_ends(ends[0], before, s)
    for ref, ring in zip(results, rings[:2], strict=True):
      plgpu.copy_smem_to_gmem(ring.at[slot], ref.at[rows(chunk)])
    # The chunk before has left its place in the ring: of the copies only the latest, of this chunk, may be under way.
    plgpu.wait_smem_to_gmem(len(results), wait_read_only=True)

    @pl.when((chunk > 0) & (chunk - 1 + slots < chunks))
    def _():
      fetch(chunk - 1 + slots)

    return totals

  for ref in ends:
    store_ends(ref, before, (zero, zero))
  totals = lax.fori_loop(0, chunks, process, [(zero, zero)] if sums else [])
  for ref, total in zip(sums, totals[0] if sums else (), strict=True):
    ref.at[sequence, :, columns][...] = total
  plgpu.wait_smem_to_gmem(0)


def _product(a, b):
  return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _multiply_add(a, b, c):
  """a b + c, in the order that takes four fused multiply-adds."""
  return c[0] + a[0] * b[0] - a[1] * b[1], c[1] + a[0] * b[1] + a[1] * b[0]


def _constant(a):
  """Whether a is (1, 1, N), the same for all steps."""
  return a.shape[:2] == (1, 1)
