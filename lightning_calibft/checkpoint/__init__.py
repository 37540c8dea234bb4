"""Reading, writing, folding, inspecting and exporting calibrated files."""
