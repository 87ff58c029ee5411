"""Lipschitz recurrent network (Erichson et al. 2021, arXiv 2006.12070).

The state follows ḣ = A h + tanh(W h + z_t), z_t = E x_t + b, for a time ε at every step of the sequence (equation 3),
with

  A = β (B − Bᵀ) + (1 − β)(B + Bᵀ) − γ I, W likewise of C      (equation 4)

so that the real parts of A's eigenvalues are bounded by those of its symmetric part, whatever B is. Row vectors (h A)
and the same β and γ for A and W are those of the official code (erichson/LipschitzRNN). Its CIFAR runs read three
neighbouring values of one colour as a step (a reshape without a transpose); here a step is one RGB pixel.

Axes: B batch, L steps, D hidden units.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import kernels.lipschitz_rnn
from lra_jax import errors
from lra_jax.models import layers

LIPSCHITZ_RNN = {
  # README of the official code, pixel MNIST: β, γ, ε, and standard deviation init_std / D of B and C.
  "lipschitz_rnn": dict(width=128),
  "lipschitz_rnn_256": dict(width=256),  # 134,666 parameters on RGB pixels, as many as in the paper's CIFAR-10 table
  # Ours, for 64 steps: larger steps in time.
  "lipschitz_rnn_digits": dict(width=128, epsilon=0.2),
}


class LipschitzRnn(nnx.Module):
  """The class of a sequence from the state after its last step."""

  INPUTS = ("image", "sequence", "tokens")
  READS_SHORTER = True

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    width: int,
    patch_size: int = 1,
    beta: float = 0.75,
    gamma: float = 0.001,
    epsilon: float = 0.03,
    method: str = "euler",
    gated: bool = False,
    init_std: float = 0.1,
    dropout: float = 0.0,
    remat: bool = False,
    unroll: int = 1,
    implementation: str | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    """Builds the model.

    Args:
      input_shape: of one example; an image is read patch by patch in raster order.
      num_classes: width of the head.
      vocab_size: number of different integer tokens.
      width: D.
      patch_size: pixels; 1 for sequences and tokens.
      beta: 1 for skew-symmetric A and W, 1/2 for arbitrary ones.
      gamma: how far the spectra are shifted to the left.
      epsilon: time that passes in one step.
      method: "euler", "midpoint" or "rk4" (Kutta's 3/8 rule, which torchdiffeq calls rk4).
      gated: ḣ = (A h + tanh(W h + z_t)) ⊙ σ(W h + E_g x_t + b_g), by Euler's method.
      init_std: B and C are drawn from N(0, (init_std / D)²).
      dropout: rate of the last state (not in the paper).
      remat: taken for the sake of all models' settings, without effect: there is one recurrence, and its gradient needs
        what was kept of all of its steps at once.
      unroll: steps in one iteration of the loop.
      implementation: of the recurrence, see `kernels.lipschitz_rnn`.
      dtype: of the products; the state is float32.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: an unknown method, a gate with another method than Euler's, or a patch that does not fit the input.
    """
    del remat
    errors.check_known("config.model.method:", method, kernels.lipschitz_rnn.METHODS)
    if gated and method != "euler":
      raise errors.UserError(f"config.model.method={method!r}: the gated form is defined for 'euler' alone")
    self.dtype, self.unroll, self.implementation, self.dropout = jnp.dtype(dtype), unroll, implementation, dropout
    self.beta, self.gamma, self.epsilon, self.method = beta, gamma, epsilon, method
    fan_in = input_shape[-1] * patch_size**2 if len(input_shape) > 1 else vocab_size
    init = layers.torch_uniform(fan_in)
    encoder = dict(
      patch=patch_size, vocab_size=vocab_size, kernel_init=init, bias_init=init, dtype=self.dtype, rngs=rngs
    )
    self.encoder = layers.Tokenizer(input_shape, width, **encoder)
    self.gate = nnx.data(layers.Tokenizer(input_shape, width, **encoder) if gated else None)
    draw = nnx.initializers.normal(init_std / width)
    self.w_a = nnx.Param(draw(rngs.params(), (width, width), jnp.float32))
    self.w_w = nnx.Param(draw(rngs.params(), (width, width), jnp.float32))
    self.head = layers.torch_linear(width, num_classes, dtype=jnp.float32, rngs=rngs)

  def matrices(self) -> tuple[jax.Array, jax.Array]:
    """A and W, (D, D) float32 each."""
    return tuple(_shape_spectrum(w[...], self.beta, self.gamma) for w in (self.w_a, self.w_w))

  def __call__(
    self,
    x: jax.Array,
    *,
    mask_BL: jax.Array | None = None,
    train: bool = False,
    rngs: nnx.Rngs | None = None,
  ) -> jax.Array:
    """(B, *input_shape) → float32 logits (B, S); `rngs` (stream `dropout`) is needed where `train` is true.

    `mask_BL` is False where a step is padding, after the sequence; the result is that of the sequence alone.
    """
    if mask_BL is not None:
      x, mask_BL = layers.align_right(x, mask_BL)
    h = kernels.lipschitz_rnn.lipschitz_rnn(
      layers.zero_padding(self.encoder(x), mask_BL),
      *self.matrices(),
      epsilon=self.epsilon,
      method=self.method,
      gate_BTD=None if self.gate is None else self.gate(x),
      last=True,
      unroll=self.unroll,
      implementation=self.implementation,
    )
    key = rngs.dropout() if train and self.dropout else None
    return self.head(layers.dropout(h, self.dropout, key))


def _shape_spectrum(m_DD, beta, gamma):
  return beta * (m_DD - m_DD.T) + (1 - beta) * (m_DD + m_DD.T) - gamma * jnp.eye(len(m_DD))
