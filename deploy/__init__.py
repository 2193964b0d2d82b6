"""The composition root: command line, driver, and every use of Ray."""
