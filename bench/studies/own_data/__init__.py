"""Five kinds of a user's own data, from a file to a model that llama.cpp runs, by the command line's defaults alone."""
