"""The recurrence as one `lax.scan`, with a backward pass written by hand that computes nothing again.

The loops move no axis: they read step t of (B, T, D) where it lies and write over it what is needed later, so that on
CPU fresh memory, whose first touch costs as much as the arithmetic on it, is taken only where there is nothing to
replace. Kept for the gradient are, for every stage of every step, the state m_i and the derivative of tanh, that of the
first stage in z's place; with a gate also its value, in the gate's place, and the derivative by it. The backward loop
writes the gradients by z and the gate over them in turn, and sums those of A and W as it goes. The barriers are for the
CPU too: without them XLA copies a whole array at every step before it writes into it, as long as something reads it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.lipschitz_rnn import rule


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def recurrence(
  z_BTD: jax.Array, gate_BTD: jax.Array | None, a_DD: jax.Array, w_DD: jax.Array, settings: rule.Settings
) -> jax.Array:
  """All states, (B, T, D) in z's dtype, or with `settings.last` the last one, (B, D) float32.

  Args:
    z_BTD: the input of tanh without its recurrent part.
    gate_BTD: that of the gate, or None.
    a_DD, w_DD: matrices; the products are in z's dtype.
    settings: see `rule.Settings`.
  """
  return _forward(z_BTD, gate_BTD, a_DD, w_DD, settings, keep=False)[0]


def _forward(z_BTD, gate_BTD, a_DD, w_DD, settings, keep):
  """The result, and if `keep` the m_i, the gate's value times the derivatives of tanh, that value, and ∂k/∂gate."""
  method, dtype = rule.METHODS[settings.method], z_BTD.dtype
  both_D2D = jnp.concatenate([a_DD, w_DD], axis=1).astype(dtype)  # h A and h W are one product
  stages = range(len(method.weights))

  def step(carry, t):
    h, z_BTD, gate_BTD, states, betas, slope_BTD = carry
    z, gate = lax.optimization_barrier([None if x is None else _read(x, t) for x in (z_BTD, gate_BTD)])
    ms, ss, ks = [], [], []
    for nodes in method.nodes:
      increment = rule.weighted(nodes, ks)
      ms.append(h if increment is None else h + settings.epsilon * increment)
      ha, hw = jnp.split(jnp.matmul(ms[-1].astype(dtype), both_D2D, preferred_element_type=jnp.float32), 2, axis=-1)
      ss.append(jnp.tanh(hw + z))
      ks.append(ha + ss[-1])
      if gate is not None:
        k, q = ks[-1], rule.sigmoid(hw + gate)
        ks[-1] = k * q
    after = h + settings.epsilon * rule.weighted(method.weights, ks)
    if keep:
      if not settings.last:
        ms[0] = after  # the result, in which the backward pass finds what was before the next step
      states = [_write(x, m, t) for x, m in zip(states, ms, strict=True)]
      new = [1 - s * s for s in ss]
      if gate is not None:
        new = [q * new[0]]
        gate_BTD, slope_BTD = _write(gate_BTD, q, t), _write(slope_BTD, k * q * (1 - q), t)
      z_BTD, *betas = (_write(x, beta, t) for x, beta in zip((z_BTD, *betas), new, strict=True))
    elif not settings.last:
      z_BTD = _write(z_BTD, after, t)
    return (after, z_BTD, gate_BTD, states, betas, slope_BTD), None

  batch, steps, width = z_BTD.shape
  empty = jnp.zeros(z_BTD.shape, dtype)
  states, betas = ([empty for _ in stages], [empty for _ in stages[1:]]) if keep else ([], [])
  slope_BTD = empty if keep and gate_BTD is not None else None
  initial = jnp.zeros((batch, width), jnp.float32), z_BTD, gate_BTD, states, betas, slope_BTD
  (last, z_BTD, gate_BTD, states, betas, slope_BTD), _ = lax.scan(
    step, initial, jnp.arange(steps), unroll=settings.unroll
  )
  result = last if settings.last else states[0] if keep else z_BTD
  return result, (states, [z_BTD, *betas], gate_BTD, slope_BTD, a_DD, w_DD) if keep else None


def _backward(settings, residuals, d):
  states, (beta_BTD, *betas), alpha_BTD, slope_BTD, a_DD, w_DD = residuals
  method, dtype = rule.METHODS[settings.method], beta_BTD.dtype
  both_2DD = jnp.concatenate([a_DD.T, w_DD.T]).astype(dtype)
  batch, _, width = beta_BTD.shape

  def step(carry, t):
    delta, dboth_D2D, dz_BTD, dgate_BTD = carry  # the last two: at steps to come, the factors of these gradients
    factors = [_read(x, t) for x in (dz_BTD, *betas)]
    alpha, slope = (None if x is None else _read(x, t) for x in (alpha_BTD, dgate_BTD))
    factors, alpha, slope = lax.optimization_barrier((factors, alpha, slope))
    ms = [_read(x, t).astype(dtype) for x in states]
    if not settings.last:
      ms[0] = jnp.where(t > 0, _read(states[0], jnp.maximum(t - 1, 0)), 0.0).astype(dtype)
      delta = delta + _read(d, t)
    mu, dz = [], 0.0
    for index in reversed(range(len(factors))):
      kappa = settings.epsilon * rule.adjoint_stage(method, index, delta, mu)
      by_product = kappa * factors[index]
      dz += by_product
      if alpha is not None:
        by_gate = kappa * slope
        kappa, by_product = kappa * alpha, by_product + by_gate
        dgate_BTD = _write(dgate_BTD, by_gate, t)
      operand = jnp.concatenate([kappa, by_product], axis=-1).astype(dtype)
      mu.insert(0, jnp.matmul(operand, both_2DD, preferred_element_type=jnp.float32))
      dboth_D2D += rule.contract(ms[index], operand)
    return (delta + sum(mu), dboth_D2D, _write(dz_BTD, dz, t), dgate_BTD), None

  delta = d if settings.last else jnp.zeros((batch, width), jnp.float32)
  initial = delta, jnp.zeros((width, 2 * width), jnp.float32), beta_BTD, slope_BTD
  times = jnp.arange(beta_BTD.shape[1])
  (_, dboth_D2D, dz_BTD, dgate_BTD), _ = lax.scan(step, initial, times, reverse=True, unroll=settings.unroll)
  da, dw = jnp.split(dboth_D2D, 2, axis=1)
  return dz_BTD, dgate_BTD, da.astype(a_DD.dtype), dw.astype(w_DD.dtype)


recurrence.defvjp(functools.partial(_forward, keep=True), _backward)


def _read(x_BTD, t):
  """Step t in float32."""
  return lax.dynamic_index_in_dim(x_BTD, t, 1, keepdims=False).astype(jnp.float32)


def _write(x_BTD, value_BD, t):
  """x with step t replaced."""
  return lax.dynamic_update_index_in_dim(x_BTD, value_BD.astype(x_BTD.dtype), t, 1)
