"""The page in gradio: inputs, where they stand, and which action each starts; all that is shown comes from `view`."""

from typing import TYPE_CHECKING, Any

from llmrec.demo import view
from llmrec.demo.actions import Actions
from llmrec.demo.session import Session
from llmrec.demo.settings import NAMES, Settings
from llmrec.demo.style import CLICKS

if TYPE_CHECKING:
    import gradio as gr

_KINDS = ("text", "number", "flag")  # of filters' inputs; a list is filtered like a text


def blocks(actions: Actions) -> "gr.Blocks":
    """The page over these actions; needs gradio."""
    import gradio as gr

    defaults = Settings()
    second = actions.second.name if actions.second else ""

    def views(session: Session) -> tuple[str, str, str, str, str]:
        return (
            view.status(session, actions.first.name, second),
            view.catalog(session),
            view.history(session),
            view.chips(session),
            view.results(session),
        )

    def heading(words: str) -> None:
        gr.HTML(f"<h2>{words}</h2>", apply_default_css=False)

    def shown_html(value: str = "") -> gr.HTML:
        return gr.HTML(value, js_on_load=CLICKS, apply_default_css=False)

    page: gr.Blocks = gr.Blocks(title="llmrec demo", analytics_enabled=False)
    with page:
        state = gr.State(Session())  # every visitor gets a copy
        gr.HTML('<h1 class="llmrec-head">Recommendations, step by step</h1>', apply_default_css=False)
        status = shown_html(view.status(Session(), actions.first.name, second))
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                heading("1. Catalog")
                catalog = gr.Dropdown([], label="Catalog", visible=False, interactive=True)
                search = gr.Textbox("", label="Search titles and ids", placeholder="Part of a title", max_lines=1)
                found = shown_html()
            with gr.Column(scale=4, min_width=320):
                heading("2. History")
                with gr.Group(visible=False) as stored:
                    user_id = gr.Textbox(
                        "", label="A user of the server, in the place of the list", placeholder="User id", max_lines=1
                    )
                    take = gr.Button("Copy the user's last items into the list", size="sm")
                history = shown_html()
            with gr.Column(scale=5, min_width=320):
                heading("3. What to ask for")
                with gr.Row():
                    k = gr.Number(defaults.k, label="Items (k)", precision=0, min_width=90)
                    num_beams = gr.Number(0, label="Beams (0: the model's)", precision=0, min_width=90)
                exclude_seen = gr.Checkbox(defaults.exclude_seen, label="Leave out items of the history")
                chips = shown_html()
                with gr.Accordion("Filters", open=False):
                    attribute = gr.Dropdown([], label="Attribute", interactive=True)
                    with gr.Column(visible=False) as of_text:
                        values = gr.Textbox("", label="Values, with commas between them", max_lines=1)
                        negated = gr.Checkbox(False, label="None of these, instead of one of them")
                    with gr.Row(visible=False) as of_number:
                        least = gr.Textbox("", label="At least", max_lines=1, min_width=90)
                        most = gr.Textbox("", label="At most", max_lines=1, min_width=90)
                    with gr.Column(visible=False) as of_flag:
                        flag = gr.Radio(["yes", "no"], label="It is", value="yes")
                    set_filter = gr.Button("Set filter", size="sm")
                with gr.Accordion("More settings", open=False):
                    legal = gr.Checkbox(defaults.legal, label="Probabilities over the legal codes alone")
                    ignore_unknown = gr.Checkbox(
                        defaults.ignore_unknown, label="Skip items that a server does not know"
                    )
                    with gr.Row():
                        cap_levels = gr.Number(0, label="Items that share so many levels …", precision=0, min_width=90)
                        cap_most = gr.Number(0, label="… come so often (0: any)", precision=0, min_width=90)
                    sample = gr.Checkbox(defaults.sample, label="Draw items instead of the best")
                    with gr.Row():
                        temperature = gr.Number(defaults.temperature, label="Temperature of the draw", min_width=90)
                        seed = gr.Number(defaults.seed, label="Seed of the draw", precision=0, min_width=90)
                    adapter = gr.Textbox("", label="Adapter (empty: the model itself)", max_lines=1)
                with gr.Accordion("Compare side by side", open=bool(second)):
                    compare = gr.Checkbox(
                        bool(second), label=f"Also ask {second}" if second else "Also ask for another adapter"
                    )
                    other_adapter = gr.Textbox("", label="Adapter of the second answer", max_lines=1)
                ask = gr.Button("Recommend", variant="primary")
        heading("4. Recommendations")
        results = shown_html(view.results(Session()))

        shown = [status, found, history, chips, results]
        inputs = {
            "k": k,
            "num_beams": num_beams,
            "exclude_seen": exclude_seen,
            "legal": legal,
            "cap_levels": cap_levels,
            "cap_most": cap_most,
            "sample": sample,
            "temperature": temperature,
            "seed": seed,
            "user_id": user_id,
            "ignore_unknown": ignore_unknown,
            "adapter": adapter,
            "compare": compare,
            "other_adapter": other_adapter,
        }
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

        def choices(session: Session) -> tuple[Any, Any]:
            catalogs = [one.name for one in session.catalogs]
            return (
                gr.Dropdown(choices=catalogs, value=session.catalog or None, visible=len(catalogs) > 1),
                gr.Dropdown(choices=list(session.attributes), value=None),
            )

        def open_page(session: Session) -> tuple[Any, ...]:
            keeps = actions.open(session)
            return (*views(session), *choices(session), gr.Group(visible=keeps))

        def click(session: Session, event: gr.EventData) -> tuple[Any, ...]:
            sent = event._data if isinstance(event._data, dict) else {}
            if sent.get("action") == "retry":
                return open_page(session)
            actions.click(session, sent)
            return (*views(session), gr.skip(), gr.skip(), gr.skip())

        def look(session: Session, text: str) -> tuple[Any, ...]:
            actions.search(session, text)
            return views(session)

        def change_catalog(session: Session, name: str) -> tuple[Any, ...]:
            actions.use_catalog(session, name)
            return (*views(session), "", choices(session)[1])

        def inputs_of(session: Session, name: str | None) -> list[Any]:
            kind = session.attributes.get(name or "", "")
            kind = "text" if kind == "list" else kind
            return [gr.update(visible=kind == one) for one in _KINDS]

        def add_filter(session: Session, *given: Any) -> tuple[Any, ...]:
            actions.filter(session, *given)
            return views(session)

        def recommend(session: Session, *given: Any) -> tuple[Any, ...]:
            actions.recommend(session, dict(zip(NAMES, given, strict=True)))
            return views(session)

        def take_stored(session: Session, name: str) -> tuple[Any, ...]:
            actions.take_stored(session, name)
            return views(session)

        whole = [*shown, catalog, attribute, stored]
        page.load(open_page, state, whole, **quiet)
        for part in shown:
            part.click(click, state, whole, **quiet)
        search.change(look, [state, search], shown, trigger_mode="always_last", **quiet)
        search.submit(look, [state, search], shown, **quiet)
        catalog.input(change_catalog, [state, catalog], [*shown, search, attribute], **quiet)
        attribute.change(inputs_of, [state, attribute], [of_text, of_number, of_flag], **quiet)
        set_filter.click(add_filter, [state, attribute, values, negated, least, most, flag], shown, **quiet)
        take.click(take_stored, [state, user_id], shown, **quiet)
        ask.click(recommend, [state, *(inputs[name] for name in NAMES)], shown, api_visibility="private")
        page.queue(default_concurrency_limit=16, max_size=256)
    return page
