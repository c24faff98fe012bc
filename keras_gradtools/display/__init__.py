"""How results show themselves: short text forms, and tables in HTML for notebooks and pages."""
