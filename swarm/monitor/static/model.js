/* The page of a model: a sentence, then its figures. */

import { Coverage, legend } from "./coverage.js";
import { Day } from "./day.js";
import { bar, h, name, say } from "./dom.js";
import { Join } from "./join.js";
import { Register } from "./register.js";
import { brief, count, date, happened, lede, online, plural, shortPeer, speed, time } from "./words.js";

const HISTORY_EVERY = 60000; // ms
const CONTRIBUTORS = 12;

function figure(id, label, title, ...content) {
  return h("section", { "aria-labelledby": id, class: `plate plate-${id}` },
    h("h2", { id }, h("span", { class: "number" }, label), title), content);
}

export class ModelPage {
  constructor(main, key, open) {
    this.key = key;
    this.verdict = h("em", { class: "verdict" });
    this.title = h("h1", null);
    this.lede = h("p", { class: "lede" });
    this.facts = h("dl", { class: "facts" });
    this.coverage = new Coverage(open);
    this.join = new Join();
    this.day = new Day();
    this.register = new Register();
    this.contributors = h("ol", { class: "contributors" });
    this.events = h("ol", { class: "events" });
    this.shownHealth = null;
    main.replaceChildren(
      h("div", { class: "hero" }, this.title, this.lede, this.facts),
      figure("coverage", "Fig. 1", "Who holds which blocks", this.coverage.host, legend()),
      h("div", { class: "pair" },
        figure("needed", "", "What is needed most", this.join.element),
        figure("events", "", "Comings and goings", this.events)),
      figure("day", "Fig. 2", "The last day", this.day.element,
        h("p", { class: "soft key" }, h("span", { class: "level l0" }), "no server ", h("span", { class: "level l1" }), "one ", h("span", { class: "level l2" }), "two ", h("span", { class: "level l3" }), "three or more; blocks from top to bottom. ▲ came, ▼ went.")),
      figure("servers", "Table 1", "Servers", this.register.element),
      figure("contributors", "Fig. 3", "Who keeps it alive", this.contributors,
        h("p", { class: "soft" }, "A block-hour is one block served for an hour, as far as this monitor was watching, over the last thirty days.")));
  }

  /* `servers`: what changed of them; null: all is new. */
  render(state, patch) {
    const model = state.models[this.key];
    const changed = patch?.models?.[this.key];
    if (patch && !changed) return;
    if (!patch || !this.model) {
      this.coverage.set(model);
      this.title.replaceChildren(name(model.name, "model-name"), " is ", this.verdict, ".");
      document.getElementById("model-api").href = `/api/v1/models/${this.key}`;
      this.refresh();
      this.timer ??= setInterval(() => document.hidden || this.refresh(), HISTORY_EVERY);
    } else if (changed.servers || changed.replicas) {
      this.coverage.update(model, changed.servers ?? {}, changed.replicas);
    }
    this.model = model;
    say(this.verdict, model.health);
    this.verdict.className = `verdict ${model.health}`;
    say(this.lede, lede(model));
    this.fill(model);
    if (!patch || changed.servers) this.register.set(model, state.at);
    if (!patch || changed.needs || changed.need !== undefined) this.join.set(model);
    if (!patch || changed.events) this.tell(model.events, state.at);
    if (this.shownHealth !== model.health) {
      if (this.shownHealth) say(document.getElementById("said"), `${model.name} is ${model.health} now.`);
      this.shownHealth = model.health;
    }
  }

  fill(model) {
    const held = [Math.min(...model.replicas), Math.max(...model.replicas)];
    const precisions = Object.keys(model.precisions);
    const facts = [
      ["tokens a second", speed(model.tokens)],
      [online(model) === 1 ? "server" : "servers", count(online(model))],
      ["blocks", count(model.num_blocks)],
      ["servers of a block", held[0] === held[1] ? count(held[0]) : `${count(held[0])}–${count(held[1])}`],
      [precisions.length > 1 ? `precision, of ${precisions.length}` : "precision", model.precision],
      ["fingerprint", model.fingerprint.slice(0, 8)],
    ];
    const told = JSON.stringify(facts);
    if (this.told === told) return;
    this.told = told;
    this.facts.replaceChildren(...facts.map(([term, value], index) => h("div", { class: index < 4 ? "figure" : "figure small" }, h("dt", null, term), h("dd", null, value))));
  }

  tell(events, now) {
    const items = events.slice(-8).reverse().map(([at, kind, peer, who, first, beyond]) =>
      h("li", { class: kind }, h("time", { datetime: new Date(at * 1000).toISOString(), title: date(at) }, now - at < 86400 ? time(at) : date(at)), " ",
        h("span", null, h("a", { href: `/servers/${encodeURIComponent(peer)}` }, who ? name(who) : shortPeer(peer)), ` ${happened(kind, first, beyond)}`)));
    this.events.replaceChildren(...(items.length ? items : [h("li", { class: "nothing" }, "Nobody came or went while this monitor was watching.")]));
  }

  async refresh() {
    try {
      const answer = await fetch(`/api/v1/models/${this.key}`);
      if (!answer.ok) return;
      const { history, events, contributors } = await answer.json();
      this.day.set(history, events);
      const most = Math.max(...contributors.map((one) => one.hours), 1e-9);
      this.contributors.replaceChildren(...contributors.slice(0, CONTRIBUTORS).map((one) =>
        h("li", null,
          h("a", { href: `/servers/${encodeURIComponent(one.peers[0])}`, class: "giver" }, one.name ? name(one.name) : shortPeer(one.peers[0]), one.servers > 1 ? h("span", { class: "soft" }, ` ${plural(one.servers, "server")}`) : null),
          bar(one.hours / most), h("span", { class: "hours" }, speed(one.hours), h("span", { class: "soft" }, " block-hours")))));
    } catch { /* the next minute will do */ }
  }

  close() {
    clearInterval(this.timer);
  }
}

export const since = (now, then) => brief(now - then);
