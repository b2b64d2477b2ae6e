/* Which page this is, who is told of changes, and what stands at the top of all of them. */

import { h, name, say } from "./dom.js";
import { follow } from "./live.js";
import { ModelPage } from "./model.js";
import { ServerPage } from "./server.js";
import { brief, time } from "./words.js";

const main = document.getElementById("main");
const [, kind, ...rest] = location.pathname.split("/");
const wanted = rest.map(decodeURIComponent).join("/");
let page = null;
let state = null;
let heard = 0; // when the last change came, in ms
let status = "looking";

const openServer = (peer) => location.assign(`/servers/${encodeURIComponent(peer)}`);

/* The model that the address names, or the one that most servers hold. */
function modelKey() {
  const models = Object.entries(state.models);
  const size = ([, model]) => Object.keys(model.servers).length;
  const fits = ([key, model]) => {
    const at = wanted.lastIndexOf("@");
    const digits = at > 0 && wanted.slice(0, at) === model.name && wanted.slice(at + 1);
    return wanted === key || wanted === model.name || (digits && model.fingerprint.startsWith(digits));
  };
  const found = kind === "models" ? models.filter(fits) : models;
  return found.sort((a, b) => (b[0] === wanted) - (a[0] === wanted) || size(b) - size(a))[0]?.[0];
}

function empty() {
  const text = kind === "models" ? "This swarm does not serve that model." : "Nobody serves a model here yet.";
  main.replaceChildren(h("div", { class: "hero" }, h("h1", null, state.at ? text : "Looking at the swarm …"),
    h("p", { class: "lede" }, kind === "models" ? h("a", { href: "/" }, "See what it serves") : "Start with swarm-server; this page will notice.")));
}

function changed(next, patch) {
  state = next;
  heard = Date.now();
  if (kind === "servers") {
    page ??= new ServerPage(main, wanted);
    page.render(state, patch);
  } else {
    const key = page?.key in state.models ? page.key : modelKey();
    if (!key) {
      page?.close();
      page = null;
      empty();
    } else {
      const fresh = page?.key !== key;
      if (fresh) {
        page?.close();
        page = new ModelPage(main, key, openServer);
      }
      page.render(state, fresh ? null : patch);
      const title = `${state.models[key].health} · ${state.models[key].name}`;
      if (document.title !== title) document.title = title;
    }
  }
  navigate();
  const alarm = document.getElementById("alarm");
  alarm.hidden = state.sees || !state.at;
  if (!alarm.hidden) say(alarm, `The swarm does not answer this monitor. What you see is from ${time(state.at)}.`);
  clock();
}

let shown = "";

function navigate() {
  const models = Object.entries(state.models);
  const told = JSON.stringify([models.map(([key, model]) => [key, model.name, model.health]), page?.key]);
  if (told === shown) return;
  shown = told;
  const links = models.map(([key, model]) => {
    const twin = models.some(([other, { name: called }]) => other !== key && called === model.name);
    return h("a", { href: `/models/${key}`, class: model.health, "aria-current": page?.key === key ? "page" : null, title: model.health },
      h("span", { class: "hex", "aria-hidden": "true" }), name(model.name), twin ? ` @${model.fingerprint.slice(0, 8)}` : null, h("span", { class: "unseen" }, `, ${model.health}`));
  });
  document.getElementById("models").replaceChildren(...(links.length > 1 || kind ? links : []));
}

function clock() {
  const live = document.getElementById("live");
  live.className = `live ${status === "live" ? "on" : "off"}`;
  say(document.getElementById("live-text"), status === "live" ? `live, looked ${brief((Date.now() - heard) / 1000)} ago` : status);
}

const themes = ["auto", "light", "dark"];
const button = document.getElementById("theme");

function theme(choice) {
  const root = document.documentElement;
  if (choice === "auto") delete root.dataset.theme;
  else root.dataset.theme = choice;
  try {
    localStorage.setItem("theme", choice);
  } catch { /* storage is switched off: for this page only */ }
  say(button, `${choice} theme`);
  document.dispatchEvent(new Event("theme"));
}

theme(document.documentElement.dataset.theme ?? "auto");
button.addEventListener("click", () => theme(themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3]));
setInterval(clock, 1000);
follow(changed, (word) => {
  status = word;
  clock();
});
