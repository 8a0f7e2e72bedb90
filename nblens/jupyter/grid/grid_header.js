// The line above the grid: what is shown, the search, the scale, and what to save.
import { shortNumber } from "./grid_text.js";
import { legendValues, paletteOf } from "./grid_colors.js";
import { button, element } from "./grid_elements.js";

const METRIC_NAMES = { prob: "probability", entropy: "entropy", kl: "KL to last block", rank: "rank of next" };

/** The header's element with `refresh(state)`; `acts` are the functions that its controls call. */
export function makeHeader(acts, signal) {
  const metric = choice("metric", acts.metric, signal);
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
  fill(metric, Object.entries(METRIC_NAMES));

  function refresh({ panel, data, metricName, running }) {
    stop.hidden = !running;
    metric.value = metricName;
    fill(site, [...data.sites.keys()].map((name) => [name, name]));
    site.value = panel.site.name;
    site.hidden = data.sites.size < 2;
    view.hidden = panel.site.views.length < 2;
    if (view.childElementCount !== panel.site.views.length)
      view.replaceChildren(...panel.site.views.map((name) => button(name, `show ${name}`, () => acts.view(name), signal)));
    [...view.children].forEach((child, i) => child.setAttribute("aria-pressed", panel.site.views[i] === panel.view));
    showLegend(legend, panel.scale(metricName), METRIC_NAMES[metricName]);
  }
  return { node, refresh, search };
}

function choice(name, changed, signal) {
  const node = element("select", { "aria-label": name, title: name });
  node.addEventListener("change", () => changed(node.value), { signal });
  return node;
}

function fill(select, options) {
  if (select.options.length === options.length && options.every(([value], i) => select.options[i].value === value)) return;
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
}

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
  function refresh(found, at) {
    count.textContent = !input.value ? "" : found ? `${at < 0 ? "" : `${at + 1}/`}${found.toLocaleString("en")}` : "none";
    for (const step of steps) step.hidden = !found;
    count.hidden = !input.value;
  }
  refresh(0, -1);
  return { node, input, refresh };
}

function showLegend(legend, scale, name) {
  const { colors } = paletteOf(scale);
  const values = legendValues(scale);
  const sign = (value) => (scale.signed && value > 0 ? "+" : "") + shortNumber(value);
  const bar = element("i", { class: "nbg-scale" });
  bar.style.backgroundImage = `linear-gradient(90deg, ${colors.join(",")})`;
  legend.replaceChildren(bar, element("span", { class: "nbg-ticks" }, ...values.map((value) => element("span", {}, sign(value)))));
  legend.title = `${scale.signed ? "change of " : ""}${name}`;
}
