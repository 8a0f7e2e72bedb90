// The controls of the steering panel. Names, texts and messages are data: set as text, never as HTML.

import { drawing, element } from "../elements.js";
import { shortNumber } from "../numbers.js";

/** @typedef {HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement} Control */
/** @typedef {{x: number[], y: number[], label: string}} Curve the measured effect over the coefficient */
/** @typedef {{name: string, coefficient: number, on: boolean, layers: string, op: string, own_layers: string, low: number,
 *   high: number, budget: [low: number, high: number] | null, curve: Curve | null}} RowValues */
/** @typedef {{type: "vector", name: string, field: string, value: string | number | boolean, final: boolean}
 *   | {type: "option", field: string, value: string | number}
 *   | {type: "off" | "generate" | "stop" | "code" | "hello"}} Asked what a user does, as the kernel hears of it */
/** @typedef {(message: Asked) => void} Send */

/**
 * A caption with its control.
 * @param {string} text
 * @param {Control} control
 * @param {string} [title]
 */
export function labelled(text, control, title) {
  return element("label", { class: "nbp-field", title }, element("span", {}, text), control);
}

/**
 * Set a control from the kernel, unless somebody is at it.
 * @param {Control} control
 * @param {string | number} value
 */
export function place(control, value) {
  if (!control.dataset.edited) control.value = String(value);
}

/**
 * Commit what was typed, once: on Enter, or when the field is left.
 * @param {Control} control
 * @param {(value: string) => void} commit
 */
export function onCommit(control, commit) {
  control.addEventListener("input", () => (control.dataset.edited = "yes"));
  control.addEventListener("change", () => {
    if (!control.dataset.edited) return;
    delete control.dataset.edited;
    commit(control.value);
  });
}

/**
 * Choices for a select, kept where they are the same.
 * @param {HTMLSelectElement} select
 * @param {string[]} values
 * @param {Record<string, string>} [titles]
 */
export function offer(select, values, titles = {}) {
  if ([...select.options].map((option) => option.value).join("\n") === values.join("\n")) return;
  select.replaceChildren(...values.map((value) => element("option", { value, title: titles[value] }, value)));
}

/**
 * Calls `send` at most once a frame, with the latest value.
 * @template Value
 * @param {(value: Value) => void} send
 */
function eachFrame(send) {
  /** @type {{latest: Value} | null} */
  let waiting = null;
  const flush = () => {
    const value = waiting;
    waiting = null;
    if (value !== null) send(value.latest);
  };
  /** @param {Value} latest */
  const put = (latest) => {
    if (waiting) waiting.latest = latest;
    else {
      waiting = { latest };
      requestAnimationFrame(flush);
    }
  };
  put.drop = () => (waiting = null);
  return put;
}

/** One vector: switch, slider on its strength curve, number, blocks, operation. */
export class VectorRow {
  /**
   * @param {RowValues} row
   * @param {Send} send
   */
  constructor(row, send) {
    const { name } = row;
    this.row = row;
    /** @type {(field: string, value: string | number | boolean, final?: boolean) => void} */
    this.say = (field, value, final = true) => send({ type: "vector", name, field, value, final });
    this.on = element("input", { type: "checkbox", "aria-label": `${name} on` });
    this.slider = element("input", { type: "range", class: "nbp-range", "aria-label": `coefficient of ${name}` });
    this.number = element("input", { type: "number", step: "any", class: "nbp-number", "aria-label": `coefficient of ${name}, as a number` });
    this.layers = element("input", { type: "text", class: "nbp-layers", spellcheck: "false", "aria-label": `blocks written by ${name}` });
    this.op = element("select", { "aria-label": `operation of ${name}` });
    this.curve = new StrengthCurve();
    this.low = element("div", { class: "nbp-over nbp-over-low" });
    this.high = element("div", { class: "nbp-over nbp-over-high" });
    this.fill = element("div", { class: "nbp-fill" });
    const track = element("div", { class: "nbp-track", "aria-hidden": "true" }, this.low, this.high, element("div", { class: "nbp-zero" }), this.fill);
    this.caption = element("div", { class: "nbp-caption" });
    const title = element("label", { class: "nbp-name", title: name }, this.on, element("span", {}, name));
    const slide = element("div", { class: "nbp-slide" }, this.curve.node, track, this.slider, this.caption);
    const detail = element("div", { class: "nbp-detail" }, labelled("blocks", this.layers, "such as 4-7,-1; empty: the vector's own"), labelled("op", this.op));
    this.node = element("div", { class: "nbp-row", role: "group", "aria-label": name }, title, slide, this.number, detail);
    this.listen();
    this.show(row);
  }

  listen() {
    const drag = eachFrame((/** @type {number} */ value) => this.say("coefficient", value, false));
    this.slider.addEventListener("input", () => {
      this.slider.dataset.edited = "yes";
      this.strength(this.slider.valueAsNumber);
      drag(this.slider.valueAsNumber);
    });
    this.slider.addEventListener("change", () => {
      delete this.slider.dataset.edited;
      drag.drop();
      this.say("coefficient", this.slider.valueAsNumber);
    });
    this.slider.addEventListener("dblclick", () => {
      this.slider.value = "0";
      this.strength(0);
      this.say("coefficient", 0);
    });
    onCommit(this.number, () => {
      if (Number.isFinite(this.number.valueAsNumber)) this.say("coefficient", this.number.valueAsNumber);
    });
    onCommit(this.layers, (value) => this.say("layers", value));
    this.op.addEventListener("change", () => this.say("op", this.op.value));
    this.on.addEventListener("change", () => this.say("on", this.on.checked));
  }

  /**
   * Take over what the kernel says of this vector.
   * @param {RowValues} row
   * @param {Record<string, string>} [ops]
   */
  show(row, ops = {}) {
    this.row = row;
    const step = Number((10 ** Math.floor(Math.log10(row.high / 4)) / 2).toPrecision(6));
    Object.assign(this.slider, { min: row.low, max: row.high, step });
    offer(this.op, Object.keys(ops).length ? Object.keys(ops) : [row.op], ops);
    this.op.value = row.op;
    this.op.title = ops[row.op] ?? "";
    this.layers.placeholder = row.own_layers;
    place(this.layers, row.layers);
    this.node.classList.toggle("nbp-measured", Boolean(row.budget || row.curve));
    this.budget();
    this.curve.show(row);
    if (this.slider.dataset.edited) return;
    this.on.checked = row.on;
    place(this.slider, row.coefficient);
    this.strength(row.coefficient, row.on);
  }

  /**
   * How far along the slider a coefficient is, in per cent.
   * @param {number} value
   */
  along(value) {
    const { low, high } = this.row;
    return 100 * Math.min(1, Math.max(0, (value - low) / (high - low)));
  }

  /** Where the KL budget ends, as red zones. */
  budget() {
    const { budget } = this.row;
    this.low.hidden = this.high.hidden = !budget;
    if (!budget) return;
    this.low.style.width = `${this.along(budget[0])}%`;
    this.high.style.left = `${this.along(budget[1])}%`;
  }

  /**
   * Show a strength at once, before the kernel has heard of it.
   * @param {number} value
   */
  strength(value, on = true) {
    const { budget, curve } = this.row;
    const [at, zero] = [this.along(value), this.along(0)];
    this.on.checked = on;
    this.node.classList.toggle("nbp-off", !on);
    place(this.number, Number(value.toPrecision(6)));
    this.fill.style.left = `${Math.min(at, zero)}%`;
    this.fill.style.width = `${Math.abs(at - zero)}%`;
    const beyond = budget !== null && (value < budget[0] || value > budget[1]);
    this.node.classList.toggle("nbp-beyond", beyond && on);
    this.slider.setAttribute("aria-valuetext", `${shortNumber(value)}${on ? "" : ", off"}${beyond ? ", beyond the measured KL budget" : ""}`);
    const effect = this.curve.mark(value);
    const told = effect === null ? [] : [`${curve?.label} ${shortNumber(effect)}`];
    if (beyond) told.push("beyond the measured KL budget");
    this.caption.textContent = told.join(" · ");
    this.caption.title = budget ? `KL budget: ${shortNumber(budget[0])} to ${shortNumber(budget[1])}` : "";
  }
}

/** The measured effect over the coefficient, on the slider's own axis. */
class StrengthCurve {
  line = drawing("polyline");
  rest = drawing("line", { x1: 0, x2: 100 });
  svg = drawing("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none" }, this.rest, this.line);
  dot = element("div", { class: "nbp-dot" });
  node = element("div", { class: "nbp-curve", "aria-hidden": "true", hidden: true }, this.svg, this.dot);
  /** @type {Curve | null} */
  curve = null;
  bounds = { low: 0, high: 1, bottom: 0, top: 1 };

  /** @param {RowValues} row */
  show({ curve, low, high }) {
    this.curve = curve;
    this.node.hidden = !curve;
    if (!curve) return;
    this.bounds = { low, high, bottom: Math.min(0, ...curve.y), top: Math.max(0, ...curve.y) };
    const points = curve.x.flatMap((x, i) => (x >= low && x <= high ? [`${this.x(x)},${this.y(curve.y[i])}`] : []));
    this.line.setAttribute("points", points.join(" "));
    for (const name of ["y1", "y2"]) this.rest.setAttribute(name, String(this.y(0)));
  }

  /** @param {number} value */
  x(value) {
    const { low, high } = this.bounds;
    return (100 * (value - low)) / (high - low);
  }

  /** @param {number} effect */
  y(effect) {
    const { bottom, top } = this.bounds;
    return 27 - (24 * (effect - bottom)) / (top - bottom || 1);
  }

  /**
   * Put the dot at a coefficient; give the effect there, null where none was measured.
   * @param {number} value
   */
  mark(value) {
    const effect = this.curve && interpolate(this.curve, value);
    this.dot.hidden = effect === null;
    if (effect === null) return null;
    this.dot.style.left = `${this.x(value)}%`;
    this.dot.style.top = `${(100 * this.y(effect)) / 30}%`;
    return effect;
  }
}

/**
 * Between the points measured; null outside of them.
 * @param {{x: number[], y: number[]}} curve
 * @param {number} at
 */
function interpolate({ x, y }, at) {
  const after = x.findIndex((value) => value >= at);
  if (after < 0 || (after === 0 && x[0] !== at)) return null;
  if (after === 0 || x[after] === at) return y[after];
  const share = (at - x[after - 1]) / (x[after] - x[after - 1]);
  return y[after - 1] + share * (y[after] - y[after - 1]);
}
