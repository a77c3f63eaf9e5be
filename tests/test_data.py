import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from archscan import data
from archscan.data import calibration_images, evaluation_images
from archscan.errors import BadInput
from archscan.sources import Preprocessing

RGB = Preprocessing((8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
GRAY = Preprocessing((8, 8), (0.1,), (0.3,))


def png(color, size=(8, 8), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def image_files(classes=("cat", "dog", "eel"), per_class=4):
    return {f"{name}/{i}.png": png((40 * c, 10 * i, 7)) for c, name in enumerate(classes) for i in range(per_class)}


def make_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def all_of(images):
    parts = list(images.batches())
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def test_folder_and_zip_give_the_same_images(tmp_path):
    files = image_files()
    folder, archive = make_folder(tmp_path / "images", files), make_zip(tmp_path / "images.zip", files)
    from_folder, from_zip = (evaluation_images(spec, RGB, batch_size=5) for spec in (folder, archive))
    assert (from_folder.kind, from_zip.kind) == ("folder", "zip")
    assert from_folder.classes == from_zip.classes == ("cat", "dog", "eel")
    for a, b in zip(all_of(from_folder), all_of(from_zip), strict=True):
        assert torch.equal(a, b)
    assert [len(part[1]) for part in from_zip.batches()] == [5, 5, 2]


def test_batches_are_scaled_and_normalised(tmp_path):
    images = evaluation_images(make_folder(tmp_path, {"a/0.png": png((255, 0, 51))}), RGB)
    x, y = next(images.batches())
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    expected = [(1 - 0.4) / 0.2, (0 - 0.5) / 0.25, (0.2 - 0.6) / 0.3]
    assert torch.allclose(x, torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 8, 8), atol=1e-6)


def test_images_of_the_models_size_are_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a/0.png")
    cropping = Preprocessing((8, 8), RGB.mean, RGB.std, "bicubic", crop_pct=0.5)
    assert np.array_equal(evaluation_images(tmp_path, cropping).pixels_NCHW[0].transpose(1, 2, 0), pixels)


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_other_images_are_resized_and_cropped_as_torchvision_does(tmp_path, size):
    from torchvision.transforms import functional as tv

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a/0.png")
    wanted = Preprocessing(size, RGB.mean, RGB.std, "bilinear", crop_pct=0.8)
    got = evaluation_images(tmp_path, wanted).pixels_NCHW[0]
    assert got.shape == (3, *size)
    if size == (8, 8):  # the short side becomes 8 / 0.8 = 10 pixels
        expected = np.asarray(tv.center_crop(tv.resize(Image.fromarray(pixels), 10), [8, 8]))
        assert np.array_equal(got.transpose(1, 2, 0), expected)


def test_gray_and_palette_images_serve_either_kind_of_model(tmp_path):
    make_folder(tmp_path, {"a/gray.png": png(51, mode="L"), "a/palette.png": png(3, mode="P")})
    assert evaluation_images(tmp_path, RGB).pixels_NCHW.shape == (2, 3, 8, 8)
    assert evaluation_images(tmp_path, GRAY).pixels_NCHW.shape == (2, 1, 8, 8)


def test_calibration_images_are_balanced_and_depend_on_the_seed_only(tmp_path):
    archive = make_zip(tmp_path / "images.zip", image_files(per_class=10))
    first, again, other = (calibration_images(archive, RGB, samples=12, seed=seed) for seed in (0, 0, 1))
    assert torch.bincount(first.labels_N).tolist() == [4, 4, 4]
    assert np.array_equal(first.pixels_NCHW, again.pixels_NCHW)
    assert not np.array_equal(first.pixels_NCHW, other.pixels_NCHW)
    assert len(calibration_images(archive, RGB, samples=1000)) == 30


def test_few_samples_come_from_any_classes():
    drawn = [set(calibration_images("digits", GRAY, samples=2, seed=seed).labels_N.tolist()) for seed in range(8)]
    assert all(len(classes) == 2 for classes in drawn)
    assert len(set.union(*drawn)) > 4


def test_every_pass_yields_the_same(tmp_path):
    images = calibration_images(make_folder(tmp_path, image_files()), RGB, samples=7, batch_size=3)
    for a, b in zip(all_of(images), all_of(images), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 2**32 - 1), st.data())
def test_order_is_a_permutation_balanced_from_the_start(labels, seed, draw):
    order = data._balanced_order(labels, 5, seed)
    assert sorted(order) == list(range(len(labels)))
    length = draw.draw(st.integers(1, len(labels)))
    taken = np.bincount([labels[i] for i in order[:length]], minlength=5)
    there = np.bincount(labels, minlength=5)
    for a in range(5):
        for b in range(5):  # a class is behind by two or more only where it has run out
            assert taken[a] >= taken[b] - 1 or taken[a] == there[a]


@pytest.mark.parametrize("make", [make_folder, make_zip])
def test_unreadable_images_are_counted_named_and_replaced(tmp_path, make):
    files = image_files(per_class=5)
    files["cat/0.png"] = b"not an image"
    files["dog/1.png"] = files["dog/1.png"][:45]
    files["eel/2.jpg"] = b""
    images = calibration_images(make(tmp_path / "images", files), RGB, samples=100)
    assert sorted(images.skipped) == ["cat/0.png", "dog/1.png", "eel/2.jpg"]
    assert (len(images), images.available) == (13, 16)
    assert images.to_json()["skipped"] == 3
    assert len(calibration_images(make(tmp_path / "again", files), RGB, samples=12)) == 12


def test_zip_members_that_are_damaged_encrypted_or_huge_are_skipped(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "images.zip", image_files())
    content = bytearray(path.read_bytes())
    first = content.index(b"IDAT")
    content[first + 6] ^= 0xFF  # the checksum of cat/0.png no longer fits
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    content[entry + 8] |= 1  # cat/1.png now claims to be encrypted
    path.write_bytes(bytes(content))
    assert evaluation_images(path, RGB).skipped == ("cat/0.png", "cat/1.png")
    monkeypatch.setattr(data, "_LARGEST_FILE_BYTES", 10)
    with pytest.raises(BadInput, match="none of the 12 images"):
        evaluation_images(path, RGB)


def test_images_with_absurd_sizes_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    files = {"a/0.png": png(0), "a/1.png": png(0, size=(20, 20))}
    assert evaluation_images(make_folder(tmp_path, files), RGB).skipped == ("a/1.png",)


def test_paths_in_a_zip_are_names_only(tmp_path):
    files = {"../../evil/0.png": png(1), "../../good/0.png": png(2), "../../good/1.png": png(2)}
    images = evaluation_images(make_zip(tmp_path / "images.zip", files), RGB)
    assert images.classes == ("evil", "good")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.zip"]


def test_nested_top_folder_hidden_files_and_other_files_do_not_matter(tmp_path):
    files = {f"top/inner/{name}": content for name, content in image_files().items()}
    files |= {"__MACOSX/cat/._0.png": b"", "top/.hidden/0.png": b"", "top/inner/readme.txt": b"text", "labels.csv": b""}
    images = evaluation_images(make_zip(tmp_path / "images.zip", files), RGB)
    assert (images.classes, len(images), images.skipped) == (("cat", "dog", "eel"), 12, ())


def test_labels_fit_only_where_the_class_counts_are_equal(tmp_path):
    images = evaluation_images(make_folder(tmp_path, image_files()), RGB)
    assert images.labels_fit(3)
    assert not images.labels_fit(1000)


def test_digits_are_split_into_two_parts_without_overlap():
    from sklearn.datasets import load_digits

    everything = load_digits()
    calibration = calibration_images("digits", GRAY, samples=5000)
    evaluation = evaluation_images("digits", GRAY)
    assert (len(calibration), len(evaluation)) == (1297, 500)
    assert evaluation.labels_N.tolist() == everything.target[1297:].tolist()
    pixels = np.round(everything.images * (255 / 16)).astype(np.uint8)
    assert np.array_equal(evaluation.pixels_NCHW[:, 0], pixels[1297:])
    assert calibration.labels_fit(10)


def test_digits_are_resized_whole_and_copied_to_all_channels():
    images = calibration_images("digits", Preprocessing((20, 30), RGB.mean, RGB.std, crop_pct=0.5), samples=3)
    assert images.pixels_NCHW.shape == (3, 3, 20, 30)
    assert np.array_equal(images.pixels_NCHW[:, 0], images.pixels_NCHW[:, 2])
    whole = calibration_images("digits", Preprocessing((20, 30), RGB.mean, RGB.std, crop_pct=1.0), samples=3)
    assert np.array_equal(images.pixels_NCHW, whole.pixels_NCHW)


def test_synthetic_images_are_seeded_noise_with_the_models_statistics():
    first, again, other = (calibration_images("synthetic", RGB, samples=64, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.pixels_NCHW, again.pixels_NCHW)
    assert not np.array_equal(first.pixels_NCHW, other.pixels_NCHW)
    x, _ = all_of(first)
    assert x.mean().abs() < 0.05
    assert 0.9 < x.std() < 1.05
    assert first.is_synthetic
    assert not first.labels_fit(1)


def test_synthetic_images_have_any_number_of_channels_but_files_do_not():
    five = Preprocessing((8, 8), (0.5,) * 5, (0.5,) * 5)
    assert calibration_images("synthetic", five, samples=2).pixels_NCHW.shape == (2, 5, 8, 8)
    with pytest.raises(BadInput, match="5 channels"):
        calibration_images("digits", five, samples=2)


def test_progress_ends_at_the_number_of_images(tmp_path):
    seen = []
    calibration_images(
        make_folder(tmp_path, image_files()), RGB, samples=5, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 5) for i in range(1, 6)]


def test_a_set_too_large_for_memory_is_the_same(tmp_path, monkeypatch):
    folder = make_folder(tmp_path, image_files())
    in_memory = evaluation_images(folder, RGB)
    monkeypatch.setattr(data, "_MEMORY_BYTES", 100)
    on_disk = evaluation_images(folder, RGB)
    assert isinstance(on_disk.pixels_NCHW, np.memmap)
    for a, b in zip(all_of(in_memory), all_of(on_disk), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(BadInput, match="pass fewer"):
        evaluation_images(folder, RGB)


def empty_folder(path):
    (path / "empty").mkdir()
    return path / "empty"


def corrupt_images(path):
    return make_folder(path, {"a/0.png": b"x", "a/1.jpg": b"y", "b/2.png": b""})


def corrupt_zip(path):
    (path / "images.zip").write_bytes(make_zip(path / "sound.zip", image_files()).read_bytes()[:500])
    return path / "images.zip"


def text_file(path):
    (path / "images.txt").write_text("hello")
    return path / "images.txt"


BAD_DATA = {
    "missing": (lambda path: path / "nothing", "there is no folder or zip"),
    "empty": (empty_folder, "holds no images"),
    "empty zip": (lambda path: make_zip(path / "images.zip", {}), "holds no images"),
    "no images": (lambda path: make_folder(path, {"a/readme.md": b""}), "holds no images"),
    "corrupt images": (corrupt_images, "none of the 3 images"),
    "corrupt zip": (corrupt_zip, "cannot be read as a zip"),
    "no zip": (text_file, "cannot be read as a zip"),
    "no class folders": (lambda path: make_folder(path, {"0.png": png(0), "a/1.png": png(0)}), "outside class folders"),
    "splits": (
        lambda path: make_folder(path, {"train/a/0.png": png(0), "val/a/0.png": png(0)}),
        "splits \\(train, val\\)",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_in_one_sentence(tmp_path, case):
    make, message = BAD_DATA[case]
    spec = make(tmp_path)
    for read in (lambda: calibration_images(spec, RGB, samples=4), lambda: evaluation_images(spec, RGB)):
        with pytest.raises(BadInput, match=message) as refusal:
            read()
        assert "\n" not in str(refusal.value)


def test_synthetic_evaluation_and_senseless_counts_are_refused():
    with pytest.raises(BadInput, match="no labels"):
        evaluation_images("synthetic", RGB)
    with pytest.raises(BadInput, match="at least 1"):
        calibration_images("synthetic", RGB, samples=0)
    with pytest.raises(BadInput, match="at least 1"):
        calibration_images("synthetic", RGB, samples=1, batch_size=0)
