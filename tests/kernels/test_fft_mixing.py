"""kernels.fft_mixing against NumPy's transform in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
from kernels.fft_mixing import IMPLEMENTATIONS, fft_mixing

ON_CPU = [name for name in IMPLEMENTATIONS if name != "mosaic"]
every_implementation = pytest.mark.parametrize("implementation", ON_CPU)
SHAPES = [(2, 8, 6), (1, 1, 1), (2, 1, 5), (3, 2, 1), (1, 2, 2), (2, 7, 9), (2, 9, 4), (1, 4, 3), (1, 65, 130)]


def truth(x_BLD):
  return np.fft.fft2(np.asarray(x_BLD, np.float64)).real


def error(x, y):
  return np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)


def normal(shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.RandomState(seed).randn(*shape), dtype)


@every_implementation
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy_with_gradient(implementation, shape):
  """The gradient of Σ g·y is the operator applied to g, as the equation's matrices are symmetric."""
  x, g = normal(shape), normal(shape, 1)

  @jax.jit
  def both(x, g):
    y, pull = jax.vjp(lambda x: fft_mixing(x, implementation=implementation), x)
    return y, pull(g)[0]

  y, dx = both(x, g)
  assert y.dtype == dx.dtype == jnp.float32
  assert error(y, truth(x)) < 1e-6
  assert error(dx, truth(g)) < 1e-6


def test_truth_of_this_file_is_the_matrix_form():
  """C_L x C_D − S_L x S_D, in float64, against NumPy's transform."""
  x = np.random.RandomState(2).randn(2, 6, 5)
  angles_l, angles_d = (2 * np.pi / n * np.outer(np.arange(n), np.arange(n)) for n in x.shape[1:])
  direct = np.cos(angles_l) @ x @ np.cos(angles_d) - np.sin(angles_l) @ x @ np.sin(angles_d)
  np.testing.assert_allclose(direct, truth(x), atol=1e-12)


@every_implementation
@pytest.mark.parametrize("shape", [(2, 16, 12), (2, 7, 10)])
def test_self_adjoint(implementation, shape):
  x, y = normal(shape), normal(shape, 1)
  f = lambda x: np.asarray(fft_mixing(x, implementation=implementation), np.float64)
  np.testing.assert_allclose((f(x) * np.asarray(y)).sum(), (np.asarray(x) * f(y)).sum(), rtol=2e-5)


@every_implementation
@pytest.mark.parametrize("shape", [(2, 256, 128), (1, 33, 20)])
def test_bfloat16_within_one_percent(implementation, shape):
  x, g = normal(shape, dtype=jnp.bfloat16), normal(shape, 1, jnp.bfloat16)
  y, pull = jax.vjp(jax.jit(lambda x: fft_mixing(x, implementation=implementation)), x)
  (dx,) = pull(g)
  assert y.dtype == dx.dtype == jnp.bfloat16
  assert error(y, truth(x)) < 1e-2
  assert error(dx, truth(g)) < 1e-2


@every_implementation
def test_long_sequences_stay_exact(implementation):
  x = normal((1, 4096, 16))
  assert error(jax.jit(fft_mixing, static_argnames="implementation")(x, implementation=implementation), truth(x)) < 1e-6


@every_implementation
def test_vmap_and_checkpoint(implementation):
  """Mapped, rematerialised, under jit, inside a nonlinear loss: as the derivative written out."""
  x = normal((3, 2, 6, 5))

  def loss(x):
    one = lambda x: fft_mixing(jnp.sin(x), implementation=implementation)
    return (jax.vmap(jax.checkpoint(one))(x) ** 2).sum()

  x64 = np.asarray(x, np.float64)
  expected = 2 * truth(truth(np.sin(x64))) * np.cos(x64)
  assert error(jax.jit(jax.grad(loss))(x), expected) < 1e-6


@pytest.mark.parametrize("implementation", [name for name in ON_CPU if name != "reference"])
def test_nothing_is_kept_for_the_gradient(implementation):
  _, pull = jax.vjp(lambda x: fft_mixing(x, implementation=implementation), normal((2, 8, 6)))
  assert sum(leaf.size for leaf in jax.tree.leaves(pull)) == 0


@pytest.mark.parametrize(
  "platform,length,width,expected",
  [
    ("cpu", 1024, 256, "xla"),
    ("cpu", 64, 63, "xla"),
    ("cpu", 256, 127, "folded"),
    ("cpu", 256, 254, "folded"),
    ("cpu", 1024, 254, "xla"),
    ("gpu", 256, 127, "xla"),
  ],
)
def test_default_follows_the_measured_rule(platform, length, width, expected):
  x = jax.ShapeDtypeStruct((2, length, width), jnp.float32)
  with dispatch.compiling_for(platform):
    default, chosen = (
      str(jax.make_jaxpr(lambda x, name=name: fft_mixing(x, implementation=name))(x)) for name in (None, expected)
    )
  assert ("dot_general" in default) == ("dot_general" in chosen) == (expected == "folded")


@pytest.mark.parametrize(
  "platform,length,width,same",
  [("cpu", 64, 64, "half"), ("cpu", 256, 128, "quarter"), ("gpu", 1024, 256, "half")],
)
def test_xla_is_what_was_faster(platform, length, width, same):
  x = jax.ShapeDtypeStruct((2, length, width), jnp.float32)
  with dispatch.compiling_for(platform):
    by_name = {
      name: str(jax.make_jaxpr(lambda x, name=name: fft_mixing(x, implementation=name))(x))
      for name in ("xla", "half", "quarter")
    }
  assert [name for name in ("half", "quarter") if by_name[name] == by_name["xla"]] == [same]


def test_wrong_shapes_and_names_are_refused():
  with pytest.raises(ValueError, match="expected 3 axes"):
    fft_mixing(jnp.ones((4, 5)))
  with pytest.raises(ValueError, match="none of length 0"):
    fft_mixing(jnp.ones((4, 0, 5)))
  with pytest.raises(ValueError, match="x is int32, expected float32 or bfloat16"):
    fft_mixing(jnp.ones((1, 4, 5), jnp.int32))
  with pytest.raises(
    ValueError, match="implementation='cuda' is unknown; there are 'reference', 'xla', 'half', 'quarter'"
  ):
    fft_mixing(jnp.ones((1, 4, 5)), implementation="cuda")
