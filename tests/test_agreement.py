"""What processes tell each other, in two real ones: every answer is the same in both, or names its process."""

import json
import subprocess
import sys

import pytest
from commands import options, places

PROGRAM = """
import json, pathlib, time
import jax
from jax._src import distributed
from lra_jax import agreement, errors, processes

def error_of(function, *arguments):
  try:
    function(*arguments)
  except (errors.UserError, agreement.GivenUp) as error:
    return f"{type(error).__name__}: {error}"

def refuse():
  raise errors.UserError("no room")

with processes.started():
  me, said = jax.process_index(), {}
  said["on_main"] = [agreement.on_main(lambda: {"from": me, "turn": turn}) for turn in range(3)]
  said["refused"] = error_of(agreement.on_main, refuse)
  said["no problem"] = agreement.first_problem(None)
  said["problem"] = agreement.first_problem("disk full" if me == 1 else None)
  said["same"] = error_of(agreement.check_same, "data", "abc")
  said["differ"] = error_of(agreement.check_same, "data", f"digest {me}")
  name, alone = agreement.unique("attempt"), agreement.unique("alone")
  said["name"] = name
  agreement.meet(name, "first", 60)
  if me == 1:
    agreement.give_up(name, "disk full")
  else:
    said["given up"] = error_of(agreement.meet, name, "second", 60)
    said["late"] = error_of(agreement.meet, alone, "here", 0.1)
  said["last"] = agreement.first_problem(None)
  agreement.forget(name)
  said["left"] = agreement.on_main(
    lambda: [key for key, _ in distributed.global_state.client.key_value_dir_get("lra_jax/") if "pulse" not in key])
  print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said():
  """What each of the two processes heard."""
  keywords = [options(env={"JAX_PLATFORMS": "cpu"} | place) for place in places(2)]
  running = [subprocess.Popen([sys.executable, "-c", PROGRAM], **keyword) for keyword in keywords]
  try:
    outputs = [process.communicate(timeout=120) for process in running]
  finally:
    for process in running:
      process.kill()
  for process, (_, error) in zip(running, outputs, strict=True):
    assert process.returncode == 0, error
  return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def test_both_hear_what_process_0_says(said):
  for heard in said:
    assert heard["on_main"] == [{"from": 0, "turn": turn} for turn in range(3)]
    assert heard["refused"] == "UserError: no room"
    assert heard["name"] == said[0]["name"]


def test_a_problem_of_one_is_known_to_both_with_its_process(said):
  for heard in said:
    assert heard["no problem"] is None and heard["last"] is None
    assert heard["problem"].startswith("process 1 on ") and heard["problem"].endswith(": disk full")


def test_what_differs_is_said_by_the_one_that_differs(said):
  assert said[0]["same"] is said[1]["same"] is said[0]["differ"] is None
  assert (
    said[1]["differ"].startswith("UserError: data of process 1 on ") and "(digest 1 and digest 0)" in said[1]["differ"]
  )


def test_nobody_waits_for_what_was_given_up(said):
  assert said[0]["given up"].startswith("GivenUp: process 1 on ") and said[0]["given up"].endswith(": disk full")
  assert said[0]["late"] == "GivenUp: the others did not come to here within 0 s"


def test_a_long_run_leaves_nothing_behind(said):
  """But for the answer of the last question, and what was asked of one that nobody else came to."""
  left = [key for key in said[0]["left"] if "/alone/" not in key]
  assert len(left) == 1 and left[0].startswith("lra_jax/on_main/"), said[0]["left"]
