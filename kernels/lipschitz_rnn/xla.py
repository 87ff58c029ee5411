"""The recurrence as one `lax.scan`, whose backward pass keeps the states alone (see `rule`).

Within the loops the time axis comes first; the arrays that they read and write are transposed once.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels.lipschitz_rnn import rule


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
  swap = lambda x: None if x is None else x.swapaxes(0, 1)
  result = _recurrence(swap(z_BTD), swap(gate_BTD), a_DD, w_DD, settings)
  return result if settings.last else swap(result)


def _forward(z_TBD, gate_TBD, a_DD, w_DD, settings, keep):
  method, dtype = rule.METHODS[settings.method], z_TBD.dtype
  both_D2D = jnp.concatenate([a_DD, w_DD], axis=1).astype(dtype)  # h A and h W are one product

  def step(h, inputs):
    z, gate = (x if x is None else x.astype(jnp.float32) for x in inputs)
    ks = []
    for nodes in method.nodes:
      increment = rule.weighted(nodes, ks)
      m = h if increment is None else h + settings.epsilon * increment
      ha, hw = jnp.split(jnp.matmul(m.astype(dtype), both_D2D, preferred_element_type=jnp.float32), 2, axis=-1)
      k = ha + jnp.tanh(hw + z)
      ks.append(k if gate is None else k * rule.sigmoid(hw + gate))
    after = h + settings.epsilon * rule.weighted(method.weights, ks)
    if not settings.last:
      return after, after.astype(dtype)
    return after, h.astype(dtype) if keep else None

  zero = jnp.zeros(z_TBD.shape[1:], jnp.float32)
  last, states = lax.scan(step, zero, (z_TBD, gate_TBD), unroll=settings.unroll)
  return (last, states) if settings.last else (states, None)


def _adjoint(d, alphas, betas, a_DD, w_DD, settings):
  method, dtype = rule.METHODS[settings.method], betas[0].dtype
  both_2DD = jnp.concatenate([a_DD.T, w_DD.T]).astype(dtype)

  def step(delta, inputs):
    d, alphas, betas = inputs
    if d is not None:
      delta = delta + d.astype(jnp.float32)
    mu, kappas = [], []
    for index in reversed(range(len(betas))):
      kappa = rule.adjoint_stage(method, index, delta, mu)
      scaled = kappa if alphas is None else kappa * alphas[index]
      operand = jnp.concatenate([scaled, kappa * betas[index]], axis=-1).astype(dtype)
      mu.insert(0, settings.epsilon * jnp.matmul(operand, both_2DD, preferred_element_type=jnp.float32))
      kappas.insert(0, kappa.astype(dtype))
    return delta + sum(mu), kappas

  initial = d if settings.last else jnp.zeros(d.shape[1:], jnp.float32)
  inputs = (None if settings.last else d, alphas, betas)
  return lax.scan(step, initial, inputs, reverse=True, unroll=settings.unroll)[1]


_recurrence = rule.differentiable(_forward, _adjoint, time_axis=0)
