"""Layer 1: what is to be computed. The record, the built-ins, the importers and the data sets."""
