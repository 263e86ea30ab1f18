"""Living catalogs: pins, swaps, parts for filters, and what is left on the disk."""

import asyncio
import contextlib
import itertools

import numpy as np
import pytest
from factories import random_codes, random_recommender
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.catalog import Catalog
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import ArtefactError, BusyError, CatalogError, FilterError, UnknownCatalogError
from llmrec.service import live_version
from llmrec.service.catalogs import LiveCatalogs

MADE = random_recommender(2)
PARTS = (MADE.tokenizer, MADE.prompt, MADE.settings, {})
PRICED = [
    {**item, "price": row / 2, "tags": ["even"] if row % 2 == 0 else []} for row, item in enumerate(MADE.catalog.items)
]


def spelt(items, codes):
    return Catalog(items, codes, MADE.catalog.codebook_sizes, MADE.catalog.token_ids)


@pytest.fixture
def folder(tmp_path):
    """A catalog folder with a base."""
    spelt(PRICED, MADE.catalog.codes).save(tmp_path / "main")
    return tmp_path / "main"


@pytest.fixture
def catalogs(folder, tmp_path):
    books = [{"item_id": f"book-{row}", "title": f"Über {row}", "pages": row} for row in range(12)]
    spelt(books, random_codes(9, 12, MADE.catalog.codebook_sizes)).save(tmp_path / "books")
    return LiveCatalogs({"main": folder, "books": tmp_path / "books"}, PARTS, tmp_path / "index")


def in_use(catalogs, name=None):
    with catalogs.using(name) as served:
        return served.version


def files(catalogs):
    return set(catalogs.files.names())


def test_catalogs_go_by_name_and_the_first_is_the_default(catalogs):
    assert catalogs.names == ["main", "books"]
    with catalogs.using() as served, catalogs.using("main") as again, catalogs.using("books") as books:
        assert served is again
        assert (served.name, books.name) == ("main", "books")
        assert served.version == served.catalog.version
        assert served.encoder.catalog is served.catalog
        assert served.attributes.kinds == {"brand": "text", "price": "number", "tags": "list"}
        assert files(catalogs) == {served.index, books.index}
    with (
        pytest.raises(UnknownCatalogError, match=r"no catalog 'films'\. Name one of main, books"),
        catalogs.using("films"),
    ):
        pass


def test_states_say_what_is_there(catalogs, folder):
    main, books = catalogs.states()
    assert (books.name, books.items, books.live, books.attributes) == ("books", 12, 12, {"pages": "number"})
    versions = CatalogVersions(folder)
    base, name = versions.current, versions.retire(["item-3", "item-4"])
    assert main.versions == [base]
    (main, _) = catalogs.states()
    assert (main.version, main.items, main.live, main.levels) == (base, 40, 40, 3)
    assert main.versions == [base, name]  # made beside the running server
    asyncio.run(catalogs.swap("main"))
    (main, _) = catalogs.states()
    assert (main.version, main.items, main.live) == (name, 40, 38)
    (folder / "versions" / name / "version.json").write_text("{}")
    assert catalogs.states()[0].versions == [base]


def test_a_swap_sends_later_requests_to_the_new_version_alone(catalogs, folder):
    versions = CatalogVersions(folder)
    base, name = versions.current, versions.retire(["item-3"])
    seen = []

    async def check(served):
        seen.append((served.version, in_use(catalogs), served.index in files(catalogs)))
        await asyncio.sleep(0)

    async def run():
        with catalogs.using() as before:
            assert await catalogs.swap(None, check=check) == (name, base)
            assert seen == [(name, base, True)]
            assert before.version == base
            with catalogs.using() as after:
                assert after.version == name
                assert after.catalog.retired.sum() == 1
                assert {before.index, after.index} <= files(catalogs)
                constraint = await catalogs.constrain(before, None, ["item-3"])
                assert (constraint.allowed, constraint.candidates) == ([3], 1)
                assert (await catalogs.constrain(after, None, ["item-3"])).candidates == 0
        assert before.index not in files(catalogs)
        assert after.index in files(catalogs)
        # Back: the name is known, the file is made again.
        assert await catalogs.swap("main", base) == (base, name)
        assert in_use(catalogs) == base
        assert after.index in files(catalogs)  # the folder still says so: the next start begins with it
        assert before.index in files(catalogs)

    asyncio.run(run())


def test_a_version_that_comes_back_keeps_its_files_when_its_first_readers_leave(catalogs, folder, monkeypatch):
    monkeypatch.setattr(live_version, "INLINE_ROWS", 0)
    versions = CatalogVersions(folder)
    base, name = versions.current, versions.retire(["item-3"])
    books = in_index(catalogs, "books")

    async def run():
        with contextlib.ExitStack() as readers:
            first = readers.enter_context(catalogs.using())
            part = (await catalogs.constrain(first, {"price": {"max": 3}})).subset
            await catalogs.swap("main", name)
            await catalogs.swap("main", base)
            with catalogs.using() as again:
                assert again is not first
                assert again.index == first.index
                assert (await catalogs.constrain(again, {"price": {"max": 3}})).subset == part
                readers.close()
                assert {again.index, part} <= files(catalogs)
        assert part in files(catalogs)
        await catalogs.swap("main", name)
        assert files(catalogs) == {in_index(catalogs, "main"), books}

    asyncio.run(run())


def test_a_swap_to_what_is_in_use_does_nothing(catalogs):
    async def fail(served):
        raise AssertionError

    version = in_use(catalogs)
    assert asyncio.run(catalogs.swap("main", version, fail)) == (version, version)
    assert asyncio.run(catalogs.swap("main", "current", fail)) == (version, version)


def test_whatever_fails_the_old_version_stays(catalogs, folder):
    versions = CatalogVersions(folder)
    base, name = versions.current, versions.retire(["item-3"])
    damaged = versions.restore(["item-3"])
    versions.rollback(base)
    (folder / "versions" / damaged / "version.json").write_text("{}")
    there = files(catalogs)

    async def fail(served):
        assert served.index in files(catalogs)
        raise RuntimeError("no")

    for asked, check, error in [
        ("0123456789abcdef", None, UnknownCatalogError),
        ("../../etc", None, UnknownCatalogError),
        (damaged, None, ArtefactError),
        (name, fail, RuntimeError),
    ]:
        with pytest.raises(error):
            asyncio.run(catalogs.swap("main", asked, check))
        assert in_use(catalogs) == base
        assert files(catalogs) == there
    with pytest.raises(UnknownCatalogError, match="no catalog 'films'"):
        asyncio.run(catalogs.swap("films"))
    assert asyncio.run(catalogs.swap("main", name)) == (name, base)


def test_one_swap_of_a_catalog_at_a_time(catalogs, folder):
    versions = CatalogVersions(folder)
    base, name = versions.current, versions.retire(["item-3"])

    async def run():
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def check(served):
            begun.set()
            await go_on.wait()

        first = asyncio.create_task(catalogs.swap("main", name, check))
        await begun.wait()
        with pytest.raises(BusyError, match="'main' is being swapped already") as error:
            await catalogs.swap("main", name)
        assert error.value.retry_after > 0
        assert await catalogs.swap("books") == (in_use(catalogs, "books"),) * 2
        go_on.set()
        assert await first == (name, base)
        assert await catalogs.swap("main", base) == (base, name)

    asyncio.run(run())


def test_a_swap_is_brought_to_its_end_when_its_asker_goes_away(catalogs, folder):
    versions = CatalogVersions(folder)
    name = versions.retire(["item-3"])

    async def run():
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def check(served):
            begun.set()
            await go_on.wait()

        asker = asyncio.create_task(catalogs.swap("main", name, check))
        await begun.wait()
        asker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asker
        with pytest.raises(BusyError):
            await catalogs.swap("main", name)
        go_on.set()
        while in_use(catalogs) != name:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_swaps_under_load_leave_no_request_without_its_files(catalogs, folder):
    versions = CatalogVersions(folder)
    names = [versions.current, versions.retire(["item-3"]), versions.retire(["item-4"])]
    answered = []

    async def request(number):
        with catalogs.using() as served:
            filters = {"price": {"max": 5 + number % 3}}
            constraint = await catalogs.constrain(served, filters, seen_rows=[number % 40])
            await asyncio.sleep(0.002 * (number % 7))
            found = catalogs.files.load(constraint.subset or served.index)
            live = 40 - names.index(served.version)
            assert catalogs.files.load(served.index).num_leaves == live
            assert constraint.candidates == len(legal(found, constraint))
            answered.append(served.version)

    async def run(monkey):
        monkey.setattr(live_version, "INLINE_ROWS", 0)
        monkey.setattr(live_version, "MAX_PARTS", 2)
        stop = asyncio.Event()

        async def swaps():
            for name in itertools.cycle(names):
                if stop.is_set():
                    return
                await catalogs.swap("main", name)

        swapping = asyncio.create_task(swaps())
        for begin in range(0, 300, 30):
            await asyncio.gather(*(request(number) for number in range(begin, begin + 30)))
        stop.set()
        await swapping
        await catalogs.swap("main", "current")
        assert in_use(catalogs) == names[-1]

    with pytest.MonkeyPatch.context() as monkey:
        asyncio.run(run(monkey))
    assert len(answered) == 300
    assert set(answered) == set(names)
    with catalogs.using() as served, catalogs.using("books") as books:
        left = {
            name for name in files(catalogs) if not name.startswith(served.index.removesuffix(".trie.safetensors"))
        }
        assert left == {books.index}
        assert len(files(catalogs)) <= 4


def legal(trie, constraint):
    """The rows that a search with this constraint may return."""
    rows = set(trie.item_of_leaf.tolist())
    if constraint.allowed is not None:
        rows &= set(constraint.allowed)
    return rows - set(constraint.excluded)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("inline", [0, 5, 1000])
def test_constraints_are_live_and_matching_and_allowed_and_neither_denied_nor_seen(data, inline, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "constrained"
    if not folder.exists():
        spelt(PRICED, MADE.catalog.codes).with_retired([1, 2, 30], True).save(folder)
    catalogs = LiveCatalogs({"main": folder}, PARTS, folder / "index")
    ids = st.sampled_from([*(f"item-{row}" for row in range(40)), "lost"])
    most = data.draw(st.none() | st.integers(0, 24))
    brand = data.draw(st.none() | st.integers(0, 3))
    filters = {} if most is None else {"price": {"max": most}}
    filters |= {} if brand is None else {"brand": {"none_of": [f"Brand {brand}"]}}
    allow = data.draw(st.none() | st.lists(ids, max_size=10))
    deny, seen = data.draw(st.lists(ids, max_size=10)), data.draw(st.lists(st.integers(0, 39), max_size=10))

    async def run():
        with catalogs.using() as served, pytest.MonkeyPatch.context() as monkey:
            monkey.setattr(live_version, "INLINE_ROWS", inline)
            constraint = await catalogs.constrain(served, filters, allow, deny, seen)
            found = legal(catalogs.files.load(constraint.subset or served.index), constraint)
        wanted = {
            row
            for row in range(40)
            if row not in (1, 2, 30)
            and (most is None or row / 2 <= most)
            and (brand is None or row % 3 != brand)
            and (allow is None or f"item-{row}" in allow)
            and f"item-{row}" not in deny
            and row not in seen
        }
        assert found == wanted
        assert constraint.candidates == len(wanted)
        if constraint.allowed is not None:
            assert constraint.allowed == sorted(wanted)
            assert constraint.excluded == []
        else:
            assert constraint.excluded == sorted(constraint.excluded)
        if inline == 0 and allow is None and filters:
            assert constraint.allowed is None or not constraint.allowed

    asyncio.run(run())


def test_a_filter_s_part_is_made_once_for_all_who_ask(catalogs, monkeypatch):
    monkeypatch.setattr(live_version, "INLINE_ROWS", 3)
    made = []
    whole = catalogs.files.subset_of
    monkeypatch.setattr(catalogs.files, "subset_of", lambda *given: made.append(given) or whole(*given))
    one = {"price": {"max": 10}, "brand": {"any_of": ["Brand 0", "Brand 1"]}}
    same = {"brand": {"any_of": ["Brand 1", "Brand 0"]}, "price": {"max": 10.0}}

    async def run():
        with catalogs.using() as served:
            asked = [catalogs.constrain(served, filters) for filters in [one, same] * 5]
            names = {constraint.subset for constraint in await asyncio.gather(*asked)}
            assert len(names) == len(made) == 1
            assert (await catalogs.constrain(served, same, seen_rows=[0])).excluded == [0]
            assert len(made) == 1
            few = await catalogs.constrain(served, {"price": {"max": 1}})  # rows 0, 1, 2
            assert (few.subset, few.allowed, few.candidates) == ("", [0, 1, 2], 3)
            every = await catalogs.constrain(served, {"price": {"min": 0}}, seen_rows=[7, 7])
            assert (every.subset, every.allowed, every.excluded, every.candidates) == ("", None, [7], 39)
            nothing = await catalogs.constrain(served, {"price": {"min": 100}})
            assert (nothing.subset, nothing.allowed, nothing.candidates) == ("", [], 0)
            assert len(made) == 1
            catalogs.files.path(names.pop()).unlink()  # by somebody who clears caches
            again = await catalogs.constrain(served, one)
            assert again.subset in files(catalogs)
            assert len(made) == 2
            with pytest.raises(FilterError, match="no attribute 'colour'"):
                await catalogs.constrain(served, {"colour": {"any_of": ["red"]}})
            with pytest.raises(FilterError, match="cannot be read"):
                await catalogs.constrain(served, {"price": {"most": 2}})
            # A filter that failed is asked anew, and the same filter of another catalog is another one.
            with pytest.raises(FilterError, match="no attribute 'colour'"):
                await catalogs.constrain(served, {"colour": {"any_of": ["red"]}})
        with catalogs.using("books") as books, pytest.raises(FilterError, match="no attribute 'price'"):
            await catalogs.constrain(books, one)

    asyncio.run(run())


def test_parts_go_the_least_recently_used_first_and_not_before_their_readers(catalogs, monkeypatch):
    monkeypatch.setattr(live_version, "INLINE_ROWS", 0)
    monkeypatch.setattr(live_version, "MAX_PARTS", 2)

    async def part(served, most):
        return (await catalogs.constrain(served, {"price": {"max": most}})).subset

    async def run():
        with catalogs.using() as served:
            with catalogs.using():
                one, two = await part(served, 1), await part(served, 2)
                assert await part(served, 1) == one
                three = await part(served, 3)
                assert {one, two, three} <= files(catalogs)  # two was given up, and may still be named
            assert {one, two, three} <= files(catalogs)
        assert {one, three} <= files(catalogs)
        assert two not in files(catalogs)
        with catalogs.using() as served:
            with catalogs.using():
                assert await part(served, 4) != one  # gives up one
            with catalogs.using():
                assert await part(served, 1) == one  # found on the disk, and taken back
        assert one in files(catalogs)
        assert three not in files(catalogs)
        monkeypatch.setattr(live_version, "MAX_PART_BYTES", 1)
        with catalogs.using() as served:
            five = await part(served, 5)
        with catalogs.using() as served:
            assert files(catalogs) == {served.index, five, in_index(catalogs, "books")}

    asyncio.run(run())


def in_index(catalogs, name):
    with catalogs.using(name) as served:
        return served.index


def test_a_file_that_vanished_is_made_again_and_goes_like_others(catalogs, monkeypatch):
    monkeypatch.setattr(live_version, "INLINE_ROWS", 0)
    monkeypatch.setattr(live_version, "MAX_PARTS", 1)

    async def run():
        with catalogs.using() as served:
            part = (await catalogs.constrain(served, {"price": {"max": 3}})).subset
            catalogs.files.path(part).unlink()
            assert (await catalogs.constrain(served, {"price": {"max": 3}})).subset == part
            assert part in files(catalogs)
        with catalogs.using() as served:
            await catalogs.constrain(served, {"price": {"max": 4}})
        assert part not in files(catalogs)

    asyncio.run(run())


def test_who_goes_away_does_not_end_a_part_that_others_wait_for(catalogs, monkeypatch):
    monkeypatch.setattr(live_version, "INLINE_ROWS", 0)

    async def run():
        with catalogs.using() as served:
            asked = [asyncio.create_task(catalogs.constrain(served, {"price": {"max": 3}})) for _ in range(3)]
            await asyncio.sleep(0)
            asked[0].cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked[0]
            first, second = await asyncio.gather(*asked[1:])
            assert first == second
            assert first.subset in files(catalogs)

    asyncio.run(run())


def test_a_swap_makes_the_columns_that_are_in_use(catalogs, folder):
    name = CatalogVersions(folder).retire(["item-3"])

    async def run():
        with catalogs.using() as served:
            await catalogs.constrain(served, {"price": {"max": 3}})
            assert served.attributes.made == ["price"]
        await catalogs.swap("main", name)
        with catalogs.using() as served:
            assert served.version == name
            assert served.attributes.made == ["price"]

    asyncio.run(run())


def test_pages_of_items(catalogs, folder):
    CatalogVersions(folder).retire(["item-3"])
    asyncio.run(catalogs.swap("main"))
    with catalogs.using() as served, catalogs.using("books") as books:
        page = catalogs.page(served, "", 2, 3)
        assert (page.total, [item.id for item in page.items]) == (40, ["item-2", "item-3", "item-4"])
        assert [item.retired for item in page.items] == [False, True, False]
        assert page.items[0].title == "Title 2"
        assert page.items[0].semantic_id == MADE.catalog.codes[2].tolist()
        assert page.items[0].attributes == {"brand": "Brand 2", "price": 1.0, "tags": ["even"]}
        found = catalogs.page(served, "TLE 1")
        assert (found.total, [item.id for item in found.items][:2]) == (11, ["item-1", "item-10"])
        assert [item.id for item in catalogs.page(served, "EM-39").items] == ["item-39"]
        assert catalogs.page(served, "1\nTitle").total == catalogs.page(served, "(").total == 0
        assert catalogs.page(books, "ÜBER 7").total == 1
        assert catalogs.page(books, "über", 10, 50).items[-1].id == "book-11"
        assert catalogs.page(books, "\ud800").total == 0
        assert catalogs.page(served, "item", 100, 5).items == []
        for needle in ("1", "e 2", "item-3", ""):
            wanted = [row for row in range(40) if needle in f"item-{row}" or needle in f"title {row}"]
            assert [item.id for item in catalogs.page(served, needle, 0, 50).items] == [
                f"item-{row}" for row in wanted
            ]


def test_what_cannot_be_served_is_refused_at_the_start(folder, tmp_path):
    with pytest.raises(CatalogError, match="no catalog"):
        LiveCatalogs({}, PARTS, tmp_path / "index")
    with pytest.raises(CatalogError):
        LiveCatalogs({"main": tmp_path / "nowhere"}, PARTS, tmp_path / "index")
    shifted = [ids + 1 for ids in MADE.catalog.token_ids]
    Catalog(PRICED, MADE.catalog.codes, MADE.catalog.codebook_sizes, shifted).save(tmp_path / "other")
    with pytest.raises(ArtefactError, match="spells '<s0_0>' otherwise"):
        LiveCatalogs({"main": folder, "other": tmp_path / "other"}, PARTS, tmp_path / "index")
    Catalog(PRICED, MADE.catalog.codes, MADE.catalog.codebook_sizes).save(tmp_path / "bare")
    with pytest.raises(CatalogError, match="no token ids yet"):
        LiveCatalogs({"main": tmp_path / "bare"}, PARTS, tmp_path / "index")


def test_the_start_may_name_versions(folder, tmp_path):
    versions = CatalogVersions(folder)
    base, name = versions.current, versions.retire(["item-3"])
    assert in_use(LiveCatalogs({"main": folder}, PARTS, tmp_path / "index")) == name
    assert in_use(LiveCatalogs({"main": folder}, PARTS, tmp_path / "index", {"main": base})) == base
    with pytest.raises(CatalogError, match="no version"):
        LiveCatalogs({"main": folder}, PARTS, tmp_path / "index", {"main": "0" * 16})


def test_catalogs_of_the_same_content_share_a_file_until_both_are_gone(folder, tmp_path):
    spelt(PRICED, MADE.catalog.codes).save(tmp_path / "twin")
    catalogs = LiveCatalogs({"main": folder, "twin": tmp_path / "twin"}, PARTS, tmp_path / "index")
    assert len(files(catalogs)) == 1
    (shared,) = files(catalogs)
    CatalogVersions(folder).retire(["item-3"])
    asyncio.run(catalogs.swap("main"))
    assert shared in files(catalogs)
    CatalogVersions(tmp_path / "twin").retire(["item-4"])
    asyncio.run(catalogs.swap("twin"))
    assert shared not in files(catalogs)
    assert np.array_equal([state.live for state in catalogs.states()], [39, 39])
