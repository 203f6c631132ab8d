"""Other packages' attention interfaces, served by `fastattn.attention`; one file per package."""
