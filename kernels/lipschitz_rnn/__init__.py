"""The Lipschitz recurrent network's hidden states (Erichson et al. 2021, arXiv 2006.12070, equation 3).

Axes: B batch, T time steps, D hidden units. The state follows ḣ = h A + tanh(h W + z_t) over the time ε at every step,
from h_0 = 0; by Euler's method h_t = h_{t−1} + ε (h_{t−1} A + tanh(h_{t−1} W + z_t)). With a gate g the velocity is
(h A + tanh(h W + z_t)) ⊙ σ(h W + g_t). The state is carried in float32 whatever the input's dtype.

"mosaic" is a Pallas kernel for Hopper GPUs that runs all steps in one launch: the matrices stay in shared memory or
registers, the state in registers, and the inputs stream in. Its backward pass is such a kernel too, in reversed time,
between the large products that do not depend on one another. In between it keeps the inputs and the states, O(T D).
"xla" is a loop over the steps; for the backward pass it keeps two arrays of z's size for each stage of the method (one
for Euler's, two for the midpoint's, four for Kutta's) and two more with a gate, so that it computes nothing twice.

The batch comes first, as it does in models; no form has to transpose.
"""

import jax

from kernels import dispatch
from kernels.lipschitz_rnn import reference, rule, xla

METHODS = tuple(rule.METHODS)


def _mosaic(*arguments):
  from kernels.lipschitz_rnn import mosaic

  return mosaic.recurrence(*arguments)


IMPLEMENTATIONS = {"reference": reference.recurrence, "xla": xla.recurrence, "mosaic": _mosaic}


def lipschitz_rnn(
  z_BTD: jax.Array,
  a_DD: jax.Array,
  w_DD: jax.Array,
  *,
  epsilon: float,
  method: str = "euler",
  gate_BTD: jax.Array | None = None,
  last: bool = False,
  unroll: int = 1,
  implementation: str | None = None,
) -> jax.Array:
  """The states after every step, or after the last one.

  Args:
    z_BTD: z, float32 or bfloat16; the products are in its dtype, with float32 sums.
    a_DD: A, multiplied from the right (h A).
    w_DD: W, likewise.
    epsilon: ε, the time that passes in one step.
    method: "euler", "midpoint" or "rk4" (Kutta's 3/8 rule).
    gate_BTD: g, of z's dtype, or None for no gate; for Euler's method alone.
    last: whether only the state after the last step is returned.
    unroll: steps in one iteration of the loop of "xla".
    implementation: "reference", "xla", "mosaic" or None (the best that can serve).

  Returns:
    (B, T, D) in z's dtype; with `last` (B, D) float32.

  Raises:
    ValueError: shapes that do not fit, an unknown method or implementation, a gate with another method than Euler's, or
      an implementation that cannot serve.
  """
  if method not in METHODS:
    raise ValueError(f"lipschitz_rnn: method={method!r} is unknown; there are {', '.join(map(repr, METHODS))}")
  if gate_BTD is not None and method != "euler":
    raise ValueError(f"lipschitz_rnn: method={method!r}: the gated form is defined for 'euler' alone")
  if z_BTD.ndim != 3 or 0 in z_BTD.shape:
    raise ValueError(f"lipschitz_rnn: z has shape {z_BTD.shape}, expected three axes that are not empty")
  width = z_BTD.shape[-1]
  expected = {"a": (a_DD, (width, width)), "w": (w_DD, (width, width)), "gate": (gate_BTD, z_BTD.shape)}
  for name, (array, shape) in expected.items():
    if array is not None and array.shape != shape:
      raise ValueError(f"lipschitz_rnn: {name} has shape {array.shape}, expected {shape}")
  if gate_BTD is not None and gate_BTD.dtype != z_BTD.dtype:
    raise ValueError(f"lipschitz_rnn: gate has dtype {gate_BTD.dtype}, expected z's, {z_BTD.dtype}")

  def refuse():
    from kernels.lipschitz_rnn import mosaic

    return mosaic.refuse(z_BTD)

  run = dispatch.choose("lipschitz_rnn", IMPLEMENTATIONS, implementation, "xla", refuse)
  settings = rule.Settings(float(epsilon), method, last, unroll)
  per_device = dispatch.per_device(lambda *arrays: run(*arrays, settings), (True, True, False, False))
  return per_device(z_BTD, gate_BTD, a_DD, w_DD)
