"""One module an API: a request body to a generation request, events to the API's own form."""
