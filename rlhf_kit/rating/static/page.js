// The rating page: one ES module for a notebook (anywidget) and for the served page.
//
// `model` has get("state"), on("change:state", f), off, and send(message); rlhf_kit/rating/session.py says what is in
// the state. Texts of models are only ever set as textContent. An answer carries the number of the showing that it is
// about, and the page waits for the session's word before it shows anything else.

const READING = 250; // ms after an item appears in which nothing is taken: a double click must not judge the next one
const PATIENCE = 2000; // ms without an answer before the page says that it waits
const SETTLING = 1500; // ms in which a new page sees to it that it has the focus
const STRENGTH_KEYS = ["7", "8", "9"];
const QUESTIONS = { "good/bad": "Is this answer good or bad?", "1-7": "How good is this answer, from 1 to 7?" };

const KEPT = (event) => event.stopPropagation(); // JupyterLab's command mode would take a digit for a heading

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function button(label, key, act, properties = {}) {
  const short = { ArrowLeft: "\u2190" }[key] ?? key;
  const hint = key ? make("kbd", { "aria-hidden": "true" }, short) : null;
  const element = make("button", { type: "button", ...properties }, hint, label ? make("span", {}, label) : null);
  if (key) element.setAttribute("aria-keyshortcuts", key);
  // The second click of a double click is about what was here before.
  element.addEventListener("click", (event) => event.detail < 2 && act());
  return element;
}

function transcript(turns) {
  return turns.map(({ role, content }) =>
    make("div", { className: "rk-turn" }, role ? make("div", { className: "rk-role" }, role) : null,
      make("div", { className: "rk-text" }, content)));
}

// A text that can scroll takes the focus, so that the arrow keys can scroll it.
function readable(name, turns) {
  return make("div", { className: "rk-scroll", tabIndex: 0, role: "group", "aria-label": name }, ...transcript(turns));
}

function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  const rest = String(whole % 60).padStart(2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

function render({ model, el }) {
  const root = make("section", { className: "rk-rating", role: "region", "aria-label": "Rating", tabIndex: -1 });
  root.dataset.lmSuppressShortcuts = "true";
  const title = make("h2", {});
  const progress = make("p", { className: "rk-progress", role: "status", "aria-live": "polite" });
  const bar = make("progress", { "aria-label": "Judged" });
  const alert = make("p", { className: "rk-error", role: "alert", hidden: true });
  const item = make("div", { className: "rk-item", tabIndex: -1, role: "group" });
  root.append(make("header", {}, title, progress, bar), alert, item);
  el.replaceChildren(root);

  let state = {};
  let keys = {}; // what a key does on this item
  let waiting = false;
  let ready = 0; // when this item takes its first answer
  let timer;
  let note;
  let strength = null;
  const radios = `rk-strength-${Math.random()}`; // one group of its own, where a notebook shows two pages
  let places = []; // of a ranking: groups of completions, the best first

  const busy = (is) => root.setAttribute("aria-busy", String(is));

  function say(error) {
    alert.textContent = error ?? "";
    alert.hidden = !error;
  }

  function send(message) {
    if (waiting || performance.now() < ready) return;
    waiting = true;
    busy(true);
    clearTimeout(timer);
    timer = setTimeout(() => say("Not saved yet: waiting for Python, which may be busy with another cell."), PATIENCE);
    model.send({ showing: state.showing, note: note?.value ?? "", ...message });
  }

  const answer = (given) => send({ do: "answer", ...given });
  const best = (place) => answer({ ranks: place === 0 ? [1, 2] : [2, 1], strength });

  // Rankings ------------------------------------------------------------------------------------------------------

  const rankOf = (place) => places.findIndex((group) => group.includes(place)) + 1;
  const complete = () => places.flat().length === state.completions.length;

  function pick(place) {
    if (performance.now() < ready) return;
    if (rankOf(place)) unpick(place);
    else places.push([place]);
    paint();
    if (complete()) item.querySelector(".rk-confirm").focus();
  }

  function unpick(place) {
    places = places.map((group) => group.filter((other) => other !== place)).filter((group) => group.length);
  }

  function tie() {
    if (places.length < 2) return;
    const last = places.pop();
    places.at(-1).push(...last);
    paint();
  }

  function back() {
    const last = places.at(-1)?.at(-1);
    if (last !== undefined) unpick(last);
    paint();
  }

  function confirm() {
    if (complete()) answer({ ranks: state.completions.map((_, place) => rankOf(place)) });
    else say(`Rank all ${state.completions.length} answers first: press their numbers, the best one first.`);
  }

  function paint() {
    say(null);
    item.querySelectorAll(".rk-pick").forEach((pick, place) => {
      const rank = rankOf(place);
      pick.setAttribute("aria-pressed", String(rank > 0));
      pick.querySelector("span").textContent = rank ? `Answer ${place + 1}: rank ${rank}` : `Answer ${place + 1}`;
    });
    const said = places.map((group) => group.map((place) => place + 1).join(" = ")).join(" > ");
    item.querySelector(".rk-order").textContent = said ? `Your order: ${said}` : "Press the answers, the best first.";
    item.querySelector(".rk-confirm").setAttribute("aria-disabled", String(!complete()));
    item.querySelector(".rk-tie").setAttribute("aria-disabled", String(places.length < 2));
    item.querySelector(".rk-back").setAttribute("aria-disabled", String(!places.length));
  }

  // What an item looks like -----------------------------------------------------------------------------------------

  function choices() {
    const n = state.completions.length;
    const row = make("div", { className: "rk-choices", role: "group", "aria-label": "Your answer" });
    const add = (label, key, act, properties) => {
      keys[key] = act;
      row.append(button(label, key, act, properties));
    };
    if (state.question === "good/bad") {
      add("Good", "g", () => answer({ rating: 1 }));
      add("Bad", "b", () => answer({ rating: 0 }));
      [keys["1"], keys["2"]] = [keys.g, keys.b];
    } else if (state.question === "1-7") {
      for (let rating = 1; rating <= 7; rating++)
        add({ 1: "worst", 7: "best" }[rating] ?? "", String(rating), () => answer({ rating }),
          { "aria-label": `${rating} of 7`, className: "rk-digit" });
    } else if (n === 2) {
      add("Tie", "0", () => answer({ ranks: [1, 1] }));
    } else {
      add("Ties with the one before", "0", tie, { className: "rk-tie" });
      add("Take back the last", "Backspace", back, { className: "rk-back" });
      add("Confirm", "Enter", confirm, { className: "rk-confirm" });
      return [make("p", { className: "rk-order", role: "status", "aria-live": "polite" }), row];
    }
    return n === 2 ? [strengths(), row] : [row];
  }

  function strengths() {
    const group = make("fieldset", { role: "radiogroup", className: "rk-strengths" },
      make("legend", {}, "How much better? Optional, said first"));
    ["not said", ...state.strengths].forEach((name, i) => {
      const radio = make("input", { type: "radio", name: radios, checked: i === 0 });
      radio.addEventListener("change", () => { strength = i ? name : null; });
      const key = STRENGTH_KEYS[i - 1];
      if (key) {
        radio.setAttribute("aria-keyshortcuts", key);
        keys[key] = () => { radio.checked = true; strength = name; };
      }
      group.append(make("label", {}, radio, ` ${name} `, key ? make("kbd", { "aria-hidden": "true" }, key) : null));
    });
    return group;
  }

  function answers() {
    const columns = make("div", { className: "rk-answers" });
    const ranked = state.question === "rank";
    state.completions.forEach((turns, place) => {
      const name = ranked ? `Answer ${place + 1}` : "Answer";
      const card = make("article", { "aria-label": name }, make("h3", {}, name), readable(`${name}, text`, turns));
      if (ranked) {
        const [key, pair] = [String(place + 1), state.completions.length === 2];
        keys[key] = pair ? () => best(place) : () => pick(place);
        card.append(button(pair ? `${name} is better` : name, key, keys[key],
          pair ? { className: "rk-best" } : { className: "rk-pick", "aria-pressed": "false" }));
      }
      columns.append(card);
    });
    return columns;
  }

  function footer() {
    note = make("textarea", { rows: 1, maxLength: 10000, "aria-keyshortcuts": "n" });
    keys.n = () => note.focus();
    keys.s = () => send({ do: "skip" });
    keys.ArrowLeft = undo;
    return make("footer", {},
      make("label", { className: "rk-note" }, make("span", {}, "Note ", make("kbd", { "aria-hidden": "true" }, "n"),
        make("small", {}, " kept with your answer; Esc leaves it")), note),
      button("Undo", "ArrowLeft", undo, { "aria-disabled": String(!state.can_undo) }),
      button("Skip", "s", keys.s));
  }

  const undo = () => (state.can_undo ? send({ do: "undo", note: "" }) : say("There is no judgment to take back."));

  function finished() {
    keys.ArrowLeft = undo;
    const judged = state.judged - state.skipped;
    return [make("p", { className: "rk-done" }, "Done. Thank you."),
      make("p", {}, `${judged} judged, ${state.skipped} skipped, all kept under the name ${state.rater}.`),
      make("footer", {}, button("Undo", "ArrowLeft", undo, { "aria-disabled": String(!state.can_undo) }))];
  }

  function heading() {
    if (state.question !== "rank") return QUESTIONS[state.question] ?? "Rating";
    return state.completions.length === 2 ? "Which answer is better?" : "Rank the answers, the best first";
  }

  function lost() {
    return [make("footer", {}, button("Try again", "", () => send({ do: "look" })))];
  }

  function draw() {
    keys = {};
    note = null;
    strength = null;
    places = [];
    const open = state.showing != null;
    title.textContent = state.done ? "All judged" : open ? heading() : "Rating";
    item.setAttribute("aria-label", open ? `Item ${state.position} of ${state.total}` : "End");
    if (open) {
      item.replaceChildren(
        make("section", { className: "rk-prompt", "aria-label": "Prompt" }, make("h3", {}, "Prompt"),
          readable("Prompt, text", state.prompt)),
        answers(), ...choices(), footer());
      if (item.querySelector(".rk-order")) paint();
    } else item.replaceChildren(...(state.done ? finished() : lost()));
  }

  function update() {
    const before = state.showing;
    const first = state.turn === undefined;
    state = model.get("state") ?? {};
    waiting = false;
    clearTimeout(timer);
    const parts = state.total ? [state.done ? `${state.total} of ${state.total}` : `${state.position} of ${state.total}`] : [];
    if (state.per_minute) parts.push(`${state.per_minute.toFixed(1)} a minute`);
    if (state.seconds_left) parts.push(`about ${clock(state.seconds_left)} left`);
    progress.textContent = parts.join(" \u00b7 ");
    bar.max = state.total ?? 1;
    bar.value = state.judged ?? 0;
    if (first || state.showing !== before || state.showing == null) {
      draw();
      ready = performance.now() + READING;
      setTimeout(() => busy(false), READING);
      item.focus({ preventScroll: true });
      if (!first) root.scrollIntoView({ block: "nearest" });
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
  root.addEventListener("keyup", KEPT);
  root.addEventListener("keypress", KEPT);
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
