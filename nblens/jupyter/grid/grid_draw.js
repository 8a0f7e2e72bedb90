// The grid on its canvas: one picture of a pixel for each cell, stretched; over it whatever there is room for.
import { fit } from "./grid_text.js";
import { levelOn, paletteOf } from "./grid_colors.js";
import { NONE } from "./grid_data.js";
import { contextOf } from "./grid_elements.js";
import { AXES, cellBox, labelStride, visibleRange } from "./grid_layout.js";

/** @import { Metric, Panel } from "./grid_data.js" */
/** @import { Area, Box, Cell, Range } from "./grid_layout.js" */
/** @import { Theme } from "./grid_theme.js" */

/** @typedef {{panel: Panel, cells: ReturnType<typeof paintCells>, view: Box, area: Area, theme: Theme, fitted: Fitted,
 *   found: Cell[], current: Cell | undefined, selected: Cell | null, pointed: Cell | null}} Scene */
/** @typedef {(context: CanvasRenderingContext2D, scene: Scene, range: Range) => void} Draw */

const TEXT = { w: 25, h: 12 };
const LINES = 6; // cells larger than this stand apart
const MARK = 9;
const FOUND = "#e6007a";

/**
 * Levels of every cell, and the picture of one pixel for each; both are kept until numbers or scale change.
 * @param {Panel} panel
 * @param {Metric} metric
 */
export function paintCells(panel, metric) {
  const scale = panel.scale(metric);
  const { pixels } = paletteOf(scale);
  const { rows, columns } = panel;
  const levels = new Int8Array(rows * columns);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [Math.max(columns, 1), Math.max(rows, 1)];
  const context = contextOf(canvas);
  const image = context.createImageData(canvas.width, canvas.height);
  const words = new Uint32Array(image.data.buffer);
  for (let column = 0; column < columns; column++)
    for (let row = 0; row < rows; row++) {
      const level = levelOn(scale, panel.value(metric, row, column));
      levels[column * rows + row] = level;
      if (level >= 0) words[(rows - 1 - row) * canvas.width + column] = pixels[level];
    }
  context.putImageData(image, 0, 0);
  return { canvas, levels, inks: paletteOf(scale).inks };
}

/** Texts cut to a number of columns, each once. */
export class Fitted {
  constructor() {
    this.columns = -1;
    /** @type {Map<number, string>} */
    this.texts = new Map();
  }

  /**
   * @param {Panel} panel
   * @param {number} place
   * @param {number} columns
   */
  get(panel, place, columns) {
    if (columns !== this.columns) [this.columns, this.texts] = [columns, new Map()];
    let text = this.texts.get(place);
    if (text === undefined) this.texts.set(place, (text = fit(panel.text(place), columns)));
    return text;
  }
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Scene} scene
 */
export function drawGrid(context, scene) {
  const { area, theme } = scene;
  context.fillStyle = theme.bg;
  context.fillRect(0, 0, AXES.left + area.width + AXES.right, AXES.top + area.height + AXES.bottom);
  if (!area.columns) return;
  context.save();
  context.beginPath();
  context.rect(AXES.left, AXES.top, area.width, area.height);
  context.clip();
  context.translate(AXES.left, AXES.top);
  const range = visibleRange(scene.view, area);
  drawCells(context, scene, range);
  drawMarks(context, scene, range);
  if (scene.view.w >= TEXT.w && scene.view.h >= TEXT.h) drawTokens(context, scene, range);
  drawFound(context, scene, range);
  drawSelected(context, scene);
  context.restore();
  drawBlocks(context, scene, range);
  drawTokenAxes(context, scene, range);
}

/** @type {Draw} */
function drawCells(context, { cells, view, area, theme, panel }, { left, right, low, high }) {
  const n = right - left + 1;
  const m = high - low + 1;
  const corner = cellBox(view, area, high, left);
  context.imageSmoothingEnabled = view.w < 1;
  context.drawImage(cells.canvas, left, area.rows - 1 - high, n, m, corner.x, corner.y, n * view.w, m * view.h);
  context.fillStyle = theme.bg;
  if (view.w > LINES && view.h > LINES) {
    for (let i = 0; i <= n; i++) context.fillRect(corner.x + i * view.w - 0.5, 0, 1, area.height);
    for (let i = 0; i <= m; i++) context.fillRect(0, corner.y + i * view.h - 0.5, area.width, 1);
  }
  const split = panel.sheet.promptLength;
  if (split > 0 && split < area.columns) context.fillRect(split * view.w - view.x - 2, 0, 4, area.height);
}

/**
 * A corner of each cell that agrees with the last block or, in a difference, that changed.
 * @type {Draw}
 */
function drawMarks(context, { panel, cells, view, area }, { left, right, low, high }) {
  if (view.w < MARK || view.h < MARK) return;
  const size = Math.min(5, view.w / 4);
  for (const color of ["#000000", "#ffffff"]) {
    context.beginPath();
    for (let column = left; column <= right; column++)
      for (let row = low; row <= high; row++) {
        const level = cells.levels[column * area.rows + row];
        if (level < 0 || cells.inks[level] !== color || !panel.marked(row, column)) continue;
        const { x, y, w } = cellBox(view, area, row, column);
        context.moveTo(x + w - 0.5 - size, y + 0.5);
        context.lineTo(x + w - 0.5, y + 0.5);
        context.lineTo(x + w - 0.5, y + 0.5 + size);
      }
    context.fillStyle = color;
    context.fill();
  }
}

/** @type {Draw} */
function drawTokens(context, { panel, cells, view, area, theme, fitted }, { left, right, low, high }) {
  context.font = `11px ${theme.mono}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  const columns = Math.floor((view.w - 5) / context.measureText("0").width);
  for (const color of ["#000000", "#ffffff", theme.fg]) {
    context.fillStyle = color;
    for (let column = left; column <= right; column++)
      for (let row = low; row <= high; row++) {
        const level = cells.levels[column * area.rows + row];
        if ((level < 0 ? theme.fg : cells.inks[level]) !== color) continue;
        const { x, y, w, h } = cellBox(view, area, row, column);
        context.fillText(fitted.get(panel, panel.top(row, column), columns), x + w / 2, y + h / 2 + 0.5, w - 3);
      }
  }
}

/**
 * Outlines of what was searched; where cells are small, dots that can still be seen.
 * @type {Draw}
 */
function drawFound(context, { found, current, view, area }, { left, right, low, high }) {
  if (!found.length) return;
  const seen = found.filter(({ row, column }) => column >= left && column <= right && row >= low && row <= high);
  const grown = { w: Math.max(view.w, 3), h: Math.max(view.h, 3) };
  for (const [color, width] of /** @type {[string, number][]} */ ([["#ffffff", 3], [FOUND, 1.8]])) {
    context.beginPath();
    for (const { row, column } of seen) {
      const { x, y } = cellBox(view, area, row, column);
      if (view.w > 5) context.rect(x + 1, y + 1, grown.w - 2, grown.h - 2);
      else if (color === FOUND) context.rect(x, y, grown.w, grown.h);
    }
    context.strokeStyle = context.fillStyle = color;
    context.lineWidth = width;
    if (view.w > 5) context.stroke();
    else context.fill();
  }
  if (!current) return;
  const { x, y } = cellBox(view, area, current.row, current.column);
  context.strokeStyle = FOUND;
  context.lineWidth = 3;
  context.strokeRect(x - 1, y - 1, grown.w + 2, grown.h + 2);
}

/** @type {(context: CanvasRenderingContext2D, scene: Scene) => void} */
function drawSelected(context, { selected, view, area, theme }) {
  if (!selected) return;
  const { x, y, w, h } = cellBox(view, area, selected.row, selected.column);
  context.strokeStyle = theme.fg;
  context.lineWidth = 1;
  context.strokeRect(x - 0.5, -2, Math.max(w, 2) + 1, area.height + 4);
  if (selected.row < 0) return;
  for (const [color, width] of /** @type {[string, number][]} */ ([[theme.bg, 4], [theme.fg, 2]])) {
    context.lineWidth = width;
    context.strokeStyle = color;
    context.strokeRect(x + 0.5, y + 0.5, Math.max(w - 1, 3), Math.max(h - 1, 3));
  }
}

/** @type {Draw} */
function drawBlocks(context, { panel, view, area, theme, pointed }, { low, high }) {
  context.font = `10.5px ${theme.mono}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const stride = labelStride(view.h, 14);
  for (let row = low; row <= high; row++) {
    if ((area.rows - 1 - row) % stride) continue;
    const y = cellBox(view, area, row, 0).y + view.h / 2;
    if (y < 2 || y > area.height - 2) continue;
    context.fillStyle = row === pointed?.row ? theme.fg : theme.soft;
    context.fillText(String(panel.layers[row]), AXES.left - 8, AXES.top + y + 0.5);
  }
}

/**
 * The token that follows above the grid, the fed token and its position below.
 * @type {Draw}
 */
function drawTokenAxes(context, scene, range) {
  const { view, area, theme } = scene;
  const below = AXES.top + area.height + 11;
  context.save();
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillStyle = theme.soft;
  context.font = `9.5px ${theme.sans}`;
  for (const [name, y] of Object.entries({ next: 11, token: below, position: below + 15 })) context.fillText(name, AXES.left - 8, y);
  context.beginPath();
  context.rect(AXES.left, 0, area.width + AXES.right, AXES.top + area.height + AXES.bottom);
  context.clip();
  context.textAlign = "center";
  const stride = labelStride(view.w, TEXT.w + 6);
  if (stride <= 5) drawAxisTokens(context, scene, range, stride, below);
  context.font = `9.5px ${theme.mono}`;
  context.fillStyle = theme.soft;
  const apart = labelStride(view.w, 34);
  for (let column = range.left - (range.left % apart); column <= range.right; column += apart) {
    const x = AXES.left + cellBox(view, area, 0, column).x + view.w / 2;
    context.fillText(String(column), Math.max(x, AXES.left + 3 * String(column).length), below + 15);
    if (stride > 5) context.fillRect(x, AXES.top + area.height + 2, 1, 4);
  }
  context.restore();
}

/** @type {(context: CanvasRenderingContext2D, scene: Scene, range: Range, stride: number, below: number) => void} */
function drawAxisTokens(context, { panel, view, area, theme }, { left, right }, stride, below) {
  context.font = `11px ${theme.mono}`;
  const columns = Math.floor((stride * view.w - 5) / context.measureText("0").width);
  for (let column = left - (left % stride); column <= right; column += stride) {
    const x = AXES.left + cellBox(view, area, 0, column).x + view.w / 2;
    context.fillStyle = theme.fg;
    context.fillText(fit(panel.sheet.tokens[column], columns), x, below, stride * view.w - 3);
    const next = panel.next(column);
    context.fillStyle = theme.soft;
    if (next !== NONE) context.fillText(fit(panel.text(next), columns), x, 11, stride * view.w - 3);
  }
}
