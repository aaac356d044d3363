"""Pictures as SVG, drawn here so that a page shows them without any script."""
