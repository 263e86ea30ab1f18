"""Which layers a student keeps, by hand and by what must hold of all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.distillation.kept_layers import even_layers, kept_layers, supervision_points
from llmrec.exceptions import RecipeError


@pytest.mark.parametrize(
    ("spec", "teacher", "student", "kept"),
    [
        ("even", 8, 4, [0, 2, 5, 7]),
        ("even", 28, 14, [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]),
        ("even", 5, 3, [0, 2, 4]),
        ("even", 4, 2, [0, 3]),
        ("even", 6, 1, [0]),
        ("first", 6, 2, [0, 1]),
        ("first", 6, 6, [0, 1, 2, 3, 4, 5]),
        (" 1, 3 ,4", 6, None, [1, 3, 4]),
        ("1,3", 6, 2, [1, 3]),
        ("none", 4, 2, None),
        ("none", 4, 9, None),  # random layers may be more than the teacher's
    ],
)
def test_layers_by_hand(spec, teacher, student, kept):
    assert kept_layers(spec, teacher, student) == kept


@given(total=st.integers(1, 60), data=st.data())
def test_even_layers_are_spread_over_the_whole_stack(total, data):
    count = data.draw(st.integers(1, total))
    kept = even_layers(total, count)
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    if count > 1:
        assert kept[-1] == total - 1
        for place, layer in enumerate(kept):
            assert abs(layer - place * (total - 1) / (count - 1)) <= 0.5


@pytest.mark.parametrize(
    ("spec", "student", "said"),
    [
        ("even", None, "Give --num_hidden_layers"),
        ("even", 7, "1 to 6"),
        ("first", 0, "1 to 6"),
        ("3,1", None, "ascending"),
        ("1,1", None, "each once"),
        ("0,6", None, "0 to 5"),
        ("0,2", 3, "Say one of the two"),
        ("last", 2, "even, first, none"),
    ],
)
def test_what_cannot_be_kept_is_refused(spec, student, said):
    with pytest.raises(RecipeError, match=said):
        kept_layers(spec, 6, student)


def test_supervision_points_by_hand():
    assert supervision_points(8, 4, 4) == [(2, 1), (4, 2), (6, 3), (8, 4)]
    assert supervision_points(28, 14, 4) == [(7, 4), (14, 7), (21, 11), (28, 14)]
    assert supervision_points(6, 2, 2) == [(3, 1), (6, 2)]
    assert supervision_points(7, 5, 3) == [(3, 2), (5, 4), (7, 5)]  # thirds, rounded up
    assert supervision_points(3, 3, 1) == [(3, 3)]
    with pytest.raises(RecipeError, match="1 to 4"):
        supervision_points(8, 4, 5)


@given(teacher=st.integers(1, 40), student=st.integers(1, 40), data=st.data())
def test_points_ascend_to_both_ends(teacher, student, data):
    points = supervision_points(teacher, student, data.draw(st.integers(1, min(teacher, student))))
    for side, total in ((0, teacher), (1, student)):
        counts = [point[side] for point in points]
        assert counts == sorted(set(counts))
        assert counts[0] >= 1
        assert counts[-1] == total
