"""The Transformer baseline of the Long Range Arena (Tay et al. 2021, arXiv 2011.04006).

Facts are those of google-research/long-range-arena: pre-norm blocks, attention without biases, GELU by tanh, LayerNorm
epsilon 1e-6, Xavier-uniform kernels, embeddings from N(0, 1), class token zero, and a head of Dense, ReLU, Dense.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lra_jax import errors
from lra_jax.models import layers

LAYER_NORM_EPSILON = 1e-6

LRA_TRANSFORMER = {
  # lra_benchmarks/image/configs/cifar10/transformer_base.py
  "lra_transformer": dict(
    width=128, depth=1, heads=8, qkv_features=64, mlp_hidden=128, dropout=0.3, attention_dropout=0.2, pool="cls"
  ),
  # Ours.
  "lra_transformer_digits": dict(
    width=64,
    depth=4,
    heads=4,
    qkv_features=64,
    mlp_hidden=256,
    dropout=0.0,
    attention_dropout=0.0,
    patch_size=4,
    pool="mean",
  ),
}


class LraTransformer(nnx.Module):
  """Embedded tokens, class token, positions, blocks, LayerNorm, pooling, a head with one hidden layer."""

  INPUTS = ("image", "sequence", "tokens")
  READS_SHORTER = True

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    width: int,
    depth: int,
    heads: int,
    qkv_features: int,
    mlp_hidden: int,
    patch_size: int = 1,
    pool: str = "cls",
    position: str = "learned",
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    remat: bool = False,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the model.

    Args:
      input_shape: of one example; see `layers.Tokenizer`.
      num_classes: width of the head.
      vocab_size: number of different integer tokens.
      width: D, "emb_dim" of the benchmark.
      depth: number of blocks.
      heads: of the attention.
      qkv_features: width of all queries together.
      mlp_hidden: hidden width of the MLPs and of the head.
      patch_size: pixels; 1 for sequences and tokens.
      pool: "cls" or "mean".
      position: "learned" from N(0, 0.02), or "sinusoidal", fixed (Vaswani et al. 2017, section 3.5).
      dropout: rate after the positions and of both branches and the MLP's hidden units.
      attention_dropout: rate of the attention weights.
      remat: recompute every block in the backward pass instead of keeping its activations.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: values that do not fit each other or the input.
    """
    errors.check_known("config.model.pool:", pool, ("cls", "mean"))
    errors.check_known("config.model.position:", position, ("learned", "sinusoidal"))
    self.dtype, self.dropout, self.remat, self.pool, self.width = jnp.dtype(dtype), dropout, remat, pool, width
    common = dict(dtype=self.dtype, rngs=rngs)
    self.tokenizer = layers.Tokenizer(
      input_shape, width, patch=patch_size, vocab_size=vocab_size, embed_std=1.0, **common
    )
    self.length = self.tokenizer.length + (pool == "cls")
    self.cls = nnx.data(nnx.Param(jnp.zeros((1, 1, width), jnp.float32)) if pool == "cls" else None)
    self.position = nnx.data(None)
    if position == "learned":
      self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (1, self.length, width), jnp.float32))

    def block():
      attention = layers.SelfAttention(
        width, heads, qkv_features=qkv_features, use_bias=False, dropout=attention_dropout, **common
      )
      mlp = layers.Mlp(width, mlp_hidden, activation=layers.gelu_tanh, dropout=dropout, **common)
      return layers.EncoderBlock(attention, mlp, width, epsilon=LAYER_NORM_EPSILON, dropout=dropout, **common)

    self.blocks = nnx.List(block() for _ in range(depth))
    self.norm = layers.layer_norm(width, epsilon=LAYER_NORM_EPSILON, **common)
    self.head_hidden = nnx.data(layers.linear(width, mlp_hidden, kernel_init=layers.lecun_normal, **common))
    self.head = nnx.Linear(mlp_hidden, num_classes, rngs=rngs)

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
    if self.cls is not None:
      x, mask_BL = layers.prepend_token(self.cls[...], x), layers.prepend_to_mask(mask_BL)
    position = self.position[...] if self.position is not None else jnp.asarray(sinusoidal(self.length, self.width))
    x = layers.dropout(x + position[:, : x.shape[1]].astype(x.dtype), self.dropout, keys[0])
    x = layers.run_blocks(self.blocks, x, keys[1], (0.0,) * len(self.blocks), remat=self.remat, mask_BL=mask_BL)
    x = self.norm(x)
    x = x[:, 0] if self.pool == "cls" else layers.masked_mean(x, mask_BL).astype(self.dtype)
    if self.head_hidden is not None:  # taken away where two sequences share a head
      x = jax.nn.relu(self.head_hidden(x))
    return self.head(x.astype(jnp.float32))


def sinusoidal(length: int, width: int) -> np.ndarray:
  """(1, length, width) float32 of even width: channels 2i and 2i + 1 are sine and cosine of t / 10⁴^(2i / width)."""
  angle = np.arange(length).reshape(-1, 1) * 10_000.0 ** -(np.arange(0, width, 2) / width)
  return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(1, length, -1)[..., :width].astype(np.float32)
