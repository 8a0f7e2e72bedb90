// Probability of the pinned tokens over depth, at one position: a line each, named where it ends.
import { LINE_COLORS } from "../appearance.js";
import { drawing } from "../elements.js";
import { briefPercent, percent } from "../numbers.js";
import { labelStride, spread } from "./grid_layout.js";
import { fit } from "./grid_text.js";

/** @import { Panel, Sheet } from "./grid_data.js" */
/** @import { Theme } from "./grid_theme.js" */

/** @typedef {{place: number, color: string, values: number[], before: number[] | null}} Line */
/** @typedef {{x(row: number): number, y(p: number): number}} At from block and probability to pixels */
/** @typedef {{width: number, height: number}} Plot */

const ROOM = { left: 38, right: 136, top: 12, bottom: 34 };
const HEIGHT = 250;

/**
 * @param {number} number
 * @param {Theme} theme
 */
export function lineColor(number, theme) {
  const color = LINE_COLORS[number % LINE_COLORS.length];
  return color === "#000000" ? theme.fg : color;
}

/**
 * Runs of rows in which the probability is known, as the points of lines; a run of one becomes a dot alone.
 * @param {number[]} values
 */
export function knownRuns(values) {
  /** @type {number[][]} */
  const runs = [];
  values.forEach((p, row) => {
    if (Number.isNaN(p)) return;
    const last = runs.at(-1);
    if (last?.at(-1) === row - 1) last.push(row);
    else runs.push([row]);
  });
  return runs;
}

/**
 * An svg of the pins at a token position, `width` pixels wide.
 * @param {Panel} panel
 * @param {number} column
 * @param {number[]} pins places in the vocabulary
 * @param {number} width
 * @param {Theme} theme
 */
export function curves(panel, column, pins, width, theme) {
  const plot = { width: Math.max(width - ROOM.left - ROOM.right, 60), height: HEIGHT - ROOM.top - ROOM.bottom };
  /** @type {At} */
  const at = {
    x: (row) => ROOM.left + (panel.rows > 1 ? (plot.width * row) / (panel.rows - 1) : plot.width / 2),
    y: (p) => ROOM.top + plot.height * (1 - p),
  };
  const lines = pins.map((place, i) => {
    /** @param {Sheet} sheet */
    const over = (sheet) => panel.layers.map((_, row) => panel.probabilityOf(place, row, column, sheet));
    return { place, color: lineColor(i, theme), values: over(panel.sheet), before: panel.base && over(panel.base) };
  });
  const names = lines.map(({ place, values }) => `${panel.text(place)} ${percent(values[values.length - 1])}`).join(", ");
  return drawing("svg",
    { width, height: HEIGHT, role: "img", "aria-label": `probability over depth at token ${column}, at the last block: ${names}` },
    ...axes(panel, at, plot), ...lines.flatMap((line) => path(line, at, panel)), ...labels(lines, at, plot, panel));
}

/** @type {(panel: Panel, at: At, plot: Plot) => SVGElement[]} */
function axes(panel, at, plot) {
  /** @type {SVGElement[]} */
  const parts = [0, 0.5, 1].flatMap((p) => [
    drawing("line", { class: "nbg-rule", x1: ROOM.left, x2: ROOM.left + plot.width, y1: at.y(p), y2: at.y(p) }),
    drawing("text", { class: "nbg-tick", x: ROOM.left - 8, y: at.y(p) + 3, "text-anchor": "end" }, `${100 * p}%`),
  ]);
  const stride = labelStride(plot.width / Math.max(panel.rows - 1, 1), 26);
  panel.layers.forEach((layer, row) => {
    if ((panel.rows - 1 - row) % stride) return;
    parts.push(drawing("text", { class: "nbg-tick", x: at.x(row), y: HEIGHT - 19, "text-anchor": "middle" }, String(layer)));
  });
  parts.push(drawing("text", { class: "nbg-tick", x: ROOM.left + plot.width / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "block"));
  return parts;
}

/** @type {(line: Line, at: At, panel: Panel) => SVGElement[]} */
function path({ color, values, before, place }, at, panel) {
  /** @type {(numbers: number[], dash: string | null) => SVGElement[]} */
  const line = (numbers, dash) => knownRuns(numbers).map((run) =>
    drawing("polyline", { class: "nbg-line", stroke: color, "stroke-dasharray": dash, points: run.map((row) => `${at.x(row)},${at.y(numbers[row])}`).join(" ") }));
  const dots = values.flatMap((p, row) => Number.isNaN(p) ? [] : [
    drawing("circle", { cx: at.x(row), cy: at.y(p), r: panel.rows > 40 ? 1.6 : 2.6, fill: color },
      drawing("title", {}, `${panel.text(place)} ${percent(p)} at block ${panel.layers[row]}`))]);
  return [...(before ? line(before, "4 3") : []), ...line(values, null), ...dots];
}

/** @type {(lines: Line[], at: At, plot: Plot, panel: Panel) => SVGElement[]} */
function labels(lines, at, plot, panel) {
  const ends = lines.map(({ values }) => values.findLastIndex((p) => !Number.isNaN(p)));
  const known = lines.map((line, i) => ({ ...line, end: ends[i] })).filter(({ end }) => end >= 0);
  const heights = spread(known.map(({ values, end }) => at.y(values[end])), 14, ROOM.top, ROOM.top + plot.height);
  const x = ROOM.left + plot.width + 12;
  return known.flatMap(({ values, end, color, place }, i) => [
    drawing("polyline", { class: "nbg-lead", stroke: color, points: `${at.x(end) + 4},${at.y(values[end])} ${x - 3},${heights[i]}` }),
    drawing("line", { class: "nbg-line", stroke: color, x1: x - 3, x2: x + 7, y1: heights[i], y2: heights[i] }),
    drawing("text", { class: "nbg-name", x: x + 12, y: heights[i] + 4 }, `${fit(panel.text(place), 11)} ${briefPercent(values[end])}`),
  ]);
}
