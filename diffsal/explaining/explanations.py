"""Explain images: from files to pictures, maps and a manifest that tells all."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffsal import __version__
from diffsal.data.index import class_position
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError
from diffsal.explaining import one_image
from diffsal.explaining.one_image import Computed, Outputs, Prepared, Wanted, computed
from diffsal.explaining.records import Record, class_names, failure, identity
from diffsal.explaining.workers import Do, Later, ahead, working
from diffsal.maps.contrast import Choice, class_count
from diffsal.maps.salience import explain
from diffsal.maps.salience_maps import SalienceMaps
from diffsal.maps.weightings import Weighting
from diffsal.models.checkpoints import LoadedModel
from diffsal.system.devices import choose_device, running
from diffsal.system.files import write_json
from diffsal.system.locks import sole_writer
from diffsal.system.processes import in_turns, process_group, process_rank

MANIFEST = "manifest.json"
_LONGEST_STEM = 220  # bytes
_BATCHES_AHEAD = 2  # that workers read, and draw, while the model runs


@dataclass(frozen=True)
class Settings:
    """How images are explained; the same for all of them.

    Attributes:
        preprocessing: from an image's pixels to the model's input.
        device: where the model runs.
        classes: one name per class; ``None``: ``class 0`` and so on.
        true: the class taken as true, by name or index; ``None``: the prediction.
        false: by name or index, ``runner-up`` or ``rest``; ``None``: see
            :func:`diffsal.maps.contrast.contrast`.
        weighting: see :class:`diffsal.maps.salience.capture`.
        batch_size: images in one forward pass.
        workers: processes that read images and draw pictures; 0: this process does it all.
        outputs: what is written for each image.
    """

    preprocessing: Preprocessing
    device: torch.device
    classes: Sequence[str] | None = None
    true: str | None = None
    false: str | None = None
    weighting: Weighting = "elementwise"
    batch_size: int = 8
    workers: int = 0
    outputs: Outputs = field(default_factory=Outputs)


def settings_of(loaded: LoadedModel, device: str = "auto", **chosen: Any) -> Settings:
    """Settings with the preprocessing and the classes' names that a model's file carries.

    Args:
        loaded: see :func:`diffsal.load_model`.
        device: see :func:`diffsal.system.devices.choose_device`.
        chosen: attributes of :class:`Settings` that are to be other than their defaults.

    Raises:
        DiffsalError: the file tells no preprocessing, and none is chosen; no such device.

    Example:
        >>> from diffsal.models.checkpoints import LoadedModel
        >>> about = {"architecture": "", "arguments": {}, "layer": None, "sha256": "", "notes": ()}
        >>> parts = torch.nn.Linear(2, 2), ("healthy", "ill"), Preprocessing(size=(64, 64))
        >>> names = "model", "classes", "preprocessing"
        >>> loaded = LoadedModel(**dict(zip(names, parts)), path=Path("weights.pt"), **about)
        >>> settings = settings_of(loaded, "cpu", true="ill", workers=2)
        >>> settings.preprocessing.size, settings.classes, settings.true, settings.workers
        ((64, 64), ('healthy', 'ill'), 'ill', 2)
    """
    known: dict[str, Any] = {"classes": loaded.classes, "preprocessing": loaded.preprocessing}
    known |= chosen
    if known["preprocessing"] is None:
        raise DiffsalError(
            f"{loaded.path}: does not tell how images become the model's input: pass "
            "preprocessing=Preprocessing(size=..., mean=..., std=...)"
        )
    return Settings(device=choose_device(device), **known)


def explain_images(
    images: Sequence[str | Path],
    loaded: LoadedModel,
    folder: str | Path,
    settings: Settings | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Explain ``images``; write pictures, maps and, last, ``manifest.json`` to ``folder``.

    An image that cannot be read or explained does not stop the rest: its record in the manifest
    has an ``error`` and no ``files``. Under torchrun the images are shared among the processes;
    every process returns the manifest of all, and the first one writes it.

    Args:
        images: files, in the order of the manifest's records.
        loaded: the model; it is moved to the settings' device.
        folder: made where it is not there.
        settings: see there; ``None``: those of :func:`settings_of`.
        overwrite: replace files that are there already.

    Returns:
        The manifest (``docs/files.md``).

    Raises:
        DiffsalError: what concerns all images: files that are there already, another run that is
            writing to the folder, an unknown class, a model that does not run on these inputs or
            cannot be contrasted; see :func:`settings_of`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from diffsal import load_model, save_checkpoint
        >>> from diffsal.models.architectures import build_model
        >>> name, arguments = "torchvision:resnet18", {"num_classes": 2}
        >>> with TemporaryDirectory() as place:
        ...     model, photo = build_model(name, arguments), Path(place, "photo.png")
        ...     save_checkpoint(
        ...         Path(place, "weights.pt"), model, architecture=name, arguments=arguments,
        ...         classes=["healthy", "ill"], preprocessing=Preprocessing(size=(64, 64)),
        ...     )
        ...     Image.new("RGB", (80, 60)).save(photo)
        ...     loaded = load_model(Path(place, "weights.pt"))
        ...     found = explain_images([photo], loaded, Path(place, "report"))
        >>> found["explained"], found["images"][0]["files"]
        (1, ['photo.png'])
    """
    paths, folder = [*map(Path, images)], Path(folder)
    settings = settings or settings_of(loaded)
    stems = _stems(paths, settings.outputs)
    _check_free(paths, stems, settings.outputs, folder, overwrite)
    loaded.model.to(settings.device)
    rank, world = process_rank()
    mine = list(zip(paths, stems, strict=True))[rank::world]
    with sole_writer(folder) if rank == 0 else nullcontext():
        wanted = Wanted(folder, settings.preprocessing, settings.outputs)
        with working(settings.workers) as do:
            records = list(_explain_all(mine, loaded, wanted, settings, do))
        with process_group(torch.device("cpu")):
            records = in_turns(records, world, "the manifest")
        manifest = _manifest(records, loaded, settings)
        if rank == 0:
            write_json(folder / MANIFEST, manifest)
    return manifest


def _explain_all(
    inputs: Sequence[tuple[Path, str]],
    loaded: LoadedModel,
    wanted: Wanted,
    settings: Settings,
    do: Do,
) -> Iterator[Record]:
    """One record for each image, in order. Reading, computing and drawing overlap.

    No more is held than a batch, or with workers the few that are on their way.
    """
    count = _BATCHES_AHEAD if settings.workers else 0
    starts = range(0, len(inputs), settings.batch_size)
    batches = (inputs[start : start + settings.batch_size] for start in starts)
    being_read = (
        (batch, [do(partial(one_image.prepare, wanted), path) for path, _ in batch])
        for batch in batches
    )
    being_drawn = (
        _begun(batch, [read() for read in reading], loaded, wanted, settings, do)
        for batch, reading in ahead(being_read, count)
    )
    with tqdm(total=len(inputs), unit="image", disable=None) as progress:
        for records in ahead(being_drawn, count):
            for record in records:
                yield record()
                progress.update()


def _begun(
    batch: Sequence[tuple[Path, str]],
    prepared: Sequence[Prepared | DiffsalError],
    loaded: LoadedModel,
    wanted: Wanted,
    settings: Settings,
    do: Do,
) -> list[Later]:
    """What waits for each image's record; its maps are there, its files are being written."""
    pairs = zip(batch, prepared, strict=True)
    readable = [(path, stem, one) for (path, stem), one in pairs if isinstance(one, Prepared)]
    write = partial(one_image.write, wanted)
    written = iter([do(write, one) for one in _with_maps(readable, loaded, settings)])
    return [
        next(written) if isinstance(one, Prepared) else partial(failure, path, one)
        for (path, _), one in zip(batch, prepared, strict=True)
    ]


def _with_maps(
    readable: Sequence[tuple[Path, str, Prepared]],
    loaded: LoadedModel,
    settings: Settings,
) -> Iterator[Computed]:
    if not readable:
        return
    maps = _maps(torch.stack([one.tensor for *_, one in readable]), loaded, settings)
    names = class_names(settings.classes, class_count(maps.logits))
    for index, (path, stem, one) in enumerate(readable):
        yield computed(path, stem, one, maps[index], names)


def _maps(inputs: Tensor, loaded: LoadedModel, settings: Settings) -> SalienceMaps:
    dtype = next(loaded.model.parameters()).dtype
    with running(settings.device, inputs.shape[2:], len(inputs)):
        maps = explain(
            loaded.model,
            inputs.to(settings.device, dtype),
            _class_choice(settings.true, settings.classes),
            _class_choice(settings.false, settings.classes),
            target_layers=loaded.target_layer,
            weighting=settings.weighting,
        )
    return maps.to("cpu")


def _manifest(records: list[Record], loaded: LoadedModel, settings: Settings) -> dict[str, Any]:
    return {
        "format": "diffsal-explanations",
        "format_version": 1,
        "diffsal_version": __version__,
        "model": identity(loaded),
        "classes": None if settings.classes is None else list(settings.classes),
        "preprocessing": settings.preprocessing.to_dict(),
        "true": settings.true,
        "false": settings.false,
        "weighting": settings.weighting,
        "device": str(settings.device),
        "explained": sum("error" not in record for record in records),
        "failed": sum("error" in record for record in records),
        "images": records,
    }


def _class_choice(name: str | None, classes: Sequence[str] | None) -> Choice:
    """A class by its name or, where no name is so, by its index."""
    if name is None or name in ("runner-up", "rest"):
        return name
    position = class_position(name, classes or ())
    if position is not None:
        return position
    known = ", ".join(classes) if classes else "unknown (name them with --classes)"
    raise DiffsalError(f"no class is called {name!r}: the model's classes are {known}")


def _stems(images: Sequence[Path], outputs: Outputs) -> list[str]:
    """A name for each image's files, such that no two images share a file."""
    taken: set[str] = set()
    # Or a thousand images of one name would be tried a thousand times each.
    counts: Counter[str] = Counter()
    stems = []
    for image in images:
        own = stem = _fitting(image.stem)
        while not taken.isdisjoint(name.lower() for name in outputs.names(stem)):
            counts[own.lower()] += 1
            stem = f"{own}-{counts[own.lower()] + 1}"
        taken.update(name.lower() for name in outputs.names(stem))
        stems.append(stem)
    return stems


def _fitting(stem: str) -> str:
    """A stem that leaves room for what follows it: file systems take 255 bytes."""
    name = os.fsencode(stem)
    return stem if len(name) <= _LONGEST_STEM else name[:_LONGEST_STEM].decode("utf-8", "ignore")


def _check_free(
    images: Sequence[Path], stems: Sequence[str], outputs: Outputs, folder: Path, overwrite: bool
) -> None:
    files = [folder / MANIFEST, *(folder / n for stem in stems for n in outputs.names(stem))]
    there = [file for file in files if file.exists()]
    if not there:
        return
    sources = {image.resolve() for image in images}
    if any(file.resolve() in sources for file in there):
        raise DiffsalError(f"{folder} holds the images themselves: name another folder with --out")
    if not overwrite:
        raise DiffsalError(
            f"{there[0]} is there already: pass --overwrite, or name another folder with --out"
        )
