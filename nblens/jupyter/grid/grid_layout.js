// Where cells are. Row 0, the first block, is at the bottom.

/** @typedef {{x: number, y: number, w: number, h: number}} Box left, top and size in pixels; of a view, how far the grid
 * is scrolled and how large a cell is */
/** @typedef {{width: number, height: number, columns: number, rows: number}} Area the room inside the axes in pixels, and
 * the grid's size */
/** @typedef {{row: number, column: number}} Cell */
/** @typedef {{left: number, right: number, low: number, high: number}} Range first and last column and row */

export const AXES = { left: 46, top: 21, right: 2, bottom: 37 };
const WIDEST = 150;
const TALLEST = 30;
const COMFORTABLE = { w: 78, h: 19 };
const READABLE = 36;
const OVERVIEW = 96; // with more tokens than this, all of them are shown as colours at first
const HIGHEST_PLOT = 460;

/** @type {(value: number, low: number, high: number) => number} */
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/**
 * Height of the room inside the axes.
 * @param {number} rows
 */
export function plotHeight(rows) {
  return Math.min(rows * COMFORTABLE.h, Math.max(HIGHEST_PLOT, 2 * rows));
}

/** @param {Area} area */
function smallest({ width, height, columns, rows }) {
  return { w: Math.min(width / Math.max(columns, 1), COMFORTABLE.w), h: Math.min(height / Math.max(rows, 1), COMFORTABLE.h) };
}

/**
 * The view with its cell size and its place within what is there.
 * @param {Box} view
 * @param {Area} area
 * @returns {Box}
 */
function clampView(view, area) {
  const least = smallest(area);
  const w = clamp(view.w, least.w, WIDEST);
  const h = clamp(view.h, least.h, Math.max(TALLEST, least.h));
  return {
    w, h,
    x: clamp(view.x, 0, Math.max(0, area.columns * w - area.width)),
    y: clamp(view.y, 0, Math.max(0, area.rows * h - area.height)),
  };
}

/**
 * All of a long sequence as colours; a short one with its tokens readable.
 * @param {Area} area
 */
export function firstView(area) {
  const { w, h } = smallest(area);
  const readable = w < READABLE && area.columns <= OVERVIEW ? 48 : w;
  return clampView({ x: 0, y: 0, w: readable, h }, area);
}

/** @param {Area} area */
export function wholeView(area) {
  return clampView({ x: 0, y: 0, w: 0, h: 0 }, area);
}

/**
 * Larger or smaller, with the point (px, py) of the plot staying where it is.
 * @param {Box} view
 * @param {Area} area
 * @param {number} factor
 * @param {number} px
 * @param {number} py
 */
export function zoomAt(view, area, factor, px, py) {
  const sized = clampView({ ...view, w: view.w * factor, h: view.h * factor }, area);
  return clampView(
    { ...sized, x: ((view.x + px) * sized.w) / view.w - px, y: ((view.y + py) * sized.h) / view.h - py },
    area,
  );
}

/**
 * @param {Box} view
 * @param {Area} area
 * @param {number} dx
 * @param {number} dy
 */
export function panBy(view, area, dx, dy) {
  return clampView({ ...view, x: view.x + dx, y: view.y + dy }, area);
}

/**
 * The cell at a point of the plot.
 * @param {Box} view
 * @param {Area} area
 * @param {number} px
 * @param {number} py
 * @returns {Cell | null}
 */
export function cellAt(view, area, px, py) {
  const column = Math.floor((px + view.x) / view.w);
  const row = area.rows - 1 - Math.floor((py + view.y) / view.h);
  const inside = px >= 0 && py >= 0 && px <= area.width && py <= area.height;
  return inside && column >= 0 && column < area.columns && row >= 0 && row < area.rows ? { row, column } : null;
}

/**
 * Where a cell is in the plot.
 * @param {Box} view
 * @param {Area} area
 * @param {number} row
 * @param {number} column
 * @returns {Box}
 */
export function cellBox(view, area, row, column) {
  return { x: column * view.w - view.x, y: (area.rows - 1 - row) * view.h - view.y, w: view.w, h: view.h };
}

/**
 * What can be seen.
 * @param {Box} view
 * @param {Area} area
 * @returns {Range}
 */
export function visibleRange(view, area) {
  /** @type {(offset: number, size: number, room: number, count: number) => number} */
  const last = (offset, size, room, count) => Math.min(count - 1, Math.ceil((offset + room) / size) - 1);
  return {
    left: Math.max(0, Math.floor(view.x / view.w)),
    right: last(view.x, view.w, area.width, area.columns),
    low: area.rows - 1 - last(view.y, view.h, area.height, area.rows),
    high: area.rows - 1 - Math.max(0, Math.floor(view.y / view.h)),
  };
}

/**
 * The view in which a cell is wholly visible, moved as little as that takes.
 * @param {Box} view
 * @param {Area} area
 * @param {number} row
 * @param {number} column
 */
export function reveal(view, area, row, column) {
  const box = cellBox(view, area, row, column);
  /** @type {(at: number, size: number, room: number) => number} */
  const shift = (at, size, room) => (at < 0 ? at : Math.max(0, Math.min(at, at + size - room)));
  return panBy(view, area, shift(box.x, box.w, area.width), shift(box.y, box.h, area.height));
}

/**
 * How many cells apart labels stand that need `room` pixels each: 1, 2, 5, 10, 20, …
 * @param {number} size
 * @param {number} room
 */
export function labelStride(size, room) {
  for (let unit = 1; ; unit *= 10) for (const step of [1, 2, 5]) if (unit * step * size >= room) return unit * step;
}

/**
 * The view after the grid grew: one that was scrolled to its end stays there.
 * @param {Box} view
 * @param {Area} before
 * @param {Area} after
 */
export function followed(view, before, after) {
  const atEnd = view.x + before.width >= before.columns * view.w - 1;
  const fitted = Math.abs(view.w - smallest(before).w) < 1e-6;
  const next = fitted ? { ...view, w: Math.max(smallest(after).w, Math.min(view.w, READABLE)) } : view;
  return clampView(atEnd && after.columns > before.columns ? { ...next, x: Infinity } : next, after);
}

/**
 * Places for labels that want to be at `wanted`, at least `gap` apart and within [low, high], in the same order.
 * @param {number[]} wanted
 * @param {number} gap
 * @param {number} low
 * @param {number} high
 */
export function spread(wanted, gap, low, high) {
  const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]);
  /** @type {number[]} */
  const placed = [];
  let floor = low;
  for (const i of order) floor = (placed[i] = Math.max(wanted[i], floor)) + gap;
  let ceiling = high;
  for (const i of order.reverse()) ceiling = (placed[i] = Math.min(placed[i], ceiling)) - gap;
  return placed;
}
