// The card beside the pointer: what a cell holds, in words and numbers.
import { element } from "../elements.js";
import { percent, shortNumber, signedNumber } from "../numbers.js";
import { NONE } from "./grid_data.js";
import { fit } from "./grid_text.js";

/** @import { Metric, Panel, Sheet } from "./grid_data.js" */
/** @import { Box } from "./grid_layout.js" */

const COLUMNS = 22;

/**
 * The facts of a cell in one sentence, for those who hear them.
 * @param {Panel} panel
 * @param {number} row
 * @param {number} column
 */
export function describeCell(panel, row, column) {
  const best = panel.topK(row, column).slice(0, 3).map(({ place, p }) => `${panel.text(place)} ${percent(p)}`);
  const next = panel.next(column);
  const cell = column * panel.rows + row;
  const parts = [
    `block ${panel.layers[row]}, token ${column} ${panel.sheet.named(column)}`,
    best.join(", "),
    `entropy ${shortNumber(panel.sheet.arrays.entropy[cell])} nats`,
  ];
  if (next !== NONE) parts.splice(2, 0, `followed by ${panel.sheet.named(column + 1, panel.text(next))}, rank ${shortNumber(panel.rank(row, column))}`);
  if (panel.marked(row, column)) parts.push(panel.base ? "differs from base" : "same as the last block");
  return parts.join("; ");
}

/** @type {(panel: Panel, sheet: Sheet, name: string, row: number, column: number) => HTMLElement} */
function tokens(panel, sheet, name, row, column) {
  const lines = panel.topK(row, column, sheet).map(({ place, p }) => {
    const bar = element("i", { class: "nbg-bar" });
    bar.style.width = `${100 * (p || 0)}%`;
    return element("div", { class: "nbg-row" },
      element("span", { class: "nbg-token" }, fit(panel.text(place), COLUMNS)),
      element("span", { class: "nbg-track" }, bar),
      element("span", { class: "nbg-number" }, percent(p)));
  });
  return element("div", { class: "nbg-side" }, ...(name ? [element("b", {}, name)] : []), ...lines, measures(panel, sheet, row, column));
}

/** @type {(panel: Panel, sheet: Sheet, row: number, column: number) => HTMLElement} */
function measures(panel, sheet, row, column) {
  const cell = column * panel.rows + row;
  const next = panel.next(column, sheet);
  const lines = [["entropy", `${shortNumber(sheet.arrays.entropy[cell])} nats`], ["KL to last", `${shortNumber(sheet.arrays.kl[cell])} nats`]];
  if (next !== NONE) {
    const known = panel.probabilityOf(next, row, column, sheet);
    const rank = panel.rank(row, column, sheet);
    const facts = `${percent(known)} · rank ${Number.isNaN(rank) ? "–" : rank.toLocaleString("en")}`;
    lines.unshift([`next ${fit(sheet.named(column + 1, panel.text(next)), COLUMNS - 8)}`, facts]);
  }
  return element("dl", {}, ...lines.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

/**
 * Fill the card with a cell, and put it beside the cell's box within `room`.
 * @param {HTMLElement} card
 * @param {Panel} panel
 * @param {Metric} metric
 * @param {number} row
 * @param {number} column
 * @param {Box} box
 * @param {{width: number, height: number}} room
 */
export function showCard(card, panel, metric, row, column, box, room) {
  const title = element("div", { class: "nbg-title" },
    element("b", {}, fit(panel.sheet.named(column), COLUMNS)), ` token ${column} · block ${panel.layers[row]}`);
  if (panel.base) {
    const change = panel.value(metric, row, column);
    title.append(metric === "kl_from_base" ? ` · KL from base ${shortNumber(change)} nats`
      : ` · Δ ${metric === "prob" ? signedNumber(100 * change) + " points" : signedNumber(change)}`);
  }
  const sides = panel.base
    ? [tokens(panel, panel.base, "base", row, column), tokens(panel, panel.sheet, "steered", row, column)]
    : [tokens(panel, panel.sheet, "", row, column)];
  card.replaceChildren(title, element("div", { class: "nbg-sides" }, ...sides));
  card.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = card;
  const right = box.x + box.w + 10;
  const x = right + width <= room.width ? right : Math.max(0, box.x - width - 10);
  const y = Math.min(Math.max(0, box.y + box.h / 2 - height / 2), Math.max(0, room.height - height));
  card.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
}
