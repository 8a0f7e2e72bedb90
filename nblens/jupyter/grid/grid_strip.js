// One token position as a strip: the likeliest tokens of each block, the last block on top.
import { briefPercent } from "../numbers.js";
import { lineColor } from "./grid_curves.js";
import { sizedContext } from "./grid_elements.js";
import { fit } from "./grid_text.js";

/** @import { Panel } from "./grid_data.js" */
/** @import { Theme } from "./grid_theme.js" */

export const STRIP_ROW = 17;
const LEFT = 30;

/**
 * Draw the column; pinned tokens carry the colour of their line.
 * @param {HTMLCanvasElement} canvas
 * @param {Panel} panel
 * @param {number} column
 * @param {number[]} pins places in the vocabulary
 * @param {number} selectedRow
 * @param {number} width
 * @param {Theme} theme
 */
export function drawStrip(canvas, panel, column, pins, selectedRow, width, theme) {
  const context = sizedContext(canvas, width, panel.rows * STRIP_ROW);
  context.fillStyle = theme.bg;
  context.fillRect(0, 0, width, panel.rows * STRIP_ROW);
  context.textBaseline = "middle";
  context.font = `11px ${theme.mono}`;
  const letter = context.measureText("0").width;
  const shown = Math.max(1, Math.min(panel.k, Math.floor((width - LEFT) / 76)));
  const cell = (width - LEFT) / shown;
  for (let row = 0; row < panel.rows; row++) {
    const y = (panel.rows - 1 - row) * STRIP_ROW;
    context.textAlign = "right";
    context.fillStyle = row === selectedRow ? theme.fg : theme.soft;
    context.fillText(String(panel.layers[row]), LEFT - 8, y + STRIP_ROW / 2);
    panel.topK(row, column).slice(0, shown).forEach(({ place, p }, i) => {
      drawCell(context, { x: LEFT + i * cell, y, cell, letter, theme }, panel.text(place), p, pins.indexOf(place));
    });
    if (row !== selectedRow) continue;
    context.strokeStyle = theme.fg;
    context.strokeRect(LEFT - 3.5, y + 0.5, width - LEFT + 3, STRIP_ROW - 1);
  }
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {{x: number, y: number, cell: number, letter: number, theme: Theme}} where
 * @param {string} text
 * @param {number} p
 * @param {number} pin
 */
function drawCell(context, { x, y, cell, letter, theme }, text, p, pin) {
  context.globalAlpha = pin >= 0 ? 0.45 : 0.25;
  context.fillStyle = pin >= 0 ? lineColor(pin, theme) : theme.accent;
  context.fillRect(x, y + 1, Math.max(1, (cell - 4) * (p || 0)), STRIP_ROW - 2);
  context.globalAlpha = 1;
  const number = briefPercent(p);
  const room = Math.floor((cell - 8) / letter) - number.length;
  context.fillStyle = theme.fg;
  context.textAlign = "left";
  context.fillText(fit(text, Math.max(room, 2)), x + 3, y + STRIP_ROW / 2 + 0.5);
  context.textAlign = "right";
  context.fillStyle = p > 0.5 ? theme.fg : theme.soft;
  context.fillText(number, x + cell - 7, y + STRIP_ROW / 2 + 0.5);
}
