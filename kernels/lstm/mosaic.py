"""The recurrence as one persistent kernel for Hopper GPUs: all directions in one launch, forward and backward.

A block of threads owns a tile of sequences ("lanes") of one direction from the first step to the last. Every
warpgroup computes 64 hidden units of all its lanes by products with features as rows and lanes as columns, one
product for each gate, so that the four gates of a unit meet in one thread. The recurrent weights stay in shared memory,
the cell state in float32 registers; pre-activations stream in through a ring of slots, hidden states stream out.

Sequences are read and written where they lie in (B·H, W, ·): a unit of adjacent lanes is a run of rows or of columns.
Features beyond K have zeros for inputs (copies pad what lies outside of an array) and are dropped where they are
stored; as rows of the weights they meet those of the next gate, which yields numbers that nothing uses.

The forward pass for a gradient keeps the gates and the cell state before every step, in z's dtype. The backward pass
is the same scheme in reversed time: dz overwrites the gates in their slot, from where the next product takes it.

Axes: R = B·H rows of all images, W columns, G directions, Q = 4G gates, K hidden units, F = 4K.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic

_GATES = 4
_FEATURES = mosaic.WARPGROUP_ROWS  # hidden units of one warpgroup
_RESERVED = 1024  # bytes of shared memory for barriers and alignment
_REGISTERS = 65_536  # of a multiprocessor
_LARGEST = 256  # hidden units: a warpgroup for every 64, and with more than four the registers would not suffice
# Clock cycles that a step waits for the matrix unit, shared memory and barriers; for device memory; for the L2 cache.
_LATENCY, _MEMORY_LATENCY, _L2_LATENCY = 600, 1000, 1100
_CLOCK, _BANDWIDTH = 1.75e9, 4.3e12  # cycles, and bytes of device memory, in a second
# Bytes of the L2 cache in a cycle, for one multiprocessor and for all of them. Assumed, as are the latencies.
_L2_RATE, _L2_RATE_OF_ALL = 50, 3100
# Blocks of features × lanes in every slot of the ring, and beside it: h before and after a step.
_INFERENCE = _GATES, 2  # gates in
_FORWARD = _GATES + 1, 2  # gates in; gates and the cell state out
_BACKWARD = _GATES + 2, 0  # gates, the cell state and dy in; dz out in place of the gates


class _Layout(NamedTuple):
  """How sequences lie in (R, W, ·): images of `rows` × `columns`, and for each direction its axis and whether reversed.

  There may be fewer `steps` than columns, and fewer lines than R: what is beyond is padding, of which a direction
  writes as little as suits it.
  """

  images: int
  rows: int
  columns: int
  steps: int
  directions: tuple[tuple[int, bool], ...]

  @property
  def lines(self) -> int:
    return self.images * self.rows

  def has(self, axis: int) -> bool:
    """Whether a direction runs along `axis`: 1 for down and up, 2 for right and left."""
    return any(a == axis for a, _ in self.directions)

  def unit(self, lanes: int) -> int:
    """Adjacent lanes that one copy moves, so that a unit never leaves an image's row."""
    return math.gcd(lanes, mosaic.round_up(self.columns, 8)) if self.has(1) else lanes

  def units(self, unit: int) -> tuple[int, int]:
    """How many units the directions along axis 1, and those along axis 2, have."""
    return self.images * -(-self.columns // unit), -(-self.lines // unit)


class _Plan(NamedTuple):
  """Sizes of a kernel.

  Attributes:
    lanes: sequences of a block.
    slots: of the ring.
    warpgroups: of a block.
    tile: columns of a swizzled tile in shared memory.
    gate_rows: rows that the weights of a gate take where all weights are resident.
    depth: columns of the weights: K rounded up to whole tiles.
    itemsize: bytes of a number.
    resident: tiles of every warpgroup's weights that stay in shared memory, if not all do.
    weight_slots: of every warpgroup's ring for its other tiles; 0 where all weights are resident.
    shared_memory: bytes.
  """

  lanes: int
  slots: int
  warpgroups: int
  tile: int
  gate_rows: int
  depth: int
  itemsize: int
  resident: int = 0
  weight_slots: int = 0
  shared_memory: int = 0

  @property
  def weight_rows(self) -> int:
    return (_GATES - 1) * self.gate_rows + self.warpgroups * _FEATURES

  @property
  def layer(self) -> int:
    """Bytes of one tile of weights, 64 rows × `tile` columns, of each warpgroup: what is resident or copied as one."""
    return self.warpgroups * _FEATURES * self.tile * self.itemsize

  @property
  def parts(self) -> int:
    """Tiles in a block of 64 columns."""
    return _FEATURES // self.tile

  @property
  def streamed(self) -> int:
    """Tiles that each warpgroup copies at every step."""
    return _GATES * self.depth // self.tile - self.resident if self.weight_slots else 0

  def streamed_blocks(self, gate: int) -> range:
    """Which of the blocks that are copied at every step, numbered as they are used, are those of a gate: its first."""
    count = self.streamed // self.parts
    return range(gate * count // _GATES, (gate + 1) * count // _GATES)

  def order(self) -> list[tuple[int, int]]:
    """All tiles, as pairs of their gate and number in it: those copied at every step, then the others."""
    count = self.depth // self.tile
    streamed = [len(self.streamed_blocks(gate)) * self.parts for gate in range(_GATES)]
    tiles = itertools.product(range(_GATES), range(count))
    return sorted(tiles, key=lambda tile: tile[1] >= streamed[tile[0]])  # which keeps their order otherwise


def _plans(hidden: int, itemsize: int, blocks: int, buffers: int) -> Iterator[_Plan]:
  """Plans that fit, with `blocks` blocks of features × lanes in every slot of the ring and `buffers` more of them.

  Where none has room for all weights, every plan keeps as many as fit.
  """
  widest = 128 // itemsize
  warpgroups = -(-hidden // _FEATURES)
  any_resident = False
  sizes = list(itertools.product((8, 16, 32), (2, 3, 4)))
  for lanes, slots in sizes:
    tile = widest if hidden <= widest else math.gcd(hidden, widest)
    depth = mosaic.round_up(hidden, tile)
    plan = _Plan(lanes, slots, warpgroups, tile, mosaic.round_up(hidden, 8), depth, itemsize)
    needed = plan.weight_rows * depth * itemsize + _activations(plan, blocks, buffers)
    if needed <= mosaic.SHARED_MEMORY:
      any_resident = True
      yield plan._replace(shared_memory=needed)
  if any_resident:
    return
  depth = mosaic.round_up(hidden, _FEATURES)
  for (lanes, slots), weight_slots in itertools.product(sizes, (2, 3, 4)):
    plan = _Plan(lanes, slots, warpgroups, widest, 0, depth, itemsize, 0, weight_slots)
    needed = _activations(plan, blocks, buffers)
    resident = ((mosaic.SHARED_MEMORY - needed) // plan.layer - weight_slots) // plan.parts * plan.parts
    plan = plan._replace(resident=resident, shared_memory=needed + (resident + weight_slots) * plan.layer)
    # Wider tiles would not fit the registers, of which a warpgroup has the fewer the more there are.
    if resident > 0 and weight_slots <= plan.streamed and lanes * warpgroups <= 48:
      yield plan


def _activations(plan, blocks, buffers):
  """Bytes of shared memory for all but the weights."""
  block = plan.warpgroups * _FEATURES * plan.lanes
  return (plan.slots * blocks + buffers) * block * plan.itemsize + _RESERVED


def _best_plan(layout: _Layout, hidden: int, itemsize: int, blocks: int, buffers: int) -> _Plan:
  """The plan of the launch that is soonest done."""
  return min(_plans(hidden, itemsize, blocks, buffers), key=lambda plan: (_cycles(layout, plan), -plan.slots))


def _cycles(layout: _Layout, plan: _Plan) -> float:
  """A coarse model of the clock cycles that all blocks take for a step."""
  launched = len(layout.directions) * _tiles(layout, plan)
  registers = 128 * plan.warpgroups * (72 + 4 * plan.lanes)
  at_once = max(1, min(mosaic.SHARED_MEMORY // plan.shared_memory, _REGISTERS // registers))
  sharing = min(at_once, -(-launched // mosaic.MULTIPROCESSORS))
  # A cycle reads 128 bytes of weights, or does 16 of the five transcendental functions of a unit and lane.
  if plan.weight_slots:
    weights = (plan.resident + plan.streamed) * plan.layer
  else:
    weights = plan.weight_rows * plan.depth * plan.itemsize
  functions = 5 / 16 * plan.warpgroups * _FEATURES * plan.lanes
  busy = weights / 128 + functions
  step = max(_LATENCY + busy, sharing * busy)
  if plan.weight_slots:
    ring = plan.weight_slots * plan.layer
    rate = min(_L2_RATE, _L2_RATE_OF_ALL / min(launched, mosaic.MULTIPROCESSORS), ring / _L2_LATENCY)
    # The ring fills while nothing is multiplied, and no further.
    step = max(step, plan.streamed * plan.layer / rate + max(0, _LATENCY + functions - ring / rate))
  step += max(0, _MEMORY_LATENCY - (plan.slots - 1.5) * step)  # fetched so many steps ahead
  return step * -(-launched // (sharing * mosaic.MULTIPROCESSORS))


def _scan_cycles(layout: _Layout, hidden: int, itemsize: int) -> float:
  """Clock cycles that a step of XLA's scan takes at least: to start its kernels, and for device memory.

  At least, as its products are not counted, and 5 µs is the lower end of what is assumed of the former. It reads
  pre-activations, writes the gates in float32 and reads them again, and is about as much for a step of the gradient.
  """
  sequences = sum(layout.lines * layout.columns // layout.steps for _ in layout.directions)
  return _CLOCK * (5e-6 + sequences * _GATES * hidden * (itemsize + 8) / _BANDWIDTH)


def _tiles(layout: _Layout, plan: _Plan) -> int:
  """Blocks that one direction needs."""
  unit = layout.unit(plan.lanes)
  units = max(count for axis, count in zip((1, 2), layout.units(unit), strict=True) if layout.has(axis))
  return -(-units // (plan.lanes // unit))


def _call(body, plan: _Plan, layout: _Layout, dtype, blocks: int, fetched: int, buffers: int, outputs):
  """The kernel with the scratch memory that both passes need; `fetched` of the blocks of a slot come from memory."""
  transforms = (plgpu.TilingTransform((8, plan.tile)), plgpu.SwizzleTransform(plan.tile * dtype.itemsize))
  shared = functools.partial(plgpu.SMEM, dtype=dtype, transforms=transforms)
  block = (plan.warpgroups, plan.lanes, _FEATURES)
  copies = plan.lanes // layout.unit(plan.lanes) * fetched
  scratch = dict(
    ring=shared((plan.slots, blocks, *block)),
    slot_here=plgpu.Barrier(num_barriers=plan.slots * plan.warpgroups, num_arrivals=copies),
    met=plgpu.Barrier(num_arrivals=plan.warpgroups),
  )
  if buffers:
    scratch["h_s"] = shared((buffers, *block))
  if plan.weight_slots:
    weights = plan.warpgroups, _FEATURES, plan.tile
    scratch |= dict(
      w_s=shared((plan.resident, *weights)),
      weights_here=plgpu.Barrier(num_arrivals=plan.resident * plan.warpgroups),
      weight_ring=shared((plan.weight_slots, *weights)),
      weight_slot_here=plgpu.Barrier(num_barriers=plan.weight_slots * plan.warpgroups),
    )
  else:
    scratch |= dict(w_s=shared((plan.weight_rows, plan.depth)), weights_here=plgpu.Barrier())
  return mosaic.kernel(
    body,
    out_type=outputs,
    grid=(len(layout.directions), _tiles(layout, plan)),
    grid_names=("direction", "tile"),
    num_threads=plan.warpgroups,
    thread_name="warpgroup",
    scratch_types=scratch,
    # Approximate tanh is one instruction, right to 2⁻¹¹: as good as bfloat16, not as float32. No barriers beside those
    # written here: a warp overwrites only what it has read itself, and `commit_smem` comes before all other readers.
    compiler_params=plgpu.CompilerParams(approx_math=dtype == jnp.bfloat16, unsafe_no_auto_barriers=True),
  )


def _run_forward(z_RWQK, w_GKF, layout, keep):
  """Hidden states (R, W, G, K); with `keep` also the gates (R, W, Q, K) and the cell states before each step."""
  dtype, hidden = z_RWQK.dtype, w_GKF.shape[1]
  blocks, buffers = _FORWARD if keep else _INFERENCE
  plan = _best_plan(layout, hidden, dtype.itemsize, blocks, buffers)
  state = jax.ShapeDtypeStruct((*z_RWQK.shape[:2], len(layout.directions), hidden), dtype)
  each_unit = functools.partial(_each_unit, layout, plan)

  def lstm_forward(z_g, w_g, y_g, *kept_g, ring, slot_here, met, h_s, **scratch):
    direction, own = lax.axis_index("direction"), lax.axis_index("warpgroup")
    weights = _Weights(plan, layout.steps, w_g.at[direction], own, **scratch)
    features = pl.ds(own * _FEATURES, _FEATURES)

    def fetch(step):
      slot = lax.rem(step, plan.slots)

      def copy(row, column, lanes):
        for q in range(_GATES):
          source, target = z_g.at[row, column, _GATES * direction + q, features], ring.at[slot, q, own, lanes]
          plgpu.copy_gmem_to_smem(source, target, slot_here.at[slot * plan.warpgroups + own])

      each_unit(step, copy)

    def step(t, c):
      last, now, slot = lax.rem(t, 2), lax.rem(t + 1, 2), lax.rem(t, plan.slots)

      def products(*accumulators):
        for gate, accumulator in enumerate(accumulators):
          weights.multiply(t, gate, accumulator, h_s.at[last])
        plgpu.barrier_wait(slot_here.at[slot * plan.warpgroups + own])
        return tuple(accumulator[...] for accumulator in accumulators)

      recurrent = pl.run_scoped(products, *[plgpu.ACC((_FEATURES, plan.lanes))] * _GATES)
      i, f, g, o = (r + _load(ring.at[slot, q, own]) for q, r in enumerate(recurrent))
      i, f, g, o = mosaic.sigmoid(i), mosaic.sigmoid(f), jnp.tanh(g), mosaic.sigmoid(o)
      if keep:
        for n, value in enumerate((i, f, g, o, c)):
          _store(ring.at[slot, n, own], value)
      c = f * c + i * g
      _store(h_s.at[now, own], o * jnp.tanh(c))
      plgpu.commit_smem()
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the step before stored has left its slot

      @pl.when(t + plan.slots - 1 < layout.steps)
      def _():
        fetch(t + plan.slots - 1)

      _meet(met)

      def copy(row, column, lanes):
        plgpu.copy_smem_to_gmem(h_s.at[now, own, lanes], y_g.at[row, column, direction, features])
        if keep:
          gates_g, before_g = kept_g
          for q in range(_GATES):
            target = gates_g.at[row, column, _GATES * direction + q, features]
            plgpu.copy_smem_to_gmem(ring.at[slot, q, own, lanes], target)
          plgpu.copy_smem_to_gmem(ring.at[slot, _GATES, own, lanes], before_g.at[row, column, direction, features])

      each_unit(t, copy, storing=True)
      return c

    weights.begin()
    for step_ahead in range(min(plan.slots - 1, layout.steps)):
      fetch(step_ahead)
    zero = plgpu.layout_cast(jnp.zeros((_FEATURES, plan.lanes), jnp.float32), plgpu.Layout.WGMMA)
    _store(h_s.at[0, own], zero)
    plgpu.commit_smem()
    _meet(met)
    weights.wait()
    lax.fori_loop(0, layout.steps, step, zero)
    plgpu.wait_smem_to_gmem(0)

  outputs = (state, jax.ShapeDtypeStruct(z_RWQK.shape, dtype), state) if keep else (state,)
  weights = _stacked(w_GKF, plan, transposed=True)
  return _call(lstm_forward, plan, layout, dtype, blocks, _GATES, buffers, outputs)(z_RWQK, weights)


def _run_backward(gates_RWQK, before_RWGK, dy_RWGK, w_GKF, layout):
  """The gradient of z: (R, W, Q, K)."""
  dtype = gates_RWQK.dtype
  plan = _best_plan(layout, w_GKF.shape[1], dtype.itemsize, *_BACKWARD)
  each_unit = functools.partial(_each_unit, layout, plan)

  def lstm_backward(gates_g, before_g, dy_g, w_g, dz_g, ring, slot_here, met, **scratch):
    direction, own = lax.axis_index("direction"), lax.axis_index("warpgroup")
    weights = _Weights(plan, layout.steps, w_g.at[direction], own, **scratch)
    features = pl.ds(own * _FEATURES, _FEATURES)

    def fetch(step):
      slot = lax.rem(step, plan.slots)

      def copy(row, column, lanes):
        sources = [gates_g.at[row, column, _GATES * direction + q, features] for q in range(_GATES)]
        sources += [array.at[row, column, direction, features] for array in (before_g, dy_g)]
        for n, source in enumerate(sources):
          target = ring.at[slot, n, own, lanes]
          plgpu.copy_gmem_to_smem(source, target, slot_here.at[slot * plan.warpgroups + own])

      each_unit(layout.steps - 1 - step, copy)

    def step(n, dc):
      slot, last = lax.rem(n, plan.slots), lax.rem(n + plan.slots - 1, plan.slots)

      def products(accumulator):
        for gate in range(_GATES):
          weights.multiply(n, gate, accumulator, ring.at[last, gate])
        plgpu.barrier_wait(slot_here.at[slot * plan.warpgroups + own])
        return accumulator[...]

      dh = pl.run_scoped(products, plgpu.ACC((_FEATURES, plan.lanes)))
      i, f, g, o, before, dy = (_load(ring.at[slot, k, own]) for k in range(_GATES + 2))
      dh = dh + dy
      tanh_c = jnp.tanh(f * before + i * g)
      dc = dc + dh * o * (1 - tanh_c * tanh_c)
      dz = dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)
      for q, value in enumerate(dz):
        _store(ring.at[slot, q, own], value)
      plgpu.commit_smem()
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what the step before stored has left its slot
      _meet(met)  # and no product reads that slot any more

      @pl.when(n + plan.slots - 1 < layout.steps)
      def _():
        fetch(n + plan.slots - 1)

      def copy(row, column, lanes):
        for q in range(_GATES):
          target = dz_g.at[row, column, _GATES * direction + q, features]
          plgpu.copy_smem_to_gmem(ring.at[slot, q, own, lanes], target)

      each_unit(layout.steps - 1 - n, copy, storing=True)
      return dc * f

    weights.begin()
    for step_ahead in range(min(plan.slots - 1, layout.steps)):
      fetch(step_ahead)
    zero = plgpu.layout_cast(jnp.zeros((_FEATURES, plan.lanes), jnp.float32), plgpu.Layout.WGMMA)
    for q in range(_GATES):
      _store(ring.at[plan.slots - 1, q, own], zero)  # where the first step looks for dz of the step after it
    plgpu.commit_smem()
    _meet(met)
    weights.wait()
    lax.fori_loop(0, layout.steps, step, zero)
    plgpu.wait_smem_to_gmem(0)

  weights = _stacked(w_GKF, plan, transposed=False)
  outputs = (jax.ShapeDtypeStruct(gates_RWQK.shape, dtype),)
  kernel = _call(lstm_backward, plan, layout, dtype, _BACKWARD[0], *_BACKWARD, outputs)
  return kernel(gates_RWQK, before_RWGK, dy_RWGK, weights)[0]


class _Weights:
  """The recurrent weights of a warpgroup's hidden units: in shared memory, or copied there at every step."""

  def __init__(self, plan, steps, w_g, own, *, w_s, weights_here, weight_ring=None, weight_slot_here=None):
    self.plan, self.steps, self.w_g, self.own = plan, steps, w_g, own
    self.w_s, self.weights_here, self.ring, self.slot_here = w_s, weights_here, weight_ring, weight_slot_here

  def begin(self):
    """Starts the copies of what stays, and of the first blocks of the first step."""
    if not self.plan.weight_slots:
      pl.when(self.own == 0)(lambda: plgpu.copy_gmem_to_smem(self.w_g, self.w_s, self.weights_here))
      return
    for number in range(self.plan.resident):
      source = self.w_g.at[self.plan.streamed + number, self.own]
      plgpu.copy_gmem_to_smem(source, self.w_s.at[number, self.own], self.weights_here)
    for number in range(self.plan.weight_slots):
      self._fetch(number, number)

  def wait(self):
    """Until all that stays is there."""
    plgpu.barrier_wait(self.weights_here)

  def multiply(self, step, gate, accumulator, x):
    """Adds the product of a gate's weights and x, (blocks of 64 columns, lanes, 64), to the accumulator."""
    plan = self.plan
    if not plan.weight_slots:
      rows = pl.ds(gate * plan.gate_rows + self.own * _FEATURES, _FEATURES)
      for start in range(0, plan.depth, _FEATURES):
        width = min(_FEATURES, plan.depth - start)
        weights, columns = self.w_s.at[rows, pl.ds(start, width)], x.at[start // _FEATURES].at[:, pl.ds(0, width)]
        mosaic.wgmma(accumulator, weights, columns.T)
      return
    streamed = plan.streamed_blocks(gate)

    def copied_block(block, carry):
      for part in range(plan.parts):
        number = step * plan.streamed + (streamed.start + block) * plan.parts + part
        slot = lax.rem(number, plan.weight_slots)
        plgpu.barrier_wait(self._here(slot))
        mosaic.wgmma(accumulator, self.ring.at[slot, self.own], self._tile(x, block, part).T)
        # The barrier of `commit_smem` is meant: all warps have read their rows before one lets them be overwritten.
        plgpu.wgmma_wait(0)
        plgpu.commit_smem()
        later = number + plan.weight_slots
        pl.when(later < self.steps * plan.streamed)(functools.partial(self._fetch, lax.rem(later, plan.streamed), slot))
      return carry

    lax.fori_loop(0, len(streamed), copied_block, None)
    before = gate * plan.depth // plan.tile - streamed.start * plan.parts  # resident tiles of the gates before
    for n in range(plan.depth // plan.tile - len(streamed) * plan.parts):
      block, part = divmod(len(streamed) * plan.parts + n, plan.parts)
      mosaic.wgmma(accumulator, self.w_s.at[before + n, self.own], self._tile(x, block, part).T)

  def _tile(self, x, block, part):
    return x.at[block].at[:, pl.ds(part * self.plan.tile, self.plan.tile)]

  def _fetch(self, number, slot):
    plgpu.copy_gmem_to_smem(self.w_g.at[number, self.own], self.ring.at[slot, self.own], self._here(slot))

  def _here(self, slot):
    return self.slot_here.at[slot * self.plan.warpgroups + self.own]


def _meet(barrier):
  plgpu.barrier_arrive(barrier)
  plgpu.barrier_wait(barrier)


def _load(ref):
  """(lanes, features) in shared memory as (features, lanes) float32 in registers."""
  if ref.dtype == jnp.float32:  # bfloat16 has instructions that transpose on the way, float32 is shuffled after it
    return plgpu.layout_cast(plgpu.load(ref.T, layout=plgpu.Layout.WGMMA_TRANSPOSED), plgpu.Layout.WGMMA)
  return plgpu.load(ref.T, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _store(ref, value):
  """The inverse of `_load`."""
  if ref.dtype == jnp.float32:
    value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
  ref.T[...] = value.astype(ref.dtype)


def _stacked(w_GKF, plan, transposed):
  """Weights in the order in which they are copied; rows are hidden units and columns are gate pre-activations, or the
  other way round if `transposed`.

  Where all are resident: (G, rows, depth), a gate's K rows after the other's, and zeros where K is padded. Else
  (G, tiles in `plan.order`, warpgroups, 64, columns).
  """
  directions, hidden, _ = w_GKF.shape
  w = w_GKF.reshape(directions, hidden, _GATES, hidden).transpose((0, 2, 3, 1) if transposed else (0, 2, 1, 3))
  if plan.weight_slots:
    w = mosaic.pad_axis(mosaic.pad_axis(w, 2, plan.warpgroups * _FEATURES), 3, plan.depth)
    w = w.reshape(directions, _GATES, plan.warpgroups, _FEATURES, -1, plan.tile)
    return jnp.stack([w[:, gate, :, :, number] for gate, number in plan.order()], 1)
  w = mosaic.pad_axis(mosaic.pad_axis(w, 2, plan.gate_rows), 3, plan.depth)
  return mosaic.pad_axis(w.reshape(directions, _GATES * plan.gate_rows, plan.depth), 1, plan.weight_rows)


def _each_unit(layout: _Layout, plan: _Plan, step, copy, *, storing: bool = False) -> None:
  """Calls `copy(row, column, lanes)` for the units of this block at `step`: indices of (R, W) and the place in a tile.

  The last block may have fewer units than the others: it reads the last unit instead of what is missing, and does not
  store it.
  """
  direction, tile = lax.axis_index("direction"), lax.axis_index("tile")
  unit = layout.unit(plan.lanes)
  time = jnp.where(_flag([reverse for _, reverse in layout.directions], direction), layout.steps - 1 - step, step)

  def visit(axis, index):
    number = tile * (plan.lanes // unit) + index
    last = layout.units(unit)[axis - 1] - 1
    present = jnp.minimum(number, last)
    if axis == 1:
      per_image = -(-layout.columns // unit)
      row = lax.div(present, per_image) * layout.rows + time
      column = pl.ds(lax.rem(present, per_image) * unit, unit)
    else:
      row, column = pl.ds(present * unit, unit), time
    lanes = pl.ds(index * unit, unit)
    if storing:
      pl.when(number <= last)(lambda: copy(row, column, lanes))
    else:
      copy(row, column, lanes)

  for index in range(plan.lanes // unit):
    if layout.has(1) and layout.has(2):
      down = _flag([axis == 1 for axis, _ in layout.directions], direction)
      pl.when(down)(functools.partial(visit, 1, index))
      pl.when(jnp.logical_not(down))(functools.partial(visit, 2, index))
    else:
      visit(1 if layout.has(1) else 2, index)


def _flag(flags: list[bool], index):
  """flags[index] for an index that is known only in the kernel."""
  bits = sum(flag << n for n, flag in enumerate(flags))
  return lax.rem(lax.shift_right_logical(jnp.int32(bits), index), 2) == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _padded_recurrence(z_RWQK, w_GKF, layout):
  return _run_forward(z_RWQK, w_GKF, layout, keep=False)[0]


def _forward(z_RWQK, w_GKF, layout):
  y, gates, before = _run_forward(z_RWQK, w_GKF, layout, keep=True)
  return y, (y, gates, before, w_GKF)


def _backward(layout, residuals, dy_RWGK):
  y_RWGK, gates, before, w_GKF = residuals
  dz_RWQK = _run_backward(gates, before, dy_RWGK, w_GKF, layout)
  columns = layout.steps if layout.has(2) else layout.columns  # what lies beyond was not written by every direction
  sizes = layout.images, layout.rows, columns, len(layout.directions)
  y, dz = (a[: layout.lines, :columns].reshape(*sizes, -1) for a in (y_RWGK, dz_RWQK))
  earlier = [_shifted(y[..., g, :], *direction) for g, direction in enumerate(layout.directions)]
  dw = jnp.einsum("bhwgk,bhwgf->gkf", jnp.stack(earlier, 3), dz, preferred_element_type=jnp.float32)
  return dz_RWQK, dw.astype(w_GKF.dtype)


_padded_recurrence.defvjp(_forward, _backward)


def _shifted(y_BHWK, axis, reverse):
  """The state before every step: zero before the first."""
  kept = lax.slice_in_dim(y_BHWK, 1, None, axis=axis) if reverse else lax.slice_in_dim(y_BHWK, 0, -1, axis=axis)
  widths = [(0, 0)] * 4
  widths[axis] = (0, 1) if reverse else (1, 0)
  return jnp.pad(kept, widths)


def recurrence(
  z_BHWF: jax.Array, w_hh_GKF: jax.Array, directions: tuple[tuple[int, bool], ...], unroll: int = 1
) -> jax.Array:
  """Hidden states of every direction, as `xla.recurrence`; float32 products are by TF32.

  Args:
    z_BHWF: gate pre-activations without their recurrent part, direction after direction; float32 or bfloat16. It is
      copied, with zeros, only where the hardware cannot address it: where the features of a gate are no multiple of
      16 bytes (of 32 beyond 128, of 128 where shared memory does not hold all weights), or more than 8 adjacent
      sequences no multiple of 8.
    w_hh_GKF: recurrent weights in z's dtype.
    directions: for each, the axis of z (1 or 2) it runs along and whether in reverse.
    unroll: has no effect.

  Returns:
    (B, H, W, G·K) in z's dtype.

  Raises:
    ValueError: the kernel does not suit the arguments, see `refuse`.
  """
  del unroll
  if (refusal := refuse(z_BHWF.dtype, z_BHWF.shape, w_hh_GKF.shape[1])) is not None:
    raise ValueError(f"lstm: implementation='mosaic' cannot serve: {refusal}")
  return _recurrence(z_BHWF, w_hh_GKF, directions)


def refuse(dtype, shape: tuple[int, ...], hidden: int) -> str | None:
  """Why `recurrence` does not suit an input of `dtype` and `shape` and `hidden` units, in words; None if it does."""
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"it takes float32 or bfloat16, and the input is {dtype}"
  if 0 in shape:
    return f"an input of shape {tuple(shape)} is empty"
  if hidden > _LARGEST:
    return f"it takes up to {_LARGEST} hidden units, whose states fill the registers of a multiprocessor; not {hidden}"
  return None


def outrun(dtype, shape: tuple[int, ...], hidden: int, directions: tuple[tuple[int, bool], ...]) -> str | None:
  """Why XLA's scan is predicted to be faster, in words; None if it is not. For arguments that `refuse` accepts."""
  itemsize = jnp.dtype(dtype).itemsize
  layout, wide = _layout(shape, directions), _padded_hidden(hidden, itemsize)
  scan = _scan_cycles(layout, hidden, itemsize)
  for blocks, buffers in (_FORWARD, _BACKWARD):
    plan = _best_plan(layout, wide, itemsize, blocks, buffers)
    cycles = _cycles(layout, plan)
    if plan.weight_slots and cycles > scan:
      return (
        f"predicted, a step of {hidden} hidden units in {jnp.dtype(dtype)} takes {cycles / _CLOCK * 1e6:.1f} µs, as "
        f"shared memory does not hold all weights, and one of XLA's scan {scan / _CLOCK * 1e6:.1f} µs or more"
      )
  return None


def _recurrence(z_BHWF, w_hh_GKF, directions):
  """`recurrence` for arguments that suit it: zeros fill what the hardware cannot address otherwise."""
  count, hidden, _ = w_hh_GKF.shape
  layout, wide = _layout(z_BHWF.shape, directions), _padded_hidden(hidden, z_BHWF.dtype.itemsize)
  # One column of every image is the same as one row of it, and rows of several images are adjacent.
  columns = math.prod(z_BHWF.shape[1:3]) // layout.rows
  z = z_BHWF.reshape(layout.lines, columns, count * _GATES, hidden)
  # A copy takes eight adjacent rows or columns at a time, unless there are fewer.
  if layout.has(2) and layout.lines > 8:
    z = mosaic.pad_axis(z, 0, mosaic.round_up(layout.lines, 8))
  z = mosaic.pad_axis(mosaic.pad_axis(z, 1, layout.columns), 3, wide)
  w = w_hh_GKF.reshape(count, hidden, _GATES, hidden)
  w = mosaic.pad_axis(mosaic.pad_axis(w, 1, wide), 3, wide).reshape(count, wide, -1)
  y = _padded_recurrence(z, w, layout)[: layout.lines, :columns, :, :hidden]
  return y.reshape(*z_BHWF.shape[:3], count * hidden)


def _layout(shape, directions):
  images, rows, columns, _ = shape
  if columns == 1 and all(axis == 1 for axis, _ in directions):
    rows, columns, directions = 1, rows, tuple((2, reverse) for _, reverse in directions)
  steps = {(rows, columns)[axis - 1] for axis, _ in directions}
  if len(steps) != 1:
    raise ValueError(f"lstm: directions {directions} of an input of shape {shape} differ in length")
  if columns > 8 and any(axis == 1 for axis, _ in directions):
    columns = mosaic.round_up(columns, 8)
  return _Layout(images, rows, columns, *steps, directions)


def _padded_hidden(hidden, itemsize):
  """Addresses are multiples of 16 bytes, and tiles of 32 if one does not hold all of the features; of 128 where weights
  are copied at every step."""
  padded = mosaic.round_up(hidden, (16 if hidden * itemsize <= 128 else 32) // itemsize)
  plans = (plan for kind in (_FORWARD, _BACKWARD) for plan in _plans(padded, itemsize, *kind))
  return mosaic.round_up(hidden, 128 // itemsize) if any(plan.weight_slots for plan in plans) else padded
