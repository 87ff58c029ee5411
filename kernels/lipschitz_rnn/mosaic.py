"""The recurrence, and its backward pass, as one Mosaic GPU kernel each: all steps of all examples in one launch.

A block has a tile of the batch, and one warpgroup for every 64 hidden units. The products are taken with the matrices
on the left, (h A)ᵀ = Aᵀ hᵀ, so that the batch tile is the wgmma's short side, which may be as narrow as 8: many blocks,
and short steps. A thread keeps the same hidden units of the same examples throughout, so the state stays float32 in
registers; shared memory holds its rounded copy, which the next product reads and which leaves for device memory as it
is. The inputs of the next steps stream into a ring of buffers.

The kernel of the backward pass does the sequential part that `rule` describes: it reads the α_i and β_i of all steps
and writes the κ_i.

bfloat16: products of bfloat16 with float32 sums, and the GPU's approximate tanh (to 2⁻¹¹). float32: products in TF32,
operands rounded to nearest, and an exact tanh; all states, where they are wanted, are those rounded ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import dispatch, mosaic
from kernels.lipschitz_rnn import rule

BATCH_TILES = (8, 16, 32)  # examples in a block
WIDEST_TILE = {64: 32, 128: 32, 192: 16, 256: 8}  # by D; more do not fit the registers
# Copies of what products read, in turn: read now, being written, and on its way to device memory. It must not
# divide any method's number of stages, lest the compiler keep the addresses of every stage's copies in registers.
BUFFERS = 3
SLOTS = (4, 3, 2)  # steps whose inputs are on their way or in use; the most that fit
LARGEST_WIDTH = {jnp.dtype(jnp.bfloat16): 256, jnp.dtype(jnp.float32): 128}


def refuse(z_BTD: jax.Array) -> str | None:
  """Why the kernels do not suit these inputs; None if they do. Every method and the gate are served."""
  largest = LARGEST_WIDTH.get(z_BTD.dtype)
  if largest is None:
    return f"the dtype is {z_BTD.dtype}, and it serves float32 and bfloat16"
  width = z_BTD.shape[-1]
  if width > largest:
    return (
      f"A and W of {width} hidden units in {z_BTD.dtype} do not fit a multiprocessor, which holds {largest} at most"
    )
  return None


def recurrence(
  z_BTD: jax.Array, gate_BTD: jax.Array | None, a_DD: jax.Array, w_DD: jax.Array, settings: rule.Settings
) -> jax.Array:
  """Arguments and result as of `xla.recurrence` (`settings.unroll` has no effect); refuses nothing by itself."""
  batch, _, width = z_BTD.shape
  # Hidden units and examples that are not there have no input, so they stay 0, and so do their gradients.
  units, examples = mosaic.round_up(width, mosaic.WARPGROUP_ROWS), mosaic.round_up(batch, BATCH_TILES[0])
  pad = lambda x: mosaic.pad_axis(x, x.ndim - 1, units)
  z, gate = (None if x is None else mosaic.pad_axis(pad(x), 0, examples) for x in (z_BTD, gate_BTD))
  a, w = (mosaic.pad_axis(pad(x), 0, units) for x in (a_DD, w_DD))
  return _recurrence(z, gate, a, w, settings)[:batch, ..., :width]


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How a kernel's work is laid out.

  Attributes:
    width: D, a multiple of 64.
    dtype: of the operands.
    tile: examples in a block.
    slots: steps in the ring of inputs.
    in_registers: whether A and W, in this order, are operands in registers; else they are in shared memory.
  """

  width: int
  dtype: jnp.dtype
  tile: int
  slots: int
  in_registers: tuple[bool, bool]

  @property
  def groups(self) -> int:
    """Warpgroups of a block."""
    return self.width // mosaic.WARPGROUP_ROWS

  def buffers(self, count: int, dtype=None):
    """`count` shared arrays of (tile, D)."""
    dtype = dtype or self.dtype
    return plgpu.SMEM((count, self.tile, self.width), dtype, transforms=mosaic.swizzled(self.width, dtype))

  def scratch(self, states: int, streams: int, edge: bool) -> dict:
    """Shared memory and barriers of a kernel with `states` operands in turn and `streams` inputs of every step."""
    scratch = dict(
      states=self.buffers(BUFFERS * states),
      ring=self.buffers(self.slots * streams),
      full=plgpu.Barrier(num_arrivals=streams, num_barriers=self.slots),
    )
    if self.groups > 1:
      scratch["met"] = plgpu.Barrier(num_arrivals=self.groups)
    if self.in_registers.count(False):
      shape = (self.in_registers.count(False), self.width, self.width)
      scratch["matrices"] = plgpu.SMEM(shape, self.dtype, transforms=mosaic.swizzled(self.width, self.dtype))
      scratch["loaded"] = plgpu.Barrier(num_arrivals=shape[0])
    if edge:
      scratch["edge"] = self.buffers(1, jnp.float32)
    return scratch


def _layout(batch: int, width: int, dtype, states: int, streams: int) -> _Layout:
  """The narrowest tile with which all blocks run at once, for short steps; else the widest that fits."""
  # The interpreter knows no operands in registers, and TF32 has none.
  possible = dtype == jnp.bfloat16 and not dispatch.interpreted()
  in_registers = (possible, possible and width <= 192)
  at_once = [tile for tile in BATCH_TILES if -(-batch // tile) <= mosaic.MULTIPROCESSORS]
  widest = min([WIDEST_TILE[width], *at_once])
  itemsize = jnp.dtype(dtype).itemsize
  matrices = 0 if dispatch.interpreted() else in_registers.count(False) * width * width * itemsize
  for tile in reversed([tile for tile in BATCH_TILES if tile <= widest]):
    for slots in SLOTS:
      needed = matrices + tile * width * ((BUFFERS * states + slots * streams) * itemsize + 4) + 1024
      if needed <= mosaic.SHARED_MEMORY:
        return _Layout(width, jnp.dtype(dtype), tile, slots, in_registers)
  raise AssertionError(f"{width} hidden units in {dtype} need {needed} bytes")


class _Block:
  """What both kernels do in a block: operands, the ring of inputs, meetings of the warpgroups, shared states."""

  def __init__(self, layout, inputs, matrices, scratch):
    self.layout, self.inputs, self.matrices, self.scratch = layout, inputs, matrices, scratch
    self.group = lax.axis_index("group")
    self.rows = pl.ds(lax.axis_index("block") * layout.tile, layout.tile)
    self.units = pl.ds(self.group * mosaic.WARPGROUP_ROWS, mosaic.WARPGROUP_ROWS)

  def operands(self):
    """This warpgroup's rows of both matrices, as left operands of its products."""
    operands, shared = [], 0
    for matrix, in_registers in zip(self.matrices, self.layout.in_registers, strict=True):
      if in_registers:  # read once, so it does not matter that single reads are narrow
        operands.append(plgpu.load(matrix.at[self.units], layout=plgpu.Layout.WGMMA, optimized=False))
        continue
      target = self.scratch["matrices"].at[shared]
      self.first(lambda matrix=matrix, target=target: plgpu.copy_gmem_to_smem(matrix, target, self.scratch["loaded"]))
      operands.append(target.at[self.units])
      shared += 1
    if shared:
      plgpu.barrier_wait(self.scratch["loaded"])
    return operands

  def first(self, function):
    """Runs `function` in the first warpgroup."""
    pl.when(self.group == 0)(function)

  def fetch(self, time, slot):
    """Starts copying the inputs of a step into a slot of the ring; for the first warpgroup."""
    for index, array in enumerate(self.inputs):
      target = self.scratch["ring"].at[slot * len(self.inputs) + index]
      plgpu.copy_gmem_to_smem(array.at[self.rows, time], target, self.scratch["full"].at[slot])

  def arrived(self, slot):
    """Waits for the inputs in a slot. Returns a function of an input's index that reads it, (64, tile) float32."""
    plgpu.barrier_wait(self.scratch["full"].at[slot])
    return lambda index: self.load(self.scratch["ring"].at[slot * len(self.inputs) + index])

  def load(self, ref):
    """This warpgroup's units of a (tile, D) array, (64, tile) float32."""
    x = plgpu.load(ref.at[:, self.units].T, layout=_transposing(ref.dtype)).astype(jnp.float32)
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA)

  def store(self, ref, value):
    """The inverse of `load`, rounded to the array's dtype."""
    value = value.astype(ref.dtype)
    ref.at[:, self.units].T[...] = plgpu.layout_cast(value, _transposing(ref.dtype))

  def write(self, index, value):
    """Puts this warpgroup's units into a shared state, rounded to what a product takes."""
    if self.layout.dtype == jnp.float32:
      value = _round_to_tf32(value)
    self.store(self.scratch["states"].at[index], value)

  def meet(self):
    """Waits for all warpgroups; what they wrote is then seen by products and copies."""
    plgpu.commit_smem()
    if self.layout.groups > 1:
      plgpu.barrier_arrive(self.scratch["met"])
      plgpu.barrier_wait(self.scratch["met"])


def _transposing(dtype):
  """The layout of registers in which a transposed array can be read and written; 16 bits have instructions for it."""
  return plgpu.Layout.WGMMA if jnp.dtype(dtype).itemsize == 2 else plgpu.Layout.WGMMA_TRANSPOSED


def _call(body, layout, batch, out_type, scratch, arrays):
  return mosaic.kernel(
    body,
    out_type=out_type,
    grid=(-(-batch // layout.tile),),
    grid_names=("block",),
    num_threads=layout.groups,
    thread_name="group",
    scratch_types=scratch,
    compiler_params=plgpu.CompilerParams(approx_math=layout.dtype == jnp.bfloat16),
  )(*arrays)


def _forward(z_BTD, gate_BTD, a_DD, w_DD, settings, keep):
  batch, steps, width = z_BTD.shape
  method, dtype = rule.METHODS[settings.method], z_BTD.dtype
  inputs = [x for x in (z_BTD, gate_BTD) if x is not None]
  layout = _layout(batch, width, dtype, 1, len(inputs))
  stages = len(method.weights)
  stored = keep or not settings.last
  ahead = int(settings.last)  # a state is stored at the step that starts from it, or at that which ends with it

  def lipschitz_rnn_forward(*refs, **scratch):
    z_and_gate, matrices, outputs = refs[: len(inputs)], refs[len(inputs) : len(inputs) + 2], refs[len(inputs) + 2 :]
    block = _Block(layout, z_and_gate, matrices, scratch)
    states = scratch["states"]

    @block.first
    def _():
      for slot in range(min(layout.slots, steps)):
        block.fetch(slot, slot)

    a, w = block.operands()
    zero = plgpu.layout_cast(jnp.zeros((mosaic.WARPGROUP_ROWS, layout.tile), jnp.float32), plgpu.Layout.WGMMA)
    block.write(0, zero)
    block.meet()
    if stored and ahead:
      block.first(lambda: plgpu.copy_smem_to_gmem(states.at[0], outputs[0].at[block.rows, 0]))

    def step(t, h):
      slot, ks, inputs_now = lax.rem(t, layout.slots), [], None
      for stage in range(stages):
        turn = t * stages + stage
        source, target = lax.rem(turn, BUFFERS), lax.rem(turn + 1, BUFFERS)

        def products(by_a, by_w, source=source, stage=stage):
          mosaic.wgmma(by_w, w, states.at[source].T)
          mosaic.wgmma(by_a, a, states.at[source].T)
          now = [] if stage else [*map(block.arrived(slot), range(len(inputs)))]  # while the products run
          return by_a[...], by_w[...], now

        accumulator = plgpu.ACC((mosaic.WARPGROUP_ROWS, layout.tile))
        ha, hw, now = pl.run_scoped(products, accumulator, accumulator)
        z, *gate = inputs_now = inputs_now or now
        k = ha + jnp.tanh(hw + z)
        ks.append(k * mosaic.sigmoid(hw + gate[0]) if gate else k)
        coefficients = method.weights if stage + 1 == stages else method.nodes[stage + 1]
        m = h + settings.epsilon * rule.weighted(coefficients, ks)
        block.write(target, m)
        # The copy that was started two stages ago, or before, must have left before what it reads is overwritten.
        if stored and stage == min(1, stages - 1):
          block.first(lambda: plgpu.wait_smem_to_gmem(int(stages == 1), wait_read_only=True))
        block.meet()

      @block.first
      def _():
        if stored:

          @pl.when(t + ahead < steps)
          def _():
            plgpu.copy_smem_to_gmem(states.at[target], outputs[0].at[block.rows, t + ahead])

        @pl.when(t + layout.slots < steps)
        def _():
          block.fetch(t + layout.slots, slot)

      return m

    h = lax.fori_loop(0, steps, step, zero)
    if settings.last:
      edge = scratch["edge"].at[0]
      block.store(edge, h)
      block.meet()
      block.first(lambda: plgpu.copy_smem_to_gmem(edge, outputs[-1].at[block.rows]))
    block.first(lambda: plgpu.wait_smem_to_gmem(0))

  out_type = [jax.ShapeDtypeStruct(z_BTD.shape, dtype)] * stored
  out_type += [jax.ShapeDtypeStruct((batch, width), jnp.float32)] * settings.last
  arrays = *inputs, *_matrices(dtype, a_DD.T, w_DD.T)
  scratch = layout.scratch(1, len(inputs), settings.last)
  results = _call(lipschitz_rnn_forward, layout, batch, out_type, scratch, arrays)
  return results[-1], results[0] if stored and settings.last else None


def _adjoint(d, alphas, betas, a_DD, w_DD, settings):
  batch, steps, width = betas[0].shape
  method, dtype, stages = rule.METHODS[settings.method], betas[0].dtype, len(betas)
  inputs = [*betas, *(alphas or ()), *(() if settings.last else (d,))]
  kept = 3 if alphas else 2  # operands: κ α, κ β, and where α is not 1 also κ, which is the result
  layout = _layout(batch, width, dtype, kept, len(inputs))

  def lipschitz_rnn_adjoint(*refs, **scratch):
    factors, others = refs[: len(inputs)], refs[len(inputs) :]
    matrices, outputs = others[:2], others[-stages:]
    block = _Block(layout, factors, matrices, scratch)
    states = scratch["states"]

    @block.first
    def _():
      for slot in range(min(layout.slots, steps)):
        block.fetch(steps - 1 - slot, slot)

    delta = plgpu.layout_cast(jnp.zeros((mosaic.WARPGROUP_ROWS, layout.tile), jnp.float32), plgpu.Layout.WGMMA)
    if settings.last:
      edge = scratch["edge"].at[0]
      block.first(lambda: plgpu.copy_gmem_to_smem(others[2].at[block.rows], edge, scratch["edge_loaded"]))
      plgpu.barrier_wait(scratch["edge_loaded"])
      delta = block.load(edge)
    a, w = block.operands()

    def step(j, delta):
      slot, t = lax.rem(j, layout.slots), steps - 1 - j
      read = block.arrived(slot)
      if not settings.last:
        delta = delta + read(len(inputs) - 1)
      mu = []
      for index in reversed(range(stages)):
        first = kept * lax.rem(j * stages + stages - 1 - index, BUFFERS)
        kappa = rule.adjoint_stage(method, index, delta, mu)
        block.write(first, kappa * read(stages + index) if alphas else kappa)
        block.write(first + 1, kappa * read(index))
        if alphas:
          block.write(first + 2, kappa)
        # The copy that was started two stages ago must have left before what it reads is overwritten.
        block.first(lambda: plgpu.wait_smem_to_gmem(1, wait_read_only=True))
        block.meet()

        @block.first
        def _(index=index, first=first):
          result = states.at[first + 2 if alphas else first]
          plgpu.copy_smem_to_gmem(result, outputs[index].at[block.rows, t])
          if index == 0:  # all warpgroups have read the slot

            @pl.when(j + layout.slots < steps)
            def _():
              block.fetch(t - layout.slots, slot)

        def products(total, first=first):
          mosaic.wgmma(total, a, states.at[first].T)
          mosaic.wgmma(total, w, states.at[first + 1].T)
          return total[...]

        total = pl.run_scoped(products, plgpu.ACC((mosaic.WARPGROUP_ROWS, layout.tile)))
        mu.insert(0, settings.epsilon * total)
      return delta + rule.weighted((1,) * stages, mu)

    lax.fori_loop(0, steps, step, delta)
    block.first(lambda: plgpu.wait_smem_to_gmem(0))

  out_type = [jax.ShapeDtypeStruct(betas[0].shape, dtype)] * stages
  arrays = (*inputs, *_matrices(dtype, a_DD, w_DD), *((d,) if settings.last else ()))
  scratch = layout.scratch(kept, len(inputs), settings.last)
  if settings.last:
    scratch["edge_loaded"] = plgpu.Barrier()
  return _call(lipschitz_rnn_adjoint, layout, batch, out_type, scratch, arrays)


def _matrices(dtype, *matrices):
  return [_round_to_tf32(m.astype(dtype)) if dtype == jnp.float32 else m.astype(dtype) for m in matrices]


def _round_to_tf32(x):
  """To the nearest number of 11 significant bits; the tensor cores would cut the others off, which is biased."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return jnp.where(x == x, lax.bitcast_convert_type((bits + 0x1000) & ~0x1FFF, jnp.float32), x)


_recurrence = rule.differentiable(_forward, _adjoint)
