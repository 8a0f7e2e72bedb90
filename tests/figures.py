"""Rendering figures in tests, and reading what was drawn."""

import io


def drawn(figure):
    """Render; a glyph that is missing would warn, and a warning is an error here."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    return figure


def texts(axes):
    return [text.get_text() for text in axes.texts]


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]
