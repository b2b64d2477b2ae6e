// The page: conversations on the left, the route on top, words in the middle.

import { Problem, chat, models } from './client.js';
import { Message, button } from './messages.js';
import { Journey, say, showIdle, tell } from './route.js';
import * as store from './store.js';

const $ = (id) => document.getElementById(id);
const STARTERS = {
  chat: ['Explain how a hive decides where to move', 'Write a haiku about many small machines', 'What is a transformer block?'],
  plain: ['In the beginning', 'It was a dark night, and', 'My dear Mr. Bennet,', 'The Lord is my'],
};

let now = store.begin(''); // the conversation that is shown
let known = []; // models of the server
let key = store.readKey();
let writing = null; // { controller, view } while an answer comes
let views = [];

// Conversations ----------------------------------------------------------------------------------

function showConversations() {
  $('conversations').replaceChildren(...store.conversations().map((one) => {
    const item = document.createElement('li'), pick = document.createElement('button');
    pick.className = 'pick';
    pick.textContent = one.title;
    pick.dir = 'auto';
    pick.addEventListener('click', () => {
      drawer(false);
      open(one);
    });
    if (one.id === now.id) {
      item.dataset.now = '';
      pick.setAttribute('aria-current', 'true');
    }
    item.append(pick, button(`Delete “${one.title}”`, 'bin', async () => {
      if (!(await sure(`“${one.title}” will be gone for good.`))) return;
      store.remove(one.id);
      if (one.id === now.id) open(store.begin(now.model));
      else showConversations();
      $('new').focus();
    }));
    return item;
  }));
  $('forget').parentElement.hidden = !store.conversations().length;
}

function open(conversation) {
  stop();
  now = conversation;
  if (known.some((model) => model.id === now.model)) $('model').value = now.model;
  now.model = $('model').value || now.model;
  trouble('');
  showIdle(blocksOf(now.model));
  showMessages();
  showConversations();
  describeModel();
  $('ask').focus();
}

function showMessages() {
  views = now.messages.map((message) => new Message(message, acts));
  $('messages').replaceChildren(...views.map((view) => view.root));
  $('welcome').hidden = now.messages.length > 0;
  $('talk').scrollTop = $('talk').scrollHeight;
}

function sure(note) {
  const dialog = $('sure');
  $('sure-note').textContent = note;
  dialog.returnValue = 'no';
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener('close', () => done(dialog.returnValue === 'yes'), { once: true }));
}

// Asking -----------------------------------------------------------------------------------------

const acts = {
  edit(message, text) {
    if (!text.trim()) return;
    stop();
    now.messages.length = now.messages.indexOf(message);
    ask(text);
  },
  again(message) {
    stop();
    now.messages.length = now.messages.indexOf(message);
    answer();
  },
};

function ask(text) {
  now.messages.push({ role: 'user', content: text });
  answer();
}

async function answer() {
  const conversation = now, message = { role: 'assistant', content: '', events: [] };
  const body = request(conversation);
  conversation.messages.push(message);
  store.save(conversation);
  showConversations();
  showMessages();
  const view = views.at(-1), controller = new AbortController(), voice = new Voice();
  const mine = (writing = { controller, view });
  view.writing = true;
  view.onDraw = follow;
  sending(true);
  trouble('');
  say('Asking…');
  let first = 0, last = 0;
  const journey = new Journey((kind, event) => {
    if (!event) return status('A server was lost. Somebody else is taking over.');
    message.events.push({ kind, text: tell(event) });
    status(tell(event));
  });
  try {
    for await (const chunk of chat(body, key, controller.signal)) {
      if (chunk.swarm) journey.travel(chunk.swarm);
      if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
      const choice = chunk.choices[0];
      if (!choice) continue;
      if (choice.finish_reason) message.finish = choice.finish_reason;
      if (!choice.delta.content) continue;
      last = performance.now();
      first ||= last;
      message.content += choice.delta.content;
      message.tokens = (message.tokens ?? 0) + 1;
      if (mine === writing) {
        journey.word(last);
        voice.add(choice.delta.content);
        pace(message.tokens, last - first);
        view.changed();
      }
    }
  } catch (error) {
    if (error.name === 'AbortError') message.finish = 'cut';
    else if (error instanceof Problem) message.error = sentence(error.message);
    else throw error;
    if (error.status === 401) openKey(error.message);
  } finally {
    message.ms = last - first;
    message.servers = journey.servers;
    view.finish();
    if (conversation.messages.includes(message)) {
      store.save(conversation);
      showConversations();
    }
    if (mine === writing) {
      writing = null;
      sending(false);
      voice.end(message.error);
      follow();
    }
  }
}

function request({ messages, model }) {
  const { system, temperature, top_p, max_tokens, seed } = store.settings;
  const said = messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
  const body = { model, temperature, top_p, max_tokens, messages: system ? [{ role: 'system', content: system }, ...said] : said };
  return seed === null ? body : { ...body, seed };
}

function stop() {
  writing?.controller.abort();
  writing = null;
  sending(false);
}

function sending(on) {
  const send = $('send');
  send.setAttribute('aria-label', on ? 'Stop' : 'Send');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  use.setAttribute('href', on ? '#i-stop' : '#i-send');
  svg.setAttribute('aria-hidden', 'true');
  svg.append(use);
  send.replaceChildren(svg);
  send.classList.toggle('stop', on);
  if (!on) pace(0, 0);
}

function pace(tokens, ms) {
  $('pace').textContent = tokens > 3 && ms ? `${(1000 * (tokens - 1) / ms).toFixed(1)} tokens/s` : '';
}

// Stays at the end of the text, unless somebody has scrolled away from it.
let atEnd = true;
function follow() {
  if (atEnd) $('talk').scrollTop = $('talk').scrollHeight;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? '' : '.');

function trouble(text) {
  $('trouble').hidden = !text;
  $('trouble').textContent = text;
}

function status(text) {
  $('status').textContent = text;
}

// Reads the answer to screen readers: sentence by sentence, since words would drown everything.
class Voice {
  #text = '';

  constructor() {
    $('spoken').replaceChildren();
    status('The model answers');
  }

  add(text) {
    this.#text += text;
    const end = this.#text.search(/[.!?:;\n][^.!?:;\n]*$/) + 1;
    if (end > 20) this.#speak(this.#text.slice(0, end), this.#text.slice(end));
  }

  end(error) {
    this.#speak(this.#text, '');
    status(error ?? 'The answer is complete');
  }

  #speak(text, rest) {
    this.#text = rest;
    const piece = document.createElement('span');
    piece.textContent = text;
    $('spoken').append(piece);
    while ($('spoken').childElementCount > 4) $('spoken').firstChild.remove();
  }
}

// Models, key, parameters ------------------------------------------------------------------------

async function findModels() {
  try {
    known = await models(key);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    trouble(sentence(error.message));
    if (error.status === 401) openKey(error.message);
    return;
  }
  trouble('');
  $('model').replaceChildren(...known.map((model) => new Option(model.id, model.id)));
  if (known.some((model) => model.id === now.model)) $('model').value = now.model;
  now.model = $('model').value;
  if (!writing) showIdle(blocksOf(now.model));
  describeModel();
}

const oursOf = (id) => known.find((model) => model.id === id)?.swarm;
const blocksOf = (id) => oursOf(id)?.blocks ?? 0;

function describeModel() {
  const ours = oursOf($('model').value);
  const plain = ours ? !ours.chat_template : false;
  if (ours) $('max_tokens').max = ours.most_tokens;
  if (ours?.missing_blocks.length) {
    trouble(`Nobody serves blocks ${ours.missing_blocks.join(', ')} of this model now: answers have to wait for that.`);
  }
  $('ask').placeholder = plain ? 'Begin a text, and it goes on' : 'Say something';
  $('welcome-note').textContent = 'This model is spread over machines of volunteers. Each serves some of its layers, '
    + 'and every word you read has passed through all of them.'
    + (plain ? ' This one was never taught to chat: it goes on with what you begin.' : '');
  $('starters').replaceChildren(...(ours ? STARTERS[plain ? 'plain' : 'chat'] : []).map((text) => {
    const item = document.createElement('li'), made = document.createElement('button');
    made.textContent = text;
    made.addEventListener('click', () => ask(text));
    item.append(made);
    return item;
  }));
}

function openKey(note) {
  if (document.querySelector('dialog[open]')) return;
  if (note) $('key-note').textContent = sentence(note);
  $('key-value').value = key;
  $('key').returnValue = '';
  $('key').showModal();
}

const NUMBERS = ['temperature', 'top_p', 'max_tokens', 'seed'];

function showParameters() {
  for (const name of NUMBERS) $(name).value = store.settings[name] ?? '';
  $('system').value = store.settings.system;
  for (const name of ['temperature', 'top_p']) $(`${name}-now`).textContent = Number($(name).value).toFixed(2);
}

function takeParameters() {
  for (const name of NUMBERS) {
    const field = $(name), value = field.valueAsNumber;
    if (Number.isFinite(value) && field.validity.valid) store.settings[name] = value;
    else if (name === 'seed') store.settings.seed = null;
  }
  store.settings.system = $('system').value.trim();
  store.saveSettings();
  for (const name of ['temperature', 'top_p']) $(`${name}-now`).textContent = store.settings[name].toFixed(2);
}

// Everything that can be pressed -----------------------------------------------------------------

function drawer(open) {
  document.body.toggleAttribute('data-drawer', open);
  $('open-drawer').setAttribute('aria-expanded', String(open));
  $('room').inert = open;
  (open ? $('close-drawer') : $('open-drawer')).focus();
}

function theme(choice) {
  if (choice === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  $('theme').lastElementChild.textContent = `Theme: ${choice}`;
}

function listen() {
  $('composer').addEventListener('submit', async (event) => {
    event.preventDefault();
    if (writing) return stop();
    if (!$('model').value) await findModels(); // asked before the page knew of any
    const text = $('ask').value;
    if (writing || !text.trim() || !$('model').value) return;
    $('ask').value = '';
    ask(text);
  });
  $('ask').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!writing) $('composer').requestSubmit();
    } else if (event.key === 'ArrowUp' && !$('ask').value && !writing) {
      views.findLast((view) => view.message.role === 'user')?.edit();
      event.preventDefault();
    }
  });
  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || document.querySelector('dialog[open]')) return;
    if (document.body.hasAttribute('data-drawer')) drawer(false);
    else if (writing) stop();
  });
  $('talk').addEventListener('scroll', () => {
    const talk = $('talk');
    atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  }, { passive: true });
  $('new').addEventListener('click', () => {
    if (document.body.hasAttribute('data-drawer')) drawer(false);
    open(store.begin($('model').value));
  });
  $('forget').addEventListener('click', async () => {
    if (!(await sure('All conversations in this browser will be gone for good.'))) return;
    store.removeAll();
    open(store.begin($('model').value));
  });
  $('model').addEventListener('change', () => {
    now.model = $('model').value;
    trouble('');
    if (!writing) showIdle(blocksOf(now.model));
    describeModel();
  });
  $('open-drawer').addEventListener('click', () => drawer(true));
  $('close-drawer').addEventListener('click', () => drawer(false));
  document.addEventListener('click', (event) => {
    if (document.body.hasAttribute('data-drawer') && event.target === document.body) drawer(false);
  });
  $('theme').addEventListener('click', () => {
    const next = { system: 'light', light: 'dark', dark: 'system' }[store.readTheme()] ?? 'system';
    store.saveTheme(next);
    theme(next);
  });
  $('open-parameters').addEventListener('click', () => {
    showParameters();
    $('parameters').showModal();
  });
  $('parameters').addEventListener('input', takeParameters);
  $('defaults').addEventListener('click', () => {
    Object.assign(store.settings, store.DEFAULTS);
    store.saveSettings();
    showParameters();
  });
  $('open-privacy').addEventListener('click', () => $('privacy').showModal());
  $('open-key').addEventListener('click', () => openKey());
  $('key').addEventListener('close', () => {
    if (!$('key').returnValue) return;
    key = $('key').returnValue === 'save' ? $('key-value').value.trim() : '';
    store.saveKey(key);
    findModels();
  });
}

addEventListener('pagehide', () => writing && store.save(now));
theme(store.readTheme());
sending(false);
listen();
open(store.begin(''));
findModels();
