// How tokens are written. The same as in nblens/text.py, so that a figure and the page agree.

const WIDE = /[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|[\u{1f300}-\u{1faff}]|[\u{20000}-\u{3fffd}]/u;
const COMBINING = /\p{M}/u;

/**
 * Columns in a monospace font: 2 for East Asian wide characters, 0 for combining ones.
 * @param {string} text
 */
function displayWidth(text) {
  let width = 0;
  for (const character of text) width += COMBINING.test(character) ? 0 : WIDE.test(character) ? 2 : 1;
  return width;
}

/**
 * The text, cut with … where it is wider.
 * @param {string} text
 * @param {number} columns
 */
export function fit(text, columns) {
  if (text.length <= columns && !WIDE.test(text)) return text;
  if (displayWidth(text) <= columns) return text;
  let kept = "";
  let width = 1;
  for (const character of text) {
    width += displayWidth(character);
    if (width > columns) break;
    kept += character;
  }
  return kept + "…";
}

/**
 * What a reader types, in the signs that tokens are shown with; lower case, for a search that ignores case.
 * @param {string} query
 */
export function asSearched(query) {
  return query.replaceAll(" ", "·").replaceAll("\\n", "⏎").replaceAll("\\t", "⇥").toLowerCase();
}
