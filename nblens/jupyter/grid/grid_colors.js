// From numbers to colours.
import { DIFFERENCE_COLORS, MAGNITUDE_COLORS } from "../appearance.js";

/** @typedef {{high: number, logarithmic: boolean, signed?: boolean}} Scale as nblens.colors.Scale */

/**
 * Red, green, blue from 0 to 255.
 * @param {string} color
 */
function channels(color) {
  return [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
}

/** @param {string} color */
function luminance(color) {
  const [r, g, b] = channels(color).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/**
 * WCAG 2 contrast ratio, 1 to 21.
 * @param {string} one
 * @param {string} other
 */
export function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

/**
 * Black or white, whichever reads better on a colour.
 * @param {string} color
 */
export function ink(color) {
  return contrast("#000000", color) >= contrast("#ffffff", color) ? "#000000" : "#ffffff";
}

/**
 * Colours of a scale from low to high, with the ink for text on each, and as the 32-bit pixels of an ImageData.
 * @param {string[]} colors
 */
function palette(colors) {
  const pixels = new Uint32Array(colors.length);
  const bytes = new Uint8Array(pixels.buffer);
  colors.forEach((color, i) => bytes.set([...channels(color), 255], 4 * i));
  return { colors, inks: colors.map(ink), pixels };
}

const MAGNITUDE = palette(MAGNITUDE_COLORS);
const DIFFERENCE = palette(DIFFERENCE_COLORS);

/** @param {Scale} scale */
export function paletteOf(scale) {
  return scale.signed ? DIFFERENCE : MAGNITUDE;
}

/**
 * Place of a value on its scale, 0 to 1; NaN stays NaN.
 * @param {Scale} scale
 * @param {number} value
 */
export function positionOn(scale, value) {
  const size = Math.min(Math.abs(value), scale.high);
  if (scale.signed) {
    const part = scale.logarithmic ? Math.log1p(size) / Math.log1p(scale.high) : size / scale.high;
    return 0.5 + 0.5 * Math.sign(value) * part;
  }
  return scale.logarithmic ? 1 - Math.log(Math.max(size, 1)) / Math.log(scale.high) : size / scale.high;
}

/**
 * Index of a value's colour; -1 where there is no value.
 * @param {Scale} scale
 * @param {number} value
 */
export function levelOn(scale, value) {
  const at = positionOn(scale, value);
  return Number.isNaN(at) ? -1 : Math.round(at * (paletteOf(scale).colors.length - 1));
}

/**
 * Numbers under a legend, from its left end to its right.
 * @param {Scale} scale
 */
export function legendValues(scale) {
  if (scale.signed) return [-scale.high, 0, scale.high];
  if (!scale.logarithmic) return [0, scale.high / 2, scale.high];
  const decades = Math.round(Math.log10(scale.high));
  return Array.from({ length: decades + 1 }, (_, i) => 10 ** (decades - i));
}
