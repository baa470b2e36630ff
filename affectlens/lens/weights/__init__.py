"""Other weights by pointer: of some sites, or of a whole second model."""
