// The line above the grid: what is shown, the search, the scale, and what to save.
import { element } from "../elements.js";
import { shortNumber, signedNumber } from "../numbers.js";
import { legendValues, paletteOf } from "./grid_colors.js";
import { button } from "./grid_elements.js";

/** @import { Scale } from "./grid_colors.js" */
/** @import { GridData, Metric, Panel } from "./grid_data.js" */

/** @typedef {{metric(name: Metric): void, site(name: string): void, view(name: string): void, zoom(factor: number): void,
 *   whole(): void, search(text: string): void, step(by: number): void, clearSearch(): void, save(kind: string): void,
 *   stop(): void}} Acts what the header's controls call */

/** @type {Record<Metric, string>} */
const METRIC_NAMES = {
  prob: "probability", entropy: "entropy", kl: "KL to last block", rank: "rank of next", kl_from_base: "KL(base ‖ steered)",
};

/**
 * The header's element, how it is brought up to date, and its search.
 * @param {Acts} acts
 * @param {AbortSignal} signal
 */
export function makeHeader(acts, signal) {
  const metric = choice("metric", (name) => acts.metric(/** @type {Metric} */ (name)), signal);
  const site = choice("site", acts.site, signal);
  const view = element("span", { class: "nbg-group", role: "group", "aria-label": "view" });
  const search = makeSearch(acts, signal);
  const legend = element("span", { class: "nbg-legend" });
  const zoom = element("span", { class: "nbg-group", role: "group", "aria-label": "zoom" },
    button("−", "zoom out (−)", () => acts.zoom(1 / 1.5), signal),
    button("+", "zoom in (+)", () => acts.zoom(1.5), signal),
    button("⤢", "show all (0)", acts.whole, signal));
  const files = element("span", { class: "nbg-group", role: "group", "aria-label": "save as" },
    ...["PNG", "HTML", "JSON"].map((kind) => button(kind, `save as ${kind}`, () => acts.save(kind.toLowerCase()), signal)));
  const stop = button("■ Stop", "stop the run", acts.stop, signal);
  const node = element("div", { class: "nbg-header", role: "toolbar", "aria-label": "trajectory grid" },
    stop, metric, site, view, search.node, element("span", { class: "nbg-gap" }), legend, zoom, files);

  /** @param {{panel: Panel, data: GridData, metricName: Metric, running: boolean}} state */
  function refresh({ panel, data, metricName, running }) {
    stop.hidden = !running;
    fill(metric, Object.entries(METRIC_NAMES).filter(([name]) => name in data.scales));
    metric.value = metricName;
    fill(site, [...data.sites.keys()].map((name) => [name, name]));
    site.value = panel.site.name;
    site.hidden = data.sites.size < 2;
    view.hidden = panel.site.views.length < 2;
    if (view.childElementCount !== panel.site.views.length)
      view.replaceChildren(...panel.site.views.map((name) => button(name, `show ${name}`, () => acts.view(name), signal)));
    [...view.children].forEach((child, i) => child.setAttribute("aria-pressed", String(panel.site.views[i] === panel.view)));
    showLegend(legend, panel.scale(metricName), METRIC_NAMES[metricName]);
  }
  return { node, refresh, search };
}

/**
 * @param {string} name
 * @param {(value: string) => void} changed
 * @param {AbortSignal} signal
 */
function choice(name, changed, signal) {
  const node = element("select", { "aria-label": name, title: name });
  node.addEventListener("change", () => changed(node.value), { signal });
  return node;
}

/**
 * @param {HTMLSelectElement} select
 * @param {[value: string, text: string][]} options
 */
function fill(select, options) {
  if (select.options.length === options.length && options.every(([value], i) => select.options[i].value === value)) return;
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}

/**
 * @param {Acts} acts
 * @param {AbortSignal} signal
 */
function makeSearch(acts, signal) {
  const input = element("input", { type: "search", placeholder: "search", "aria-label": "search a token (/)", title: "search a token ( / )", spellcheck: "false", autocomplete: "off" });
  const count = element("output", { class: "nbg-count", "aria-live": "polite" });
  const steps = [button("‹", "previous match", () => acts.step(-1), signal), button("›", "next match", () => acts.step(1), signal)];
  input.addEventListener("input", () => acts.search(input.value), { signal });
  input.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Enter") acts.step(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") acts.clearSearch();
    if (event.key === "Enter" || event.key === "Escape") event.preventDefault();
  }, { signal });
  const node = element("span", { class: "nbg-search", role: "search" }, input, ...steps, count);
  /**
   * @param {number} found
   * @param {number} at
   */
  function refresh(found, at) {
    count.textContent = !input.value ? "" : found ? `${at < 0 ? "" : `${at + 1}/`}${found.toLocaleString("en")}` : "none";
    for (const step of steps) step.hidden = !found;
    count.hidden = !input.value;
  }
  refresh(0, -1);
  return { node, input, refresh };
}

/**
 * @param {HTMLElement} legend
 * @param {Scale} scale
 * @param {string} name
 */
function showLegend(legend, scale, name) {
  const { colors } = paletteOf(scale);
  const values = legendValues(scale);
  const sign = scale.signed ? signedNumber : shortNumber;
  const bar = element("i", { class: "nbg-scale" });
  bar.style.backgroundImage = `linear-gradient(90deg, ${colors.join(",")})`;
  legend.replaceChildren(bar, element("span", { class: "nbg-ticks" }, ...values.map((value) => element("span", {}, sign(value)))));
  legend.title = `${scale.signed ? "change of " : ""}${name}`;
}
