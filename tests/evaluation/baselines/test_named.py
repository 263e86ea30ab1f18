import pytest

from llmrec.evaluation.baselines import EASE
from llmrec.evaluation.baselines.named import BASELINES
from llmrec.exceptions import DataError


def test_parameters_have_the_types_of_their_baseline():
    assert BASELINES["ease"].types() == {
        "regularisation": float,
        "decay": float,
        "train_decay": float,
        "max_items": int,
    }
    assert BASELINES["text-knn"].types() == {"decay": float, "max_history": int}
    assert BASELINES["popularity"].types() == {}
    parsed = BASELINES["ease"].parsed(["regularisation=5", " max_items = 7 "])
    assert parsed == {"regularisation": 5.0, "max_items": 7}
    assert EASE(**parsed).max_items == 7


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("ease", ["lambda=5"], "'lambda=5' gives no parameter .*regularisation, decay, train_decay, max_items"),
        ("ease", ["max_items"], "'max_items' gives no parameter"),
        ("ease", ["max_items=1", "max_items=2"], "or one again"),
        ("ease", ["max_items=1.5"], r"'1\.5' is no int"),
        ("text-knn", ["embeddings=3"], "gives no parameter"),
        ("popularity", ["half_life_days=3"], "It has none"),
    ],
)
def test_parameters_that_are_none_are_refused(name, given, message):
    with pytest.raises(DataError, match=message):
        BASELINES[name].parsed(given)


def test_given_parameters_leave_the_rest_of_the_grid():
    assert BASELINES["item-cf"].narrowed({"window": 7, "max_train": 9}) == [
        {"backward": [0.7, 0.3, 1.0], "decay": [0.8, 0.6, 0.4]}
    ]
    # Of two alternatives, the part that knows the given one.
    assert BASELINES["popularity-recent"].narrowed({"last_share": 0.3}) == [{}]
    assert [sorted(part) for part in BASELINES["markov"].narrowed({"max_history": 3})] == [
        ["decay", "order", "smoothing"]
    ]
    assert [len(part) for part in BASELINES["markov"].narrowed({"order": 2})] == [0, 3]


@pytest.mark.parametrize(("name", "text"), [("item-cf", "backward=nan"), ("popularity-recent", "half_life_days=inf")])
def test_numbers_that_are_not_finite_are_refused(name, text):
    with pytest.raises(DataError, match=f"'{text}': .* is no finite number"):
        BASELINES[name].parsed([text])
