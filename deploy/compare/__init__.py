"""`steppe compare`: methods times data sets times seeds, and what may be said of them."""
