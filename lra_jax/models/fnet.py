"""FNet (Lee-Thorp et al. 2021, arXiv 2105.03824): attention replaced by the real part of a Fourier transform.

Facts not in the paper are those of google-research/f_net: post-norm blocks, LayerNorm epsilon 1e-12, GELU by tanh,
kernels from N(0, 0.02), a Dense layer after the embeddings, and a head on the tanh of a Dense layer of token 0.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import kernels.fft_mixing
from lra_jax import errors
from lra_jax.models import layers

LAYER_NORM_EPSILON = 1e-12
_normal = nnx.initializers.normal(0.02)

FNET = {
  # Table 1 of the paper and README of f_net; four segment types as in its configuration.
  "fnet_base": dict(width=768, depth=12, mlp_hidden=3072, types=4),
  "fnet_large": dict(width=1024, depth=24, mlp_hidden=4096, types=4),
  # Ours: small enough for 1024 pixels, 64 patches and an 8 px image.
  "fnet_small": dict(width=256, depth=4, mlp_hidden=512, pool="mean"),
  "fnet_digits": dict(width=64, depth=4, mlp_hidden=256, patch_size=2, pool="mean", dropout=0.0),
}


class Block(nnx.Module):
  """LN(x + Re FFT2(x)), then LN(x + MLP(x)); paper, figure 1."""

  def __init__(self, width: int, hidden: int, *, dropout: float, implementation: str | None, dtype, rngs):
    self.dropout, self.implementation = dropout, implementation
    self.norm1 = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.mlp = layers.Mlp(
      width, hidden, activation=layers.gelu_tanh, bias_std=0.02, init=_normal, dtype=dtype, rngs=rngs
    )
    self.norm2 = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)

  def __call__(self, x_BLD: jax.Array, drop_rate: float, key: jax.Array | None) -> jax.Array:
    del drop_rate  # a post-norm block cannot be skipped
    x_BLD = self.norm1(x_BLD + kernels.fft_mixing.fft_mixing(x_BLD, implementation=self.implementation))
    return self.norm2(x_BLD + layers.dropout(self.mlp(x_BLD), self.dropout, key))


class Fnet(nnx.Module):
  """Tokens, learned positions, LayerNorm, Dense, blocks, pooling, Dense and tanh, Dense."""

  INPUTS = ("image", "sequence", "tokens")

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    width: int,
    depth: int,
    mlp_hidden: int,
    patch_size: int = 1,
    pool: str = "first",
    types: int = 0,
    dropout: float = 0.1,
    remat: bool = False,
    implementation: str | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the model.

    Args:
      input_shape: of one example; see `layers.Tokenizer`.
      num_classes: width of the head.
      vocab_size: number of different integer tokens.
      width: D.
      depth: number of blocks.
      mlp_hidden: hidden width of the MLPs.
      patch_size: pixels; 1 for sequences and tokens.
      pool: "first", token 0, which has seen all others, as in the paper; or "mean" of all tokens.
      types: rows of a table of segment types, all tokens being of type 0; 0 for no table.
      dropout: rate after the embeddings and of the MLPs' outputs.
      remat: recompute every block in the backward pass instead of keeping its activations.
      implementation: of the mixing, see `kernels.fft_mixing`.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: values that do not fit each other or the input.
    """
    errors.check_known("config.model.pool:", pool, ("first", "mean"))
    self.dtype, self.dropout, self.remat, self.pool = jnp.dtype(dtype), dropout, remat, pool
    common = dict(dtype=self.dtype, rngs=rngs)
    self.tokenizer = layers.Tokenizer(
      input_shape, width, patch=patch_size, vocab_size=vocab_size, kernel_init=_normal, **common
    )
    self.position = nnx.Param(_normal(rngs.params(), (self.tokenizer.length, width), jnp.float32))
    self.types = nnx.data(nnx.Param(_normal(rngs.params(), (types, width), jnp.float32)) if types else None)
    self.embed_norm = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, **common)
    self.project = layers.linear(width, width, kernel_init=_normal, **common)
    self.blocks = nnx.List(
      Block(width, mlp_hidden, dropout=dropout, implementation=implementation, **common) for _ in range(depth)
    )
    self.pooler = layers.linear(width, width, kernel_init=_normal, **common)
    self.head = layers.linear(width, num_classes, kernel_init=_normal, dtype=jnp.float32, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """(B, *input_shape) → float32 logits (B, S); `rngs` (stream `dropout`) is needed where `train` is true.

    `mask_BL` is False where a token is padding: the mean leaves it out. As in the paper, padding takes part in the
    transform like any other token, as the embedding of its id and position.
    """
    keys = layers.split(rngs.dropout() if train else None, 3)
    x = self.tokenizer(x) + self.position[...].astype(self.dtype)[None]
    if self.types is not None:
      x = x + self.types[...].astype(self.dtype)[:1, None]
    x = layers.dropout(self.project(self.embed_norm(x)), self.dropout, keys[0])
    x = layers.run_blocks(self.blocks, x, keys[1], (0.0,) * len(self.blocks), remat=self.remat)
    x = x[:, 0] if self.pool == "first" else layers.masked_mean(x, mask_BL).astype(self.dtype)
    x = layers.dropout(jnp.tanh(self.pooler(x)), self.dropout, keys[2])
    return self.head(x.astype(jnp.float32))
