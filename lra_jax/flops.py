"""Floating-point operations of a traced function, loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once, which misses most of a recurrent model.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.extend

from kernels import dispatch


def count(jaxpr: jax.extend.core.Jaxpr) -> int:
  """Operations of all matrix products and convolutions, a multiplication and an addition counted as two.

  Args:
    jaxpr: as in `jax.jit(f).trace(*args).jaxpr`; `scan` bodies count `length` times, `while` bodies once (their number
      of turns is not in the program), all branches of a `cond`.

  Returns:
    The number for all devices together.
  """
  total = 0
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    elif equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      features = equation.params["dimension_numbers"].rhs_spec[0]
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[features]
    else:
      times = equation.params["length"] if equation.primitive.name == "scan" else 1
      total += times * sum(count(sub) for sub in jax.extend.core.jaxprs_in_params(equation.params))
  return total


def count_call(make: Callable, arguments: tuple, traced: jax.stages.Traced, choices: Mapping[str, Mapping]) -> int:
  """`count` of a traced call, with XLA's forms in place of the kernels in it, whose products a jaxpr does not show.

  Args:
    make: returns the call anew, as `jax.jit` traces a call only once.
    arguments: that it was traced for.
    traced: `make().trace(*arguments)`.
    choices: what `dispatch.recording` collected meanwhile.
  """
  if not any(form in dispatch.KERNELS for forms in choices.values() for form in forms):
    return count(traced.jaxpr)
  with dispatch.without_kernels():
    return count(make().trace(*arguments).jaxpr)
