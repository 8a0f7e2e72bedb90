"""The notebook's side: magics and what they display. The only package that imports IPython."""
