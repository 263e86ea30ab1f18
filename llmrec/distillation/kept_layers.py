"""Which layers of a teacher a student keeps, and behind which layers the two are compared."""

import re

from llmrec.exceptions import RecipeError


def kept_layers(spec: str, teacher_layers: int, student_layers: int | None = None) -> list[int] | None:
    """The layers of a teacher, ascending from 0, that a student begins with; None: it begins with random ones.

    Args:
        spec: "even": spread evenly, the first and the last among them; "first": the first ones; "none": random
            weights; or a list such as "0,2,5".
        teacher_layers: M.
        student_layers: N, which a list says by itself.

    Raises:
        RecipeError: if the list names layers that are not there, repeats them or is not ascending, N is not from 1 to
            M, or the two say different numbers.

    >>> kept_layers("even", 8, 4), kept_layers("first", 8, 3), kept_layers("0,3,7", 8)
    ([0, 2, 5, 7], [0, 1, 2], [0, 3, 7])
    """
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", spec):
        chosen = [int(word) for word in spec.split(",")]
        if chosen != sorted(set(chosen)) or chosen[-1] >= teacher_layers:
            raise RecipeError(
                f"--keep_layers is {spec!r}, and the teacher's layers are 0 to {teacher_layers - 1}. Name some of "
                "them, ascending and each once."
            )
        if student_layers is not None and student_layers != len(chosen):
            raise RecipeError(
                f"--keep_layers names {len(chosen)} layers, and --num_hidden_layers is {student_layers}. Say one of "
                "the two."
            )
        return chosen
    if spec not in ("even", "first", "none"):
        raise RecipeError(f"--keep_layers is {spec!r}. Say even, first, none, or a list such as 0,2,5.")
    if student_layers is None:
        raise RecipeError(f"--keep_layers is {spec!r}, which says no number. Give --num_hidden_layers too.")
    if student_layers < 1 or (spec != "none" and student_layers > teacher_layers):
        raise RecipeError(
            f"--num_hidden_layers is {student_layers}, and the teacher has {teacher_layers} layers to keep. Give a "
            f"number from 1 to {teacher_layers}."
        )
    if spec == "none":
        return None
    if spec == "first":
        return list(range(student_layers))
    return even_layers(teacher_layers, student_layers)


def even_layers(total: int, count: int) -> list[int]:
    """`count` of `total` layers, as evenly spread as whole numbers allow; of one, the first; halves go down.

    The first and the last are among them: a trained stack's ends fit the embeddings and the head.

    >>> even_layers(6, 3), even_layers(4, 4), even_layers(5, 1)
    ([0, 2, 5], [0, 1, 2, 3], [0])
    """
    if count == 1:
        return [0]
    # (2 i (M - 1) + N - 2) // (2 (N - 1)): i (M - 1) / (N - 1), rounded to the nearest, halves down, in whole numbers.
    return [(2 * place * (total - 1) + count - 2) // (2 * (count - 1)) for place in range(count)]


def supervision_points(teacher_layers: int, student_layers: int, points: int) -> list[tuple[int, int]]:
    """The (teacher's, student's) numbers of layers behind which hidden states are compared, B pairs, ascending.

    SLMRec (arXiv 2405.17890) cuts both stacks into B blocks and compares their ends. Block k ends behind layer
    k M / B and k N / B, rounded up where B does not divide them; the last pair is the two stacks' ends.

    Args:
        teacher_layers: M.
        student_layers: N.
        points: B.

    Raises:
        RecipeError: if B is not from 1 to min(M, N).

    >>> supervision_points(8, 4, 4)
    [(2, 1), (4, 2), (6, 3), (8, 4)]
    """
    most = min(teacher_layers, student_layers)
    if not 1 <= points <= most:
        raise RecipeError(
            f"--supervision_points is {points}, and the student has {student_layers} layers and the teacher "
            f"{teacher_layers}. Give a number from 1 to {most}."
        )
    return [(-(-k * teacher_layers // points), -(-k * student_layers // points)) for k in range(1, points + 1)]
