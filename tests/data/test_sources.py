"""Where data are looked for, what is read, and what is said when something is wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest

from vicinal.data import SOURCES, DataMissing, Digits, FashionMnist, ImageFolders, Shards
from vicinal.data.folders import FolderDataset
from vicinal.data.idx import read_idx
from vicinal.data.picture import pillow, read_picture
from vicinal.data.shards import index_of, write_shards
from vicinal.data.sources import FASHION_SYSTEM, FASHION_VARIABLE

pytest.importorskip("PIL")


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def fashion(folder, packed=True):
    """A folder like Debian's, with few images."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for stem, count in (("train", 20), ("t10k", 7)):
        for kind, array in (
            ("images-idx3", random.integers(0, 256, (count, 28, 28), np.uint8)),
            ("labels-idx1", random.integers(0, 10, count, np.uint8)),
        ):
            name = folder / f"{stem}-{kind}-ubyte"
            if packed:
                name.with_name(name.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                name.write_bytes(idx(array))
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_reads_the_files_as_they_are(packed, tmp_path):
    folder = fashion(tmp_path / "there", packed)
    pictures = FashionMnist(str(folder)).open("test")
    end = ".gz" if packed else ""
    expected = read_idx(folder / f"t10k-images-idx3-ubyte{end}")
    assert len(pictures) == 7
    image, label = pictures.read(3)
    assert image.shape == (28, 28, 1)
    assert np.array_equal(image[..., 0], expected[3])
    assert label == read_idx(folder / f"t10k-labels-idx1-ubyte{end}")[3]


def test_fashion_mnist_prefers_what_it_is_told(tmp_path, monkeypatch):
    told, named = fashion(tmp_path / "told"), fashion(tmp_path / "named")
    monkeypatch.setenv(FASHION_VARIABLE, str(named))
    assert [look.place for look in FashionMnist(str(told)).look()] == [str(told), str(named), str(FASHION_SYSTEM)]
    assert FashionMnist().look()[0].place == str(named)
    monkeypatch.delenv(FASHION_VARIABLE)
    assert [look.place for look in FashionMnist().look()] == [str(FASHION_SYSTEM)]


def test_fashion_mnist_says_what_is_missing_and_what_to_do(tmp_path, monkeypatch):
    fashion(FASHION := tmp_path / "system")
    monkeypatch.setattr("vicinal.data.sources.FASHION_SYSTEM", FASHION)
    monkeypatch.setenv(FASHION_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(DataMissing, match=r"nowhere \(\$VICINAL_FASHION_MNIST\): there is no such folder.*dpkg -x"):
        FashionMnist().open("train")  # not silently from the system's folder
    half = fashion(tmp_path / "half")
    (half / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataMissing, match="missing: train-labels-idx1-ubyte"):
        FashionMnist(str(half)).open("train")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content[:40], "is damaged"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-3]), r"should hold \(20, 28, 28\) bytes"),
        (lambda content: gzip.compress(b"hello"), "no idx file"),
    ],
)
def test_damaged_idx_files_are_named(spoil, words, tmp_path):
    folder = fashion(tmp_path / "there")
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DataMissing, match=words) as caught:
        FashionMnist(str(folder)).open("train")
    assert file.name in str(caught.value)


def test_fashion_mnist_is_the_published_one():
    if not FashionMnist().look()[0].found:
        pytest.skip("Fashion-MNIST is not here: " + FashionMnist().advice())
    train, test = FashionMnist().open("train"), FashionMnist().open("test")
    assert (len(train), len(test)) == (60000, 10000)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    pixels = train.images / 255
    assert pixels.mean() == pytest.approx(train.info.mean[0], abs=1e-4)
    assert pixels.std() == pytest.approx(train.info.std[0], abs=1e-4)


def test_digits_are_split_without_overlap():
    pytest.importorskip("sklearn")
    train, test = Digits().open("train"), Digits().open("test")
    assert len(train) + len(test) == 1797
    ours = {hashlib.sha256(train.images[index].tobytes()).digest() for index in range(len(train))}
    assert sum(hashlib.sha256(image.tobytes()).digest() in ours for image in test.images) < 3  # two digits look alike
    pixels = train.images / 255
    assert (pixels.mean(), pixels.std()) == pytest.approx((train.info.mean[0], train.info.std[0]), abs=1e-3)


def save(path, mode="RGB", size=(9, 6), color=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow().new(mode, size, color if color is not None else 0).save(path)
    return path


def folders(base):
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            for picture in range(3):
                save(base / split / name / f"{picture}.png", color=(number * 100, picture, 7))
    return base


def test_image_folders_give_pictures_by_class(tmp_path):
    pictures = ImageFolders(str(folders(tmp_path))).open("train")
    assert pictures.info.classes == ("cat", "dog")
    assert [pictures.read(index)[1] for index in range(6)] == [0, 0, 0, 1, 1, 1]
    assert pictures.read(4)[0][0, 0].tolist() == [100, 1, 7]
    assert all(look.found for look in ImageFolders(str(tmp_path)).look())


def test_image_folders_take_val_for_test(tmp_path):
    folders(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(ImageFolders(str(tmp_path)).open("test")) == 6


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(DataMissing, match="there is no folder"):
        ImageFolders(str(tmp_path / "nowhere")).open("train")
    folders(tmp_path)
    (tmp_path / "train" / "bird").mkdir()
    with pytest.raises(DataMissing, match="bird holds no picture"):
        ImageFolders(str(tmp_path)).open("train")
    save(tmp_path / "train" / "bird" / "1.png")
    with pytest.raises(DataMissing, match="other classes than the training split: bird"):
        ImageFolders(str(tmp_path)).open("test")
    with pytest.raises(DataMissing, match="holds no class folders"):
        FolderDataset(tmp_path / "train" / "bird")


@pytest.mark.parametrize("spoil", [lambda content: content[:60], lambda content: b"", lambda content: b"no picture"])
def test_a_corrupt_picture_is_named(spoil, tmp_path):
    file = save(tmp_path / "a.png", size=(40, 40))
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(DataMissing, match=r"a\.png cannot be read as a picture .* repair or remove it"):
        read_picture(file, 3)
    with pytest.raises(DataMissing, match="there is no picture"):
        read_picture(tmp_path / "b.png", 3)


@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("L", 128, (128, 128, 128)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", (50, 255), (50, 50, 50)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
        ("P", 0, (0, 0, 0)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_pictures_of_every_mode_become_color(mode, color, rgb, tmp_path):
    file = save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode, color=color)
    image = read_picture(file, 3)
    assert image.shape == (6, 9, 3)
    assert image[2, 3].tolist() == list(rgb)
    assert read_picture(file, 1).shape == (6, 9, 1)


def shards(base, per_shard=4):
    digits = Digits().open("train")
    for split, numbers in (("train", range(22)), ("test", range(22, 31))):
        write_shards((digits.read(number) for number in numbers), base / split, per_shard)
    (base / "classes.txt").write_text("\n".join(str(digit) for digit in range(10)) + "\n")
    return base


def test_shards_hold_what_was_written(tmp_path):
    pytest.importorskip("sklearn")
    digits, pictures = Digits().open("train"), Shards(str(shards(tmp_path)), channels=1).open("train")
    assert len(pictures) == 22
    for index in range(22):
        image, label = pictures.read(index)
        assert np.array_equal(image, digits.read(index)[0])
        assert label == digits.read(index)[1]


def test_shards_are_read_a_window_at_a_time(tmp_path):
    pytest.importorskip("sklearn")
    pictures = Shards(str(shards(tmp_path)), channels=1, window=2).open("train")
    order = pictures.order(np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(22))
    of = [pictures.places[index].shard for index in order]
    windows = [set(of[:8]), set(of[8:16])] if 5 not in of[:16] else None
    if windows is not None:
        assert all(len(window) == 2 for window in windows)
    assert len(set(of[:6])) <= 2
    assert order.tolist() != pictures.order(np.random.default_rng(1)).tolist()


def test_the_index_of_a_shard_is_kept_and_made_again_when_it_changes(tmp_path):
    pytest.importorskip("sklearn")
    path = sorted((shards(tmp_path) / "train").glob("*.tar"))[0]
    first = index_of(path, 0)
    cache = path.with_suffix(".index.json")
    assert cache.is_file()
    cache.write_text(cache.read_text()[:30])  # as a full disk leaves it
    assert index_of(path, 0) == first
    digits = Digits().open("train")
    write_shards([digits.read(number) for number in range(2)], path.parent / "other", 9)
    (path.parent / "other" / "shard-00000.tar").replace(path)
    assert len(index_of(path, 0)) == 2


def test_damaged_shards_are_named(tmp_path):
    pytest.importorskip("sklearn")
    base = shards(tmp_path)
    path = sorted((base / "train").glob("*.tar"))[0]
    path.write_bytes(b"no archive" * 100)
    with pytest.raises(DataMissing, match=r"shard-00000\.tar cannot be read as a shard"):
        Shards(str(base), 1).open("train")
    (base / "classes.txt").unlink()
    with pytest.raises(DataMissing, match=r"classes\.txt: no such file"):
        Shards(str(base), 1).open("train")
    (base / "classes.txt").write_text("0\n1\n")
    with pytest.raises(DataMissing, match="there are 2 classes"):
        Shards(str(base), 1).open("test")


def test_a_shard_that_is_gone_or_has_odd_labels_is_named(tmp_path):
    pytest.importorskip("sklearn")
    pictures = Shards(str(shards(tmp_path)), 1).open("train")
    pictures.shards[pictures.places[0].shard].unlink()
    with pytest.raises(DataMissing, match=r"shard-00000\.tar cannot be read \(No such file"):
        pictures.read(0)
    odd = tmp_path / "odd.tar"
    with tarfile.open(odd, "w") as archive:
        for name, content in (("1.png", b"?"), ("1.json", b'{"label": null}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(DataMissing, match=r"odd\.tar cannot be read as a shard"):
        index_of(odd, 0)


def test_every_source_says_where_it_looks_and_what_to_do():
    for source in SOURCES.values():
        assert source.look()
        assert source.advice()
