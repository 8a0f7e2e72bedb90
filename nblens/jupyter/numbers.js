// How numbers are written. The same as in nblens/text.py, so that a figure and the page agree.

/**
 * As C's %.{digits}g.
 * @param {number} value
 * @param {number} digits
 */
function general(value, digits) {
  if (value === 0) return "0";
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
  const power = Number(exponent);
  if (power >= -4 && power < digits) return String(Number(value.toPrecision(digits)));
  const size = String(Math.abs(power)).padStart(2, "0");
  return `${Number(mantissa)}e${power < 0 ? "-" : "+"}${size}`;
}

/**
 * A probability as 97.1%, 0.034%.
 * @param {number} probability
 */
export function percent(probability) {
  if (Number.isNaN(probability)) return "–";
  const share = 100 * probability;
  return (share >= 0.95 || share === 0 ? share.toFixed(1) : general(share, 2)) + "%";
}

/**
 * A probability in at most five signs, for where there is little room.
 * @param {number} probability
 */
export function briefPercent(probability) {
  if (Number.isNaN(probability)) return "–";
  const share = 100 * probability;
  return share >= 9.95 ? `${Math.round(share)}%` : share >= 0.095 ? `${share.toFixed(1)}%` : "<.1%";
}

/** @type {[number, string][]} */
const UNITS = [[1e9, "B"], [1e6, "M"], [1e3, "k"]];

/**
 * A number in at most three digits: 0.5, −1.2, 12, 10k, ∞.
 * @param {number} value
 * @returns {string}
 */
export function shortNumber(value) {
  if (Number.isNaN(value)) return "–";
  if (Math.abs(value) === Infinity) return value > 0 ? "∞" : "\u2212∞";
  for (const [unit, letter] of UNITS) if (Math.abs(value) >= unit) return shortNumber(value / unit) + letter;
  return general(value, 3).replaceAll("-", "\u2212");
}

/**
 * With + in front of what is above zero.
 * @param {number} value
 */
export function signedNumber(value) {
  return (value > 0 ? "+" : "") + shortNumber(value);
}
