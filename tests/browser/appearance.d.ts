// The colours that nblens/jupyter/assets.py writes in front of a widget's scripts.
declare module "*/appearance.js" {
  export const MAGNITUDE_COLORS: string[];
  export const DIFFERENCE_COLORS: string[];
  export const LINE_COLORS: string[];
}
