// The arrays of a grid, decoded from what nblens/jupyter/grid/payload.py sends. Tokens come first in every array, so
// that new ones are written at the end.

/** @import { Scale } from "./grid_colors.js" */
/** @import { Cell } from "./grid_layout.js" */

/** @typedef {"prob" | "entropy" | "kl" | "rank" | "kl_from_base"} Metric */
/** @typedef {keyof typeof KINDS} ArrayName */
/** @typedef {Uint32Array | Uint16Array | Float32Array} Numbers */
/** @typedef {DataView<ArrayBuffer> | ArrayBuffer} Bytes */
/** @typedef {{name: string, views: string[], layers: number[], k: number, n_shared: number, reading: string,
 *   model: string}} Site */
/** @typedef {{site: string, view: string, start: number, tokens: string[], characters: Record<number, string>,
 *   target_ids: number[], prompt_length: number,
 *   arrays: [name: ArrayName, type: keyof typeof TYPES, offset: number, length: number][]}} Part tokens from `start` on */
/** @typedef {{sheets: Part[], sites: Site[], scales: Record<Metric, Scale>,
 *   vocabulary: {start: number, ids: number[], texts: string[]}}} Header */

export const NONE = 0xffffffff;
const UNKNOWN = 65535;

const PROBABILITIES = Float32Array.from({ length: 65536 }, (_, code) =>
  code === UNKNOWN ? NaN : Math.exp(-60 * (code / 65534) ** 2),
);

/**
 * A probability from its 16-bit code.
 * @param {number} code
 */
export function probability(code) {
  return PROBABILITIES[code];
}

const KINDS = {
  top: Uint32Array, prob: Uint16Array, entropy: Float32Array, kl: Float32Array, rank: Uint32Array,
  next_prob: Uint16Array, next: Uint32Array, targets: Uint16Array, base_prob: Uint16Array, kl_from_base: Float32Array,
};

const TYPES = { u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

/** What one view of one site holds. */
export class Sheet {
  /** @param {Site} site */
  constructor(site) {
    this.site = site;
    this.n = 0;
    this.promptLength = 0;
    /** @type {string[]} */
    this.tokens = [];
    /** @type {string[]} of each token that holds part of a character, with its neighbours; sparse */
    this.characters = [];
    /** @type {number[]} */
    this.targetIds = [];
    /** @type {Record<ArrayName, Numbers>} */
    this.arrays = {
      top: new Uint32Array(), prob: new Uint16Array(), entropy: new Float32Array(), kl: new Float32Array(),
      rank: new Uint32Array(), next_prob: new Uint16Array(), next: new Uint32Array(), targets: new Uint16Array(),
      base_prob: new Uint16Array(), kl_from_base: new Float32Array(),
    };
  }

  /**
   * @param {Part} part
   * @param {ArrayBuffer} buffer
   */
  write(part, buffer) {
    const end = part.start + part.tokens.length;
    this.tokens.length = Math.min(this.tokens.length, part.start);
    for (const token of part.tokens) this.tokens.push(token);
    this.characters.length = Math.min(this.characters.length, part.start);
    Object.assign(this.characters, part.characters);
    this.targetIds = part.target_ids;
    this.promptLength = part.prompt_length;
    const { layers, k } = this.site;
    /** @type {Partial<Record<ArrayName, number>>} */
    const perToken = { top: layers.length * k, prob: layers.length * k, next: 1, targets: layers.length * part.target_ids.length };
    for (const [name, type, offset, length] of part.arrays) {
      const stride = perToken[name] ?? layers.length;
      this.grow(name, end * stride, part.start * stride);
      this.arrays[name].set(new TYPES[type](buffer, offset, length), part.start * stride);
    }
    this.n = end;
  }

  /**
   * What stands in a column, with the character of which it is a part.
   * @param {number} column
   */
  named(column, text = this.tokens[column]) {
    return this.characters[column] ? `${text} of ${this.characters[column]}` : text;
  }

  /**
   * @param {ArrayName} name
   * @param {number} length
   * @param {number} kept
   */
  grow(name, length, kept) {
    const old = this.arrays[name];
    if (old.length >= length) return;
    this.arrays[name] = new KINDS[name](Math.max(length, 2 * old.length));
    this.arrays[name].set(old.subarray(0, kept));
  }
}

/** Everything that a widget shows. */
export class GridData {
  constructor() {
    /** @type {Map<string, Site>} */
    this.sites = new Map();
    /** @type {Map<string, Sheet>} */
    this.sheets = new Map();
    /** @type {number[]} */
    this.ids = [];
    /** @type {string[]} */
    this.texts = [];
    /** @type {string[]} */
    this.searchable = [];
    /** @type {Map<string, number[]>} places of each text: several tokens may have one */
    this.named = new Map();
    /** @type {Map<number, number>} */
    this.places = new Map();
    this.scales = /** @type {Record<Metric, Scale>} */ ({});
  }

  get nTokens() {
    return Math.max(0, ...[...this.sheets.values()].map((sheet) => sheet.n));
  }

  /**
   * Take in a header with its bytes. False, and nothing changed, where tokens before them never arrived.
   * @param {Header} header
   * @param {Bytes} bytes
   */
  apply(header, bytes) {
    const view = "buffer" in bytes ? bytes : new DataView(bytes);
    const buffer = view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
    if (header.vocabulary.start > this.ids.length) return false;
    if (header.sheets.some((part) => part.start > (this.sheets.get(keyOf(part.site, part.view))?.n ?? 0))) return false;
    header.vocabulary.ids.forEach((id, i) => this.name(header.vocabulary.start + i, id, header.vocabulary.texts[i]));
    this.scales = header.scales;
    for (const site of header.sites) this.sites.set(site.name, site);
    for (const part of header.sheets) this.sheet(this.site(part.site), part.view).write(part, buffer);
    return true;
  }

  /**
   * @param {number} place
   * @param {number} id
   * @param {string} text
   */
  name(place, id, text) {
    if (this.ids[place] === id) return;
    const same = [...(this.named.get(text) ?? []), place];
    this.named.set(text, same);
    this.ids[place] = id;
    for (const one of same) this.texts[one] = same.length > 1 ? `${text} (id ${this.ids[one]})` : text;
    this.searchable[place] = text.toLowerCase();
    this.places.set(id, place);
  }

  /**
   * The site of a name; the first where there is none.
   * @param {string} name
   */
  site(name) {
    return this.sites.get(name) ?? [...this.sites.values()][0];
  }

  /**
   * @param {Site} site
   * @param {string} view
   */
  sheet(site, view) {
    const key = keyOf(site.name, view);
    const sheet = this.sheets.get(key) ?? new Sheet(site);
    this.sheets.set(key, sheet);
    return sheet;
  }

  /**
   * One view of one site; the site's first view where it has no other of that name.
   * @param {string} siteName
   * @param {string} viewName
   */
  panel(siteName, viewName) {
    const site = this.site(siteName);
    const view = site.views.includes(viewName) ? viewName : site.views[0];
    const signed = view === "difference";
    return new Panel(this, site, view, this.sheet(site, signed ? "steered" : view), signed ? this.sheet(site, "base") : null);
  }
}

/** @type {(site: string, view: string) => string} */
const keyOf = (site, view) => JSON.stringify([site, view]);

/** A grid as it is looked at: a sheet, or the change from one to another. Rows count from the first block. */
export class Panel {
  /**
   * @param {GridData} data
   * @param {Site} site
   * @param {string} view
   * @param {Sheet} sheet
   * @param {Sheet | null} base
   */
  constructor(data, site, view, sheet, base) {
    this.data = data;
    this.site = site;
    this.view = view;
    this.sheet = sheet;
    this.base = base;
    this.layers = site.layers;
    this.rows = site.layers.length;
    this.columns = base ? Math.min(site.n_shared, sheet.n, base.n) : sheet.n;
    this.k = site.k;
  }

  /**
   * @param {Metric} metric
   * @returns {Scale}
   */
  scale(metric) {
    return { ...this.data.scales[metric], signed: this.base !== null && metric !== "kl_from_base" };
  }

  /**
   * The metric at a cell, or its change; NaN where there is none.
   * @param {Metric} metric
   * @param {number} row
   * @param {number} column
   */
  value(metric, row, column) {
    const cell = column * this.rows + row;
    if (metric === "prob") return this.changeOfTop(row, column);
    if (metric === "kl_from_base") return this.sheet.arrays.kl_from_base[cell] ?? NaN;
    /** @type {(sheet: Sheet, at: number) => number} */
    const read = metric === "rank" ? rankAt : (sheet, at) => sheet.arrays[metric][at];
    if (!this.base) return read(this.sheet, cell);
    if (metric === "rank" && this.sheet.arrays.next[column] !== this.base.arrays.next[column]) return NaN;
    return read(this.sheet, cell) - read(this.base, cell);
  }

  /**
   * The probability of the top token or, in a difference, its change; without `base_prob` what base does not list is 0.
   * @param {number} row
   * @param {number} column
   */
  changeOfTop(row, column) {
    const cell = column * this.rows + row;
    const first = cell * this.k;
    const here = PROBABILITIES[this.sheet.arrays.prob[first]];
    if (!this.base) return here;
    const top = this.sheet.arrays.top[first];
    for (let i = first; i < first + this.k; i++)
      if (this.base.arrays.top[i] === top) return here - PROBABILITIES[this.base.arrays.prob[i]];
    return here - (PROBABILITIES[this.sheet.arrays.base_prob[cell]] || 0);
  }

  /**
   * Place in the vocabulary of the most likely token.
   * @param {number} row
   * @param {number} column
   */
  top(row, column, sheet = this.sheet) {
    return sheet.arrays.top[(column * this.rows + row) * this.k];
  }

  /**
   * Whether the top token is already the last block's or, in a difference, another than without steering.
   * @param {number} row
   * @param {number} column
   */
  marked(row, column) {
    const top = this.top(row, column);
    return this.base ? top !== this.top(row, column, this.base) : top === this.top(this.rows - 1, column);
  }

  /**
   * The likeliest tokens: place in the vocabulary and probability.
   * @param {number} row
   * @param {number} column
   */
  topK(row, column, sheet = this.sheet) {
    const first = (column * this.rows + row) * this.k;
    return Array.from({ length: this.k }, (_, i) => ({
      place: sheet.arrays.top[first + i],
      p: PROBABILITIES[sheet.arrays.prob[first + i]],
    }));
  }

  /** @param {number} column */
  next(column, sheet = this.sheet) {
    return column < sheet.n ? sheet.arrays.next[column] : NONE;
  }

  /**
   * @param {number} row
   * @param {number} column
   */
  rank(row, column, sheet = this.sheet) {
    return rankAt(sheet, column * this.rows + row);
  }

  /**
   * Probability of any token: known where it follows, is a target, or is among the top k; else NaN.
   * @param {number} place
   * @param {number} row
   * @param {number} column
   */
  probabilityOf(place, row, column, sheet = this.sheet) {
    const cell = column * this.rows + row;
    const arrays = sheet.arrays;
    if (arrays.next[column] === place) return PROBABILITIES[arrays.next_prob[cell]];
    const target = sheet.targetIds.indexOf(place);
    if (target >= 0) return PROBABILITIES[arrays.targets[cell * sheet.targetIds.length + target]];
    for (let i = cell * this.k; i < (cell + 1) * this.k; i++) if (arrays.top[i] === place) return PROBABILITIES[arrays.prob[i]];
    return NaN;
  }

  /** @param {number} place */
  text(place) {
    return place === NONE ? "" : this.data.texts[place] ?? "";
  }

  /**
   * Cells whose top token contains the query, token by token, the last block first. A character of several tokens is
   * found where they stand, in the last block, and where they are foretold.
   * @param {string} query
   */
  search(query) {
    /** @type {Cell[]} */
    const found = [];
    if (!query) return found;
    const wanted = this.data.searchable.map((text) => text.includes(query));
    const parts = this.sheet.characters.map((character) => character.toLowerCase().includes(query));
    for (let column = 0; column < this.columns; column++)
      for (let row = this.rows - 1; row >= 0; row--) {
        const top = this.top(row, column);
        const part = (parts[column] && row === this.rows - 1) || (parts[column + 1] && top === this.next(column));
        if (wanted[top] || part) found.push({ row, column });
      }
    return found;
  }
}

/**
 * @param {Sheet} sheet
 * @param {number} cell
 */
function rankAt(sheet, cell) {
  return sheet.arrays.rank[cell] || NaN;
}
