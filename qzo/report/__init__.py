"""A run as one offline HTML page, and its curves as a picture."""
