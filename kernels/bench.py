"""Times the operations at their real shapes: `python -m kernels.bench [operation] [--grad]`.

Prints the median of a few runs of every implementation; forms are run in turn, so that noise hits all.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import kernels.conv2d.shapes
import kernels.depthwise_conv.shapes
import kernels.fft_mixing.shapes
import kernels.linear_recurrence.shapes
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


def linear_recurrence_cases(grad: bool):
  """As `lstm_cases`; a constant diagonal, the forward direction."""
  for name, shape in kernels.linear_recurrence.shapes.LINEAR_RECURRENCE.items():
    rng = np.random.RandomState(0)
    diagonal = rng.uniform(0.9, 0.999, shape.states) * np.exp(1j * rng.uniform(0, 2 * np.pi, shape.states))
    arrays = rng.randn(*shape), rng.randn(*shape), diagonal.real, diagonal.imag
    arguments = tuple(jnp.asarray(array, jnp.float32) for array in arrays)
    functions = {}
    for form in kernels.linear_recurrence.IMPLEMENTATIONS:

      def run(*arguments, form=form):
        return kernels.linear_recurrence.linear_recurrence(*arguments, implementation=form)

      def gradient(*arguments, run=run):
        return jax.grad(lambda *a: sum((part**2).sum() for part in run(*a)), argnums=(0, 1, 2, 3))(*arguments)

      functions[form] = jax.jit(gradient if grad else run)
    yield name, functions, arguments


def fft_mixing_cases(grad: bool):
  """As `lstm_cases`."""
  for name, shape in kernels.fft_mixing.shapes.FFT_MIXING.items():
    functions = {}
    for form in kernels.fft_mixing.IMPLEMENTATIONS:

      def run(x, form=form):
        return kernels.fft_mixing.fft_mixing(x, implementation=form)

      functions[form] = jax.jit(jax.grad(lambda x, run=run: (run(x) ** 2).sum()) if grad else run)
    yield name, functions, (jnp.asarray(np.random.RandomState(0).randn(*shape), jnp.float32),)


def depthwise_conv_cases(grad: bool):
  """As `lstm_cases`."""
  for name, shape in kernels.depthwise_conv.shapes.DEPTHWISE_CONV.items():
    weights = shape.kernel, shape.kernel, shape.channels
    forms = {
      form: functools.partial(kernels.depthwise_conv.depthwise_conv2d, implementation=form)
      for form in ("xla", "shifted")
    }
    yield name, *_convolution_case(grad, forms, shape[:4], weights)


def conv2d_cases(grad: bool):
  """As `lstm_cases`."""
  for name, shape in kernels.conv2d.shapes.CONV2D.items():
    weights = shape.kernel, shape.kernel, shape.channels, shape.outputs
    options = {"strides": shape.strides, "padding": shape.padding}
    forms = {
      form: functools.partial(kernels.conv2d.conv2d, implementation=form, **options) for form in ("xla", "im2col")
    }
    yield name, *_convolution_case(grad, forms, shape[:4], weights)


def _convolution_case(grad, forms, *sizes):
  """({form: jitted function}, arguments) for functions of images and weights."""
  arguments = tuple(jnp.asarray(np.random.RandomState(0).randn(*size), jnp.float32) for size in sizes)
  gradient = lambda run: jax.grad(lambda x, w: (run(x, w) ** 2).sum(), argnums=(0, 1))
  return {form: jax.jit(gradient(run) if grad else run) for form, run in forms.items()}, arguments


OPERATIONS = {
  "lstm": lstm_cases,
  "linear_recurrence": linear_recurrence_cases,
  "fft_mixing": fft_mixing_cases,
  "depthwise_conv": depthwise_conv_cases,
  "conv2d": conv2d_cases,
}


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
