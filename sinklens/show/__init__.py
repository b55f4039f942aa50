"""Internal: notebook tables, progress, themes of figures and pages. Knows no model."""
