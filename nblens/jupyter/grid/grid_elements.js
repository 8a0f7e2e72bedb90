// Buttons, canvases and files of the grid.
import { element } from "../elements.js";
import { AXES } from "./grid_layout.js";

/** @import { Area, Box } from "./grid_layout.js" */

/**
 * A button with a name for those who cannot see its sign.
 * @param {string} sign
 * @param {string} name
 * @param {() => void} act
 * @param {AbortSignal} signal
 */
export function button(sign, name, act, signal) {
  const node = element("button", { type: "button", title: name, "aria-label": name }, sign);
  node.addEventListener("click", act, { signal });
  return node;
}

/** @param {HTMLCanvasElement} canvas */
export function contextOf(canvas) {
  const context = canvas.getContext("2d");
  if (!context) throw new Error("this page cannot draw on a canvas");
  return context;
}

/**
 * Give a canvas its size in the page's pixels and a context that draws in them, sharp on any screen.
 * @param {HTMLCanvasElement} canvas
 * @param {number} width
 * @param {number} height
 */
export function sizedContext(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const size = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  canvas.style.width = `${size[0] / ratio}px`;
  canvas.style.height = `${size[1] / ratio}px`;
  const context = contextOf(canvas);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/**
 * Lay an element over a cell, within the plot.
 * @param {HTMLElement} node
 * @param {Box} box
 * @param {Area} area
 */
export function layOver(node, box, area) {
  /** @type {(at: number, size: number, room: number) => [number, number]} */
  const clip = (at, size, room) => [Math.max(0, Math.min(at, room)), Math.max(0, Math.min(at + size, room))];
  const [left, right] = clip(box.x, Math.max(box.w, 4), area.width);
  const [top, bottom] = clip(box.y, Math.max(box.h, 4), area.height);
  node.style.transform = `translate(${AXES.left + left}px, ${AXES.top + top}px)`;
  node.style.width = `${right - left}px`;
  node.style.height = `${bottom - top}px`;
  node.style.visibility = right > left && bottom > top ? "" : "hidden";
}

/**
 * Offer a file to be saved.
 * @param {string} name
 * @param {Blob} blob
 */
export function save(name, blob) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
