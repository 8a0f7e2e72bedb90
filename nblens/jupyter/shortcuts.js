// JupyterLab's shortcuts, kept away from the controls of a widget.

/**
 * Keep a control's keys to itself. JupyterLab's shortcuts are for whatever has the focus, unless that very element says
 * no: one around it is too late.
 */
export function keepShortcutsAway(node) {
  if (node.tabIndex >= 0) node.setAttribute("data-lm-suppress-shortcuts", "true");
  return node;
}
