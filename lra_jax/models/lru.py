"""LRU, the linear recurrent unit (Orvieto et al. 2023, arXiv 2303.06349).

h_t = λ ⊙ h_{t−1} + γ ⊙ (B u_t), y_t = Re(C h_t) + D ⊙ u_t, with λ = exp(−exp ν + i exp θ), so that |λ| < 1 whatever the
parameters are, and γ = √(1 − |λ|²) at the start (section 3 of the paper). |λ|² is drawn uniformly between r_min² and
r_max², the phase between 0 and max_phase; B from N(0, 1 / 2D), C from N(0, 1 / N) for each part, D from N(0, 1)
(appendix A).

Axes: B batch, L steps, D width, N states.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import kernels.linear_recurrence
from lra_jax.models import linear_rnn

LRU_MODELS = {
  # Sizes of minimal-LRU's sequential CIFAR command.
  "lru": dict(width=256, depth=4, states=128, dropout=0.1),
  # Sizes that others give for the paper's table 3; its own hyper-parameters we could not read.
  "lru_large": dict(width=512, depth=6, states=384, r_min=0.9, r_max=0.999, dropout=0.1),
  # Ours.
  "lru_digits": dict(width=64, depth=3, states=64),
}


class LruCell(nnx.Module):
  """The recurrence of one layer: (B, L, D) → (B, L, D)."""

  def __init__(self, width, states, *, r_min, r_max, max_phase, implementation, dtype, rngs):
    self.dtype, self.implementation = dtype, implementation

    def uniform(low, high):
      return jax.random.uniform(rngs.params(), (states,), jnp.float32, low, high)

    def normal(shape, variance):
      return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * variance**0.5)

    log_radius = 0.5 * jnp.log(uniform(r_min**2, r_max**2))
    self.nu_log = nnx.Param(jnp.log(-log_radius))
    self.theta_log = nnx.Param(jnp.log(uniform(0.0, max_phase)))
    self.gamma_log = nnx.Param(0.5 * jnp.log1p(-jnp.exp(2 * log_radius)))
    self.b_re, self.b_im = (normal((states, width), 1 / (2 * width)) for _ in range(2))
    self.w_c_re, self.w_c_im = (normal((width, states), 1 / states) for _ in range(2))
    self.d = normal((width,), 1.0)

  def eigenvalues(self) -> tuple[jax.Array, jax.Array]:
    """Real and imaginary part of λ, (N,) each."""
    radius, phase = jnp.exp(-jnp.exp(self.nu_log[...])), jnp.exp(self.theta_log[...])
    return radius * jnp.cos(phase), radius * jnp.sin(phase)

  def __call__(self, u_BLD: jax.Array) -> jax.Array:
    gamma = jnp.exp(self.gamma_log[...]).reshape(-1, 1)
    project = jnp.concatenate([gamma * self.b_re[...], gamma * self.b_im[...]]).T.astype(self.dtype)
    x_re, x_im = jnp.split(u_BLD @ project, 2, axis=-1)
    h = kernels.linear_recurrence.linear_recurrence(x_re, x_im, *self.eigenvalues(), implementation=self.implementation)
    read = jnp.concatenate([self.w_c_re[...], -self.w_c_im[...]], axis=1).T.astype(self.dtype)
    return jnp.concatenate(h, axis=-1) @ read + self.d[...].astype(u_BLD.dtype).reshape(1, 1, -1) * u_BLD


class Lru(linear_rnn.Stack):
  """Encoder, LRU layers, mean over time, Dense."""

  def __init__(
    self,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocab_size: int | None = None,
    width: int,
    depth: int,
    states: int,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 6.28,
    patch_size: int = 1,
    norm: str = "batch",
    norm_momentum: float = 0.99,
    prenorm: bool = True,
    activation: str = "full_glu",
    pool: str = "mean",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    remat: bool = False,
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
      depth: number of layers.
      states: N.
      r_min, r_max: of |λ| at the start.
      max_phase: of λ at the start, radians.
      patch_size: pixels; 1 for sequences and tokens.
      norm: "batch" or "layer".
      norm_momentum: of BatchNorm's running statistics.
      prenorm: whether the norm comes first in a layer, or last, after the skip.
      activation: "full_glu" (the paper), "half_glu1", "half_glu2" or "gelu".
      pool: "mean" over time, or "last" step.
      dropout: rate of channels, the same ones at all steps.
      drop_path: rate of stochastic depth of the last layer, linear from 0 at the first (not in the paper).
      remat: recompute every layer in the backward pass instead of keeping its activations.
      implementation: of the recurrence, see `kernels.linear_recurrence`.
      dtype: of the products.
      rngs: streams `params` (here) and `dropout` (in the call).

    Raises:
      UserError: values that do not fit each other or the input.
    """
    super().__init__(
      lambda: LruCell(
        width,
        states,
        r_min=r_min,
        r_max=r_max,
        max_phase=max_phase,
        implementation=implementation,
        dtype=jnp.dtype(dtype),
        rngs=rngs,
      ),
      input_shape=input_shape,
      num_classes=num_classes,
      vocab_size=vocab_size,
      width=width,
      depth=depth,
      patch_size=patch_size,
      norm=norm,
      norm_momentum=norm_momentum,
      prenorm=prenorm,
      activation=activation,
      pool=pool,
      dropout=dropout,
      drop_path=drop_path,
      remat=remat,
      dtype=jnp.dtype(dtype),
      rngs=rngs,
    )
