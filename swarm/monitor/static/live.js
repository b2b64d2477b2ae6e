/* The state, whole once and then by JSON merge patches (RFC 7396) from the stream of changes. */

const FIRST_WAIT = 1000; // ms before the first new try; it doubles
const LONGEST_WAIT = 30000;

export function merge(target, patch) {
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete target[key];
    else if (typeof value === "object" && !Array.isArray(value)) {
      const inner = target[key];
      const fits = inner && typeof inner === "object" && !Array.isArray(inner);
      target[key] = merge(fits ? inner : {}, value);
    } else target[key] = value;
  }
  return target;
}

/* Calls `changed(state, patch)` (patch null: all of it is new) and `status(word)` for ever. */
export async function follow(changed, status) {
  let wait = FIRST_WAIT;
  for (;;) {
    try {
      const answer = await fetch("/api/v1/state", { headers: { accept: "application/json" } });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const state = await answer.json();
      show(changed, state, null);
      status("live");
      wait = FIRST_WAIT;
      await listen(state, changed);
    } catch {
      status("trying again");
    }
    await new Promise((resolve) => setTimeout(resolve, wait * (0.75 + Math.random() / 2)));
    wait = Math.min(2 * wait, LONGEST_WAIT);
  }
}

/* A defect of ours is told on the console, and is no reason to ask the monitor again. */
function show(changed, state, patch) {
  try {
    changed(state, patch);
  } catch (error) {
    reportError(error);
  }
}

/* Until the stream ends, or says that it cannot go on from here. */
function listen(state, changed) {
  const source = new EventSource(`/api/v1/changes?run=${encodeURIComponent(state.run)}&number=${state.number}`);
  return new Promise((_, reject) => {
    const end = () => {
      source.close();
      reject(new Error("the stream ended"));
    };
    source.addEventListener("patch", (event) => {
      const { number, patch } = JSON.parse(event.data);
      state.number = number;
      performance.mark("patch");
      show(changed, merge(state, patch), patch);
      performance.measure("patch applied", "patch");
    });
    source.addEventListener("reset", end);
    source.addEventListener("error", end);
  });
}
