// The page's colours and fonts, for what is drawn and not styled.

/** Colours and fonts as they are now. */
export function readTheme(root) {
  const style = getComputedStyle(root);
  const of = (name) => getComputedStyle(root.querySelector(name));
  return {
    bg: style.backgroundColor,
    fg: style.color,
    soft: of(".nbg-soft").color,
    accent: of(".nbg-soft").outlineColor,
    mono: of(".nbg-mono").fontFamily,
    sans: style.fontFamily,
  };
}

/** Call back when the colours change. They have a transition of no visible length, which says so whatever the cause. */
export function watchTheme(root, changed, signal) {
  root.addEventListener("transitionend", (event) => event.target === root && changed(), { signal });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed, { signal });
  const observer = new MutationObserver(changed);
  for (const node of [document.documentElement, document.body])
    observer.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light", "data-theme"] });
  signal.addEventListener("abort", () => observer.disconnect());
}
