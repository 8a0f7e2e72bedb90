// The controls of the steering panel. Names, texts and messages are data: set as text, never as HTML.

import { keepShortcutsAway } from "../shortcuts.js";

/** An element with properties, attributes (aria-…, data-…, role) and children. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria-|data-|role$|for$)/.test(name)) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return keepShortcutsAway(made);
}

/** A number as a person writes it. */
export function shortNumber(value) {
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

/** A caption with its control. */
export function labelled(text, control, title = "") {
  return element("label", { className: "nbp-field", title }, element("span", { textContent: text }), control);
}

/** Set a control from the kernel, unless somebody is at it. */
export function place(control, value) {
  if (!control.dataset.edited) control.value = value;
}

/** Commit what was typed, once: on Enter, or when the field is left. */
export function onCommit(control, commit) {
  control.addEventListener("input", () => (control.dataset.edited = "yes"));
  control.addEventListener("change", () => {
    if (!control.dataset.edited) return;
    delete control.dataset.edited;
    commit(control.value);
  });
}

/** Choices for a select, kept where they are the same. */
export function offer(select, values, titles = {}) {
  if ([...select.options].map((option) => option.value).join("\n") === values.join("\n")) return;
  select.replaceChildren(...values.map((value) => element("option", { value, textContent: value, title: titles[value] ?? "" })));
}

/** Calls `send` at most once a frame, with the latest value. */
export function eachFrame(send) {
  let waiting = null;
  const flush = () => {
    const value = waiting;
    waiting = null;
    if (value !== null) send(value.latest);
  };
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
  constructor(row, send) {
    this.name = row.name;
    this.say = (field, value, final = true) => send({ type: "vector", name: row.name, field, value, final });
    this.build();
    this.listen();
    this.show(row);
  }

  build() {
    const name = this.name;
    this.on = element("input", { type: "checkbox", "aria-label": `${name} on` });
    this.slider = element("input", { type: "range", className: "nbp-range", "aria-label": `coefficient of ${name}` });
    this.number = element("input", { type: "number", step: "any", className: "nbp-number", "aria-label": `coefficient of ${name}, as a number` });
    this.layers = element("input", { type: "text", className: "nbp-layers", spellcheck: false, "aria-label": `blocks written by ${name}` });
    this.op = element("select", { "aria-label": `operation of ${name}` });
    this.curve = new StrengthCurve();
    this.low = element("div", { className: "nbp-over nbp-over-low" });
    this.high = element("div", { className: "nbp-over nbp-over-high" });
    this.fill = element("div", { className: "nbp-fill" });
    const track = element("div", { className: "nbp-track", "aria-hidden": "true" }, this.low, this.high, element("div", { className: "nbp-zero" }), this.fill);
    this.caption = element("div", { className: "nbp-caption" });
    const title = element("label", { className: "nbp-name", title: name }, this.on, element("span", { textContent: name }));
    const slide = element("div", { className: "nbp-slide" }, this.curve.node, track, this.slider, this.caption);
    const detail = element("div", { className: "nbp-detail" }, labelled("blocks", this.layers, "such as 4-7,-1; empty: the vector's own"), labelled("op", this.op));
    this.node = element("div", { className: "nbp-row", role: "group", "aria-label": name }, title, slide, this.number, detail);
  }

  listen() {
    const drag = eachFrame((value) => this.say("coefficient", value, false));
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
      this.slider.value = 0;
      this.strength(0);
      this.say("coefficient", 0);
    });
    onCommit(this.number, () => Number.isFinite(this.number.valueAsNumber) && this.say("coefficient", this.number.valueAsNumber));
    onCommit(this.layers, (value) => this.say("layers", value));
    this.op.addEventListener("change", () => this.say("op", this.op.value));
    this.on.addEventListener("change", () => this.say("on", this.on.checked));
  }

  /** Take over what the kernel says of this vector. */
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
    this.budget(row);
    this.curve.show(row);
    if (this.slider.dataset.edited) return;
    this.on.checked = row.on;
    place(this.slider, row.coefficient);
    this.strength(row.coefficient, row.on);
  }

  /** Where the KL budget ends, as red zones. */
  budget({ budget, low, high }) {
    const share = (value) => `${100 * Math.min(1, Math.max(0, (value - low) / (high - low)))}%`;
    this.low.hidden = this.high.hidden = !budget;
    if (!budget) return;
    this.low.style.width = share(budget[0]);
    this.high.style.left = share(budget[1]);
  }

  /** Show a strength at once, before the kernel has heard of it. */
  strength(value, on = true) {
    const { low, high, budget } = this.row;
    const [at, zero] = [value, 0].map((x) => Math.min(1, Math.max(0, (x - low) / (high - low))));
    this.on.checked = on;
    this.node.classList.toggle("nbp-off", !on);
    place(this.number, Number(value.toPrecision(6)));
    this.fill.style.left = `${100 * Math.min(at, zero)}%`;
    this.fill.style.width = `${100 * Math.abs(at - zero)}%`;
    const beyond = budget && (value < budget[0] || value > budget[1]);
    this.node.classList.toggle("nbp-beyond", Boolean(beyond && on));
    this.slider.setAttribute("aria-valuetext", `${shortNumber(value)}${on ? "" : ", off"}${beyond ? ", beyond the measured KL budget" : ""}`);
    const effect = this.curve.mark(value);
    const told = effect === null ? [] : [`${this.row.curve.label} ${shortNumber(effect)}`];
    if (beyond) told.push("beyond the measured KL budget");
    this.caption.textContent = told.join(" · ");
    this.caption.title = budget ? `KL budget: ${shortNumber(budget[0])} to ${shortNumber(budget[1])}` : "";
  }
}

/** The measured effect over the coefficient, on the slider's own axis. */
export class StrengthCurve {
  constructor() {
    this.svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.svg.setAttribute("viewBox", "0 0 100 30");
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    this.rest = document.createElementNS("http://www.w3.org/2000/svg", "line");
    this.svg.append(this.rest, this.line);
    this.dot = element("div", { className: "nbp-dot" });
    this.node = element("div", { className: "nbp-curve", "aria-hidden": "true", hidden: true }, this.svg, this.dot);
  }

  show({ curve, low, high }) {
    this.curve = curve;
    this.node.hidden = !curve;
    if (!curve) return;
    const [bottom, top] = [Math.min(0, ...curve.y), Math.max(0, ...curve.y)];
    this.x = (value) => (100 * (value - low)) / (high - low);
    this.y = (value) => 27 - (24 * (value - bottom)) / (top - bottom || 1);
    const inside = curve.x.map((x, i) => [x, curve.y[i]]).filter(([x]) => x >= low && x <= high);
    this.line.setAttribute("points", inside.map(([x, y]) => `${this.x(x)},${this.y(y)}`).join(" "));
    for (const [name, value] of Object.entries({ x1: 0, x2: 100, y1: this.y(0), y2: this.y(0) })) this.rest.setAttribute(name, value);
  }

  /** Put the dot at a coefficient; give the effect there, null where none was measured. */
  mark(value) {
    const effect = this.curve ? interpolate(this.curve, value) : null;
    this.dot.hidden = effect === null;
    if (effect === null) return null;
    this.dot.style.left = `${this.x(value)}%`;
    this.dot.style.top = `${(100 * this.y(effect)) / 30}%`;
    return effect;
  }
}

/** Between the points measured; null outside of them. */
export function interpolate({ x, y }, at) {
  const after = x.findIndex((value) => value >= at);
  if (after < 0 || (after === 0 && x[0] !== at)) return null;
  if (after === 0 || x[after] === at) return y[after];
  const share = (at - x[after - 1]) / (x[after] - x[after - 1]);
  return y[after - 1] + share * (y[after] - y[after - 1]);
}
