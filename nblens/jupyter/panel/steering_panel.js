// The steering panel: what the kernel says comes as the traits `state` and `outcome` and as messages; what a user
// does goes out as messages alone, at most one a frame.

import { changedWords, remainder, runs, splitWords } from "./steering_panel_words.js";
import { VectorRow, element, labelled, offer, onCommit, place } from "./steering_panel_controls.js";

const STATES = { waiting: "waiting for the model", running: "writing", done: "done", stopped: "stopped", error: "failed" };
const FINAL = ["done", "stopped", "error"];
const MODE_TITLES = {
  restart: "the text begins again with the new strength",
  continue: "the text goes on with the new strength from its next token",
};

function render({ model, el }) {
  const send = (message) => model.send(message);
  const settings = new Settings(send);
  const texts = new Texts();
  const code = new Code(send);
  const alert = element("div", { className: "nbp-alert", role: "alert", hidden: true });
  const fail = (text) => {
    alert.textContent = text;
    alert.hidden = !text;
  };
  const root = element("section", { className: "nblens-panel", "aria-label": "Steering panel", "data-nblens": model.get("_stand_in"), "data-lm-suppress-shortcuts": "true" });
  root.append(settings.vectors, settings.prompt, settings.node, alert, texts.node, element("div", { className: "nbp-foot" }, code.button, texts.status, texts.speed), code.box);
  el.append(root);

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
  constructor(send) {
    this.send = send;
    this.rows = new Map();
    this.list = element("div", { className: "nbp-rows" });
    this.empty = element("p", { className: "nbp-empty", textContent: "No steering vectors yet: make one with %%steer NAME, and it appears here.", hidden: true });
    this.write = element("select", { title: "tokens that are written; own: each vector's own" });
    this.mode = element("select");
    this.off = element("button", { type: "button", textContent: "All off" });
    this.off.addEventListener("click", () => send({ type: "off" }));
    this.vectors = element("div", {}, this.list, this.empty, element("div", { className: "nbp-line" }, labelled("write at", this.write), labelled("on change", this.mode), this.off));
    this.text = element("textarea", { rows: 2, className: "nbp-prompt", spellcheck: false, placeholder: "A text to continue", "aria-label": "Prompt" });
    this.prompt = element("div", {}, this.text);
    this.options = { write: this.write, prompt: this.text, ...this.numbers() };
    this.options.mode = this.mode;
    this.node = this.line();
    this.listen();
  }

  numbers() {
    const number = (min, max, step) => element("input", { type: "number", min, max, step, className: "nbp-number" });
    return { max_new_tokens: number(1, 4096, 1), temperature: number(0, 100, 0.1), seed: number(0, 4294967295, 1) };
  }

  line() {
    this.go = element("button", { type: "button", className: "nbp-go", textContent: "Generate", title: "Ctrl+Enter in the prompt" });
    this.halt = element("button", { type: "button", textContent: "Stop", title: "Esc", disabled: true });
    const { max_new_tokens, temperature, seed } = this.options;
    const fields = [labelled("tokens", max_new_tokens, "most new tokens"), labelled("temperature", temperature, "0: greedy"), labelled("seed", seed)];
    return element("div", { className: "nbp-line" }, this.go, this.halt, ...fields);
  }

  listen() {
    for (const [field, control] of Object.entries(this.options)) {
      const value = () => (control.type === "number" ? control.valueAsNumber : control.value);
      onCommit(control, () => (control.type !== "number" || Number.isFinite(value())) && this.send({ type: "option", field, value: value() }));
    }
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

  busy(isBusy) {
    this.isBusy = isBusy;
    this.halt.disabled = !isBusy;
  }

  /** Take over the kernel's state; `again`: also where somebody is editing. */
  show(state, again = false) {
    if (!state.rows) return;
    offer(this.write, state.writes);
    offer(this.mode, state.modes, MODE_TITLES);
    for (const [field, control] of Object.entries(this.options)) {
      if (again && field !== "prompt") delete control.dataset.edited;
      place(control, state[field]);
    }
    this.mode.title = MODE_TITLES[state.mode] ?? "";
    this.empty.hidden = state.rows.length > 0;
    this.off.disabled = !state.rows.some((row) => row.on);
    this.showRows(state, again);
  }

  showRows({ rows, ops }, again) {
    const names = new Set(rows.map((row) => row.name));
    for (const [name, row] of this.rows) {
      if (names.has(name)) continue;
      row.node.remove();
      this.rows.delete(name);
    }
    for (const values of rows) {
      if (!this.rows.has(values.name)) {
        this.rows.set(values.name, new VectorRow(values, this.send));
        this.list.append(this.rows.get(values.name).node);
      }
      const row = this.rows.get(values.name);
      if (again) for (const control of [row.number, row.layers]) delete control.dataset.edited;
      row.show(values, ops);
    }
  }
}

/** The two texts as they are written, drawn at most once a frame. */
class Texts {
  constructor() {
    this.latest = null;
    this.before = { base: "", steered: "" };
    this.frame = 0;
    const pane = (title) => element("div", { className: "nbp-text", tabIndex: 0, role: "region", "aria-label": title });
    this.base = pane("Text without steering");
    this.steered = pane("Text with steering");
    const column = (title, node, kind) => element("div", { className: `nbp-column ${kind}` }, element("div", { className: "nbp-title", textContent: title }), node);
    this.node = element("div", { className: "nbp-texts" }, column("without steering", this.base, "nbp-base"), column("with steering", this.steered, "nbp-steered"));
    this.status = element("span", { className: "nbp-status", role: "status" });
    this.speed = element("span", { className: "nbp-speed" });
  }

  /** Take in a message; one that an earlier generation sent too late is dropped. */
  hear(message) {
    const last = this.latest;
    if (last && (message.gen_id < last.gen_id || (message.gen_id === last.gen_id && message.seq <= last.seq))) return;
    if (last && message.gen_id > last.gen_id) this.before = { base: whole(last.base, this.before.base), steered: whole(last.steered, this.before.steered) };
    this.latest = message;
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const { base, steered, state, tokens_per_second: speed, n_tokens } = this.latest;
    const words = [splitWords(base), splitWords(steered)];
    const changed = changedWords(...words);
    [this.base, this.steered].forEach((pane, i) => {
      const text = [base, steered][i];
      const ghost = FINAL.includes(state) ? "" : remainder(text, [this.before.base, this.before.steered][i]);
      const follows = pane.scrollTop + pane.clientHeight >= pane.scrollHeight - 8;
      pane.replaceChildren(...runs(words[i], changed[i]).map(marked), ...(ghost ? [element("span", { className: "nbp-ghost", textContent: ghost, "aria-hidden": "true" })] : []));
      pane.setAttribute("aria-busy", String(!FINAL.includes(state)));
      if (follows && !ghost) pane.scrollTop = pane.scrollHeight;
    });
    const told = STATES[state] ?? "";
    if (this.status.textContent !== told) this.status.textContent = told;
    this.speed.textContent = speed ? `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s` : "";
    this.speed.title = `${n_tokens} tokens`;
  }

  close() {
    cancelAnimationFrame(this.frame);
  }
}

/** A text with what still stood of the one before it, for texts that never came to their end. */
function whole(text, before) {
  return text + remainder(text, before);
}

function marked({ text, changed }) {
  return changed ? element("mark", { textContent: text }) : document.createTextNode(text);
}

/** The cell that does the same. */
class Code {
  constructor(send) {
    this.button = element("button", { type: "button", className: "nbp-copy", textContent: "Copy as code", "aria-expanded": "false" });
    this.box = element("textarea", { className: "nbp-code", readOnly: true, hidden: true, "aria-label": "Code that does the same", spellcheck: false });
    this.button.addEventListener("click", () => {
      if (!this.box.hidden) return this.toggle(false);
      send({ type: "code" });
    });
  }

  toggle(open) {
    this.box.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
    this.button.textContent = open ? "Close code" : "Copy as code";
  }

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
