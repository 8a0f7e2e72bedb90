// The two texts of the panel, without and with steering, as they are written.

import { element } from "../elements.js";

/** @typedef {[text: string, changed: boolean][]} Parts a text in parts, with whether the other text lacks their words */
/** @typedef {{gen_id: number, seq: number, state: string, base: string, steered: string, n_tokens: number,
 *   tokens_per_second: number | null, error: string, parts: [base: Parts, steered: Parts]}} Progress */

/** @type {Record<string, string>} */
const STATES = { waiting: "waiting for the model", running: "writing", done: "done", stopped: "stopped", error: "failed" };
export const FINAL = ["done", "stopped", "error"];

/** Both texts, drawn at most once a frame. */
export class Texts {
  /** @type {Progress} */
  latest = { gen_id: -1, seq: 0, state: "", base: "", steered: "", n_tokens: 0, tokens_per_second: null, error: "", parts: [[], []] };
  before = ["", ""];
  frame = 0;
  panes = ["without steering", "with steering"].map((title) =>
    element("div", { class: "nbp-text", tabindex: 0, role: "region", "aria-label": `Text ${title}` }));
  node = element("div", { class: "nbp-texts" }, column("without steering", this.panes[0], "nbp-base"), column("with steering", this.panes[1], "nbp-steered"));
  status = element("span", { class: "nbp-status", role: "status" });
  speed = element("span", { class: "nbp-speed" });

  /**
   * Take in a message; one that an earlier generation sent too late is dropped.
   * @param {Progress} message
   */
  hear(message) {
    const last = this.latest;
    if (message.gen_id < last.gen_id || (message.gen_id === last.gen_id && message.seq <= last.seq)) return;
    // what still stood of a text stays after it, for texts that never came to their end
    if (message.gen_id > last.gen_id) this.before = [last.base, last.steered].map((text, i) => text + remainder(text, this.before[i]));
    this.latest = message;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const { base, steered, state, tokens_per_second: speed, n_tokens, parts } = this.latest;
    const final = FINAL.includes(state);
    this.panes.forEach((pane, i) => {
      const ghost = final ? "" : remainder([base, steered][i], this.before[i]);
      const follows = pane.scrollTop + pane.clientHeight >= pane.scrollHeight - 8;
      pane.replaceChildren(...parts[i].map(([text, changed]) => (changed ? element("mark", {}, text) : text)));
      if (ghost) pane.append(element("span", { class: "nbp-ghost", "aria-hidden": "true" }, ghost));
      pane.setAttribute("aria-busy", String(!final));
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

/** @type {(title: string, pane: HTMLElement, kind: string) => HTMLElement} */
function column(title, pane, kind) {
  return element("div", { class: `nbp-column ${kind}` }, element("div", { class: "nbp-title" }, title), pane);
}

/**
 * What a text that is written anew leaves standing of the one before it.
 * @param {string} text
 * @param {string} before
 */
function remainder(text, before) {
  return splitWords(before).slice(splitWords(text).length).join("");
}

/**
 * Words, each with the space before it: joined again they are the text.
 * @param {string} text
 * @returns {string[]}
 */
function splitWords(text) {
  return text.match(/\s*\S+|\s+$/g) ?? [];
}
