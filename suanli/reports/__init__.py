"""Layer 6: records to text and pages."""
