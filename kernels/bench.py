"""Times the operations at their real shapes: `python -m kernels.bench [operation] [--grad]`.

Prints the median of a few runs of every implementation; forms are run in turn, so that noise hits all.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import kernels.lstm
from kernels.lstm import shapes


def lstm_cases(grad: bool):
  """Yields (shape's name, {form: jitted function}, arguments)."""
  forms = {
    "xla": ("xla", 1),
    "xla, unroll 4": ("xla", 4),
    "xla, unroll all": ("xla", 64),
    "reference": ("reference", 1),
  }
  for name, shape in shapes.BILSTM2D.items():
    rng = np.random.RandomState(0)
    k = shape.hidden
    sizes = [(shape.channels, 4, 4 * k), (4, k, 4 * k), (4, 4 * k), (4, 4 * k)]
    x = jnp.asarray(rng.randn(*shape[:4]), jnp.float32)
    arguments = (x, *(jnp.asarray(rng.uniform(-(k**-0.5), k**-0.5, s), jnp.float32) for s in sizes))
    functions = {}
    for form, (implementation, unroll) in forms.items():

      def run(*arguments, implementation=implementation, unroll=unroll):
        return kernels.lstm.bilstm2d(*arguments, implementation=implementation, unroll=unroll)

      def gradient(*arguments, run=run):
        return jax.grad(lambda *a: (run(*a) ** 2).sum(), argnums=(0, 1, 2, 3, 4))(*arguments)

      functions[form] = jax.jit(gradient if grad else run)
    yield name, functions, arguments


OPERATIONS = {"lstm": lstm_cases}


def main() -> None:
  """Parses the command line and prints a line a shape."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("operation", nargs="*", choices=[*OPERATIONS, []], default=[])
  parser.add_argument("--grad", action="store_true", help="forward and gradient of all arguments")
  parser.add_argument("--rounds", type=int, default=7)
  arguments = parser.parse_args()
  print(
    f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {'gradient' if arguments.grad else 'forward'}, ms (median)"
  )
  for operation in arguments.operation or OPERATIONS:
    for name, functions, inputs in OPERATIONS[operation](arguments.grad):
      compiles, times = {}, {form: [] for form in functions}
      for form, function in functions.items():
        start = time.perf_counter()
        compiled = function.lower(*inputs).compile()
        compiles[form] = time.perf_counter() - start
        functions[form] = compiled
        jax.block_until_ready(compiled(*inputs))
      for _ in range(arguments.rounds):
        for form, function in functions.items():
          start = time.perf_counter()
          jax.block_until_ready(function(*inputs))
          times[form].append(time.perf_counter() - start)
      row = "; ".join(f"{f} {statistics.median(t) * 1e3:.1f} (compile {compiles[f]:.1f} s)" for f, t in times.items())
      print(f"{operation} {name} {tuple(next(iter(inputs)).shape)}: {row}", flush=True)


if __name__ == "__main__":
  main()
