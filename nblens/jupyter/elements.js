// Elements of the page, and the model as a script sees it. Text goes in as text alone: what a model says is never markup.

/**
 * What a widget's script and its kernel share.
 * @template Traits
 * @typedef {{
 *   get<Name extends keyof Traits>(name: Name): Traits[Name],
 *   set<Name extends keyof Traits>(name: Name, value: Traits[Name]): void,
 *   save_changes(): void,
 *   send(message: object): void,
 *   on(event: string, act: (...said: any[]) => void): void,
 *   off(event: string, act: (...said: any[]) => void): void,
 * }} Model
 */

/** @typedef {Record<string, string | number | boolean | null | undefined>} Attributes */

/**
 * An element with attributes, and with children that are elements or text. An attribute that is true has no value; one
 * that is false or missing is left out.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Attributes} [attributes]
 * @param {...(Node | string)} children
 */
export function element(tag, attributes = {}, ...children) {
  const node = filled(document.createElement(tag), attributes, children);
  // JupyterLab's shortcuts are for whatever has the focus, unless that very element says no: one around it is too late
  if (node.tabIndex >= 0) node.setAttribute("data-lm-suppress-shortcuts", "true");
  return node;
}

/**
 * A part of an svg, in the same way.
 * @template {keyof SVGElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Attributes} [attributes]
 * @param {...(Node | string)} children
 */
export function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/**
 * @template {Element} Made
 * @param {Made} node
 * @param {Attributes} attributes
 * @param {(Node | string)[]} children
 */
function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes))
    if ((value ?? false) !== false) node.setAttribute(name, value === true ? "" : String(value));
  node.append(...children);
  return node;
}
