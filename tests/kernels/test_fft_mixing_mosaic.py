"""The Mosaic GPU kernels of kernels.fft_mixing: interpreted against NumPy's transform in float64, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from mixing import BOUNDS, error, every_dtype, normal, on_kernel, truth

from kernels import compile, dispatch
from kernels.fft_mixing import fft_mixing, mosaic

pytestmark = pytest.mark.timeout(240, method="thread")


@every_dtype
@pytest.mark.parametrize("shape", [(1, 16, 128), (3, 3, 128), (2, 33, 256), (1, 140, 128), (1, 272, 128), (1, 64, 64)])
def test_equals_numpy_with_gradient(interpreter, dtype, shape):
  """One tile and several, of rows, of columns and of steps, with rows that fill no tile; the gradient is the same."""
  seed = sum(shape)
  x, g = normal(shape, dtype, seed), normal(shape, dtype, seed + 1)

  @jax.jit
  def both(x, g):
    y, pull = jax.vjp(on_kernel, x)
    return y, pull(g)[0]

  y, dx = both(x, g)
  assert y.dtype == dx.dtype == dtype
  assert error(y, truth(x)) < BOUNDS[dtype]
  assert error(dx, truth(g)) < BOUNDS[dtype]


def test_blocks_that_fetch_a_matrix_together(interpreter):
  """Two samples or four tiles of tokens to a cluster, with more steps than slots in both kernels."""
  x = normal((2, 272, 128), jnp.bfloat16, 272)
  assert error(jax.jit(on_kernel)(x), truth(x)) < BOUNDS[jnp.bfloat16]


@every_dtype
@pytest.mark.parametrize("shape", [(1, 16, 96), (1, 16, 160), (2, 48, 192)])
def test_widths_that_are_no_multiples_of_128(interpreter, dtype, shape):
  """Narrow tiles of columns; for the width 192 the first kernel folds, with three pieces of a row."""
  x = normal(shape, dtype, sum(shape))
  assert error(jax.jit(on_kernel)(x), truth(x)) < BOUNDS[dtype]


@pytest.mark.parametrize("width", [512, 768])
def test_wide_rows(interpreter, width):
  """Several pieces of a row to a warpgroup; with 768 columns the frequencies are shared out among two blocks."""
  x = normal((1, 16, width), jnp.bfloat16, width)
  assert error(jax.jit(on_kernel)(x), truth(x)) < BOUNDS[jnp.bfloat16]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [24, 32])
def test_nothing_of_a_sample_reaches_another(interpreter, seed, length):
  """Not even a NaN, and every sample is as if it were alone; with 32 tokens the first kernel folds."""
  x = normal((3, length, 128), jnp.bfloat16, seed)
  y = jax.jit(on_kernel)(x.at[seed].set(jnp.nan))
  alone = truth(x)
  for sample in range(3):
    if sample == seed:
      assert np.isnan(np.asarray(y[sample], np.float64)).all()
    else:
      assert error(y[sample], alone[sample]) < BOUNDS[jnp.bfloat16]


@pytest.mark.parametrize(
  "length,width,dtype",
  [(16, 128, jnp.float32), (21, 128, jnp.float32), (32, 128, jnp.bfloat16), (48, 64, jnp.bfloat16)],
)
def test_a_wave_has_one_frequency(interpreter, length, width, dtype):
  """cos(2π(3n/L + 5d/D)) gives LD/2 at (3, 5) and its mirror image, nothing elsewhere: no bin is out of place."""
  n, d = np.arange(length)[:, None], np.arange(width)
  x = jnp.asarray(np.cos(2 * np.pi * (3 * n / length + 5 * d / width))[None], dtype)
  y = np.asarray(jax.jit(on_kernel)(x), np.float64)[0]
  expected = np.zeros((length, width))
  expected[3, 5] = expected[-3, -5] = length * width / 2
  np.testing.assert_allclose(y, expected, atol=2 * BOUNDS[dtype] * length * width / 2)


def test_vmap_and_a_mesh_of_one_device(interpreter):
  x = normal((2, 2, 16, 128), jnp.bfloat16, 5)
  assert error(jax.jit(jax.vmap(on_kernel))(x), truth(x)) < BOUNDS[jnp.bfloat16]
  spec = PartitionSpec("data")
  mapped = jax.shard_map(
    jax.grad(lambda x: (on_kernel(x).astype(jnp.float32) ** 2).sum() / 2),
    mesh=Mesh(np.array(jax.devices()[:1]), ("data",)),
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )
  assert error(jax.jit(mapped)(x[0]), truth(truth(x[0]))) < 2 * BOUNDS[jnp.bfloat16]


def test_float32_of_any_size_is_rounded_to_eleven_bits():
  x = np.random.RandomState(0).randn(4096).astype(np.float32) * np.logspace(-30, 30, 4096, dtype=np.float32)
  rounded = np.asarray(mosaic.rounded(jnp.asarray(x), jnp.float32))
  assert not (rounded.view(np.uint32) & 0x1FFF).any()
  assert (np.abs(rounded - x) <= 2.0**-11 * np.abs(x)).all()


@pytest.mark.skipif(compile.missing() is not None, reason=f"{compile.missing()}")
def test_checkpoint_compiles():
  x = jax.ShapeDtypeStruct((2, 256, 128), jnp.bfloat16)

  def loss(x):
    return (jax.checkpoint(lambda x: on_kernel(jnp.sin(x)))(x).astype(jnp.float32) ** 2).sum()

  program = compile.compile_for_h200(jax.grad(loss), x)
  assert {kernel.name for kernel in program.kernels} == {"fft_mixing_by_width", "fft_mixing_by_length"}


@pytest.mark.parametrize(
  "shape,dtype,reason",
  [
    ((1, 16, 48), jnp.bfloat16, "the width must be a multiple of 32 from 64 on.*, and it is 48"),
    ((1, 16, 32), jnp.bfloat16, "the width must be a multiple of 32 from 64 on.*, and it is 32"),
    ((1, 2, 128), jnp.bfloat16, "there must be at least 3 tokens, and there are 2"),
    ((1, 32768, 128), jnp.bfloat16, "there are 32768 tokens, not"),
  ],
)
def test_refusals_say_why(interpreter, shape, dtype, reason):
  with pytest.raises(ValueError, match=f"implementation='mosaic' cannot serve: {reason}"):
    jax.eval_shape(on_kernel, jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize(
  "platform,shape,dtype,expected,reason",
  [
    (("gpu",), (2, 1024, 256), jnp.bfloat16, "mosaic", "suit"),
    (("gpu",), (2, 1024, 256), jnp.float32, "xla", "TF32"),
    (("gpu",), (2, 4100, 256), jnp.bfloat16, "xla", "4100 tokens"),
    (("gpu",), (2, 64, 64), jnp.bfloat16, "mosaic", "suit"),
    (("gpu",), (2, 64, 80), jnp.bfloat16, "xla", "multiple of 32"),
    (("gpu", "8.0"), (2, 1024, 256), jnp.bfloat16, "xla", "it needs an NVIDIA Hopper GPU"),
    (("cpu",), (2, 1024, 256), jnp.bfloat16, "xla", "this is cpu"),
    (("cpu",), (2, 256, 254), jnp.bfloat16, "folded", "this is cpu"),
  ],
)
def test_default_takes_it_where_it_is_faster_and_as_accurate(platform, shape, dtype, expected, reason):
  with dispatch.compiling_for(*platform), dispatch.recording() as choices:
    jax.make_jaxpr(lambda x: fft_mixing(x))(jax.ShapeDtypeStruct(shape, dtype))
  ((name, why),) = choices["fft_mixing"].items()
  assert name == expected and reason in why
