"""What compiled programs exchange: lines as XLA writes them, and a program of 8 devices whose bytes are known."""

import json
import subprocess
import sys

import numpy as np
import pytest
from commands import options

from lra_jax import collectives

LINES = {  # one line, kind, payload, bytes that each device sends by rings
  "%a = f32[10,4]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add": ("all-reduce", 160, 240),
  "%a = (f32[10]{0}, bf16[6]{0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8], to_apply=%add": ("all-reduce", 52, 91),
  "%a = ((bf16[8]{0}), bf16[8]{0}) all-reduce-start(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'data'}": (
    "all-reduce", 16, 16),
  "%a = ((bf16[4,4]{1,0}), bf16[16,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}": (
    "all-gather", 128, 96),
  "%a = bf16[16,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}": ("all-gather", 128, 96),
  "%a = bf16[4,4]{1,0} reduce-scatter(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}": (
    "reduce-scatter", 128, 96),
  "%a = u8[3,32]{1,0} collective-permute(%x), replica_groups=[1,2]<=[2]": ("collective-permute", 96, 96),
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_counted(line):
  kind, payload, wire = LINES[line]
  assert collectives.count(f"before\n  {line}, metadata={{}}\nafter all-reduce-done(%a)") == {kind: (1, payload, wire)}


def test_what_one_device_exchanges_with_itself_is_nothing():
  assert collectives.count("%a = f32[10]{0} all-reduce(%x), replica_groups={{0},{1}}") == {}


def test_the_least_is_what_rings_send():
  assert collectives.least(1000, 8, 1, 4) == 2 * 7 / 8 * 4000
  assert collectives.least(1000, 1, 8, 2) == 2 * 7 / 8 * 2000
  assert collectives.least(1000, 2, 4, 4) == 2 * 3 / 4 * 4000 + 2 * 1 / 2 * 4000 / 4


REAL = """
import functools
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from lra_jax import collectives, parallel
w, x = jnp.ones((64, 256)), jnp.ones((8192, 64))  # parameters are less than activations
for data, fsdp in ((8, 1), (1, 8), (2, 4)):
  mesh = parallel.make_mesh(data, fsdp)
  rule = parallel.by_rule({"w": w}, mesh)["w"]
  assert rule.spec == (P() if fsdp == 1 else P(None, "fsdp")), rule
  step = lambda w, x: w - jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w)
  step = jax.jit(step, in_shardings=(rule, parallel.sharded(mesh)), out_shardings=rule)
  found = collectives.count(step.lower(w, x).compile().as_text())
  sent = sum(exchange.wire for exchange in found.values())
  print(data, fsdp, sent, collectives.least(w.size, data, fsdp, 4), ",".join(found))
"""


def test_a_real_program_sends_no_less_than_the_least():
  process = subprocess.run([sys.executable, "-c", REAL], **options(env={"JAX_NUM_CPU_DEVICES": "8"}))
  assert process.returncode == 0, process.stderr
  rows = [line.split() for line in process.stdout.splitlines()]
  assert [row[:2] for row in rows] == [["8", "1"], ["1", "8"], ["2", "4"]]
  assert float(rows[0][2]) == float(rows[0][3]) and rows[0][4] == "all-reduce"
  for row in rows[1:]:
    assert float(row[3]) <= float(row[2]) <= 2 * float(row[3]), row


LOOPS = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: f32[10]) -> f32[10] {
  ROOT %r = f32[10]{0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
}

%body (p: f32[10]) -> f32[10] {
  ROOT %c = f32[10]{0} call(%p), to_apply=%inner
}

ENTRY %main (x: f32[10]) -> f32[10] {
  %g = f32[80]{0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %w = f32[10]{0} while(%x), condition=%until, body=%body
}
"""


def test_what_is_in_a_loop_is_told_apart():
  assert collectives.in_loops(LOOPS) == {"all-reduce": (1, 40, 70)}
  assert set(collectives.count(LOOPS)) == {"all-reduce", "all-gather"}
  assert collectives.in_loops(LOOPS[: LOOPS.index("ENTRY")]) == {}


STEP = """
import importlib, json, sys
import jax, jax.numpy as jnp
from lra_jax import collectives, parallel, step
from lra_jax.data import resident, sources, tasks
parallel.SMALL = 16  # or nothing of these small models would be split
task, name = tasks.get("digits"), sys.argv[1]
config = importlib.import_module(f"configs.{name}").get_config("digits")
config.train.batch_size = 16
config.model.update({"sequencer2d": {"depths": (1,), "patch_sizes": (2,), "embed_dims": (64,), "hidden_sizes": (16,)},
                     "lipschitz_rnn": {}}.get(name, {"depth": 1}))
for data_axis, fsdp in ((8, 1), (2, 4), (1, 8)):
  mesh = parallel.make_mesh(data_axis, fsdp)
  schedule = lambda step: 1e-3
  graphdef, state, optimizer = step.init_state(config, task, schedule, mesh)
  data = resident.put(sources.digits()["train"], mesh, in_parts=True)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, state), resident.data_sharding(data, mesh)
  call = step.make_train_call(
    config, task, graphdef, optimizer, schedule, 1, mesh, shardings=(*shardings, parallel.replicated(mesh))
  )
  call = call.lower(state, data, jnp.zeros((1, 16), jnp.int32)).compile()
  text, losses = call.as_text(), []
  for turn in range(3):
    indices = jax.device_put(16 * turn + jnp.arange(16, dtype=jnp.int32)[None], parallel.replicated(mesh))
    state, values = call(state, data, indices)
    losses.append(float(values["loss"][0]))
  scattered = collectives.count(text).get("reduce-scatter", (0, 0))[1]
  print(json.dumps(["while(" in text, bool(collectives.count(text)), collectives.in_loops(text), scattered, losses]))
"""


# Bytes of the weights of the loops over time; those of LRU are too few to be split.
@pytest.mark.parametrize(
  ("model", "recurrent"), [("sequencer2d", 4 * 4 * 16 * 64), ("lipschitz_rnn", 4 * 2 * 128 * 128), ("lru", 0)]
)
def test_recurrences_exchange_nothing_from_step_to_step(model, recurrent):
  """Weights are gathered before their loops; gradients are summed up, or scattered where weights are split, after."""
  process = subprocess.run([sys.executable, "-c", STEP, model], **options(env={"JAX_NUM_CPU_DEVICES": "8"}))
  assert process.returncode == 0, process.stderr
  found = [json.loads(line) for line in process.stdout.splitlines()]
  assert [row[:3] for row in found] == [[True, True, {}]] * 3
  (*_, few, losses), *split = found
  for *_, scattered, others in split:
    assert scattered >= few + recurrent
    np.testing.assert_allclose(others, losses, rtol=1e-5)
  assert losses[2] != losses[0]
