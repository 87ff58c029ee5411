"""gMLP (Liu et al. 2021, arXiv 2105.08050), without attention, as on images.

Facts not in the paper are timm's, with whose weights the models are checked: LayerNorm epsilon 1e-6 around the block
and 1e-5 inside the gating unit, exact GELU, Xavier-uniform kernels, biases of the channel projections N(0, 1e-6), zero
head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lra_jax.models import layers

LAYER_NORM_EPSILON = 1e-6
GATE_NORM_EPSILON = 1e-5
GATE_STD = 1e-6  # "near zero" of section 2.1

# Table 1 of the paper: 30 blocks, hidden width 6 D.
GMLP = {
  "gmlp_ti16": dict(patch_size=16, width=128, depth=30),
  "gmlp_s16": dict(patch_size=16, width=256, depth=30),
  "gmlp_b16": dict(patch_size=16, width=512, depth=30),
  # Ours.
  "gmlp_tiny32": dict(patch_size=4, width=128, depth=12),
  "gmlp_digits": dict(patch_size=2, width=48, depth=4),
}


class SpatialGatingUnit(nnx.Module):
  """u ⊙ (W LN(v) + b) of the halves (u, v) of the channels, W over the tokens; starts as u (section 2.1)."""

  def __init__(self, length: int, features: int, *, dtype, rngs):
    self.norm = layers.layer_norm(features // 2, epsilon=GATE_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.project = nnx.Linear(
      length,
      length,
      kernel_init=nnx.initializers.normal(GATE_STD),
      bias_init=nnx.initializers.ones,
      dtype=dtype,
      rngs=rngs,
    )

  def __call__(self, x_BLF: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
    """(B, L, F) → (B, L, F / 2)."""
    u, v = jnp.split(x_BLF, 2, axis=-1)
    return u * self.project(layers.zero_padding(self.norm(v), mask_BL).swapaxes(1, 2)).swapaxes(1, 2)


class Block(nnx.Module):
  """x + W₂ SGU(GELU(W₁ LN(x))); paper, figure 1."""

  def __init__(self, length: int, width: int, hidden: int, *, dtype, rngs):
    self.norm = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.fc1 = layers.linear(width, hidden, bias_std=1e-6, dtype=dtype, rngs=rngs)
    self.gate = SpatialGatingUnit(length, hidden, dtype=dtype, rngs=rngs)
    self.fc2 = layers.linear(hidden // 2, width, bias_std=1e-6, dtype=dtype, rngs=rngs)

  def __call__(
    self, x_BLD: jax.Array, drop_rate: float, key: jax.Array | None, mask_BL: jax.Array | None = None
  ) -> jax.Array:
    y = self.fc2(self.gate(layers.gelu(self.fc1(self.norm(x_BLD))), mask_BL))
    return x_BLD + layers.drop_path(y, drop_rate, key)


class Gmlp(nnx.Module):
  """Patches, gMLP blocks, LayerNorm, mean over the tokens, Dense. The number of tokens is part of the weights."""

  INPUTS = ("image", "sequence", "tokens")

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    patch_size: int,
    width: int,
    depth: int,
    mlp_ratio: float = 6.0,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the model.

    Args:
      input_shape: of one example; see `layers.Tokenizer`.
      num_classes: width of the head.
      vocab_size: number of different integer tokens.
      patch_size: pixels; 1 for sequences and tokens.
      width: D.
      depth: number of blocks.
      mlp_ratio: hidden width before the gate by D.
      drop_path: rate of stochastic depth of the last block, linear from 0 at the first.
      remat: recompute every block in the backward pass instead of keeping its activations.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: a patch that does not fit the input.
    """
    self.dtype, self.remat = jnp.dtype(dtype), remat
    common = dict(dtype=self.dtype, rngs=rngs)
    self.tokenizer = layers.Tokenizer(input_shape, width, patch=patch_size, vocab_size=vocab_size, **common)
    self.drop_rates = layers.linear_rates(drop_path, depth)
    hidden = int(mlp_ratio * width)
    self.blocks = nnx.List(Block(self.tokenizer.length, width, hidden, **common) for _ in range(depth))
    self.norm = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, **common)
    self.head = nnx.Linear(width, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """(B, *input_shape) → float32 logits (B, S); `rngs` (stream `dropout`) is needed where `train` is true.

    `mask_BL` is False where a token is padding: the product over the tokens sees zeros there, and the mean leaves it
    out.
    """
    x = self.tokenizer(x)
    key = rngs.dropout() if train else None
    x = layers.run_blocks(self.blocks, x, key, self.drop_rates, remat=self.remat, mask_BL=mask_BL)
    return self.head(layers.masked_mean(self.norm(x), mask_BL))
