// One message each: its text, what can be done with it, what happened while it was written.

import { render } from './markdown.js';

const icon = (name) => {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  svg.setAttribute('aria-hidden', 'true');
  use.setAttribute('href', `#i-${name}`);
  svg.append(use);
  return svg;
};

export function button(label, name, act) {
  const made = document.createElement('button');
  made.type = 'button';
  made.className = 'icon';
  made.setAttribute('aria-label', label);
  made.title = label;
  made.append(icon(name));
  made.addEventListener('click', act);
  return made;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const seconds = (ms) => (ms < 10_000 ? (ms / 1000).toFixed(1) : Math.round(ms / 1000)) + ' s';

export class Message {
  #drawn = 0; #cost = 0; #timer = null;

  // `acts`: edit(message), again(message)
  constructor(message, acts) {
    this.message = message;
    this.acts = acts;
    this.root = element('li', `said ${message.role}`);
    this.root.append(element('span', 'hidden', message.role === 'user' ? 'You said:' : 'The model said:'));
    this.body = element('div', 'body');
    this.body.dir = 'auto';
    this.events = element('ul', 'events');
    this.tools = element('div', 'tools');
    this.root.append(this.body, this.events, this.tools);
    this.draw();
    this.finish();
  }

  set writing(on) {
    this.root.classList.toggle('writing', on);
    this.root.setAttribute('aria-busy', String(on));
  }

  // At most once a frame, and less often when it takes long.
  changed() {
    const wait = Math.max(16, 4 * this.#cost) - (performance.now() - this.#drawn);
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      this.draw();
      this.onDraw?.();
    }, Math.max(0, wait));
  }

  draw() {
    const begun = performance.now();
    if (this.message.role === 'user') this.body.textContent = this.message.content;
    else render(this.message.content, this.body);
    this.#drawn = performance.now();
    this.#cost = this.#drawn - begun;
  }

  // The text is complete, as far as it goes.
  finish() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.draw();
    this.writing = false;
    this.root.querySelector('.error')?.remove();
    if (this.message.error) this.events.before(element('p', 'error', this.message.error));
    this.events.replaceChildren(...(this.message.events ?? []).map(({ kind, text }) => {
      const item = element('li', '', text);
      item.dataset.kind = kind;
      item.dir = 'auto';
      return item;
    }));
    this.events.hidden = !this.events.childElementCount;
    this.#showTools();
  }

  #showTools() {
    const { message, acts } = this, tools = [];
    tools.push(button('Copy', 'copy', (event) => {
      navigator.clipboard?.writeText(message.content).then(() => (event.target.closest('button').title = 'Copied'), () => {});
    }));
    if (message.role === 'user') tools.push(button('Edit and ask again', 'edit', () => this.edit()));
    else tools.push(button('Write it again', 'again', () => acts.again(message)));
    if (message.tokens) {
      const pace = message.tokens > 1 && message.ms ? `, ${(1000 * (message.tokens - 1) / message.ms).toFixed(1)} tokens/s` : '';
      const servers = message.servers?.length ? ` · ${message.servers.length} server${message.servers.length > 1 ? 's' : ''}` : '';
      const why = { length: ' · reached the longest answer allowed', cut: ' · you stopped it' }[message.finish] ?? '';
      tools.push(element('span', 'figures', `${message.tokens} tokens${pace}${message.ms ? ` · ${seconds(message.ms)}` : ''}${servers}${why}`));
      if (message.servers) tools.at(-1).title = message.servers.map((one) => `${one.blocks}  ${one.name}  ${one.peer}`).join('\n');
    }
    this.tools.replaceChildren(...tools);
  }

  edit() {
    const form = element('form', 'edit'), area = element('textarea', ''), menu = element('menu', '');
    area.value = this.message.content;
    area.setAttribute('aria-label', 'Your message, to be changed');
    const cancel = element('button', 'quiet', 'Cancel'), ask = element('button', 'main', 'Ask again');
    cancel.type = 'button';
    menu.append(cancel, ask);
    form.append(area, menu);
    const back = () => {
      form.replaceWith(this.body);
      this.tools.hidden = false;
    };
    cancel.addEventListener('click', back);
    area.addEventListener('keydown', (event) => {
      if (event.key === 'Escape') {
        event.stopPropagation();
        back();
      } else if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    form.addEventListener('submit', (event) => {
      event.preventDefault();
      back();
      this.acts.edit(this.message, area.value);
    });
    this.tools.hidden = true;
    this.body.replaceWith(form);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}
