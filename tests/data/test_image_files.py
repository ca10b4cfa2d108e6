"""Trees of image files: every kind of image, every fault of one (B43-B50), limits, the memory-mapped cache."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from backdoor_bench.data.decode import Decoder
from backdoor_bench.data.folder import FolderDataset
from backdoor_bench.data.gtsrb import GTSRB
from backdoor_bench.data.image_tree import ImageTree
from backdoor_bench.data.images import MappedImages
from backdoor_bench.errors import ConfigError, DataError, DiskError
from backdoor_bench.types import Dataset

SIZE = 8


def picture(path: Path, value: int | tuple[int, int, int] = 7, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    color = (value,) * 3 if isinstance(value, int) else value
    Image.new("RGB", size, color).save(path)
    return path


def loader(root: Path, **changes: Any) -> FolderDataset:
    base = FolderDataset(
        name="folder",
        num_classes=None,
        image_size=SIZE,
        train_size=None,
        test_size=None,
        mean=[0.5] * 3,
        std=[0.2] * 3,
        limit=None,
        test_limit=None,
        seed=0,
        root=str(root),
        truth=None,
        resize="squash",
        max_pixels=50_000_000,
        on_error="stop",
        memory_limit_gib=4,
        cache_dir=str(root.parent / "cache"),
    )
    return replace(base, **changes)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Classes ant (3 images, one nested) and bee (2); pixel values 10, 11, 12, 20, 21 in order."""
    root = tmp_path / "set"
    for name, value in (
        ("ant/a.png", 10),
        ("ant/b.png", 11),
        ("ant/deep/c.bmp", 12),
        ("bee/a.ppm", 20),
        ("bee/b.gif", 21),
    ):
        picture(root / name, value)
    return root


def levels(images: Any) -> list[int]:
    return images[:][:, 0, 0, 0].tolist()


class Recorder:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.done, self.total, self.warnings = 0, 0, list[str]()

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        self.total = total

        def advance(count: int = 1) -> None:
            self.done += count

        yield advance

    def say(self, message: str) -> None:
        raise AssertionError(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_a_tree_is_all_training_data_in_sorted_order(tree: Path) -> None:
    progress = Recorder()
    data = loader(tree).load(progress)
    assert data.class_names == ("ant", "bee")
    assert data.file_names == ("ant/a.png", "ant/b.png", "ant/deep/c.bmp", "bee/a.ppm", "bee/b.gif")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert levels(data.train.images) == [10, 11, 12, 20, 21]
    assert data.train.num_classes == 2
    assert data.test is None
    assert data.known_poison is None
    assert (progress.done, progress.total, progress.warnings) == (5, 5, [])


@pytest.mark.parametrize("part", ["test", "val"])
def test_train_and_test_folders_are_used(part: str, tmp_path: Path) -> None:
    for name in ("train/b/1.png", "train/a/1.png", "train/a/2.jpg", f"{part}/b/9.png"):
        picture(tmp_path / "set" / name)
    data = loader(tmp_path / "set").load()
    assert data.file_names == ("train/a/1.png", "train/a/2.jpg", "train/b/1.png")
    assert data.test is not None
    assert data.test.labels.tolist() == [1]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train/1.png", "bus/1.png"):
        picture(tmp_path / "set" / name)
    assert loader(tmp_path / "set").load().class_names == ("bus", "train")


def test_a_test_class_unknown_to_training_is_refused(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/c/1.png"):
        picture(tmp_path / "set" / name)
    with pytest.raises(DataError, match="test/c is a class"):
        loader(tmp_path / "set").load()


def test_other_files_are_left_out_and_counted(tree: Path) -> None:
    (tree / "ant/notes.txt").write_text("x")
    (tree / "ant/.hidden.png").write_text("x")
    (tree / ".git").mkdir()
    progress = Recorder()
    assert len(loader(tree).load(progress).train) == 5
    assert len(progress.warnings) == 1
    assert progress.warnings[0].startswith("1 files below")


def test_limits_are_stratified_before_anything_is_decoded(tree: Path) -> None:
    progress = Recorder()
    data = loader(tree, limit=3).load(progress)
    assert data.train.labels.tolist() == [0, 0, 1]
    assert progress.total == 3
    by_name = {"ant/a.png": 10, "ant/b.png": 11, "ant/deep/c.bmp": 12, "bee/a.ppm": 20, "bee/b.gif": 21}
    assert data.file_names is not None
    assert levels(data.train.images) == [by_name[name] for name in data.file_names]
    with pytest.raises(ConfigError, match=r"dataset\.limit=1"):
        loader(tree, limit=1).load()


def test_what_the_configuration_says_is_checked(tree: Path) -> None:
    assert len(loader(tree, num_classes=2, train_size=5).load().train) == 5
    with pytest.raises(DataError, match=r"2 class folders, dataset\.num_classes=3"):
        loader(tree, num_classes=3).load()
    with pytest.raises(DataError, match="train_size=5"):
        loader(tree, train_size=6).load()


def test_trees_without_classes_or_images_are_refused(tmp_path: Path, tree: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        loader(tmp_path / "none").load()
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match="0 class folders"):  # B40
        loader(tmp_path / "flat").load()
    (tree / "cat").mkdir()
    with pytest.raises(DataError, match="set/cat holds no images"):  # B41
        loader(tree).load()
    with pytest.raises(ConfigError, match=r"dataset\.root"):
        replace(loader(tree), root=None).load()


# --- what is known of the files ---------------------------------------------------------------------------------------


def test_truth_is_matched_by_name(tree: Path) -> None:
    (tree / "truth.csv").write_text(
        "file,poisoned,true_label,cover\nant/deep/c.bmp,1,bee,0\nbee/a.ppm,0,,1\nbee/b.gif,true,0,\n"
    )
    data = loader(tree, truth="truth.csv").load()
    assert data.known_poison is not None
    assert data.known_cover is not None
    assert data.true_labels is not None
    assert data.known_poison.tolist() == [False, False, True, False, True]
    assert data.known_cover.tolist() == [False, False, False, True, False]
    assert data.true_labels.tolist() == [0, 0, 1, 1, 0]


def test_truth_follows_the_rows_under_limit_and_skip(tree: Path) -> None:
    (tree / "ant/b.png").write_bytes(b"broken")
    truth = tree.parent / "truth.csv"
    truth.write_text("file,poisoned\n./bee/b.gif,1\nant/b.png,1\n")
    with pytest.warns(UserWarning, match="skipped 1 of 5"):
        data = loader(tree, truth=str(truth), on_error="skip").load()
    assert data.known_poison is not None
    assert data.known_poison.tolist() == [False, False, False, True]
    limited = loader(tree, truth=str(truth), on_error="skip", limit=2, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backdoor_bench.data.decode.warn", lambda *_: None)
        part = limited.load()
    assert part.known_poison is not None
    assert part.file_names is not None
    assert part.known_poison.tolist() == [name == "bee/b.gif" for name in part.file_names]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\nant/a.png,1\n", "columns file and poisoned"),
        ("file,poisoned\nant/zzz.png,1\n", "line 2: 'ant/zzz.png' is not a training image"),
        ("file,poisoned\nant/a.png,1\nant/a.png,0\n", "line 3: 'ant/a.png' is listed twice"),
        ("file,poisoned\nant/a.png,maybe\n", "line 2: poisoned='maybe'"),
        ("file,poisoned,true_label\nant/a.png,1,wasp\n", "true_label='wasp'"),
        ("file,poisoned,true_label\nant/a.png,1,2\n", "true_label='2'"),
        ("file,poisoned,cover\nant/a.png,1,1\n", "both poisoned and cover"),
    ],
)
def test_a_truth_that_cannot_be_right_is_refused(text: str, words: str, tree: Path) -> None:
    (tree / "truth.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        loader(tree, truth="truth.csv").load()


def test_an_absent_truth_is_a_data_error(tree: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.truth"):
        loader(tree, truth="none.csv").load()


# --- kinds of images --------------------------------------------------------------------------------------------------


def one_image(root: Path, image: Image.Image, name: str = "x.png", **options: Any) -> Tensor:
    """The decoded pixels [3, SIZE, SIZE] of one saved image."""
    (root / "set/a").mkdir(parents=True)
    image.save(root / "set/a" / name, **options)
    decoder = Decoder(SIZE, options.pop("resize", "squash"), 10**6, "stop", 1, str(root / "cache"))
    images, kept = decoder.decode(root / "set", [f"a/{name}"])
    assert kept == [0]
    return images[0]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        pytest.param(Image.new("L", (8, 8), 77), (77, 77, 77), id="gray"),
        pytest.param(Image.new("1", (8, 8), 1), (255, 255, 255), id="bilevel"),
        pytest.param(Image.new("RGBA", (8, 8), (200, 0, 100, 255)), (200, 0, 100), id="opaque"),
        pytest.param(Image.new("RGBA", (8, 8), (200, 0, 100, 0)), (255, 255, 255), id="transparent on white"),
        pytest.param(Image.new("LA", (8, 8), (0, 128)), (127, 127, 127), id="half transparent gray"),
        pytest.param(Image.new("P", (8, 8), 1), (4, 5, 6), id="palette"),
        pytest.param(Image.fromarray(np.full((8, 8), 65535, np.uint16)), (255, 255, 255), id="16 bit white"),
        pytest.param(Image.fromarray(np.full((8, 8), 257 * 99, np.uint16)), (99, 99, 99), id="16 bit gray"),
    ],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: tuple[int, int, int], tmp_path: Path) -> None:
    """B43."""
    if image.mode == "P":
        image.putpalette([9, 9, 9, 4, 5, 6])
    assert one_image(tmp_path, image)[:, 4, 4].tolist() == list(expected)


def test_a_palette_with_a_transparent_entry_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.paste(0, (0, 0, 8, 4))
    pixels = one_image(tmp_path, image, transparency=0)
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 7, 7].tolist() == [50, 60, 70]


@pytest.mark.parametrize("suffix", ["png", "JPG", "jpeg", "webp", "bmp", "gif", "ppm", "tif"])
def test_every_format_is_read(suffix: str, tmp_path: Path) -> None:
    pixels = one_image(tmp_path, Image.new("RGB", (16, 16), (200, 100, 50)), f"x.{suffix}")
    assert (pixels[:, 4, 4].int() - torch.tensor([200, 100, 50])).abs().max() <= 3


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    pixels = one_image(tmp_path, image, exif=exif)
    assert pixels[0, 0, 0] == 0
    assert pixels[0, 7, 0] == 255


def test_squash_keeps_everything_and_crop_the_centre(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 8))
    image.paste((255, 255, 255), (12, 0, 20, 8))  # the middle quarter
    for resize, bright in (("squash", 2), ("crop", 8)):
        (tmp_path / resize / "set").mkdir(parents=True)
        image.save(tmp_path / resize / "set/x.png")
        decoder = Decoder(SIZE, resize, 10**6, "stop", 1, str(tmp_path / "cache"))
        images, _ = decoder.decode(tmp_path / resize / "set", ["x.png"])
        row = images[0][0, 4].float() / 255
        assert row.sum().item() == pytest.approx(bright, abs=0.05)


# --- faults -----------------------------------------------------------------------------------------------------------


def png_header(path: Path, width: int, height: int) -> None:
    """A PNG that claims a size and has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(b"")):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content)


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:4000])


def leaving_link(path: Path) -> None:
    picture(path.parents[2] / "outside.png")
    path.symlink_to(path.parents[2] / "outside.png")


def float_nan(path: Path) -> None:
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(path, format="TIFF")


def deep_integers(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(path, format="TIFF")


def pipe(path: Path) -> None:
    os.mkfifo(path)


FAULTS = {
    "B42 NaN pixels": (float_nan, "floating-point pixels, NaN"),
    "B43 32 bit": (deep_integers, "beyond 16 bits"),
    "B44 1 x 1": (lambda path: picture(path, size=(1, 1)), "1 x 1 pixels: too small"),
    "B45 20,000 x 20,000": (lambda path: png_header(path, 20_000, 20_000), "more pixels than dataset.max_pixels"),
    "B46 10,000 x 10,000": (lambda path: png_header(path, 10_000, 10_000), "more than dataset.max_pixels"),
    "B47 truncated": (truncated, "cannot be decoded"),
    "B48 text": (lambda path: path.write_text("hello"), "cannot be decoded"),
    "B50 link out": (leaving_link, "link out of the data folder"),
    "dangling link": (lambda path: path.symlink_to("nothing"), "not a regular file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be decoded"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be decoded"),
    "named pipe": (pipe, "not a regular file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_stops_or_is_skipped_with_a_count(fault: str, tree: Path, recwarn: pytest.WarningsRecorder) -> None:
    make, words = FAULTS[fault]
    make(tree / "ant/bad.png")
    with pytest.raises(DataError, match=words) as caught:
        loader(tree).load()
    assert "ant/bad.png" in str(caught.value)
    assert "dataset.on_error=skip" in str(caught.value)
    progress = Recorder()
    data = loader(tree, on_error="skip").load(progress)
    assert levels(data.train.images) == [10, 11, 12, 20, 21]
    assert data.file_names is not None
    assert "ant/bad.png" not in data.file_names
    assert len(progress.warnings) == 1
    assert progress.warnings[0].startswith("skipped 1 of 6 images that cannot be used (ant/bad.png)")
    listed = Path(progress.warnings[0].rsplit(" ", 1)[1]).read_text()
    assert words in listed
    assert not recwarn.list  # Pillow's own warning about large images adds nothing


def test_the_first_bad_file_in_order_is_named(tree: Path) -> None:
    for name in ("bee/0.png", "ant/z.png"):
        (tree / name).write_text("x")
    with pytest.raises(DataError, match=r"ant/z\.png"):
        loader(tree).load()


def test_a_class_whose_images_are_all_skipped_is_refused(tree: Path) -> None:
    for path in (tree / "bee").iterdir():
        path.write_text("x")
    with pytest.raises(DataError, match="1 of 2 classes have no images"):
        loader(tree, on_error="skip").load(Recorder())


def test_links_inside_the_folder_are_fine_and_linked_folders_are_not(tree: Path) -> None:
    (tree / "ant/again.png").symlink_to(tree / "bee/a.ppm")
    assert levels(loader(tree).load().train.images) == [10, 20, 11, 12, 20, 21]
    (tree / "cat").symlink_to(tree / "bee")
    with pytest.raises(DataError, match="cat is a link to a folder"):
        loader(tree).load()
    (tree / "cat").unlink()
    (tree / "ant/loop").symlink_to(tree)
    with pytest.raises(DataError, match="loop is a link to a folder"):
        loader(tree).load()


def test_names_that_are_no_text_are_refused_readably(tree: Path) -> None:
    picture(tree / "ant/d.png").rename(tree / "ant/\udcff.png")
    with pytest.raises(DataError, match=r"\\udcff\.png has a name that is not plain UTF-8") as caught:
        loader(tree).load()
    str(caught.value).encode()
    for memory in (4, 0):
        assert len(loader(tree, on_error="skip", memory_limit_gib=memory).load(Recorder()).train) == 5


# --- the memory-mapped cache ------------------------------------------------------------------------------------------


def mapped(tree: Path, progress: Recorder | None = None, **changes: Any) -> Dataset:
    return loader(tree, memory_limit_gib=0, **changes).load(progress or Recorder())


def cache_files(tree: Path) -> list[Path]:
    return sorted(path for path in (tree.parent / "cache/decoded").iterdir() if path.suffix != ".lock")


def test_a_large_set_is_decoded_once_and_mapped(tree: Path) -> None:
    first, second = Recorder(), Recorder()
    data = mapped(tree, first)
    assert isinstance(data.train.images, MappedImages)
    assert levels(data.train.images) == [10, 11, 12, 20, 21]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert [path.suffix for path in cache_files(tree)] == [".json", ".npy"]
    again = mapped(tree, second)
    assert levels(again.train.images) == [10, 11, 12, 20, 21]
    assert (first.done, second.done) == (5, 0)


def test_a_changed_file_or_size_is_decoded_again(tree: Path) -> None:
    mapped(tree)
    picture(tree / "ant/b.png", 99, (9, 9))
    assert levels(mapped(tree).train.images) == [10, 99, 12, 20, 21]
    assert mapped(tree, image_size=16).train.images.shape == (5, 3, 16, 16)


@pytest.mark.parametrize("damage", ["flip", "truncate", "no record"])
def test_a_damaged_cache_is_told_and_made_again(damage: str, tree: Path) -> None:
    mapped(tree)
    record, array = cache_files(tree)
    content = bytearray(array.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        array.write_bytes(content)
    elif damage == "truncate":
        array.write_bytes(content[:-50])
    else:
        record.unlink()
    progress = Recorder()
    assert levels(mapped(tree, progress).train.images) == [10, 11, 12, 20, 21]
    assert len(progress.warnings) == 1
    assert "decoding the images again" in progress.warnings[0]
    assert mapped(tree, progress := Recorder()) is not None
    assert not progress.warnings


def test_skipped_files_are_remembered_with_the_cache(tree: Path) -> None:
    (tree / "ant/bad.png").write_text("x")
    for _ in range(2):
        progress = Recorder()
        data = mapped(tree, progress, on_error="skip")
        assert levels(data.train.images) == [10, 11, 12, 20, 21]
        assert progress.warnings[0].startswith("skipped 1 of 6")
    with pytest.raises(DataError, match=r"ant/bad\.png"):
        mapped(tree)


def test_a_killed_decoding_leaves_nothing_that_is_used(tree: Path) -> None:
    folder = tree.parent / "cache/decoded"
    folder.mkdir(parents=True)
    (folder / ".x.npy.999999999.tmp").write_bytes(b"half")
    mapped(tree)
    assert [path.suffix for path in cache_files(tree)] == [".json", ".npy"]


def test_a_full_disk_is_told_before_decoding(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DiskError, match=r"960 bytes .*the disk is full"):
        mapped(tree)
    assert cache_files(tree) == []


def test_the_data_folder_may_go_once_the_set_is_mapped(tree: Path) -> None:
    """F34."""
    data = mapped(tree)
    shutil.rmtree(tree)
    assert levels(data.train.images) == [10, 11, 12, 20, 21]


# --- published trees --------------------------------------------------------------------------------------------------


def image_tree(root: Path, **changes: Any) -> ImageTree:
    base = ImageTree(
        name="tinyimagenet",
        num_classes=2,
        image_size=SIZE,
        train_size=None,
        test_size=None,
        mean=[0.5] * 3,
        std=[0.2] * 3,
        limit=None,
        test_limit=None,
        seed=0,
        root=str(root),
        folders=["tiny-imagenet-200"],
        class_subset="all",
        download=False,
        resize="squash",
        max_pixels=10**6,
        on_error="stop",
        memory_limit_gib=4,
        cache_dir=str(root / "cache"),
    )
    return replace(base, **changes)


def test_tinyimagenet_reads_its_annotations(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for name, value in (
        ("train/n2/images/n2_0.JPEG", 20),
        ("train/n1/images/n1_0.JPEG", 10),
        ("val/images/val_1.JPEG", 40),
    ):
        picture(root / name, value)
    picture(root / "val/images/val_0.JPEG", 30)
    (root / "train/n1/n1_boxes.txt").write_text("n1_0.JPEG\t0\t0\t7\t7\n")
    (root / "val/val_annotations.txt").write_text("val_1.JPEG\tn1\t0\t0\t7\t7\nval_0.JPEG\tn2\t0\t0\t7\t7\n")
    for where in (tmp_path, root):
        data = image_tree(where).load()
        assert data.test is not None
        assert levels(data.train.images) == [10, 20]
        assert levels(data.test.images) == [30, 40]
        assert data.test.labels.tolist() == [1, 0]
        assert data.class_names == ("n1", "n2")
    (root / "val/val_annotations.txt").write_text("val_1.JPEG\tn9\t0\t0\t7\t7\n")
    with pytest.raises(DataError, match="line 1"):
        image_tree(root).load()


def test_imagenet12_takes_the_first_classes_of_a_larger_tree(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"train/n{number}/x.png", number)
        picture(tmp_path / f"val/n{number}/y.png", 100 + number)
    data = image_tree(tmp_path, class_subset="first").load()
    assert data.test is not None
    assert (levels(data.train.images), levels(data.test.images)) == ([0, 1], [100, 101])
    with pytest.raises(DataError, match="4 class folders, tinyimagenet has 2"):
        image_tree(tmp_path).load()


def test_trees_that_are_not_there_or_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder train, nor has tiny-imagenet-200"):
        image_tree(tmp_path).load()
    for number in range(2):
        picture(tmp_path / f"train/n{number}/x.png", number)
    with pytest.raises(DataError, match="neither val nor test"):
        image_tree(tmp_path).load()
    with pytest.raises(ConfigError, match=r"dataset\.download=True"):
        image_tree(tmp_path, download=True)


def gtsrb(root: Path) -> GTSRB:
    return GTSRB(
        *("gtsrb", 2, SIZE, 3, 2, [0.5] * 3, [0.2] * 3, None, None, 0, str(root), False),
        *("squash", 10**6, "stop", 4, str(root / "cache")),
    )


@pytest.mark.parametrize("layout", ["Training", "Final_Training/Images"])
def test_gtsrb_is_read_in_both_layouts(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "gtsrb"
    for name, value in (("00000/a.ppm", 10), ("00001/a.ppm", 20), ("00001/b.ppm", 21)):
        picture(folder / "GTSRB" / layout / name, value, (30, 20))
    (folder / "GTSRB" / layout / "00000/GT-00000.csv").write_text("x")
    for name, value in (("00000.ppm", 30), ("00001.ppm", 31)):
        picture(folder / "GTSRB/Final_Test/Images" / name, value)
    with pytest.raises(DataError, match=r"GT-final_test\.csv"):
        gtsrb(tmp_path).load()
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    (folder / "GT-final_test.csv").write_text(header + "00000.ppm;8;8;0;0;8;8;1\n00001.ppm;8;8;0;0;8;8;0\n")
    for where in (tmp_path, folder):
        data = gtsrb(where).load()
        assert data.test is not None
        assert levels(data.train.images) == [10, 20, 21]
        assert data.train.labels.tolist() == [0, 1, 1]
        assert levels(data.test.images) == [30, 31]
        assert data.test.labels.tolist() == [1, 0]
    (folder / "GT-final_test.csv").write_text(header + "00000.ppm;8;8;0;0;8;8;43\n00001.ppm;8;8;0;0;8;8;0\n")
    with pytest.raises(DataError, match=r"outside 0\.\.1"):  # B37
        gtsrb(tmp_path).load()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"resize": "stretch"}, "resize"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"on_error": "ignore"}, "on_error"),
        ({"memory_limit_gib": -1}, "memory_limit_gib"),
        ({"image_size": "32"}, "image_size"),
    ],
)
def test_bad_values_name_their_key(values: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"dataset.{key}"):
        loader(tmp_path, **values)
