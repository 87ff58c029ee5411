"""Which implementation of an operation runs: an explicit choice is binding, None takes the best that can serve."""

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

_log = logging.getLogger(__name__)

KERNELS = ("mosaic", "cudnn")  # implementations that XLA does not compile

_PLATFORM: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("platform", default=None)
_INTERPRET: contextvars.ContextVar[bool] = contextvars.ContextVar("interpret", default=False)
_SPLIT: contextvars.ContextVar[tuple[Mesh, tuple[str, ...], Callable] | None] = contextvars.ContextVar(
  "split", default=None
)
_WITHOUT: contextvars.ContextVar[bool] = contextvars.ContextVar("without_kernels", default=False)
_CHOICES: contextvars.ContextVar[dict[str, dict[str, str]] | None] = contextvars.ContextVar("choices", default=None)


class UnsupportedError(ValueError):
  """An implementation was asked for that does not exist or cannot serve here."""


def platform() -> str:
  """The platform that code is traced for, such as "cpu" or "gpu": JAX's default unless `compiling_for` names one."""
  named = _PLATFORM.get()
  return named[0] if named else jax.default_backend()


@contextlib.contextmanager
def compiling_for(name: str, compute_capability: str = "9.0") -> Iterator[None]:
  """Within it, None means what is best on the platform `name`, such as "gpu" on a machine that has none.

  The choice is made where a function is traced, so the tracing must lie within; what `jax.jit` has traced before for
  the same shapes keeps its choice.

  Args:
    name: "cpu" or "gpu".
    compute_capability: of the GPU.
  """
  token = _PLATFORM.set((name, compute_capability))
  try:
    yield
  finally:
    _PLATFORM.reset(token)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
  """Within it, "mosaic" may be chosen without a GPU: its kernels are interpreted on the CPU, very slowly, and every
  access to memory is checked for races. For tests."""
  token = _INTERPRET.set(True)
  try:
    yield
  finally:
    _INTERPRET.reset(token)


def interpreted() -> bool:
  """Whether `interpreting` is in force."""
  return _INTERPRET.get()


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
  """Within it, an operation takes its form for XLA even where a kernel is asked for.

  For counting the operations of a program: a kernel's do not show in what is traced.
  """
  token = _WITHOUT.set(True)
  try:
    yield
  finally:
    _WITHOUT.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, dict[str, str]]]:
  """Collects the choices made within: operation → implementation → reason. One operation may have several."""
  choices: dict[str, dict[str, str]] = {}
  token = _CHOICES.set(choices)
  try:
    yield choices
  finally:
    _CHOICES.reset(token)


@contextlib.contextmanager
def batches_split(
  mesh: Mesh,
  axes: tuple[str, ...] = ("data",),
  weights: Callable[[jax.Array], PartitionSpec] = lambda array: PartitionSpec(),
) -> Iterator[None]:
  """Within it, `per_device` runs a function on every device's part of a batch.

  Args:
    mesh: of the devices.
    axes: of the mesh, over which batches are split.
    weights: how an array without a batch is split, by its shape; whole everywhere if not given.
  """
  token = _SPLIT.set((mesh, axes, weights))
  try:
    yield
  finally:
    _SPLIT.reset(token)


def per_device(function: Callable, batched: Sequence[bool]) -> Callable:
  """`function` under `jax.shard_map` within `batches_split`, else as it is.

  XLA cannot split a kernel by itself. Of a loop over time it gathers the weights, and sums up their gradients over the
  devices, in every step; so it is done once, before and after. Gradients of split weights are scattered, not summed up
  whole.

  Args:
    function: of arrays; all of its results have the batch as their first axis.
    batched: for every argument, whether its first axis is the batch; the function gets the others whole.
  """
  split = _SPLIT.get()
  if split is None or split[0].size == 1 or interpreted():
    return function
  mesh, axes, weights = split
  batch = PartitionSpec(axes)

  def run(*arrays):
    specs = tuple(batch if is_batched else weights(array) for array, is_batched in zip(arrays, batched, strict=True))

    def on_device(*parts):
      whole = (part if spec is batch else _gather(part, spec) for part, spec in zip(parts, specs, strict=True))
      return function(*whole)

    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)(*arrays)

  return run


def _gather(part, spec):
  for axis, names in enumerate(spec):
    if names is not None:
      part = jax.lax.all_gather(part, names, axis=axis, tiled=True)
  return part


def choose(
  op: str,
  implementations: Mapping[str, Callable],
  implementation: str | None,
  default: str,
  refuse: Callable[[], str | None] | None = None,
  refusals: Mapping[str, Callable[[], str | None]] | None = None,
) -> Callable:
  """Returns the implementation called `implementation`; for None "mosaic" where it can serve, else `default`.

  Args:
    op: the operation's name, for the messages.
    implementations: name → function.
    implementation: a key of `implementations`, or None.
    default: the key taken for None where "mosaic" cannot serve.
    refuse: why the arguments at hand do not suit "mosaic", or None if they do. Called only where the device suits it.
    refusals: of other implementations: why it cannot serve here, or None if it can. Called only where it is asked for.

  Raises:
    UnsupportedError: no implementation has that name, or it cannot serve here. There is no silent fallback.
  """
  if implementation is not None and implementation not in implementations:
    known = ", ".join(map(repr, implementations))
    raise UnsupportedError(f"{op}: implementation={implementation!r} is unknown; there are {known}")
  if _WITHOUT.get() and implementation in (None, *KERNELS):
    return implementations[default]
  if refusals and implementation in refusals and (refusal := refusals[implementation]()):
    raise UnsupportedError(f"{op}: implementation={implementation!r} cannot serve: {refusal}")
  reason, name = "asked for", implementation
  if implementation in (None, "mosaic") and "mosaic" in implementations:
    refusal = _device_refusal() or (refuse and refuse())
    if implementation and refusal:
      raise UnsupportedError(f"{op}: implementation='mosaic' cannot serve: {refusal}")
    if not implementation and not interpreted():
      name, reason = (default, f"no mosaic: {refusal}") if refusal else ("mosaic", "the device and the shapes suit it")
  if name is None:
    name, reason = default, f"best on {platform()}"
  choices = _CHOICES.get()
  if choices is not None and name not in choices.setdefault(op, {}):
    choices[op][name] = reason
    _log.info("%s: %s (%s)", op, name, reason)
  return implementations[name]


def _device_refusal() -> str | None:
  """Why no Mosaic GPU kernel can run on the device that code is traced for; None if it can."""
  if interpreted():
    return None
  if platform() not in ("gpu", "cuda"):
    return f"it needs an NVIDIA Hopper GPU, and this is {platform()}"
  named = _PLATFORM.get()
  capability = named[1] if named else getattr(jax.devices()[0], "compute_capability", "unknown")
  # The matrix instructions of Hopper (wgmma, sm_90a) exist on no other generation, not even on later ones.
  if not str(capability).startswith("9."):
    return f"it needs an NVIDIA Hopper GPU (compute capability 9), and this one has {capability}"
  return None
