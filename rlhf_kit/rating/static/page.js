// The rating page: one ES module for a notebook (anywidget) and for the served page.
//
// `model` has get("state"), on("change:state", f), off, and send(message); rlhf_kit/rating/session.py says what is in
// the state. Texts of models are only ever set as textContent. An answer carries the number of the showing that it is
// about, and the page waits for the session's word before it shows anything else.

const READING = 250; // ms after an item appears in which nothing is taken: a double click must not judge the next one
const PATIENCE = 2000; // ms without an answer before the page says that it waits
const SETTLING = 1500; // ms in which a new page sees to it that it has the focus

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(Boolean));
  return element;
}

const keyCap = (key) => make("kbd", { "aria-hidden": "true" }, { ArrowLeft: "\u2190" }[key] ?? key);

// A text that can scroll takes the focus, so that the arrow keys can scroll it.
function transcript(name, messages) {
  return make("div", { className: "rk-scroll", tabIndex: 0, role: "group", "aria-label": `${name}, text` },
    ...messages.map(({ role, content }) => make("div", { className: "rk-message" },
      role && make("div", { className: "rk-role" }, role), make("div", { className: "rk-text" }, content))));
}

function clock(seconds) {
  const [hours, minutes, rest] = [seconds / 3600, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  const pad = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${pad(minutes)}:${pad(rest)}` : `${minutes}:${pad(rest)}`;
}

function render({ model, el }) {
  const title = make("h2");
  const progress = make("p", { className: "rk-progress", role: "status", "aria-live": "polite" });
  const bar = make("progress", { "aria-label": "Judged" });
  const alert = make("p", { className: "rk-error", role: "alert", hidden: true });
  const item = make("div", { className: "rk-item", tabIndex: -1, role: "group" });
  const root = make("section", { className: "rk-rating", role: "region", "aria-label": "Rating", tabIndex: -1,
    "data-lm-suppress-shortcuts": "true" }, make("header", {}, title, progress, bar), alert, item);
  el.replaceChildren(root);

  let state = null;
  let waiting = false; // for the session's word
  let ready = 0; // when this item takes its first answer
  let timer;
  let keys, note, strength, picked; // of this item: what keys do, the field, how much better, levels of a ranking
  const radios = `rk-strength-${Math.random()}`; // one group of its own, where a notebook shows two pages

  const busy = (is) => root.setAttribute("aria-busy", String(is));
  const early = () => performance.now() < ready;

  function say(error) {
    alert.textContent = error ?? "";
    alert.hidden = !error;
  }

  function send(message) {
    if (waiting || early()) return;
    waiting = true;
    busy(true);
    timer = setTimeout(() => say("Not saved yet: waiting for Python, which may be busy with another cell."), PATIENCE);
    model.send({ showing: state.showing, note: note?.value ?? "", ...message });
  }

  const answer = (given) => send({ do: "answer", ...given });
  const undo = () => (state.can_undo ? send({ do: "undo", note: "" }) : say("There is no judgment to take back."));

  function button(label, key, act, properties = {}) {
    keys[key] = act;
    const element = make("button", { type: "button", "aria-keyshortcuts": key, ...properties },
      keyCap(key), label && make("span", {}, label));
    // The second click of a double click is about what was here before.
    element.addEventListener("click", (event) => event.detail < 2 && act());
    return element;
  }

  // Rankings: `picked` has a level for each place, in the order of picking; ties have the same level.
  const levels = () => [...new Set(picked.values())].sort((a, b) => a - b);
  const rankOf = (place) => levels().indexOf(picked.get(place)) + 1;
  const complete = () => picked.size === state.completions.length;

  function pick(place) {
    if (early()) return;
    if (!picked.delete(place)) picked.set(place, (levels().at(-1) ?? 0) + 1);
    paint();
    if (complete()) item.querySelector(".rk-confirm").focus();
  }

  function tie() {
    const [before, last] = levels().slice(-2);
    for (const [place, level] of picked) if (level === last) picked.set(place, before);
    paint();
  }

  function back() {
    picked.delete([...picked.keys()].at(-1));
    paint();
  }

  function confirm() {
    if (complete()) answer({ ranks: state.completions.map((_, place) => rankOf(place)) });
    else say(`Rank all ${state.completions.length} answers first: press their numbers, the best one first.`);
  }

  function paint() {
    say(null);
    item.querySelectorAll(".rk-pick").forEach((element, place) => {
      const rank = rankOf(place);
      element.setAttribute("aria-pressed", String(rank > 0));
      element.querySelector("span").textContent = `Answer ${place + 1}${rank ? `: rank ${rank}` : ""}`;
    });
    const tied = (level) => [...picked].filter((pair) => pair[1] === level).map(([place]) => place + 1).join(" = ");
    const order = levels().map(tied).join(" > ");
    item.querySelector(".rk-order").textContent = order ? `Your order: ${order}` : "Press the answers, the best first.";
    const disable = (name, is) => item.querySelector(name).setAttribute("aria-disabled", String(is));
    disable(".rk-confirm", !complete());
    disable(".rk-tie", levels().length < 2);
    disable(".rk-back", !picked.size);
  }

  // What an item looks like
  const isPair = () => state.question === "rank" && state.completions.length === 2;

  function heading() {
    if (state.done) return "All judged";
    if (state.question === "good/bad") return "Is this answer good or bad?";
    if (state.question === "1-7") return "How good is this answer, from 1 to 7?";
    return isPair() ? "Which answer is better?" : "Rank the answers, the best first";
  }

  function card(messages, place) {
    const name = state.question === "rank" ? `Answer ${place + 1}` : "Answer";
    const parts = [make("h3", {}, name), transcript(name, messages)];
    if (isPair()) {
      const best = () => answer({ ranks: place === 0 ? [1, 2] : [2, 1], strength });
      parts.push(button(`${name} is better`, String(place + 1), best));
    } else if (state.question === "rank") {
      parts.push(button(name, String(place + 1), () => pick(place), { className: "rk-pick" }));
    }
    return make("article", { "aria-label": name }, ...parts);
  }

  function choices() {
    if (state.question === "good/bad") {
      [keys["1"], keys["2"]] = [() => answer({ rating: 1 }), () => answer({ rating: 0 })];
      return [button("Good", "g", keys["1"]), button("Bad", "b", keys["2"])];
    }
    if (state.question === "1-7")
      return [1, 2, 3, 4, 5, 6, 7].map((rating) => button({ 1: "worst", 7: "best" }[rating], String(rating),
        () => answer({ rating }), { "aria-label": `${rating} of 7`, className: "rk-digit" }));
    if (isPair()) return [button("Tie", "0", () => answer({ ranks: [1, 1] }))];
    return [button("Ties with the one before", "0", tie, { className: "rk-tie" }),
      button("Take back the last", "Backspace", back, { className: "rk-back" }),
      button("Confirm", "Enter", confirm, { className: "rk-confirm" })];
  }

  function strengths() {
    const choice = (name, i) => {
      const key = ["", "7", "8", "9"][i];
      const shortcut = key && { "aria-keyshortcuts": key };
      const radio = make("input", { type: "radio", name: radios, checked: i === 0, ...shortcut });
      radio.addEventListener("change", () => { strength = i ? name : null; });
      if (key) keys[key] = () => radio.click();
      return make("label", {}, radio, ` ${name} `, key && keyCap(key));
    };
    return make("fieldset", { role: "radiogroup", className: "rk-strengths" },
      make("legend", {}, "How much better? Optional, said first"), ...["not said", ...state.strengths].map(choice));
  }

  const undoButton = () => button("Undo", "ArrowLeft", undo, { "aria-disabled": String(!state.can_undo) });

  function opened() {
    note = make("textarea", { rows: 1, maxLength: 10000, "aria-keyshortcuts": "n" });
    keys.n = () => note.focus();
    const hint = make("small", {}, " kept with your answer; Esc leaves it");
    return [
      make("section", { className: "rk-prompt", "aria-label": "Prompt" }, make("h3", {}, "Prompt"),
        transcript("Prompt", state.prompt)),
      make("div", { className: "rk-answers" }, ...state.completions.map(card)),
      isPair() && strengths(),
      state.completions.length > 2 && make("p", { className: "rk-order", role: "status", "aria-live": "polite" }),
      make("div", { className: "rk-choices", role: "group", "aria-label": "Your answer" }, ...choices()),
      make("footer", {}, make("label", { className: "rk-note" }, make("span", {}, "Note ", keyCap("n"), hint), note),
        undoButton(), button("Skip", "s", () => send({ do: "skip" }))),
    ].filter(Boolean);
  }

  function finished() {
    const counts = `${state.judged - state.skipped} judged, ${state.skipped} skipped`;
    return [make("p", { className: "rk-done" }, "Done. Thank you."),
      make("p", {}, `${counts}, all kept under the name ${state.rater}.`), make("footer", {}, undoButton())];
  }

  function draw() {
    [keys, note, strength, picked] = [{}, null, null, new Map()];
    if (!state.total) return; // the session has not been reached
    title.textContent = heading();
    item.setAttribute("aria-label", state.done ? "End" : `Item ${state.position} of ${state.total}`);
    item.replaceChildren(...(state.done ? finished() : opened()));
    if (state.completions.length > 2) paint();
  }

  function update() {
    const before = state;
    state = model.get("state") ?? {};
    waiting = false;
    clearTimeout(timer);
    const parts = [`${state.done ? state.total : state.position} of ${state.total}`];
    if (state.per_minute) parts.push(`${state.per_minute.toFixed(1)} a minute`);
    if (state.seconds_left) parts.push(`about ${clock(state.seconds_left)} left`);
    progress.textContent = state.total ? parts.join(" \u00b7 ") : "";
    bar.max = state.total ?? 1;
    bar.value = state.judged ?? 0;
    if (before === null || state.showing !== before.showing) {
      draw();
      ready = performance.now() + READING;
      setTimeout(() => busy(false), READING);
      item.focus({ preventScroll: true });
      if (before) root.scrollIntoView({ block: "nearest" });
    } else busy(false); // nothing moved on: what was ticked and noted stays
    say(state.error);
  }

  function onKey(event) {
    event.stopPropagation();
    if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
    const { target } = event;
    if (target === note) {
      if (event.key === "Escape") item.focus({ preventScroll: true });
      return;
    }
    if (target.type === "radio" && event.key.startsWith("Arrow")) return; // the browser moves among the radios
    if (target.tagName === "BUTTON" && event.key === "Enter") return; // and presses the button that has the focus
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    if (!event.repeat && !waiting) act(); // a key that is held down is one press
  }

  root.addEventListener("keydown", onKey);
  // JupyterLab's command mode would take a digit for a heading.
  for (const name of ["keyup", "keypress"]) root.addEventListener(name, (event) => event.stopPropagation());
  model.on("change:state", update);
  busy(true);
  update();
  // JupyterLab attaches a cell's output late, and takes the focus back when the cell has run. Whoever acts, decides.
  const settling = setInterval(() => {
    if (!document.activeElement?.closest(".rk-rating")) item.focus({ preventScroll: true });
  }, 50);
  const settled = () => clearInterval(settling);
  setTimeout(settled, SETTLING);
  const acts = ["keydown", "pointerdown"];
  for (const name of acts) document.addEventListener(name, settled, { capture: true, once: true });
  return () => {
    clearTimeout(timer);
    settled();
    for (const name of acts) document.removeEventListener(name, settled, { capture: true });
    model.off("change:state", update);
  };
}

export default { render };
