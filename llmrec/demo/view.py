"""How the page looks: a session and answers in, HTML out, without a server or gradio.

Titles, ids, names and errors come from catalogs and servers and are escaped by the templates, all of them. The page's
own component takes this HTML as a value, never as a template: gradio evaluates what stands in `${}` of a template.
"""

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from llmrec.demo import text
from llmrec.demo.comparison import agreement
from llmrec.demo.servers import Answer
from llmrec.demo.session import PAGE_ITEMS, Item, Session
from llmrec.demo.settings import described
from llmrec.demo.tree import drawing, path_table
from llmrec.service.schema import RecommendedItem

MAX_ROWS = 100  # rows of a table that is drawn; a thousand would be no page
_TITLE, _ID = 160, 60  # characters


def _plain(value: object) -> object:
    """Every text that a template puts out can be written; markup was made here, of such texts."""
    return text.readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = Environment(
    autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_plain
)
_MACROS = """\
{% macro button(action, number, label, shown, style="") %}
<button type="button" class="llmrec-button {{ style }}" data-action="{{ action }}" data-number="{{ number }}" \
aria-label="{{ label }}" title="{{ label }}">{{ shown }}</button>
{% endmacro %}
{% macro name(item) %}
<bdi class="title">{{ item.title|short(160) }}</bdi>{% if item.title != item.id %} \
<bdi class="id">{{ item.id|short(60) }}</bdi>{% endif %}
{% endmacro %}
"""
_ENVIRONMENT.filters |= {
    "short": text.shortened,
    "log": text.log_probability,
    "percent": text.probability,
    "duration": text.milliseconds,
}

_STATUS = _ENVIRONMENT.from_string(
    _MACROS
    + """\
{% if problem %}
<p class="llmrec-note problem" role="alert"><b>Not now:</b> {{ problem }}
{% if retry %}{{ button("retry", 0, "Ask the server again", "Try again", "main") }}{% endif %}</p>
{% endif %}
{% if state %}
<p class="llmrec-status" role="status"><span>Server <b>{{ server }}</b></span>\
{% if other %} <span>and <b>{{ other }}</b></span>{% endif %} <span>catalog <b>{{ state.name|short(60) }}</b></span> \
<span>version <b>{{ state.version|short(24) }}</b></span> \
<span><b>{{ "{:,}".format(state.live) }}</b> items{% if state.items != state.live %} \
(and {{ "{:,}".format(state.items - state.live) }} retired){% endif %}</span> \
<span><b>{{ state.levels }}</b> ID levels</span></p>
{% elif not problem %}
<p class="llmrec-status">Asking {{ server }} …</p>
{% endif %}
"""
)

_CATALOG = _ENVIRONMENT.from_string(
    _MACROS
    + """\
{% if rows %}
<ul class="llmrec-list" aria-label="Items of the catalog">
{% for number, item, retired in rows %}
<li><span class="name">{{ name(item) }}{% if retired %} <span class="id">retired</span>{% endif %}</span>
{{ button("add", number, "Add " ~ item.title|short(80) ~ " to the history", "Add") }}</li>
{% endfor %}
</ul>
<p class="llmrec-pager">{{ button("turn", -1, "Previous items", "‹ Previous") if first > 1 else "" }}
<span role="status">{{ "{:,}".format(first) }}–{{ "{:,}".format(last) }} of {{ "{:,}".format(total) }}</span>
{{ button("turn", 1, "Next items", "Next ›") if last < total else "" }}</p>
{% elif search %}
<p class="llmrec-empty" role="status">No item has “{{ search|short(80) }}” in its title or id.</p>
{% else %}
<p class="llmrec-empty">No items yet.</p>
{% endif %}
"""
)

_HISTORY = _ENVIRONMENT.from_string(
    _MACROS
    + """\
{% if entries %}
<ol class="llmrec-list" aria-label="History, oldest first">
{% for entry in entries %}
<li><span class="place">{{ loop.index }}</span><span class="name">{{ name(entry.item) }}</span>
{% if not loop.first %}{{ button("up", entry.key, "Move " ~ entry.item.title|short(80) ~ " up", "↑") }}{% endif %}
{{ button("remove", entry.key, "Remove " ~ entry.item.title|short(80) ~ " from the history", "×") }}</li>
{% endfor %}
</ol>
<p class="llmrec-pager"><span>{{ entries|length }} item{{ "" if entries|length == 1 else "s" }}, oldest first</span>
{{ button("clear", 0, "Empty the history", "Clear") }}</p>
{% else %}
<p class="llmrec-empty">Empty: the model answers what it expects of a new user. Add items from the catalog.</p>
{% endif %}
"""
)

_CHIPS = _ENVIRONMENT.from_string(
    _MACROS
    + """\
{% if filters or denied %}
<ul class="llmrec-chips" aria-label="Filters and items not wanted">
{% for said in filters %}
<li><bdi>{{ said|short(120) }}</bdi> \
{{ button("unfilter", loop.index0, "Remove the filter " ~ said|short(80), "×") }}</li>
{% endfor %}
{% for number, item in denied %}
<li class="denied">not <bdi>{{ item.title|short(60) }}</bdi> \
{{ button("allow", number, "Allow " ~ item.title|short(80) ~ " again", "×") }}</li>
{% endfor %}
</ul>
{% else %}
<p class="llmrec-empty">No filters, and nothing that is not wanted.</p>
{% endif %}
"""
)

_ANSWER = _ENVIRONMENT.from_string(
    _MACROS
    + """\
<section class="llmrec-answer" aria-label="Recommendations of {{ answer.label }}">
{% if heading %}
<h3>{{ heading }}</h3>
{% endif %}
{% if answer.response is none %}
<p class="llmrec-note problem" role="alert"><b>No answer:</b> {{ answer.error }} \
{{ button("again", 0, "Ask again", "Try again", "main") }}</p>
{% else %}
<p class="llmrec-status" role="status"><span><b>{{ answer.seconds|duration }}</b> there and back</span> \
<span>model <b>{{ answer.response.model|short(60) }}</b></span> \
<span>catalog <b>{{ answer.response.catalog|short(60) }}</b></span> \
<span>version <b>{{ answer.response.catalog_version|short(24) }}</b></span></p>
{% if not rows %}
<p class="llmrec-empty" role="status">No item is left to recommend. Loosen the filters, or allow more items.</p>
{% else %}
<div class="llmrec-parts"><div class="llmrec-scroll"><table class="llmrec-items">
<thead><tr><th scope="col">#</th><th scope="col">Item</th><th scope="col" class="number">Probability</th>
{% if moves %}<th scope="col">Against A</th>{% endif %}</tr></thead><tbody>
{% for row in rows %}
<tr class="{{ "denied" if row.denied }} {{ "chosen" if row.chosen }}"><td class="number">{{ row.item.rank }}</td>
<td>{{ name(row.item) }}<span class="bar" aria-hidden="true"><span style="width:{{ row.bar }}%"></span></span>
<span class="actions">\
{{ button("choose", row.number, "Mark the path of " ~ row.item.title|short(80), "Path", "on" if row.chosen else "") }}
{{ button("add", row.number, "Add " ~ row.item.title|short(80) ~ " to the history", "Add") }}
{% if row.denied %}{{ button("allow", row.number, "Allow " ~ row.item.title|short(80) ~ " again", "Undo") }}{% else %}\
{{ button("deny", row.number, "Do not recommend " ~ row.item.title|short(80), "Not this") }}{% endif %}</span></td>
<td class="number">{{ row.item.log_probability|percent }}<br>\
<span class="id">log p {{ row.item.log_probability|log }}</span></td>
{% if moves %}<td>{{ row.moved }}</td>{% endif %}</tr>
{% endfor %}
</tbody></table>
{% if more > 0 %}
<p class="llmrec-empty">And {{ more }} more, which the page does not draw.</p>
{% endif %}
</div>
<details class="llmrec-details" open><summary>Path through the ID levels</summary>
{% if drawn %}
<p class="llmrec-empty">Each node is a code with its log-probability; wide lines lead to the probable items.\
{% if not path %} “Path” marks one item.{% endif %}</p>
{{ drawn }}{{ path }}
{% else %}
<p class="llmrec-empty">The server sent no semantic IDs.</p>
{% endif %}
</details></div>
{% endif %}
{% endif %}
</section>
"""
)

_RESULTS = _ENVIRONMENT.from_string(
    """\
{% if not answers %}
<p class="llmrec-empty">Build a history, then press Recommend.</p>
{% else %}
{% if stale %}
<p class="llmrec-note" role="status">History, filters or unwanted items have changed since. Press Recommend.</p>
{% endif %}
{% if overlaps %}
<section class="llmrec-agreement" aria-label="Agreement"><h3>Agreement</h3>
<p role="status">{% for depth, common in overlaps %}<span>first {{ depth }}: <b>{{ common }} of {{ depth }}</b> \
in both ({{ "%d"|format((100 * common / depth)|round) }} %)</span>{% endfor %}</p>
{% if gone %}
<p>Only in A: {% for move in gone %}<bdi>{{ move.title|short(60) }}</bdi> (was {{ move.first }})\
{{ ", " if not loop.last }}{% endfor %}{% if hidden %}, and {{ hidden }} more{% endif %}.</p>
{% endif %}
</section>
{% endif %}
<div class="llmrec-answers">{% for part in parts %}{{ part }}{% endfor %}</div>
{% endif %}
"""
)


def status(session: Session, server: str, other: str = "") -> str:
    """The line on the server, and what is wrong, if something is."""
    return _STATUS.render(problem=session.problem, retry=session.lost, state=session.state, server=server, other=other)


def catalog(session: Session) -> str:
    """The page of the catalog that was searched for."""
    rows = [
        (session.number(item := Item(found.id, found.title or found.id)), item, found.retired)
        for found in session.found.items[:PAGE_ITEMS]
    ]
    first = session.offset + 1
    return _CATALOG.render(
        rows=rows, first=first, last=first + len(rows) - 1, total=session.found.total, search=session.search
    )


def history(session: Session) -> str:
    """The history, oldest first."""
    return _HISTORY.render(entries=session.history)


def chips(session: Session) -> str:
    """The filters, and what is not wanted."""
    return _CHIPS.render(
        filters=[described(name, condition) for name, condition in session.filters.items()],
        denied=[(session.number(item), item) for item in session.denied.values()],
    )


def results(session: Session) -> str:
    """One answer, or two side by side with how far they agree; what is not wanted is struck out."""
    answers = session.answers
    both = [answer.response.items for answer in answers if answer.response is not None]
    compared = agreement(*both) if len(both) == 2 else None
    gone = [move for move in compared.moves if move.second is None] if compared else []
    parts = []
    for place, answer in enumerate(answers):
        heading = f"{'AB'[place]}: {answer.label}" if len(answers) > 1 else ""
        moves = {move.id: move.in_words for move in compared.moves} if compared and place == 1 else {}
        parts.append(Markup(_answer(session, answer, heading, moves)))
    return _RESULTS.render(
        answers=answers,
        stale=session.stale,
        overlaps=compared.overlaps if compared else [],
        gone=gone[:10],
        hidden=len(gone) - 10 if len(gone) > 10 else 0,
        parts=parts,
    )


def _answer(session: Session, answer: Answer, heading: str, moves: dict[str, str]) -> str:
    items: list[RecommendedItem] = [] if answer.response is None else answer.response.items
    best = max((item.log_probability for item in items), default=0.0)
    rows = [
        {
            "item": item.model_copy(update={"title": item.title or item.id}),
            "number": session.number(Item(item.id, item.title or item.id)),
            "denied": item.id in session.denied,
            "chosen": item.id == session.chosen,
            "moved": moves.get(item.id, ""),
            "bar": round(100 * text.exponential(item.log_probability - best), 1),
        }
        for item in items[:MAX_ROWS]
    ]
    path = next((path_table(item) for item in items if item.id == session.chosen), Markup(""))
    return _ANSWER.render(
        answer=answer,
        heading=heading,
        rows=rows,
        moves=moves,
        more=len(items) - MAX_ROWS,
        drawn=drawing(items, session.chosen),
        path=path,
    )
