/* Elements out of values. Text is only ever text: nothing here parses HTML. */

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const h = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

export const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/* What a stranger wrote: isolated, so that its direction does not reach what stands beside it. */
export const name = (text, extra = "") => h("bdi", { class: `name ${extra}`, title: text }, text);

/* Put text there if it is another one: most updates change little. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/* A share of 1 as a width: style attributes are forbidden to pages like this one, properties not. */
export function bar(share) {
  const element = h("span", { class: "bar", "aria-hidden": "true" });
  element.style.setProperty("--share", Math.max(0, Math.min(1, share)));
  return element;
}

/* Hexagon with flat top around (x, y), as a path. */
export function hexagon(x, y, r) {
  const points = [];
  for (let corner = 0; corner < 6; corner++) {
    const angle = (Math.PI / 3) * corner;
    points.push(`${(x + r * Math.cos(angle)).toFixed(1)} ${(y + r * Math.sin(angle)).toFixed(1)}`);
  }
  return `M${points.join("L")}Z`;
}
