"""One picture, stored in every way that PIL and NumPy know: the model sees the same pixels."""

from __future__ import annotations

import io
import os
import struct
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from hfdetox.config import DetoxOptions
from hfdetox.data.images import BrokenImageError, decode_image
from hfdetox.errors import UsageError
from tests.image_data import NAMES, cycle, load, png, table

# black, white, greys and strong colours: what every mode can hold
GREY = np.array([[0, 255, 51, 102], [153, 204, 17, 238]], dtype=np.uint8).repeat(4, 0).repeat(3, 1)
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)


def in_numpy(kind, values):
    """Return 8-bit values in another type, and as that type is commonly used."""
    kind, _, top = kind.partition(" to ")
    scaled = values.astype(np.float64) / 255 * float(top)
    return (scaled if np.dtype(kind).kind == "f" else np.rint(scaled)).astype(kind)


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def difference(decoded, expected):
    return int(np.abs(np.asarray(decoded).astype(int) - expected.astype(int)).max())


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV",
                                  "LAB", "I", "I;16", "I;16L", "I;16B", "F"])  # fmt: skip
def test_every_mode_of_pil_holds_the_same_grey_picture(mode):
    source = Image.fromarray(GREY)
    if mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        stored = ImageCms.applyTransform(source.convert("RGB"), ImageCms.buildTransform(rgb, lab, "RGB", "LAB"))
    elif mode.startswith("I;16"):
        stored = Image.frombytes(mode, source.size, GREY.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    elif mode in ("RGBa", "La"):
        stored = source.convert(mode.upper()).convert(mode)
    else:
        stored = source.convert("LA").convert(mode) if mode == "PA" else source.convert(mode)
    assert stored.mode == mode
    assert difference(decode_image(stored), np.repeat(GREY[..., None], 3, -1)) <= 1
    assert difference(decode_image(stored, channels=1), GREY) <= 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "RGBa", "CMYK", "P"])
def test_every_mode_of_pil_with_colours_holds_the_same_picture(mode):
    source = Image.fromarray(COLOURS)
    stored = source.convert("RGBA").convert(mode) if mode == "RGBa" else source.quantize(64) if mode == "P" else (
        source.convert(mode))  # fmt: skip
    assert difference(decode_image(stored), COLOURS) <= 1


def test_two_levels_stay_black_and_white():
    stored = Image.fromarray(GREY).convert("1")
    assert set(np.unique(decode_image(stored, channels=1))) == {0, 255}
    assert decode_image(saved(np.array(stored)), channels=1).tobytes() == stored.convert("L").tobytes()


TYPES = ["uint8 to 255", "uint16 to 255", "uint16 to 1023", "uint16 to 4095", "uint16 to 16383", "uint16 to 65535",
         "uint32 to 255", "uint32 to 4095", "uint32 to 4294967295", "uint64 to 255", "int8 to 127", "int16 to 255",
         "int16 to 4095", "int32 to 255", "int32 to 65535", "int32 to 2147483647", "int64 to 255", "int64 to 4095",
         "float16 to 1", "float16 to 255", "float32 to 1", "float32 to 255", "float32 to 65535", "float64 to 1",
         "float64 to 4095", ">u2 to 4095", ">f4 to 1"]  # fmt: skip


@pytest.mark.parametrize("layout", ["last", "first", "one channel last", "one channel first", "no channel", "alpha"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_numpy_holds_the_same_picture(kind, layout):
    values = in_numpy(kind, GREY if "channel" in layout else COLOURS)
    shaped = {
        "last": lambda: values, "first": lambda: np.moveaxis(values, -1, 0), "no channel": lambda: values,
        "one channel last": lambda: values[..., None], "one channel first": lambda: values[None],
        "alpha": lambda: np.concatenate([values, values[..., :1]], -1),
    }[layout]()  # fmt: skip
    expected = np.repeat(GREY[..., None], 3, -1) if "channel" in layout else COLOURS
    # a signed byte has 128 of 256 levels
    assert difference(decode_image(saved(shaped)), expected) <= (1 if kind != "int8 to 127" else 2)


@pytest.mark.parametrize(("kind", "low"), [("int8", -128), ("float32", -1.0)])
def test_values_below_zero_of_a_usual_range(kind, low):
    values = (GREY.astype(int) - 128).astype(kind) if kind == "int8" else (GREY / 127.5 - 1).astype(kind)
    assert values.min() == low
    assert difference(decode_image(saved(values), channels=1), GREY) <= 1


@pytest.mark.parametrize("low", [-1e-7, -1e-4])
@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_a_rounding_below_zero_is_zero(low, top):
    assert difference(decode_image(saved(GREY / 255 * top * (1 - low) + low * top), channels=1), GREY) <= 1


@pytest.mark.parametrize(("values", "message"), [
    (GREY.astype(np.float32) / 50 - 2, "from -2 to 3.1 are in no usual range"),
    (GREY.astype(np.int16) - 1000, "--pixel-range"),
    (np.full((4, 4), np.nan, dtype=np.float32), "no usual range"),
    (np.full((4, 4), np.inf, dtype=np.float32), "no usual range"),
])  # fmt: skip
def test_values_of_no_usual_range_are_asked_for(values, message):
    with pytest.raises(UsageError, match=message):
        decode_image(saved(values))


@pytest.mark.parametrize("array", [np.zeros(5), np.zeros((2, 2, 2, 2)), np.zeros((9, 9, 9)), np.array([["a"]])])
def test_an_array_that_is_no_image(array):
    with pytest.raises(ValueError, match="is no image"):
        decode_image(saved(array))


def test_objects_in_an_array_are_never_unpickled():
    with pytest.raises(ValueError, match="allow_pickle"):
        decode_image(saved(np.array([{}], dtype=object)))


def deep_png(values, kind):
    """Return a PNG of 16 bits a channel, which PIL does not write; `kind` is its colour type."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("top", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("alpha", [False, True])
def test_colours_of_sixteen_bits_keep_all_of_them(alpha, top):
    values = np.rint(COLOURS / 255 * top).astype(np.uint16)
    if alpha:
        values = np.concatenate([values, values[..., :1]], -1)
    assert difference(decode_image(deep_png(values, 6 if alpha else 2)), COLOURS) <= 1


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_grey_of_sixteen_bits_with_transparency_keeps_all_of_them(top):
    values = np.rint(np.stack([GREY, GREY[::-1]], -1) / 255 * top).astype(np.uint16)
    assert difference(decode_image(deep_png(values, 4)), GREY[..., None].repeat(3, -1)) <= 1


def deep_tiff(values, order, *, packed=False, strips=1, extra=(), planes=False, turned=1):
    """Return a TIFF of 16 bits a colour, which PIL does not write."""
    rows = [values[..., i : i + 1] for i in range(values.shape[2])] if planes else np.array_split(values, strips)
    parts = [part.astype(f"{order}u2").tobytes() for part in rows]
    parts = [zlib.compress(part) for part in parts] if packed else parts
    content, places = b"", []
    for part in parts:
        places.append(8 + len(content))
        content += part
    channels = values.shape[2]
    tags = {256: [values.shape[1]], 257: [values.shape[0]], 258: [16] * channels, 259: [8 if packed else 1], 262: [2],
            273: places, 274: [turned], 277: [channels], 278: [len(rows[0])], 279: [len(part) for part in parts],
            284: [2 if planes else 1], **({338: list(extra)} if extra else {})}  # fmt: skip
    head = b""
    for tag, numbers in tags.items():
        values_of = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            values_of, content = struct.pack(f"{order}I", 8 + len(content)), content + values_of
        head += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + values_of
    begin = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(content))
    return begin + content + struct.pack(f"{order}H", len(tags)) + head + bytes(4)


@pytest.mark.parametrize("top", [255, 4095, 65535])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("options", [{}, {"packed": True}, {"strips": 2}, {"packed": True, "strips": 4}])
@pytest.mark.parametrize("extra", [(), (0,), (2,)])
def test_a_tiff_of_colours_of_sixteen_bits_keeps_all_of_them(top, order, options, extra):
    values = np.rint(COLOURS / 255 * top).astype(np.uint16)
    if extra:
        values = np.concatenate([values, values[..., :1]], -1)
    tiff = deep_tiff(values, order, extra=extra, **options)
    if extra == (0,) and options.get("packed") and "LOWEST_VERSIONS" in os.environ:
        with pytest.raises(ValueError, match="raw mode"):  # Pillow 11.0 cannot read it
            decode_image(tiff)
        return
    assert Image.open(io.BytesIO(tiff)).mode in ("RGB", "RGBA")
    assert difference(decode_image(tiff), COLOURS) <= 1


def test_a_turned_tiff_of_sixteen_bits_is_upright():
    values = np.rint(COLOURS / 255 * 4095).astype(np.uint16)
    assert difference(decode_image(deep_tiff(values, "<", turned=3)), COLOURS[::-1, ::-1]) <= 1
    assert difference(decode_image(deep_tiff(values, ">", turned=6)), np.rot90(COLOURS, -1)) <= 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_tiff_of_sixteen_bits_in_planes_is_refused(packed):
    with pytest.raises(ValueError, match="its colours of 16 bits lie in planes; save it anew"):
        decode_image(deep_tiff(COLOURS.astype(np.uint16), "<", planes=True, packed=packed))


# of a whole dataset


def stored(values, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def dark(value, bright=False):
    """Return an image of one grey, with one bright pixel if it is to say the range."""
    values = np.full((8, 8), value, dtype=np.uint16)
    values[0, 0] = 4000 if bright else value
    return stored(values)


def depths(train, test):
    parts = {}
    for name, images in (("train", train), ("test", test)):
        rows = [{"bytes": image, "path": None} for image in images]
        label = (datasets.ClassLabel(names=NAMES), cycle(len(images)))
        parts[name] = table(image=(datasets.Image(), rows), label=label)
    return datasets.DatasetDict(parts)


def test_the_range_is_that_of_all_images_and_is_said():
    # no image but one tells that there are twelve bits
    images, notes = load(depths([dark(100 + i, bright=i == 7) for i in range(12)], [dark(200 + i) for i in range(9)]))
    assert images.info.pixel_range == (0, 4095)
    assert [np.asarray(images.clean.image(i))[4, 4, 0] for i in range(12)] == [round((100 + i) / 4095 * 255)
                                                                              for i in range(12)]  # fmt: skip
    assert any("from 100 to 4000, and 0 was taken for black, 4095 for white; --pixel-range" in note for note in notes)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("named", [None, "0,1"])
def test_an_image_with_pixels_that_are_no_numbers_is_named(wrong, named):
    images = [np.full((8, 8), 0.5 + i / 100, dtype=np.float32) for i in range(12)]
    images[7][2, 3] = wrong
    message = "image 7 of split train cannot be decoded .some of its pixels are no finite numbers"
    with pytest.raises(BrokenImageError, match=message):
        load(depths([saved(image) for image in images], [saved(image / 2) for image in images[:6]]), pixel_range=named)


def test_a_range_can_be_named():
    both = depths([dark(100 + i) for i in range(12)], [dark(200 + i) for i in range(9)])
    assert load(both)[0].info.pixel_range == (0, 255)
    images, notes = load(both, pixel_range="100,1100")
    assert images.info.pixel_range == (100, 1100)
    assert np.asarray(images.clean.image(11))[0, 0, 0] == round(11 / 1000 * 255)
    assert not any("taken for black" in note for note in notes)
    assert load(both, pixel_range="4095")[0].info.pixel_range == (0, 4095)


def test_images_of_eight_bits_need_no_range_and_take_a_named_one():
    both = depths([png(i) for i in range(12)], [png(100 + i) for i in range(9)])
    images, notes = load(both)
    assert images.info.pixel_range is None
    assert notes == []
    halved, _ = load(both, pixel_range="0,127.5")
    expected = np.minimum(np.asarray(images.clean.image(3)).astype(int) * 2, 255)
    assert difference(halved.clean.image(3), expected) == 0
    wider, _ = load(both, pixel_range="0,4095")
    assert wider.clean.image(3).tobytes() == images.clean.image(3).tobytes()


@pytest.mark.parametrize(("values", "kind"), [
    (GREY.astype(np.float32) / 255, "TIFF"), (GREY.astype(np.float32) / 127.5 - 1, "TIFF"),
    ((GREY > 127).astype(np.uint16), "PNG"),
])  # fmt: skip
def test_images_of_eight_bits_keep_their_values_beside_numbers(values, kind):
    both = depths([png(i) for i in range(12)], [stored(values, kind)] + [png(100 + i) for i in range(8)])
    images, notes = load(both)
    assert any("pixels of 1 images" in note for note in notes)
    plain, _ = load(depths([png(i) for i in range(12)], [png(100 + i) for i in range(9)]))
    assert [images.clean.image(i).tobytes() for i in range(12)] == [plain.clean.image(i).tobytes() for i in range(12)]
    expected = GREY if kind == "TIFF" else (GREY > 127) * 255
    assert difference(images.evaluation.image(0), np.repeat(expected[..., None], 3, -1)) <= 1


@pytest.mark.parametrize("text", ["", "a,b", "5,5", "9,1", "0,inf", "nan,1", "1,2,3"])
def test_a_range_that_is_none(text):
    with pytest.raises(UsageError, match=r"--pixel-range .* such as 0,4095"):
        DetoxOptions("m", pixel_range=text)


def test_grey_numbers_of_64_bits_in_an_image_column_keep_their_values(tmp_path):
    rng = np.random.default_rng(0)
    levels = [30, 130, 230]
    arrays = [(np.full((8, 8), levels[i % 3]) + rng.integers(-15, 16, (8, 8))).astype(np.int64) for i in range(42)]
    spec = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    with pytest.warns(UserWarning, match="Downcasting"):
        whole = datasets.Dataset.from_dict({"image": arrays, "label": cycle(42)}, features=spec)
    images, _ = load(datasets.DatasetDict(train=whole.select(range(30)), test=whole.select(range(30, 42))))
    for position, row in enumerate(images.clean.indices):
        assert difference(images.clean.image(position), np.repeat(arrays[row][..., None], 3, -1)) == 0


@pytest.mark.parametrize("kind", ["lists", "array", "parquet lists"])
def test_a_column_of_arrays_holds_images(tmp_path, kind):
    pictures = [np.roll(COLOURS, i, 1) for i in range(42)]
    values = [np.moveaxis(picture / 255, -1, 0).tolist() for picture in pictures]
    if kind == "parquet lists":
        for name, part in (("train", slice(0, 30)), ("test", slice(30, 42))):
            columns = {"img": values[part], "label": [i % 3 for i in range(42)][part]}
            pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", row_group_size=7)
        whole = tmp_path
    else:
        feature = datasets.Array3D((3, *GREY.shape), "float32") if kind == "array" else datasets.List(
            datasets.List(datasets.List(datasets.Value("float32"))))  # fmt: skip
        rows = table(img=(feature, values), label=(datasets.ClassLabel(names=NAMES), cycle(42)))
        whole = datasets.DatasetDict(train=rows.select(range(30)), test=rows.select(range(30, 42)))
    images, _ = load(whole)
    assert images.info.pixel_range == (0, 1)
    assert all(difference(images.clean.image(i), pictures[row]) <= 1 for i, row in enumerate(images.clean.indices))
