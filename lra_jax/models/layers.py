"""What two or more models share.

Axes: B batch, H rows, W columns, L tokens, C channels, D width, N heads, K head width or hidden units of an LSTM,
G LSTM directions, F = 4K gates, V size of the vocabulary.
Parameters are float32. `dtype` is the dtype of the products; norms are computed in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

import kernels.lstm
from kernels import dispatch
from lra_jax import errors

# Parameters of linear recurrences that are learned at a rate of their own (`config.optim.recurrence_rate`).
RECURRENCE = frozenset(("lambda_re", "lambda_im", "log_step", "nu_log", "theta_log", "gamma_log", "b_re", "b_im"))

xavier_uniform = nnx.initializers.xavier_uniform()
lecun_normal = nnx.initializers.lecun_normal()


def is_weight(name: str) -> bool:
  """Whether a parameter of that name is a weight matrix: decayed, unlike biases, norms, embeddings and positions."""
  return name == "kernel" or name.startswith("w_")


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x Φ(x), by the error function (Hendrycks & Gimpel 2016); float32 inside, x's dtype outside."""
  wide = x.astype(jnp.float32)
  return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """The tanh approximation of GELU that the papers' JAX code uses; any shape, float32 inside, x's dtype outside."""
  return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def torch_uniform(fan_in: int) -> Callable:
  """Initializer U(±1/√fan_in): PyTorch's default of the weights and biases of linear layers and convolutions."""
  return lambda key, shape, dtype=jnp.float32, out_sharding=None: jax.random.uniform(
    key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5
  )


def linear(
  in_features: int, out_features: int, *, dtype, rngs, bias_std: float = 0.0, kernel_init=xavier_uniform, use_bias=True
) -> nnx.Linear:
  """A Dense layer, kernel Xavier-uniform by default; bias zero, or normal of standard deviation `bias_std`."""
  bias_init = nnx.initializers.normal(bias_std) if bias_std else nnx.initializers.zeros
  return nnx.Linear(
    in_features, out_features, kernel_init=kernel_init, bias_init=bias_init, use_bias=use_bias, dtype=dtype, rngs=rngs
  )


def torch_linear(in_features: int, out_features: int, *, dtype, rngs) -> nnx.Linear:
  """A Dense layer that starts as `torch.nn.Linear` does."""
  init = torch_uniform(in_features)
  return nnx.Linear(in_features, out_features, kernel_init=init, bias_init=init, dtype=dtype, rngs=rngs)


def layer_norm(features: int, *, epsilon: float, dtype, rngs) -> nnx.LayerNorm:
  """LayerNorm over the last axis (Ba et al. 2016), statistics in float32, variance by the two-pass formula."""
  return nnx.LayerNorm(features, epsilon=epsilon, dtype=dtype, use_fast_variance=False, rngs=rngs)


def batch_norm(features: int, *, momentum: float = 0.9, dtype, rngs) -> nnx.BatchNorm:
  """BatchNorm (Ioffe & Szegedy 2015) with PyTorch's epsilon and, by default, momentum; statistics in float32 over the
  whole batch.

  The running variance is that of the batch, biased; PyTorch multiplies it by n / (n − 1).
  """
  return nnx.BatchNorm(features, momentum=momentum, epsilon=1e-5, dtype=dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
  """Convolution with equal kernel size and stride as one product; pixels beyond the last whole patch are cut."""

  def __init__(
    self, in_channels: int, features: int, patch: int, *, dtype, rngs, kernel_init=lecun_normal, bias_init=None
  ):
    self.patch = patch
    self.dtype = dtype
    self.kernel = nnx.Param(kernel_init(rngs.params(), (patch, patch, in_channels, features), jnp.float32))
    bias_init = bias_init or nnx.initializers.zeros
    self.bias = nnx.Param(bias_init(rngs.params(), (features,), jnp.float32))

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


class Tokenizer(nnx.Module):
  """Any task's input as L tokens of width D: patches of an image, pixels of a sequence, or embedded integers.

  Attributes:
    length: L.
    grid: (rows, columns) of the patches of an image, None for sequences and tokens.
  """

  def __init__(
    self,
    input_shape: tuple[int, ...],
    features: int,
    *,
    patch: int = 1,
    vocab_size: int | None = None,
    embed_std: float = 0.02,
    kernel_init=lecun_normal,
    bias_init=None,
    dtype,
    rngs,
  ):
    """Builds it.

    Args:
      input_shape: (H, W, C) of an image, (L, C) of a sequence, (L,) of integer tokens.
      features: D.
      patch: height and width of a patch of an image, in pixels; 1 for the others.
      vocab_size: V, of integer tokens.
      embed_std: standard deviation of the embeddings of integer tokens.
      kernel_init, bias_init: of the projection of patches and pixels.
      dtype: of the tokens.
      rngs: stream `params`.

    Raises:
      UserError: a patch larger than the image, or patches of something that is no image.
    """
    self.grid = None
    if len(input_shape) == 3:
      rows, columns, channels = input_shape
      check_patch(patch, rows, columns)
      self.grid = (rows // patch, columns // patch)
      self.length = self.grid[0] * self.grid[1]
      self.embed = PatchEmbed(
        channels, features, patch, kernel_init=kernel_init, bias_init=bias_init, dtype=dtype, rngs=rngs
      )
      return
    if patch != 1:
      raise errors.UserError(
        f"config.model.patch_size={patch}: the task gives {input_shape[0]} steps in a row and no image; take 1"
      )
    self.length = input_shape[0]
    if len(input_shape) == 2:
      self.embed = nnx.Linear(
        input_shape[1], features, kernel_init=kernel_init, bias_init=bias_init or nnx.initializers.zeros, dtype=dtype,
        rngs=rngs,
      )  # fmt: skip
    else:
      init = nnx.initializers.normal(embed_std)
      self.embed = nnx.Embed(vocab_size, features, embedding_init=init, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, *input_shape) → (B, L, D)."""
    y = self.embed(x)
    return y.reshape(y.shape[0], -1, y.shape[-1])


class Mlp(nnx.Module):
  """Dense, GELU, Dense, by default with the small normal biases (1e-6) of timm and the Sequencer code."""

  def __init__(
    self, features: int, hidden: int, *, activation=gelu, dropout=0.0, bias_std=1e-6, init=xavier_uniform, dtype, rngs
  ):
    self.activation = activation
    self.dropout = dropout
    self.fc1 = linear(features, hidden, dtype=dtype, rngs=rngs, bias_std=bias_std, kernel_init=init)
    self.fc2 = linear(hidden, features, dtype=dtype, rngs=rngs, bias_std=bias_std, kernel_init=init)

  def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    return self.fc2(dropout(self.activation(self.fc1(x)), self.dropout, key))


def attend(
  q_BLNK: jax.Array, k_BLNK: jax.Array, v_BLNK: jax.Array, *, mask_BL=None, rate=0.0, key=None, implementation=None
):
  """Softmax attention (Vaswani et al. 2017, section 3.2.1); softmax in float32.

  Args:
    q_BLNK, k_BLNK, v_BLNK: queries, keys, values.
    mask_BL: False where a key is padding; None for none.
    rate: of dropout of the attention weights; needs `key`.
    key: None where nothing is dropped.
    implementation: "xla", "cudnn" or None: cuDNN's flash attention for bfloat16 on NVIDIA GPUs where there is no mask
      (cuDNN wants one of (L, L) for every example), else XLA.

  Returns:
    (B, L, N, K).
  """
  mask_B11L = None if mask_BL is None else mask_BL[:, None, None]
  if key is not None and rate:
    scores = jnp.einsum("blnk,bmnk->bnlm", q_BLNK, k_BLNK, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * q_BLNK.shape[-1] ** -0.5, where=mask_B11L).astype(v_BLNK.dtype)
    return jnp.einsum("bnlm,bmnk->blnk", dropout(weights, rate, key), v_BLNK)
  if implementation is None:
    # Compiling for a GPU that is not there, there is no cuDNN to ask either.
    flash = dispatch.platform() == jax.default_backend() == "gpu" and q_BLNK.dtype == jnp.bfloat16 and mask_BL is None
    implementation = "cudnn" if flash else "xla"
  return jax.nn.dot_product_attention(q_BLNK, k_BLNK, v_BLNK, mask=mask_B11L, implementation=implementation)


class SelfAttention(nnx.Module):
  """Multi-head self-attention; queries, keys and values are one product. `attend` may be another kind of attention."""

  def __init__(
    self,
    features: int,
    heads: int,
    *,
    qkv_features: int | None = None,
    use_bias: bool = True,
    dropout: float = 0.0,
    kernel_init=xavier_uniform,
    attend: Callable = attend,
    dtype,
    rngs,
  ):
    inner = qkv_features or features
    if inner % heads:
      raise errors.UserError(f"config.model.heads={heads} does not divide the width {inner}")
    self.heads, self.dropout, self.attend = heads, dropout, attend

    def thirds(key, shape, dtype, out_sharding=None):  # the papers draw queries, keys and values apart
      parts = [kernel_init(k, (shape[0], shape[1] // 3), dtype) for k in jax.random.split(key, 3)]
      return jnp.concatenate(parts, 1)

    self.qkv = linear(features, 3 * inner, use_bias=use_bias, kernel_init=thirds, dtype=dtype, rngs=rngs)
    self.out = linear(inner, features, use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

  def __call__(
    self, x_BLD: jax.Array, key: jax.Array | None = None, *arguments, mask_BL: jax.Array | None = None
  ) -> jax.Array:
    """Args: x_BLD; key of the dropout of the attention weights; whatever else `attend` takes; mask of the keys."""
    batch, length, _ = x_BLD.shape
    q, k, v = jnp.unstack(self.qkv(x_BLD).reshape(batch, length, 3, self.heads, -1), axis=2)
    y = self.attend(q, k, v, *arguments, mask_BL=mask_BL, rate=self.dropout, key=key)
    return self.out(y.reshape(batch, length, -1))


class EncoderBlock(nnx.Module):
  """Pre-norm Transformer block: x + attention(LN(x)), then x + MLP(LN(x))."""

  def __init__(self, attention: nnx.Module, mlp: Mlp, features: int, *, epsilon: float, dropout: float, dtype, rngs):
    self.dropout = dropout
    self.norm1 = layer_norm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)
    self.attention = attention
    self.norm2 = layer_norm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)
    self.mlp = mlp

  def __call__(
    self, x_BLD: jax.Array, drop_rate: float = 0.0, key: jax.Array | None = None, mask_BL: jax.Array | None = None
  ) -> jax.Array:
    """Args: x_BLD; rate of stochastic depth of both branches; key of all that is random, None for nothing random;
    False where a token is padding, to which no other attends."""
    keys = split(key, 6)
    y = dropout(self.attention(self.norm1(x_BLD), keys[0], mask_BL=mask_BL), self.dropout, keys[1])
    x_BLD = x_BLD + drop_path(y, drop_rate, keys[2])
    y = dropout(self.mlp(self.norm2(x_BLD), keys[3]), self.dropout, keys[4])
    return x_BLD + drop_path(y, drop_rate, keys[5])


def prepend_token(token_11D: jax.Array, x_BLD: jax.Array) -> jax.Array:
  """(B, 1 + L, D): the learned token before the others of every example, in their dtype."""
  token = jnp.broadcast_to(token_11D.astype(x_BLD.dtype), (len(x_BLD), 1, x_BLD.shape[-1]))
  return jnp.concatenate([token, x_BLD], axis=1)


def prepend_to_mask(mask_BL: jax.Array | None) -> jax.Array | None:
  """The mask of tokens with a learned one before them."""
  return None if mask_BL is None else jnp.pad(mask_BL, ((0, 0), (1, 0)), constant_values=True)


def masked_mean(x_BLD: jax.Array, mask_BL: jax.Array | None) -> jax.Array:
  """(B, D) float32: mean over the tokens, without those where the mask is False; 0 where it is False for all."""
  x_BLD = x_BLD.astype(jnp.float32)
  if mask_BL is None:
    return x_BLD.mean(1)
  weights_BL1 = mask_BL[..., None].astype(jnp.float32)
  return (x_BLD * weights_BL1).sum(1) / jnp.maximum(weights_BL1.sum(1), 1)


def zero_padding(x_BLD: jax.Array, mask_BL: jax.Array | None) -> jax.Array:
  """x with zeros where the mask is False, whatever stands there, even NaN."""
  return x_BLD if mask_BL is None else jnp.where(mask_BL[..., None], x_BLD, jnp.zeros((), x_BLD.dtype))


def align_right(x: jax.Array, mask_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sequences (B, L, …) that end with padding as such that begin with it, and their mask.

  A recurrence that starts from zeros and reads zeros stays there, so its last state is that of the sequence alone.
  """
  length = mask_BL.shape[1]
  places_BL = (jnp.arange(length)[None] + mask_BL.sum(1, dtype=jnp.int32)[:, None]) % length
  indices = places_BL.reshape(places_BL.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, indices, axis=1), jnp.take_along_axis(mask_BL, places_BL, axis=1)


def check_patch(patch: int, rows: int, columns: int) -> None:
  """Raises a `UserError` where a patch of `patch` pixels does not fit an image of that size."""
  if not 1 <= patch <= min(rows, columns):
    raise errors.UserError(f"config.model.patch_size={patch} does not fit an image of {rows}×{columns} px")


def run_blocks(
  blocks: list[nnx.Module],
  x: jax.Array,
  key: jax.Array | None,
  drop_rates: tuple[float, ...],
  *,
  remat: bool = False,
  **options,
) -> jax.Array:
  """Applies blocks one after the other, as `block(x, drop_rate, key, **options)`.

  Args:
    blocks: their running statistics, if any, are updated in place.
    x: input of the first one.
    key: from which each block gets its own; None where nothing is random.
    drop_rates: of stochastic depth, one a block.
    remat: recompute each block in the backward pass instead of keeping its activations.
    **options: further arguments of all blocks; those that are None are not passed on.
  """
  options = {name: value for name, value in options.items() if value is not None}
  for index, (block, rate) in enumerate(zip(blocks, drop_rates, strict=True)):
    own = None if key is None else jax.random.fold_in(key, index)
    if not remat:
      x = block(x, rate, own, **options)
      continue
    graphdef, params, rest = nnx.split(block, nnx.Param, ...)

    def pure(params, rest, x, own, graphdef=graphdef, rate=rate):
      block = nnx.merge(graphdef, params, rest)
      y = block(x, rate, own, **options)
      return y, nnx.to_pure_dict(nnx.split(block, nnx.Param, ...)[2])

    x, rest = jax.checkpoint(pure)(nnx.to_pure_dict(params), nnx.to_pure_dict(rest), x, own)
    if options.get("train"):
      nnx.update(block, rest)  # running statistics
  return x


def linear_rates(last: float, blocks: int) -> tuple[float, ...]:
  """Rates of stochastic depth: 0 at the first block, `last` at the last one, linear between."""
  return tuple(last * i / max(blocks - 1, 1) for i in range(blocks))


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


def split(key: jax.Array | None, count: int):
  """`count` keys made of one, or as many None of None."""
  return (None,) * count if key is None else jax.random.split(key, count)


def dropout(x: jax.Array, rate: float, key: jax.Array | None, broadcast: tuple[int, ...] = ()) -> jax.Array:
  """Dropout (Srivastava et al. 2014), the kept elements scaled by 1 / (1 − rate).

  Args:
    x: any shape.
    rate: share that becomes zero.
    key: None for no dropout.
    broadcast: axes along which all elements are dropped or kept together.
  """
  if key is None or not rate:
    return x
  shape = [1 if axis in broadcast else size for axis, size in enumerate(x.shape)]
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  return jnp.where(keep, x / jnp.asarray(1 - rate, x.dtype), jnp.zeros((), x.dtype))


def drop_path(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Stochastic depth (Huang et al. 2016), per example along axis 0, the kept ones scaled by 1 / (1 − rate)."""
  if key is None or not rate:
    return x
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
  errors.check_known("config.model.init:", scheme, initializers)
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
