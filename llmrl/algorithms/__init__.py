"""One trainer a file; each loop is written out once."""
