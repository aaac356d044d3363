"""A folder of results in the browser, served to this machine alone."""
