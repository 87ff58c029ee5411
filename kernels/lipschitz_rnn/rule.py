"""What the forms of the recurrence share: its methods of integration and the rule of its gradient. For "mosaic" also
the part of the backward pass that is no recurrence, so that it keeps the states alone.

Every method is an explicit Runge-Kutta method of S stages: m_i = h + ε Σ_j N_ij k_j, k_i = f(m_i), and
h' = h + ε Σ_i b_i k_i. Given the states h of all steps, the m_i of all steps are a few large products, and so are the
derivatives of f there. What is left for the sequential part of the backward pass is linear: with δ = ∂loss/∂h', from
the last stage to the first,

  κ_i = b_i δ + Σ_{j>i} N_ji μ_j,   μ_i = ε ((κ_i ⊙ α_i) Aᵀ + (κ_i ⊙ β_i) Wᵀ),   ∂loss/∂h = δ + Σ_i μ_i

where α_i is the gate's value, 1 without one, and β_i = ∂k_i / ∂(m_i W). All gradients follow from the κ_i of all steps,
again by large products.

Axes: B batch, T steps, D hidden units, S stages.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Method(NamedTuple):
  """An explicit Runge-Kutta method: the rows of N, below its diagonal, and b."""

  nodes: tuple[tuple[float, ...], ...]
  weights: tuple[float, ...]


METHODS = {
  "euler": Method(((),), (1,)),
  "midpoint": Method(((), (1 / 2,)), (0, 1)),
  "rk4": Method(((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),  # Kutta's 3/8 rule
}


class Settings(NamedTuple):
  """ε, a key of METHODS, whether only the last state is returned, and steps in one iteration of a loop."""

  epsilon: float
  method: str
  last: bool
  unroll: int


class _Stage(NamedTuple):
  """For all steps m_i, α_i (None for 1), β_i, and ∂k_i/∂gate, (B, T, D) each in the states' dtype."""

  state: jax.Array
  alpha: jax.Array | None
  beta: jax.Array
  gate: jax.Array | None


def weighted(coefficients: Sequence[float], values: Sequence[jax.Array]) -> jax.Array | None:
  """Σ c v over the coefficients that are not 0; None if all are."""
  terms = [v if c == 1 else c * v for c, v in zip(coefficients, values, strict=True) if c]
  return functools.reduce(jnp.add, terms) if terms else None


def adjoint_stage(method: Method, index: int, delta: jax.Array, mu: Sequence[jax.Array]) -> jax.Array:
  """κ of stage `index`, of δ and of the μ of the stages after it, in their order."""
  return weighted((method.weights[index], *(row[index] for row in method.nodes[index + 1 :])), (delta, *mu))


def sigmoid(x: jax.Array) -> jax.Array:
  """By tanh, which costs no division."""
  return 0.5 * jnp.tanh(0.5 * x) + 0.5


def differentiable(forward: Callable, adjoint: Callable) -> Callable:
  """The recurrence with a gradient.

  Args:
    forward: `forward(z, gate, a, w, settings, keep)` → (the result, the state before every step, in z's dtype, if
      `keep and settings.last`, else None).
    adjoint: `adjoint(d, alphas, betas, a, w, settings)` → the κ_i of all steps, in z's dtype; `d` is the gradient by
      the result, `alphas` is None where there is no gate.

  Returns:
    `recurrence(z, gate, a, w, settings)`; z and the gate (or None) are (B, T, D), a and w (D, D).
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
  def recurrence(z, gate, a, w, settings):
    return forward(z, gate, a, w, settings, keep=False)[0]

  def keeping(z, gate, a, w, settings):
    result, before = forward(z, gate, a, w, settings, keep=True)
    return result, (z, gate, a, w, before if settings.last else result)

  def backward(settings, residuals, d):
    z, gate, a, w, states = residuals
    if not settings.last:
      states = jnp.pad(states, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    stages = _linearise(states, z, gate, a, w, settings)
    alphas = [stage.alpha for stage in stages] if gate is not None else None
    kappas = adjoint(d, alphas, [stage.beta for stage in stages], a, w, settings)
    kappas = [settings.epsilon * kappa.astype(jnp.float32) for kappa in kappas]
    dz = dgate = da = dw = 0.0
    for stage, kappa in zip(stages, kappas, strict=True):
      by_product = kappa * stage.beta
      dw += contract(stage.state, by_product)
      if gate is None:
        da += contract(stage.state, kappa)
        dz += by_product
      else:
        da += contract(stage.state, kappa * stage.alpha)
        by_gate = kappa * stage.gate
        dgate += by_gate
        dz += by_product - by_gate
    dgate = None if gate is None else dgate.astype(gate.dtype)
    return dz.astype(z.dtype), dgate, da.astype(a.dtype), dw.astype(w.dtype)

  recurrence.defvjp(keeping, backward)
  return recurrence


def _linearise(h, z, gate, a, w, settings) -> list[_Stage]:
  """The stages of all steps, from the states before them."""
  method, stages, ks = METHODS[settings.method], [], []
  z = z.astype(jnp.float32)
  for nodes in method.nodes:
    increment = weighted(nodes, ks)
    m = h if increment is None else (h.astype(jnp.float32) + settings.epsilon * increment).astype(h.dtype)
    product = _dot(m, w)
    s = jnp.tanh(product + z)
    k, beta, alpha, by_gate = _dot(m, a) + s, 1 - s * s, None, None
    if gate is not None:
      q = sigmoid(product + gate.astype(jnp.float32))
      alpha, by_gate = q.astype(h.dtype), k * q * (1 - q)
      k, beta, by_gate = k * q, q * beta + by_gate, by_gate.astype(h.dtype)
    ks.append(k)
    stages.append(_Stage(m, alpha, beta.astype(h.dtype), by_gate))
  return stages


def _dot(x, w):
  """A product with operands in x's dtype and a float32 sum."""
  return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def contract(x: jax.Array, y: jax.Array) -> jax.Array:
  """Σ over all axes but the last of xᵀ y, a float32 matrix, with operands in x's dtype."""
  x, y = (part.reshape(-1, part.shape[-1]) for part in (x, y.astype(x.dtype)))
  return jnp.matmul(x.T, y, preferred_element_type=jnp.float32)
