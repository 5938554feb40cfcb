"""Pages on what was studied, a folder each: the record, the page, and the code that makes one from the other."""
