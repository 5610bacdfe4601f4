// The rating page: one ES module, for a notebook cell (anywidget calls `render`) and for the served page (at the end).
// `model` has get("state"), on("change:state", f) and send(message); session.py makes the state. Texts are only ever
// set as text, never as HTML. The page shows the next item when the session has kept the answer.

const READING = 250; // ms after an item appears in which nothing is taken: a double click must not judge the next one
const PATIENCE = 2000; // ms without an answer before the page says that it waits
const SETTLING = 1500; // ms in which a new page sees to it that it has the focus

const HEADINGS = {
  pair: "Which answer is better?",
  rank: "Rank the answers, the best first",
  "good/bad": "Is this answer good or bad?",
  "1-7": "How good is this answer, from 1 to 7?",
};

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter(Boolean));
  return element;
}

const keyCap = (key) => make("kbd", { ariaHidden: "true" }, key === "ArrowLeft" ? "\u2190" : key);

// A text that can scroll takes the focus, so that the arrow keys can scroll it.
function card(name, messages, ...controls) {
  const parts = messages.map(({ role, content }) => make("div", { className: "rk-message" },
    role && make("h3", {}, role), make("div", { className: "rk-text" }, content)));
  const text = { className: "rk-scroll", tabIndex: 0, role: "group", ariaLabel: `${name}, text` };
  return make("article", { ariaLabel: name }, make("h3", {}, name), make("div", text, ...parts), ...controls);
}

function render({ model, el, keyboard }) {
  const header = make("header", { className: "rk-row" });
  const alert = make("p", { className: "rk-error", role: "alert" });
  const item = make("div", { className: "rk-item", tabIndex: -1, role: "group" });
  const root = make("section", { className: "rk-rating", role: "region", ariaLabel: "Rating", tabIndex: -1 },
    header, alert, item);
  root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's command mode would take a digit for a heading
  el.replaceChildren(root);

  let state, timer;
  // Of this item: what keys do, the field, how it is asked about, how much better, the ranking so far.
  let keys = {}, note, kind, strength, groups;

  const focus = () => item.focus({ preventScroll: true });
  const say = (error) => { alert.textContent = error ?? ""; };
  const answer = (given) => send({ do: "answer", ...given });

  function send(message) {
    root.ariaBusy = "true";
    timer = setTimeout(() => say("Not saved yet: waiting for Python, which may be busy with another cell."), PATIENCE);
    model.send({ showing: state.showing, note: note?.value, ...message });
  }

  function button(label, key, act, properties) {
    keys[key] = () => root.ariaBusy === "true" || act();
    const element = make("button", { type: "button", ariaKeyShortcuts: key, ...properties },
      keyCap(key), label && make("span", {}, label));
    // The second click of a double click is about what was here before.
    element.addEventListener("click", (event) => event.detail < 2 && keys[key]());
    return element;
  }

  // A ranking is a list of groups of places, the best group first; the places of a group tie.
  const rankOf = (place) => groups.findIndex((group) => group.includes(place)) + 1;
  const complete = () => groups.flat().length === state.completions.length;
  const without = (place) => groups.map((group) => group.filter((each) => each !== place));

  function rank(changed) {
    groups = changed.filter((group) => group.length);
    say(null);
    item.querySelectorAll(".rk-pick").forEach((element, place) => {
      element.ariaPressed = String(rankOf(place) > 0);
      element.lastChild.textContent = `Answer ${place + 1}${rankOf(place) ? `: rank ${rankOf(place)}` : ""}`;
    });
    const order = groups.map((group) => group.map((place) => place + 1).join(" = ")).join(" > ");
    item.querySelector(".rk-order").textContent = order ? `Your order: ${order}` : "Press the answers, the best first.";
    if (complete()) item.querySelector(".rk-confirm").focus();
  }

  function completion(messages, place) {
    const name = state.question === "rank" ? `Answer ${place + 1}` : "Answer";
    const better = () => answer({ ranks: place ? [2, 1] : [1, 2], strength });
    const pick = () => rank(rankOf(place) ? without(place) : [...groups, [place]]);
    return card(name, messages,
      kind === "pair" && button(`${name} is better`, `${place + 1}`, better),
      kind === "rank" && button(name, `${place + 1}`, pick, { className: "rk-pick", ariaPressed: "false" }));
  }

  function choices() {
    const rate = (rating) => () => answer({ rating });
    if (kind === "good/bad") return [button("Good", "g", rate(1)), button("Bad", "b", rate(0))];
    if (kind === "1-7")
      return [1, 2, 3, 4, 5, 6, 7].map((rating) =>
        button({ 1: "worst", 7: "best" }[rating], `${rating}`, rate(rating), { ariaLabel: `${rating} of 7` }));
    if (kind === "pair") return [button("Tie", "0", () => answer({ ranks: [1, 1] }))];
    const confirm = () => complete()
      ? answer({ ranks: state.completions.map((_, place) => rankOf(place)) })
      : say(`Rank all ${state.completions.length} answers first: press their numbers, the best one first.`);
    return [
      button("Ties with the one before", "0", () => rank([...groups.slice(0, -2), groups.slice(-2).flat()])),
      button("Take back the last", "Backspace", () => rank(without(groups.flat().at(-1)))),
      button("Confirm", "Enter", confirm, { className: "rk-confirm" }),
    ];
  }

  function strengths() {
    const buttons = state.strengths.map((name, i) => button(name, `${7 + i}`, () => {
      strength = strength === name ? null : name;
      buttons.forEach((each, j) => { each.ariaPressed = String(state.strengths[j] === strength); });
    }, { ariaPressed: "false" }));
    const label = make("span", { className: "rk-quiet" }, "How much better? Optional, said first");
    return make("div", { className: "rk-row", role: "group", ariaLabel: label.textContent }, label, ...buttons);
  }

  function opened() {
    note = make("textarea", { rows: 1, maxLength: 10000, ariaKeyShortcuts: "n" });
    keys.n = () => note.focus();
    const hint = ["Note ", keyCap("n"), " kept with your answer; Esc leaves it"];
    return [
      card("Prompt", state.prompt),
      make("div", { className: "rk-answers" }, ...state.completions.map(completion)),
      kind === "pair" && strengths(),
      kind === "rank" && make("p", { className: "rk-order", role: "status" }, "Press the answers, the best first."),
      make("div", { className: "rk-row", role: "group", ariaLabel: "Your answer" }, ...choices()),
      make("footer", { className: "rk-row" }, make("label", { className: "rk-quiet" }, ...hint, note), undo(),
        button("Skip", "s", () => send({ do: "skip" }))),
    ];
  }

  const undo = () => button("Undo", "ArrowLeft", () => send({ do: "undo" }));

  function draw() {
    [keys, note, strength, groups] = [{}, null, null, []];
    const done = state.judged === state.total;
    kind = state.question === "rank" && state.completions.length === 2 ? "pair" : state.question;
    const counts = `${state.judged - state.skipped} judged, ${state.skipped} skipped`;
    const end = `Done. Thank you. ${counts}, all kept under the name ${state.rater}.`;
    header.replaceChildren(make("h2", {}, done ? "All judged" : HEADINGS[kind]),
      make("p", { className: "rk-quiet", role: "status" }, state.progress),
      make("progress", { ariaLabel: "Judged", max: state.total, value: state.judged }));
    item.ariaLabel = done ? "End" : `Item ${state.judged + 1} of ${state.total}`;
    item.replaceChildren(...(done ? [make("p", {}, end), make("footer", {}, undo())] : opened().filter(Boolean)));
  }

  function update() {
    const before = state;
    state = model.get("state");
    clearTimeout(timer);
    const moved = state.showing !== before?.showing;
    setTimeout(() => { root.ariaBusy = "false"; }, moved ? READING : 0);
    if (moved) { // otherwise the item stays with its note and its ranking
      draw();
      focus();
      if (before) root.scrollIntoView({ block: "nearest" });
    }
    say(state.error);
  }

  function onKey(event) {
    event.stopPropagation();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === note) {
      if (event.key === "Escape") focus();
      return;
    }
    const act = keys[event.key] ?? keys[event.key.toLowerCase()];
    if (!act || (event.target.tagName === "BUTTON" && event.key === "Enter")) return; // the browser presses the button
    event.preventDefault();
    if (!event.repeat) act(); // a key that is held down is one press
  }

  (keyboard ?? root).addEventListener("keydown", onKey);
  model.on("change:state", update);
  root.ariaBusy = "true";
  update();
  // JupyterLab attaches a cell's output late, and takes the focus back when the cell has run. Whoever acts, decides.
  const settling = setInterval(() => document.activeElement?.closest(".rk-rating") || focus(), 50);
  const settled = () => clearInterval(settling);
  setTimeout(settled, SETTLING);
  for (const act of ["keydown", "pointerdown"]) document.addEventListener(act, settled, { capture: true, once: true });
}

// The served page: fetch in place of a notebook's model, and the keyboard of the whole page.
async function serve(el) {
  let state;
  let update = () => {};
  async function ask(path, options) {
    const answer = await fetch(path, options).then((response) => response.ok && response.json()).catch(() => null);
    const error = "Not saved: rlhf-kit rate does not answer. Start it again, and open the address that it prints.";
    state = answer || { ...state, error };
    update();
  }
  const send = (message) => ask("act", { method: "POST", body: JSON.stringify(message) });
  await ask("state");
  render({ model: { get: () => state, on: (_, changed) => { update = changed; }, send }, el, keyboard: document });
}

if (document.body.className === "rk-served") serve(document.body);

export default { render };
