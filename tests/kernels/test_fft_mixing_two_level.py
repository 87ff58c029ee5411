"""The two-level form of kernels.fft_mixing: interpreted with small factors against NumPy in float64, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from mixing import BOUNDS, error, every_dtype, normal, on_kernel, truth

from kernels import compile, dispatch, mosaic
from kernels.fft_mixing import fft_mixing, two_level

pytestmark = pytest.mark.timeout(240, method="thread")


@pytest.fixture
def split(monkeypatch):
  """Sets the factors of the length: real ones take minutes in the interpreter."""
  return lambda first, second: monkeypatch.setattr(two_level, "factors", lambda length: (first, second))


@pytest.fixture
def one_block(monkeypatch):
  """All samples of a tile in one block."""
  monkeypatch.setattr(two_level, "_BLOCKS", 1)


@every_dtype
@pytest.mark.parametrize("batch,first,second,width", [(1, 8, 8, 128), (1, 8, 4, 256)])
def test_equals_numpy(interpreter, split, dtype, batch, first, second, width):
  split(first, second)
  x = normal((batch, first * second, width), dtype, first + second + width)
  y = jax.jit(on_kernel)(x)
  assert y.dtype == dtype
  assert error(y, truth(x)) < BOUNDS[dtype]


def test_gradient_is_the_operation_itself(interpreter, split):
  split(8, 4)
  x, g = normal((1, 32, 128), jnp.bfloat16, 1), normal((1, 32, 128), jnp.bfloat16, 2)
  dx = jax.jit(lambda x, g: jax.vjp(on_kernel, x)[1](g)[0])(x, g)
  assert dx.dtype == jnp.bfloat16
  assert error(dx, truth(g)) < BOUNDS[jnp.bfloat16]


def level_1(w_BJME):
  """t of `two_level` from w, both complex, for all residues m of n: (B, R, M, E)."""
  _, first, second, _ = w_BJME.shape
  j, m, r = np.arange(first), np.arange(second), np.arange(first)
  angles_RJM = 2 * np.pi / (first * second) * r[:, None, None] * (second * j[:, None] + m)
  return np.einsum("rjm,bjme->brme", np.exp(-1j * angles_RJM), w_BJME)


def packed(t_BRME):
  """The real numbers of t that level 2 sums, and in the order in which it does: (B, R, O, E)."""
  half = t_BRME.shape[2] // 2
  return np.concatenate([t_BRME[:, :, : half + 1].real, -t_BRME[:, :, 1:half].imag], axis=2)


def transformed(x_BLD, first, second):
  """The real numbers of t for x, doubled, as level 1 makes them: (B, R, O, E) for E < 80."""
  batch, _, width = x_BLD.shape
  even = x_BLD + np.roll(np.flip(x_BLD, (1, 2)), 1, (1, 2))
  w_BLE = np.fft.fft(even, axis=2)[:, :, : width // 2 + 1]
  w_BLE = np.pad(w_BLE, [(0, 0)] * 2 + [(0, 15)])
  return packed(level_1(w_BLE.reshape(batch, first, second, -1)))


@every_dtype
@pytest.mark.parametrize("batch,first,second", [(1, 72, 2), (3, 8, 2)])
def test_level_1_with_many_steps(interpreter, one_block, dtype, batch, first, second):
  """More of them than the ring has slots, and several tiles of rows and of what is summed."""
  x = np.random.RandomState(first).randn(batch, first * second, 128)

  @jax.jit
  def run(x):
    matrices = two_level._width_matrices(128, dtype), two_level._first_matrices(first, second, dtype)
    return two_level._level_1(*matrices, two_level._folded(x, first, second), first, 80)

  t_PBROE = np.asarray(run(jnp.asarray(x, dtype)), np.float64)
  assert error(t_PBROE.sum(0)[..., :65], transformed(x, first, second)[..., :65]) < BOUNDS[dtype]


@every_dtype
@pytest.mark.parametrize("batch,first,second", [(1, 3, 72), (6, 2, 8)])
def test_level_2_with_many_steps(interpreter, one_block, dtype, batch, first, second):
  """More of them than the ring has slots, and several tiles of rows and of what is summed."""
  x = np.random.RandomState(second).randn(batch, first * second, 128)
  t_BROE = jnp.asarray(transformed(x, first, second), jnp.float32)

  @jax.jit
  def run(t):
    return two_level._level_2(two_level._second_matrices(second, dtype), t, 128, dtype)

  y_BSRD = run(jnp.stack(two_level._parts(t_BROE, dtype)))
  assert y_BSRD.dtype == dtype
  assert error(y_BSRD.reshape(x.shape), truth(x)) < BOUNDS[dtype]


def test_nothing_of_a_sample_reaches_another(interpreter, split, one_block):
  """Not even a NaN, and every sample is as if it were alone."""
  split(8, 4)
  x = normal((3, 32, 128), jnp.bfloat16, 3)
  y = jax.jit(on_kernel)(x.at[1].set(jnp.nan))
  assert np.isnan(np.asarray(y[1], np.float64)).all()
  for sample in (0, 2):
    assert error(y[sample], truth(x)[sample]) < BOUNDS[jnp.bfloat16]


def test_a_wave_has_one_frequency(interpreter, split):
  """cos(2π(5n/L + 5d/D)) gives LD/2 at (5, 5) and its mirror image, nothing elsewhere: no bin is out of place."""
  split(8, 4)
  n, d = np.arange(32)[:, None], np.arange(128)
  x = jnp.asarray(np.cos(2 * np.pi * (5 * n / 32 + 5 * d / 128))[None], jnp.float32)
  y = np.asarray(jax.jit(on_kernel)(x))[0]
  expected = np.zeros((32, 128))
  expected[5, 5] = expected[-5, -5] = 32 * 128 / 2
  np.testing.assert_allclose(y, expected, atol=2e-3 * 32 * 128 / 2)


def test_vmap(interpreter, split):
  split(8, 4)
  x = normal((2, 1, 32, 128), jnp.bfloat16, 5)
  assert error(jax.jit(jax.vmap(on_kernel))(x), truth(x)) < BOUNDS[jnp.bfloat16]


def test_a_mesh_of_one_device(interpreter, split):
  split(8, 4)
  x, spec = normal((1, 32, 128), jnp.bfloat16, 6), PartitionSpec("data")
  mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
  mapped = jax.shard_map(on_kernel, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  assert error(jax.jit(mapped)(x), truth(x)) < BOUNDS[jnp.bfloat16]


def test_factors_of_every_length_that_is_served():
  served = [length for length in range(1, 40000) if two_level.factors(length)]
  assert served == [*range(2560, 8193, 512), *range(9216, 16385, 1024)]
  for length in served:
    first, second = two_level.factors(length)
    assert first * second == length and first in (64, 128) and second % 8 == 0 and second <= 128


@pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")
@pytest.mark.parametrize("length", [2560, 8192, 9216, 16384])
@every_dtype
def test_the_ends_of_the_ranges_compile(length, dtype):
  """The shapes that tests/kernels/test_compiled.py compiles lie between; by tensor copies only, see docs/kernels.md."""
  program = compile.compile_for_h200(on_kernel, jax.ShapeDtypeStruct((3, length, 384), dtype))
  assert {"fft_mixing_level_1", "fft_mixing_level_2"} <= {kernel.name for kernel in program.kernels}
  for kernel in program.kernels:
    assert kernel.spilled == 0 and not [line for line in kernel.warnings if "C7510" in line], kernel
    assert kernel.shared_memory is None or kernel.shared_memory <= mosaic.SHARED_MEMORY, kernel


@pytest.mark.parametrize(
  "length,dtype,expected,reason",
  [
    (2560, jnp.bfloat16, "mosaic", "suit"),
    (4096, jnp.bfloat16, "mosaic", "suit"),
    (16384, jnp.bfloat16, "mosaic", "suit"),
    (4096, jnp.float32, "xla", "TF32"),
    (4100, jnp.bfloat16, "xla", "4100 tokens, not a multiple of 512 from 2560 to 8192 or of 1024 to 16384"),
    (2304, jnp.bfloat16, "xla", "2304 tokens, not a multiple"),
    (32768, jnp.bfloat16, "xla", "32768 tokens, not a multiple"),
  ],
)
def test_default_takes_two_levels_in_bfloat16(length, dtype, expected, reason):
  with dispatch.compiling_for("gpu"), dispatch.recording() as choices:
    jax.make_jaxpr(lambda x: fft_mixing(x))(jax.ShapeDtypeStruct((2, length, 256), dtype))
  ((name, why),) = choices["fft_mixing"].items()
  assert name == expected and reason in why


@pytest.mark.parametrize("length,reason", [(9000, "9000 tokens, not a multiple"), (32768, "32768 tokens, not")])
def test_refusals_say_why(interpreter, length, reason):
  with pytest.raises(ValueError, match=f"implementation='mosaic' cannot serve: there are {reason}"):
    jax.eval_shape(on_kernel, jax.ShapeDtypeStruct((1, length, 128), jnp.bfloat16))
