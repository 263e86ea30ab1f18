"""What a data report says in words: each check's level, and two sentences, what was found and what to do."""

from typing import Any, Literal

Level = Literal["ok", "note", "warning"]
Finding = dict[str, Any]

_SURE = 1e-3  # a probability below which chance is no explanation
_FAR = 5.0  # standard deviations, likewise
_MANY = 0.01  # a share of copies beyond which they are no slips
_FINE = "Nothing needs to be done."
_FIXED = {
    "fixed_order": ("fixed order inside ties", "at the same time"),
    "fixed_order_day": ("fixed order inside days", "one after the other on the same day at different times"),
    "fixed_order_untimed": ("fixed order without times", "one after the other in sequences without a clock"),
}
_FIXED_ADVICE = {
    ("fixed_order", "ok"): _FINE,
    ("fixed_order", "note"): "Inside ties the order is partly one that a page or a file made, and a model can learn "
    "it; report the users whose test item has a later time apart.",
    ("fixed_order", "warning"): "Inside ties a fixed order stands, a store's or a file's and not the users', even if "
    "ids hide it: shuffle inside ties, or evaluate only the users whose test item has a later time.",
    ("fixed_order_day", "ok"): _FINE,
    ("fixed_order_day", "note"): "Inside a day the order is partly fixed, by a page, a file or what the items are "
    "(parts of a series); report the users whose test item is on a later day apart.",
    ("fixed_order_day", "warning"): "Inside a day a fixed order stands, a store's or a file's and not the users', "
    "even if ids hide it, unless items must be taken in turn: evaluate only the users whose test item is on a later "
    "day.",
    ("fixed_order_untimed", "ok"): _FINE,
    ("fixed_order_untimed", "note"): "Without times this cannot be told from what users do (parts of a series, what "
    "is popular first), but a file that is sorted by something hidden looks like it: find out how it was sorted, and "
    "give times.",
}


def findings(report: dict[str, Any]) -> list[Finding]:
    """The findings of a report's sections (see `llmrec.data.report.report`), warnings first, then notes.

    Returns:
        One {"check", "level": "ok" | "note" | "warning", "sentence", "value"} per check that applies; `value` is the
        figure that the level was decided by.
    """
    found = []
    for name, part in (("test", "test"), ("validation", "valid")):
        found += [overlap := _overlap(name, report["overlap"][part])]
        found += [_history(name, report["history"][part], overlap["level"] == "warning")]
    if report["seen"] is not None:
        found += [_seen("test", report["seen"]["test"]), _seen("validation", report["seen"]["valid"])]
    found += [*_ties(report), *_orders(report), *_future(report)]
    found += [
        _copies(report["repeats"], report["counts"]),
        _doubled(report["repeats"]),
        _equal_users(report["equal_users"]),
        *_unseen(report),
    ]
    found += [_text(report["text"])]
    order = {"warning": 0, "note": 1, "ok": 2}
    return sorted(found, key=lambda finding: order[finding["level"]])


def _finding(check: str, level: Level, sentence: str, value: float | int | str | None) -> Finding:
    return {"check": check, "level": level, "sentence": sentence, "value": value}


def _percent(share: float) -> str:
    """A share as people read it, with more digits where it is small.

    >>> _percent(0.4352), _percent(0.00012), _percent(0)
    ('43.5 %', '0.012 %', '0 %')
    """
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def _unusual(section: dict[str, Any]) -> bool:
    """Whether there are more targets than chance explains, and 1.5 times as many, or as few others, as usual."""
    share, usual = section["share"], section["expected_share"]
    if section["p_value"] is None or section["p_value"] >= _SURE:
        return False
    return bool(share > 1.5 * usual or 1 - share < (1 - usual) / 1.5)


def _overlap(name: str, section: dict[str, Any]) -> Finding:
    check, count, usual = f"{name} items in training", section["in_training"], section["expected_share"]
    if not count:
        return _finding(
            check, "ok", f"No {name} item occurs in its own user's training sequence. Nothing needs to be done.", 0
        )
    such = _such(section["examples"])
    if _unusual(section):
        return _finding(
            check,
            "warning",
            f"{count:,} of {section['cases']:,} {name} items ({_percent(section['share'])}) occur in their own user's "
            f"training sequence{such}, where elsewhere {_percent(usual)} of interactions repeat an earlier one. Find "
            "where these rows come from and remove them from training, or the test asks for what was learnt.",
            count,
        )
    return _finding(
        check,
        "note",
        f"{count:,} of {section['cases']:,} {name} items ({_percent(section['share'])}) occur in their own user's "
        f"training sequence{such}; repeats are as usual in the rest of this log ({_percent(usual)}). Let systems "
        "recommend items of the history again, and report them apart.",
        count,
    )


def _history(name: str, section: dict[str, Any], told: bool) -> Finding:
    """On copies of targets behind the end of training; what a finding on training tells is not told again."""
    check, anywhere, before = f"{name} items in the history", section["in_history"], section["just_before"]
    found = (
        f"{anywhere['targets']:,} of {section['cases']:,} {name} items ({_percent(anywhere['share'])}) occur in the "
        f"history before them (usual: {_percent(anywhere['expected_share'])}), and {before['targets']:,} "
        f"({_percent(before['share'])}) repeat the item just before (usual: {_percent(before['expected_share'])})"
        f"{_such(section['examples'])}. "
    )
    if not anywhere["targets"]:
        sentence = f"No {name} item occurs in the history before it. Nothing needs to be done."
        return _finding(check, "ok", sentence, 0)
    if not told and (_unusual(anywhere) or _unusual(before)):
        advice = "Find where these rows come from and remove them, or the answer stands in the question."
        return _finding(check, "warning", found + advice, anywhere["targets"])
    advice = "Let systems recommend items of the history again, and report them apart."
    return _finding(check, "note", found + advice, anywhere["targets"])


def _seen(name: str, section: dict[str, Any]) -> Finding:
    check, count = f"{name} items in what the model saw", section["unexplained"]
    if not section["users_in_common"]:
        return _finding(
            check,
            "note",
            f"What the model saw ({section['interactions']:,} interactions) has no user of this split. Check that its "
            "user ids are spelt as here, or no overlap can be found.",
            0,
        )
    if not count:
        return _finding(
            check,
            "ok",
            f"No {name} item is among what the model saw of its user, but for items that the user had taken before. "
            "Nothing needs to be done.",
            0,
        )
    return _finding(
        check,
        "warning",
        f"{count:,} of {section['cases']:,} {name} items ({_percent(section['share'])}) are among what the model saw "
        f"of their users{_such(section['examples'])}. Train it again without them; its scores here count for nothing.",
        count,
    )


def _ties(report: dict[str, Any]) -> list[Finding]:
    ties, sensitivity = report["ties"], report["sensitivity"]
    if ties is None:
        sentence = (
            "There are no timestamps, so the order is the file's and nothing can be said about ties or the future. "
            "Give times if there are any; otherwise state that the order was taken on trust."
        )
        return [_finding("timestamps", "note", sentence, None)]
    found = []
    if sensitivity is not None:
        changed = sensitivity["expected_changed_share"]
        # Positions that number a store's order, or one of shuffled ties, are no better than that order.
        sections = [finding for finding in _orders(report) if "ties" in finding["check"]]
        fixed = any(finding["level"] == "warning" for finding in sections)
        shuffled = report["split"]["protocol"].get("ties", "stable") != "stable"
        decided = report["split"]["positions_decide"] and not fixed and not shuffled
        level: Level = "warning" if changed >= 0.05 and not decided else "note" if changed > 0 else "ok"
        measured = f"measured {_percent(sensitivity['measured_changed_share'])} in {sensitivity['shuffles']} shuffles"
        advice = "Sort stably, state the tie rule, and report the users whose test item has a later time apart."
        if decided:
            advice = "Here positions decide the order of all ties; check that they are those in which users acted."
        if not changed:
            advice = "Nothing needs to be done."
        sentence = (
            f"{_percent(changed)} of the test targets are other items once ties are put in a random order "
            f"({measured}); {_percent(ties['tied_test_share'])} of the test items have the same time as the item "
            f"before. {advice}"
        )
        found.append(_finding("order of ties", level, sentence, changed))
    if ties["resolution"] == "day":
        same = ties["same_day_test_share"]
        sentence = (
            f"All timestamps are whole days, and {_percent(same)} of the test items lie on the day of the item "
            "before; the order inside a day is not the users'. Report the users whose test item is on a later day "
            "apart (the slice later_day)."
        )
        found.append(_finding("day resolution", "note", sentence, same))
    if ties["unknown_times"]:
        sentence = (
            f"{ties['unknown_times']:,} interaction(s) have no time; their users are in order of position or file. "
            "Check that this order is one of time."
        )
        found.append(_finding("unknown times", "note", sentence, ties["unknown_times"]))
    return found


def _orders(report: dict[str, Any]) -> list[Finding]:
    ids = report["id_order"]
    found = []
    parts = {
        "ties": "at the same time",
        "day": "on the same day at different times",
        "untimed": "in sequences without a clock (first appearances of items left out)",
    }
    for part, where in parts.items():
        section = ids[part]
        if section is None:
            continue
        share = section["ascending_share"]
        sure = section["p_value"] < _SURE and abs(section["z"]) > 3
        level: Level = "ok"
        if sure and abs(share - 0.5) >= 0.3:
            level = "warning"
        elif sure and abs(share - 0.5) >= 0.02 and abs(section["z"]) > _FAR:
            level = "note"
        sentence = (
            f"Of {section['pairs']:,} neighbours {where}, {_percent(share)} have ascending item ids (by chance "
            f"50.0 %; {section['z']:+.1f} standard deviations over random numberings of the items). "
        )
        sentence += {
            "ok": "Nothing needs to be done.",
            "note": "The order has something of the ids' own; report the users whose test item is on a later day "
            "apart.",
            "warning": "This is the order of the ids and not the users'"
            + (
                ", or ids were numbered as items appeared; find out how the file was sorted, and give times."
                if part == "untimed"
                else "; shuffle inside ties, or evaluate only the users whose test item is on a later day."
            ),
        }[level]
        found.append(_finding(f"ids ordered like the store's ({part})", level, sentence, share))
    found += [_fixed(report, key) for key in _FIXED if report[key] is not None]
    for key, by in (("with_popularity", "popularity"), ("with_first_time", "first appearance")):
        correlation = ids[key]
        if correlation is None:
            continue
        level = "note" if abs(correlation) >= 0.5 else "ok"
        sentence = f"The order of item ids and {by} have a rank correlation of {correlation:+.2f}. " + (
            "Rank tied scores by the expected rank and never by id, which would give away the numbering."
            if level == "note"
            else "Nothing needs to be done."
        )
        found.append(_finding(f"ids numbered by {by}", level, sentence, correlation))
    return found


def _fixed(report: dict[str, Any], key: str) -> Finding:
    section = report[key]
    (check, where), agreement, sure = _FIXED[key], section["agreement"], section["z"] > _FAR
    # Without times, users' own order (a second part after the first) cannot be told from a file's.
    lowest, highest = {"fixed_order": (0.1, 0.9), "fixed_order_day": (0.3, 0.9)}.get(key, (0.5, 2.0))
    level: Level = "warning" if sure and agreement >= highest else "note" if sure and agreement >= lowest else "ok"
    sentence = (
        f"Of the {section['pairs']:,} pairs of items that two users or more took {where}, "
        f"{_percent(section['agreeing_share'])} of the occurrences have the pair's usual order "
        f"(by chance {_percent(section['chance_share'])}; {section['z']:+.1f} standard deviations). "
    )
    return _finding(check, level, sentence + _FIXED_ADVICE[key, level], agreement)


def _future(report: dict[str, Any]) -> list[Finding]:
    section = report["look_ahead"]
    if section is None:
        return []
    share, items = section["later_share_mean"], section["later_item_share"]
    level: Level = "note" if share >= 0.01 or items > 0 else "ok"
    advice = (
        "Compare systems on a global temporal split, too, where training ends before the test begins."
        if level == "note"
        else "Nothing needs to be done."
    )
    sentence = (
        f"On average {_percent(share)} of the other users' training interactions are later than a test item, and "
        f"{_percent(items)} of the test items enter training only after their test time. {advice}"
    )
    return [_finding("other users' future", level, sentence, share)]


def _copies(section: dict[str, Any], counts: dict[str, Any]) -> Finding:
    count = section["exact_copies"]
    if not count:
        return _finding(
            "exact copies", "ok", "No interaction is there twice with its time. Nothing needs to be done.", 0
        )
    share = count / counts["interactions"]
    sentence = (
        f"{count:,} interaction(s) ({_percent(share)}) repeat an earlier one of the same user, item and time. "
        "Drop duplicates, unless one moment can hold an item twice."
    )
    return _finding("exact copies", "warning" if share >= _MANY else "note", sentence, count)


def _doubled(section: dict[str, Any]) -> Finding:
    count, share = section["doubled_users"], section["doubled_share"]
    if not count:
        sentence = "No user's sequence of 6 interactions or more is one sequence twice. Nothing needs to be done."
        return _finding("doubled users", "ok", sentence, 0)
    sentence = (
        f"{count:,} user(s) have the same sequence twice, one after the other or interaction by interaction "
        f"({_percent(share)} of those with 6 interactions or more). Find out whether the log was joined with itself, "
        "and drop the copy: it holds the targets."
    )
    return _finding("doubled users", "warning" if share >= _MANY else "note", sentence, count)


def _equal_users(section: dict[str, Any]) -> Finding:
    whole, near = section["long_users"], section["near_users"]
    share = section["long_share"] + section["near_share"]
    if not whole + near:
        sentence = (
            "No two users have the same sequence of 5 or more interactions, whole or less its first or last item. "
            "Nothing needs to be done."
        )
        return _finding("equal users", "ok", sentence, 0)
    first, second = section["examples"][0]
    sentence = (
        f"{whole:,} user(s) have the same whole sequence, of 5 or more interactions, as an earlier one, and {near:,} "
        f"the same but for the first or the last item ({_percent(share)}; such as {second!r} and {first!r}). "
        "Remove copies: one user's training is the other's test."
    )
    return _finding("equal users", "warning" if share >= _MANY else "note", sentence, whole + near)


def _unseen(report: dict[str, Any]) -> list[Finding]:
    section, counts = report["unseen"], report["counts"]
    found = []
    items, users = section["items_only_in_valid_or_test"], section["cold_users"]
    if items:
        sentence = (
            f"{items:,} of {counts['items']:,} items occur only in validation or test, "
            f"{section['items_only_in_test']:,} only in the test, and {section['test_cases_of_unseen_items']:,} test "
            "cases ask for one. Read the slice cold: what knows items by training alone cannot hit them."
        )
    else:
        sentence = "Every item of validation and test is in training. Nothing needs to be done."
    found.append(_finding("items only in test", "note" if items else "ok", sentence, items))
    if users:
        sentence = (
            f"{users:,} user(s) are asked about and have nothing in training "
            f"({section['test_cases_of_cold_users']:,} test cases). "
            "Report them apart from the users that training knows."
        )
    else:
        sentence = "Every user who is asked about has training. Nothing needs to be done."
    found.append(_finding("cold users", "note" if users else "ok", sentence, users))
    return found


def _text(section: dict[str, Any]) -> Finding:
    count = section["without_text"]
    if not count:
        return _finding("items without text", "ok", "Every item has a text. Nothing needs to be done.", 0)
    sentence = (
        f"{count:,} item(s) have no text but their id, {section['used_without_text']:,} of them with interactions. "
        "Add titles, or expect codes from text to say nothing about them."
    )
    return _finding("items without text", "note", sentence, count)


def _such(examples: list[dict[str, Any]]) -> str:
    return f", such as item {examples[0]['item']!r} of user {examples[0]['user']!r}" if examples else ""
