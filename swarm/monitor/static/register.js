/* Table 1: every server; sorted, filtered, and a page at a time, so that a thousand cost no more. */

import { h, name, say } from "./dom.js";
import { STATES, brief, count, milliseconds, short, shortPeer, speed } from "./words.js";

const NARROW = matchMedia("(max-width: 700px)"); // where each server is a card
const page = () => (NARROW.matches ? 8 : 25);
const ORDER = { online: 0, joining: 1, draining: 2, lost: 3 };

/* title, what to sort by, what to show */
const COLUMNS = [
  ["server", (s) => (s.name || "\uffff").toLowerCase() + s.peer, (s) => h("a", { href: `/servers/${encodeURIComponent(s.peer)}`, class: "who" }, s.name ? name(s.name) : null, h("span", { class: "mono peer" }, shortPeer(s.peer)))],
  ["blocks", (s) => s.blocks[0] * 1e5 + s.blocks[1], (s) => s.blocks.join(":")],
  ["state", (s) => ORDER[s.state], (s) => h("span", { class: `state ${s.state}` }, STATES[s.state])],
  ["tokens/s", (s) => -s.tokens, (s) => (s.tokens ? speed(s.tokens) : "–")],
  ["queue", (s) => -s.queue, (s) => count(s.queue)],
  ["free cache", (s) => -s.free, (s) => short(s.free)],
  ["away", (s) => s.rtt ?? Infinity, (s) => milliseconds(s.rtt) || "–"],
  ["reached", (s) => s.path ?? "~", (s) => s.path ?? "–"],
  ["computes in", (s) => s.precision, (s) => s.precision],
  ["adapters", (s) => -(s.adapters?.length ?? 0), (s) => (s.adapters ? s.adapters.map((adapter) => name(adapter, "adapter")) : "–")],
  ["version", (s) => s.version ?? "", (s) => (s.version ? name(s.version) : "–")],
  ["up", (s) => s.up ?? s.seen, (s, now) => (s.up ? brief(now - s.up) : `≥ ${brief(now - s.seen)}`)],
];

export class Register {
  constructor() {
    this.sorted = { column: 1, down: false };
    this.page = 0;
    this.rows = h("tbody", { role: "rowgroup" });
    this.heads = COLUMNS.map(([title], index) =>
      h("th", { scope: "col", role: "columnheader" }, h("button", { type: "button", class: "sort", onclick: () => this.sort(index) }, title)));
    this.table = h("table", { role: "table", "aria-label": "Servers" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, this.heads)), this.rows);
    this.filter = h("input", { type: "search", placeholder: "name, peer id or block", "aria-label": "Show only servers with this name, peer id or block", oninput: () => { this.page = 0; this.show(); } });
    this.where = h("span", { "aria-live": "polite" });
    this.back = h("button", { type: "button", onclick: () => this.turn(-1), "aria-label": "Earlier servers" }, "←");
    this.on = h("button", { type: "button", onclick: () => this.turn(1), "aria-label": "Later servers" }, "→");
    NARROW.addEventListener("change", () => this.servers && this.show());
    this.element = h("div", { class: "register" },
      h("div", { class: "tools" }, this.filter, h("div", { class: "pager" }, this.back, this.where, this.on)),
      h("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "Table of servers" }, this.table));
  }

  set(model, now) {
    this.servers = Object.entries(model.servers).map(([peer, server]) => ({ peer, ...server }));
    this.now = now;
    this.show();
  }

  sort(column) {
    this.sorted = { column, down: this.sorted.column === column && !this.sorted.down };
    this.page = 0;
    this.show();
  }

  turn(pages) {
    this.page += pages;
    this.show();
  }

  matching() {
    const wanted = this.filter.value.trim().toLowerCase();
    if (!wanted) return this.servers;
    const block = /^\d+$/.test(wanted) ? Number(wanted) : null;
    return this.servers.filter((s) =>
      block === null ? `${s.name ?? ""} ${s.peer}`.toLowerCase().includes(wanted) : (s.blocks[0] <= block && block < s.blocks[1]) || (s.name ?? "").includes(wanted));
  }

  show() {
    const key = COLUMNS[this.sorted.column][1];
    const sign = this.sorted.down ? -1 : 1;
    const found = this.matching().map((server) => [key(server), server]);
    found.sort(([a, x], [b, y]) => sign * (a < b ? -1 : a > b ? 1 : x.peer < y.peer ? -1 : 1));
    const pages = Math.max(1, Math.ceil(found.length / page()));
    this.page = Math.max(0, Math.min(this.page, pages - 1));
    const first = this.page * page();
    const shown = found.slice(first, first + page()).map(([, server]) => server);
    this.heads.forEach((head, index) => head.setAttribute("aria-sort", index !== this.sorted.column ? "none" : this.sorted.down ? "descending" : "ascending"));
    this.fill(shown);
    say(this.where, found.length ? `${count(first + 1)}–${count(first + shown.length)} of ${count(found.length)}` : "none");
    this.back.disabled = this.page === 0;
    this.on.disabled = this.page >= pages - 1;
    this.back.hidden = this.on.hidden = pages === 1;
  }

  /* Rows keep their place in the document while they show the same server, and with it the focus. */
  fill(shown) {
    const old = new Map([...this.rows.children].map((row) => [row.dataset.peer, row]));
    const rows = shown.map((server) => {
      const told = JSON.stringify(server) + brief(this.now - (server.up ?? server.seen));
      const known = old.get(server.peer);
      if (known?.told === told) return known;
      const cells = COLUMNS.map(([title, , show]) => h("td", { role: "cell", "data-title": title }, show(server, this.now)));
      if (known?.contains(document.activeElement)) {
        [...known.children].slice(1).forEach((cell, index) => cell.replaceWith(cells[index + 1]));
        known.told = told;
        return known;
      }
      const row = h("tr", { role: "row", class: server.state, "data-peer": server.peer }, cells);
      row.told = told;
      return row;
    });
    rows.forEach((row, index) => this.rows.children[index] !== row && this.rows.insertBefore(row, this.rows.children[index] ?? null));
    while (this.rows.children.length > rows.length) this.rows.lastChild.remove();
  }
}
