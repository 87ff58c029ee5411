"""The Mosaic kernel of kernels.linear_recurrence: interpreted against NumPy's complex128, and compiled for an H200."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from test_linear_recurrence import arrays, numpy_adjoint, numpy_recurrence, parts, run, whole

from kernels import compile, dispatch
from kernels.linear_recurrence import linear_recurrence, mosaic

pytestmark = pytest.mark.timeout(240, method="thread")
needs_compiler = pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")
mosaic_recurrence = functools.partial(linear_recurrence, implementation="mosaic")


def distance(x, truth):
  """Relative to the norm of the truth."""
  return np.linalg.norm(x - truth) / max(np.linalg.norm(truth), 1e-30)


def assert_equals_numpy(x, a, g, reverse, dtype):
  """States and gradients, to 1e-5 in float32 and 1e-2 in bfloat16."""
  x, g = (whole(*parts(value, dtype=dtype)) for value in (x, g))
  h, dx, da = run(parts(x, dtype=dtype), parts(a), g, reverse, "mosaic")
  dx_truth, da_truth = numpy_adjoint(x, a, g, reverse)
  bound = 1e-5 if dtype == jnp.float32 else 1e-2
  assert distance(h, numpy_recurrence(x, a, reverse)) < bound
  assert distance(dx, dx_truth) < bound
  assert distance(da, da_truth) < bound


@pytest.mark.parametrize(
  "shape,per_step,reverse,dtype",
  [
    ((2, 70, 40), False, False, jnp.float32),  # ragged in time and in states
    ((2, 70, 40), False, True, jnp.float32),
    ((2, 70, 40), True, False, jnp.bfloat16),
    ((1, 70, 20), True, True, jnp.float32),
    ((1, 136, 12), False, True, jnp.bfloat16),  # more chunks than the ring has, and no multiple of it
    ((1, 136, 12), True, False, jnp.float32),
    ((2, 64, 32), False, False, jnp.float32),  # digits
    ((1, 64, 64), True, True, jnp.bfloat16),
    ((3, 5, 17), False, False, jnp.bfloat16),  # an odd width, and fewer steps than a chunk has
    ((1, 1, 1), False, False, jnp.float32),
    ((1, 1, 3), True, True, jnp.float32),
  ],
)
def test_equals_numpy_with_gradients(interpreter, monkeypatch, shape, per_step, reverse, dtype):
  monkeypatch.setattr(mosaic, "_MOST_CHUNKS", 3)
  x, a, g = arrays(shape, per_step, seed=sum(shape) + reverse)
  assert_equals_numpy(x, a, g, reverse, dtype)


@pytest.mark.parametrize("reverse", [False, True])
def test_long_sequences_of_slow_states(interpreter, reverse):
  """|a| = 0.9999: errors of powers and of sums must not grow. Four chunks of four quarters of 32 steps."""
  x, a, g = arrays((1, 512, 8), False, seed=1)
  a = (0.9999 * a / np.abs(a)).astype(np.complex64)
  assert_equals_numpy(x, a, g, reverse, jnp.float32)


def test_growing_states_and_states_that_forget_at_once(interpreter):
  x, a, g = arrays((1, 96, 8), False, seed=2)
  a[:4] *= 1.1 / np.abs(a[:4])
  a[4:] = 0
  assert_equals_numpy(x, a, g, False, jnp.float32)


@pytest.mark.parametrize("reverse", [False, True])
def test_steps_know_nothing_of_later_ones(interpreter, reverse):
  """What is not finite stays where it is in time, though parts of a chunk are taken at once."""
  x, a, _ = arrays((1, 64, 8), False, seed=3)
  clean = numpy_recurrence(x, a, reverse)
  spoilt, before = (slice(0, 37), slice(37, None)) if reverse else (slice(37, None), slice(0, 37))
  x[:, spoilt] = np.nan
  h = whole(*mosaic_recurrence(*parts(x), *parts(a), reverse=reverse))
  assert distance(h[:, before], clean[:, before]) < 1e-5
  assert np.isnan(h[:, spoilt]).all()


def test_vmap_over_sequences_and_diagonals(interpreter):
  rng = np.random.RandomState(4)
  x_re, x_im = jnp.asarray(rng.randn(2, 2, 1, 20, 5), jnp.float32)
  a_re, a_im = jnp.asarray(rng.uniform(-0.7, 0.7, (2, 2, 5)), jnp.float32)

  def loss(implementation, *arguments):
    h_re, h_im = jax.vmap(functools.partial(linear_recurrence, implementation=implementation))(*arguments)
    return (h_re**2 + jnp.sin(h_im)).sum()

  every = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
  arguments = (x_re, x_im, a_re, a_im)
  for ours, truth in zip(every("mosaic", *arguments), every("reference", *arguments), strict=True):
    assert distance(np.asarray(ours), np.asarray(truth)) < 1e-5


def test_inside_shard_map(interpreter):
  """On a mesh of one device: the interpreter cannot do more. test_compiled.py has four."""
  x, a, _ = arrays((2, 20, 5), False, seed=5)
  batch, whole_array = PartitionSpec("data"), PartitionSpec()

  def loss(implementation, *arguments):
    sharded = jax.shard_map(
      functools.partial(linear_recurrence, implementation=implementation),
      mesh=Mesh(np.array(jax.devices()[:1]), ("data",)),
      in_specs=(batch, batch, whole_array, whole_array),
      out_specs=batch,
      check_vma=False,
    )
    h_re, h_im = sharded(*arguments)
    return (h_re**2 + jnp.sin(h_im)).sum()

  every = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
  arguments = parts(x, a)
  for ours, truth in zip(every("mosaic", *arguments), every("reference", *arguments), strict=True):
    assert distance(np.asarray(ours), np.asarray(truth)) < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
def test_powers_are_rounded_once(reverse):
  _, a, _ = arrays((1, 1, 200), False, seed=6)
  a = (0.999 * a / np.abs(a)).astype(np.complex64)
  powers = np.asarray(jax.jit(functools.partial(mosaic._powers, quarter=32, reverse=reverse))(parts(a[None, None])))
  for index, steps in enumerate((1, 32, 64, 96)):
    truth = a.astype(np.complex128) ** steps
    for warp in range(4):
      before = 3 - warp if reverse else warp
      needed = steps == 1 or 32 * before >= steps
      power = whole(*powers[index, :, warp])
      np.testing.assert_allclose(power, truth if needed else 0, rtol=0, atol=4.3e-8)


@pytest.mark.parametrize("itemsize", [4, 8, 12, 16])  # of x or x and h, and a varying a, in bfloat16 or float32
def test_tiles(itemsize):
  batches, lengths, widths = (1, 16, 50, 64, 512, 100_000), (1, 64, 70, 784, 1024, 16384), (8, 32, 64, 192, 256, 1000)
  for batch, steps, states in itertools.product(batches, lengths, widths):
    width, quarter, chunks = mosaic._tiling(batch, steps, states, itemsize)
    # Mosaic stores a tile of all states without regard for the end of time.
    assert width in (32, 64) and width != states
    assert quarter in (8, 16, 32) and (steps % quarter == 0 or quarter == 8)
    assert chunks >= min(3, -(-steps // (4 * quarter)))
    together = min(2, -(-batch * -(-states // width) // 132))
    assert together * (chunks * 4 * quarter * width * itemsize + 8 * 1024) <= 232_448


@pytest.mark.parametrize(
  "platform,shape,expected",
  [
    (("gpu",), (2, 5, 3), "mosaic"),
    (("gpu",), (0, 5, 3), "associative"),
    (("gpu", "8.0"), (2, 5, 3), "associative"),
    (("gpu", "10.0"), (2, 5, 3), "associative"),
    (("cpu",), (2, 5, 3), "sequential"),
  ],
)
def test_none_takes_it_where_it_can_serve(platform, shape, expected):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2 + [jax.ShapeDtypeStruct(shape[2:], jnp.float32)] * 2
  with dispatch.recording() as choices, dispatch.compiling_for(*platform):
    jax.eval_shape(lambda *a: linear_recurrence(*a), *arguments)  # a new function: what was traced keeps its choice
  assert list(choices["linear_recurrence"]) == [expected]


@pytest.mark.parametrize(
  "platform,shape,reason",
  [
    (("cpu",), (2, 5, 3), "it needs an NVIDIA Hopper GPU, and this is cpu"),
    (("gpu", "8.0"), (2, 5, 3), "this one has 8.0"),
    (("gpu",), (2, 0, 3), r"at least one state of one step of one sequence, and x has shape \(2, 0, 3\)"),
  ],
)
def test_refuses_and_says_why(platform, shape, reason):
  x, a = jnp.zeros(shape), jnp.zeros(shape[2:])
  with dispatch.compiling_for(*platform), pytest.raises(ValueError, match=f"'mosaic' cannot serve: .*{reason}"):
    mosaic_recurrence(x, x, a, a)


def compiled_gradient(function, shape, a_shape, dtype=jnp.float32):
  x, a = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(a_shape, jnp.float32)

  def loss(*arguments):
    return sum((part.astype(jnp.float32) ** 2).sum() for part in function(*arguments))

  return compile.compile_for_h200(jax.grad(loss, argnums=(0, 1, 2, 3)), x, x, a, a).kernels


@needs_compiler
def test_checkpoint_compiles():
  """The interpreter cannot do it. h is computed again for the sum, so there are as many kernels, or one more."""
  kernels = compiled_gradient(jax.checkpoint(mosaic_recurrence), (2, 256, 64), (64,), jnp.bfloat16)
  assert len(kernels) >= 2 and all(kernel.spilled == 0 for kernel in kernels)


@needs_compiler
def test_vmap_of_vmap_compiles():
  kernels = compiled_gradient(jax.vmap(jax.vmap(mosaic_recurrence)), (2, 3, 2, 256, 64), (2, 3, 64))
  assert all(kernel.spilled == 0 for kernel in kernels)


@needs_compiler
@pytest.mark.parametrize("states", [32, 64])
def test_stores_end_with_the_sequence(states):
  """A whole row of 32 or 64 states must not be stored as contiguous memory: the next sequence follows the last step."""
  for kernel in compiled_gradient(mosaic_recurrence, (2, 70, states), (states,)):
    assert kernel.spilled == 0
    if kernel.instructions:
      assert kernel.instructions["UTMASTG"] == 2
