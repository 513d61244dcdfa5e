"""The tries: of weights, images, human maps and index files, each with a name and a fresh file."""

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile.attacks import mutated, written
from PIL import Image

from diffsal.data.images import read_image, read_map
from diffsal.data.index import read_index
from diffsal.data.preprocessing import Preprocessing
from diffsal.explaining.explanations import Settings, explain_images
from diffsal.maps.salience import explain
from diffsal.models.architectures import build_model
from diffsal.models.checkpoints import load_model, save_checkpoint

Tries = Iterator[tuple[str, Callable[[], object]]]
SHAPE = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 8}


def loads(path: Path) -> Callable[[], object]:
    """Loads a model as the command line does, and explains an image where there is one."""

    def load() -> None:
        loaded = load_model(path)
        dtype = next(loaded.model.parameters()).dtype
        channels = (loaded.preprocessing or Preprocessing()).channels
        image = torch.rand(1, channels, 64, 64).to(dtype)
        explain(loaded.model, image, target_layers=loaded.target_layer)

    return load


def own_file(path: Path) -> bytes:
    """A small whole checkpoint."""
    model = build_model("DenseNet", {**SHAPE, "num_classes": 2})
    told: dict[str, Any] = {"classes": ["a", "b"], "preprocessing": Preprocessing(size=(64, 64))}
    save_checkpoint(path, model, architecture="DenseNet", arguments=SHAPE, **told)
    return path.read_bytes()


def odd_values() -> list[Any]:
    """What an entry may be in the place of what it should."""
    shared: list[Any] = []
    for _ in range(40):
        shared = [shared, shared]
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    return [
        *(None, True, 0, -1, 10**18, 10**400, 1e308, float("nan"), "", "x" * 100_000, "\n\0\ud800"),
        *(
            [],
            {},
            [None],
            [-1] * 3,
            ["a"] * 50_000,
            {"": 0},
            {3: 4},
            {"a": {"b": {}}},
            (),
            (1, "a"),
        ),
        *(shared, endless, deep, b"bytes", 1j, {1, 2}, torch.float8_e4m3fn, torch.Size([2])),
        *(torch.ones(2), torch.ones(2, 2).to_sparse(), torch.ones(1).expand(1 << 40)),
        *(torch.empty(2, device="meta"), torch.ones(2, dtype=torch.complex64), torch.tensor(3)),
        torch.nn.Parameter(torch.ones(2, 3)),
    ]


def handmade_weights(folder: Path, every: int = 1) -> Tries:
    """Each entry of a checkpoint, and of its arguments and preprocessing, as each odd value."""
    own_file(folder / "own.pt")
    whole = torch.load(folder / "own.pt", weights_only=True)
    places = [(name,) for name in whole] + [
        *(("architecture", name) for name in ("name", "arguments")),
        *(("preprocessing", name) for name in ("size", "resize", "mean", "std", "channels")),
        *(("state_dict", name) for name in list(whole["state_dict"])[:3]),
        *(("state_dict", name) for name in ("classifier.weight", "classifier.bias", "new.weight")),
    ]
    for number, (place, value) in enumerate(product(places, odd_values())):
        if number % every:
            continue
        content = {k: dict(v) if isinstance(v, dict) else v for k, v in whole.items()}
        (content[place[0]] if len(place) > 1 else content)[place[-1]] = value
        yield from _saved(folder / "try.pt", content, f"{'.'.join(place)} {number}")
    arguments = [*whole["architecture"]["arguments"], "memory_efficient", "new"]
    for number, (name, value) in enumerate(product(arguments, odd_values())):
        if number % every == 0:
            made = {"name": "DenseNet", "arguments": SHAPE | {"num_classes": 2, name: value}}
            content = {**whole, "architecture": made}
            yield from _saved(folder / "try.pt", content, f"arguments {name} {number}")


def _saved(path: Path, content: Any, name: str) -> Tries:
    try:
        torch.save(content, path)
    except Exception:  # what cannot be saved so is no file
        return
    yield name, loads(path)


def mutated_weights(folder: Path, count: int, seed: int = 0) -> Tries:
    """A checkpoint with bytes changed; in half of the tries those of its pickle, in a whole zip."""
    draw = random.Random(seed)
    content = own_file(folder / "own.pt")
    old = io.BytesIO()
    whole = torch.load(folder / "own.pt", weights_only=True)
    torch.save(whole, old, _use_new_zipfile_serialization=False)
    for number in range(count):
        match number % 4:
            case 0:
                changed = mutated(content, draw)
            case 1:
                changed = mutated(old.getvalue(), draw)
            case _:
                changed = _with_pickle(content, draw)
        yield f"mutation {number}", loads(written(folder / "try.pt", changed))


def _with_pickle(content: bytes, draw: random.Random) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(made, "w") as archive:
        for name in source.namelist():
            member = source.read(name)
            archive.writestr(name, mutated(member, draw) if name.endswith("data.pkl") else member)
    return made.getvalue()


def pickles(folder: Path) -> Tries:
    """Whole pickles of odd values, plain, and in an archive."""
    for number, value in enumerate(odd_values()):
        try:
            content = pickle.dumps(value, 2)
        except Exception:
            continue
        yield f"pickle {number}", loads(written(folder / "try.pt", content))
        with zipfile.ZipFile(folder / "zipped.pt", "w") as archive:
            archive.writestr("archive/data.pkl", content)
        yield f"zipped pickle {number}", loads(folder / "zipped.pt")


def image_files() -> list[tuple[str, bytes]]:
    """Small images of each format and depth, and their suffixes."""
    colours = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("png", Image.fromarray(colours), {}),
        ("png", Image.fromarray(colours[..., 0]).convert("P"), {}),
        ("png", Image.fromarray(colours[..., 0].astype(np.uint16) * 257), {}),
        ("png", Image.fromarray(colours).convert("LA"), {}),
        ("jpg", Image.fromarray(colours), {}),
        ("tif", Image.fromarray(colours), {}),
        ("tif", Image.fromarray(colours), {"compression": "tiff_lzw"}),
        ("tif", Image.fromarray(colours[..., 0] / np.float32(255)), {}),
        ("bmp", Image.fromarray(colours), {}),
        ("webp", Image.fromarray(colours), {}),
    ]
    files = []
    for suffix, image, options in kinds:
        made = io.BytesIO()
        image.save(made, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
        files.append((suffix, made.getvalue()))
    return [*files, *_dicom_files()]


def _dicom_files() -> list[tuple[str, bytes]]:
    pydicom = __import__("pydicom.examples")
    names = ("ct", "rgb_color", "palette_color")
    return [("dcm", pydicom.examples.get_path(name).read_bytes()) for name in names]


def mutated_images(folder: Path, count: int, seed: int = 0) -> Tries:
    """Images of each format with bytes changed, read as images and as human maps."""
    draw = random.Random(seed)
    files = image_files()
    for number in range(count):
        suffix, content = files[number % len(files)]
        # Of large files it is the beginning that tells how to read the rest.
        head, rest = content[:2048], content[2048:]
        path = written(folder / f"try.{suffix}", mutated(head, draw) + rest)
        read = read_map if number % 3 == 0 and suffix != "dcm" else read_image
        yield f"{suffix} {number}", lambda path=path, read=read: read(path)


def large_image(folder: Path, is_whole: bool) -> Tries:
    """The explanation of 9,400 x 9,400 pixels in 257 kB; nothing where it is not the whole."""
    if not is_whole:
        return
    own_file(folder / "own.pt")
    loaded = load_model(folder / "own.pt")
    settings = Settings(Preprocessing(size=(64, 64)), torch.device("cpu"))
    for mode in ("L", "RGB"):
        Image.new(mode, (9_400, 9_400)).save(folder / f"{mode}.png")

        def explained(path: Path = folder / f"{mode}.png") -> None:
            manifest = explain_images([path], loaded, folder / path.stem, settings)
            assert manifest["explained"] == 1

        yield mode, explained


def index_files(folder: Path, count: int, seed: int = 0) -> Tries:
    """An index with bytes changed, in three delimiters; and odd headers and cells."""
    draw = random.Random(seed)
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes(b"")
    whole = "path,label,map,subset,group,split\na.png,x,c.png,s,1,train\nb.png,y,,,2,val\n"
    cells = [
        "",
        "\0",
        "9" * 5_000,
        "x" * 300,
        '"',
        "../" * 2_000,
        "\ud800",
        "=1+1",
        "a.png\nb",
        "²",
    ]
    odd = [whole.replace(part, cell, 1) for part in ("a.png", "x", "c.png", "s") for cell in cells]
    for number in range(count):
        text = (odd[number] if number < len(odd) else whole).replace(",", draw.choice(",;\t"))
        content = text.encode("utf-8", "surrogatepass")
        content = content if number < len(odd) else mutated(content, draw)
        path = written(folder / "index.csv", content)
        yield f"index {number}", lambda path=path: read_index(path)


def configs(folder: Path, count: int, seed: int = 0) -> Tries:
    """A hub folder whose configuration is changed."""
    draw = random.Random(seed)
    told = {
        "architecture": "resnet18",
        "num_classes": 2,
        "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3},
    }
    torch.save({"fc.weight": torch.ones(2, 512)}, folder / "pytorch_model.bin")
    values = [None, -1, 10**30, "x" * 1_000, [], {}, [[[]]], True, "../../etc", 1e308]
    for number in range(count):
        changed = dict(told)
        changed[draw.choice([*told, "label_names", "model_args"])] = draw.choice(values)
        text = json.dumps(changed).encode()
        written(folder / "config.json", text if number % 2 else mutated(text, draw))
        yield f"config {number}", loads(folder)
