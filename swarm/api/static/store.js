// What this browser keeps: conversations, parameters, the key. Nothing of it leaves but in requests.

const CONVERSATIONS = 'swarm.conversations', SETTINGS = 'swarm.settings';
const KEY = 'swarm.key', THEME = 'swarm.theme';
const MOST = 200; // conversations; the oldest are forgotten

export const DEFAULTS = { temperature: 0.8, top_p: 0.95, max_tokens: 400, seed: null, system: '' };

function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise; // not ours, or storage is switched off
  }
}

// Returns whether there was room for it.
function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(name);
    else localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export const settings = { ...DEFAULTS, ...load(SETTINGS, {}) };
export const saveSettings = () => keep(SETTINGS, settings);

export const readKey = () => load(KEY, '');
export const saveKey = (key) => keep(KEY, key || null);

export const readTheme = () => load(THEME, 'system');
export const saveTheme = (theme) => keep(THEME, theme);

let all = load(CONVERSATIONS, []);
if (!Array.isArray(all)) all = [];

export const conversations = () => all;

export function begin(model) {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: '', model, messages: [], at: Date.now() };
}

// To the top of the list. Forgets the oldest ones until the rest fits.
export function save(conversation) {
  conversation.at = Date.now();
  conversation.title ||= title(conversation);
  all = [conversation, ...all.filter((one) => one.id !== conversation.id)].slice(0, MOST);
  while (!keep(CONVERSATIONS, all) && all.length > 1) all.pop();
}

export function remove(id) {
  all = all.filter((one) => one.id !== id);
  keep(CONVERSATIONS, all);
}

export function removeAll() {
  all = [];
  keep(CONVERSATIONS, null);
}

function title(conversation) {
  const text = conversation.messages.find((message) => message.role === 'user')?.content ?? '';
  const line = text.trim().split(/\s+/).join(' ');
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || 'Empty';
}
