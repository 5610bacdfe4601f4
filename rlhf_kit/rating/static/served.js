// The served page's host: the interface of a notebook's widget model, over fetch.
import page from "./page.js";

let state;
const listeners = [];

async function ask(path, options) {
  let failure = null;
  try {
    const response = await fetch(path, { ...options, cache: "no-store" });
    if (response.ok) state = await response.json();
    else failure = `Not saved: ${(await response.text()).trim()}.`;
  } catch {
    failure = "Not saved: rlhf-kit rate does not answer. Start it again, and open the address that it prints.";
  }
  // What failed on the way has not reached the session, so the same item stays open.
  if (failure) state = { ...state, error: failure, turn: `${state?.turn}+` };
  for (const listener of listeners) listener();
}

const model = {
  get: () => state,
  on: (_, listener) => listeners.push(listener),
  off: (_, listener) => listeners.splice(listeners.indexOf(listener), 1),
  send: (message) =>
    ask("act", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(message) }),
};

await ask("state");
page.render({ model, el: document.getElementById("page") });

// Here the page is all there is, so a key pressed beside it is meant for it.
document.addEventListener("keydown", (event) => {
  if (event.target === document.body)
    document.querySelector(".rk-rating").dispatchEvent(new KeyboardEvent("keydown", event));
});
