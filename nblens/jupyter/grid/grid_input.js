// Pointer, wheel and keys, turned into what the grid is asked to do.
import { AXES, cellAt, zoomAt, panBy } from "./grid_layout.js";

/** @import { Grid } from "./grid.js" */

/** @typedef {{x: number, y: number}} Point of the plot */

const STILL = 4; // pixels that a click may wander

/**
 * @param {HTMLElement} stage
 * @param {Grid} grid
 * @param {AbortSignal} signal
 */
export function listen(stage, grid, signal) {
  /**
   * @template {keyof HTMLElementEventMap} Name
   * @param {Name} name
   * @param {(event: HTMLElementEventMap[Name]) => void} act
   */
  const on = (name, act, options = {}) => stage.addEventListener(name, act, { signal, ...options });
  /** @type {Map<number, Point>} */
  const pointers = new Map();
  let start = { x: 0, y: 0, view: grid.view, moved: false };

  /** @param {MouseEvent} event */
  const place = (event) => {
    const bounds = stage.getBoundingClientRect();
    return { x: event.clientX - bounds.left - AXES.left, y: event.clientY - bounds.top - AXES.top };
  };

  on("pointerdown", (event) => {
    if (event.button) return;
    stage.setPointerCapture?.(event.pointerId);
    pointers.set(event.pointerId, place(event));
    start = { ...place(event), view: grid.view, moved: pointers.size > 1 };
    event.preventDefault();
    grid.focusCell();
  });
  on("pointermove", (event) => {
    const at = place(event);
    if (!pointers.has(event.pointerId)) return grid.point(cellAt(grid.view, grid.area, at.x, at.y));
    const before = spreadOf(pointers);
    pointers.set(event.pointerId, at);
    const after = spreadOf(pointers);
    if (before && after) return grid.show(zoomAt(grid.view, grid.area, after.size / before.size, after.x, after.y));
    start.moved ||= Math.hypot(at.x - start.x, at.y - start.y) > STILL;
    if (start.moved) grid.show(panBy(start.view, grid.area, start.x - at.x, start.y - at.y));
  });
  /** @param {PointerEvent} event */
  const release = (event) => {
    if (!pointers.delete(event.pointerId) || pointers.size || event.type === "pointercancel") return;
    if (!start.moved) click(grid, start);
  };
  on("pointerup", release);
  on("pointercancel", release);
  on("pointerleave", () => grid.point(null));
  on("wheel", (event) => wheel(grid, event, place(event), stage), { passive: false });
  on("keydown", (event) => {
    const act = keyAct(grid, event);
    if (!act) return;
    act();
    event.preventDefault();
    event.stopPropagation();
  });
}

/** @param {Map<number, Point>} pointers */
function spreadOf(pointers) {
  if (pointers.size !== 2) return null;
  const [a, b] = [...pointers.values()];
  return { size: Math.max(1, Math.hypot(a.x - b.x, a.y - b.y)), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
}

/** @type {(grid: Grid, at: Point) => void} */
function click(grid, at) {
  const cell = cellAt(grid.view, grid.area, at.x, at.y);
  if (cell) return grid.choose(cell, true);
  const onAxis = at.y < 0 || at.y > grid.area.height;
  const column = onAxis ? cellAt(grid.view, grid.area, at.x, 0) : null;
  if (column) grid.choose({ row: grid.focus.row, column: column.column }, false);
}

/**
 * A wheel over a grid that nobody has clicked scrolls the page: a notebook must not stop under the reader's hand.
 * @param {Grid} grid
 * @param {WheelEvent} event
 * @param {Point} at
 * @param {HTMLElement} stage
 */
function wheel(grid, event, at, stage) {
  const step = event.deltaMode === 1 ? 16 : 1;
  const sideways = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
  if (event.ctrlKey || event.metaKey || (!event.shiftKey && stage.matches(":focus-within") && Math.abs(event.deltaY) > Math.abs(event.deltaX))) {
    const factor = Math.exp(-Math.max(-60, Math.min(60, event.deltaY * step)) * 0.006);
    grid.show(zoomAt(grid.view, grid.area, factor, at.x, at.y));
  } else if (sideways) grid.show(panBy(grid.view, grid.area, sideways * step, 0));
  else return;
  event.preventDefault();
}

/** @type {(grid: Grid, event: KeyboardEvent) => (() => void) | null} */
function keyAct(grid, event) {
  const { row, column } = grid.focus;
  const { rows, columns } = grid.area;
  const far = event.ctrlKey || event.metaKey;
  /** @type {(toRow: number, toColumn: number) => () => void} */
  const move = (toRow, toColumn) => () => grid.moveFocus(toRow, toColumn);
  /** @type {Record<string, () => void>} */
  const acts = {
    ArrowUp: move(far ? rows - 1 : row + 1, column),
    ArrowDown: move(far ? 0 : row - 1, column),
    ArrowLeft: move(row, far ? 0 : column - 1),
    ArrowRight: move(row, far ? columns - 1 : column + 1),
    Home: move(far ? rows - 1 : row, 0),
    End: move(far ? 0 : row, columns - 1),
    PageUp: move(row + 10, column),
    PageDown: move(row - 10, column),
    Enter: () => grid.choose(grid.focus, true),
    " ": () => grid.choose(grid.focus, false),
    Escape: () => grid.clear(),
    "+": () => grid.zoom(1.5),
    "=": () => grid.zoom(1.5),
    "-": () => grid.zoom(1 / 1.5),
    0: () => grid.showWhole(),
    "/": () => grid.focusSearch(),
    n: () => grid.step(1),
    N: () => grid.step(-1),
  };
  const plain = !far || ["Home", "End"].includes(event.key) || event.key.startsWith("Arrow");
  return plain && !event.altKey && Object.hasOwn(acts, event.key) ? acts[event.key] : null;
}
