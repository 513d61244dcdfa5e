"""From samples to tensors, decoded once or every time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from diffsal.data import datasets
from diffsal.data.datasets import DecodedImages, ImageDataset, Pixels, decode
from diffsal.data.images import read_image
from diffsal.data.index import Sample
from diffsal.data.preprocessing import Preprocessing
from diffsal.errors import DiffsalError

PLAIN = Preprocessing(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))


def marked_sample(folder: Path, size: tuple[int, int], map_size: tuple[int, int]) -> Sample:
    """An image whose red channel is its human map: a bright upper left corner."""

    def corner(height: int, width: int) -> Image.Image:
        pixels = np.zeros((height, width), np.uint8)
        pixels[: height // 2, : width // 2] = 200
        return Image.fromarray(pixels)

    red, black = corner(*size), Image.new("L", size[::-1])
    Image.merge("RGB", (red, black, black)).save(folder / "image.png")
    corner(*map_size).save(folder / "map.png")
    return Sample(folder / "image.png", 1, folder / "map.png")


def test_items_are_what_preprocessing_makes(folder: Path) -> None:
    preprocessing = Preprocessing(size=(16, 8), resize="crop")
    sample = Sample(folder / "images/a.png", 1)
    image, label, human_map, position = ImageDataset([sample, sample], preprocessing)[1]
    assert torch.equal(image, preprocessing(read_image(sample.path)))
    assert type(image) is type(human_map) is torch.Tensor
    assert (label, position) == (1, 1)
    assert human_map.shape == (16, 8)
    assert human_map.dtype == torch.float32
    assert human_map.isnan().all()


@pytest.mark.parametrize("resize", ["squash", "crop"])
@pytest.mark.parametrize("map_size", [(32, 48), (16, 24)])
@pytest.mark.parametrize(
    "augment",
    [
        None,
        v2.RandomHorizontalFlip(1),
        v2.Compose([v2.RandomVerticalFlip(), v2.RandomCrop(6), v2.RandomHorizontalFlip()]),
        v2.RandomAffine(0, translate=(0.4, 0.4)),
    ],
)
def test_the_map_moves_with_the_image(
    tmp_path: Path, resize: str, map_size: tuple[int, int], augment: Callable[..., object] | None
) -> None:
    preprocessing = Preprocessing((8, 8), resize, PLAIN.mean, PLAIN.std)  # type: ignore[arg-type]
    dataset = ImageDataset([marked_sample(tmp_path, (32, 48), map_size)], preprocessing, augment)
    for seed in range(5):
        image, _, human_map, _ = dataset[0, seed]
        assert human_map.max() > 0.5
        # Of another size, the map is interpolated twice, which blurs its edges.
        torch.testing.assert_close(
            image[0], human_map, atol=0.01 if map_size[0] == 32 else 0.2, rtol=0
        )


def test_augmentation_follows_from_the_seed_alone(folder: Path) -> None:
    samples = [Sample(folder / "images/a.png", 0), Sample(folder / "images/b.png", 1)]
    dataset = ImageDataset(samples, PLAIN, v2.RandomAffine(0, translate=(0.4, 0.4)))
    before = torch.get_rng_state()
    images = [dataset[0, seed][0] for seed in (7, 7, 8)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert dataset[0, 7][2].isnan().all()  # no corner of a missing map is filled in
    loader = DataLoader(dataset, batch_sampler=[[(0, 7), (1, 3)]], num_workers=1)
    assert torch.equal(next(iter(loader))[0][0], images[0])


def test_decoded_images_are_the_same_without_decoding(
    write_image: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        Sample(folder / "images/a.png", 0),
        Sample(folder / "images/b.png", 1, folder / "maps/b.png"),
        Sample(folder / "images/c.png", 1, folder / "maps/b.png"),
    ]
    plain = list(map(ImageDataset(samples, PLAIN).__getitem__, range(3)))

    def count(*args: object) -> Pixels:
        decoded.append(args)
        return decode(*args)  # type: ignore[arg-type]

    decoded: list[object] = []
    monkeypatch.setattr(datasets, "decode", count)
    for expected in (3, 3):
        read = DecodedImages(samples, PLAIN, folder / "cache")
        shuffled = ImageDataset(samples[::-1], PLAIN, read=read)
        batch = next(iter(DataLoader(shuffled, batch_size=3, num_workers=1)))
        for row, (image, label, human_map, _) in enumerate(plain[::-1]):
            assert torch.equal(batch[0][row], image)
            assert batch[1][row] == label
            torch.testing.assert_close(batch[2][row], human_map, equal_nan=True, rtol=0, atol=0)
        assert len(decoded) == expected

    write_image(folder / "images/a.png", (20, 20))
    fresh = ImageDataset(samples, PLAIN, read=DecodedImages(samples, PLAIN, folder / "cache"))
    assert len(decoded) == 6
    assert torch.equal(fresh[0][0], PLAIN(read_image(folder / "images/a.png")))


def test_a_failed_decoding_leaves_no_files(folder: Path) -> None:
    (folder / "images/c.png").write_bytes(b"no image")
    samples = [Sample(folder / f"images/{stem}.png", 0) for stem in "abc"]
    with pytest.raises(DiffsalError, match=r"c\.png"):
        DecodedImages(samples, PLAIN, folder / "cache")
    assert not list((folder / "cache").iterdir())
