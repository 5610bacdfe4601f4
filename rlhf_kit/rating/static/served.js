// The served page's host: the interface of a notebook's widget model, over fetch.
import page from "./page.js";

let state;
let listener = () => {};

async function ask(path, options) {
  try {
    const response = await fetch(path, { ...options, cache: "no-store" });
    // What failed on the way has not reached the session, so the same item stays open.
    state = response.ok ? await response.json() : { ...state, error: `Not saved: ${(await response.text()).trim()}.` };
  } catch {
    const error = "Not saved: rlhf-kit rate does not answer. Start it again, and open the address that it prints.";
    state = { ...state, error };
  }
  listener();
}

const model = {
  get: () => state,
  on: (_, update) => { listener = update; },
  off: () => {},
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
