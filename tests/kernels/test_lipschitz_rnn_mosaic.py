"""The Mosaic kernels of kernels.lipschitz_rnn, interpreted on the CPU with checks for races, and compiled for an H200.

The truth is "reference" in float32, which test_lipschitz_rnn.py checks against NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import kernels.lipschitz_rnn
from kernels import cases, compile, dispatch
from kernels.lipschitz_rnn import shapes

pytestmark = pytest.mark.timeout(240, method="thread")
BOUNDS = {jnp.float32: cases.BOUNDS["tf32"], jnp.bfloat16: cases.BOUNDS["bfloat16"]}


def draw(seed, batch, steps, width, dtype, gated=False):
  """z, A, W and, if wanted, a gate."""
  shape = shapes.Shape(batch, steps, width, gated=gated)
  *inputs, a, w = shapes._draw(shape, np.random.RandomState(seed))
  z, *gate = (jnp.asarray(x, dtype) for x in inputs)
  return (z, jnp.asarray(a, jnp.float32), jnp.asarray(w, jnp.float32), *gate)


def run(implementation, method, last, z, a, w, gate=None):
  return kernels.lipschitz_rnn.lipschitz_rnn(
    z, a, w, epsilon=0.3, method=method, gate_BTD=gate, last=last, implementation=implementation
  )


def with_gradients(function, arrays):
  """The result, and the gradient of a sum weighted at random by all arrays."""

  def loss(*arrays):
    result = function(*arrays)
    weight = np.random.RandomState(9).randn(*result.shape).astype(np.float32)
    return (result.astype(jnp.float32) * weight).sum(), result

  gradients, result = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)
  return result, *gradients


def assert_close(ours, truth, bound):
  for x, y in zip(ours, truth, strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.linalg.norm(x - y) <= bound * np.linalg.norm(y)


def float32(arrays):
  return [x.astype(jnp.float32) for x in arrays]


@pytest.mark.parametrize(
  "method,gated,last,batch,steps,width,dtype",
  [
    # One warpgroup; more steps than slots in the ring, fewer, one.
    ("euler", False, True, 8, 11, 64, jnp.bfloat16),
    ("euler", False, False, 8, 3, 64, jnp.float32),
    ("euler", True, True, 8, 1, 64, jnp.float32),
    ("rk4", False, True, 8, 5, 64, jnp.float32),
    # Batches and widths that are no multiples; two blocks.
    ("euler", False, False, 13, 6, 100, jnp.bfloat16),
    ("euler", True, False, 3, 7, 40, jnp.bfloat16),
    ("midpoint", False, False, 3, 5, 70, jnp.float32),
    # Two, three and four warpgroups.
    ("midpoint", False, True, 8, 6, 128, jnp.bfloat16),
    ("euler", True, True, 8, 6, 128, jnp.float32),
    ("rk4", False, False, 8, 2, 128, jnp.bfloat16),
    ("euler", False, True, 5, 6, 192, jnp.bfloat16),
    ("euler", True, False, 8, 4, 256, jnp.bfloat16),
    ("midpoint", False, True, 8, 3, 256, jnp.bfloat16),
  ],
)
def test_equals_the_reference_with_gradients(interpreter, method, gated, last, batch, steps, width, dtype):
  arrays = draw(batch + steps, batch, steps, width, dtype, gated)
  ours = with_gradients(functools.partial(run, "mosaic", method, last), arrays)
  assert [x.dtype for x in ours[1:]] == [x.dtype for x in arrays]
  assert ours[0].dtype == (jnp.float32 if last else dtype)
  truth = with_gradients(functools.partial(run, "reference", method, last), float32(arrays))
  assert_close(ours, truth, BOUNDS[dtype])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("last", [False, True])
def test_without_gradient(interpreter, seed, last):
  """Another kernel, which keeps no states that are not wanted."""
  arrays = draw(seed, 16, 9, 64, jnp.bfloat16)
  truth = run("reference", "euler", last, *float32(arrays))
  assert_close([run("mosaic", "euler", last, *arrays)], [truth], 1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tile", [16, 32])
def test_wide_tiles(interpreter, monkeypatch, tile, dtype):
  """As for batches that need several waves of blocks: the last tile is not full."""
  monkeypatch.setattr("kernels.mosaic.MULTIPROCESSORS", 1)
  monkeypatch.setattr("kernels.lipschitz_rnn.mosaic.WIDEST_TILE", {64: tile})
  arrays = draw(tile, 40, 4, 64, dtype)
  ours = with_gradients(functools.partial(run, "mosaic", "euler", False), arrays)
  assert_close(
    ours, with_gradients(functools.partial(run, "reference", "euler", False), float32(arrays)), BOUNDS[dtype]
  )


def test_not_a_number_stays_in_its_example(interpreter):
  for dtype in (jnp.float32, jnp.bfloat16):
    z, a, w = draw(0, 8, 5, 64, dtype)
    states = run("mosaic", "euler", False, z.at[2, 3, 1].set(jnp.nan), a, w)
    clean = run("mosaic", "euler", False, z, a, w)
    bad = np.isnan(np.asarray(states, np.float32))
    assert bad[2, 3].sum() == 1 and bad[2, 4].all() and bad.sum() == 65
    np.testing.assert_array_equal(np.where(bad, 0, states), np.where(bad, 0, clean))


def test_vmap_and_jit(interpreter):
  z, a, w = draw(1, 16, 5, 64, jnp.float32)
  mapped = jax.vmap(functools.partial(run, "mosaic", "euler", True), in_axes=(0, None, None))
  ours = with_gradients(jax.jit(mapped), (z.reshape(2, 8, 5, 64), a, w))
  truth = with_gradients(functools.partial(run, "reference", "euler", True), (z, a, w))
  # The weights of the sum are drawn in the same order whatever the shape.
  assert_close([x.reshape(y.shape) for x, y in zip(ours, truth, strict=True)], truth, 1e-3)


def test_shard_map(interpreter):
  arrays = draw(2, 8, 5, 64, jnp.float32)
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  split = PartitionSpec("data")
  mapped = jax.shard_map(
    functools.partial(run, "mosaic", "euler", True),
    mesh=mesh,
    in_specs=(split, PartitionSpec(), PartitionSpec()),
    out_specs=split,
    check_vma=False,
  )
  truth = with_gradients(functools.partial(run, "reference", "euler", True), arrays)
  assert_close(with_gradients(jax.jit(mapped), arrays), truth, 1e-3)


@pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")
@pytest.mark.parametrize(
  "batch,method,gated,width,dtype",
  [
    (3, "rk4", False, 256, jnp.bfloat16),
    (2008, "euler", True, 256, jnp.bfloat16),
    (2008, "rk4", False, 192, jnp.bfloat16),
    (4100, "rk4", False, 128, jnp.bfloat16),
    (4100, "midpoint", False, 100, jnp.float32),
  ],
)
def test_any_batch_compiles_under_checkpoint(batch, method, gated, width, dtype):
  spec = jax.ShapeDtypeStruct((batch, 20, width), dtype)
  matrix = jax.ShapeDtypeStruct((width, width), jnp.float32)

  @jax.checkpoint
  def loss(*arrays):
    return (run("mosaic", method, True, *arrays) ** 2).sum()

  arguments = (spec, matrix, matrix) + (spec,) * gated
  program = compile.compile_for_h200(jax.grad(loss, argnums=tuple(range(len(arguments)))), *arguments)
  assert {kernel.name for kernel in program.kernels} == {"lipschitz_rnn_forward", "lipschitz_rnn_adjoint"}
  for kernel in program.kernels:
    assert kernel.spilled == 0 and not kernel.warnings, kernel


@pytest.mark.parametrize(
  "width,dtype,message",
  [
    (129, jnp.float32, "A and W of 129 hidden units in float32 do not fit a multiprocessor, which holds 128 at most"),
    (257, jnp.bfloat16, "A and W of 257 hidden units in bfloat16 do not fit a multiprocessor, which holds 256 at most"),
    (64, jnp.float16, "the dtype is float16, and it serves float32 and bfloat16"),
  ],
)
def test_refusals_say_why(width, dtype, message):
  z, matrix = jnp.zeros((8, 3, width), dtype), jnp.zeros((width, width))
  with dispatch.compiling_for("gpu"), pytest.raises(ValueError, match=message):
    run("mosaic", "euler", True, z, matrix, matrix)
  with dispatch.compiling_for("gpu"), dispatch.recording() as choices:
    jax.eval_shape(functools.partial(run, None, "euler", True), z, matrix, matrix)
  assert choices == {"lipschitz_rnn": {"xla": f"no mosaic: {message}"}}


@pytest.mark.parametrize(
  "device,chosen",
  [(("gpu", "9.0"), "mosaic"), (("gpu", "8.0"), "xla"), (("gpu", "10.0"), "xla"), (("cpu",), "xla")],
)
def test_none_takes_mosaic_on_hopper_alone(device, chosen):
  specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in draw(0, 8, 3, 64, jnp.bfloat16)]
  with dispatch.compiling_for(*device), dispatch.recording() as choices:
    jax.eval_shape(functools.partial(run, None, "euler", True), *specs)
  assert list(choices["lipschitz_rnn"]) == [chosen]
