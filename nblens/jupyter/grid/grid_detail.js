// What stands under the grid where a token is selected: its likeliest tokens by block, and curves of the pinned ones.
import { element } from "../elements.js";
import { curves } from "./grid_curves.js";
import { STRIP_ROW, drawStrip } from "./grid_strip.js";

/** @import { Panel } from "./grid_data.js" */
/** @import { Cell } from "./grid_layout.js" */
/** @import { Theme } from "./grid_theme.js" */

export class Detail {
  strip = element("canvas", { role: "img" });
  stripHead = element("div", { class: "nbg-subtitle" });
  scroll = element("div", { class: "nbg-scroll", tabindex: 0, role: "region", "aria-label": "top tokens by block" }, this.strip);
  curves = element("div", { class: "nbg-curves" });
  curvesHead = element("div", { class: "nbg-subtitle" });
  node = element("div", { class: "nbg-detail", hidden: true },
    element("div", {}, this.stripHead, this.scroll),
    element("div", {}, this.curvesHead, this.curves));

  /**
   * @param {Panel} panel
   * @param {Cell | null} selected
   * @param {number[]} pins places in the vocabulary
   * @param {Theme} theme
   */
  draw(panel, selected, pins, theme) {
    this.node.hidden = !selected;
    if (!selected) return;
    const { row, column } = selected;
    this.stripHead.replaceChildren("after ", element("b", {}, panel.sheet.named(column)), ` token ${column}: top tokens by block`);
    drawStrip(this.strip, panel, column, pins, row, this.scroll.clientWidth, theme);
    this.strip.setAttribute("aria-label", panel.layers.map((layer, i) => `block ${layer}: ${panel.text(panel.top(i, column))}`).join(", "));
    const room = this.scroll.clientHeight;
    if (row >= 0 && panel.rows * STRIP_ROW > room) this.scroll.scrollTop = (panel.rows - 1 - row) * STRIP_ROW - room / 2;
    this.curvesHead.textContent = pins.length ? `probability over depth${panel.base ? " (base dashed)" : ""}` : "";
    this.curves.replaceChildren(pins.length
      ? curves(panel, column, pins, this.curves.clientWidth, theme)
      : element("p", { class: "nbg-soft" }, "click a cell or press Enter to pin its token"));
  }
}
