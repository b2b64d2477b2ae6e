/* Fig. 2: the last day. Tokens per second above, servers of each block below, comings and goings. */

import { h } from "./dom.js";
import { count, date, speed, time } from "./words.js";

const SPEED = 84; // heights in pixels
const MARKS = 26;
const AXIS = 22;
const LEVELS = ["--hole", "--thin", "--fair", "--rich"]; // by the number of servers

export class Day {
  constructor() {
    this.canvas = h("canvas", { role: "img", "aria-label": "The last day" });
    this.table = h("table");
    this.probe = h("span", { class: "probe", hidden: true });
    this.element = h("div", { class: "day" }, this.canvas, this.probe,
      h("details", null, h("summary", null, "The last day as a table"), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The last day, hour by hour" }, this.table)));
    new ResizeObserver(() => this.history && this.draw()).observe(this.element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.history && this.draw());
    document.addEventListener("theme", () => this.history && this.draw());
  }

  set(history, events) {
    this.history = history;
    this.events = events;
    this.steps = history.steps.map((step) => step && { tokens: step[0], servers: step[1], low: Uint8Array.from(step[2].match(/../g) ?? [], (byte) => parseInt(byte, 16)) });
    this.draw();
    this.tabulate();
  }

  draw() {
    const width = this.element.clientWidth;
    if (!width || !this.steps.length) return;
    const columns = Math.max(...this.steps.map((step) => step?.low.length ?? 0), 1);
    const strip = Math.max(72, Math.min(168, columns * 4));
    const height = SPEED + strip + MARKS + AXIS;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = `${height}px`;
    const paint = this.canvas.getContext("2d");
    const style = getComputedStyle(this.probe);
    paint.font = `12px ${style.fontFamily}`;
    paint.scale(ratio, ratio);
    const colour = (name) => {
      this.probe.style.color = `var(${name})`; // of which only an element knows what it is here
      return style.color;
    };
    const cell = width / this.steps.length;
    this.drawSpeed(paint, cell, width, colour);
    this.drawStrip(paint, cell, strip, columns, colour);
    this.drawMarks(paint, width, SPEED + strip, colour);
    this.drawHours(paint, width, height, colour);
    const known = this.steps.filter(Boolean);
    const worst = Math.min(...known.map((step) => Math.min(...step.low)));
    this.canvas.setAttribute("aria-label", `Since ${date(this.history.start)}: between ${speed(Math.min(...known.map((s) => s.tokens)))} and ${speed(Math.max(...known.map((s) => s.tokens)))} tokens per second; the rarest block had ${count(worst)} servers at worst.`);
  }

  drawSpeed(paint, cell, width, colour) {
    const most = Math.max(...this.steps.map((step) => step?.tokens ?? 0), 1);
    const y = (tokens) => SPEED - 8 - (tokens / most) * (SPEED - 26);
    paint.fillStyle = colour("--comb");
    paint.strokeStyle = colour("--line");
    paint.lineWidth = 1.5;
    for (let from = 0; from < this.steps.length; from++) {
      if (!this.steps[from]) continue;
      let beyond = from;
      while (this.steps[beyond]) beyond++;
      const line = new Path2D();
      for (let i = from; i < beyond; i++) {
        if (i === from) line.moveTo(i * cell, y(this.steps[i].tokens));
        line.lineTo((i + 0.5) * cell, y(this.steps[i].tokens));
        if (i === beyond - 1) line.lineTo((i + 1) * cell, y(this.steps[i].tokens));
      }
      const area = new Path2D(line);
      area.lineTo(beyond * cell, SPEED - 8);
      area.lineTo(from * cell, SPEED - 8);
      paint.fill(area);
      paint.stroke(line);
      from = beyond;
    }
    paint.fillStyle = colour("--soft");
    paint.fillText(`${speed(most)} tokens/s at most`, 2, 11);
  }

  drawStrip(paint, cell, strip, columns, colour) {
    const colours = LEVELS.map(colour);
    const row = strip / columns;
    this.steps.forEach((step, i) => {
      if (!step) {
        paint.fillStyle = colour("--rule");
        for (let y = SPEED + 2; y < SPEED + strip; y += 6) paint.fillRect(i * cell + cell / 2, y, 1, 1);
        return;
      }
      step.low.forEach((servers, block) => {
        paint.fillStyle = colours[Math.min(servers, 3)];
        paint.fillRect(i * cell, SPEED + block * row, cell + 0.4, row + 0.4);
      });
    });
  }

  drawMarks(paint, width, top, colour) {
    const span = this.steps.length * this.history.step;
    for (const [at, kind] of this.events) {
      const x = ((at - this.history.start) / span) * width;
      if (x < 0) continue;
      const came = kind === "joined" || kind === "back";
      if (kind === "moved") continue;
      paint.fillStyle = colour(came ? "--join" : kind === "lost" ? "--alarm" : "--soft");
      const [base, tip] = came ? [top + 12, top + 4] : [top + 15, top + 23];
      paint.beginPath();
      paint.moveTo(x - 4, base);
      paint.lineTo(x + 4, base);
      paint.lineTo(x, tip);
      paint.fill();
    }
  }

  drawHours(paint, width, height, colour) {
    const span = this.steps.length * this.history.step;
    const step = [600, 1800, 3600, 7200, 10800, 21600].find((size) => (size / span) * width > 70) ?? 43200;
    const zone = new Date(this.history.start * 1000).getTimezoneOffset() * 60;
    paint.fillStyle = colour("--soft");
    paint.textAlign = "center";
    for (let at = Math.ceil((this.history.start - zone) / step) * step + zone; at < this.history.start + span; at += step) {
      const x = ((at - this.history.start) / span) * width;
      if (x < 20 || x > width - 20) continue;
      paint.fillRect(x, height - AXIS, 1, 5);
      paint.fillText(time(at), x, height - 3);
    }
  }

  /* The same for those who cannot see it: an hour in each row. */
  tabulate() {
    const perHour = Math.max(1, Math.round(3600 / this.history.step));
    const rows = [];
    for (let from = 0; from < this.steps.length; from += perHour) {
      const known = this.steps.slice(from, from + perHour).filter(Boolean);
      const at = this.history.start + from * this.history.step;
      const values = known.length
        ? [speed(known.reduce((sum, step) => sum + step.tokens, 0) / known.length), count(Math.min(...known.map((step) => step.servers))), count(Math.min(...known.flatMap((step) => [...step.low])))]
        : ["nobody looked", "", ""];
      rows.push(h("tr", null, h("th", { scope: "row" }, date(at)), values.map((value) => h("td", null, value))));
    }
    this.table.replaceChildren(
      h("thead", null, h("tr", null, ["from", "tokens/s", "servers, least", "of the rarest block"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", null, rows));
  }
}
