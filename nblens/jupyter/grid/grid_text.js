// How numbers and tokens are written. The same as in nblens/appearance.py, so that a figure and the page agree.

const WIDE = /[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|[\u{1f300}-\u{1faff}]|[\u{20000}-\u{3fffd}]/u;
const COMBINING = /\p{M}/u;

/** Columns in a monospace font: 2 for East Asian wide characters, 0 for combining ones. */
export function displayWidth(text) {
  let width = 0;
  for (const character of text) width += COMBINING.test(character) ? 0 : WIDE.test(character) ? 2 : 1;
  return width;
}

/** The text, cut with … where it is wider. */
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

/** As C's %.{digits}g. */
function general(value, digits) {
  if (value === 0) return "0";
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
  const power = Number(exponent);
  if (power >= -4 && power < digits) return String(Number(value.toPrecision(digits)));
  const size = String(Math.abs(power)).padStart(2, "0");
  return `${Number(mantissa)}e${power < 0 ? "-" : "+"}${size}`;
}

/** A probability as 97.1%, 0.034%. */
export function percent(probability) {
  if (Number.isNaN(probability)) return "–";
  const share = 100 * probability;
  return (share >= 0.95 || share === 0 ? share.toFixed(1) : general(share, 2)) + "%";
}

/** A probability in at most five signs, for where there is little room. */
export function briefPercent(probability) {
  if (Number.isNaN(probability)) return "–";
  const share = 100 * probability;
  return share >= 9.95 ? `${Math.round(share)}%` : share >= 0.095 ? `${share.toFixed(1)}%` : "<.1%";
}

/** A number in at most three digits: 0.5, −1.2, 12, 10k. */
export function shortNumber(value) {
  if (Number.isNaN(value)) return "–";
  for (const [unit, letter] of [[1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= unit) return shortNumber(value / unit) + letter;
  return general(value, 3).replaceAll("-", "\u2212");
}

/** With + in front of what is above zero. */
export function signedNumber(value) {
  return (value > 0 ? "+" : "") + shortNumber(value);
}

/** What a reader types, in the signs that tokens are shown with; lower case, for a search that ignores case. */
export function asSearched(query) {
  return query.replaceAll(" ", "·").replaceAll("\\n", "⏎").replaceAll("\\t", "⇥").toLowerCase();
}
