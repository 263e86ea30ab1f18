"""The data report as a page: findings first, then counts, plots and tables, each with a sentence."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from llmrec.page import Page, plot

# Two colours that can be told apart in the light, in the dark, and by those who see fewer.
_BLUE, _ORANGE, _GREY = "#3b82c4", "#d9822b", "#8a8f98"
_PARTS = {"ties": "same time", "day": "same day, other time", "untimed": "no clock"}
_FIXED = {"ties": "fixed_order", "day": "fixed_order_day", "untimed": "fixed_order_untimed"}


def page(report: dict[str, Any], title: str = "Data report") -> Page:
    """The page of a report.

    Args:
        report: what `llmrec.data.report.report` returned, or the same read from JSON.
        title: the page's first heading, such as the data's name.
    """
    found = Page(title)
    found.paragraph(
        f"{report['counts']['interactions']:,} interactions, {report['counts']['users']:,} users, "
        f"{report['counts']['items']:,} items; split: {_protocol(report)}.\n"
        f"Content hash of the split: {report['split']['content_hash']}"
    )
    found.heading("Findings")
    for finding in report["findings"]:
        found.finding(finding["level"], f"{_capital(finding['check'])}. {finding['sentence']}")
    found.heading("Counts")
    found.paragraph("Density is the share of all pairs of user and item that occur.")
    found.table(["what", "number"], list(_counts(report)))
    _lengths(found, report["lengths"])
    _popularity(found, report["popularity"], report["counts"])
    _times(found, report["times"])
    _order(found, report)
    _tables(found, report)
    _entropy(found, report["entropy"])
    return found


def _lengths(found: Page, lengths: dict[str, Any]) -> None:
    found.heading("Sequence lengths")
    found.paragraph("How many interactions users have: what a model's longest history must hold.")
    if not lengths["counts"]:
        return
    figure, axes = plot()
    axes.stairs(lengths["counts"], lengths["edges"], fill=True, color=_BLUE)
    axes.set_xscale("log")
    axes.set(xlabel="interactions of a user", ylabel="users")
    quantiles = lengths["quantiles"]
    found.figure(
        figure,
        f"Mean {lengths['mean']:.1f}, median {quantiles['0.5']:,.0f}, 95 % of the users have at most "
        f"{quantiles['0.95']:,.0f} and the longest sequence has {quantiles['1.0']:,.0f}; bins grow by a factor.",
    )


def _popularity(found: Page, popularity: dict[str, Any], counts: dict[str, Any]) -> None:
    found.heading("Popularity")
    found.paragraph(
        "How unequal items are in training. A straight line on these axes is a power law; the steeper, the more a "
        "recommender of popular items gets for nothing."
    )
    curve = popularity["curve"]
    if curve is not None:
        figure, axes = plot()
        axes.plot(curve["rank"], curve["interactions"], marker="o", markersize=3, color=_BLUE)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlabel="rank of the item", ylabel="training interactions")
        found.figure(
            figure,
            f"The most popular 1 % of the items have {_percent(popularity['top_1_share'])} of the training "
            f"interactions, 10 % have {_percent(popularity['top_10_share'])}; Gini {popularity['gini']:.3f}; "
            f"{popularity['unseen_items']:,} of {counts['items']:,} items have none.",
        )
    rows = [
        [name, f"{group['items']:,}", _percent(group["item_share"])] for name, group in popularity["groups"].items()
    ]
    found.table(["group", "items", "share of items"], rows, "Each group holds a third of the training interactions.")


def _times(found: Page, times: dict[str, Any] | None) -> None:
    if times is None:
        return
    found.heading("Time")
    found.paragraph("When interactions happened, and how long users waited between two of them.")
    figure, axes = plot()
    if times["unix"]:
        from matplotlib.dates import AutoDateFormatter, AutoDateLocator

        edges: list[Any] = [edge / 86_400 for edge in times["edges"]]  # matplotlib counts days since 1970
        locator = AutoDateLocator(minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(AutoDateFormatter(locator))
        span = f"From {_day(times['first'])} to {_day(times['last'])}, {times['span_days']:,.0f} days"
    else:
        edges = times["edges"]
        span = f"From {times['first']:,.0f} to {times['last']:,.0f}, in a unit that is not unix seconds"
    axes.stairs(times["interactions"], edges, fill=True, color=_BLUE)
    axes.set(xlabel="day (UTC)" if times["unix"] else "time", ylabel="interactions")
    found.figure(figure, f"{span}; half of the interactions come before {_moment(times)}.")
    shares = times["gap_shares"]
    if shares is not None:
        figure, axes = plot(3.2)
        names = list(shares)
        colours = [_ORANGE if name == "none" else _BLUE for name in names]
        axes.barh(names, [100 * shares[name] for name in names], color=colours)
        axes.invert_yaxis()
        axes.set(xlabel="share of a user's neighbouring interactions (%)", ylabel="gap")
        found.figure(
            figure,
            f"Time between an interaction and its user's one before: {_percent(shares['none'])} have none (ties)."
            + (f" {times['backward_gaps']:,} that are below 0 are left out." if times["backward_gaps"] else ""),
        )


def _order(found: Page, report: dict[str, Any]) -> None:
    ids, sensitivity = report["id_order"], report["sensitivity"]
    fixed = {_PARTS[part]: report[key] for part, key in _FIXED.items() if report[key] is not None}
    shown = {_PARTS[part]: 100 * ids[part]["ascending_share"] for part in _PARTS if ids[part] is not None}
    if not shown and not fixed:
        return
    found.heading("Order where time says nothing")
    found.paragraph(
        "Interactions at the same time have no order of their own. If item ids ascend in it, or the same two items "
        "always stand in the same order, it is a store's or a file's, and predicting it is no recommendation."
    )
    if sensitivity is not None:
        found.paragraph(
            f"{_percent(sensitivity['expected_changed_share'])} of {sensitivity['cases']:,} test targets are other "
            "items once ties are put in a random order (expected value; measured: "
            f"{', '.join(_percent(share) for share in sensitivity['measured_changed_shares'])})."
        )
    bars = {f"ids ascend, {name}": share for name, share in shown.items()}
    for name, section in fixed.items():
        bars[f"usual order of a pair, {name}"] = 100 * section["agreeing_share"]
        bars[f"usual order of a pair, {name}, by chance"] = 100 * section["chance_share"]
    figure, axes = plot(1.2 + 0.45 * len(bars))
    chance = [name.endswith("by chance") for name in bars]
    axes.barh(list(bars), list(bars.values()), color=[_GREY if plain else _ORANGE for plain in chance])
    axes.axvline(50, color=_GREY, linestyle="--")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.set(xlabel="share (%); ids by chance: 50 %", ylabel="")
    caption = [f"Ids ascend ({name}) in {share:.1f} %" for name, share in shown.items()]
    caption += [
        f"pairs ({name}) stand in their usual order in {_percent(section['agreeing_share'])}, by chance in "
        f"{_percent(section['chance_share'])} ({section['pairs']:,} pairs of items)"
        for name, section in fixed.items()
    ]
    found.figure(figure, "; ".join(caption) + ".")


def _tables(found: Page, report: dict[str, Any]) -> None:
    repeats, ahead, unseen = report["repeats"], report["look_ahead"], report["unseen"]
    found.heading("Repeats, future and what training lacks")
    rows = [
        ["distinct pairs of user and item that occur again", _percent(repeats["repeated_pair_share"])],
        ["interactions with an item of the user's past", _percent(repeats["repeated_share"])],
        ["interactions with the item just before", _percent(repeats["immediate_share"])],
        ["test items in the user's history", _percent(repeats["test_in_history_share"])],
        ["test items in the user's training", _percent(report["overlap"]["test"]["share"])],
        ["test items that repeat the item just before", _percent(report["history"]["test"]["just_before"]["share"])],
        ["exact copies (user, item, time)", f"{repeats['exact_copies']:,}"],
        ["users with the same sequence twice", f"{repeats['doubled_users']:,}"],
        ["users with another's sequence", f"{report['equal_users']['users']:,}"],
        ["users with another's sequence but for one end", f"{report['equal_users']['near_users']:,}"],
        ["items only in validation or test", f"{unseen['items_only_in_valid_or_test']:,}"],
        ["users asked about without training", f"{unseen['cold_users']:,}"],
        ["items without text", f"{report['text']['without_text']:,}"],
    ]
    if ahead is not None:
        rows += [
            ["others' training later than a test item, mean", _percent(ahead["later_share_mean"])],
            ["others' training later than a test item, median", _percent(ahead["later_share_median"])],
            ["test items that enter training only later", _percent(ahead["later_item_share"])],
        ]
    found.table(["what", "value"], rows)
    leaked = [("own training", example) for example in report["overlap"]["test"]["examples"]]
    leaked += [
        ("own history", example)
        for example in report["history"]["test"]["examples"]
        if ("own training", example) not in leaked
    ]
    if report["seen"] is not None:
        leaked += [("what the model saw", example) for example in report["seen"]["test"]["examples"]]
    if leaked:
        found.table(
            ["test item in", "user", "item", "time"],
            [
                [where, example["user"], example["item"], "" if example["time"] is None else f"{example['time']:.0f}"]
                for where, example in leaked
            ],
            "Some of the test items that were found in training or in the history.",
        )


def _entropy(found: Page, entropy: dict[str, Any]) -> None:
    found.heading("Entropy")
    found.paragraph(
        "How predictable the training sequences are, one after another, in nats. Real entropy S is the Lempel-Ziv "
        "estimate; the Performance Law's effective data are tokens / S. The dictionary variant is what that paper's "
        "code prints."
    )
    drawn = entropy["tokens"] != entropy["tokens_in_all"]
    packed = entropy["compression"]
    rows = [
        ["tokens", f"{entropy['tokens_in_all']:,}"],
        ["tokens looked at", f"{entropy['tokens']:,} of {entropy['users']:,} users" + (" (drawn)" if drawn else "")],
        ["Shannon entropy of items", f"{entropy['shannon']:.4f}"],
        ["approximate entropy, m = 1", f"{entropy['approximate_m1']:.4f}"],
        ["approximate entropy, m = 2", f"{entropy['approximate_m2']:.4f}"],
        ["the same, mean over users", _optional(entropy["approximate_users"]["mean"], ".4f")],
        [f"compression ratio (zstd {packed['level']})", _optional(packed["ratio"], ".3f")],
        ["real entropy S", f"{entropy['real']:.4f}"],
        ["quality S' = 1 / S", _optional(entropy["quality"], ".4f")],
        ["effective data", _optional(entropy["effective_data"], ",.0f")],
        ["dictionary variant of S", f"{entropy['dictionary']:.4f}"],
        ["dictionary variant of S'", _optional(entropy["dictionary_quality"], ".4f")],
    ]
    found.table(["what", "value"], rows)
    if entropy["approximate_users"]["warning"]:
        found.paragraph(entropy["approximate_users"]["warning"])


def _counts(report: dict[str, Any]) -> Iterator[list[str]]:
    for name, value in report["counts"].items():
        yield [_capital(name.replace("_", " ")), f"{value:,}" if isinstance(value, int) else f"{value:.3g}"]
    if report["ties"] is not None:
        yield ["Resolution of times", report["ties"]["resolution"]]
        yield ["Interactions without time", f"{report['ties']['unknown_times']:,}"]


def _protocol(report: dict[str, Any]) -> str:
    protocol = dict(report["split"]["protocol"])
    name = protocol.pop("split", "unnamed")
    return f"{name} ({', '.join(f'{key} {value}' for key, value in protocol.items())})" if protocol else str(name)


def _moment(times: dict[str, Any]) -> str:
    return _day(times["median"]) if times["unix"] else f"{times['median']:,.0f}"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def _optional(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
