"""What runs on the devices: the state at its start, the training step, evaluation, and what compiling them tells.

Training state is one pytree of arrays: {"step", "params", "model_state", "opt_state", "ema", "plateau"}, the last two
where the config asks for them. One call to the device runs M steps.
Axes: B batch, S classes, M steps of a call.
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kernels import dispatch
from lra_jax import errors, flops, metrics, optim, parallel, runs
from lra_jax.data import batches, resident, stream
from lra_jax.data.stream import Streamed

# Randomness is a function of (seed, step, purpose); these are the purposes.
AUGMENT, MIX, DROPOUT = range(3)


def init_state(config, task, schedule, mesh=None) -> tuple[Any, Any, optax.GradientTransformation]:
  """The model's graph definition, the training state at step 0, and the optimizer.

  Args:
    config: of the run.
    task: of the run.
    schedule: of `optim.make_schedule`.
    mesh: where the state is put, as `parallel.by_rule` says; what is split over `fsdp` is never whole on one device.
      None leaves it where JAX computes it.
  """
  optimizer = optim.make_optimizer(config.optim, schedule)

  def make_model():
    graphdef, params, rest = nnx.split(runs.create_model(config, task), nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

  def complete(params, rest):
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "model_state": rest}
    state["opt_state"] = optimizer.init(params)
    if config.optim.ema_decay:
      state["ema"] = {"params": jax.tree.map(jnp.copy, params), "model_state": jax.tree.map(jnp.copy, rest)}
    if config.optim.schedule.name == "plateau":
      state["plateau"] = optim.make_plateau(config.optim).init(params)
    return state

  if mesh is not None and mesh.shape["fsdp"] > 1:
    make_state = lambda: complete(*make_model()[1:])
    shardings = parallel.by_rule(jax.eval_shape(make_state), mesh)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: runs.create_model(config, task)))
    return graphdef, jax.jit(make_state, out_shardings=shardings)(), optimizer
  # Not under jit: compiling every parameter's draw into one program takes far longer than one small program per shape.
  graphdef, params, rest = make_model()
  state = jax.jit(complete)(params, rest)
  return graphdef, state if mesh is None else parallel.put(state, parallel.replicated(mesh)), optimizer


def make_train_call(
  config, task, graphdef, optimizer, schedule, steps: int, mesh, length: int | None = None, shardings=None
):
  """Returns `call(state, data, chosen) -> state, metrics`, M = `steps` training steps in one program.

  Args:
    config: of the run.
    task: of the run.
    graphdef, optimizer: of `init_state`.
    schedule: of `optim.make_schedule`.
    steps: M.
    mesh: of the run.
    length: tokens that texts are cut to; None for whole ones.
    shardings: of state, data and chosen (see `data.feed`); None where state and data are whole on every device.
  """
  batches.check(config, task)
  root = jax.random.key(config.seed)
  parts = config.train.accumulate

  def key_of(step, purpose):
    return jax.random.fold_in(jax.random.fold_in(root, purpose), step)

  def loss_fn(params, model_state, inputs, targets_BS, key):
    model = nnx.merge(graphdef, params, model_state)
    with parallel.batches_split(mesh):
      x, options = inputs
      logits_BS = model(x, **options, train=True, rngs=nnx.Rngs(dropout=key))
    loss = optax.softmax_cross_entropy(logits_BS, targets_BS).mean()
    accuracy = (logits_BS.argmax(-1) == targets_BS.argmax(-1)).mean()
    _, _, model_state = nnx.split(model, nnx.Param, ...)
    return loss, (accuracy, nnx.to_pure_dict(model_state))

  def gradients(params, model_state, inputs, targets_BS, key):
    """Mean gradient over the batch, taken in `parts` parts; every part has examples of every device."""

    def one(carry, part):
      sums, model_state = carry
      x, targets, index = part
      grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
      (loss, (accuracy, model_state)), grads = grad_fn(params, model_state, x, targets, jax.random.fold_in(key, index))
      return (jax.tree.map(jnp.add, sums, (grads, loss, accuracy)), model_state), None

    split = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), (inputs, targets_BS))
    zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(()))
    carry = zeros, model_state
    if mesh.devices.flat[0].platform == "cpu":  # no convolution in a loop there, not even in one of a single turn
      for index in range(parts):
        carry, _ = one(carry, (*jax.tree.map(lambda a, index=index: a[index], split), index))
    else:
      carry, _ = jax.lax.scan(one, carry, (*split, jnp.arange(parts)))
    sums, model_state = carry
    return *jax.tree.map(lambda a: a / parts, sums), model_state

  def step(data, state, chosen):
    number = state["step"]
    examples = batches.take(data, chosen, mesh, length)
    keys = key_of(number, AUGMENT), key_of(number, MIX)
    inputs, targets_BS = batches.training(config, task, examples, *keys, mesh)

    grads, loss, accuracy, model_state = gradients(
      state["params"], state["model_state"], inputs, targets_BS, key_of(number, DROPOUT)
    )
    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    rate = jnp.asarray(schedule(number), jnp.float32)
    if "plateau" in state:
      rate = rate * state["plateau"].scale
      updates = jax.tree.map(lambda u: u * state["plateau"].scale, updates)
    params = optax.apply_updates(state["params"], updates)
    new = {"params": params, "model_state": model_state, "opt_state": opt_state}
    if "ema" in state:
      current = {"params": params, "model_state": model_state}
      new["ema"] = optim.ema_update(state["ema"], current, number, config.optim.ema_decay)
    norm = optax.tree.norm(grads)
    values = {"loss": loss, "accuracy": accuracy, "gradient_norm": norm, "learning_rate": rate}
    if config.optim.skip_limit:
      good = jnp.isfinite(loss) & jnp.isfinite(norm)
      if config.optim.skip_above:
        good &= norm <= config.optim.skip_above
      new = jax.tree.map(functools.partial(jnp.where, good), new, {name: state[name] for name in new})
      values["skipped"] = ~good
    return state | new | {"step": number + 1}, values

  def call(state, data, chosen):
    if steps == 1:
      state, values = step(data, state, jax.tree.map(lambda a: a[0], chosen))
      return state, jax.tree.map(lambda v: v[None], values)
    return jax.lax.scan(functools.partial(step, data), state, chosen)

  whole = parallel.replicated(mesh)
  shardings = shardings or (whole, whole, parallel.sharded(mesh, 1))
  return jax.jit(call, donate_argnums=0, in_shardings=shardings, out_shardings=(shardings[0], whole))


def make_eval_call(config, task, graphdef, mesh):
  """Returns `call(weights, data, chosen, mask_B, length) -> metrics, predictions_B, confidences_B`."""

  def call(weights, data, chosen, mask_B, length):
    model = nnx.merge(graphdef, weights["params"], weights["model_state"])
    examples = batches.take(data, chosen, mesh, length)
    x, options = batches.evaluation(config, task, examples)
    with parallel.batches_split(mesh):
      logits_BS = model(x, **options)
    labels_B = examples.labels
    losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BS, labels_B)
    totals = metrics.EvalMetrics.single_from_model_output(
      logits=logits_BS, labels=labels_B, losses=losses_B, mask=mask_B
    )
    return totals, logits_BS.argmax(-1), jax.nn.softmax(logits_BS).max(-1)

  return jax.jit(call, static_argnums=4, out_shardings=parallel.replicated(mesh))


class Cost(NamedTuple):
  """What compiling tells of a call: products' operations, bytes of memory, seconds of compiling, kernels' choices."""

  operations: float
  memory: int
  seconds: float
  kernels: dict[str, dict[str, str]]


def compile_calls(make_call, state, feed) -> tuple[dict[int | None, Any], Cost]:
  """Compiles the call of every length of a feed; finds out which kernels are taken.

  Args:
    make_call: `make_train_call` but for the length.
    state: of the training.
    feed: see `data.feed`.

  Returns:
    The calls by length, and the cost of the longest.

  Raises:
    UserError: a kernel was asked for that cannot serve.
  """
  start = time.perf_counter()
  *shorter, longest = feed.lengths
  arguments = state, feed.data, feed.abstract
  make_longest = functools.partial(make_call, length=longest)
  try:
    with dispatch.recording() as choices:
      traced = make_longest().trace(*arguments)
  except dispatch.UnsupportedError as error:
    raise errors.UserError(
      f"config.model.implementation: {error}; without it the best that can serve is taken"
    ) from error
  operations = flops.count_call(make_longest, arguments, traced, choices)
  calls = {length: make_call(length=length).trace(*arguments).lower().compile() for length in shorter}
  calls[longest] = traced.lower().compile()
  plan = calls[longest].memory_analysis()
  memory = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes - plan.alias_size_in_bytes
  return calls, Cost(operations, memory, time.perf_counter() - start, choices)


def evaluate(
  call,
  weights,
  data: resident.Resident | Streamed,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  drop_remainder: bool = False,
  lengths: tuple[int, ...] = (),
) -> tuple[dict, np.ndarray, np.ndarray]:
  """Runs `call` over a split, every example once.

  Args:
    call: of `make_eval_call`.
    weights: {"params", "model_state"}.
    data: the split.
    batch_size: examples of one call, at most; rounded up to a multiple of the devices.
    mesh: of the run.
    drop_remainder: whole batches only.
    lengths: as of `batches.buckets`; texts are evaluated in the order of theirs.

  Returns:
    {"loss", "accuracy"} as floats, predictions (N,) and the probability (N,) of each; of a picture that cannot be read
    −1 and 0.
  """
  examples = len(data.labels)
  batch_size = -(-min(batch_size, examples) // mesh.size) * mesh.size
  if isinstance(data, Streamed):
    return _evaluate_stream(call, weights, data, batch_size, mesh, drop_remainder)
  if drop_remainder:
    examples -= examples % batch_size
  bucket = resident.bucket_of(np.asarray(data.lengths)[:examples], lengths) if lengths else np.zeros(examples, int)
  order = np.argsort(bucket, kind="stable").astype(np.int32)
  shardings = resident.chosen_sharding(data, mesh), parallel.sharded(mesh)
  outputs = []
  for places, mask in zip(*resident.eval_batches(examples, batch_size), strict=True):
    length = lengths[bucket[order[places]].max()] if lengths else None
    outputs.append(call(weights, data, *parallel.put((order[places], mask), shardings), length))
  values, *rows = _gather(outputs)
  back = np.argsort(order)
  return values, *(row[:examples][back] for row in rows)


def _evaluate_stream(call, weights, split, batch_size, mesh, drop_remainder):
  examples = len(split.labels)
  if drop_remainder:
    examples -= examples % batch_size
    split = split.take(np.arange(examples))
  outputs = []
  with stream.EvalStream(split, mesh, batch_size) as batches_of_split:
    for batch, mask in batches_of_split:
      outputs.append(jax.device_get(call(weights, None, batch, mask, None)))  # waits: images pile up else
    unread = list(batches_of_split.corrupt)
  values, predictions, confidences = (part[:examples] if i else part for i, part in enumerate(_gather(outputs)))
  predictions[unread], confidences[unread] = -1, 0
  return values, predictions, confidences


def _gather(outputs):
  outputs = jax.device_get(outputs)
  totals = functools.reduce(lambda a, b: a.merge(b), (o[0] for o in outputs))
  rows = (np.concatenate([o[i] for o in outputs]) for i in (1, 2))
  return {name: float(value) for name, value in totals.compute().items()}, *rows
