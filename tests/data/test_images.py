"""Images and maps as they are read, on files written by the tests."""

import contextlib
import itertools
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from diffsal.data.images import find_images, read_image, read_map
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (13, 17), dtype=np.uint8)


def rgb(grey):
    return np.stack([grey] * 3, axis=-1)


def one_line(error, path):
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *itertools.product(["1", "L", "P", "RGB", "RGBA"], ["png", "tif", "bmp", "webp"]),
        ("CMYK", "tif"),
    ],
)
def test_pixels_survive(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    image = Image.fromarray(COLOUR).convert(mode)
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    expected = image.convert("RGB")
    assert np.array_equal(read_image(path), expected)
    grey = np.array(expected, np.float64) @ [0.299, 0.587, 0.114] / 255
    np.testing.assert_allclose(read_map(path), grey, atol=0.51 / 255)
    assert read_image(path).dtype == np.uint8
    assert read_map(path).dtype == np.float32


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path, mode):
    smooth = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    image = Image.fromarray(rgb(smooth)).convert(mode)
    image.save(tmp_path / "image.jpg", quality=100)
    ours = read_image(tmp_path / "image.jpg").astype(int)
    assert np.abs(ours - np.array(image.convert("RGB"))).max() <= 3


@pytest.mark.parametrize("transparency", ["channel", "palette", "colour"])
def test_images_ignore_transparency_and_maps_count_it_as_unmarked(tmp_path, transparency, recwarn):
    path = tmp_path / "image.png"
    alpha = np.full((13, 17), 0 if transparency == "colour" else 51, np.uint8)
    alpha[:, 8:] = 255
    if transparency == "channel":
        Image.fromarray(np.dstack([rgb(np.full_like(alpha, 200)), alpha])).save(path)
    elif transparency == "palette":
        image = Image.fromarray(alpha // 255)
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([200] * 6)
        image.save(path, transparency=b"\x33\xff")
    else:
        Image.fromarray(np.where(alpha, 200, 201).astype(np.uint8)).save(path, transparency=201)
    assert (np.abs(read_image(path).astype(int) - 200) <= 1).all()
    np.testing.assert_allclose(read_map(path), alpha / 255 * (200 / 255), atol=1e-6)
    assert not recwarn.list


def write_tiff(path, data, width, height, bits, photometric, sample_format=1):
    """An uncompressed grey TIFF, for what Pillow reads and cannot write."""
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(data)),
        (339, sample_format),
    ]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, 8 + len(data))
        + data
        + struct.pack("<H", len(tags))
        + directory
        + bytes(4)
    )


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_by_the_files_range(tmp_path, suffix):
    values = np.array([[0, 257, 128 * 257, 65535], [4095, 1, 128, 129]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    expected = np.array([[0, 1, 128, 255], [16, 0, 0, 1]], np.uint8)  # 12 bits in 16 stay dark
    assert np.array_equal(read_image(path), rgb(expected))
    np.testing.assert_allclose(read_map(path), values / 65535, rtol=1e-6)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bits_in_either_byte_order(tmp_path, byteorder):
    values = RNG.integers(0, 65536, (5, 9)).astype(f"{byteorder}u2")
    image = Image.frombytes("I;16B" if byteorder == ">" else "I;16", (9, 5), values.tobytes())
    image.save(tmp_path / "deep.tif")
    np.testing.assert_allclose(read_map(tmp_path / "deep.tif"), values / 65535, rtol=1e-6)


def test_12_bit_tiff_is_scaled_by_12_bits(tmp_path):
    path = tmp_path / "deep.tif"
    write_tiff(path, bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x01]), 4, 1, 12, 1)
    np.testing.assert_allclose(read_map(path), [np.array([4095, 0, 2048, 1]) / 4095], rtol=1e-6)
    assert np.array_equal(read_image(path), rgb(np.array([[255, 0, 128, 0]])))


@pytest.mark.parametrize(("bits", "dtype"), [(8, "<u1"), (16, "<u2")])
def test_tiff_whose_zero_is_white(tmp_path, bits, dtype):
    full = 2**bits - 1
    values = np.array([[0, full, full // 5]], dtype)
    write_tiff(tmp_path / "a.tif", values.tobytes(), 3, 1, bits, 0)
    np.testing.assert_allclose(read_map(tmp_path / "a.tif"), [[1, 0, 0.8]], atol=1e-6)
    assert np.array_equal(read_image(tmp_path / "a.tif"), rgb(np.array([[255, 0, 204]])))


def test_floating_point_within_0_and_1(tmp_path):
    path = tmp_path / "float.tif"
    values = RNG.random((4, 6), dtype=np.float32)
    Image.fromarray(values).save(path)
    assert np.array_equal(read_map(path), values)
    assert np.array_equal(read_image(path), rgb(np.rint(values * 255)))


@pytest.mark.parametrize("values", [[0, 1.01], [-0.01, 1], [0, np.nan]])
@pytest.mark.parametrize("read", [read_image, read_map])
def test_other_floating_point_is_refused(tmp_path, values, read):
    path = tmp_path / "float.tif"
    Image.fromarray(np.array([values], np.float32)).save(path)
    with pytest.raises(DiffsalError, match=r"outside \[0, 1\]") as error:
        read(path)
    one_line(error, path)


@pytest.mark.parametrize(("dtype", "sample_format"), [("<i2", 2), ("<i4", 2), ("<u4", 1)])
def test_integers_without_a_white_are_refused(tmp_path, dtype, sample_format):
    values = np.array([[0, 1000]], dtype)
    bits = 8 * values.itemsize
    write_tiff(tmp_path / "a.tif", values.tobytes(), 2, 1, bits, 1, sample_format)
    with pytest.raises(DiffsalError, match="signed or 32-bit") as error:
        read_image(tmp_path / "a.tif")
    one_line(error, tmp_path / "a.tif")


UPRIGHT = {  # EXIF 2.3, table 6: what brings the stored rows and columns upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "16.png", "16.tif"])
def test_exif_orientation(tmp_path, suffix, orientation):
    path = tmp_path / f"image.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = GREY.astype(np.uint16) * 257 if "16" in suffix else GREY
    Image.fromarray(stored).save(path, exif=exif, lossless=True)
    assert np.array_equal(read_image(path), rgb(UPRIGHT[orientation](GREY)))
    np.testing.assert_allclose(read_map(path), UPRIGHT[orientation](GREY) / 255, rtol=1e-6)


def test_a_cameras_jpeg_with_a_preview_is_its_first_image(tmp_path):
    path = tmp_path / "camera.jpg"
    image, preview = (Image.new("RGB", (32, 24), colour) for colour in ("white", "black"))
    image.save(path, format="MPO", save_all=True, append_images=[preview])
    assert read_image(path).min() > 250


def pages(path):
    first, second = Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1].copy())
    first.save(path, save_all=True, append_images=[second])


def truncated(path):
    whole = path.with_stem("whole")
    Image.fromarray(RNG.integers(0, 256, (99, 99, 3), dtype=np.uint8)).save(whole)
    path.write_bytes(whole.read_bytes()[:-300])


BROKEN = {
    "missing.png": (lambda path: None, ": No such file"),
    "folder.png": (lambda path: path.mkdir(), ": Is a directory|: Permission denied"),
    "empty.png": (lambda path: path.touch(), "the file is empty"),
    "text.png": (lambda path: path.write_text("no image\n" * 50), "not a readable image"),
    "image.gif": (lambda path: Image.fromarray(GREY).save(path), "not a readable image"),
    "cut.png": (truncated, "cannot be decoded"),
    "cut.jpg": (truncated, "cannot be decoded"),
    "cut.tif": (truncated, "cannot be decoded"),
    "cut.bmp": (truncated, "cannot be decoded"),
    "cut.webp": (truncated, "cannot be decoded|not a readable"),
    "pages.tif": (pages, "holds 2 images"),
    "moving.png": (pages, "holds 2 images"),
    "moving.webp": (pages, "holds 2 images"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("read", [read_image, read_map])
def test_broken_file_is_one_line(tmp_path, name, read):
    make, message = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(DiffsalError, match=message) as error:
        read(tmp_path / name)
    one_line(error, tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_unreadable_file_and_folder(tmp_path):
    path = tmp_path / "folder" / "image.png"
    path.parent.mkdir()
    Image.fromarray(COLOUR).save(path)
    path.chmod(0)
    with pytest.raises(DiffsalError, match="Permission denied") as error:
        read_image(path)
    one_line(error, path)
    path.parent.chmod(0)
    try:
        for given in (tmp_path, path.parent, path):
            with pytest.raises(DiffsalError, match="check the path"):
                find_images([given], recursive=True)
    finally:
        path.parent.chmod(0o700)


@pytest.mark.parametrize("height", [15, 30])  # Pillow warns of the first and raises at the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused(tmp_path, monkeypatch, height):
    path = tmp_path / "bomb.png"
    Image.new("L", (10, height)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 149)
    with pytest.raises(DiffsalError, match="limit") as error:
        read_image(path)
    one_line(error, path)


@pytest.mark.filterwarnings("ignore")
@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data())
def test_damaged_file_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    suffix = data.draw(st.sampled_from(["png", "jpg", "bmp", "webp", "dcm"]))
    whole = folder / f"whole.{suffix}"
    if not whole.exists():
        save_dicom(whole, GREY) if suffix == "dcm" else Image.fromarray(COLOUR).save(whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / f"damaged.{suffix}"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(DiffsalError):
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
        image = read_image(path)
        assert image.dtype == np.uint8
        assert image.shape[2:] == (3,)


def test_worker_threads_read_what_one_thread_reads(tmp_path):
    paths = []
    for index in range(40):
        paths.append(tmp_path / f"{index}.{['png', 'jpg', 'tif', 'bmp', 'webp'][index % 5]}")
        Image.fromarray(np.roll(COLOUR, index)).save(paths[-1])
    preprocessing = Preprocessing(size=(32, 32), resize="crop")
    with ThreadPoolExecutor(8) as pool:
        inputs = list(pool.map(lambda path: preprocessing(read_image(path)), paths))
    for path, ours in zip(paths, inputs, strict=True):
        assert torch.equal(ours, preprocessing(read_image(path)))


def save_dicom(path, pixels, bits=None, syntax=ExplicitVRLittleEndian, **elements):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.shape[2:] == (3,) else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * pixels.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    dataset.save_as(path, enforce_file_format=True)


def voi_lut(table, first, depth, vr="US"):
    item = Dataset()
    item.LUTDescriptor = [len(table), first, depth]
    item.add_new("LUTData", vr, table if vr == "US" else np.array(table, "<u2").tobytes())
    return {"VOILUTSequence": [item]}


@pytest.mark.parametrize("name", ["image.dcm", "image"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_dicom_of_8_bits_stays_as_it_is(tmp_path, name, syntax):
    narrow = GREY // 4 + 50
    save_dicom(tmp_path / name, narrow, syntax=syntax)
    assert np.array_equal(read_image(tmp_path / name), rgb(narrow))
    save_dicom(tmp_path / name, COLOUR, syntax=syntax)
    assert np.array_equal(read_image(tmp_path / name), COLOUR)


HOUNSFIELD = np.array([[0, 900, 1064, 1224, 4000]], np.uint16)  # -1024, -124, 40, 200, 2976


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        # PS3.3 C.11.2.1.2.1: ((x - (40 - 0.5)) / (400 - 1) + 0.5), x in Hounsfield units
        ({}, [0, 0.5 - 163.5 / 399, 0.5 + 0.5 / 399, 0.5 + 160.5 / 399, 1]),
        # C.11.2.1.3.2: ((x - 40) / 400 + 0.5)
        ({"VOILUTFunction": "LINEAR_EXACT"}, [0, 0.5 - 164 / 400, 0.5, 0.5 + 160 / 400, 1]),
        # C.11.2.1.3.1: 1 / (1 + exp(-4 (x - 40) / 400))
        (
            {"VOILUTFunction": "SIGMOID"},
            [0, 1 / (1 + np.exp(1.64)), 0.5, 1 / (1 + np.exp(-1.6)), 1],
        ),
        # The first of several windows.
        (
            {"WindowCenter": ["40", "-600"], "WindowWidth": ["400", "1500"]},
            [0, 0.5 - 163.5 / 399, 0.5 + 0.5 / 399, 0.5 + 160.5 / 399, 1],
        ),
        ({"PhotometricInterpretation": "MONOCHROME1"}, [1, 0.9098, 0.4987, 0.0977, 0]),
    ],
)
def test_dicom_window_on_rescaled_values(tmp_path, elements, expected):
    window = {"WindowCenter": "40", "WindowWidth": "400"}
    rescale = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    save_dicom(tmp_path / "ct.dcm", HOUNSFIELD, bits=12, **{**window, **rescale, **elements})
    expected = np.array([expected]) * 255
    np.testing.assert_allclose(read_image(tmp_path / "ct.dcm")[..., 0], expected, atol=0.55)


def test_dicom_negative_slope_turns_grey_round(tmp_path):
    """Stored 0 and 100 mean 0 and -100; under a window around -50 the first is the brighter."""
    stored = np.array([[0, 50, 100]], np.uint16)
    elements = {"RescaleSlope": "-1", "RescaleIntercept": "0"}
    window = {"WindowCenter": "-50", "WindowWidth": "100", "VOILUTFunction": "LINEAR_EXACT"}
    save_dicom(tmp_path / "a.dcm", stored, **elements, **window)
    assert np.array_equal(read_image(tmp_path / "a.dcm")[0, :, 0], [255, 128, 0])
    save_dicom(tmp_path / "a.dcm", stored.astype(np.uint8), **elements)
    assert np.array_equal(read_image(tmp_path / "a.dcm")[0, :, 0], [255, 205, 155])


@pytest.mark.filterwarnings("error")
def test_dicom_without_window_runs_from_minimum_to_maximum(tmp_path):
    values = np.array([[-200, 0, 600]], np.int16)
    save_dicom(tmp_path / "a.dcm", values)
    assert np.array_equal(read_image(tmp_path / "a.dcm")[0, :, 0], [0, 64, 255])
    save_dicom(tmp_path / "a.dcm", np.full((2, 2), 7, np.int16))
    assert not read_image(tmp_path / "a.dcm").any()


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("depth", [8, 12, 16])
@pytest.mark.parametrize("rescale", [{}, {"RescaleSlope": "1", "RescaleIntercept": "0"}])
def test_dicom_voi_lut(tmp_path, vr, depth, rescale):
    """A falling table of 1000 entries from 100 on, before a window that would say otherwise.

    The table fills 12 bits at most, also where 16 are declared.
    """
    full = 2 ** min(depth, 12) - 1
    table = [round(full * (999 - entry) / 999) for entry in range(1000)]
    window = {"WindowCenter": "40", "WindowWidth": "400"}
    values = np.array([[0, 100, 350, 1099, 4000]], np.uint16)
    save_dicom(tmp_path / "a.dcm", values, **voi_lut(table, 100, depth, vr), **window, **rescale)
    expected = np.array([1, 1, 749 / 999, 0, 0]) * 255
    np.testing.assert_allclose(read_image(tmp_path / "a.dcm")[0, :, 0], expected, atol=1)


def test_dicom_modality_lut(tmp_path):
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [4, 0, 16], "US"
    item.add_new("LUTData", "US", [0, 10, 40, 50])
    values = np.array([[0, 1, 2, 3]], np.uint16)
    save_dicom(tmp_path / "a.dcm", values, bits=12, ModalityLUTSequence=[item])
    assert np.array_equal(read_image(tmp_path / "a.dcm")[0, :, 0], [0, 51, 204, 255])


def test_dicom_palette(tmp_path):
    palette = RNG.integers(0, 256, (3, 256), dtype=np.uint8)
    elements = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in zip(("Red", "Green", "Blue"), palette, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        elements[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    save_dicom(tmp_path / "a.dcm", GREY, **elements)
    assert np.array_equal(read_image(tmp_path / "a.dcm"), palette.T[GREY])


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ({"NumberOfFrames": 2, "PixelData": bytes(2 * GREY.size)}, "holds 2 frames"),
        ({"PixelData": bytes(10)}, "cannot be decoded"),
        ({"Rows": 60000, "Columns": 60000}, "limit"),
        ({"WindowCenter": "40", "WindowWidth": "0"}, "Window Width"),
    ],
)
def test_broken_dicom_is_one_line(tmp_path, elements, message):
    path = tmp_path / "a.dcm"
    save_dicom(path, GREY, **elements)
    with pytest.raises(DiffsalError, match=message) as error:
        read_image(path)
    one_line(error, path)


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    save_dicom(tmp_path / "a.dcm", GREY)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DiffsalError, match=r"pip install 'diffsal\[dicom\]'") as error:
        read_image(tmp_path / "a.dcm")
    one_line(error, tmp_path / "a.dcm")


def test_dicom_examples_of_pydicom():
    """Real scanners' files, which ship with pydicom."""
    ct = read_image(pydicom.examples.get_path("ct"))
    assert ct.shape == (128, 128, 3)
    assert ct.std() > 10
    assert read_image(pydicom.examples.get_path("rgb_color")).ndim == 3


def test_find_images(tmp_path):
    names = ["b.PNG", "a.jpeg", "scan.dcm", "notes.txt", ".hidden.png", "sub/c.tif", ".git/d.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    flat = [tmp_path / name for name in ("a.jpeg", "b.PNG", "scan.dcm")]
    assert find_images([tmp_path], recursive=False) == flat
    assert find_images([tmp_path], recursive=True) == [*flat, tmp_path / "sub/c.tif"]
    given = [tmp_path / "notes.txt", tmp_path / "sub", tmp_path / "a.jpeg"]
    assert find_images(given, recursive=False) == [given[0], tmp_path / "sub/c.tif", given[2]]


def test_find_images_refuses_nothing_to_do(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "image.png").touch()
    with pytest.raises(DiffsalError, match=r"no images in this folder .*--recursive"):
        find_images([tmp_path], recursive=False)
    (tmp_path / "sub" / "image.png").unlink()
    with pytest.raises(DiffsalError, match="no images in this folder"):
        find_images([tmp_path], recursive=True)
    with pytest.raises(DiffsalError, match=r"missing\.png: no file or folder"):
        find_images([tmp_path / "missing.png"], recursive=False)
