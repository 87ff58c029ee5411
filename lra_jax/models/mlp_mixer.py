"""MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601).

Facts not in the paper are those of google-research/big_vision: LayerNorm epsilon 1e-6, zero head, no positions. GELU,
the initialisation of kernels (Xavier) and biases (N(0, 1e-6)) are timm's, with whose weights the models are checked.
Stochastic depth is linear over the blocks and rescales what it keeps; big_vision's does not rescale.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lra_jax.models import layers

LAYER_NORM_EPSILON = 1e-6

# Table 1 of the paper.
_S = dict(width=512, depth=8, token_hidden=256, channel_hidden=2048)
_B = dict(width=768, depth=12, token_hidden=384, channel_hidden=3072)
_L = dict(width=1024, depth=24, token_hidden=512, channel_hidden=4096)
MLP_MIXER = {
  "mlp_mixer_s16": dict(patch_size=16, **_S),
  "mlp_mixer_s32": dict(patch_size=32, **_S),
  "mlp_mixer_b16": dict(patch_size=16, **_B),
  "mlp_mixer_b32": dict(patch_size=32, **_B),
  "mlp_mixer_l16": dict(patch_size=16, **_L),
  # Ours: 64 tokens of a 32 px image, 16 of an 8 px one.
  "mlp_mixer_tiny32": dict(patch_size=4, width=256, depth=6, token_hidden=128, channel_hidden=1024),
  "mlp_mixer_digits": dict(patch_size=2, width=64, depth=4, token_hidden=32, channel_hidden=256),
}


class Block(nnx.Module):
  """An MLP over the tokens, the same for every channel, then one over the channels; paper, equation 1."""

  def __init__(self, length: int, width: int, token_hidden: int, channel_hidden: int, dropout: float, *, dtype, rngs):
    self.norm1 = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.tokens = layers.Mlp(length, token_hidden, dropout=dropout, dtype=dtype, rngs=rngs)
    self.norm2 = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, dtype=dtype, rngs=rngs)
    self.channels = layers.Mlp(width, channel_hidden, dropout=dropout, dtype=dtype, rngs=rngs)

  def __call__(
    self, x_BLD: jax.Array, drop_rate: float, key: jax.Array | None, mask_BL: jax.Array | None = None
  ) -> jax.Array:
    keys = layers.split(key, 4)
    y = layers.zero_padding(self.norm1(x_BLD), mask_BL)
    y = self.tokens(y.swapaxes(1, 2), keys[0]).swapaxes(1, 2)
    x_BLD = x_BLD + layers.drop_path(y, drop_rate, keys[1])
    return x_BLD + layers.drop_path(self.channels(self.norm2(x_BLD), keys[2]), drop_rate, keys[3])


class MlpMixer(nnx.Module):
  """Patches, Mixer blocks, LayerNorm, mean over the tokens, Dense. The number of tokens is part of the weights."""

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
    token_hidden: int,
    channel_hidden: int,
    dropout: float = 0.0,
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
      width: D, "hidden size C" of the paper.
      depth: number of blocks.
      token_hidden: hidden width of the MLP over the tokens, D_S of the paper.
      channel_hidden: hidden width of the MLP over the channels, D_C of the paper.
      dropout: rate of the hidden units of both MLPs.
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
    self.blocks = nnx.List(
      Block(self.tokenizer.length, width, token_hidden, channel_hidden, dropout, **common) for _ in range(depth)
    )
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

    `mask_BL` is False where a token is padding: the MLPs over the tokens see zeros there, and the mean leaves it out.
    """
    x = self.tokenizer(x)
    key = rngs.dropout() if train else None
    x = layers.run_blocks(self.blocks, x, key, self.drop_rates, remat=self.remat, mask_BL=mask_BL)
    return self.head(layers.masked_mean(self.norm(x), mask_BL))
