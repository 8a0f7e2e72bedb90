// Elements of the page. Text goes in as text alone: what a model says is never read as markup.

import { keepShortcutsAway } from "../shortcuts.js";

/** An element with attributes, and with children that are elements or text. */
export function element(tag, attributes = {}, ...children) {
  return keepShortcutsAway(filled(document.createElement(tag), attributes, children));
}

export function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A button with a name for those who cannot see its sign. */
export function button(sign, name, act, signal) {
  const node = element("button", { type: "button", title: name, "aria-label": name }, sign);
  node.addEventListener("click", act, { signal });
  return node;
}

/** Give a canvas its size in the page's pixels and a context that draws in them, sharp on any screen. */
export function sizedContext(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const size = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  canvas.style.width = `${size[0] / ratio}px`;
  canvas.style.height = `${size[1] / ratio}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/** Offer a file to be saved. */
export function save(name, blob) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
