"""Text that ships with slimrank; see ATTRIBUTION.md."""
