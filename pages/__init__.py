"""HTML pages that are one file each: tables of shades, curves and plain tables. Knows nothing of models."""
