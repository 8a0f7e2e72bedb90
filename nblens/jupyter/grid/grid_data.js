// The arrays of a grid, decoded from what nblens/jupyter/grid_payload.py sends. Tokens come first in every array, so
// that new ones are written at the end.

export const NONE = 0xffffffff;
const UNKNOWN = 65535;

const PROBABILITIES = Float32Array.from({ length: 65536 }, (_, code) =>
  code === UNKNOWN ? NaN : Math.exp(-60 * (code / 65534) ** 2),
);

/** A probability from its 16-bit code. */
export function probability(code) {
  return PROBABILITIES[code];
}

const KINDS = {
  top: Uint32Array, prob: Uint16Array, entropy: Float32Array, kl: Float32Array, rank: Uint32Array,
  next_prob: Uint16Array, next: Uint32Array, targets: Uint16Array,
};

const TYPES = { u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

/** What one view of one site holds. */
class Sheet {
  constructor(facts) {
    this.facts = facts;
    this.n = 0;
    this.tokens = [];
    this.targetIds = [];
    this.arrays = {};
  }

  write(part, buffer) {
    const end = part.start + part.tokens.length;
    this.tokens.length = Math.min(this.tokens.length, part.start);
    for (const token of part.tokens) this.tokens.push(token);
    this.targetIds = part.target_ids;
    this.promptLength = part.prompt_length;
    const { layers, k } = this.facts;
    const perToken = { top: layers.length * k, prob: layers.length * k, next: 1, targets: layers.length * part.target_ids.length };
    for (const [name, type, offset, length] of part.arrays) {
      const stride = perToken[name] ?? layers.length;
      this.grow(name, end * stride, part.start * stride);
      this.arrays[name].set(new TYPES[type](buffer, offset, length), part.start * stride);
    }
    this.n = end;
  }

  grow(name, length, kept) {
    const old = this.arrays[name];
    if (old && old.length >= length) return;
    this.arrays[name] = new KINDS[name](old ? Math.max(length, 2 * old.length) : length);
    if (old) this.arrays[name].set(old.subarray(0, kept));
  }
}

/** Everything that a widget shows. */
export class GridData {
  constructor() {
    this.sites = new Map();
    this.sheets = new Map();
    this.ids = [];
    this.texts = [];
    this.searchable = [];
    this.places = new Map();
    this.scales = {};
  }

  get nTokens() {
    return Math.max(0, ...[...this.sheets.values()].map((sheet) => sheet.n));
  }

  /** Take in a header with its bytes. False, and nothing changed, where tokens before them never arrived. */
  apply(header, bytes) {
    const view = bytes.buffer ? bytes : new DataView(bytes);
    const buffer = view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
    const key = (part) => JSON.stringify([part.site, part.view]);
    if (header.vocabulary.start > this.ids.length) return false;
    if (header.sheets.some((part) => part.start > (this.sheets.get(key(part))?.n ?? 0))) return false;
    header.vocabulary.ids.forEach((id, i) => this.name(header.vocabulary.start + i, id, header.vocabulary.texts[i]));
    this.scales = header.scales;
    for (const site of header.sites) this.sites.set(site.name, site);
    for (const part of header.sheets) {
      if (!this.sheets.has(key(part))) this.sheets.set(key(part), new Sheet(this.sites.get(part.site)));
      this.sheets.get(key(part)).write(part, buffer);
    }
    return true;
  }

  name(place, id, text) {
    this.ids[place] = id;
    this.texts[place] = text;
    this.searchable[place] = text.toLowerCase();
    this.places.set(id, place);
  }

  /** One view of one site; the site's first view where it has no other of that name. */
  panel(siteName, viewName) {
    const site = this.sites.get(siteName) ?? this.sites.values().next().value;
    const view = site.views.includes(viewName) ? viewName : site.views[0];
    const sheet = (name) => this.sheets.get(JSON.stringify([site.name, name]));
    const signed = view === "difference";
    return new Panel(this, site, view, sheet(signed ? "steered" : view), signed ? sheet("base") : null);
  }
}

/** A grid as it is looked at: a sheet, or the change from one to another. Rows count from the first block. */
export class Panel {
  constructor(data, site, view, sheet, base) {
    Object.assign(this, { data, site, view, sheet, base });
    this.layers = site.layers;
    this.rows = site.layers.length;
    this.columns = base ? Math.min(site.n_shared, sheet.n, base.n) : sheet.n;
    this.k = site.k;
  }

  scale(metric) {
    return { ...this.data.scales[metric], signed: this.base !== null };
  }

  /** The metric at a cell, or its change; NaN where there is none. */
  value(metric, row, column) {
    const cell = column * this.rows + row;
    if (metric === "prob") return this.changeOfTop(row, column);
    const read = metric === "rank" ? rankAt : (sheet, at) => sheet.arrays[metric][at];
    if (!this.base) return read(this.sheet, cell);
    if (metric === "rank" && this.sheet.arrays.next[column] !== this.base.arrays.next[column]) return NaN;
    return read(this.sheet, cell) - read(this.base, cell);
  }

  changeOfTop(row, column) {
    const first = (column * this.rows + row) * this.k;
    const here = PROBABILITIES[this.sheet.arrays.prob[first]];
    if (!this.base) return here;
    const top = this.sheet.arrays.top[first];
    for (let i = first; i < first + this.k; i++)
      if (this.base.arrays.top[i] === top) return here - PROBABILITIES[this.base.arrays.prob[i]];
    return here;
  }

  /** Place in the vocabulary of the most likely token. */
  top(row, column) {
    return this.sheet.arrays.top[(column * this.rows + row) * this.k];
  }

  /** Whether the top token is already the last block's or, in a difference, another than without steering. */
  marked(row, column) {
    if (this.base) return this.top(row, column) !== this.base.arrays.top[(column * this.rows + row) * this.k];
    return this.top(row, column) === this.top(this.rows - 1, column);
  }

  /** The likeliest tokens: place in the vocabulary and probability. */
  topK(row, column, sheet = this.sheet) {
    const first = (column * this.rows + row) * this.k;
    return Array.from({ length: this.k }, (_, i) => ({
      place: sheet.arrays.top[first + i],
      p: PROBABILITIES[sheet.arrays.prob[first + i]],
    }));
  }

  next(column, sheet = this.sheet) {
    return column < sheet.n ? sheet.arrays.next[column] : NONE;
  }

  rank(row, column, sheet = this.sheet) {
    return rankAt(sheet, column * this.rows + row);
  }

  /** Probability of any token: known where it follows, is a target, or is among the top k; else NaN. */
  probabilityOf(place, row, column, sheet = this.sheet) {
    const cell = column * this.rows + row;
    const arrays = sheet.arrays;
    if (arrays.next[column] === place) return PROBABILITIES[arrays.next_prob[cell]];
    const target = sheet.targetIds.indexOf(place);
    if (target >= 0) return PROBABILITIES[arrays.targets[cell * sheet.targetIds.length + target]];
    for (let i = cell * this.k; i < (cell + 1) * this.k; i++) if (arrays.top[i] === place) return PROBABILITIES[arrays.prob[i]];
    return NaN;
  }

  text(place) {
    return place === NONE ? "" : this.data.texts[place] ?? "";
  }

  /** Cells whose top token contains the query, token by token, the last block first. */
  search(query) {
    const found = [];
    if (!query) return found;
    const wanted = this.data.searchable.map((text) => text.includes(query));
    for (let column = 0; column < this.columns; column++)
      for (let row = this.rows - 1; row >= 0; row--) if (wanted[this.top(row, column)]) found.push({ row, column });
    return found;
  }
}

function rankAt(sheet, cell) {
  return sheet.arrays.rank[cell] || NaN;
}
