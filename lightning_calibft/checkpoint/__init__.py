"""What a calibrated file holds, and how it is read and written."""
