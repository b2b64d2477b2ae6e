// A stranger's markdown as safe elements: no scripts, no pictures, no forms, no styles, no frames.

import { Marked } from './vendor/marked.js';
import DOMPurify from './vendor/purify.js';

const marked = new Marked({ gfm: true, breaks: true, async: false });

const SAFE = {
  ALLOWED_TAGS: [
    ...['p', 'br', 'hr', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'blockquote', 'ul', 'ol', 'li'],
    ...['pre', 'code', 'em', 'strong', 'del', 'a', 'table', 'thead', 'tbody', 'tr', 'th', 'td'],
  ],
  ALLOWED_ATTR: ['href', 'start'],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

// HTML in the text is shown as text: marked hands it on only escaped.
const escape = (text) => text.replace(/[&<>]/g, (c) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;' })[c]);
marked.use({
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ text, href }) => `${escape(text || 'picture')} (${escape(href)})`, // would call another host
  },
});

export function render(text, into) {
  const fragment = DOMPurify.sanitize(marked.parse(text), SAFE);
  for (const link of fragment.querySelectorAll('a')) {
    link.target = '_blank';
    link.rel = 'noopener noreferrer nofollow';
    link.title = link.getAttribute('href') ?? ''; // where it really leads
  }
  for (const block of fragment.querySelectorAll('pre')) block.replaceWith(withCopy(block));
  for (const block of fragment.children) block.dir = 'auto';
  into.replaceChildren(fragment);
}

function withCopy(block) {
  const frame = document.createElement('div'), button = document.createElement('button');
  frame.className = 'code';
  button.className = 'copy';
  button.type = 'button';
  button.textContent = 'Copy';
  button.addEventListener('click', async () => {
    await navigator.clipboard?.writeText(block.textContent).then(() => (button.textContent = 'Copied'), () => {});
  });
  block.tabIndex = 0; // it scrolls
  frame.append(block.cloneNode(true), button);
  return frame;
}
