"""Files of pictures: every kind that people have, and those that are none."""

import io
import pathlib
import struct
import zlib

import machine
import numpy as np
import pytest
from PIL import Image

from lra_jax import errors
from lra_jax.data import pictures


def encoded(image, format="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


def png(array, color_type, bits, transparent=b""):
  """A PNG file by its specification (ISO/IEC 15948), with no help of Pillow: big-endian samples, filter 0."""
  chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
  height, width = array.shape[:2]
  rows = array.astype(">u2" if bits == 16 else np.uint8)
  lines = b"".join(b"\0" + row.tobytes() for row in rows)
  header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
  parts = [chunk(b"IHDR", header)] + ([chunk(b"tRNS", transparent)] if transparent else [])
  return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")])


RANDOM = np.random.RandomState(0)
RGB = RANDOM.randint(0, 256, (9, 7, 3)).astype(np.uint8)
GREY = RANDOM.randint(0, 256, (9, 7)).astype(np.uint8)
DEEP = RANDOM.randint(0, 65536, (9, 7, 4))


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_colour_and_grey_come_back(format, options):
  np.testing.assert_array_equal(pictures.decode(encoded(Image.fromarray(RGB), format, **options), "x"), RGB)
  grey = pictures.decode(png(GREY, 0, 8), "x")
  np.testing.assert_array_equal(grey, np.repeat(GREY[..., None], 3, axis=2))
  np.testing.assert_array_equal(pictures.decode(png(GREY, 0, 8), "x", channels=1), GREY[..., None])
  luma = RGB @ [0.299, 0.587, 0.114]  # ITU-R BT.601
  ours = pictures.decode(encoded(Image.fromarray(RGB), format, **options), "x", channels=1)
  assert ours.shape == (9, 7, 1) and ours.dtype == np.uint8
  np.testing.assert_allclose(ours[..., 0], luma, atol=0.6)


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_of_16_bits_the_upper_8_count(color_type, channels):
  """In grey, RGB, and both with alpha, which is laid on black."""
  deep = DEEP[..., :channels]
  ours = pictures.decode(png(deep, color_type, 16), "x").astype(int)
  colour = deep[..., :-1] if channels in (2, 4) else deep
  truth = np.broadcast_to(colour >> 8, (9, 7, 3))
  if channels in (2, 4):
    truth = truth * (deep[..., -1:] >> 8) / 255
  np.testing.assert_allclose(ours, truth, atol=0 if channels in (1, 3) else 1)


def test_transparency_is_black():
  alpha = np.dstack([RGB, GREY])
  truth = RGB * (GREY[..., None] / 255)
  np.testing.assert_allclose(pictures.decode(png(alpha, 6, 8), "x"), truth, atol=1)
  alpha[..., 3] = 255
  np.testing.assert_array_equal(pictures.decode(png(alpha, 6, 8), "x"), RGB)
  alpha[..., 3] = 0
  assert not pictures.decode(png(alpha, 6, 8), "x").any()
  one = struct.pack(">HHH", *RGB[2, 3].tolist())  # one colour is transparent
  truth = np.where((RGB[2, 3] == RGB).all(2, keepdims=True), 0, RGB)
  np.testing.assert_array_equal(pictures.decode(png(RGB, 2, 8, one), "x"), truth)
  deep = DEEP[..., 0]
  ours = pictures.decode(png(deep, 0, 16, struct.pack(">H", deep[4, 4])), "x", channels=1)[..., 0]
  np.testing.assert_array_equal(ours, np.where(deep == deep[4, 4], 0, deep >> 8))


def test_palettes_are_resolved():
  image = Image.fromarray(RGB[:2, :2]).quantize(4)
  np.testing.assert_array_equal(pictures.decode(encoded(image), "x"), np.asarray(image.convert("RGB")))
  index = np.asarray(image)
  ours = pictures.decode(encoded(image, transparency=bytes([255, 0, 255, 255])), "x")
  truth = np.where((index == 1)[..., None], 0, np.asarray(image.convert("RGB")))
  np.testing.assert_array_equal(ours, truth)
  bits = pictures.decode(encoded(Image.fromarray(GREY > 128)), "x")
  np.testing.assert_array_equal(bits[..., 0], np.where(GREY > 128, 255, 0))


def test_cmyk_jpeg_becomes_rgb():
  """Of ink c, m, y and black k (255 is full) what is left of the light, one colour in each picture."""
  for ink in ([0, 0, 0, 0], [255, 0, 0, 0], [0, 128, 64, 0], [10, 200, 90, 100], [0, 0, 0, 255]):
    image = Image.fromarray(np.broadcast_to(np.array(ink, np.uint8), (16, 16, 4)).copy(), "CMYK")
    content = encoded(image, "JPEG", quality=100)
    light = (1 - np.array(ink) / 255) * 255
    ours = pictures.decode(content, "x")
    assert ours.shape == (16, 16, 3)
    np.testing.assert_allclose(ours, np.broadcast_to(light[:3] * light[3] / 255, ours.shape), atol=3)


def test_pictures_are_upright():
  """All eight EXIF orientations, by the corner that the specification (CIPA DC-008) puts row 0, column 0 at."""
  turned = {
    1: RGB,
    2: RGB[:, ::-1],
    3: RGB[::-1, ::-1],
    4: RGB[::-1],
    5: RGB.swapaxes(0, 1),
    6: np.rot90(RGB),
    7: np.rot90(RGB, 2).swapaxes(0, 1),
    8: np.rot90(RGB, -1),
  }
  for orientation, stored in turned.items():
    exif = Image.Exif()
    exif[0x0112] = orientation
    ours = pictures.decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif), "x")
    np.testing.assert_array_equal(ours, RGB, err_msg=str(orientation))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # of Pillow, which goes on
def test_damaged_exif_does_not_cost_the_picture():
  image = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
  for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
    content = encoded(image, "JPEG", exif=exif)
    np.testing.assert_allclose(pictures.decode(content, "x"), 90, atol=2)


def test_first_frame_of_an_animation():
  frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
  content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
  np.testing.assert_array_equal(pictures.decode(content, "x"), np.broadcast_to([255, 0, 0], (8, 8, 3)))


JPEG = encoded(Image.fromarray(np.kron(RGB, np.ones((9, 9, 1), np.uint8))), "JPEG")
PNG = encoded(Image.fromarray(np.kron(RGB, np.ones((9, 9, 1), np.uint8))))
WEBP = encoded(Image.fromarray(np.kron(RGB, np.ones((9, 9, 1), np.uint8))), "WEBP")


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"", "file of zero bytes"),
    (b"<html>404</html>", "damaged, or no picture of these formats"),
    (JPEG[: len(JPEG) // 2], "image file is truncated"),
    (JPEG[:10], "Truncated File Read"),
    (PNG[: len(PNG) // 2], "image file is truncated"),
    (PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], "cannot be decoded"),
    (WEBP[: len(WEBP) // 2], "cannot be decoded"),
    (encoded(Image.fromarray(RGB), "GIF"), "damaged, or no picture of these formats"),
    (encoded(Image.fromarray(RGB), "TIFF"), "damaged, or no picture of these formats"),
  ],
)
def test_what_is_no_picture_is_one_line(content, reason):
  with pytest.raises(pictures.PictureError, match=rf"^/a/b\.png: [^\n]*({reason})[^\n]*replace or remove it$"):
    pictures.decode(content, "/a/b.png")


def test_a_bomb_is_refused_before_it_is_unpacked():
  """16 × 10⁹ black px in a file of some bytes; the checksum of the header is right."""
  header = b"IHDR" + struct.pack(">IIBBBBB", 130_000, 130_000, 8, 0, 0, 0, 0)
  content = png(np.zeros((1, 1)), 0, 8)
  content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
  with pytest.raises(pictures.PictureError, match=r"^x: cannot be decoded \(Image size \(16900000000 pixels\)[^\n]*$"):
    pictures.decode(content, "x")


def test_files_that_cannot_be_read_are_named(tmp_path):
  with pytest.raises(pictures.PictureError, match=rf"^{tmp_path}/a\.png: cannot be read \(No such file"):
    pictures.read(tmp_path / "a.png")
  with pytest.raises(errors.UserError, match=r"cannot be read \(Is a directory\)"):
    pictures.read(tmp_path)
  with machine.open_folder() as folder:
    (folder / "a.png").write_bytes(PNG)
    (folder / "a.png").chmod(0)
    with machine.plain_user(), pytest.raises(pictures.PictureError, match=r"\(Permission denied\); make it readable"):
      pictures.read(folder / "a.png")


def test_channels_are_one_or_three():
  with pytest.raises(ValueError, match="channels=4, expected 1 or 3"):
    pictures.decode(PNG, "x", channels=4)


def test_resized_are_the_middle_square_by_pillow():
  """Pillow's own way: the shorter side to the size, then the middle of the longer side."""
  smooth = np.asarray(Image.fromarray(RGB).resize((120, 80), Image.Resampling.BICUBIC))
  ours = pictures.resize_and_crop(smooth, 40)
  theirs = Image.fromarray(smooth).resize((60, 40), Image.Resampling.BICUBIC).crop((10, 0, 50, 40))
  np.testing.assert_allclose(ours.astype(int), np.asarray(theirs), atol=1)
  upright = pictures.resize_and_crop(np.ascontiguousarray(smooth.swapaxes(0, 1)), 40)
  np.testing.assert_allclose(upright.astype(int), ours.swapaxes(0, 1), atol=1)
  grey = pictures.resize_and_crop(smooth[..., :1], 40)
  np.testing.assert_array_equal(grey[..., 0], ours[..., 0])
  assert pictures.resize_and_crop(smooth[:80, :80], 80).base is not None  # as it is
  larger = pictures.resize_and_crop(RGB, 21)
  assert larger.shape == (21, 21, 3)
  flat = np.full((5, 400, 3), 7, np.uint8)
  np.testing.assert_array_equal(pictures.resize_and_crop(flat, 16), 7)


def test_square_is_in_the_middle():
  image = np.zeros((4, 12, 1), np.uint8)
  image[:, 4:8] = 200
  np.testing.assert_array_equal(pictures.resize_and_crop(image, 4), 200)


ROOT = pathlib.Path(__file__).parents[2]
TINY = ROOT.parent / "shared" / "data" / "tiny-imagenet-200"


@pytest.mark.skipif(not TINY.is_dir(), reason="Tiny ImageNet is not on this machine")
def test_real_pictures_are_those_of_pillow():
  modes = set()
  for path in sorted(TINY.glob("train/*/images/*"))[::7]:
    with Image.open(path) as image:
      modes.add(image.mode)
      np.testing.assert_array_equal(pictures.read(path), np.asarray(image.convert("RGB")))
  assert modes == {"RGB", "L"}
