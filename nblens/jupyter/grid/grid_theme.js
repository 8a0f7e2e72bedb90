// The page's colours and fonts, for what is drawn and not styled.

/** @typedef {Record<"bg" | "fg" | "soft" | "accent" | "mono" | "sans", string>} Theme */

/**
 * Colours and fonts as they are now.
 * @param {Element} root
 * @returns {Theme}
 */
export function readTheme(root) {
  const style = getComputedStyle(root);
  const [soft, mono] = [".nbg-soft", ".nbg-mono"].map((name) => getComputedStyle(root.querySelector(name) ?? root));
  return {
    bg: style.backgroundColor,
    fg: style.color,
    soft: soft.color,
    accent: soft.outlineColor,
    mono: mono.fontFamily,
    sans: style.fontFamily,
  };
}

/**
 * Call back when the colours change. They have a transition of no visible length, which says so whatever the cause.
 * @param {Element} root
 * @param {() => void} changed
 * @param {AbortSignal} signal
 */
export function watchTheme(root, changed, signal) {
  root.addEventListener("transitionend", (event) => event.target === root && changed(), { signal });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed, { signal });
  const observer = new MutationObserver(changed);
  for (const node of [document.documentElement, document.body])
    observer.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light", "data-theme"] });
  signal.addEventListener("abort", () => observer.disconnect());
}
