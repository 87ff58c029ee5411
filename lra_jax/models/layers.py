"""What two or more models share.

Axes: B batch, H rows, W columns, L tokens, C channels, D width, G LSTM directions, K hidden units, F = 4K gates.
Parameters are float32. `dtype` is the dtype of the products; norms are computed in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import kernels.lstm
from lra_jax import errors

xavier_uniform = nnx.initializers.xavier_uniform()
lecun_normal = nnx.initializers.lecun_normal()


def is_weight(name: str) -> bool:
  """Whether a parameter of that name is a weight matrix: decayed, unlike biases, norms, embeddings and positions."""
  return name == "kernel" or name.startswith("w_")


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x Φ(x), by the error function (Hendrycks & Gimpel 2016); any shape, result in x's dtype."""
  return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))


def linear(in_features: int, out_features: int, *, dtype, rngs, bias_std: float = 0.0) -> nnx.Linear:
  """A Dense layer with Xavier-uniform kernel; bias zero, or normal of standard deviation `bias_std`."""
  bias_init = nnx.initializers.normal(bias_std) if bias_std else nnx.initializers.zeros
  return nnx.Linear(in_features, out_features, kernel_init=xavier_uniform, bias_init=bias_init, dtype=dtype, rngs=rngs)


def layer_norm(features: int, *, epsilon: float, dtype, rngs) -> nnx.LayerNorm:
  """LayerNorm over the last axis (Ba et al. 2016), statistics in float32, variance by the two-pass formula."""
  return nnx.LayerNorm(features, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


class PatchEmbed(nnx.Module):
  """Convolution with equal kernel size and stride as one product; pixels beyond the last whole patch are cut."""

  def __init__(self, in_channels: int, features: int, patch: int, *, dtype, rngs):
    self.patch = patch
    self.dtype = dtype
    self.kernel = nnx.Param(lecun_normal(rngs.params(), (patch, patch, in_channels, features), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """Returns (B, H // patch, W // patch, D) in `dtype`."""
    batch, rows, columns, channels = x_BHWC.shape
    p = self.patch
    rows, columns = rows // p, columns // p
    x = x_BHWC[:, : rows * p, : columns * p].astype(self.dtype)
    x = x.reshape(batch, rows, p, columns, p, channels).transpose(0, 1, 3, 2, 4, 5)
    kernel = self.kernel[...].astype(self.dtype)
    y = x.reshape(batch, rows, columns, -1) @ kernel.reshape(-1, kernel.shape[-1])
    return y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)


class Mlp(nnx.Module):
  """Dense, exact GELU, Dense, with the small normal biases (1e-6) of timm and the Sequencer code."""

  def __init__(self, features: int, hidden: int, *, dtype, rngs):
    self.fc1 = linear(features, hidden, dtype=dtype, rngs=rngs, bias_std=1e-6)
    self.fc2 = linear(hidden, features, dtype=dtype, rngs=rngs, bias_std=1e-6)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fc2(gelu(self.fc1(x)))


class Lstm(nnx.Module):
  """Parameters of G LSTM directions, all drawn from U(±1/√K) as in `torch.nn.LSTM`; see `kernels.lstm`."""

  def __init__(self, in_features: int, hidden: int, directions: int, *, unroll: int, implementation: str | None, rngs):
    def uniform(*shape):
      return nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -(hidden**-0.5), hidden**-0.5))

    self.unroll = unroll
    self.implementation = implementation
    self.w_ih = uniform(in_features, directions, 4 * hidden)
    self.w_hh = uniform(directions, hidden, 4 * hidden)
    self.b_ih = uniform(directions, 4 * hidden)
    self.b_hh = uniform(directions, 4 * hidden)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, L, D) → (B, L, G·K), forward and reverse; (B, H, W, D) → (B, H, W, G·K), four directions."""
    run = kernels.lstm.bilstm2d if x.ndim == 4 else kernels.lstm.lstm
    parameters = (self.w_ih[...], self.w_hh[...], self.b_ih[...], self.b_hh[...])
    return run(x, *parameters, unroll=self.unroll, implementation=self.implementation)


def drop_path(x: jax.Array, rate, key: jax.Array) -> jax.Array:
  """Stochastic depth (Huang et al. 2016), per example along axis 0, the kept ones scaled by 1 / (1 − rate)."""
  keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
  return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def reinitialize(model: nnx.Module, scheme: str, rngs: nnx.Rngs) -> None:
  """Draws all weight matrices anew and sets their biases to zero; a head that starts at zero stays at zero.

  Args:
    model: changed in place.
    scheme: "paper" leaves the model as its constructor made it; "xavier" is Glorot & Bengio (2010), uniform; "he" is
      He et al. (2015), normal, fan-in.
    rngs: source of the draws; stream `params`.

  Raises:
    UserError: the scheme does not exist.
  """
  initializers = {"paper": None, "xavier": xavier_uniform, "he": nnx.initializers.he_normal()}
  if scheme not in initializers:
    raise errors.UserError(errors.unknown("config.model.init:", scheme, initializers))
  if scheme == "paper":
    return
  for path, parameter in nnx.iter_graph(model):
    if not isinstance(parameter, nnx.Param) or path[0] == "head":
      continue
    if path[-1] in ("bias", "b_ih", "b_hh"):
      parameter[...] = jnp.zeros_like(parameter[...])
    elif path[-1] == "w_ih":  # (C, G, F): fan-in and fan-out of one direction
      per_direction = jnp.moveaxis(parameter[...], 1, 0)
      parameter[...] = jnp.moveaxis(_draw_each(initializers[scheme], per_direction, rngs), 0, 1)
    elif path[-1] == "w_hh":
      parameter[...] = _draw_each(initializers[scheme], parameter[...], rngs)
    elif path[-1] == "kernel":
      parameter[...] = initializers[scheme](rngs.params(), parameter.shape, jnp.float32)


def _draw_each(initializer, stacked, rngs):
  return jnp.stack([initializer(rngs.params(), matrix.shape, jnp.float32) for matrix in stacked])
