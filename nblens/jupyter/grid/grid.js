// The widget: its state, and how it is brought onto the page.
import { element } from "../elements.js";
import { describeCell, showCard } from "./grid_card.js";
import { Detail } from "./grid_detail.js";
import { Fitted, drawGrid, paintCells } from "./grid_draw.js";
import { layOver, save, sizedContext } from "./grid_elements.js";
import { makeHeader } from "./grid_header.js";
import { listen } from "./grid_input.js";
import { AXES, cellBox, firstView, followed, panBy, plotHeight, reveal, wholeView, zoomAt } from "./grid_layout.js";
import { storeOf, takeGrowth } from "./grid_store.js";
import { asSearched } from "./grid_text.js";
import { readTheme, watchTheme } from "./grid_theme.js";

/** @import { Model } from "../elements.js" */
/** @import { Bytes } from "./grid_data.js" */
/** @import { Area, Box, Cell } from "./grid_layout.js" */
/** @import { Said, Traits } from "./grid_store.js" */

const MOST_PINNED = 64;

/** One view of a widget. */
export class Grid {
  canvas = element("canvas", { "aria-hidden": "true" });
  cell = element("div", { role: "gridcell", tabindex: 0, class: "nbg-cell" });
  row = element("div", { role: "row" }, this.cell);
  grid = element("div", { role: "grid", "aria-label": "blocks by tokens, the last block first" }, this.row);
  hovered = element("div", { class: "nbg-hovered", hidden: true });
  card = element("div", { class: "nbg-card", hidden: true });
  stage = element("div", { class: "nbg-stage" }, this.canvas, this.hovered, this.grid, this.card);
  caption = element("div", { class: "nbg-caption nbg-soft" });
  detail = new Detail();
  live = element("div", { class: "nbg-hidden", "aria-live": "polite" });
  alert = element("div", { class: "nbg-alert", role: "alert" });

  stopping = new AbortController();
  fitted = new Fitted();
  query = "";
  /** @type {Cell[]} */
  found = [];
  foundAt = -1;
  /** @type {Cell} */
  focus = { row: Infinity, column: 0 };
  /** @type {Cell | null} */
  pointed = null;
  /** @type {Cell | null} */
  selected = null;
  /** @type {number[]} places in the vocabulary */
  pins = [];
  /** @type {Area} without width until it is laid out */
  area = { width: 0, height: 0, columns: 0, rows: 0 };
  /** @type {Box} */
  view = { x: 0, y: 0, w: 1, h: 1 };
  frame = 0;
  detailDue = true;
  /** @type {number | null} the file that is being waited for */
  asked = null;

  /**
   * @param {Model<Traits>} model
   * @param {HTMLElement} el
   */
  constructor(model, el) {
    this.model = model;
    const signal = this.stopping.signal;
    this.data = storeOf(model);
    this.metric = model.get("metric");
    this.panel = this.data.panel(model.get("site"), model.get("view"));
    this.cells = paintCells(this.panel, this.metric);
    this.header = makeHeader({
      metric: (name) => this.write("metric", name), site: (name) => this.write("site", name), view: (name) => this.write("view", name),
      zoom: (factor) => this.zoom(factor), whole: () => this.showWhole(),
      search: (text) => this.search(text), step: (by) => this.step(by), clearSearch: () => this.clearSearch(),
      save: (kind) => this.save(kind), stop: () => this.model.send({ type: "stop" }),
    }, signal);
    this.root = element("div", { class: "nbg", "data-nblens": model.get("_stand_in"), "data-lm-suppress-shortcuts": "true" },
      this.header.node, this.stage, this.caption, this.detail.node, this.alert, this.live, element("span", { class: "nbg-hidden nbg-mono" }));
    el.append(this.root);
    this.theme = readTheme(this.root);
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

  /** @param {AbortSignal} signal */
  watchModel(signal) {
    const read = () => this.readModel();
    const heard = this.hear.bind(this);
    const names = ["metric", "view", "site", "selection", "_pinned_ids", "_running"].map((name) => `change:${name}`);
    for (const name of names) this.model.on(name, read);
    this.model.on("msg:custom", heard);
    signal.addEventListener("abort", () => {
      for (const name of names) this.model.off(name, read);
      this.model.off("msg:custom", heard);
    });
  }

  /**
   * @param {Said} message
   * @param {Bytes[]} buffers
   */
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

  /**
   * Change a trait of the widget here and in Python.
   * @template {keyof Traits} Name
   * @param {Name} name
   * @param {Traits[Name]} value
   */
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
    this.pins = this.model.get("_pinned_ids").flatMap((id) => this.data.places.get(id) ?? []);
    const selection = this.model.get("selection");
    this.selected = selection && selection[1] < this.panel.columns ? { row: this.panel.layers.indexOf(selection[0]), column: selection[1] } : null;
    const same = !grown && old.sheet === this.panel.sheet && old.view === this.panel.view && metric === this.metric;
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
    if (!before.width) return;
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
    if (!before.width) this.view = firstView(this.area);
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
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { area } = this;
    if (!area.width) return;
    const context = sizedContext(this.canvas, AXES.left + area.width + AXES.right, AXES.top + area.height + AXES.bottom);
    drawGrid(context, this);
    this.placeCell();
    this.placeHovered();
    if (this.detailDue) this.detail.draw(this.panel, this.selected, this.pins, this.theme);
    this.detailDue = false;
  }

  // What the reader does

  /** @param {Box} view */
  show(view) {
    this.view = view;
    this.point(null);
    this.schedule();
  }

  /** @param {number} factor */
  zoom(factor) {
    const box = this.boxOf(this.focus);
    const seen = box.x >= 0 && box.x <= this.area.width;
    this.show(zoomAt(this.view, this.area, factor, seen ? box.x + box.w / 2 : this.area.width / 2, box.y + box.h / 2));
  }

  showWhole() {
    this.show(wholeView(this.area));
  }

  /** @param {Cell | null} cell */
  point(cell) {
    if (cell?.row === this.pointed?.row && cell?.column === this.pointed?.column) return;
    this.pointed = cell;
    this.placeHovered();
    this.showCard(cell);
  }

  /** @param {Cell | null} cell */
  showCard(cell) {
    if (!cell) return void (this.card.hidden = true);
    const box = this.boxOf(cell);
    const room = { width: AXES.left + this.area.width, height: AXES.top + this.area.height + AXES.bottom };
    showCard(this.card, this.panel, this.metric, cell.row, cell.column, { ...box, x: box.x + AXES.left, y: box.y + AXES.top }, room);
  }

  /**
   * Select a cell; with `pin`, its token gets a line, or loses it where it was selected already.
   * @param {Cell} cell
   * @param {boolean} pin
   */
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

  /**
   * @param {number} row
   * @param {number} column
   */
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

  /** @param {string} text */
  search(text) {
    this.query = asSearched(text);
    this.find();
    this.foundAt = -1;
    if (this.found.length) this.step(1);
    this.schedule();
  }

  /** The match that the reader has come to. */
  get current() {
    return this.found[this.foundAt];
  }

  find() {
    this.found = this.panel.search(this.query);
    this.foundAt = Math.min(this.foundAt, this.found.length - 1);
    this.header.search.refresh(this.found.length, this.foundAt);
  }

  /** @param {number} by */
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

  /** @param {Cell} cell */
  boxOf({ row, column }) {
    return cellBox(this.view, this.area, Math.min(row, this.area.rows - 1), column);
  }

  placeCell() {
    const { rows, columns } = this.area;
    this.focus = { row: Math.min(this.focus.row, rows - 1), column: Math.max(0, Math.min(this.focus.column, columns - 1)) };
    layOver(this.cell, this.boxOf(this.focus), this.area);
    this.grid.setAttribute("aria-rowcount", String(rows));
    this.grid.setAttribute("aria-colcount", String(columns));
    this.row.setAttribute("aria-rowindex", String(rows - this.focus.row));
    this.cell.setAttribute("aria-colindex", String(this.focus.column + 1));
    const chosen = this.selected?.row === this.focus.row && this.selected?.column === this.focus.column;
    this.cell.setAttribute("aria-selected", String(Boolean(chosen)));
  }

  placeHovered() {
    this.hovered.hidden = !this.pointed;
    if (this.pointed) layOver(this.hovered, this.boxOf(this.pointed), this.area);
  }

  announce() {
    if (!this.area?.columns) return;
    const text = describeCell(this.panel, this.focus.row, this.focus.column);
    this.cell.setAttribute("aria-label", text);
    this.live.textContent = text;
  }

  // Files

  /** @param {string} kind png, html or json */
  save(kind) {
    this.alert.textContent = "";
    if (kind === "png") return this.canvas.toBlob((blob) => blob && save("trajectory.png", blob));
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

export default {
  /** @param {{model: Model<Traits>}} widget */
  initialize({ model }) {
    const heard = takeGrowth.bind(null, model);
    model.on("msg:custom", heard);
    return () => model.off("msg:custom", heard);
  },
  /** @param {{model: Model<Traits>, el: HTMLElement & {nblensGrid?: Grid}}} widget */
  render({ model, el }) {
    const grid = new Grid(model, el);
    el.nblensGrid = grid;
    return () => grid.stop();
  },
};
