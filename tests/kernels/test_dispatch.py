"""Which implementation runs, and that the choice and its reason can be learned."""

import jax
import pytest

from kernels import dispatch

FORMS = {"reference": lambda: "reference", "xla": lambda: "xla", "mosaic": lambda: "mosaic"}


def chosen(implementation, refuse=None, forms=FORMS):
  return dispatch.choose("op", forms, implementation, "xla", refuse)()


@pytest.mark.parametrize(
  "platform,capability,refusal,expected",
  [
    ("gpu", "9.0", None, "mosaic"),
    ("gpu", "9.0", "odd width", "xla"),
    ("gpu", "8.0", None, "xla"),
    ("gpu", "10.0", None, "xla"),  # wgmma is Hopper's alone
    ("cpu", "", None, "xla"),
  ],
)
def test_none_takes_mosaic_only_where_device_and_shape_suit_it(platform, capability, refusal, expected):
  with dispatch.compiling_for(platform, capability), dispatch.recording() as choices:
    assert chosen(None, lambda: refusal) == expected
  (reason,) = choices["op"].values()
  assert list(choices["op"]) == [expected]
  if refusal:
    assert refusal in reason


def test_an_explicit_choice_is_binding():
  with pytest.raises(dispatch.UnsupportedError, match="needs an NVIDIA Hopper GPU, and this is cpu"):
    chosen("mosaic")
  with (
    dispatch.compiling_for("gpu", "8.6"),
    pytest.raises(dispatch.UnsupportedError, match=r"capability 9\), and this one has 8.6"),
  ):
    chosen("mosaic")
  with (
    dispatch.compiling_for("gpu"),
    pytest.raises(dispatch.UnsupportedError, match="'mosaic' cannot serve: odd width"),
  ):
    chosen("mosaic", lambda: "odd width")
  with pytest.raises(dispatch.UnsupportedError, match="'cuda' is unknown; there are 'reference', 'xla', 'mosaic'"):
    chosen("cuda")
  with dispatch.compiling_for("gpu"):
    assert chosen("reference") == "reference"


def test_interpreting_serves_who_asks_and_changes_no_default():
  with dispatch.interpreting():
    assert chosen("mosaic") == "mosaic"
    assert chosen(None) == "xla"
    with pytest.raises(dispatch.UnsupportedError, match="odd width"):
      chosen("mosaic", lambda: "odd width")
  assert not dispatch.interpreted()


def test_choices_are_recorded_once_with_their_reasons():
  with dispatch.recording() as choices:
    for _ in range(2):
      chosen(None)
    chosen("reference")
    dispatch.choose("other", {"xla": lambda: None}, None, "xla")
  assert choices == {
    "op": {"xla": "no mosaic: it needs an NVIDIA Hopper GPU, and this is cpu", "reference": "asked for"},
    "other": {"xla": "best on cpu"},
  }


def test_per_device_splits_batches_only_within_batches_split():
  def function(x, w):
    return x * w

  mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  assert dispatch.per_device(function, (True, False)) is function
  with dispatch.batches_split(mesh):  # one device: nothing to split
    assert dispatch.per_device(function, (True, False)) is function
