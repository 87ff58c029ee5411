"""Parameter counts: published by timm to the digits it prints, by the papers' official code, or derived from layer
shapes."""

import pytest
from flax import nnx

from lra_jax import models

IMAGENET, CIFAR = (224, 224, 3), (32, 32, 3)
PIXELS, GREY, TOKENS = (1024, 3), (1024, 1), (1024,)


def count(name, shape, classes, **overrides):
  vocab_size = overrides.pop("vocab_size", 256 if len(shape) == 1 else None)
  model = nnx.eval_shape(
    lambda: models.create(
      name, input_shape=shape, num_classes=classes, vocab_size=vocab_size, rngs=nnx.Rngs(0), **overrides
    )
  )
  return models.count_params(model)


@pytest.mark.parametrize(
  "name,expected",
  [
    ("sequencer2d_xs", 17_880_424),
    ("sequencer2d_s", 27_651_688),
    ("sequencer2d_m", 38_307_688),
    ("sequencer2d_l", 54_298_216),
    ("vanilla_sequencer_s", 33_016_552),
    ("vanilla_sequencer_s_h", 27_645_544),
    ("vanilla_sequencer_s_pe", 33_114_856),
    ("mlp_mixer_s32", 19_104_624),
    ("mlp_mixer_s16", 18_528_264),
    ("mlp_mixer_b32", 60_293_428),
    ("mlp_mixer_b16", 59_880_472),
    ("mlp_mixer_l16", 208_196_168),
    ("gmlp_ti16", 5_867_328),
    ("gmlp_s16", 19_422_656),
    ("gmlp_b16", 73_075_392),
    ("convmixer_768_32", 21_110_248),
    ("convmixer_1024_20", 24_383_464),
    ("convmixer_1536_20", 51_625_960),
    ("vit_ti16", 5_717_416),
    ("vit_s16", 22_050_664),
    ("vit_s32", 22_878_952),
    ("vit_b16", 86_567_656),
    ("resnet18", 11_689_512),
  ],
)
def test_at_224_px_with_1000_classes(name, expected):
  assert count(name, IMAGENET, 1000) == expected


@pytest.mark.parametrize(
  "name,overrides,expected",
  [
    ("sequencer2d_xs", {}, {10: 17_499_274, 100: 17_533_924, 200: 17_572_424}),
    ("sequencer2d_s", {}, {10: 27_270_538, 100: 27_305_188, 200: 27_343_688}),
    ("sequencer2d_m", {}, {10: 37_926_538, 100: 37_961_188, 200: 37_999_688}),
    ("sequencer2d_l", {}, {10: 53_917_066, 100: 53_951_716, 200: 53_990_216}),
    ("resnet18_cifar", {}, {10: 11_173_962, 100: 11_220_132, 200: 11_271_432}),
    ("vit_ti16", {"patch_size": 4}, {10: 5_362_762, 100: 5_380_132}),
    ("vit_s16", {"patch_size": 4}, {10: 21_342_346, 100: 21_376_996}),
    ("pit_ti", {}, {10: 5_538_442, 100: 5_555_812}),
    ("pit_s", {}, {10: 21_693_706, 100: 21_728_356}),
    ("pit_b", {}, {10: 85_854_730, 100: 85_923_940}),
    ("pit_ti", {"pool": "mean"}, {10: 5_538_058, 100: 5_555_428}),
    ("pit_s", {"pool": "mean"}, {10: 21_692_938, 100: 21_727_588}),
    ("pit_b", {"pool": "mean"}, {10: 85_853_194, 100: 85_922_404}),
    ("mlp_mixer_s16", {"patch_size": 4}, {10: 17_110_026}),
    ("mlp_mixer_b16", {"patch_size": 4}, {10: 57_348_106}),
    ("gmlp_ti16", {"patch_size": 4}, {10: 4_613_898}),
    ("gmlp_s16", {"patch_size": 4}, {10: 17_950_346}),
    ("convmixer_256_8", {}, {10: 594_186}),
    ("convmixer_256_8", {"kernel_size": 9, "patch_size": 1}, {10: 706_570}),
    ("convmixer_256_8", {"kernel_size": 8}, {10: 674_058}),
    ("convmixer_256_12", {}, {10: 996_362}),
  ],
)
def test_on_small_images(name, overrides, expected):
  assert {classes: count(name, CIFAR, classes, **overrides) for classes in expected} == expected


@pytest.mark.parametrize(
  "name,shape,overrides,expected",
  [
    ("lipschitz_rnn", PIXELS, {"width": 64}, 9_098),
    ("lipschitz_rnn", PIXELS, {}, 34_570),
    ("lipschitz_rnn_256", PIXELS, {}, 134_666),
    ("lipschitz_rnn", PIXELS, {"width": 512}, 531_466),
    ("lipschitz_rnn", (32, 96), {}, 46_474),
    ("lipschitz_rnn_256", (32, 96), {}, 158_474),
    ("trellisnet", PIXELS, {}, 139_990),
    ("trellisnet", PIXELS, {"weight_norm": False}, 138_950),
    ("trellisnet", PIXELS, {"hidden": 990}, 8_036_110),
    # mlpen/Nystromformer has 512 rows in the table of its image tokens; its softmax twin has no skip filters.
    ("nystromformer_lra", TOKENS, {"vocab_size": 512}, 175_126),
    ("nystromformer_lra", TOKENS, {"vocab_size": 512, "skip_kernel": 0}, 174_986),
    ("lra_transformer", TOKENS, {}, 248_458),
    # Counted by running the official code of S5 and of minimal-LRU.
    ("s5", GREY, {}, 5_133_706),
    ("s5", PIXELS, {}, 5_134_730),
    ("lru", PIXELS, {}, 1_058_826),
  ],
)
def test_on_sequences(name, shape, overrides, expected):
  assert count(name, shape, 10, **overrides) == expected


def test_nystromformer_on_the_other_tasks_of_the_benchmark():
  """Pathfinder has the image's length and 2 classes; ListOps 2,000 steps of 32 symbols; text 4,000 bytes of 512."""
  find = lambda length, vocab, classes: count("nystromformer_lra", (length,), classes, vocab_size=vocab)
  assert find(1024, 512, 2) == 174_094
  assert find(2000, 32, 10) == 206_870
  assert find(4000, 512, 2) == 364_558


@pytest.mark.parametrize("name", ["fnet_base", "fnet_large"])
def test_fnet_has_no_parameters_in_its_mixing(name):
  """BERT without its attention: embeddings, projections, LayerNorms and MLPs, by hand."""
  d, hidden, depth = (768, 3072, 12) if name == "fnet_base" else (1024, 4096, 24)
  dense = lambda i, o: i * o + o
  embedding = 32_000 * d + 512 * d + 4 * d + 2 * d + dense(d, d)
  blocks = depth * (dense(d, hidden) + dense(hidden, d) + 4 * d)
  assert count(name, (512,), 2, vocab_size=32_000) == embedding + blocks + dense(d, d) + dense(d, 2)
