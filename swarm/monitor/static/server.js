/* The page of one server. */

import { h, name, say } from "./dom.js";
import { STATES, count, date, duration, happened, milliseconds, plural, shortPeer, speed } from "./words.js";

const AGAIN = 15000; // ms between two questions for what is not in the state
const SENTENCES = {
  online: "serves",
  joining: "is getting ready to serve",
  draining: "is about to leave",
  lost: "has fallen silent; it held",
};

export class ServerPage {
  constructor(main, peer) {
    this.peer = peer;
    this.main = main;
    this.title = h("h1", { class: "server-title" });
    this.lede = h("p", { class: "lede" });
    this.facts = h("dl", { class: "facts" });
    this.more = h("div", { class: "pair" });
    main.replaceChildren(h("div", { class: "hero" }, this.title, this.lede, this.facts), this.more);
    this.timer = setInterval(() => document.hidden || this.refresh(), AGAIN);
    this.refresh();
  }

  render(state, patch) {
    const found = Object.entries(state.models).find(([, model]) => this.peer in model.servers);
    this.state = state;
    if (!found) {
      if (this.told) this.gone();
      return;
    }
    const [key, model] = found;
    if (patch && !patch.models?.[key]?.servers?.[this.peer] && this.shown) return;
    this.shown = true;
    const server = model.servers[this.peer];
    this.title.replaceChildren(server.name ? name(server.name) : h("span", { class: "mono" }, shortPeer(this.peer)));
    document.title = `${server.name || shortPeer(this.peer)} · ${model.name}`;
    this.lede.replaceChildren(`It ${SENTENCES[server.state]} blocks ${server.blocks.join(":")} of `, h("a", { href: `/models/${key}` }, name(model.name)), this.since(server, state.at));
    const facts = [
      ["tokens a second, many at once", server.tokens ? speed(server.tokens) : "unknown"],
      ["for one alone", server.alone ? speed(server.alone) : "unknown"],
      ["steps waiting", count(server.queue)],
      ["tokens of free cache", count(server.free)],
      ["there and back", milliseconds(server.rtt) || "unknown"],
      ["reached", server.path ?? "not asked yet"],
      ["state", STATES[server.state]],
      ["computes in", server.precision],
      ["adapters", server.adapters?.join(", ") ?? "none"],
      ["version", server.version ?? "unknown"],
      ["address", server.address],
      ["peer id", this.peer],
    ];
    this.facts.replaceChildren(...facts.map(([term, value], index) => h("div", { class: index < 5 ? "figure" : "figure small" }, h("dt", null, term), h("dd", null, h("bdi", null, value)))));
  }

  since(server, now) {
    if (server.state === "lost" && server.gone) return `, and has done so for ${duration(now - server.gone)}.`;
    if (server.up) return `, and has been up for ${duration(now - server.up)}.`;
    return `. This monitor has known it for ${duration(now - server.seen)}.`;
  }

  async refresh() {
    try {
      const answer = await fetch(`/api/v1/servers/${encodeURIComponent(this.peer)}`);
      if (answer.status === 404) return this.unknown();
      this.told = await answer.json();
      if (!this.told.server) this.gone();
      return this.fill();
    } catch {
      return undefined; // the next time will do
    }
  }

  unknown() {
    if (this.shown) return;
    this.title.replaceChildren("Nobody knows this server here");
    say(this.lede, "It was not seen within the last thirty days, or never.");
  }

  gone() {
    this.title.replaceChildren(this.told.name ? name(this.told.name) : h("span", { class: "mono" }, shortPeer(this.peer)));
    this.lede.replaceChildren("It is gone. It served ", h("a", { href: `/models/${this.told.model}` }, name(this.told.model_name)), this.told.last ? ` until ${date(this.told.last)}.` : ".");
    this.facts.replaceChildren(h("div", { class: "figure small" }, h("dt", null, "peer id"), h("dd", null, this.peer)));
    document.title = "gone";
  }

  fill() {
    const { counters, next_rtts: next, events, block_hours: hours } = this.told;
    const list = (title, rows) => rows.length ? h("section", { class: "plate" }, h("h2", null, title), h("dl", { class: "list" }, rows.map(([term, value]) => h("div", null, h("dt", null, term), h("dd", null, value))))) : null;
    const named = Object.values(this.state?.models ?? {}).flatMap((model) => Object.entries(model.servers));
    const who = (tag) => {
      const found = named.find(([peer]) => peer.endsWith(tag));
      return found ? h("a", { href: `/servers/${encodeURIComponent(found[0])}` }, found[1].name ? name(found[1].name) : tag) : tag;
    };
    const given = hours === undefined ? [] : [["served", plural(hours, "block-hour")]];
    const rows = Object.entries(counters).map(([key, value]) => [key.replaceAll("_", " "), count(value)]);
    const happenings = events.slice(-20).reverse().map(([at, kind, , , first, beyond]) => [date(at), happened(kind, first, beyond)]);
    this.more.replaceChildren(...[
      list("What it says of itself", [...given, ...rows]),
      list("How far to who may follow", Object.entries(next).sort((a, b) => a[1] - b[1]).map(([tag, ms]) => [who(tag), milliseconds(ms)])),
      list("Its last day", happenings),
    ].filter(Boolean));
  }

  close() {
    clearInterval(this.timer);
  }
}
