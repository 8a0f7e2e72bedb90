// The widget: its state, and how it is brought onto the page.
import { asSearched } from "./grid_text.js";
import { GridData, NONE } from "./grid_data.js";
import { AXES, cellBox, firstView, followed, panBy, plotHeight, reveal, wholeView, zoomAt } from "./grid_layout.js";
import { element, save, sizedContext } from "./grid_elements.js";
import { readTheme, watchTheme } from "./grid_theme.js";
import { Fitted, drawGrid, paintCells } from "./grid_draw.js";
import { describeCell, showCard } from "./grid_card.js";
import { curves } from "./grid_curves.js";
import { STRIP_ROW, drawStrip } from "./grid_strip.js";
import { makeHeader } from "./grid_header.js";
import { listen } from "./grid_input.js";

const MOST_PINNED = 64;
const stores = new WeakMap();

/** The decoded arrays of a model: one copy for all its views on the page. */
function storeOf(model) {
  const sent = model.get("_data");
  if (!stores.has(sent)) {
    const data = new GridData();
    data.apply(sent.header, sent.bytes);
    stores.set(sent, data);
  }
  return stores.get(sent);
}

/** New tokens go into the store once, however many views there are; where some never came, all are asked for. */
function takeGrowth(model, message, buffers) {
  if (message?.type === "grow" && !storeOf(model).apply(message, buffers[0])) model.send({ type: "refresh" });
}

class Grid {
  constructor(model, el) {
    this.model = model;
    this.stopping = new AbortController();
    const signal = this.stopping.signal;
    this.data = storeOf(model);
    this.fitted = new Fitted();
    this.found = [];
    this.foundAt = -1;
    this.focus = { row: Infinity, column: 0 };
    this.pointed = null;
    this.build(el, signal);
    watchTheme(this.root, () => this.recolor(), signal);
    listen(this.stage, this, signal);
    this.cell.addEventListener("focus", () => this.announce(), { signal });
    this.cell.addEventListener("blur", () => this.point(null), { signal });
    this.watchModel(signal);
    const observer = new ResizeObserver(() => this.resize());
    observer.observe(this.root);
    signal.addEventListener("abort", () => observer.disconnect());
    this.readModel();
    this.resize();
    if (this.data.nTokens < model.get("_n_tokens")) model.send({ type: "refresh" });
  }

  build(el, signal) {
    const set = (name) => (value) => this.write(name, value);
    this.header = makeHeader({
      metric: set("metric"), site: set("site"), view: set("view"),
      zoom: (factor) => this.zoom(factor), whole: () => this.showWhole(),
      search: (text) => this.search(text), step: (by) => this.step(by), clearSearch: () => this.clearSearch(),
      save: (kind) => this.save(kind), stop: () => this.model.send({ type: "stop" }),
    }, signal);
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.cell = element("div", { role: "gridcell", tabindex: "0", class: "nbg-cell" });
    this.row = element("div", { role: "row" }, this.cell);
    this.grid = element("div", { role: "grid", "aria-label": "blocks by tokens, the last block first" }, this.row);
    this.hovered = element("div", { class: "nbg-hovered", hidden: "" });
    this.card = element("div", { class: "nbg-card", hidden: "" });
    this.stage = element("div", { class: "nbg-stage" }, this.canvas, this.hovered, this.grid, this.card);
    this.caption = element("div", { class: "nbg-caption nbg-soft" });
    this.strip = element("canvas", { role: "img" });
    this.stripHead = element("div", { class: "nbg-subtitle" });
    this.curves = element("div", { class: "nbg-curves" });
    this.curvesHead = element("div", { class: "nbg-subtitle" });
    this.detail = element("div", { class: "nbg-detail", hidden: "" },
      element("div", {}, this.stripHead, element("div", { class: "nbg-scroll", tabindex: "0", role: "region", "aria-label": "top tokens by block" }, this.strip)),
      element("div", {}, this.curvesHead, this.curves));
    this.live = element("div", { class: "nbg-hidden", "aria-live": "polite" });
    this.alert = element("div", { class: "nbg-alert", role: "alert" });
    this.root = element("div", { class: "nbg", "data-nblens": this.model.get("_stand_in"), "data-lm-suppress-shortcuts": "true" },
      this.header.node, this.stage, this.caption, this.detail, this.alert, this.live, element("span", { class: "nbg-hidden nbg-mono" }));
    el.append(this.root);
    this.theme = readTheme(this.root);
  }

  watchModel(signal) {
    const read = () => this.readModel();
    const heard = (message, buffers) => this.hear(message, buffers);
    const names = ["metric", "view", "site", "selection", "_pinned_ids", "_running"].map((name) => `change:${name}`);
    for (const name of names) this.model.on(name, read);
    this.model.on("msg:custom", heard);
    signal.addEventListener("abort", () => {
      for (const name of names) this.model.off(name, read);
      this.model.off("msg:custom", heard);
    });
  }

  hear(message, buffers) {
    if (message.type === "grow") {
      takeGrowth(this.model, message, buffers);
      this.readModel(true);
    } else if (message.type === "export" && message.id === this.asked) {
      const kind = message.format === "html" ? "text/html" : "application/json";
      save(`trajectory.${message.format}`, new Blob([buffers[0]], { type: kind }));
      this.asked = null;
    } else if (message.type === "error") this.alert.textContent = message.text;
  }

  // State

  /** Change a trait of the widget here and in Python. */
  write(name, value) {
    this.alert.textContent = "";
    this.model.set(name, value);
    this.model.save_changes();
    this.readModel();
  }

  /** Bring the picture up to what the model says. */
  readModel(grown = false) {
    const { metric, panel: old } = this;
    this.metric = this.model.get("metric");
    this.panel = this.data.panel(this.model.get("site"), this.model.get("view"));
    this.pins = this.model.get("_pinned_ids").map((id) => this.data.places.get(id)).filter((place) => place !== undefined);
    const selection = this.model.get("selection");
    const inside = selection && selection[1] < this.panel.columns;
    this.selected = inside ? { row: this.panel.layers.indexOf(selection[0]), column: selection[1] } : null;
    const same = !grown && old && old.sheet === this.panel.sheet && old.view === this.panel.view && metric === this.metric;
    if (!same) this.repaint();
    this.header.refresh({ panel: this.panel, data: this.data, metricName: this.metric, running: this.model.get("_running") });
    this.caption.textContent = this.caption.title = this.captionText();
    this.detailDue = true;
    this.schedule();
  }

  repaint() {
    this.cells = paintCells(this.panel, this.metric);
    if (this.query) this.find();
    const before = this.area;
    if (!before) return;
    this.measure();
    if (before.columns && before.rows === this.area.rows) this.view = followed(this.view, before, this.area);
    else this.view = firstView(this.area);
  }

  captionText() {
    const { site, rows, columns, base } = this.panel;
    const mark = base ? "◥ top token differs from base" : "◥ top token is the last block's";
    const hint = "click: pin · drag: pan · Ctrl + wheel: zoom · arrows, Enter, /";
    return [`${rows} blocks × ${columns} tokens`, site.reading, site.model, mark, hint].filter(Boolean).join("   ·   ");
  }

  // Size and drawing

  measure() {
    const width = Math.max(80, Math.floor(this.root.clientWidth) - AXES.left - AXES.right);
    this.area = { width, height: plotHeight(this.panel.rows), columns: this.panel.columns, rows: this.panel.rows };
  }

  resize() {
    this.theme = readTheme(this.root); // a notebook attaches the widget after it was built, and only then it has colours
    if (!this.root.clientWidth) return;
    const before = this.area;
    this.measure();
    if (!before) this.view = firstView(this.area);
    else if (before.width !== this.area.width) this.view = before.columns * this.view.w <= before.width + 1 ? firstView(this.area) : panBy(this.view, this.area, 0, 0);
    this.detailDue = true;
    this.draw();
  }

  recolor() {
    this.theme = readTheme(this.root);
    this.detailDue = true;
    this.schedule();
  }

  schedule() {
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    if (!this.area) return;
    const { area } = this;
    const context = sizedContext(this.canvas, AXES.left + area.width + AXES.right, AXES.top + area.height + AXES.bottom);
    drawGrid(context, { ...this, current: this.found[this.foundAt] });
    this.placeCell();
    this.placeHovered();
    if (this.detailDue) this.drawDetail();
    this.detailDue = false;
  }

  drawDetail() {
    this.detail.hidden = !this.selected;
    if (!this.selected) return;
    const { panel, pins, theme } = this;
    const { row, column } = this.selected;
    this.stripHead.replaceChildren("after ", element("b", {}, panel.sheet.tokens[column]), ` token ${column}: top tokens by block`);
    const half = this.strip.parentElement.clientWidth;
    drawStrip(this.strip, panel, column, pins, row, half, theme);
    this.strip.setAttribute("aria-label", panel.layers.map((layer, i) => `block ${layer}: ${panel.text(panel.top(i, column))}`).join(", "));
    const at = { top: (panel.rows - 1 - row) * STRIP_ROW, room: this.strip.parentElement.clientHeight };
    if (row >= 0 && panel.rows * STRIP_ROW > at.room) this.strip.parentElement.scrollTop = at.top - at.room / 2;
    this.curvesHead.textContent = pins.length ? `probability over depth${panel.base ? " (base dashed)" : ""}` : "";
    const drawn = pins.length ? [curves(panel, column, pins, this.curves.clientWidth, theme)] : [];
    this.curves.replaceChildren(...drawn, ...(pins.length ? [] : [element("p", { class: "nbg-soft" }, "click a cell or press Enter to pin its token")]));
  }

  // What the reader does

  show(view) {
    this.view = view;
    this.point(null);
    this.schedule();
  }

  zoom(factor) {
    const box = this.boxOf(this.focus);
    const seen = box.x >= 0 && box.x <= this.area.width;
    this.show(zoomAt(this.view, this.area, factor, seen ? box.x + box.w / 2 : this.area.width / 2, box.y + box.h / 2));
  }

  showWhole() {
    this.show(wholeView(this.area));
  }

  point(cell) {
    if (cell?.row === this.pointed?.row && cell?.column === this.pointed?.column) return;
    this.pointed = cell;
    this.placeHovered();
    this.showCard(cell);
  }

  showCard(cell) {
    if (!cell) return void (this.card.hidden = true);
    const box = this.boxOf(cell);
    const room = { width: AXES.left + this.area.width, height: AXES.top + this.area.height + AXES.bottom };
    showCard(this.card, this.panel, this.metric, cell.row, cell.column, { ...box, x: box.x + AXES.left, y: box.y + AXES.top }, room);
  }

  /** Select a cell; with `pin`, its token gets a line, or loses it where it was selected already. */
  choose({ row, column }, pin) {
    if (!this.area.columns) return;
    this.moveFocus(row, column, false);
    const again = this.selected?.row === row && this.selected?.column === column;
    const place = this.panel.top(row, column);
    const id = this.data.ids[place];
    const ids = this.model.get("_pinned_ids");
    if (pin) {
      const others = ids.filter((other) => other !== id);
      const kept = ids.includes(id) && !again ? ids : ids.includes(id) ? others : [...others, id].slice(-MOST_PINNED);
      this.model.set("_pinned_ids", kept);
    }
    this.write("selection", [this.panel.layers[row], column]);
  }

  clear() {
    if (this.query) return this.clearSearch();
    this.model.set("_pinned_ids", []);
    this.write("selection", null);
    this.point(null);
  }

  moveFocus(row, column, withCard = true) {
    if (!this.area.columns) return;
    const { rows, columns } = this.area;
    this.focus = { row: Math.max(0, Math.min(row, rows - 1)), column: Math.max(0, Math.min(column, columns - 1)) };
    this.view = reveal(this.view, this.area, this.focus.row, this.focus.column);
    this.draw();
    this.announce();
    if (withCard) {
      this.point(null);
      this.showCard(this.focus);
    }
  }

  focusCell() {
    this.cell.focus({ preventScroll: true });
  }

  focusSearch() {
    this.header.search.input.focus();
  }

  // Search

  search(text) {
    this.query = asSearched(text);
    this.find();
    this.foundAt = -1;
    if (this.found.length) this.step(1);
    this.schedule();
  }

  find() {
    this.found = this.panel.search(this.query);
    this.foundAt = Math.min(this.foundAt, this.found.length - 1);
    this.header.search.refresh(this.found.length, this.foundAt);
  }

  step(by) {
    if (!this.found.length) return;
    this.foundAt = (this.foundAt + by + this.found.length) % this.found.length;
    const { row, column } = this.found[this.foundAt];
    this.moveFocus(row, column, false);
    this.header.search.refresh(this.found.length, this.foundAt);
  }

  clearSearch() {
    this.header.search.input.value = "";
    this.search("");
    this.focusCell();
  }

  // The one focused cell, which stands for the grid to keys and screen readers

  boxOf({ row, column }) {
    return cellBox(this.view, this.area, Math.min(row, this.area.rows - 1), column);
  }

  placeCell() {
    const { rows, columns } = this.area;
    this.focus = { row: Math.min(this.focus.row, rows - 1), column: Math.max(0, Math.min(this.focus.column, columns - 1)) };
    place(this.cell, this.boxOf(this.focus), this.area);
    this.grid.setAttribute("aria-rowcount", rows);
    this.grid.setAttribute("aria-colcount", columns);
    this.row.setAttribute("aria-rowindex", rows - this.focus.row);
    this.cell.setAttribute("aria-colindex", this.focus.column + 1);
    const chosen = this.selected?.row === this.focus.row && this.selected?.column === this.focus.column;
    this.cell.setAttribute("aria-selected", String(Boolean(chosen)));
  }

  placeHovered() {
    this.hovered.hidden = !this.pointed;
    if (this.pointed) place(this.hovered, this.boxOf(this.pointed), this.area);
  }

  announce() {
    if (!this.area?.columns) return;
    const text = describeCell(this.panel, this.focus.row, this.focus.column);
    this.cell.setAttribute("aria-label", text);
    this.live.textContent = text;
  }

  // Files

  save(kind) {
    this.alert.textContent = "";
    if (kind === "png") return this.canvas.toBlob((blob) => save("trajectory.png", blob));
    this.asked = Math.floor(Math.random() * 2 ** 31);
    this.model.send({ type: "export", format: kind, id: this.asked });
    const asked = this.asked;
    setTimeout(() => {
      if (this.asked === asked) this.alert.textContent = "the kernel has not answered yet; is it running?";
    }, 8000);
  }

  stop() {
    this.stopping.abort();
    cancelAnimationFrame(this.frame);
    this.root.remove();
  }
}

/** Lay an element over a cell, within the plot. */
function place(node, box, area) {
  const clip = (at, size, room) => [Math.max(0, Math.min(at, room)), Math.max(0, Math.min(at + size, room))];
  const [left, right] = clip(box.x, Math.max(box.w, 4), area.width);
  const [top, bottom] = clip(box.y, Math.max(box.h, 4), area.height);
  node.style.transform = `translate(${AXES.left + left}px, ${AXES.top + top}px)`;
  node.style.width = `${right - left}px`;
  node.style.height = `${bottom - top}px`;
  node.style.visibility = right > left && bottom > top ? "" : "hidden";
}

export default {
  initialize({ model }) {
    const heard = (message, buffers) => takeGrowth(model, message, buffers);
    model.on("msg:custom", heard);
    return () => model.off("msg:custom", heard);
  },
  render({ model, el }) {
    const grid = new Grid(model, el);
    el.nblensGrid = grid;
    return () => grid.stop();
  },
};
