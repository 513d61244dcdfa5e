"""Indexes from CSV files and folders, on files written by the tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from diffsal.data.index import Sample, read_index
from diffsal.errors import DiffsalError


def write_index(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "index.csv"
    path.write_text(text, encoding=encoding)
    return path


def test_csv_with_all_columns_in_any_order(folder: Path) -> None:
    text = (
        "label, path ,split,map,group,subset\r\n"
        'real,images/a.png,train,,"p, 1",\r\n'
        "\r\n"
        "attack,images/b.png,test,maps/b.png,p2,print\r\n"
    )
    index = read_index(write_index(folder, text, "utf-8-sig"))
    assert index.classes == ("attack", "real")
    assert index.samples == (
        Sample(folder / "images/a.png", 1, None, "", "p, 1", "train"),
        Sample(folder / "images/b.png", 0, folder / "maps/b.png", "print", "p2", "test"),
    )
    assert index.split("test") == index.samples[1:]


@pytest.mark.parametrize(
    ("labels", "classes", "names", "expected"),
    [
        (("2", "10", "2"), None, ("2", "10"), (0, 1, 0)),  # as numbers, not as text
        (("normal", "defect", "normal"), None, ("defect", "normal"), (1, 0, 1)),
        (("normal", "defect", "normal"), ("normal", "defect"), ("normal", "defect"), (0, 1, 0)),
        (("0", "1", "1"), ("normal", "defect"), ("normal", "defect"), (0, 1, 1)),
        (("1", "1", "1"), ("normal", "defect"), ("normal", "defect"), (1, 1, 1)),
    ],
)
def test_labels_are_names_or_positions(
    folder: Path,
    labels: tuple[str, ...],
    classes: tuple[str, ...] | None,
    names: tuple[str, ...],
    expected: tuple[int, ...],
) -> None:
    rows = [f"images/{stem}.png,{label}" for stem, label in zip("abc", labels, strict=True)]
    index = read_index(write_index(folder, "\n".join(["path,label", *rows])), classes=classes)
    assert index.classes == names
    assert tuple(sample.label for sample in index.samples) == expected


def test_class_folders_with_a_parallel_folder_of_maps(
    write_image: Callable[..., Path], tmp_path: Path
) -> None:
    first = write_image(tmp_path / "images/normal/one.jpg")
    second = write_image(tmp_path / "images/defect/deep/one.png")
    drawn = write_image(tmp_path / "masks/defect/deep/one.bmp")
    index = read_index(tmp_path / "images", maps=tmp_path / "masks")
    assert index.classes == ("defect", "normal")
    assert index.samples == (Sample(second, 0, drawn), Sample(first, 1))


def test_cyborg_csv_with_maps_of_the_same_base_names(folder: Path) -> None:
    (folder / "maps/a.png").unlink()
    path = write_index(folder, "train,live,images/a.png\ntest,spoof,images/b.png\n")
    index = read_index(path, maps=folder / "maps")
    assert index.samples == (
        Sample(folder / "images/a.png", 0, None, split="train"),
        Sample(folder / "images/b.png", 1, folder / "maps/b.png", split="test"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["index.csv", "empty"]),
        ("path,label\n", ["index.csv", "empty"]),
        ("path,class\nimages/a.png,x\n", ["line 1", "'label' is missing"]),
        ("images/a.png,x\nimages/b.png,y\n", ["line 1", "'path' is missing"]),
        ("path,label,grop\nimages/a.png,x,1\n", ["line 1", "'grop'", "group"]),
        ("path,label,label\nimages/a.png,x,x\n", ["line 1", "'label'", "twice"]),
        ("path,label\nimages/a.png,x\n\nimages/b.png\n", ["line 4", "1 fields, not 2"]),
        ("path,label\nimages/a.png,\n", ["line 2", "label is empty"]),
        ("path,label\nimages/a.png,x\nimages/z.png,y\n", ["line 3", "no image", "z.png"]),
        ("path,label,map\nimages/a.png,x,\nimages/b.png,y,z.png\n", ["line 3", "no map", "z.png"]),
        (
            "path,label\nimages/a.png,x\nimages/b.png,y\nimages/../images/a.png,y\n",
            ["line 4", "a.png", "line 2"],
        ),
        ("path,label\nimages/a.png,x\nimages/b.png,x\n", ["one class", "'x'"]),
        (
            "path,label,split\nimages/a.png,x,train\nimages/b.png,y,valid\n",
            ["line 3", "'valid'", "val"],
        ),
        ("path,label,split\nimages/a.png,x,train\nimages/b.png,y,\n", ["line 3", "split"]),
        ('path,label\n"images/a.png,x\n', ["index.csv", "no CSV"]),
    ],
)
def test_bad_csv_is_one_line_that_names_the_place(
    folder: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(DiffsalError) as caught:
        read_index(write_index(folder, text))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("label", ["dog", "2", "-1"])
def test_unknown_class(folder: Path, label: str) -> None:
    path = write_index(folder, f"path,label\nimages/a.png,cat\nimages/b.png,{label}\n")
    with pytest.raises(DiffsalError, match=f"line 3: the class '{label}' is unknown.*cat, bird"):
        read_index(path, classes=("cat", "bird"))


def test_bad_files_and_folders(folder: Path) -> None:
    with pytest.raises(DiffsalError, match=r"nowhere\.csv: No such file"):
        read_index(folder / "nowhere.csv")
    with pytest.raises(DiffsalError, match="UTF-8"):
        read_index(write_index(folder, "path,label\nimages/a.png,é\n", "latin-1"))
    (folder / "empty").mkdir()
    with pytest.raises(DiffsalError, match="empty: the index is empty"):
        read_index(folder / "empty")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "no map here has the name of an image"),
        (["other/a.png"], "no map here has the name of an image"),
        (["a.png", "a.bmp"], "has the same name"),
    ],
)
def test_maps_that_cannot_be_assigned(
    write_image: Callable[..., Path], folder: Path, files: list[str], words: str
) -> None:
    for name in files:
        write_image(folder / "drawn" / name)
    path = write_index(folder, "path,label\nimages/a.png,x\nimages/b.png,y\n")
    with pytest.raises(DiffsalError, match=words):
        read_index(path, maps=folder / "drawn")


def test_maps_of_a_csv_are_not_shared_by_images_of_one_name(
    write_image: Callable[..., Path], folder: Path
) -> None:
    write_image(folder / "more/a.png")
    path = write_index(folder, "path,label\nimages/a.png,x\nmore/a.png,y\n")
    with pytest.raises(DiffsalError, match="line 2: another image is called 'a'"):
        read_index(path, maps=folder / "maps")
    named = write_index(folder, "path,label,map\nimages/a.png,x,maps/a.png\nmore/a.png,y,\n")
    with pytest.raises(DiffsalError, match="names maps itself"):
        read_index(named, maps=folder / "maps")
