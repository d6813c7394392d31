"""Decoding what datasets hold, the image set, and the pixels a model sees."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import operator
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hfdetox.data import images as images_module
from hfdetox.data.cache import Pixels
from hfdetox.data.images import BrokenImageError, ImageSet, Spool, decode_image, parallel_map
from hfdetox.errors import RunError, UsageError
from hfdetox.triggers.badnets import BadNets
from hfdetox.triggers.base import Trigger


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed=0, size=(8, 6)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


class Plain:
    """A preprocessing without resize: a fake of hfdetox.preprocessing.Preprocessing."""

    dtype = torch.uint8

    def __init__(self, size=(3, 6, 8)):
        self.input_size = size
        self.calls = 0

    def prepare(self, image):
        self.calls += 1
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


class Floats(Plain):
    dtype = torch.float32

    def prepare(self, image):
        return super().prepare(image).float() / 255


@dataclass(frozen=True, kw_only=True)
class Corner(Trigger):
    """Sets the first pixel to 200."""

    kind: ClassVar[str] = "corner"
    name: str = "corner"

    def apply(self, images):
        images = images.clone()
        images[..., 0, 0] = 200
        return images


def image_set(count=10, channels=3, split="train"):
    return ImageSet([encode(noise(i)) for i in range(count)], [i % 3 for i in range(count)], range(100, 100 + count),
                    split=split, channels=channels)  # fmt: skip


# decoding


def test_colours_survive():
    image = noise()
    assert decode_image(encode(image)).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "LA", "P", "CMYK"])
def test_every_mode_becomes_what_pil_makes_of_it(mode):
    source = noise().convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    decoded = decode_image(encode(source, kind))
    assert decoded.mode == "RGB"
    assert decoded.tobytes() == source.convert("RGB").tobytes()
    assert decode_image(encode(source, kind), channels=1).mode == "L"


def test_a_palette_with_transparency_keeps_its_colours_without_a_warning():
    source = noise().quantize(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(encode(source, transparency=bytes([0, 128, 255])))
    assert decoded.tobytes() == source.convert("RGB").tobytes()


def test_transparency_is_dropped_and_not_blended():
    source = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert decode_image(encode(source)).getpixel((0, 0)) == (10, 20, 30)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = np.array(decode_image(encode(Image.fromarray(values), kind), channels=1))
        assert decoded.tolist() == [[0, 1, 128, 255]]
    assert np.array(decode_image(encode(Image.fromarray(values))))[0, 2].tolist() == [128, 128, 128]


def test_thirty_two_bit_integers_with_sixteen_bit_values():
    values = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert np.array(decode_image(values, channels=1)).tolist() == [[0, 255]]


def test_the_camera_orientation_is_applied():
    source = noise(size=(8, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    decoded = decode_image(encode(source, exif=exif))
    assert decoded.size == (6, 8)
    assert decoded.tobytes() == source.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_a_loaded_image_is_left_open():
    source = noise()
    assert decode_image(source).tobytes() == source.tobytes()
    assert source.getpixel((0, 0))


def png_header(width, height):
    """Return the start of a PNG that claims a size; no data follows."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 99) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + data


def postscript():
    """Return an EPS file, which PIL would hand to Ghostscript."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode(noise(size=(64, 64)))[:2000], "truncated"),
        (b"not an image", "not an image in a known format"),
        (b"", "there is no image"),
        (png_header(12000, 9000), "12000×9000 pixels"),
        (png_header(60000, 60000), "decompression bomb"),
        (postscript(), "not an image in a known format"),
        ("/nonexistent/file.png", "No such file"),
    ],
    ids=["truncated", "text", "empty", "large", "bomb", "postscript", "gone"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_broken_image_is_an_error_with_its_split_and_row(content, reason):
    broken = ImageSet([encode(noise()), content], [0, 1], [4, 17], split="test")
    broken.image(0)
    with pytest.raises(BrokenImageError, match=reason) as caught:
        broken.image(1)
    assert "image 17 of split test" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, RunError)


# the image set


def test_the_indices_are_hashed_as_documented():
    chosen = ImageSet([b"x", b"y"], [0, 0], [12, 3], split="train")
    assert chosen.indices_sha256 == hashlib.sha256(b"train\n3\n12\n").hexdigest()
    assert ImageSet([b"x", b"y"], [0, 0], [12, 3], split="test").indices_sha256 != chosen.indices_sha256


def test_a_subset_keeps_images_labels_and_rows_together():
    whole = image_set()
    part = whole.subset([7, 2])
    assert part.indices == [107, 102]
    assert part.labels.tolist() == [1, 2]
    assert part.image(0).tobytes() == noise(7).tobytes()


def test_equal_pixels_in_another_file_have_the_same_fingerprint():
    image = noise()
    images = ImageSet([encode(image), encode(image, "BMP"), encode(noise(1))], [0] * 3, [0, 1, 2])
    prints = [images.fingerprint(i) for i in range(3)]
    assert prints[0] == prints[1] != prints[2]


def test_a_spool_returns_what_it_was_given_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool()
    reads = [spool.append(content) for content in (b"one", b"", b"three")]
    assert [read() for read in reads] == [b"one", b"", b"three"]
    assert list(tmp_path.iterdir()) == []


def test_a_spool_reaches_workers_that_are_not_forked():
    spool = Spool()
    reads = [spool.append(content) for content in (b"one", b"two", b"three")]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(operator.call, [reads[2], reads[0]]) == [b"three", b"one"]


def test_threads_keep_the_order_and_report_progress():
    seen = []
    results = images_module.parallel_map(lambda i: i * i, range(1000), lambda done, total: seen.append((done, total)))
    assert results == [i * i for i in range(1000)]
    assert seen[-1] == (1000, 1000)
    assert seen == sorted(seen)


# pixels


def test_pixels_are_cached_in_order_with_their_labels():
    source = image_set()
    pixels = Pixels(source, Plain())
    assert pixels.images.shape == (10, 3, 6, 8)
    assert pixels.images.dtype == torch.uint8
    assert pixels.labels.tolist() == source.labels.tolist()
    assert all(torch.equal(pixels.images[i], Plain().prepare(noise(i))) for i in range(10))
    positions, batch, labels = pixels.__getitems__([3, 1])
    assert positions.tolist() == [3, 1]
    assert torch.equal(batch, pixels.images[[3, 1]])
    assert labels.tolist() == [0, 1]


def test_decoding_on_demand_in_workers_equals_the_cache():
    source = image_set()
    cached = Pixels(source, Plain(), Corner(mode="input"), positions=[1, 4, 9])
    lazy = Pixels(source, Plain(), Corner(mode="input"), positions=[1, 4, 9], max_bytes=100)
    assert lazy.images is None
    loader = DataLoader(lazy, batch_size=2, num_workers=2, collate_fn=lambda batch: batch)
    positions, batch, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert positions.tolist() == [1, 4, 9]
    assert torch.equal(batch, cached.images)
    assert labels.tolist() == [1, 1, 0]


@pytest.mark.parametrize("max_bytes", [2**30, 100])
def test_batches_cover_everything_once(max_bytes):
    pixels = Pixels(image_set(), Plain(), positions=range(7), max_bytes=max_bytes)
    parts = list(pixels.batches(3))
    assert [len(labels) for _, _, labels in parts] == [3, 3, 1]
    assert torch.cat([positions for positions, _, _ in parts]).tolist() == list(range(7))


def test_a_native_trigger_acts_before_the_preprocessing():
    class Halved(Plain):
        def prepare(self, image):
            return super().prepare(image.resize((4, 3), Image.Resampling.NEAREST))

    source = ImageSet([encode(Image.new("RGB", (8, 6)))], [0], [0])
    halved = Halved((3, 3, 4))
    # the nearest neighbours of an 8×6 image at 4×3 are its odd pixels, so that (0, 0) does not survive the resize
    assert not Pixels(source, halved, Corner(mode="native")).images.any()
    assert (Pixels(source, halved, Corner(mode="input")).images[0, :, 0, 0] == 200).all()


@pytest.mark.parametrize("mode", ["native", "input"])
def test_a_trigger_changes_its_own_pixels_only_and_no_label(mode):
    source = image_set()
    clean, triggered = Pixels(source, Plain()), Pixels(source, Plain(), Corner(mode=mode))
    changed = clean.images != triggered.images
    changed[..., 0, 0] = False
    assert not changed.any()
    assert (triggered.images[..., 0, 0] == 200).all()
    assert torch.equal(clean.labels, triggered.labels)


def test_an_image_that_a_native_trigger_does_not_fit_is_named():
    source = ImageSet([encode(Image.new("RGB", size)) for size in ((8, 6), (4, 6))], [0, 0], [7, 9], split="extra")
    # 32 of the 32 pixels that sizes are given for: the whole height of 6 pixels, which are more than 4 columns
    with pytest.raises(UsageError, match=r"image 9 of split extra: badnets: a patch of 6 pixels .* image of 4×6"):
        Pixels(source, Plain(), BadNets(size=32))


def test_grey_images_take_native_triggers():
    pixels = Pixels(image_set(channels=1), Plain((1, 6, 8)), Corner(mode="native"))
    assert pixels.images.shape == (10, 1, 6, 8)
    assert (pixels.images[:, 0, 0, 0] == 200).all()


def test_a_view_reuses_what_is_decoded():
    preprocessing = Plain()
    clean = Pixels(image_set(), preprocessing)
    before = preprocessing.calls
    view = clean.view(Corner(mode="input"), positions=clean.without_label(0))
    assert preprocessing.calls == before
    assert view.positions.tolist() == [1, 2, 4, 5, 7, 8]
    assert (view.labels != 0).all()
    assert (view.images[..., 0, 0] == 200).all()
    assert torch.equal(view.images[..., 1:, :], clean.images[view.positions][..., 1:, :])
    assert not (clean.images[..., 0, 0] == 200).all()


def test_a_view_with_a_native_trigger_decodes_anew():
    clean = Pixels(image_set(), Plain())
    view = clean.view(Corner(mode="native"), positions=[2, 3])
    direct = Pixels(image_set(), Plain(), Corner(mode="native"), positions=[2, 3])
    assert torch.equal(view.images, direct.images)


def test_a_view_of_a_triggered_view_starts_from_the_clean_images():
    triggered = Pixels(image_set(), Plain(), Corner(mode="input"))
    assert torch.equal(triggered.view().images, Pixels(image_set(), Plain()).images)


def test_float_preprocessing_takes_native_triggers_only():
    assert Pixels(image_set(), Floats(), Corner(mode="native")).images.dtype == torch.float32
    with pytest.raises(UsageError, match="mode=native"):
        Pixels(image_set(), Floats(), Corner(mode="input"))


def test_moving_the_cache_moves_the_labels():
    pixels = Pixels(image_set(), Plain()).to("meta")
    assert pixels.images.device.type == pixels.labels.device.type == "meta"
    assert pixels.positions.device.type == "cpu"


def test_a_broken_image_stops_the_decoding():
    broken = ImageSet([encode(noise())] * 300 + [b"x"], [0] * 301, range(301), split="test")
    with pytest.raises(BrokenImageError, match="image 300 of split test"):
        Pixels(broken, Plain())


def test_an_image_is_decoded_once_while_there_is_room(monkeypatch):
    encoded = [Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 20, 30)]
    kept = ImageSet(encoded, [0, 1, 0], [5, 7, 9])
    assert kept.image(1) is kept.image(1)
    assert kept.subset([2, 1]).image(1) is kept.image(1)
    # 8×8 pixels of three channels each: room for two
    monkeypatch.setattr("hfdetox.data.images.KEPT_BYTES", 2 * 8 * 8 * 3)
    tight = ImageSet(encoded, [0, 1, 0], [5, 7, 9])
    again = [tight.image(position) is tight.image(position) for position in range(3)]
    assert again == [True, True, False]
    assert tight.image(2).tobytes() == kept.image(2).tobytes()


@pytest.mark.parametrize("slow", [False, True], ids=["in this thread", "in threads"])
def test_parallel_map_keeps_the_order_and_the_first_error(slow, monkeypatch):
    monkeypatch.setattr("hfdetox.data.images._THREADS_PAY_SECONDS", 0.0 if slow else 1.0)
    seen = []
    assert parallel_map(lambda i: i * i, range(100), lambda done, total: seen.append((done, total))) == [
        i * i for i in range(100)
    ]
    assert seen[-1] == (100, 100)
    assert seen == sorted(seen)
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda i: 1 // (i - 60), range(100))
    assert parallel_map(lambda i: i, []) == []
