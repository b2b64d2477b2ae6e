/* Fig. 1: the comb (servers of each block) and under it every server's span, one SVG.

It is a listbox: Tab reaches it, arrows go from server to server, Enter opens a server's page. */

import { h, hexagon, name, svg } from "./dom.js";
import { Lanes } from "./packing.js";
import { STATES, count, milliseconds, plural, shortPeer, speed } from "./words.js";

const GAP = 2; // between spans, in pixels
const AXIS = 20;
const HEIGHTS = [[10, 30], [18, 24], [36, 17], [90, 9], [160, 6], [Infinity, 4]]; // of lanes, by their number
const LABEL_HEIGHT = 17;
const LARGEST_CELL = 30;

/* Engraved, so that states differ in more than colour. */
function patterns() {
  const lines = (id, size, paths, extra) =>
    svg("pattern", { id, width: size, height: size, patternUnits: "userSpaceOnUse", ...extra },
      svg("rect", { width: size, height: size, class: `ground-${id}` }), ...paths.map((d) => svg("path", { d, class: `lines-${id}` })));
  return svg("defs", null,
    lines("p-joining", 7, ["M-1 8 8 -1M-1 1 1 -1M6 8 8 6"]),
    lines("p-draining", 6, ["M1.5 1.5h.01M4.5 4.5h.01"]),
    lines("p-lost", 7, ["M0 0 7 7M7 0 0 7"]),
    lines("p-other", 4, ["M2 0v4"]),
    lines("p-missing", 9, ["M-2 11 11 -2M-2 2 2 -2M7 11 11 7"]),
    lines("p-single", 5, ["M-1 6 6 -1M-1 1 1 -1M4 6 6 4"]));
}

export class Coverage {
  constructor(open) {
    this.open = open;
    this.lanes = new Lanes();
    this.bars = new Map();
    this.active = null;
    this.svg = svg("svg", {
      class: "coverage", tabindex: "0", role: "listbox", "aria-label": "Servers and the blocks they hold",
      onkeydown: (event) => this.key(event),
      onfocus: () => this.choose(this.active ?? this.lanes.order()[0]),
      onblur: () => this.choose(null),
      onpointermove: (event) => this.point(event),
      onpointerleave: () => document.activeElement !== this.svg && this.choose(null),
      onclick: (event) => this.click(event),
    });
    this.card = h("div", { class: "card", hidden: true });
    this.cells = svg("g", { role: "presentation" });
    this.holes = svg("g", { role: "presentation" });
    this.spans = svg("g", { role: "presentation" });
    this.axis = svg("g", { role: "presentation", class: "axis" });
    this.ring = svg("rect", { class: "ring", role: "presentation", visibility: "hidden" });
    this.svg.append(patterns(), this.holes, this.cells, this.spans, this.axis, this.ring);
    this.host = h("div", { class: "coverage-host" }, this.svg, this.card);
    this.width = 0;
    new ResizeObserver(() => {
      if (this.host.clientWidth && this.host.clientWidth !== this.width && this.model) this.layout();
    }).observe(this.host);
  }

  /* All of it is new. */
  set(model) {
    this.model = model;
    this.lanes = new Lanes();
    this.bars.clear();
    this.spans.replaceChildren();
    for (const [peer, server] of Object.entries(model.servers)) this.lanes.put(peer, ...server.blocks);
    for (const peer of Object.keys(model.servers)) this.dress(peer);
    this.layout();
  }

  /* Only these servers changed: a map of peer to change, null for who is gone. */
  update(model, servers, replicas) {
    this.model = model;
    const before = this.lanes.count;
    const moved = [];
    for (const [peer, change] of Object.entries(servers)) {
      if (change === null) {
        this.lanes.remove(peer);
        this.bars.get(peer)?.remove();
        this.bars.delete(peer);
        if (this.active === peer) this.choose(null);
        continue;
      }
      if (this.lanes.put(peer, ...model.servers[peer].blocks)) moved.push(peer);
      this.dress(peer);
    }
    if (this.lanes.count !== before) return this.layout();
    moved.forEach((peer) => this.place(peer));
    if (replicas) this.comb();
    if (this.active && servers[this.active]) this.show();
  }

  /* What a span looks like and is called. */
  dress(peer) {
    const server = this.model.servers[peer];
    let bar = this.bars.get(peer);
    if (!bar) {
      bar = svg("g", { role: "option", id: `c-${peer}`, "aria-selected": "false" }, svg("rect", { rx: 2 }));
      bar.dataset.peer = peer;
      this.bars.set(peer, bar);
      this.spans.append(bar);
    }
    const other = server.state === "online" && server.precision !== this.model.precision;
    const look = `span ${other ? "other" : server.state}`;
    if (bar.getAttribute("class") !== look) bar.setAttribute("class", look);
    const label = [server.name || shortPeer(peer), `blocks ${server.blocks.join(":")}`, STATES[server.state],
      server.tokens ? `${speed(server.tokens)} tokens per second` : ""].filter(Boolean).join(", ");
    if (bar.getAttribute("aria-label") !== label) bar.setAttribute("aria-label", label);
  }

  layout() {
    this.width = this.host.clientWidth || this.width || 600;
    this.pitch = this.width / this.model.num_blocks;
    const radius = Math.min(LARGEST_CELL, this.pitch / 1.5);
    this.radius = radius;
    this.top = Math.max(12, radius * Math.sqrt(3) * 1.5) + 16;
    this.lane = HEIGHTS.find(([most]) => this.lanes.count <= most)[1];
    this.bottom = this.top + this.lane * Math.max(1, this.lanes.count);
    const height = Math.ceil(this.bottom + AXIS);
    this.svg.setAttribute("width", this.width);
    this.svg.setAttribute("height", height);
    this.comb();
    for (const peer of this.bars.keys()) this.place(peer);
    this.rule();
    if (this.active) this.show();
  }

  place(peer) {
    const [lane, first, beyond] = this.lanes.places.get(peer);
    const bar = this.bars.get(peer);
    const gap = this.lane > 5 ? GAP : 1;
    const rect = bar.firstChild;
    const width = Math.max(1.5, (beyond - first) * this.pitch - gap);
    rect.setAttribute("x", (first * this.pitch + gap / 2).toFixed(2));
    rect.setAttribute("y", this.top + lane * this.lane);
    rect.setAttribute("width", width.toFixed(2));
    rect.setAttribute("height", this.lane - gap);
    bar.querySelector("text")?.remove();
    const server = this.model.servers[peer];
    const room = Math.floor((width - 14) / 7.5);
    if (this.lane >= LABEL_HEIGHT && room >= 4) {
      const letters = [...(server.name || shortPeer(peer))];
      const wide = letters.some((letter) => letter.codePointAt(0) > 0x2e80) ? 2 : 1;
      const fits = Math.floor(room / wide);
      const text = letters.length > fits ? `${letters.slice(0, fits - 1).join("")}…` : letters.join("");
      bar.append(svg("text", { x: (first * this.pitch + 8).toFixed(1), y: this.top + lane * this.lane + (this.lane - gap) / 2, "aria-hidden": "true" }, text));
    }
  }

  /* A cell for each block, with the number of its servers; and the holes under those that have none. */
  comb() {
    const { replicas } = this.model;
    const [r, middle] = [this.radius, this.radius * 0.87 + 1];
    const cells = [];
    const holes = [];
    replicas.forEach((servers, block) => {
      const [x, y] = [(block + 0.5) * this.pitch, middle + (block % 2 ? r * 0.87 : 0)];
      const kind = servers === 0 ? "none" : servers === 1 ? "one" : "some";
      cells.push(svg("path", { d: hexagon(x, y, Math.max(1, r * 0.93 - 0.4)), class: `cell ${kind}` }));
      if (r >= 9) cells.push(svg("text", { x: x.toFixed(1), y: y.toFixed(1), class: `held ${kind}`, "font-size": Math.min(18, r * 0.8).toFixed(1) }, servers));
      if (!servers) holes.push(svg("rect", { x: block * this.pitch, y: this.top - 6, width: this.pitch + 0.5, height: this.bottom - this.top + 8, class: "hole" }));
    });
    this.cells.replaceChildren(...cells);
    this.cells.setAttribute("aria-hidden", "true");
    this.holes.replaceChildren(...holes);
  }

  rule() {
    const blocks = this.model.num_blocks;
    const step = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512].find((size) => size * this.pitch >= 34) ?? 1024;
    const marks = [];
    for (let block = 0; block <= blocks; block += step) {
      if (block !== blocks && blocks - block < step / 2) continue;
      const x = Math.min(this.width - 0.5, Math.max(0.5, block * this.pitch));
      const anchor = block === 0 ? "start" : block >= blocks ? "end" : "middle";
      marks.push(svg("path", { d: `M${x} ${this.bottom + 1}v5` }), svg("text", { x, y: this.bottom + 17, "text-anchor": anchor }, block));
    }
    this.axis.replaceChildren(...marks);
    this.axis.setAttribute("aria-hidden", "true");
  }

  point(event) {
    const bar = event.target.closest?.("[data-peer]");
    if (bar) this.choose(bar.dataset.peer);
  }

  /* With a finger the first touch shows the card, as hovering does, and the second opens. */
  click(event) {
    const peer = event.target.closest?.("[data-peer]")?.dataset.peer;
    if (peer && (event.pointerType !== "touch" || this.active === peer)) this.open(peer);
    else if (peer) this.choose(peer);
  }

  key(event) {
    const order = this.lanes.order();
    const at = order.indexOf(this.active);
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 10, PageUp: -10 };
    let to;
    if (event.key in steps) to = at + steps[event.key];
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = order.length - 1;
    else if (event.key === "Enter" && this.active) return this.open(this.active);
    else if (event.key === "Escape") return this.choose(null);
    else return undefined;
    event.preventDefault();
    return this.choose(order[Math.max(0, Math.min(order.length - 1, to))]);
  }

  choose(peer) {
    if (this.active && this.active !== peer) this.bars.get(this.active)?.setAttribute("aria-selected", "false");
    this.active = peer && this.bars.has(peer) ? peer : null;
    if (this.active) {
      this.svg.setAttribute("aria-activedescendant", `c-${peer}`);
      this.bars.get(peer).setAttribute("aria-selected", "true");
    } else this.svg.removeAttribute("aria-activedescendant");
    this.show();
  }

  /* The card beside the chosen span, and the ring around it. */
  show() {
    this.card.hidden = !this.active;
    this.ring.setAttribute("visibility", this.active ? "visible" : "hidden");
    if (!this.active) return;
    const rect = this.bars.get(this.active).firstChild;
    const [x, y, width, height] = ["x", "y", "width", "height"].map((side) => Number(rect.getAttribute(side)));
    for (const [side, value] of Object.entries({ x: x - 2, y: y - 2, width: width + 4, height: height + 4 })) this.ring.setAttribute(side, value);
    this.card.replaceChildren(...details(this.active, this.model.servers[this.active]));
    const left = Math.max(0, Math.min(x, this.width - this.card.offsetWidth));
    this.card.style.left = `${left}px`;
    this.card.style.top = `${y + height + 8}px`;
  }
}

/* What the card says. */
function details(peer, server) {
  const facts = [
    ["blocks", server.blocks.join(":")],
    ["state", STATES[server.state]],
    ["tokens/s", server.tokens ? speed(server.tokens) : "unknown"],
    ["queue", count(server.queue)],
    ["free cache", plural(server.free, "token")],
    ["away", milliseconds(server.rtt) || "unknown"],
    ["computes in", server.precision],
  ];
  return [
    h("p", { class: "card-name" }, server.name ? name(server.name) : h("span", { class: "mono" }, shortPeer(peer))),
    h("dl", null, facts.map(([term, value]) => h("div", null, h("dt", null, term), h("dd", null, value)))),
    h("p", { class: "soft hint" }, "Click, tap again or press Enter for its page."),
  ];
}

export function legend() {
  const swatch = (look) => svg("svg", { width: 26, height: 14, "aria-hidden": "true" }, svg("g", { class: `span ${look}` }, svg("rect", { x: 1, y: 1, width: 24, height: 12, rx: 2 })));
  const hole = svg("svg", { width: 26, height: 14, "aria-hidden": "true" }, svg("rect", { class: "hole", width: 26, height: 14 }));
  const entries = [[swatch("online"), "online"], [swatch("joining"), "joining"], [swatch("draining"), "leaving"], [swatch("lost"), "silent"], [swatch("other"), "computes otherwise"], [hole, "nobody"]];
  return h("ul", { class: "legend" }, entries.map(([image, text]) => h("li", null, image, text)));
}
