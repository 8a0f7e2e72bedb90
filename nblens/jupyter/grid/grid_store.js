// What the kernel sends, decoded: one copy of a model's arrays for all its views on the page.
import { GridData } from "./grid_data.js";

/** @import { Model } from "../elements.js" */
/** @import { Bytes, Header, Metric } from "./grid_data.js" */

/** @typedef {{metric: Metric, view: string, site: string, selection: [block: number, token: number] | null,
 *   _pinned_ids: number[], _n_tokens: number, _running: boolean, _stand_in: string,
 *   _data: {header: Header, bytes: Bytes}}} Traits */
/** @typedef {({type: "grow"} & Header) | {type: "export", id: number, format: string} | {type: "error", text: string}} Said */

/** @type {WeakMap<Traits["_data"], GridData>} */
const stores = new WeakMap();

/** @param {Model<Traits>} model */
export function storeOf(model) {
  const sent = model.get("_data");
  const known = stores.get(sent);
  if (known) return known;
  const data = new GridData();
  data.apply(sent.header, sent.bytes);
  stores.set(sent, data);
  return data;
}

/**
 * New tokens go into the store once, however many views there are; where some never came, all are asked for.
 * @param {Model<Traits>} model
 * @param {Said} message
 * @param {Bytes[]} buffers
 */
export function takeGrowth(model, message, buffers) {
  if (message?.type === "grow" && !storeOf(model).apply(message, buffers[0])) model.send({ type: "refresh" });
}
