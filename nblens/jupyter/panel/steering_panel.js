// The steering panel: what the kernel says comes as the traits `state` and `outcome` and as messages; what a user
// does goes out as messages alone, at most one a frame.

import { element } from "../elements.js";
import { VectorRow, labelled, offer, onCommit, place } from "./steering_panel_controls.js";
import { FINAL, Texts } from "./steering_panel_texts.js";

/** @import { Model } from "../elements.js" */
/** @import { Control, RowValues, Send } from "./steering_panel_controls.js" */
/** @import { Progress } from "./steering_panel_texts.js" */

/** @typedef {{write: string, prompt: string, max_new_tokens: number, temperature: number, seed: number,
 *   mode: string}} Options */
/** @typedef {Options & {rows: RowValues[], writes: string[], ops: Record<string, string>, modes: string[]}} State */
/** @typedef {{state: State, outcome: Progress, _stand_in: string}} Traits `outcome`: empty before the first */
/** @typedef {({type: "text"} & Progress) | {type: "error", error: string} | {type: "state", state: State}
 *   | {type: "code", code: string}} Said */

/** @type {Record<string, string>} */
const MODE_TITLES = {
  restart: "the text begins again with the new strength",
  continue: "the text goes on with the new strength from its next token",
};

/** @param {{model: Model<Traits>, el: HTMLElement}} widget */
function render({ model, el }) {
  /** @type {Send} */
  const send = (message) => model.send(message);
  const settings = new Settings(send);
  const texts = new Texts();
  const code = new Code(send);
  const alert = element("div", { class: "nbp-alert", role: "alert", hidden: true });
  /** @param {string} text */
  const fail = (text) => {
    alert.textContent = text;
    alert.hidden = !text;
  };
  const root = element("section",
    { class: "nblens-panel", "aria-label": "Steering panel", "data-nblens": model.get("_stand_in"), "data-lm-suppress-shortcuts": "true" },
    settings.vectors, settings.prompt, settings.node, alert, texts.node,
    element("div", { class: "nbp-foot" }, code.button, texts.status, texts.speed), code.box);
  el.append(root);

  /** @param {Said} message */
  const hear = (message) => {
    if (message.type === "text") {
      texts.hear(message);
      settings.busy(!FINAL.includes(message.state));
      if (message.state !== "waiting") fail(message.error);
    } else if (message.type === "error") fail(message.error);
    else if (message.type === "state") settings.show(message.state, true);
    else if (message.type === "code") code.show(message.code);
  };
  const onState = () => settings.show(model.get("state"));
  const onOutcome = () => model.get("outcome").state && hear({ type: "text", ...model.get("outcome") });
  /** @param {KeyboardEvent} event */
  const onKey = (event) => {
    if (event.key === "Escape" && settings.isBusy) send({ type: "stop" });
    event.stopPropagation(); // the notebook must not take what is typed here for its shortcuts
  };
  model.on("msg:custom", hear);
  model.on("change:state", onState);
  model.on("change:outcome", onOutcome);
  root.addEventListener("keydown", onKey);
  root.addEventListener("input", () => fail(""));
  onState();
  onOutcome();
  send({ type: "hello" });
  return () => {
    model.off("msg:custom", hear);
    model.off("change:state", onState);
    model.off("change:outcome", onOutcome);
    texts.close();
  };
}

/** Vectors, prompt and options. */
class Settings {
  /** @type {Map<string, VectorRow>} */
  rows = new Map();
  isBusy = false;
  list = element("div", { class: "nbp-rows" });
  empty = element("p", { class: "nbp-empty", hidden: true }, "No steering vectors yet: make one with %%steer NAME, and it appears here.");
  mode = element("select");
  off = element("button", { type: "button" }, "All off");
  text = element("textarea", { rows: 2, class: "nbp-prompt", spellcheck: "false", placeholder: "A text to continue", "aria-label": "Prompt" });
  go = element("button", { type: "button", class: "nbp-go", title: "Ctrl+Enter in the prompt" }, "Generate");
  halt = element("button", { type: "button", title: "Esc", disabled: true }, "Stop");
  write = element("select", { title: "tokens that are written; own: each vector's own" });
  tokens = number(1, 4096, 1);
  temperature = number(0, 100, 0.1);
  seed = number(0, 4294967295, 1);
  /** @type {[keyof Options, Control][]} */
  options = [
    ["write", this.write], ["prompt", this.text], ["max_new_tokens", this.tokens],
    ["temperature", this.temperature], ["seed", this.seed], ["mode", this.mode],
  ];
  vectors = element("div", {}, this.list, this.empty,
    element("div", { class: "nbp-line" }, labelled("write at", this.write), labelled("on change", this.mode), this.off));
  prompt = element("div", {}, this.text);
  node = element("div", { class: "nbp-line" }, this.go, this.halt,
    labelled("tokens", this.tokens, "most new tokens"), labelled("temperature", this.temperature, "0: greedy"), labelled("seed", this.seed));

  /** @param {Send} send */
  constructor(send) {
    this.send = send;
    this.listen();
  }

  listen() {
    for (const [field, control] of this.options)
      onCommit(control, (typed) => {
        const value = control.type === "number" ? parseFloat(typed) : typed;
        if (!Number.isNaN(value)) this.send({ type: "option", field, value });
      });
    this.off.addEventListener("click", () => this.send({ type: "off" }));
    this.go.addEventListener("click", () => this.generate());
    this.halt.addEventListener("click", () => this.send({ type: "stop" }));
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.generate();
    });
  }

  generate() {
    if (this.text.dataset.edited) this.text.dispatchEvent(new Event("change"));
    this.send({ type: "generate" });
  }

  /** @param {boolean} isBusy */
  busy(isBusy) {
    this.isBusy = isBusy;
    this.halt.disabled = !isBusy;
  }

  /**
   * Take over the kernel's state; `again`: also where somebody is editing.
   * @param {State} state
   */
  show(state, again = false) {
    if (!state.rows) return;
    offer(this.write, state.writes);
    offer(this.mode, state.modes, MODE_TITLES);
    for (const [field, control] of this.options) {
      if (again && field !== "prompt") delete control.dataset.edited;
      place(control, state[field]);
    }
    this.mode.title = MODE_TITLES[state.mode] ?? "";
    this.empty.hidden = state.rows.length > 0;
    this.off.disabled = !state.rows.some((row) => row.on);
    this.showRows(state, again);
  }

  /** @type {(state: State, again: boolean) => void} */
  showRows({ rows, ops }, again) {
    const names = new Set(rows.map((row) => row.name));
    for (const [name, row] of this.rows) {
      if (names.has(name)) continue;
      row.node.remove();
      this.rows.delete(name);
    }
    for (const values of rows) {
      const row = this.rows.get(values.name) ?? new VectorRow(values, this.send);
      if (!this.rows.has(values.name)) this.list.append(row.node);
      this.rows.set(values.name, row);
      if (again) for (const control of [row.number, row.layers]) delete control.dataset.edited;
      row.show(values, ops);
    }
  }
}

/** @type {(min: number, max: number, step: number) => HTMLInputElement} */
function number(min, max, step) {
  return element("input", { type: "number", min, max, step, class: "nbp-number" });
}

/** The cell that does the same. */
class Code {
  button = element("button", { type: "button", class: "nbp-copy", "aria-expanded": "false" }, "Copy as code");
  box = element("textarea", { class: "nbp-code", readonly: true, hidden: true, "aria-label": "Code that does the same", spellcheck: "false" });

  /** @param {Send} send */
  constructor(send) {
    this.button.addEventListener("click", () => {
      if (this.box.hidden) send({ type: "code" });
      else this.toggle(false);
    });
  }

  /** @param {boolean} open */
  toggle(open) {
    this.box.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
    this.button.textContent = open ? "Close code" : "Copy as code";
  }

  /** @param {string} code */
  async show(code) {
    this.box.value = code;
    this.box.rows = Math.min(12, code.split("\n").length + 1);
    this.toggle(true);
    this.box.focus();
    this.box.select();
    try {
      await navigator.clipboard.writeText(code);
      this.button.textContent = "Copied · close";
    } catch {
      this.button.textContent = "Close code"; // the page may not write there; what is selected can be copied by hand
    }
  }
}

export default { render };
