/* How to join, with the command for what is needed most right now. */

import { h, say } from "./dom.js";
import { plural } from "./words.js";

export class Join {
  constructor() {
    this.choices = h("div", { class: "choices" });
    this.blocks = h("strong");
    this.command = h("code");
    this.copy = h("button", { type: "button", class: "copy", onclick: () => this.copied() }, "copy");
    this.said = h("span", { role: "status", class: "copied" });
    this.element = h("div", { class: "join" },
      h("p", { class: "need" }, "A newcomer would do most good with blocks ", this.blocks, "."),
      h("fieldset", null, h("legend", null, "This many fit on my machine:"), this.choices),
      h("div", { class: "command" }, h("pre", { tabindex: "0", role: "region", "aria-label": "Command to join" }, this.command), this.copy),
      h("p", { class: "soft" }, "It takes what is needed most when it starts, and moves when others need it more. The model’s files must be the same as everybody’s. ", this.said));
    this.chosen = null; // a number of blocks, once somebody has chosen
  }

  set(model) {
    this.model = model;
    const counts = model.needs.map((need) => need.count).join();
    if (this.counts !== counts) {
      this.counts = counts;
      this.choices.replaceChildren(...model.needs.map((need) =>
        h("label", null, h("input", { type: "radio", name: "count", value: need.count, onchange: () => this.choose(need.count) }), h("span", null, need.count === model.num_blocks ? `all ${need.count}` : plural(need.count, "block")))));
    }
    this.show();
  }

  choose(count) {
    this.chosen = count;
    this.show();
  }

  show() {
    const { needs, need } = this.model;
    const index = Math.max(0, needs.findIndex((each) => each.count === this.chosen));
    const wanted = this.chosen === null ? needs[need] : needs[index];
    for (const input of this.choices.querySelectorAll("input")) input.checked = Number(input.value) === wanted.count;
    say(this.blocks, wanted.blocks);
    say(this.command, wanted.command);
  }

  async copied() {
    try {
      await navigator.clipboard.writeText(this.command.textContent);
      say(this.said, "Copied.");
    } catch {
      getSelection().selectAllChildren(this.command); // not a secure context: let them do it
      say(this.said, "Selected: copy it with Ctrl-C.");
    }
  }
}
