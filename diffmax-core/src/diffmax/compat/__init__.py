"""Other packages' names over diffmax's operator, for code that was written for them."""
