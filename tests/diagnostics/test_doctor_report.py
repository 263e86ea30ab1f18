"""The doctor's report against plain loops: items matched by id, others on shared items, nothing but JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import kinds
import numpy as np
import pytest
from kinds import ids_of

from llmrec.data.split import Split
from llmrec.diagnostics import report as module
from llmrec.diagnostics.ceiling import beam_recall
from llmrec.diagnostics.evidence import CASES, NEIGHBOURS
from llmrec.diagnostics.identifiers import SemanticIDs
from llmrec.diagnostics.neighbours import co_sold, nearest_texts
from llmrec.diagnostics.report import CURVE_POINTS, GROUP_ITEMS, GROUPS, KS, TOP, WIDTHS, report
from llmrec.evaluation.baselines import ItemCF
from llmrec.exceptions import DataError

Table = dict[str, Any]


def random_ids(seed: int, items: int = 60, sizes: tuple[int, ...] = (5, 4, 3)) -> SemanticIDs:
    generator = np.random.default_rng(seed)
    return ids_of(np.stack([generator.integers(0, size, items) for size in sizes], axis=1), sizes)


def random_log(seed: int, items: int = 60, users: int = 80) -> Split:
    generator = np.random.default_rng(seed)
    return kinds.log(generator.integers(0, 3, items), seed, users, 6)


def renamed(split: Split, order: Sequence[int]) -> Split:
    """The same log with its items in another order."""
    place = np.argsort(order)
    names = [split.item_ids[row] for row in order]
    return replace(split, item_ids=names, rows=place[split.rows].astype(np.int32))


def unseen(codes: np.ndarray, split: Split, place: dict[int, int]) -> list[int]:
    """For every test target that has a place, how many items on its ID its user could still be shown."""
    found = []
    for history, target in zip(split.histories("test"), split.targets("test").tolist(), strict=True):
        if target in place:
            had = {place[row] for row in history.tolist() if row in place} - {place[target]}
            same = (codes == codes[place[target]]).all(axis=1)
            found.append(sum(bool(same[row]) and row not in had for row in range(len(codes))))
    return found


def purity(codes: np.ndarray, pairs: list[tuple[int, int]], length: int) -> float:
    return float(np.mean([(codes[i, :length] == codes[j, :length]).all() for i, j in pairs]))


def sold_pairs(split: Split, k: int = 10) -> list[tuple[str, str]]:
    """By a plain loop: of every item the k others with the highest cosine of co-occurrence, ties by row."""
    counts: Counter[tuple[int, int]] = Counter()
    for history in split.train:
        near = [(i, j) for i in range(len(history)) for j in range(i + 1, min(i + 6, len(history)))]
        for a, b in near:
            if history[a] != history[b]:
                counts[int(history[a]), int(history[b])] += 1 / (b - a)
                counts[int(history[b]), int(history[a])] += 1 / (b - a)
    totals: Counter[int] = Counter()
    for (a, _), count in counts.items():
        totals[a] += count
    pairs = []
    for item in range(split.num_items):
        partners = [
            (-round(count / np.sqrt(totals[a] * totals[b]), 12), b) for (a, b), count in counts.items() if a == item
        ]
        pairs += [(split.item_ids[item], split.item_ids[b]) for _, b in sorted(partners)[:k]]
    return pairs


@pytest.fixture(scope="module")
def found() -> Table:
    ids = random_ids(0)
    table = report(ids, split=random_log(0), texts=np.random.default_rng(0).normal(size=(60, 8)))
    return dict(json.loads(json.dumps(table, allow_nan=False)))


def test_the_figures_are_those_of_plain_loops(found: Table) -> None:
    ids, split = random_ids(0), random_log(0)
    codes = ids.codes
    groups = Counter(map(tuple, codes.tolist()))
    assert (found["items"], found["levels"], found["tokens_per_item"]) == (60, 3, 3)
    assert found["codebook_sizes"] == [5, 4, 3]
    assert found["collision_rate"] == pytest.approx(1 - len(groups) / 60)
    shares = sum(count for count in groups.values() if count > 1)
    assert found["sharing_rate"] == pytest.approx(shares / 60)
    for level in range(3):
        counts = np.array(list(Counter(codes[:, level].tolist()).values()))
        entropy = -(counts / 60 * np.log(counts / 60)).sum()
        assert found["perplexity"][level] == pytest.approx(np.exp(entropy))
        assert found["dead_codes"][level] == (5, 4, 3)[level] - len(counts)
        assert found["used_share"][level] == len(counts) / (5, 4, 3)[level]
        assert found["code_counts"][level]["items"][: len(counts)] == sorted(counts.tolist(), reverse=True)
    place = {item: row for row, item in enumerate(ids.item_ids)}
    pairs = [(place[a], place[b]) for a, b in sold_pairs(split)]
    for length in (1, 2, 3):
        assert found["neighbours"]["co_sold"][length - 1]["purity"] == pytest.approx(purity(codes, pairs, length))
        assert found["neighbours"]["co_sold"][length - 1]["pairs"] == len(pairs)
    assert found["neighbour_purity"] == found["neighbours"]["co_sold"][0]["purity"]
    assert found["neighbour_kind"] == "co_sold"
    sizes = unseen(codes, split, {row: row for row in range(60)})
    assert sizes != [groups[tuple(codes[target].tolist())] for target in split.targets("test")]
    for k in KS:
        assert found["ceiling"]["collision"][f"HR@{k}"] == pytest.approx(np.mean([min(k, g) / g for g in sizes]))
    assert (found["ceiling"]["basis"], found["ceiling"]["targets"]) == ("test targets", 80)
    assert (found["ceiling"]["targets_without_id"], found["ceiling"]["cases"]) == (0, 80)


def test_beams_are_tried_with_item_cf_on_the_training_histories(found: Table) -> None:
    ids, split = random_ids(0), random_log(0)
    model = ItemCF().fit(split.train, 60)
    asked = [np.asarray(history) for history in split.histories("test")]
    assert found["ceiling"]["beam"] == json.loads(json.dumps(beam_recall(ids.codes, model.scores, asked, WIDTHS, TOP)))
    assert found["ceiling"]["reference"].startswith("item-CF")


def test_beams_are_tried_on_random_codes_of_the_same_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def searched(codes: np.ndarray, *given: Any, **options: Any) -> Table:
        tried.append(codes)
        return beam_recall(codes, *given, **options)

    monkeypatch.setattr(module, "beam_recall", searched)
    ids = replace(random_ids(14), codebook_sizes=(5, 4, 1000))
    found = report(ids, split=random_log(14))
    own, random = tried
    assert own is ids.codes
    assert random.shape == (60, 3)
    assert (random < [5, 4, 60]).all()  # no more codes than items
    assert len(np.unique(random[:, 2])) > 30
    assert found["ceiling"]["beam_random"]["recall"].keys() == found["ceiling"]["beam"]["recall"].keys()
    again = report(ids, split=random_log(14))
    assert again["ceiling"]["beam_random"] == found["ceiling"]["beam_random"]
    np.testing.assert_array_equal(random, tried[3])
    report(ids, split=random_log(14), seed=1)
    assert (random != tried[5]).any()
    tried.clear()
    appended = replace(random_ids(14, sizes=(3, 2, 60)), quantised_levels=2)
    report(appended, split=random_log(14))
    digits = tried[1]
    for row in range(60):
        assert digits[row, 2] == (digits[:row, :2] == digits[row, :2]).all(axis=1).sum()
    assert report(ids)["ceiling"]["beam_random"] is None


def test_the_order_of_the_log_s_items_is_no_matter(found: Table) -> None:
    order = np.random.default_rng(1).permutation(60).tolist()
    ids, split = random_ids(0), random_log(0)
    backwards = order[::-1]
    mixed = SemanticIDs(
        [ids.item_ids[row] for row in backwards],
        ids.codes[backwards],
        ids.codebook_sizes,
        [ids.titles[row] for row in backwards],
    )
    vectors = np.random.default_rng(0).normal(size=(60, 8))[backwards]
    again = report(mixed, split=split, texts=vectors)
    for key in ("collision_rate", "sharing_rate", "usage", "branching", "neighbour_purity"):
        assert again[key] == found[key], key
    assert again["ceiling"]["collision"] == pytest.approx(found["ceiling"]["collision"])
    for kind, lengths in again["neighbours"].items():
        assert [row["purity"] for row in lengths] == [row["purity"] for row in found["neighbours"][kind]]
    assert again["ceiling"]["beam"]["recall"] == pytest.approx(found["ceiling"]["beam"]["recall"], abs=0.02)  # ties
    same = report(ids, split=renamed(split, order))
    assert same["ceiling"]["collision"] == pytest.approx(found["ceiling"]["collision"])
    place = {item: row for row, item in enumerate(ids.item_ids)}
    pairs = [(place[a], place[b]) for a, b in sold_pairs(renamed(split, order))]
    assert same["neighbours"]["co_sold"][0]["purity"] == pytest.approx(purity(ids.codes, pairs, 1))


def test_items_of_the_log_without_an_id_are_left_out_and_their_targets_missed() -> None:
    whole, split = random_ids(2), random_log(2)
    part = ids_of(whole.codes[:40], whole.codebook_sizes)
    found = report(part, split=split)
    pairs = [(int(a[1:]), int(b[1:])) for a, b in sold_pairs(split) if int(a[1:]) < 40 and int(b[1:]) < 40]
    assert found["neighbours"]["co_sold"][1]["purity"] == pytest.approx(purity(part.codes, pairs, 2))
    targets = split.targets("test").tolist()
    one = [1 / size for size in unseen(part.codes, split, {row: row for row in range(40)})]
    assert found["ceiling"]["collision"]["HR@1"] == pytest.approx(sum(one) / 80)
    assert found["ceiling"]["targets"] == 80
    assert found["ceiling"]["targets_without_id"] == sum(target >= 40 for target in targets)
    model = ItemCF().fit(split.train, 60)
    asked = [history[history < 40] for history in split.histories("test")]
    asked = [history for history in asked if len(history)]
    beam = beam_recall(part.codes, lambda batch: model.scores(batch)[:, :40], asked, WIDTHS, TOP)
    assert found["ceiling"]["beam"] == beam


def test_others_are_compared_on_the_items_that_both_have() -> None:
    ids, split = random_ids(3), random_log(3)
    texts = np.random.default_rng(3).normal(size=(60, 8))
    chosen = np.random.default_rng(4).permutation(60)[:45]
    theirs = random_ids(5, 50, (4, 6))
    other = SemanticIDs(
        [f"i{row}" for row in chosen] + [f"else{row}" for row in range(5)],
        theirs.codes,
        theirs.codebook_sizes,
        theirs.titles,
        codebook_sizes_known=False,
    )
    found = report(ids, split=split, texts=texts, others=[("other", other), ("alien", random_ids(6, 3))])
    compared = found["others"][0]
    assert (compared["name"], compared["items"], compared["shared_items"]) == ("other", 50, 45)
    assert compared["codebook_sizes_known"] is False
    rows = np.sort(chosen)
    place = {int(row): at for at, row in enumerate(rows)}
    at = {int(row): index for index, row in enumerate(chosen)}
    tables = {"these": ids.codes[rows], "other": other.codes[[at[int(row)] for row in rows]]}
    pairs = [(int(a[1:]), int(b[1:])) for a, b in sold_pairs(split)]
    pairs = [(place[a], place[b]) for a, b in pairs if a in place and b in place]
    model = ItemCF().fit(split.train, 60)
    asked = [
        np.array([place[int(row)] for row in history if int(row) in place]) for history in split.histories("test")
    ]
    for side, codes in tables.items():
        figures, groups = compared[side], Counter(map(tuple, codes.tolist()))
        assert figures["items"] == 45
        assert figures["collision_rate"] == pytest.approx(1 - len(groups) / 45)
        assert figures["neighbour_purity"] == pytest.approx(purity(codes, pairs, 1))
        assert figures["collision_ceiling"]["HR@1"] == pytest.approx(
            np.mean([1 / size for size in unseen(codes, split, place)])
        )
        kept = [history.astype(int) for history in asked]
        beam = beam_recall(codes, lambda b: model.scores([rows[h] for h in b])[:, rows], kept, WIDTHS, TOP)
        assert figures["beam"] == beam
    assert found["others"][1] | {"codebook_sizes_known": True} == {
        "name": "alien",
        "items": 3,
        "shared_items": 3,
        "codebook_sizes_known": True,
        "these": found["others"][1]["these"],
        "other": found["others"][1]["other"],
    }
    strange = ids_of(np.zeros((2, 1), dtype=int))
    strange = replace(strange, item_ids=["p", "q"])
    (none,) = report(ids, others=[("strange", strange)])["others"]
    assert (none["shared_items"], none["these"], none["other"]) == (0, None, None)


def test_without_a_log_texts_are_the_neighbours_and_all_items_the_targets() -> None:
    ids, vectors = random_ids(7), np.random.default_rng(7).normal(size=(60, 8))
    found = report(ids, texts=vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T - 9 * np.eye(60)
    pairs = [(row, int(near)) for row in range(60) for near in np.argsort(-cosines[row])[:NEIGHBOURS]]
    assert found["neighbour_kind"] == "texts"
    assert found["neighbour_purity"] == pytest.approx(purity(ids.codes, pairs, 1))
    assert found["neighbours"]["co_sold"] is None
    groups = Counter(map(tuple, ids.codes.tolist()))
    one = [1 / groups[tuple(code)] for code in ids.codes.tolist()]
    assert found["ceiling"]["basis"] == "items"
    assert found["ceiling"]["collision"]["HR@1"] == pytest.approx(np.mean(one))
    assert (found["ceiling"]["beam"], found["ceiling"]["reference"]) == (None, None)
    bare = report(ids)
    assert (bare["neighbour_purity"], bare["neighbour_kind"], bare["reconstruction"]) == (None, None, None)
    assert bare["neighbours"] == {"co_sold": None, "texts": None}
    json.dumps(bare, allow_nan=False)


def test_groups_have_titles_and_are_cut() -> None:
    table = np.zeros((2 * GROUP_ITEMS + 60, 1), dtype=int)
    table[2 * GROUP_ITEMS :, 0] = 1 + np.arange(60) // 2
    found = report(ids_of(table))["collisions"]
    assert (found["largest_group"], found["histogram"]) == (20, [[2, 30], [20, 1]])
    assert len(found["groups"]) == GROUPS
    first, second = found["groups"][:2]
    assert (first["size"], len(first["items"]), first["code"]) == (20, GROUP_ITEMS, [0])
    assert second == {
        "size": 2,
        "code": [1],
        "items": [{"item_id": "i20", "title": "Title i20"}, {"item_id": "i21", "title": "Title i21"}],
    }


def test_an_appended_digit_is_taken_off_for_what_was_quantised() -> None:
    ids, split = random_ids(8), random_log(8)
    ranks: Counter[tuple[int, ...]] = Counter()
    digits = []
    for code in map(tuple, ids.codes.tolist()):
        digits.append(ranks[code])
        ranks[code] += 1
    appended = ids_of(np.column_stack([ids.codes, digits]), quantised_levels=3, origin={"collisions": "append"})
    found, plain = report(appended, split=split), report(ids, split=split)
    assert found["collision_rate"] == 0
    assert (found["levels"], found["quantised_levels"], found["quantised"]["levels"]) == (4, 3, 3)
    for key in ("collision_rate", "sharing_rate", "perplexity", "dead_codes", "neighbour_purity"):
        assert found["quantised"][key] == plain[key], key
    assert found["quantised"]["beam"] == plain["ceiling"]["beam"]
    assert found["quantised"]["policy"] == "append"
    assert plain["quantised"] is None


def test_reassigned_codes_are_told_from_the_record() -> None:
    record = {"policy": "reassign", "items": 60, "collision_rate": 0.2, "sharing_rate": 0.3, "largest_group": 4}
    record |= {"moved_items": 9, "distortion_before": 2.0, "added_distortion": 0.1}
    found = report(replace(random_ids(9), origin={"collisions": record}))["quantised"]
    assert found == {
        "policy": "reassign",
        "moved_items": 9,
        "added_share": 0.05,
        "levels": 3,
        **{key: record[key] for key in ("items", "collision_rate", "sharing_rate", "largest_group")},
    }
    exact = {"collisions": record | {"distortion_before": 0.0, "added_distortion": 0.0}}
    assert report(replace(random_ids(9), origin=exact))["quantised"]["added_share"] is None


def test_duplicates_are_counted() -> None:
    vectors = np.random.default_rng(10).normal(size=(60, 8))
    vectors[7] = 3 * vectors[30]  # of one direction
    vectors[8] = vectors[31] = vectors[32]
    vectors[40] = vectors[41] = 0  # without text
    vectors[50] = vectors[51] + 0.01
    ids = random_ids(10).with_titles({"i1": "same", "i2": "same", "i3": "same", "i4": "i4", "i5": "i4"})
    found = report(ids, texts=vectors)["duplicates"]
    assert found == {"titles": 3, "texts": 5, "queried": 60}
    assert report(ids)["duplicates"] == {"titles": 3, "texts": None, "queried": None}


def test_reconstruction_takes_what_was_quantised() -> None:
    ids, vectors = ids_of(kinds.codes()), kinds.texts()
    points = kinds.kind_points()
    found = report(ids, texts=vectors, vectors=vectors, quantizer=points)["reconstruction"]
    distances = ((vectors - points.decode(kinds.codes())) ** 2).sum(axis=1)
    spread = ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1)
    assert found["relative"] == pytest.approx(distances.mean() / spread.mean())
    assert report(ids, texts=vectors, quantizer=points)["reconstruction"] is None


def test_large_curves_and_many_cases_are_thinned() -> None:
    table = np.column_stack([np.arange(600), np.zeros(600, dtype=int)])
    found = report(ids_of(table), split=kinds.log(kinds.codes()[:, 0], users=CASES + 100))
    curve = found["code_counts"][0]
    assert len(curve["rank"]) == len(curve["items"]) == CURVE_POINTS
    assert (curve["rank"][0], curve["rank"][-1]) == (1, 600)
    assert found["ceiling"]["cases"] == CASES
    assert found["ceiling"]["targets"] == CASES + 100


def test_the_same_arguments_give_the_same_report_and_steps_are_told() -> None:
    ids, split, steps = random_ids(11), random_log(11), []
    texts = np.random.default_rng(11).normal(size=(60, 8))
    first = report(ids, split=split, texts=texts, others=[("x", ids)], seed=3, progress=steps.append)
    assert first == report(ids, split=split, texts=texts, others=[("x", ids)], seed=3)
    assert steps == ["neighbours", "codes", "beams", "comparison with x"]
    assert (first["seed"], first["skipped"]) == (3, {})
    assert set(first["versions"]) == {"llmrec", "numpy", "faiss"}


def test_what_does_not_belong_together_is_refused() -> None:
    ids = random_ids(12)
    with pytest.raises(DataError, match=r"Text embeddings of shape \(59, 2\) do not belong to 60"):
        report(ids, texts=np.zeros((59, 2)))
    with pytest.raises(DataError, match=r"Quantised vectors of shape \(60,\)"):
        report(ids, vectors=np.zeros(60))
    with pytest.raises(DataError, match="None of the 60 items of the log has a semantic ID here"):
        report(replace(ids, item_ids=[f"x{row}" for row in range(60)]), split=random_log(12))


def test_the_helpers_agree_with_the_library() -> None:
    split = random_log(13)
    found = co_sold(split.train, 60, 10, 5)
    pairs = {(f"i{row}", f"i{near}") for row in range(60) for near in found[row] if near >= 0}
    assert pairs == set(sold_pairs(split))
    assert nearest_texts(np.eye(3), 1)[1].tolist() == [[1], [0], [0]]
