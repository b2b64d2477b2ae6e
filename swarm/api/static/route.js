// The servers that the words pass through, as a bar of blocks; and what happens to them.

const HUES = [40, 168, 255, 335, 205, 95, 290, 15]; // far apart; blocks and names tell them apart, too
const NEW_MS = 4000;

const bar = document.getElementById('legs'), note = document.getElementById('route-note');
const hues = new Map(); // of peers, in the order in which they were met

// Strangers choose their names: nothing that turns text around, hides it or breaks the line.
const clean = (name) => name.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '').trim();
export const nameOf = (leg) => clean(leg.name) || `…${leg.peer.slice(-8)}`;

function hueOf(peer) {
  if (!hues.has(peer)) hues.set(peer, HUES[hues.size % HUES.length]);
  return hues.get(peer);
}

const size = (blocks) => {
  const [start, end] = blocks.split(':').map(Number);
  return end - start;
};

function piece(leg, state) {
  const item = document.createElement('li');
  const name = document.createElement('bdi'), blocks = document.createElement('small');
  item.style.setProperty('--share', size(leg.blocks));
  item.style.setProperty('--hue', hueOf(leg.peer));
  item.dataset.state = state;
  item.title = `${nameOf(leg)}: blocks ${leg.blocks}\npeer ${leg.peer}`;
  name.textContent = nameOf(leg);
  const word = document.createElement('span'); // left out where there is no room for it
  word.className = 'word';
  word.textContent = { lost: 'lost: ', new: 'took over ' }[state] ?? 'blocks ';
  blocks.append(word, leg.blocks);
  item.append(name, blocks);
  return item;
}

export function say(text, kind = '') {
  note.textContent = text;
  note.dataset.kind = kind;
}

// Before anything was asked: so many blocks, and nobody chosen for them.
export function showIdle(blocks) {
  bar.replaceChildren(...Array.from({ length: Math.min(blocks, 200) }, () => {
    const item = document.createElement('li');
    item.dataset.state = 'idle';
    return item;
  }));
  say(blocks ? `${blocks} blocks. Who computes them is chosen when you ask.` : '');
}

function tellRoute(legs) {
  const blocks = legs.reduce((sum, leg) => sum + size(leg.blocks), 0);
  const who = legs.length === 1 ? 'One server computes' : `${legs.length} servers share`;
  say(`${who} the ${blocks} blocks of this model. Every word passes through ${legs.length === 1 ? 'it' : 'all of them'}.`);
}

// Follows one answer: what changed about its servers, as events for people.
export class Journey {
  #legs = []; #recoveries = 0; #lostAt = 0; #lost = []; #fresh = new Map(); #lastWord = 0; #flashed = 0;

  constructor(onEvent) {
    this.onEvent = onEvent;
    this.pending = null; // a failover whose first word has not come yet
  }

  get servers() {
    return this.#legs.map((leg) => ({ blocks: leg.blocks, name: nameOf(leg), peer: leg.peer }));
  }

  travel({ route, recoveries }, now = performance.now()) {
    const lost = route.filter((leg) => leg.lost);
    if (lost.length) {
      this.#lostAt ||= now;
      this.#lost = lost;
      say(`${list(lost.map(nameOf))} is gone. Somebody else is taking over…`, 'lost');
      this.onEvent('lost', null);
    } else if (!this.#legs.length) {
      tellRoute(route);
    } else {
      const before = new Set(this.#legs.map((leg) => leg.peer + leg.blocks));
      const after = new Set(route.map((leg) => leg.peer + leg.blocks));
      const gone = this.#legs.filter((leg) => !after.has(leg.peer + leg.blocks));
      const came = route.filter((leg) => !before.has(leg.peer + leg.blocks));
      for (const leg of came) {
        this.#fresh.set(leg.peer, now);
        setTimeout(() => this.#legs.includes(leg) && this.#draw(this.#legs, performance.now()), NEW_MS + 10);
      }
      // Servers change first, and then the count of failures: both are the same event.
      if (came.length) {
        this.pending = {
          kind: this.pending?.kind ?? 'move', since: this.pending?.since ?? (this.#lostAt || this.#lastWord || now),
          gone: [...(this.pending?.gone ?? []), ...gone.map(nameOf)], came: came.map(nameOf), blocks: came.map((leg) => leg.blocks),
        };
      }
      if (recoveries > this.#recoveries) {
        const same = { since: this.#lostAt || this.#lastWord || now, gone: this.#lost.map(nameOf), came: [], blocks: this.#lost.map((leg) => leg.blocks) };
        this.pending = { ...(this.pending ?? same), kind: 'failover' };
      }
    }
    this.#recoveries = recoveries;
    if (!lost.length) this.#legs = route;
    this.#draw(route, now);
  }

  // A word has come through all of them.
  word(now = performance.now()) {
    this.#lastWord = now;
    this.#lostAt = 0;
    this.#lost = [];
    if (this.pending) {
      const event = { ...this.pending, pause: Math.max(0, now - this.pending.since) };
      this.pending = null;
      this.#draw(this.#legs, now);
      say(tell(event), 'mended');
      this.onEvent(event.kind, event);
    }
    if (now - this.#flashed > 600) {
      this.#flashed = now;
      [...bar.children].forEach((item, index) => {
        item.classList.remove('flash');
        item.style.setProperty('--delay', `${index * 0.09}s`);
        void item.offsetWidth; // so that it begins anew
        item.classList.add('flash');
      });
    }
  }

  #draw(route, now) {
    const state = (leg) => (leg.lost ? 'lost' : now - (this.#fresh.get(leg.peer) ?? -Infinity) < NEW_MS ? 'new' : 'up');
    bar.replaceChildren(...route.map((leg) => piece(leg, state(leg))));
  }
}

// A name that is written from right to left must not turn the sentence around it.
const list = (names) => names.map((name) => `\u2068${name}\u2069`).join(' and ') || 'A server';

export function tell({ kind, gone, came, blocks, pause }) {
  const where = `blocks ${blocks.join(' and ')}`;
  const who = came.length ? `${list(came)} took over ${where}` : 'it came back';
  const long = pause < 995 ? `${Math.round(pause)} ms` : `${(pause / 1000).toFixed(1)} s`;
  return kind === 'move'
    ? `${list(gone)} left politely: ${who}. The text went on.`
    : `${list(gone)} was lost: ${who}. ${long} of pause, not a word lost.`;
}
