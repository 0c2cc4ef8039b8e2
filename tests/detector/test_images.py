"""Images of the detector: modes and depths, transparency, limits, and what is left out."""

import logging
import struct
import zlib

import numpy as np
import predict
import pytest
from PIL import Image, TiffImagePlugin

from detector.config import DataConfig
from detector.data import DataError
from detector.data.images import (
    DARK,
    DARK_COLOURS,
    FRAMES,
    HIDDEN,
    ImageRules,
    UnreadableImage,
    read_image,
    read_size,
)
from detector.data.transforms import denormalise
from tests.detector.image_files import BOX, GREY, RULES, dataset_of, pixels_of
from tests.detector.messy_data import stored, with_orientation

# ---- modes and depths ----------------------------------------------------------------------------


# Modes by suffix, without those that Pillow loses colours of in writing.
WRITTEN = {
    "png": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "tif": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"),
    "jpg": ("L", "RGB", "RGBX", "CMYK", "YCbCr"),
    "webp": ("L", "LA", "PA", "RGB", "RGBA", "RGBa"),
    "gif": ("1", "L", "P", "RGB"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "tga": ("1", "L", "LA", "P", "RGB", "RGBA"),
}


@pytest.mark.parametrize(
    ("mode", "suffix"), [(mode, suffix) for suffix, modes in WRITTEN.items() for mode in modes]
)
def test_every_mode_that_a_file_can_have_becomes_the_same_picture(tmp_path, photo, mode, suffix):
    via = {"PA": "LA"}.get(mode, mode)
    path = tmp_path / f"a.{suffix}"
    photo.convert(via).convert(mode).save(path)
    expected = photo.convert("L") if mode in ("L", "LA", "PA") else photo
    expected = photo.convert("1") if mode == "1" else expected
    error = pixels_of(path) - np.asarray(expected.convert("RGB"))
    assert abs(error).mean() < (30 if mode == "P" or suffix == "gif" else 6)


def test_premultiplied_grey_of_a_tiff_is_read(tmp_path):
    path, tag = tmp_path / "a.tif", b"\x52\x01\x03\0\1\0\0\0"  # ExtraSamples, one short number
    Image.new("LA", (20, 10), (60, 128)).save(path)
    content = path.read_bytes()
    assert content.count(tag + b"\2\0") == 1
    path.write_bytes(content.replace(tag + b"\2\0", tag + b"\1\0"))  # Pillow writes no such file
    with Image.open(path) as file:
        assert file.mode == "La"
    assert tuple(pixels_of(path)[5, 5]) == (187, 187, 187)  # 120 at half opacity, on white


DEEP = {
    "uint16": (np.uint16, 65535, ("png", "tif", "pgm")),
    "big endian": (np.dtype(">u2"), 65535, ("tif", "png")),
    "int32": (np.int32, 65535, ("tif",)),
    "float": (np.float32, 1, ("tif", "pfm")),
}


@pytest.mark.parametrize("kind", DEEP)
def test_greys_of_more_than_8_bits_are_scaled_not_cut_off(tmp_path, kind):
    dtype, white, suffixes = DEEP[kind]
    for suffix in suffixes:
        path = tmp_path / f"a.{suffix}"
        Image.fromarray((GREY / 255 * white).astype(dtype)).save(path)
        assert abs(pixels_of(path) - GREY[..., None]).max() <= 1
        assert read_image(path, RULES).oddities == ()


def test_training_evaluation_and_prediction_see_the_same_deep_picture(tmp_path, monkeypatch):
    values = (GREY / 255 * 65535).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    seen = []
    for training in (True, False):
        dataset = dataset_of(tmp_path, [("a.png", (64, 48), BOX)], training=training)
        seen.append(np.asarray(denormalise(dataset[0][0])).astype(int))
    seen.append(pixels_of(tmp_path / "a.png"))
    for pixels in seen:
        assert abs(pixels - GREY[..., None]).max() <= 1
    assert predict.read_image is read_image


def test_the_scale_depends_on_no_other_pixel(tmp_path):
    values = np.full((48, 64), 20000, np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    values[0, 0] = 65535
    Image.fromarray(values).save(tmp_path / "b.png")
    assert pixels_of(tmp_path / "a.png")[9, 9, 0] == pixels_of(tmp_path / "b.png")[9, 9, 0] == 78


@pytest.mark.parametrize(
    ("value", "dtype", "cause"),
    [
        (70000, np.int32, r"must lie in 0 \.\. 65535, got 70000 \.\. 70000; --white-level can"),
        (-1, np.int32, r"must lie in 0 \.\. 65535, got -1 "),
        (200.0, np.float32, r"must lie in 0 \.\. 1, got 200 "),
        (np.nan, np.float32, "must be finite, got NaN"),
        (np.inf, np.float32, "must be finite"),
    ],
)
def test_greys_without_a_right_scale_are_refused(tmp_path, value, dtype, cause):
    path = tmp_path / "a.tif"
    Image.fromarray(np.full((4, 4), value, dtype)).save(path)
    with pytest.raises(UnreadableImage, match=cause):
        read_image(path, RULES)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_the_white_level_can_be_given(tmp_path, dtype):
    path = tmp_path / "a.tif"
    values = (GREY / 255 * 4095).astype(dtype)
    values[0, 0] = 5000  # whiter than white
    Image.fromarray(values).save(path)
    pixels = pixels_of(path, ImageRules(white_level=4095))
    assert pixels[0, 0, 0] == 255
    assert abs(pixels - GREY[..., None])[1:].max() <= 1


def test_a_picture_that_comes_out_nearly_black_is_said_to(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray((GREY / 255 * 4095).astype(np.uint16)).save(path)
    assert read_image(path, RULES).oddities == (DARK,)
    assert read_image(path, ImageRules(white_level=4095)).oddities == ()
    Image.fromarray(GREY // 20).save(path)  # of 8 bits: it is dark
    assert read_image(path, RULES).oddities == ()


def test_tiff_says_that_white_is_zero_or_that_there_are_12_bits(tmp_path):
    path, tags = tmp_path / "a.tif", TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(65535 - (GREY / 255 * 65535).astype(np.uint16)).save(path, tiffinfo=tags)
    assert abs(pixels_of(path) - GREY[..., None]).max() <= 1

    # Two values of 12 bits in three bytes.
    values = (GREY / 255 * 4095).astype(np.uint32)
    pairs = (values[:, 0::2] << 12) | values[:, 1::2]
    packed = np.stack([pairs >> 16, pairs >> 8, pairs], -1).astype(np.uint8).tobytes()
    entries = [(256, 4, 64), (257, 4, 48), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 200)]
    entries += [(277, 3, 1), (278, 4, 48), (279, 4, len(packed))]
    directory = len(entries).to_bytes(2, "little")
    for tag, kind, value in entries:
        directory += tag.to_bytes(2, "little") + kind.to_bytes(2, "little")
        directory += (1).to_bytes(4, "little") + value.to_bytes(4, "little")
    header = b"II*\0" + (8).to_bytes(4, "little") + directory
    path.write_bytes(header.ljust(200, b"\0") + packed)
    assert abs(pixels_of(path) - GREY[..., None]).max() <= 1


def write_png(path, values, colour_type, transparent=None):
    """(H, W, channels) of 16 bits, which Pillow writes for grey alone."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n"
    data += chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    if transparent:
        data += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    path.write_bytes(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("transparent", [None, (5000, 5000, 5000)])
def test_colours_of_16_bits_keep_their_upper_ones(tmp_path, photo, transparent):
    path = tmp_path / "a.png"
    values = np.asarray(photo).astype(np.uint16) * 257
    write_png(path, values, 2, transparent)
    assert abs(pixels_of(path) - np.asarray(photo)).max() <= 1
    (tmp_path / "a.ppm").write_bytes(b"P6 64 48 65535\n" + values.astype(">u2").tobytes())
    assert abs(pixels_of(tmp_path / "a.ppm") - np.asarray(photo)).max() <= 1
    write_png(path, values // 16, 2)
    assert read_image(path, RULES).oddities == (DARK_COLOURS,)


def test_grey_of_16_bits_with_alpha_is_laid_on_white(tmp_path):
    path, grey = tmp_path / "a.png", GREY.astype(np.uint16) * 257
    opaque = np.full_like(grey, 65535)
    write_png(path, np.stack([grey, opaque], -1), 4)
    assert abs(pixels_of(path) - GREY[..., None]).max() <= 1
    write_png(path, np.stack([grey // 16, opaque], -1), 4)
    assert read_image(path, RULES).oddities == (DARK_COLOURS,)


def test_the_first_picture_of_a_phone_s_file_is_turned_upright(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    preview = Image.new("RGB", (32, 24), "blue")
    options = dict(save_all=True, append_images=[preview], exif=exif, quality=95)
    stored(photo, 6).save(tmp_path / "a.jpg", "MPO", **options)
    read = read_image(tmp_path / "a.jpg", RULES)
    assert read.image.size == photo.size and read.oddities == (FRAMES,)
    assert abs(np.asarray(read.image).astype(int) - np.asarray(photo)).mean() < 5


# ---- transparency --------------------------------------------------------------------------------


def test_what_is_transparent_is_laid_on_white(tmp_path):
    picture = Image.new("RGBA", (30, 10), (200, 0, 0, 255))
    picture.paste((200, 0, 0, 0), (10, 0, 20, 10))
    picture.paste((200, 0, 0, 128), (20, 0, 30, 10))
    for name in ("a.png", "a.webp", "a.tif"):
        picture.save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
        pixels = pixels_of(tmp_path / name)
        np.testing.assert_allclose(pixels[5, 5], (200, 0, 0), atol=2)
        np.testing.assert_allclose(pixels[5, 15], (255, 255, 255), atol=2)
        np.testing.assert_allclose(pixels[5, 25], (227, 127, 127), atol=2)


def test_a_transparent_colour_of_a_palette_or_a_grey_is_white(tmp_path):
    palette = Image.new("P", (20, 10), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.paste(1, (10, 0, 20, 10))
    grey = Image.new("L", (20, 10), 7)
    grey.paste(90, (10, 0, 20, 10))
    for picture, transparent, seen in ((palette, 0, (200, 0, 0)), (grey, 7, (90, 90, 90))):
        for suffix in ("png", "gif"):
            path = tmp_path / f"a.{suffix}"
            picture.save(path, transparency=transparent)
            pixels = pixels_of(path)
            assert tuple(pixels[5, 5]) == (255, 255, 255)
            assert tuple(pixels[5, 15]) == seen


def test_an_alpha_channel_that_hides_everything_is_ignored(tmp_path, photo):
    hidden = photo.copy()
    hidden.putalpha(0)
    hidden.save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.png"), np.asarray(photo))
    assert read_image(tmp_path / "a.png", RULES).oddities == (HIDDEN,)


# ---- files that are not what they should be ------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_of_several_pictures_the_first_is_taken(tmp_path, photo, suffix):
    path = tmp_path / f"a.{suffix}"
    photo.save(path, save_all=True, append_images=[Image.new("RGB", photo.size, "blue")])
    assert abs(pixels_of(path) - np.asarray(photo)).mean() < 8
    assert read_image(path, RULES).oddities == (FRAMES,)


def test_a_wrong_suffix_does_not_matter(tmp_path, photo):
    photo.save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.jpg"), np.asarray(photo))


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda path: path.unlink(), "it does not exist"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_text("<html>"), "no image format that Pillow knows"),
        (lambda path: path.write_bytes(path.read_bytes()[:-60]), "truncated"),
        (lambda path: (path.unlink(), path.mkdir()), "directory"),
    ],
)
@pytest.mark.parametrize("told", [True, False], ids=["size in the json", "no size"])
def test_a_file_that_is_no_image_is_left_out_by_name(tmp_path, photo, spoil, cause, told, caplog):
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "b.png")
    spoil(tmp_path / "a.png")
    images = [("a.png", (64, 48) if told else None, BOX), ("b.png", (64, 48), BOX)]
    for training in (True, False):
        caplog.clear()
        dataset = dataset_of(tmp_path, images, training=training)
        items = [dataset[i] for i in (0, 1, 0)]
        assert dataset.bad_images.tolist() == [True, False]
        messages = [message for message in caplog.messages if "a.png cannot be read" in message]
        assert len(messages) == 1 and cause in messages[0]
        if training:
            assert [int(target["image_id"]) for _, target in items] == [1, 1, 1]


def test_a_run_of_files_that_cannot_be_read_is_skipped(tmp_path, photo, caplog):
    images = [(f"{i:02}.png", (64, 48), BOX) for i in range(60)]
    for name, *_ in images[25:] + images[:5]:
        photo.save(tmp_path / name)
    dataset = dataset_of(tmp_path, images)
    assert int(dataset[5][1]["image_id"]) == 25
    assert dataset.num_bad_images == 20


def test_files_that_cannot_be_read_are_named_up_to_a_number(tmp_path, photo, caplog):
    images = [(f"{i:02}.png", (64, 48), BOX) for i in range(60)]
    photo.save(tmp_path / "59.png")
    dataset = dataset_of(tmp_path, images, training=False)
    for i in range(60):
        dataset[i]
    assert len(caplog.messages) == 21
    assert caplog.messages[-1].endswith("further images that cannot be read are only counted")
    assert dataset.num_bad_images == 59


def test_a_json_that_says_a_gigantic_size_fills_no_memory(tmp_path, photo):
    (tmp_path / "a.png").write_bytes(b"")
    dataset = dataset_of(tmp_path, [("a.png", (2_000_000_000, 2_000_000_000), BOX)], training=False)
    assert dataset[0][0].shape == (3, 1024, 1024)


# ---- the limit of pixels -------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_is_pillows_unless_given(tmp_path, photo, monkeypatch):
    paths = [tmp_path / "a.png", tmp_path / "a.tif"]
    for path in paths:
        photo.save(path)  # 3072 pixels
        monkeypatch.setattr(
            Image, "MAX_IMAGE_PIXELS", 1600
        )  # Pillow warns, and fails at twice that
        assert read_image(path, RULES).image.size == (64, 48)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
        for read in (read_image, read_size):
            with pytest.raises(
                UnreadableImage, match=r"3072 pixels, above the limit of 3000; .*--max"
            ):
                read(path, RULES)
        assert read_image(path, ImageRules(max_pixels=3072)).image.size == (64, 48)
        with pytest.raises(UnreadableImage, match="above the limit of 3071"):
            read_image(path, ImageRules(max_pixels=3071))
        assert Image.MAX_IMAGE_PIXELS == 1500


def test_large_images_train_where_the_limit_says_so(tmp_path, photo, monkeypatch):
    photo.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    images = [("a.png", (64, 48), BOX)]
    with pytest.raises(DataError, match="10 images in a row cannot be read"):
        dataset_of(tmp_path, images)[0]
    dataset = dataset_of(tmp_path, images, ImageRules.of(DataConfig(max_pixels=5000)))
    assert dataset[0][0].shape == (3, 48, 64)


def test_messages_come_from_the_detector_alone(tmp_path, photo, caplog):
    """What is odd is said by this program, at the level of warnings."""
    with_orientation(tmp_path / "a.jpg", photo, 3)
    dataset_of(tmp_path, [("a.jpg", (64, 48), BOX)])[0]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "detector.data.coco"
