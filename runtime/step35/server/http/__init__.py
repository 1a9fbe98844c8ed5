"""HTTP: routes, streams, access, the page, and the process that serves."""
