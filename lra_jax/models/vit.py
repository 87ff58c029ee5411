"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) and its "plain" form (Beyer et al. 2022, 2205.01580).

Facts not in the papers are those of google-research/vision_transformer: LayerNorm epsilon 1e-6, Xavier-uniform kernels,
biases of the MLP from N(0, 1e-6), learned positions from N(0, 0.02), class token and head zero. GELU is the exact one,
as in timm, with whose weights the models are checked.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lra_jax import errors
from lra_jax.models import layers

LAYER_NORM_EPSILON = 1e-6

# Table 1 of the paper has B; Ti and S are those of DeiT (Touvron et al. 2021) and timm.
SIZES = {
  "ti": dict(width=192, depth=12, heads=3),
  "s": dict(width=384, depth=12, heads=6),
  "b": dict(width=768, depth=12, heads=12),
}
VIT = {
  **{f"vit_{size}16": dict(patch_size=16, **sizes) for size, sizes in SIZES.items()},
  "vit_s32": dict(patch_size=32, **SIZES["s"]),
  # Ours.
  "vit_tiny32": dict(patch_size=4, width=192, depth=6, heads=3, pool="mean"),
  "vit_digits": dict(patch_size=4, width=64, depth=4, heads=4, pool="mean"),
}


class Vit(nnx.Module):
  """Patches, class token, positions, pre-norm Transformer blocks, LayerNorm, Dense."""

  INPUTS = ("image", "sequence", "tokens")
  READS_SHORTER = True

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: float = 4.0,
    pool: str = "cls",
    position: str = "learned",
    position_std: float = 0.02,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
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
      heads: of the attention.
      mlp_ratio: hidden width of the MLP by D.
      pool: "cls", a class token before the others feeds the head, or "mean" of all tokens.
      position: "learned", "sincos2d" (fixed; Chen et al. 2021, MoCo v3; needs an image) or "none".
      position_std: standard deviation of learned positions at the start.
      dropout: rate after the positions and of both branches and the MLP's hidden units.
      attention_dropout: rate of the attention weights.
      drop_path: rate of stochastic depth of the last block, linear from 0 at the first.
      remat: recompute every block in the backward pass instead of keeping its activations.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: values that do not fit each other or the input.
    """
    errors.check_known("config.model.pool:", pool, ("cls", "mean"))
    errors.check_known("config.model.position:", position, ("learned", "sincos2d", "none"))
    self.dtype, self.dropout, self.remat, self.pool = jnp.dtype(dtype), dropout, remat, pool
    common = dict(dtype=self.dtype, rngs=rngs)
    self.tokenizer = layers.Tokenizer(input_shape, width, patch=patch_size, vocab_size=vocab_size, **common)
    length = self.tokenizer.length
    self.cls = nnx.data(nnx.Param(jnp.zeros((1, 1, width), jnp.float32)) if pool == "cls" else None)
    self.position, self.fixed_position = nnx.data(None), None
    if position == "learned":
      shape = (1, length + (pool == "cls"), width)
      self.position = nnx.Param(nnx.initializers.normal(position_std)(rngs.params(), shape, jnp.float32))
    elif position == "sincos2d":
      if self.tokenizer.grid is None:
        raise errors.UserError("config.model.position='sincos2d' needs an image; take 'learned'")
      self.fixed_position = (*self.tokenizer.grid, width)
    self.drop_rates = layers.linear_rates(drop_path, depth)

    def block():
      attention = layers.SelfAttention(width, heads, dropout=attention_dropout, **common)
      mlp = layers.Mlp(width, int(mlp_ratio * width), dropout=dropout, **common)
      return layers.EncoderBlock(attention, mlp, width, epsilon=LAYER_NORM_EPSILON, dropout=dropout, **common)

    self.blocks = nnx.List(block() for _ in range(depth))
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

    Sequences may be shorter than at construction: positions count from the start. `mask_BL` is False where a token is
    padding: no other token attends to it, and the mean leaves it out.
    """
    keys = layers.split(rngs.dropout() if train else None, 2)
    x = self.tokenizer(x)
    if self.fixed_position:
      x = x + sincos2d(*self.fixed_position).astype(x.dtype)[None]
    if self.cls is not None:
      x, mask_BL = layers.prepend_token(self.cls[...], x), layers.prepend_to_mask(mask_BL)
    if self.position is not None:
      x = x + self.position[:, : x.shape[1]].astype(x.dtype)
    x = layers.dropout(x, self.dropout, keys[0])
    x = layers.run_blocks(self.blocks, x, keys[1], self.drop_rates, remat=self.remat, mask_BL=mask_BL)
    if self.pool == "cls":
      return self.head(self.norm(x[:, 0]).astype(jnp.float32))
    return self.head(layers.masked_mean(self.norm(x), mask_BL))


def sincos2d(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> np.ndarray:
  """Fixed positions of MoCo v3 (Chen et al. 2021): (rows · columns, width) float32.

  A quarter of the width each: sine and cosine of the column, sine and cosine of the row, frequencies
  temperature^(−i / (quarter − 1)).
  """
  if width % 4:
    raise errors.UserError(f"config.model.position='sincos2d' needs a width divisible by 4, not {width}")
  frequency = temperature ** -(np.arange(width // 4) / max(width // 4 - 1, 1))
  y, x = (index.reshape(-1, 1) * frequency for index in np.mgrid[:rows, :columns])
  return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)
