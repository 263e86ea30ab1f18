"""The page's colours, measures and its one script."""

# Buttons are found by delegation, so that what a view puts in later works too.
CLICKS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-action]');
  if (button) trigger('click', { action: button.dataset.action, number: button.dataset.number });
});
"""

# Text on paper has a contrast of at least 4.5 to 1 in both schemes.
CSS = """
:root { --llmrec-soft: #59636e; --llmrec-line: #d1d9e0; --llmrec-stripe: #f3f5f8; --llmrec-main: #0a58c2;
  --llmrec-bar: #6aa5f0; --llmrec-edge: #b9c7d6; --llmrec-problem: #b42318; --llmrec-paper: #ffffff;
  --llmrec-ink: #1b1f24; }
.dark { --llmrec-soft: #a3afbb; --llmrec-line: #3a434e; --llmrec-stripe: #1d242c; --llmrec-main: #7ab8ff;
  --llmrec-bar: #3f7fcf; --llmrec-edge: #465565; --llmrec-problem: #ff9385; --llmrec-paper: #12161b;
  --llmrec-ink: #e6e9ed; }
.gradio-container { max-width: 1400px !important; }
.gradio-container main { gap: .6rem; }
h1.llmrec-head { font-size: 1.35rem; font-weight: 650; margin: 0; }
.gradio-container h2 { font-size: 1.05rem; font-weight: 650; margin: .2rem 0 0; }
.gradio-container h3 { font-size: 1rem; font-weight: 650; margin: .4rem 0; }
.llmrec-status, .llmrec-pager, .llmrec-empty { color: var(--llmrec-soft); font-size: .88rem; margin: .3rem 0; }
.llmrec-status span, .llmrec-agreement p span { display: inline-block; margin-right: 1rem; }
.llmrec-status b, .llmrec-agreement b { color: var(--llmrec-ink); font-weight: 600; overflow-wrap: anywhere; }
.llmrec-pager { display: flex; align-items: center; justify-content: space-between; gap: .5rem; }
.llmrec-note { border-left: .3rem solid var(--llmrec-main); background: var(--llmrec-stripe); padding: .5rem .8rem;
  margin: .4rem 0; overflow-wrap: anywhere; }
.llmrec-note.problem { border-color: var(--llmrec-problem); } .llmrec-note.problem b { color: var(--llmrec-problem); }
.gradio-container .llmrec-list { list-style: none; margin: 0; padding: 0; max-height: 24rem; overflow-y: auto; }
.llmrec-list li { display: flex; align-items: center; gap: .4rem; padding: .2rem .1rem; margin: 0;
  border-bottom: 1px solid var(--llmrec-line); }
.llmrec-list .name { flex: 1; min-width: 0; overflow-wrap: anywhere; line-height: 1.3; }
.llmrec-list .place { color: var(--llmrec-soft); min-width: 1.6rem; text-align: right;
  font-variant-numeric: tabular-nums; }
bdi { unicode-bidi: isolate; } .id { color: var(--llmrec-soft); font-size: .8rem; overflow-wrap: anywhere; }
button.llmrec-button { border: 1px solid var(--llmrec-line); border-radius: .35rem; background: var(--llmrec-paper);
  color: var(--llmrec-ink); padding: .15rem .5rem; min-height: 1.75rem; min-width: 1.75rem; font-size: .82rem;
  cursor: pointer; white-space: nowrap; }
button.llmrec-button:hover { border-color: var(--llmrec-main); color: var(--llmrec-main); }
button.llmrec-button:focus-visible, .llmrec-tree:focus-visible, .llmrec-details summary:focus-visible {
  outline: 2px solid var(--llmrec-main); outline-offset: 1px; }
button.llmrec-button.on, button.llmrec-button.main { border-color: var(--llmrec-main); color: var(--llmrec-main);
  font-weight: 600; }
.gradio-container .llmrec-chips { list-style: none; display: flex; flex-wrap: wrap; gap: .4rem; margin: .2rem 0;
  padding: 0; }
.llmrec-chips li { border: 1px solid var(--llmrec-line); border-radius: 1rem; padding: .1rem .2rem .1rem .7rem;
  margin: 0; font-size: .85rem; background: var(--llmrec-stripe); overflow-wrap: anywhere; }
.llmrec-chips button.llmrec-button { border: 0; background: none; }
.llmrec-answers { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.llmrec-answer { min-width: 0; }
@media (min-width: 1000px) { .llmrec-answer:only-child .llmrec-parts { display: grid; gap: 1.5rem;
  grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } }
 .llmrec-answer h3 { overflow-wrap: anywhere; }
.llmrec-scroll { overflow-x: auto; }
.gradio-container table.llmrec-items, .gradio-container table.llmrec-path { border-collapse: collapse; width: 100%;
  font-size: .9rem; margin: .3rem 0; }
.llmrec-items th, .llmrec-items td, .llmrec-path th, .llmrec-path td { padding: .3rem .45rem; text-align: left;
  border: 0; border-bottom: 1px solid var(--llmrec-line); vertical-align: top; line-height: 1.3; }
.llmrec-items th, .llmrec-path th { color: var(--llmrec-soft); font-weight: 600; font-size: .8rem; }
.llmrec-items .title { overflow-wrap: anywhere; }
.llmrec-items .number, .llmrec-path td, .llmrec-path th { font-variant-numeric: tabular-nums; }
.llmrec-items .number { text-align: right; white-space: nowrap; }
.llmrec-items .actions { display: flex; flex-wrap: wrap; gap: .3rem; margin-top: .35rem; }
.llmrec-items td:nth-child(2) { width: 99%; }
@media (max-width: 640px) { .llmrec-items th, .llmrec-items td { padding: .3rem .2rem; }
  h1.llmrec-head { font-size: 1.15rem; } }
.llmrec-items tr.chosen td { background: var(--llmrec-stripe); }
.llmrec-items tr.denied .title { text-decoration: line-through; color: var(--llmrec-soft); }
.llmrec-items .bar { display: block; height: .35rem; margin-top: .3rem; border-radius: .2rem;
  background: var(--llmrec-stripe); }
.llmrec-items .bar span { display: block; height: 100%; min-width: 2px; border-radius: .2rem;
  background: var(--llmrec-bar); }
.llmrec-path caption { text-align: left; font-weight: 600; padding: .3rem 0; }
.llmrec-details { margin-top: .6rem; } .llmrec-details summary { cursor: pointer; font-weight: 600; }
.llmrec-tree { overflow-x: auto; } .llmrec-tree svg { display: block; max-width: none; }
.llmrec-tree .edge { fill: none; stroke: var(--llmrec-edge); }
.llmrec-tree .edge.chosen { stroke: var(--llmrec-main); }
.llmrec-tree rect { fill: var(--llmrec-paper); stroke: var(--llmrec-line); }
.llmrec-tree .root { fill: var(--llmrec-edge); }
.llmrec-tree .node.chosen rect { stroke: var(--llmrec-main); stroke-width: 2; }
.llmrec-tree text { fill: var(--llmrec-ink); font-size: 12px; }
.llmrec-tree .code { text-anchor: middle; font-weight: 600; }
.llmrec-tree .cost { text-anchor: middle; fill: var(--llmrec-soft); font-size: 10.5px; }
.llmrec-tree .title.chosen { fill: var(--llmrec-main); font-weight: 600; }
.llmrec-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
"""
