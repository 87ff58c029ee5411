"""Nyströmformer (Xiong et al. 2021, arXiv 2102.03902): a Transformer whose attention costs O(L).

The LRA form is that of mlpen/Nystromformer's Long Range Arena code: pre-norm blocks, learned positions, mean over the
tokens, a head with one hidden layer. The BERT form is that of Hugging Face transformers: post-norm blocks, LayerNorm
after the embeddings, and the class head on token 0. The image form is the LRA form on patches. The pseudo-inverse
starts from a value of each matrix, not of the whole batch as in the published runs (`pinv_init="global"`).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.nystrom_attention import PINV_INITS, nystrom_attention
from lra_jax import errors
from lra_jax.models import layers

LAYER_NORM_EPSILON = 1e-5
BERT_FIRST_POSITION = 2  # the first rows of Hugging Face's table of positions are never used

NYSTROMFORMER = {
  # LRA/code/lra_config.py: width 64, 2 heads of 32, 2 blocks, 64 landmarks, skip filters of 35 taps, dropout 0.1.
  "nystromformer_lra": dict(
    width=64, depth=2, heads=2, mlp_hidden=128, landmarks=64, skip_kernel=35, dropout=0.1, attention_dropout=0.0
  ),
  # Hugging Face's default configuration, that of the 512-token checkpoint: BERT-base sizes, 64 landmarks, 65 taps.
  "nystromformer_bert": dict(
    form="bert", width=768, depth=12, heads=12, mlp_hidden=3072, landmarks=64, skip_kernel=65, dropout=0.1, types=2
  ),
  # Ours: patches of a 32 px image, 64 tokens of an 8 px one. The authors advise against the skip filter on images.
  "nystromformer_tiny32": dict(
    width=192, depth=6, heads=3, mlp_hidden=768, landmarks=32, skip_kernel=0, patch_size=2, dropout=0.0
  ),
  "nystromformer_digits": dict(
    width=64, depth=2, heads=2, mlp_hidden=256, landmarks=8, skip_kernel=5, patch_size=2, dropout=0.0
  ),
}


class NystromAttention(nnx.Module):
  """Multi-head self-attention through landmarks; see `kernels.nystrom_attention`."""

  def __init__(
    self, width, heads, *, landmarks, pinv_iterations, pinv_init, skip_kernel, dropout, kernel_init, implementation,
    dtype, rngs,
  ):  # fmt: skip
    self.skip = nnx.data(None)
    if skip_kernel:
      init = layers.torch_uniform(skip_kernel)
      self.skip = nnx.Param(init(rngs.params(), (skip_kernel, heads)))
    attend = functools.partial(
      _attend,
      landmarks=landmarks,
      pinv_iterations=pinv_iterations,
      pinv_init=pinv_init,
      implementation=implementation,
    )
    self.attention = layers.SelfAttention(
      width, heads, dropout=dropout, kernel_init=kernel_init, attend=attend, dtype=dtype, rngs=rngs
    )

  def __call__(self, x_BLD: jax.Array, key: jax.Array | None = None, mask_BL: jax.Array | None = None) -> jax.Array:
    return self.attention(x_BLD, key, None if self.skip is None else self.skip[...], mask_BL=mask_BL)


def _attend(q, k, v, skip, *, rate, key, **options):
  if rate and key is not None:
    raise errors.UserError("config.model.attention_dropout: Nyström attention has no weights to drop; take 0")
  return nystrom_attention(q, k, v, skip, **options)


class PostNormBlock(nnx.Module):
  """LN(x + attention(x)), then LN(x + MLP(x)), as in BERT."""

  def __init__(self, attention, mlp, features: int, *, epsilon: float, dropout: float, dtype, rngs):
    self.dropout = dropout
    self.attention = attention
    self.norm1 = layers.layer_norm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)
    self.mlp = mlp
    self.norm2 = layers.layer_norm(features, epsilon=epsilon, dtype=dtype, rngs=rngs)

  def __call__(
    self, x_BLD: jax.Array, drop_rate: float, key: jax.Array | None, mask_BL: jax.Array | None = None
  ) -> jax.Array:
    del drop_rate  # a post-norm block cannot be skipped
    keys = layers.split(key, 4)
    y = self.attention(x_BLD, keys[0], mask_BL=mask_BL)
    x_BLD = self.norm1(x_BLD + layers.dropout(y, self.dropout, keys[1]))
    return self.norm2(x_BLD + layers.dropout(self.mlp(x_BLD, keys[2]), self.dropout, keys[3]))


class Nystromformer(nnx.Module):
  """Tokens, learned positions, blocks, mean over the tokens, a head with one hidden layer."""

  INPUTS = ("image", "sequence", "tokens")

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    form: str = "lra",
    width: int,
    depth: int,
    heads: int,
    mlp_hidden: int,
    landmarks: int,
    patch_size: int = 1,
    pinv_iterations: int = 6,
    pinv_init: str = "per_matrix",
    skip_kernel: int = 0,
    types: int = 0,
    dropout: float = 0.1,
    attention_dropout: float = 0.0,
    drop_path: float = 0.0,
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
      form: "lra" or "bert"; see the module.
      width: D.
      depth: number of blocks.
      heads: of the attention.
      mlp_hidden: hidden width of the MLPs.
      landmarks: M; at most the number of tokens, where attention is exact.
      patch_size: pixels; 1 for sequences and tokens.
      pinv_iterations: steps of the pseudo-inverse.
      pinv_init: "per_matrix" or "global".
      skip_kernel: taps of the skip convolution, odd; 0 for none.
      types: rows of a table of segment types, all tokens being of type 0 (BERT form); 0 for no table.
      dropout: rate after the positions, of both branches and of the MLP's hidden units.
      attention_dropout: must be 0; there are no attention weights to drop.
      drop_path: rate of stochastic depth of the last block of the LRA form, linear from 0 at the first.
      remat: recompute every block in the backward pass instead of keeping its activations.
      implementation: of the attention, see `kernels.nystrom_attention`.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: values that do not fit each other or the input.
    """
    errors.check_known("config.model.form:", form, ("lra", "bert"))
    errors.check_known("config.model.pinv_init:", pinv_init, PINV_INITS)
    if skip_kernel and skip_kernel % 2 == 0:
      raise errors.UserError(f"config.model.skip_kernel={skip_kernel} must be odd, or 0 for no skip convolution")
    self.dtype, self.dropout, self.remat, self.form = jnp.dtype(dtype), dropout, remat, form
    common = dict(dtype=self.dtype, rngs=rngs)
    norm = dict(epsilon=LAYER_NORM_EPSILON, **common)
    init = nnx.initializers.normal(0.02) if form == "bert" else layers.xavier_uniform
    self.tokenizer = layers.Tokenizer(
      input_shape, width, patch=patch_size, vocab_size=vocab_size, kernel_init=init, **common
    )
    if not 1 <= landmarks <= self.tokenizer.length:
      raise errors.UserError(
        f"config.model.landmarks={landmarks} must be between 1 and the {self.tokenizer.length} tokens of the task"
      )
    table = nnx.initializers.normal(0.02)
    self.first_position = BERT_FIRST_POSITION if form == "bert" else 0
    rows = self.first_position + self.tokenizer.length
    self.position = nnx.Param(table(rngs.params(), (rows, width), jnp.float32))
    self.types = nnx.data(nnx.Param(table(rngs.params(), (types, width), jnp.float32)) if types else None)
    self.embed_norm = nnx.data(layers.layer_norm(width, **norm) if form == "bert" else None)
    self.drop_rates = layers.linear_rates(drop_path, depth)

    def block():
      attention = NystromAttention(
        width,
        heads,
        landmarks=landmarks,
        pinv_iterations=pinv_iterations,
        pinv_init=pinv_init,
        skip_kernel=skip_kernel,
        dropout=attention_dropout,
        kernel_init=init,
        implementation=implementation,
        **common,
      )
      activation = layers.gelu_tanh if form == "bert" else layers.gelu
      mlp = layers.Mlp(
        width, mlp_hidden, activation=activation, dropout=0.0 if form == "bert" else dropout, bias_std=0.0, init=init,
        **common,
      )  # fmt: skip
      kind = PostNormBlock if form == "bert" else layers.EncoderBlock
      return kind(attention, mlp, width, dropout=dropout, **norm)

    self.blocks = nnx.List(block() for _ in range(depth))
    self.norm = nnx.data(layers.layer_norm(width, **norm) if form == "lra" else None)
    hidden = mlp_hidden if form == "lra" else width
    self.head_hidden = nnx.data(layers.linear(width, hidden, kernel_init=init, **common))
    self.head = layers.linear(hidden, num_classes, kernel_init=init, dtype=jnp.float32, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """(B, *input_shape) → float32 logits (B, S); `rngs` (stream `dropout`) is needed where `train` is true.

    `mask_BL` is False where a token is padding: it is no key, counts as zeros in the landmarks as in the official code,
    and the mean leaves it out.
    """
    keys = layers.split(rngs.dropout() if train else None, 4)
    x = self.tokenizer(x) + self.position[...].astype(self.dtype)[None, self.first_position :]
    if self.types is not None:
      x = x + self.types[...].astype(self.dtype)[:1, None]
    if self.embed_norm is not None:
      x = self.embed_norm(x)
    x = layers.dropout(x, self.dropout, keys[0])
    x = layers.run_blocks(self.blocks, x, keys[1], self.drop_rates, remat=self.remat, mask_BL=mask_BL)
    if self.form == "lra":
      x = layers.masked_mean(self.norm(x), mask_BL)
      if self.head_hidden is not None:  # taken away where two sequences share a head
        x = jax.nn.relu(self.head_hidden(x.astype(self.dtype)))
    else:
      x = layers.dropout(x[:, 0], self.dropout, keys[2])
      if self.head_hidden is not None:
        x = layers.dropout(layers.gelu_tanh(self.head_hidden(x)), self.dropout, keys[3])
    return self.head(x.astype(jnp.float32))
